"""Every option of the harness, declared once: what it takes, default, unit, meaning, role. And the checked config.

    cfg = load_config()                                   # the command line: --config FILE --section.key=value ...
    cfg = make_config({"optimizer": {"lr": 0.05}})        # the same checks, from Python
    cfg.optimizer.lr, cfg.replace({"optimizer": {"lr": 0.1}}), dump_yaml(cfg)

A config is frozen and holds values only: no global, no environment variable. An option's role (utils/config/options.py)
settles whether a resumed run may change it and whether a figure's legend names it; by default an option is part of the
experiment. utils/config/rules.py checks options against each other. Nothing here imports torch, so ``--help`` and
faults answer at once; what needs the data or the model is checked where those are made.
"""

import yaml

from utils.config.base import BaseConfig, unused_alone
from utils.config.checkers import Bool, Choice, FilePath, Float, Int, List, RunName, Word
from utils.config.options import EXECUTION, EXTENT, IMPLIED, PLACE, REPLICATE, Note, Option, Schema
from utils.config.resolving import Legacy
from utils.data.specs import DATASETS
from utils.errors import ConfigError, report
from utils.pruning.methods import METHODS, NO_METHOD
from utils.schedulers import SCHEDULES

__all__ = ["SCHEMA", "Config", "Note", "dump_yaml", "load_config", "make_config", "unused_alone"]

AUTO_ON_OFF = ("auto", "on", "off")
SIDE = Int(8, 1024, or_zero=True)  # of a square image

SCHEMA = Schema()

