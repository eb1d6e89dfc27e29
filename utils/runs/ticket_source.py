"""Where a ticket comes from: a run or a file, and whether it holds what ``ticket_params`` asks for. Reads no tensor."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from harness_params import SCHEMA, Config
from utils.config.effects import without_effect
from utils.config.run_folder import CONFIG_FILE, is_run
from utils.errors import ConfigError, DataError, RunError
from utils.runs.saved import finished_levels, saved_config
from utils.runs.states import saved_states

# Weights that a file can give: it holds one set of them, with no word on how they began.
FILE_WEIGHTS = ("final", "reinit")
# To go on from a step of a run, with its optimizer and its schedule: options that must be as they are there, unless
# they have no effect.
SAME_AS_SOURCE = (
    "dataset.dataset_name", "dataset.batch_size", "dataset.drop_last", "dataset.validation_images",
    "optimizer.optimizer_name", "optimizer.momentum", "optimizer.nesterov", "optimizer.beta1",
    "optimizer.beta2", "optimizer.weight_decay", "optimizer.no_decay_bn",
)  # fmt: skip
# Options that a branch may want to change on purpose from that step on: a note tells which are changed.
MAY_DIFFER = (
    *(path for path in SCHEMA.paths(lambda option: option.role.in_legends)
      if path.startswith("optimizer.") and path not in SAME_AS_SOURCE),
    "experiment_params.epochs_per_level", "experiment_params.cycles", "dataset.augment", "dataset.alternate_flip",
    "dataset.mixup", "dataset.cutmix", "dataset.random_erasing", "dataset.randaugment",
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
    def run(self) -> Path | None:
        """The run itself, or the one whose checkpoint the file is; None for a file from elsewhere."""
        if self.cfg:
            return self.path
        folder = self.path.resolve().parent
        return folder.parent if folder.name == "checkpoints" and is_run(folder.parent) else None

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
    if e.resume_level:  # starts from the run's own checkpoints
        return False
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
    named, given, path = Path(e.base_dir) / t.source, Path(t.source), source_path(cfg)
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


def source_path(cfg: Config) -> Path:
    """Where ``ticket_params.source`` lies: in base_dir if it is there, else where it says."""
    named = Path(cfg.experiment_params.base_dir) / cfg.ticket_params.source
    return named if named.exists() else Path(cfg.ticket_params.source)


def _file_source(cfg: Config, path: Path) -> Source:
    t = cfg.ticket_params
    faults = []
    if t.level != -1:
        faults.append(f"ticket_params.level: {t.level} is not allowed: {path} is a file, which has no levels")
    weights = "final" if t.weights == "auto" else t.weights
    if weights not in FILE_WEIGHTS:
        allowed = (
            f"{' or '.join(FILE_WEIGHTS)}: {path} is a file, which holds one set of weights; {weights} needs a run"
        )
        faults.append(f"ticket_params.weights: {weights} is not allowed: {allowed}")
    if faults:
        raise ConfigError(faults)
    return Source(path, None, -1, t.step, weights)


def _run_source(cfg: Config, path: Path) -> Source:
    if not is_run(path):
        raise ConfigError(f"ticket_params.source: {path} is no run: it has no {CONFIG_FILE}")
    try:
        saved = saved_config(path)
    except DataError as error:
        raise ConfigError(f"ticket_params.source: {error}") from error
    return _with_level(cfg, path, saved, len(finished_levels(path)))


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


def _faults(cfg: Config, source: Source) -> list[str]:
    t = cfg.ticket_params
    faults = []
    if t.mask == "none" and source.weights == "reinit":
        why = "neither mask none nor weights reinit takes anything from it: leave it out"
        faults.append(f"ticket_params.source: {t.source} is not allowed: {why}")
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
    if cfg.experiment_params.training_type == "imp" and cfg.prune_params.num_levels > 1:
        why = f"level 0 would begin at the {source.point}, and later levels at step 0 of the schedule with its weights"
        return [
            "ticket_params.weights: rewind is not allowed with experiment_params.training_type imp and several levels: "
            f"{why}; training_type wr with the same step in prune_params.rewind_step (or rewind_epoch) rewinds to it"
        ]
    if not source.has_point:
        need = "training_type wr" if source.step == -1 else f"{source.step} in prune_params.save_steps"
        return [
            f"ticket_params.weights: rewind is not allowed: {source.path} has no {source.point}: it needs {need} there"
        ]
    faults, unused = [], _unused(cfg, source.cfg)
    for path in SAME_AS_SOURCE:
        here, there = cfg.value(path), source.cfg.value(path)
        if here != there and path not in unused:
            why = f"it is {there!r} in {source.path}, from whose {source.point} level 0 goes on"
            faults.append(f"{path}: {here!r} is not allowed: {why}")
    return faults


def _unused(*configs: Config) -> set[str]:
    """Options that have no effect in one of the configs."""
    return {path for cfg in configs for path, _ in without_effect(cfg, cfg.schema)}


def notes_on(cfg: Config, source: Source) -> list[tuple[str, str]]:
    """(option, note) of what has no effect with this source, or differs from it and may do so on purpose."""
    t, notes = cfg.ticket_params, []
    if source.cfg and t.mask == "none" and t.weights == "auto" and t.level != -1:
        why = "mask is none, and weights auto are init of a run: the same at every level"
        notes.append(("level", f"{t.level} has no effect: {why}"))
    if source.cfg and source.cfg.dataset.validation_images != cfg.dataset.validation_images:
        there, here = source.cfg.dataset.validation_images, cfg.dataset.validation_images
        trained = (
            "the source has trained on images that are held out here" if there < here else "this run trains on more"
        )
        notes.append(("source", f"{there} validation images are held out there and {here} here: {trained}"))
    if source.cfg and source.weights == "rewind":
        unused = _unused(cfg, source.cfg)
        changes = [
            f"{path} {cfg.value(path)} (there {source.cfg.value(path)})"
            for path in MAY_DIFFER
            if path not in unused and cfg.value(path) != source.cfg.value(path)
        ]
        if changes:
            where = f"the {source.point} of {source.path}"
            notes.append(("weights", f"level 0 goes on from {where} with other options: {', '.join(changes)}"))
    return notes
