"""Run a grid of configs x seeds: several runs at a time, resumable, with one progress line per run.

    python -m utils.run_grid GRID.yaml [--jobs=N] [--threads=N] [--mps=auto|on|off] [--base_dir=PATH]
                             [--only I/N] [--list] [--section.key=value ...]

A grid file:

    config: configs/fashionmnist_lenet_fast.yaml   # for every run, unless a run names its own
    base_dir: experiments/fashionmnist_lenet       # parent folder of the run directories
    seeds: [0, 1, 2]
    jobs: 2                                        # runs at a time (default: 1, or one per entry of gpus)
    threads: 1                                     # CPU threads per run, all its processes together, unless the run
                                                   # sets dist_params.threads; 0 (default) = an equal share of the cores
    gpus: [0, 1]                                   # one GPU per run, in turn; indices into CUDA_VISIBLE_DEVICES if that
                                                   # is set; default: every run sees all GPUs
    mps: auto                                      # runs that share a GPU share it through NVIDIA's MPS: auto = where
                                                   # it can be used, on = or not at all, off = they take turns
    set: {prune_params.num_levels: 18}             # options of every run
    runs:
      imp: {experiment_params.training_type: imp}  # becomes imp_seed0, imp_seed1, imp_seed2
      snip:
        prune_params.er_method: snip
        each: {prune_params.er_init: [0.5, 0.1]}   # one run per value: snip_0.5_seed0, snip_0.1_seed0, ...
      other: {config: configs/another.yaml}
      reinit:                                      # level 0 starts from a run of this grid, which is waited for
        ticket_params.source: imp_seed{seed}       # {seed} stands for the run's seed in any option
        ticket_params.weights: reinit
        prune_params.num_levels: 1
        each: {ticket_params.level: [1, 2, 3]}     # reinit_1_seed0, ...

Command-line options override `set`. They may not change an option that a run sets itself, directly or in `each`.
Paths are relative to the current directory.

MPS (Multi-Process Service): runs on one GPU work at the same time instead of in turns, which is worth most for small
networks. The grid starts a daemon of its own, tries it out, and ends it with the last run, also when it is stopped or
killed; a daemon that answers already is used and left alone. Each of n runs may use 200/n percent of a GPU's threads
(set CUDA_MPS_ACTIVE_THREAD_PERCENTAGE for another share); kernels may depend on the share, and with them the last bits
of a result. A note says why `auto` does without MPS. A run that makes the GPU itself fail ends the others that share
it; start the grid again then. `off` starts nothing; a daemon of the machine's own still serves the runs.

The whole grid is checked before any run starts. Started again, the command skips finished runs and resumes unfinished
ones. A run that fails is reported with its last line of stderr and does not stop the others. The stderr of each run,
over all its starts, is kept in BASE_DIR/.logs/NAME.log. SIGINT or SIGTERM stops all runs, which save their state; a
second signal kills them.

--list starts nothing: it prints one command per run that is not finished, ready to paste. A run that starts from
another run of the grid comes after it; a comment above its command names that run, which has to be finished first.

--only I/N works on share I of N alone, I from 1 on, as one job of a Slurm array does (configs/slurm_array.sh). A run is
in one share with those that start from it, directly or through others; the shares hold about as many epochs each. They
follow from the grid file and the command line, not from what is finished: give each job the same ones.

Exit status: 0 all runs are finished; 1 a run failed or its CSVs are damaged; 2 faults in the grid, nothing started;
130 or 143 stopped by SIGINT or SIGTERM.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from utils.errors import ConfigError, DataError, report
from utils.grids.grid import read_grid, share_text
from utils.grids.listing import listing
from utils.grids.runner import GridRunner
from utils.output import complain, is_terminal, program, say
from utils.processes.signals import exit_quietly
from utils.processes.tasks import foreign_tasks


@dataclass
class Asked:
    """What the command line asks for.

    Attributes:
        path: the grid file.
        options: {grid key or section.key: text}.
        share: (I, N) of --only.
        listed: whether only commands are printed.
    """

    path: str
    options: dict[str, str]
    share: tuple[int, int] = (1, 1)
    listed: bool = False


def parse(words: Sequence[str]) -> Asked:
    """What the command line asks for.

    Raises:
        ConfigError: one fault per word that is no grid file and no option.
    """
    words, listed = [word for word in words if word != "--list"], "--list" in words
    if "--only" in words[:-1]:  # with a space instead of the =
        place = words.index("--only")
        words[place : place + 2] = [f"--only={words[place + 1]}"]
    paths = [word for word in words if not word.startswith("--")]
    faults = [] if len(paths) == 1 else [f"one grid file is expected, not {len(paths)} (see --help)"]
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in paths:
            continue
        if not equals or not (name in ("jobs", "threads", "mps", "base_dir", "only") or "." in name):
            kinds = "--jobs=N, --threads=N, --mps=WORD, --base_dir=PATH, --only=I/N, --list"
            faults.append(f"{word!r}: {kinds} or --section.key=value is expected")
        elif name in options:
            faults.append(f"--{name}: given twice on the command line (again as {value!r}); keep one")
        options[name] = value
    share = _share(options.pop("only", "1/1"), faults)
    if faults:
        raise ConfigError(faults)
    return Asked(paths[0], options, share, listed)


def _share(text: str, faults: list[str]) -> tuple[int, int]:
    """(I, N) of 'I/N'."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    faults.append(f"--only: {text!r} is not allowed: I/N, share I of N, with I from 1 to N")
    return 1, 1


def check_tasks(share: tuple[int, int]) -> None:
    """Check that no launcher has started several copies of this grid: each would start all of its runs.

    Raises:
        ConfigError: one has, and they are not told to take a share each.
    """
    launcher, tasks = foreign_tasks()
    if tasks > 1 and share == (1, 1):
        raise ConfigError(
            f"{launcher} has started {tasks} tasks, each a copy of this grid. Start it once; or give each task a "
            "share: --only I/N (configs/slurm_array.sh: a job per share)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m utils.run_grid``; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words or not words:
        (say if words else complain)(__doc__ or "")
        return 0 if words else 2
    try:
        asked = parse(words)
        if not asked.listed:  # which starts nothing
            check_tasks(asked.share)
        with program("run_grid"):
            grid = read_grid(asked.path, asked.options, asked.share)
            if asked.listed or not grid.runs:
                say(listing(grid) if asked.listed else f"run_grid: {share_text(grid)}")
                return 0
            return GridRunner(grid, terminal=is_terminal(sys.stdout)).run()
    except (ConfigError, DataError) as error:
        return report(error, "run_grid")


if __name__ == "__main__":
    exit_quietly(worker=False, program="run_grid")
    sys.exit(main())