SCHEMA.section(
    "model_params",
    "the network",
    model_name=Option(
        Word(), default="lenet_300_100", meaning="name in utils/models.py, or of a torchvision classification model"
    ),
    conv_type=Option(Choice(["ConvMask"]), default="ConvMask", role=IMPLIED, meaning="kept for older config files"),
    blurpool=Option(Bool(), default=False, meaning="ResNets blur before each strided layer (Zhang 2019)"),
)
SCHEMA.section(
    "dataset",
    "the images",
    dataset_name=Option(Choice(list(DATASETS), any_case=True), default="Digits", meaning="name of the data set"),
    num_classes=Option(
        Int(2, or_zero=True), default=0, unit="classes", role=IMPLIED, meaning="classes of the data set; 0 = its own"
    ),
    batch_size=Option(Int(1), default=128, unit="images", meaning="global batch: images per step over all processes"),
    num_workers=Option(
        Int(0, 1024), default=2, role=EXECUTION, meaning="loading workers per process (torchvision and ffcv loaders)"
    ),
    data_root=Option(FilePath(), default="./data", role=PLACE, meaning="folder of the data"),
    download=Option(
        Bool(), default=True, role=EXECUTION, meaning="download the data set if it is missing (never a tree of images)"
    ),
    loader=Option(
        Choice(["auto", "memory", "torchvision", "ffcv"]),
        default="auto",
        role=IMPLIED,
        meaning="memory: padded crops, own statistics; others: resized crops, ImageNet statistics; "
        "auto = memory for small images, torchvision for large ones",
    ),
    augment=Option(
        Choice(["auto", "none", "flip", "crop", "crop_flip"]),
        default="auto",
        meaning="augmentation of training images; auto = the data set's usual recipe",
    ),
    alternate_flip=Option(
        Bool(),
        default=False,
        meaning="draw flips once per level; invert all of them in each epoch (sets held in memory)",
    ),
    drop_last=Option(Bool(), default=False, meaning="leave out the last batch of an epoch if it is short"),
    resolution=Option(SIDE, default=0, unit="pixels", meaning="side of training images; 0 = the data set's own"),
    eval_resolution=Option(SIDE, default=0, unit="pixels", meaning="side of test images; 0 = same as resolution"),
    start_resolution=Option(
        SIDE, default=0, unit="pixels", meaning="first side in progressive resizing (ffcv only); 0 = off"
    ),
    end_resolution=Option(
        SIDE, default=0, unit="pixels", meaning="last side in progressive resizing (ffcv only); 0 = off"
    ),
    os_cache=Option(
        Choice(AUTO_ON_OFF),
        default="auto",
        role=EXECUTION,
        meaning="keep .beton files in the page cache (ffcv only); auto = if they take under 80% of free memory",
    ),
    train_beton=Option(
        FilePath(optional=True), default="", role=PLACE, meaning='training .beton (ffcv only); "" = look in data_root'
    ),
    val_beton=Option(
        FilePath(optional=True), default="", role=PLACE, meaning='test .beton (ffcv only); "" = look in data_root'
    ),
)
SCHEMA.section(
    "prune_params",
    "which weights are pruned, how many, how often",
    prune_rate=Option(
        Float("(0, 1)"),
        default=0.2,
        unit="fraction",
        needs_several="levels",
        meaning="share of the remaining weights pruned before each level after level 0",
    ),
    prune_method=Option(
        Choice(list(METHODS)), default="mag", needs_several="levels", meaning="pruning criterion between levels"
    ),
    num_levels=Option(
        Int(1, 10000), default=12, unit="levels", role=EXTENT, meaning="levels to train, level 0 (dense) included"
    ),
    er_method=Option(
        Choice([NO_METHOD, *METHODS]),
        default=NO_METHOD,
        meaning=f"pruning criterion at initialization, before level 0; {NO_METHOD} = no pruning there",
    ),
    er_init=Option(
        Float("(0, 1]"), default=1.0, unit="fraction", meaning="density after pruning at initialization (er_method)"
    ),
    rewind_epoch=Option(
        Int(0), default=10, unit="epochs", meaning="k: wr rewinds to the state after k epochs of level 0 (wr only)"
    ),
    exclude=Option(
        List(Word()), default=(), meaning="layers to leave dense: shell-style patterns of their names, such as fc*"
    ),
    synflow_rounds=Option(
        Int(1), default=100, unit="rounds", meaning="rounds of scoring and pruning each time synflow prunes"
    ),
    score_batches=Option(
        Int(1), default=1, unit="batches", meaning="training batches that snip and grasp use to score weights"
    ),
    score_dtype=Option(
        Choice(["float32", "float64"]), default="float32", meaning="number type in which snip and grasp compute scores"
    ),
)
SCHEMA.section(
    "experiment_params",
    "the run",
    seed=Option(
        Int(0, 2**32 - 1), default=0, role=REPLICATE, meaning="seed: weights, data order, augmentation, random pruning"
    ),
    base_dir=Option(FilePath(), default="./experiments", role=PLACE, meaning="folder of all runs"),
    expt_name=Option(RunName(), default="", role=PLACE, meaning='name of this run; "" = experiment_<date>_<time>_<id>'),
    epochs_per_level=Option(
        Int(1), default=20, unit="epochs", meaning="E: epochs per level (with wr, E - k after level 0)"
    ),
    training_type=Option(
        Choice(["imp", "wr", "lrr"]),
        default="imp",
        needs_several="levels",
        meaning="weights at the start of a level: imp = initial, wr = those of epoch k, lrr = unchanged",
    ),
    resume_level=Option(
        Int(0),
        default=0,
        unit="level",
        role=EXTENT,
        meaning="level to train again, with those after it; 0 = go on where the run stands",
    ),
    resume_expt_name=Option(
        RunName(), default="", role=PLACE, meaning='name of the run to resume; "" = start a new run'
    ),
    precision=Option(
        Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        meaning="autocast type; auto = bf16 if the hardware has it; fp32 = TF32 convolutions on GPUs, torch's default",
    ),
    compile=Option(
        Choice(AUTO_ON_OFF), default="auto", role=EXECUTION, meaning="torch.compile; auto = on GPUs without sync_bn"
    ),
    cuda_graphs=Option(
        Bool(),
        default=False,
        role=EXECUTION,
        meaning="run the compiled network as CUDA graphs: faster if it is small",
    ),
    channels_last=Option(
        Bool(), default=True, role=EXECUTION, meaning="NHWC memory layout for images and convolutions"
    ),
    save_every_epochs=Option(
        Int(0), default=1, unit="epochs", role=EXECUTION, meaning="epochs between saved resume states; 0 = off"
    ),
    save_every_minutes=Option(
        Float("[0,]"),
        default=0.0,
        unit="minutes",
        role=EXECUTION,
        meaning="at the end of an epoch, save if the last state is older than this; 0 = off",
    ),
    deterministic=Option(
        Bool(),
        default=False,
        role=EXECUTION,
        meaning="deterministic kernels only (slower); on GPUs, torchvision's VGG and AlexNet have none",
    ),
)
SCHEMA.section(
    "optimizer",
    "SGD and its learning-rate schedule, both fresh at each level (with wr, both rewound)",
    lr=Option(Float("(0,]"), default=0.1, meaning="peak learning rate, for the global batch"),
    momentum=Option(Float("[0, 1)"), default=0.9, meaning="momentum of SGD"),
    nesterov=Option(Bool(), default=False, meaning="use Nesterov momentum"),
    weight_decay=Option(Float("[0,]"), default=5e-4, meaning="weight decay (L2 penalty)"),
    no_decay_bn=Option(Bool(), default=False, meaning="exempt BatchNorm and biases from weight decay"),
    warmup_epochs=Option(
        Float("[0,]"), default=0.0, unit="epochs", meaning="length of the linear warm-up to lr; fractions allowed"
    ),
    scheduler_type=Option(
        Choice(list(SCHEDULES)), default="MultiStepLRWarmup", meaning="shape of the learning-rate schedule"
    ),
    milestones=Option(
        List(Float("(0,]"), bracketed=True),
        default=(),
        unit="epochs, or fractions of E if below 1",
        meaning="when the learning rate drops by gamma; [] = the schedule's own times",
    ),
    gamma=Option(Float("(0, 1]"), default=0.1, meaning="factor on the learning rate at each milestone"),
    lr_min=Option(
        Float("[0,]"), default=0.0, meaning="final learning rate of the cosine, linear and triangular schedules"
    ),
    label_smoothing=Option(
        Float("[0, 1)"), default=0.0, unit="fraction", meaning="label smoothing of the training loss"
    ),
    grad_clip=Option(
        Float("[0,]"), default=0.0, unit="L2 norm", meaning="largest norm of the whole gradient; 0 = no clipping"
    ),
)
SCHEMA.section(
    "dist_params",
    "processes and how they communicate",
    distributed=Option(Bool(), default=True, role=EXECUTION, meaning="false = one process, whatever nproc says"),
    nproc=Option(
        Int(0, 1024), default=0, role=EXECUTION, meaning="processes on this machine; 0 = one per GPU, or one on the CPU"
    ),
    backend=Option(
        Choice(["auto", "gloo", "nccl"]),
        default="auto",
        role=EXECUTION,
        meaning="communication library; auto = nccl with a GPU per process, gloo otherwise",
    ),
    address=Option(
        Word(), default="localhost", role=PLACE, needs_several="processes", meaning="host at which the processes meet"
    ),
    port=Option(
        Int(0, 65535), default=0, role=PLACE, needs_several="processes", meaning="port at address; 0 = any free one"
    ),
    threads=Option(
        Int(0, 1024),
        default=0,
        role=EXECUTION,
        meaning="CPU threads per process; 0 = share of cores, 1 for small MLPs",
    ),
    sync_bn=Option(
        Bool(), default=False, needs_several="processes", meaning="take BatchNorm statistics over all processes"
    ),
    sparse_allreduce=Option(
        Choice(AUTO_ON_OFF),
        default="off",
        role=EXECUTION,
        needs_several="processes",
        meaning="send the gradients of kept weights only; auto = with gloo, at densities where it pays",
    ),
    wire=Option(
        Choice(["fp32", "bf16"]),
        default="fp32",
        needs_several="processes",
        meaning="number type in which gradients are sent; bf16 halves the bytes and rounds the gradients",
    ),
    timeout_minutes=Option(
        Float("(0,]"),
        default=10.0,
        unit="minutes",
        role=EXECUTION,
        needs_several="processes",
        meaning="time limit of one process's wait for another",
    ),
)


class Config(BaseConfig):
    """The checked, frozen config of the options above."""

    schema = SCHEMA
    legacy = Legacy(
        unused=frozenset({"experiment_params.expt_setup", "optimizer.num_workers"}),
        moved={"experiment_params.num_levels": "prune_params.num_levels"},
    )


make_config, load_config = Config.make, Config.load


def end_on_faults() -> None:
    """End this process if its command line asks for ``--help`` (exit 0) or has faults (2). No torch is imported."""
    try:
        load_config()
    except ConfigError as error:
        raise SystemExit(report(error)) from None


def dump_yaml(config: Config) -> str:
    """All options as YAML, which ``--config`` reads back to an equal config."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False, width=10**6)
