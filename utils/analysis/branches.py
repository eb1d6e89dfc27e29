"""The branches of a stability analysis: from a kept step of a run, under the mask of a level, with data seeds."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness_params import SCHEMA
from utils.analysis.sources import Pair
from utils.config.run_folder import CONFIG_FILE
from utils.errors import ConfigError
from utils.grids.grid import Grid, checked_runs
from utils.grids.reader import RunEntry
from utils.pruning.methods import NO_METHOD
from utils.runs.loading import level_checkpoint, read_state
from utils.runs.plugin_files import kept_copies
from utils.runs.saved import saved_config


@dataclass(frozen=True)
class Branch:
    """One branch: trained from `step` of the run's level 0 to its end, under the mask of `level`, on `data_seed`."""

    step: int
    level: int
    data_seed: int

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"step{self.step}_level{self.level}_data{self.data_seed}"


def branches(steps: Sequence[int], levels: Sequence[int], data_seeds: Sequence[int]) -> list[Branch]:
    """Every combination."""
    return [Branch(*values) for values in itertools.product(steps, levels, data_seeds)]


def check_branches(run: Path, steps: Sequence[int], data_seeds: Sequence[int]) -> None:
    """Checks that the run has kept the steps, and that the seeds are seeds.

    Raises:
        ConfigError: one fault per option.
    """
    faults, names = [], [path.stem.removeprefix("model_step_") for path in run.glob("checkpoints/model_step_*.pt")]
    kept = sorted(int(name) for name in names if name.isdecimal())
    if missing := [step for step in steps if step not in kept]:
        has = f"those that {run} has kept (prune_params.save_steps): {', '.join(map(str, kept)) or 'none'}"
        faults.append(f"--steps: {missing[0]} is not allowed: {has}")
    option = SCHEMA.find("experiment_params.data_seed")
    assert option is not None
    for seed in data_seeds:
        try:
            option.checker.check(seed)
        except ValueError:
            faults.append(f"--data_seeds: {seed} is not allowed: {option.checker.help()}")
    if faults:
        raise ConfigError(faults)


def branch_grid(
    run: Path, found: Sequence[Branch], into: Path, data_root: str | None, jobs: int = 1, threads: int = 0
) -> Grid:
    """The grid that trains the branches of a run in the folder `into`.

    Each branch has the run's config, weights and optimizer of the step, and goes on at that step of the schedule. It
    has one level: nothing is pruned.

    Raises:
        ConfigError: the run has not kept a step, or cannot be gone on from. Nothing has been created.
    """
    fixed = {
        "experiment_params.base_dir": str(into),
        "experiment_params.seed": str(saved_config(run).experiment_params.seed),
        "experiment_params.training_type": "imp",
        "prune_params.num_levels": "1",
        "prune_params.er_method": NO_METHOD,
        "prune_params.er_init": "1.0",
        "prune_params.save_steps": "",
        "ticket_params.source": str(run.resolve()),
        "ticket_params.mask": "same",
        "ticket_params.weights": "rewind",
    }
    if copies := kept_copies(run):
        fixed["experiment_params.plugins"] = ",".join(copies)
    if data_root is not None:
        fixed["dataset.data_root"] = data_root
    entries = []
    for branch in found:
        own = {"ticket_params.level": branch.level, "ticket_params.step": branch.step}
        own["experiment_params.data_seed"] = branch.data_seed
        options = fixed | {key: str(value) for key, value in own.items()}
        entries.append(RunEntry(branch.name, str(run / CONFIG_FILE), options))
    return Grid(checked_runs(entries, threads), jobs, threads)


def branch_pairs(found: Sequence[Branch], into: Path) -> Iterator[Pair]:
    """Each two branches that differ in their data seed alone; the pair's level is that of their mask."""
    for (_, level), group in itertools.groupby(found, lambda branch: (branch.step, branch.level)):
        states = [(branch.name, read_state(level_checkpoint(into / branch.name, 0))) for branch in group]
        for (a, state_a), (b, state_b) in itertools.combinations(states, 2):
            yield Pair(level, (a, b), (state_a, state_b))
