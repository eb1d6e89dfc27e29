"""Where a ticket comes from: a run or a file, and whether it holds what ``ticket_params`` asks for. Reads no tensor."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from harness_params import Config, make_config
from utils.config.effects import without_effect
from utils.config.sources import read_yaml
from utils.errors import ConfigError, RunError
from utils.runs.states import saved_states

# Weights that a file can give: it holds one set of them, with no word on how they began.
OF_A_FILE = ("final", "reinit")
# To go on from a step of a run, with its optimizer and its schedule: options that must be as they are there, unless
# they have no effect.
GOES_ON = (
    "dataset.dataset_name", "dataset.batch_size", "dataset.drop_last", "optimizer.optimizer_name", "optimizer.momentum",
    "optimizer.nesterov", "optimizer.beta1", "optimizer.beta2", "optimizer.weight_decay", "optimizer.no_decay_bn",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The run or the file that ``ticket_params.source`` names.

    Attributes:
        path: the run's directory, or the file.
        cfg: the run's config; None for a file.
        level: level of the run whose mask is taken; -1 for a file.
        step: ``ticket_params.step``.
        weights: ``ticket_params.weights``, never auto.
        planned: whether the run is still to be trained, in the same grid.
    """

    path: Path
    cfg: Config | None
    level: int
    step: int
    weights: str
    planned: bool = False

    def checkpoint(self, name: str) -> Path:
        """``model_{name}.pt`` of the run; the file itself if it is one."""
        return self.path / "checkpoints" / f"model_{name}.pt" if self.cfg else self.path

    @property
    def mask_file(self) -> Path:
        """The checkpoint that holds the mask, and the final weights."""
        return self.checkpoint(f"level_{self.level}")

    @property
    def has_point(self) -> bool:
        """Whether the run holds the step of level 0 to start at, or will."""
        assert self.cfg is not None
        if self.planned:
            p, e = self.cfg.prune_params, self.cfg.experiment_params
            return e.training_type == "wr" if self.step == -1 else self.step in p.save_steps
        name = "rewind" if self.step == -1 else f"step_{self.step}"
        return self.checkpoint(name).is_file() and (self.path / "artifacts" / f"optimizer_{name}.pt").is_file()

    @property
    def point(self) -> str:
        """The step of level 0 to start at, in words."""
        return "rewind point" if self.step == -1 else f"state of step {self.step}"


def reads_source(cfg: Config) -> bool:
    """Whether this start of the run reads its source: a resumed run does so only if it has no saved state yet."""
    if not cfg.ticket_params.source:
        return False
    e = cfg.experiment_params
    if not e.resume_expt_name:
        return True
    with contextlib.suppress(RunError):  # whoever loads the states reports it
        return not saved_states(Path(e.base_dir) / e.resume_expt_name)
    return False


def find_source(cfg: Config) -> Source:
    """The source of the ticket, checked as far as that needs no tensors.

    Raises:
        ConfigError: there is no such run or file; it lacks the level or the rewind point; it is of another network; the
            options do not go together.
    """
    t, e = cfg.ticket_params, cfg.experiment_params
    named, given = Path(e.base_dir) / t.source, Path(t.source)
    path = named if named.exists() else given
    own = Path(e.base_dir) / (e.resume_expt_name or e.expt_name or " ")
    if not path.exists():
        places = f"{named} or {given.absolute()}" if named.absolute() != given.absolute() else str(given)
        raise ConfigError(f"ticket_params.source: {t.source}: no run and no file at {places}")
    if path.resolve() == own.resolve():
        raise ConfigError(f"ticket_params.source: {t.source} is this run itself")
    source = _run_source(cfg, path) if path.is_dir() else _file_source(cfg, path)
    if faults := _faults(cfg, source):
        raise ConfigError(faults)
    return source


