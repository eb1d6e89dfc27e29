"""Options of the section ``optimizer``: the optimizer and its learning-rate schedule."""

from utils.config.checkers import Bool, Choice, Float, List
from utils.config.options import Option
from utils.optimizers import OPTIMIZERS
from utils.schedulers import SCHEDULES

OPTIONS = {
    "optimizer_name": Option(
        Choice(OPTIMIZERS), default="sgd", meaning="optimizer; Adam and AdamW need a far smaller lr than SGD"
    ),
    "lr": Option(Float("(0,]"), default=0.1, meaning="peak learning rate, for the global batch"),
    "momentum": Option(Float("[0, 1)"), default=0.9, meaning="momentum of SGD"),
    "nesterov": Option(Bool(), default=False, meaning="use Nesterov momentum"),
    "beta1": Option(Float("[0, 1)"), default=0.9, meaning="decay of Adam's and AdamW's mean gradient"),
    "beta2": Option(Float("[0, 1)"), default=0.999, meaning="decay of Adam's and AdamW's mean squared gradient"),
    "weight_decay": Option(
        Float("[0,]"), default=5e-4, meaning="weight decay: an L2 penalty, with adamw decoupled from the gradient"
    ),
    "no_decay_bn": Option(Bool(), default=False, meaning="exempt BatchNorm and biases from weight decay"),
    "warmup_epochs": Option(
        Float("[0,]"), default=0.0, unit="epochs", meaning="length of the linear warm-up to lr; fractions allowed"
    ),
    "cooldown_epochs": Option(
        Float("[0,]"),
        default=0.0,
        unit="epochs",
        meaning="length of the linear cool-down that ends TrapezoidalSchedule; fractions allowed; 0 = a fifth",
    ),
    "scheduler_type": Option(
        Choice(SCHEDULES), default="MultiStepLRWarmup", meaning="shape of the learning-rate schedule"
    ),
    "milestones": Option(
        List(Float("(0,]"), bracketed=True),
        default=(),
        unit="epochs, or fractions of E if below 1",
        meaning="when the learning rate drops by gamma; [] = the schedule's own times",
    ),
    "gamma": Option(Float("(0, 1]"), default=0.1, meaning="factor on the learning rate at each milestone"),
    "lr_min": Option(Float("[0,]"), default=0.0, meaning="final learning rate of the schedules without milestones"),
    "label_smoothing": Option(
        Float("[0, 1)"), default=0.0, unit="fraction", meaning="label smoothing of the training loss"
    ),
    "grad_clip": Option(
        Float("[0,]"), default=0.0, unit="L2 norm", meaning="largest norm of the whole gradient; 0 = no clipping"
    ),
}
