"""Options of the section ``experiment_params``: the run."""

from utils.config.checkers import AUTO_ON_OFF, Bool, Choice, FilePath, Float, Int, RunName
from utils.config.options import EXECUTION, EXTENT, PLACE, REPLICATE, Option

OPTIONS = {
    "seed": Option(
        Int(0, 2**32 - 1), default=0, role=REPLICATE, meaning="seed: weights, data order, augmentation, random pruning"
    ),
    "base_dir": Option(FilePath(), default="./experiments", role=PLACE, meaning="folder of all runs"),
    "expt_name": Option(
        RunName(), default="", role=PLACE, meaning='name of this run; "" = experiment_<date>_<time>_<id>'
    ),
    "epochs_per_level": Option(
        Int(1), default=20, unit="epochs", meaning="E: epochs per level (with wr, E - k after level 0)"
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
        RunName(), default="", role=PLACE, meaning='name of the run to resume; "" = start a new run'
    ),
    "precision": Option(
        Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        meaning="autocast type; auto = bf16 if the hardware has it; fp32 = TF32 convolutions on GPUs, torch's default",
    ),
    "compile": Option(
        Choice(AUTO_ON_OFF), default="auto", role=EXECUTION, meaning="torch.compile; auto = on GPUs without sync_bn"
    ),
    "cuda_graphs": Option(
        Bool(), default=False, role=EXECUTION, meaning="run the compiled network as CUDA graphs: faster if it is small"
    ),
    "channels_last": Option(
        Bool(), default=True, role=EXECUTION, meaning="NHWC memory layout for images and convolutions"
    ),
    "save_every_epochs": Option(
        Int(0), default=1, unit="epochs", role=EXECUTION, meaning="epochs between saved resume states; 0 = off"
    ),
    "save_every_minutes": Option(
        Float("[0,]"),
        default=0.0,
        unit="minutes",
        role=EXECUTION,
        meaning="at the end of an epoch, save if the last state is older than this; 0 = off",
    ),
    "deterministic": Option(
        Bool(),
        default=False,
        role=EXECUTION,
        meaning="deterministic kernels only (slower); on GPUs, torchvision's VGG and AlexNet have none",
    ),
}