def _file_source(cfg: Config, path: Path) -> Source:
    t = cfg.ticket_params
    faults = []
    if t.level != -1:
        faults.append(f"ticket_params.level: {t.level} is not allowed: {path} is a file, which has no levels")
    weights = "final" if t.weights == "auto" else t.weights
    if weights not in OF_A_FILE:
        allowed = f"{' or '.join(OF_A_FILE)}: {path} is a file, which holds one set of weights; {weights} needs a run"
        faults.append(f"ticket_params.weights: {weights} is not allowed: {allowed}")
    if faults:
        raise ConfigError(faults)
    return Source(path, None, -1, t.step, weights)


def _run_source(cfg: Config, path: Path) -> Source:
    if not (path / "expt_config.yaml").is_file():
        raise ConfigError(f"ticket_params.source: {path} is no run: it has no expt_config.yaml")
    try:
        values, repeats = read_yaml(str(path / "expt_config.yaml"))
        if repeats:
            raise ConfigError(repeats)
        saved = make_config(values)
    except ConfigError as error:
        raise ConfigError(f"ticket_params.source: {path}: expt_config.yaml: {error.faults[0]}") from error
    return _with_level(cfg, path, saved, finished_levels(path))


def _with_level(cfg: Config, path: Path, saved: Config, levels: int, planned: bool = False) -> Source:
    t = cfg.ticket_params
    level = levels - 1 if t.level == -1 else t.level
    if not 0 <= level < levels:
        has = f"levels 0 to {levels - 1}" if levels else "no level"
        raise ConfigError(f"ticket_params.level: {t.level} is not allowed: {path} has finished {has}")
    return Source(path, saved, level, t.step, "init" if t.weights == "auto" else t.weights, planned)


def check_planned_source(cfg: Config, path: Path, planned: Config) -> Source:
    """As `find_source`, for a source that a grid will have trained by the time that this run starts.

    Args:
        path: of its run.
        planned: its config.
    """
    source = _with_level(cfg, path, planned, planned.prune_params.num_levels, planned=True)
    if faults := _faults(cfg, source):
        raise ConfigError(faults)
    return source


def finished_levels(run: Path) -> int:
    """Number of levels of a run that have a checkpoint, from level 0 on."""
    level = 0
    while (run / "checkpoints" / f"model_level_{level}.pt").is_file():
        level += 1
    return level


def _faults(cfg: Config, source: Source) -> list[str]:
    t = cfg.ticket_params
    faults = []
    if source.weights == "final" and t.mask.startswith("shuffle"):
        why = "final weights are zero where they were pruned; a shuffled mask needs weights that were not"
        faults.append(f"ticket_params.weights: {source.weights} is not allowed with ticket_params.mask {t.mask}: {why}")
    if source.weights == "final_signs" and t.mask != "same":
        why = "only kept weights have a final sign"
        faults.append(f"ticket_params.weights: final_signs is not allowed with ticket_params.mask {t.mask}: {why}")
    if source.cfg is None:
        return faults
    for path in ("model_params.model_name", "model_params.blurpool"):
        here, there = cfg.value(path), source.cfg.value(path)
        if here != there:
            faults.append(f"{path}: {here!r} is not allowed: {source.path} holds another network, of {there!r}")
    if source.weights == "rewind":
        faults += _faults_of_rewinding(cfg, source)
    return faults


def _faults_of_rewinding(cfg: Config, source: Source) -> list[str]:
    """Level 0 goes on from a step of the source run, with its optimizer."""
    assert source.cfg is not None
    if not source.has_point:
        need = "training_type wr" if source.step == -1 else f"{source.step} in prune_params.save_steps"
        return [
            f"ticket_params.weights: rewind is not allowed: {source.path} has no {source.point}: it needs {need} there"
        ]
    faults = []
    unused = {path for config in (cfg, source.cfg) for path, _ in without_effect(config, config.schema)}
    for path in GOES_ON:
        here, there = cfg.value(path), source.cfg.value(path)
        if here != there and path not in unused:
            why = f"it is {there!r} in {source.path}, from whose {source.point} level 0 goes on"
            faults.append(f"{path}: {here!r} is not allowed: {why}")
    return faults
