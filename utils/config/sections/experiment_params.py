"""Options of the section ``experiment_params``: the run."""

from utils.config.checkers import AUTO_ON_OFF, Bool, Choice, Float, Int, List, Switch
from utils.config.options import EXECUTION, EXTENT, PLACE, REPLICATE, Option
from utils.config.path_checkers import FilePath, RunName, RunPath

OPTIONS = {
    "seed": Option(
        Int(0, 2**32 - 1), default=0, role=REPLICATE, meaning="seed: weights, data order, augmentation, random pruning"
    ),
    "data_seed": Option(
        Int(-1, 2**32 - 1),
        default=-1,
        role=REPLICATE,
        meaning="seed of data order and augmentation alone, in training (not dropout, not pruning); -1 = as seed",
    ),
    "base_dir": Option(FilePath(), default="./experiments", role=PLACE, meaning="folder of all runs"),
    "expt_name": Option(
        RunName(), default="", role=PLACE, meaning='name of this run; "" = experiment_<date>_<time>_<id>'
    ),
    "plugins": Option(
        List(FilePath(), bracketed=True),
        default=(),
        role=PLACE,
        meaning="Python files that add criteria, models, data sets, schedules or optimizers, before names are checked; "
        "relative paths start at the working directory",
    ),
    "tracker": Option(
        Choice(["none", "tensorboard", "wandb"]),
        default="none",
        role=EXECUTION,
        meaning="show the CSVs' figures, the config and accuracy against density there, too: TensorBoard reads the "
        "run's folder tensorboard, wandb has its own settings (WANDB_PROJECT, WANDB_MODE)",
    ),
    "epochs_per_level": Option(
        Int(1), default=20, unit="epochs", meaning="E: epochs per level (with wr, E - k after level 0)"
    ),
    "cycles": Option(
        Int(1),
        default=1,
        unit="cycles",
        meaning="equal repeats of the learning-rate schedule in a level, of E / cycles epochs each (warm restarts)",
    ),
    "ema_decay": Option(
        Float("[0, 1)"),
        default=0.0,
        meaning="decay per step of an exponential moving average of the weights, evaluated beside them; 0 = off",
    ),
    "training_type": Option(
        Choice(["imp", "wr", "lrr"]),
        default="imp",
        needs_several="levels",
        meaning="weights at the start of a level: imp = initial, wr = those at k, lrr = unchanged",
    ),
    "resume_level": Option(
        Int(0),
        default=0,
        unit="level",
        role=EXTENT,
        meaning="level to train again, with those after it; 0 = go on where the run stands",
    ),
    "resume_expt_name": Option(
        RunPath(), default="", role=PLACE, meaning='name or directory of the run to resume; "" = start a new run'
    ),
    "precision": Option(
        Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        meaning="autocast type; auto = bf16 if the hardware has it; fp32 = TF32 convolutions on GPUs, torch's default",
    ),
    "compile": Option(
        Choice(AUTO_ON_OFF),
        default="auto",
        role=EXECUTION,
        meaning="torch.compile; auto = on GPUs, without sync_bn, what saves twice the time that compiling it takes",
    ),
    "cuda_graphs": Option(
        Switch(),
        default="auto",
        role=EXECUTION,
        meaning="launch each training step, and each evaluation, as one CUDA graph; auto = with one process on a GPU, "
        "images in memory, and bf16 or fp32",
    ),
    "channels_last": Option(
        Bool(), default=True, role=EXECUTION, meaning="NHWC memory layout for images and convolutions"
    ),
    "eval_every_epochs": Option(
        Int(1),
        default=1,
        unit="epochs",
        meaning="epochs of a level between two evaluations on the test set; the last epoch is always evaluated",
    ),
    "save_every_epochs": Option(
        Int(0),
        default=0,
        unit="epochs",
        role=EXECUTION,
        meaning="save a resume state at the end of every so many epochs; 0 = off; the end of a level is always saved",
    ),
    "save_every_minutes": Option(
        Float("[0,]"),
        default=1.0,
        unit="minutes",
        role=EXECUTION,
        meaning="save a resume state, also within an epoch, when the last one is older than this and than 50 times "
        "what training waited for it (2% of the time); 0 = off",
    ),
    "deterministic": Option(
        Bool(),
        default=False,
        role=EXECUTION,
        meaning="deterministic kernels only (slower); on GPUs, torchvision's VGG and AlexNet have none",
    ),
}
