"""What utils/single_gpu_harness.py lacks of harness.py, by option."""

from harness_params import SCHEMA, Config, Note
from utils.config.options import show
from utils.errors import ConfigError

# Options that it does not obey, and why.
IGNORED = {
    **dict.fromkeys(SCHEMA.paths(lambda option: option.needs_several == "processes"), "there is one process"),
    "dist_params.nproc": "there is one process",
    "dist_params.backend": "there is one process",
    "experiment_params.cuda_graphs": "each kernel is launched by itself",
    "experiment_params.save_every_epochs": "no state is saved to resume from",
    "experiment_params.save_every_minutes": "no state is saved to resume from",
}


def check_options(cfg: Config) -> None:
    """Refuses what only harness.py does.

    Raises:
        ConfigError: a resume, or averaged weights.
    """
    if cfg.experiment_params.resume_expt_name:
        raise ConfigError("experiment_params.resume_expt_name: only harness.py resumes")
    if cfg.experiment_params.ema_decay:
        raise ConfigError("experiment_params.ema_decay: only harness.py averages weights; write 0")


def ignored(cfg: Config) -> list[Note]:
    """A note on each option that harness.py obeys and the plain harness does not, where it is not at its default."""
    told = {note.option for note in cfg.notes} | ({"dist_params.nproc"} if cfg.dist_params.nproc == 1 else set())
    set_here = [path for path in IGNORED if cfg.value(path) != cfg.schema.default(path) and path not in told]
    return [Note(path, f"{show(cfg.value(path))} has no effect here: {IGNORED[path]}") for path in set_here]
