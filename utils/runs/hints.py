"""The command that goes on with a run, ready to paste."""

import contextlib
import shlex
import sys
from pathlib import Path

from harness_params import SCHEMA, Config
from utils.config.sources import as_text
from utils.errors import DataError
from utils.processes.place import launch_id, torchrun_words
from utils.runs.saved import saved_config

# The command itself says these, or the run's own config has them.
NOT_REPEATED = {
    "experiment_params.base_dir", "experiment_params.expt_name", "experiment_params.resume_expt_name",
    "experiment_params.resume_level", "prune_params.num_levels", "prune_params.target_density",
}  # fmt: skip


def resume_command(run: Path, cfg: Config | None = None) -> str:
    """``python harness.py --resume RUN``, or with torchrun's own words where torchrun has started this process.

    Args:
        run: its directory; it is named by its path unless it lies in the default base_dir.
        cfg: what this process runs with: what a resume has changed on top of the run's own config is repeated.
    """
    default = Path(SCHEMA.default("experiment_params.base_dir"))
    name = run.name if run.parent.resolve() == default.resolve() else str(run)
    words = [f"--resume={name}"] if name.startswith("-") else ["--resume", name]
    with contextlib.suppress(DataError):  # whoever resumes reports a damaged config
        words += changed_options(saved_config(run), cfg) if cfg else []
    return shlex.join([*_program(), *words])


def changed_options(saved: Config, cfg: Config) -> list[str]:
    """``--section.key=value`` of the options that may change on a resume, and differ from the saved ones."""
    free = SCHEMA.paths(lambda option: option.role.free_on_resume)
    changed = [path for path in free if path not in NOT_REPEATED and cfg.value(path) != saved.value(path)]
    return [f"--{path}={as_text(cfg.value(path))}" for path in changed]


def _program() -> list[str]:
    script = sys.argv[0] if Path(sys.argv[0]).name == "harness.py" else "harness.py"
    return [*(torchrun_words(script) if launch_id() else ["python"]), script]
