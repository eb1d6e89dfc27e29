"""Every option of the harness, declared once: what it takes, default, unit, meaning; and the way to a checked config.

    cfg = load_config()                                   # the command line: --config FILE --section.key=value ...
    cfg = make_config({"optimizer": {"lr": 0.05}})        # the same checks, from Python
    cfg.optimizer.lr, cfg.replace({"optimizer": {"lr": 0.1}}), dump_yaml(cfg)

A config is frozen and holds its values only: no global, no environment variable. utils/config/rules.py has the checks
across options. Nothing here imports torch, so that ``--help`` and faults answer at once; what needs the data or the
model is checked where those are made.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import fastargs
import yaml

from utils.config.checkers import Bool, Choice, FilePath, Float, Int, List, RunName, Word
from utils.config.options import Group, Legacy, Option, Resolved, Source, fault, help_text, resolve, show
from utils.config.rules import BETWEEN_PROCESSES, CHECKS, without_effect
from utils.config.sources import parse_words, read_yaml
from utils.data.specs import DATASETS
from utils.errors import ConfigError, report
from utils.pruning.methods import METHODS, NO_METHOD
from utils.schedulers import SCHEDULES

__all__ = ["Config", "ConfigError", "dump_yaml", "load_config", "make_config"]

AUTO_ON_OFF = ("auto", "on", "off")

SCHEMA = fastargs.Config()  # the declarations; values are never kept in it


def _section(name: str, meaning: str, **options: Option) -> None:
    fastargs.Section(name, meaning, config_descriptor=SCHEMA).params(**options)


_section(
    "model_params",
    "the network",
    model_name=Option(
        Word(), "lenet_300_100", "", "a name of utils/models.py or of torchvision's classification models"
    ),
    conv_type=Option(Choice(["ConvMask"]), "ConvMask", "", "how layers are masked; kept for older files"),
    blurpool=Option(Bool(), False, "", "blur before striding in ResNets (Zhang 2019)"),
)
_section(
    "dataset",
    "the images",
    dataset_name=Option(Choice(list(DATASETS), any_case=True), "Digits", "", "the data set"),
    num_classes=Option(Int(2, or_zero=True), 0, "classes", "classes of the data set; 0 = its own"),
    batch_size=Option(Int(1), 128, "images", "global batch, shared out over all processes"),
    num_workers=Option(Int(0, 1024), 2, "processes", "loader workers of each process (torchvision and ffcv loaders)"),
    data_root=Option(FilePath(), "./data", "", "directory of the data"),
    download=Option(Bool(), True, "", "fetch a missing data set, where it may be fetched"),
    loader=Option(
        Choice(["auto", "memory", "torchvision", "ffcv"]),
        "auto",
        "",
        "auto = memory, or torchvision for large images; memory crops padded images of their own size and normalises "
        "a tree by its own pixels, the others crop and resize and take ImageNet's",
    ),
    augment=Option(Choice(["auto", "none", "flip", "crop", "crop_flip"]), "auto", "", "auto = the set's usual recipe"),
    alternate_flip=Option(
        Bool(), False, "", "flips are turned over in each epoch, not drawn anew (sets held in memory)"
    ),
    drop_last=Option(Bool(), False, "", "leave out an epoch's last, short batch"),
    resolution=Option(Int(8, 1024, or_zero=True), 0, "pixels", "training image side; 0 = the data set's own"),
    eval_resolution=Option(Int(8, 1024, or_zero=True), 0, "pixels", "test image side; 0 = as resolution"),
    start_resolution=Option(Int(8, 1024, or_zero=True), 0, "pixels", "progressive resizing from (ffcv only); 0 = off"),
    end_resolution=Option(Int(8, 1024, or_zero=True), 0, "pixels", "progressive resizing to (ffcv only); 0 = off"),
    os_cache=Option(Choice(AUTO_ON_OFF), "auto", "", "keep the .beton in the system's page cache (ffcv only)"),
    train_beton=Option(FilePath(optional=True), "", "", 'training .beton (ffcv only); "" = found under data_root'),
    val_beton=Option(FilePath(optional=True), "", "", 'test .beton (ffcv only); "" = found under data_root'),
)
_section(
    "prune_params",
    "what is pruned, and how far",
    prune_rate=Option(Float("(0, 1)"), 0.2, "fraction", "share of the remaining weights pruned before each level"),
    prune_method=Option(Choice(list(METHODS)), "mag", "", "criterion between levels"),
    num_levels=Option(Int(1, 10000), 12, "levels", "levels trained; level 0 is the dense one"),
    er_method=Option(Choice([NO_METHOD, *METHODS]), NO_METHOD, "", "criterion at initialization"),
    er_init=Option(Float("(0, 1]"), 1.0, "fraction", "density left by pruning at initialization"),
    rewind_epoch=Option(Int(0), 10, "epochs", "epoch k of level 0 that wr rewinds to (wr only)"),
    exclude=Option(List(Word()), (), "", "layers left dense: shell-style patterns of their names, as in fc*"),
    synflow_rounds=Option(Int(1), 100, "rounds", "pruning rounds of synflow"),
    score_batches=Option(Int(1), 1, "batches", "training batches that snip and grasp score on"),
    score_dtype=Option(Choice(["float32", "float64"]), "float32", "", "arithmetic of the scores of snip and grasp"),
)
_section(
    "experiment_params",
    "the run",
    seed=Option(Int(0, 2**32 - 1), 0, "", "seed of initialization, data order, augmentation and random criteria"),
    base_dir=Option(FilePath(), "./experiments", "", "directory that runs are kept in"),
    expt_name=Option(RunName(), "", "", 'directory of this run; "" = experiment_<date>_<time>_<id>'),
    epochs_per_level=Option(Int(1), 20, "epochs", "epochs E of each level (wr: E - k after level 0)"),
    training_type=Option(
        Choice(["imp", "wr", "lrr"]), "imp", "", "weights before each level: initial, of epoch k, or kept"
    ),
    resume_level=Option(Int(0), 0, "level", "start this level again from the one before; 0 = where the run stands"),
    resume_expt_name=Option(RunName(), "", "", 'run to continue; "" = a new run'),
    precision=Option(
        Choice(["auto", "fp32", "bf16", "fp16"]),
        "auto",
        "",
        "autocast type; auto = bf16 where the hardware has it; fp32: TF32 convolutions on GPUs, as torch has it",
    ),
    compile=Option(Choice(AUTO_ON_OFF), "auto", "", "torch.compile; auto = on GPUs (not with sync_bn)"),
    cuda_graphs=Option(Bool(), False, "", "the compiled network as CUDA graphs, for small networks on GPUs"),
    channels_last=Option(Bool(), True, "", "NHWC memory for images and convolutions"),
    save_every_epochs=Option(Int(0), 1, "epochs", "resume state saved at the end of every so many epochs; 0 = off"),
    save_every_minutes=Option(
        Float("[0,]"), 0.0, "minutes", "resume state saved at an epoch's end when so old; 0 = off"
    ),
    deterministic=Option(
        Bool(), False, "", "deterministic kernels only, slower; on GPUs torchvision's VGG and AlexNet have none"
    ),
)
_section(
    "optimizer",
    "SGD and its schedule, fresh at each level (wr: rewound)",
    lr=Option(Float("(0,]"), 0.1, "", "peak learning rate, for the global batch"),
    momentum=Option(Float("[0, 1)"), 0.9, "", "momentum"),
    nesterov=Option(Bool(), False, "", "Nesterov momentum"),
    weight_decay=Option(Float("[0,]"), 5e-4, "", "L2 penalty"),
    no_decay_bn=Option(Bool(), False, "", "no weight decay for BatchNorm and biases"),
    warmup_epochs=Option(Float("[0,]"), 0.0, "epochs", "linear warm-up to lr; fractions allowed"),
    scheduler_type=Option(Choice(list(SCHEDULES)), "MultiStepLRWarmup", "", "shape of the schedule"),
    milestones=Option(
        List(Float("(0,]"), bracketed=True),
        (),
        "fractions of E when < 1, epochs otherwise",
        "where the rate drops; [] = the schedule's own",
    ),
    gamma=Option(Float("(0, 1]"), 0.1, "", "factor at each milestone"),
    lr_min=Option(Float("[0,]"), 0.0, "", "last rate of the cosine, linear and triangular schedules"),
    label_smoothing=Option(Float("[0, 1)"), 0.0, "fraction", "label smoothing of the training loss"),
    grad_clip=Option(Float("[0,]"), 0.0, "L2 norm", "largest gradient norm over all weights; 0 = off"),
)
_section(
    "dist_params",
    "processes",
    distributed=Option(Bool(), True, "", "false = one process, whatever nproc says"),
    nproc=Option(Int(0, 1024), 0, "processes", "processes of this machine; 0 = one for each GPU, 1 on a CPU"),
    backend=Option(Choice(["auto", "gloo", "nccl"]), "auto", "", "auto = nccl on GPUs, gloo else"),
    address=Option(Word(), "localhost", "", "where the processes meet"),
    port=Option(Int(0, 65535), 0, "", "port they meet at; 0 = any free one"),
    threads=Option(
        Int(0, 1024), 0, "threads", "CPU threads of each process; 0 = its share of the cores, 1 for a small MLP"
    ),
    sync_bn=Option(Bool(), False, "", "BatchNorm statistics over all processes"),
    sparse_allreduce=Option(
        Choice(AUTO_ON_OFF), "off", "", "send the gradients of kept weights alone; auto = by gloo, where it pays"
    ),
    wire=Option(Choice(["fp32", "bf16"]), "fp32", "", "type of gradients on their way; bf16 halves the bytes, rounded"),
    timeout_minutes=Option(Float("(0,]"), 10.0, "minutes", "longest wait of one process for another"),
)

LEGACY = Legacy(
    unused=frozenset({"experiment_params.expt_setup", "optimizer.num_workers"}),
    moved={"experiment_params.num_levels": "prune_params.num_levels"},
)


def _notes(config: "Config", found: Resolved) -> list[str]:
    """A line for each option that was set and has no effect.

    A file's option at its default is no news (a dumped config has them all), nor is a file's rewind_epoch, which waits
    there for ``--experiment_params.training_type=wr``.
    """
    notes = list(found.notes)
    for path, why in without_effect(config):
        section, key = path.split(".")
        value = getattr(getattr(config, section), key)
        said = found.origin.get(path)
        changed = value != SCHEMA.entries[section, key].default and path != "prune_params.rewind_epoch"
        if said == "cli" or (said is not None and changed):
            notes.append(f"{path}: {show(value)} has no effect: {why}")
    return notes


# ------------------------------------------------------------------------------------------------------------ configs


class Config(Group):
    """A checked, frozen config: ``cfg.section.key``; lists are tuples.

    `notes` are lines for the user, to print once; they take no part in equality and are not dumped.
    """

    def __init__(self, values: Mapping[str, Group], notes: Sequence[str] = ()):
        super().__init__(values)
        vars(self)["notes"] = tuple(notes)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(group for group in vars(self).values() if isinstance(group, Group)))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}}, all options, lists as lists: the caller's own copy."""
        sections = {name: vars(group) for name, group in vars(self).items() if isinstance(group, Group)}
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for name, values in sections.items()
        }

    def replace(self, overrides: Mapping[str, Mapping[str, Any]]) -> "Config":
        """A config with some options changed, checked anew.

        Raises:
            ConfigError: as `make_config`.
        """
        return _build([Source("code", self.to_dict()), Source("code", overrides)])


