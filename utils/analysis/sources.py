"""The runs and checkpoints that a command line names, their levels, and their pairs."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import ConfigError, DataError, RunError
from utils.plots.runs import find_runs
from utils.runs.loading import State, finished_levels, level_checkpoint, read_state, run_of

CHECKPOINT = -1  # in place of a level's number where checkpoints are named


@dataclass(frozen=True)
class Source:
    """A run, or one checkpoint.

    Attributes:
        path: its directory, or the .pt file.
        name: what tables call it.
        run: the run that it is or lies in; None for a .pt from elsewhere.
    """

    path: Path
    name: str
    run: Path | None

    @property
    def is_run(self) -> bool:
        return self.path == self.run

    def file(self, level: int) -> Path:
        """The checkpoint of a level, or the only one."""
        return level_checkpoint(self.path, level) if self.is_run else self.path

    def state(self, level: int) -> State:
        """The state_dict of a level. Errors as `read_state`."""
        return read_state(self.file(level))


@dataclass(frozen=True)
class Pair:
    """Two states to compare; `level` is `CHECKPOINT` where checkpoints were named."""

    level: int
    names: tuple[str, str]
    states: tuple[State, State]

    @property
    def labels(self) -> tuple[str, str]:
        """What messages call the two."""
        a, b = (name if self.level == CHECKPOINT else f"level {self.level} of {name}" for name in self.names)
        return a, b


def find_sources(words: Sequence[str]) -> list[Source]:
    """What the words name: .pt files, run directories, directories of run directories.

    Raises:
        ConfigError: runs beside checkpoints.
        DataError: a word names none of them; one thing is named twice.
    """
    paths: list[Path] = []
    for word in words:
        paths += [Path(word)] if Path(word).suffix == ".pt" and not Path(word).is_dir() else find_runs([word])
    for path in paths:
        if path.suffix == ".pt" and not path.is_file():
            raise DataError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths):
        if places.count(place) > 1:
            raise DataError(f"{path}: named more than once")
    names = _short_names(places)
    sources = [
        Source(path, name, path if path.is_dir() else run_of(path)) for path, name in zip(paths, names, strict=True)
    ]
    if len({source.is_run for source in sources}) > 1:
        checkpoint = next(source for source in sources if not source.is_run)
        raise ConfigError(f"{checkpoint.path}: a checkpoint beside runs: name runs alone, or checkpoints alone")
    return sources


def _short_names(places: Sequence[Path]) -> list[str]:
    """Paths from the folder that all of them share, without what says nothing: checkpoints/model_ and .pt."""
    folder = Path(os.path.commonpath([place.parent for place in places]))
    names = [str(place.relative_to(folder)).replace("checkpoints/", "") for place in places]
    return [name.replace("model_", "").removesuffix(".pt") for name in names]


def find_pairs(words: Sequence[str]) -> list[Source]:
    """As `find_sources`.

    Raises:
        ConfigError: fewer than two are named.
    """
    sources = find_sources(words)
    if len(sources) < 2:
        raise ConfigError(f"{sources[0].path}: one alone has no pair: name two or more runs, or checkpoints")
    return sources


def find_runs_only(words: Sequence[str]) -> list[Source]:
    """The runs that the words name. Errors as `find_sources`, and a ConfigError for checkpoints."""
    sources = find_sources(words)
    if not sources[0].is_run:
        raise ConfigError(f"{sources[0].path}: a checkpoint: the directory of a run is expected")
    return sources


def one_run(word: str) -> Source:
    """The run that a word names.

    Raises:
        ConfigError: it names several, or a checkpoint.
        DataError: it names none.
    """
    sources = find_runs_only([word])
    if len(sources) > 1:
        raise ConfigError(f"{word}: a folder of {len(sources)} runs: the directory of one is expected")
    return sources[0]


def common_levels(sources: Sequence[Source], asked: Sequence[int] | None = None) -> list[int]:
    """Levels that all runs have finished, or those of them that are asked for; `CHECKPOINT` alone for checkpoints.

    Raises:
        ConfigError: levels are asked for of checkpoints.
        RunError: a level that is asked for is not finished in all runs, or there is none.
    """
    if not sources[0].is_run:
        if asked is not None:
            raise ConfigError("--levels: only for runs: a checkpoint is one level")
        return [CHECKPOINT]
    finished = {source.path: finished_levels(source.path) for source in sources}
    for path, levels in finished.items():
        missing = [level for level in asked or [0] if level not in levels]
        if missing:
            raise RunError(f"{path}: level {missing[0]} is not finished")
    shared = set.intersection(*(set(levels) for levels in finished.values()))
    return sorted(shared if asked is None else asked)


def pairs(sources: Sequence[Source], levels: Sequence[int]) -> Iterator[Pair]:
    """Each two of the sources, level by level."""
    for level in levels:
        states = [source.state(level) for source in sources]
        for (a, state_a), (b, state_b) in itertools.combinations(zip(sources, states), 2):
            yield Pair(level, (a.name, b.name), (state_a, state_b))


def count_pairs(sources: Sequence[Source], levels: Sequence[int]) -> int:
    """How many `pairs` there are."""
    return len(levels) * len(sources) * (len(sources) - 1) // 2
