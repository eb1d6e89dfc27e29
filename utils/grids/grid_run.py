"""One run of a grid: its command line, its checked config, and its progress, read from its CSVs."""

from dataclasses import dataclass
from pathlib import Path

from harness_params import Config, Note, unused_alone
from utils.runs.remaining import Progress, read_progress


@dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Attributes:
        name: of the run directory.
        words: the command line after ``harness.py``.
        cfg: the config that these words stand for, checked.
        processes: number of processes that the run starts.
        source: name of the run of the same grid that it starts from, finished or not; "" = none.
        after: the same, if it is still waited for.
    """

    name: str
    words: tuple[str, ...]
    cfg: Config
    processes: int = 1
    source: str = ""
    after: str = ""

    @property
    def path(self) -> Path:
        return Path(self.cfg.experiment_params.base_dir) / self.name

    @property
    def begun(self) -> bool:
        return begun(self.path)

    @property
    def notes(self) -> list[Note]:
        """The notes that harness.py will print for this run: mostly options without effect."""
        return [*self.cfg.notes, *(unused_alone(self.cfg) if self.processes == 1 else [])]

    def progress(self) -> Progress:
        """How far the run is, by its CSVs. Errors as `read_progress`."""
        return read_progress(self.path, self.cfg)

    @property
    def finished(self) -> bool:
        return self.progress().levels >= self.cfg.prune_params.num_levels


def begun(path: Path) -> bool:
    """True if a run can be resumed at `path`.

    The config decides, not the directory: the directory is created first, and writing the config may fail (full disk).
    """
    return (path / "expt_config.yaml").exists()