def unused_alone(config: Config) -> list[str]:
    """A line for each option between processes that is set in a run whose nproc 0 has turned out to be one process."""
    d, usual = config.dist_params, make_config().dist_params
    if d.nproc != 0 or not d.distributed:
        return []  # known without counting GPUs: `without_effect` has told
    changed = [key for key in BETWEEN_PROCESSES if getattr(d, key) != getattr(usual, key)]
    return [f"dist_params.{key}: {show(getattr(d, key))} has no effect: there is one process" for key in changed]


def _build(sources: Sequence[Source], faults: Sequence[str] = (), whole: bool = True) -> Config:
    """`whole`: all sources could be read; with one missing, checks across options would find faults that are none."""
    found = resolve(SCHEMA, sources, LEGACY)
    faults = [*faults, *found.faults]
    options = Group(found.values)
    for check in CHECKS if whole else ():
        try:
            for path, allowed in check(options):
                section, key = path.split(".")
                faults.append(fault(path, getattr(found.values[section], key), allowed))
        except AttributeError as error:
            if error.name not in found.bad:  # a slip in the check itself, not an option already at fault
                raise
    if faults:
        raise ConfigError(faults)
    config = Config(found.values)
    return Config(found.values, _notes(config, found))


def make_config(overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """The defaults with `overrides`, {section: {key: value}}, on top.

    Raises:
        ConfigError: naming every fault.
    """
    return _build([Source("code", overrides if overrides is not None else {})])


USAGE = """usage: python harness.py [--config FILE] [--section.key=value ...]

FILE is YAML: sections with options below them. The command line wins over FILE, FILE over the defaults below.
Lists are written 0.5,0.75 on the command line. Environment variables are not read."""


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The config that a command line (``sys.argv[1:]`` when None) asks for. ``--help`` prints all options and exits 0.

    Raises:
        ConfigError: naming every fault of file and command line; nothing has been made or changed by then.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        try:
            print(help_text(SCHEMA, USAGE), flush=True)
        except BrokenPipeError:  # `--help | head`: nobody reads on, which is no failure
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    path, values, faults = parse_words(words, SCHEMA)
    data: dict | None = {}
    if path:
        try:
            data, repeats = read_yaml(path)
            faults += repeats
        except ConfigError as error:
            faults += error.faults
            data = None
    return _build([Source("file", data or {}), Source("cli", values)], faults, whole=data is not None)


def end_on_faults() -> None:
    """Ends this process if its command line asks for ``--help`` (exit 0) or is at fault (2): before torch is there."""
    try:
        load_config()
    except ConfigError as error:
        raise SystemExit(report(error)) from None


def dump_yaml(config: Config) -> str:
    """The resolved config, every option included, as YAML that ``--config`` reads back to an equal config."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False, width=10**6)
