"""kill -9 at random moments: 2-process runs on real digits, killed and resumed over and over, against undisturbed ones.

    python -m tests.fault_campaign [--kinds KIND ...] [--kills 50] [--commands 5] [--seed 0] [--folder DIR]

A kill falls on the launcher or on one of its workers, while it starts, at any moment of its work, or while a checkpoint
or a state is written (its temporary file is what triggers the kill, and what is left of it the proof). Each start saves
its states by one of `SAVING`: runs as short as these would save at the ends of levels alone. When a run has ended it is
compared with the undisturbed one, bit for bit, and the next one begins, until `--kills` have been dealt.
Of the starts of a kind, `--commands` are the command line that a user types; the others are forked from a server that
has torch imported (tests/processes.py): the same program, less the 20 seconds of CPU that three imports of torch take.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.conftest import Finished, Launcher
from tests.processes import Forked, Forks, alive_in_session, all_gone

LONG = {
    "dataset.batch_size": 32,
    "prune_params.num_levels": 5,
    "prune_params.prune_rate": 0.4,
    "experiment_params.epochs_per_level": 6,
    "dist_params.nproc": 2,
}
KINDS = {
    "imp": {"experiment_params.training_type": "imp"},
    "wr": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 2},
    "lrr": {"experiment_params.training_type": "lrr"},
    "adam": {
        "experiment_params.training_type": "wr",
        "prune_params.rewind_step": 17,  # in the middle of the first epoch
        "optimizer.optimizer_name": "adam",
        "optimizer.lr": 2e-3,
    },
    "synflow": {
        "experiment_params.training_type": "imp",
        "prune_params.er_method": "synflow",
        "prune_params.er_init": 0.3,
        "prune_params.synflow_rounds": 20,
    },
    "ticket": {
        "experiment_params.training_type": "wr",
        "prune_params.rewind_epoch": 2,
        "ticket_params.source": "ticket_source",
        "ticket_params.weights": "rewind",
        "ticket_params.mask": "shuffle_layer",
        "ticket_params.level": 1,
    },
}

# How often a start saves: at the ends of levels alone, every 100 ms (hence within epochs, too), after every epoch.
SAVING = (
    {"experiment_params.save_every_epochs": 0},
    {"experiment_params.save_every_epochs": 0, "experiment_params.save_every_minutes": 0.1 / 60},
    {"experiment_params.save_every_epochs": 1, "experiment_params.save_every_minutes": 0},
)


@dataclass
class Outcome:
    """What a campaign of one kind has come to."""

    kind: str
    kills: int = 0
    at_launcher: int = 0
    at_worker: int = 0
    while_starting: int = 0
    within_saves: int = 0
    resumed_within_epochs: int = 0
    by_command: int = 0
    starts: int = 0
    runs: int = 0
    equal: int = 0
    faults: list[str] = field(default_factory=list)


class Campaign:
    """Kills of one kind of run.

    Args:
        commands: how many of the starts are by command line.
    """

    def __init__(self, kind: str, folder: Path, commands: int, seed: int):
        self.outcome = Outcome(kind)
        self.options = {**LONG, **KINDS[kind]}
        self.forks, self.commands = Forks(folder), commands
        self.rng = random.Random(f"{kind} {seed}")
        if "ticket_params.source" in self.options:
            self.forks("ticket_source", **LONG, **KINDS["wr"])
        self.undisturbed = self.forks(f"{kind}_whole", **self.options)

    def run(self, kills: int) -> Outcome:
        """Deals `kills` and compares every run; faults are counted, not raised."""
        out = self.outcome
        while out.kills < kills:
            self._one_run(f"{out.kind}_{out.runs}", kills)
        return out

    def _one_run(self, name: str, kills: int) -> None:
        out, path = self.outcome, self.forks.folder / name
        while True:
            begun = (path / "expt_config.yaml").exists()
            out.resumed_within_epochs += newest_step(path) > 0
            victim = self._start(name, resume=begun)
            if out.kills < kills:
                ended = self._kill(victim, path)
            else:
                victim.process.join(300)
                ended = True
            if not all_gone(victim.pid):
                out.faults.append(f"{name}: a process outlived its run")
            if ended:
                break
        out.runs += 1
        done = Finished(path, victim.process.exitcode or 0, "", victim.output())
        try:
            assert victim.process.exitcode == 0, f"exit {victim.process.exitcode}: {done.err}"
            done.assert_same_figures(self.undisturbed)
            assert not list(path.rglob("*.part")), "temporary files are left"
            out.equal += 1
        except AssertionError as error:
            out.faults.append(f"{name}: {error}")

    def _start(self, name: str, resume: bool) -> Forked:
        self.outcome.starts += 1
        options = {**self.options, **self.rng.choice(SAVING)}
        if self.outcome.by_command < self.commands and self.rng.random() < 0.3:
            self.outcome.by_command += 1
            key = {"experiment_params.expt_name": None, "experiment_params.resume_expt_name": name} if resume else {}
            return Command(self.forks.folder, name, {**options, **key})
        return self.forks.start(name, resume=resume, **options)

    def _kill(self, victim: Forked, path: Path) -> bool:
        """Waits for a random moment, and kills. Returns whether the run had ended of itself before."""
        out, rng = self.outcome, self.rng
        moment, left = rng.random(), parts_of(path)
        starting, saving, workers = moment < 0.2, moment > 0.6, []
        if starting:
            victim.process.join(rng.uniform(0, 4))
        elif saving:
            victim.process.join(rng.uniform(0.5, 3))
            workers = workers_of(victim.pid)  # now: to look for them takes longer than a file
            while parts_of(path) <= left and victim.process.exitcode is None:
                time.sleep(0.0005)  # a file is there for some milliseconds
        else:
            before = _progress(path)
            while _progress(path) == before and victim.process.exitcode is None:
                time.sleep(0.005)
            victim.process.join(rng.uniform(0, 1.5))
        workers = workers or workers_of(victim.pid)
        target = rng.choice(workers) if workers and rng.random() < 0.5 else victim.pid
        if saving and workers:
            target = min(workers)  # rank 0, which writes
        if victim.process.exitcode is not None:
            return True
        try:
            os.kill(target, signal.SIGKILL)
        except ProcessLookupError:
            victim.process.join(60)
            return victim.process.exitcode == 0
        victim.process.join(120)
        if victim.process.exitcode == 0:  # it was on its way out
            return True
        out.kills += 1
        out.while_starting += starting
        out.within_saves += not parts_of(path) <= left
        out.at_launcher += target == victim.pid
        out.at_worker += target != victim.pid
        if target != victim.pid and victim.process.exitcode != 1:
            out.faults.append(f"{path.name}: exit {victim.process.exitcode} after the death of a worker")
        return False


class Command(Forked):
    """A run started by its command line."""

    def __init__(self, folder: Path, name: str, options: dict):
        self.popen = Launcher(folder).start(name, **options)
        self.path, self.process = folder / name, self

    pid = property(lambda self: self.popen.pid)
    exitcode = property(lambda self: self.popen.poll())

    def join(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.popen.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def output(self) -> str:
        return "\n".join(self.popen.communicate())


def parts_of(path: Path) -> set[tuple[str, int]]:
    """Temporary files of checkpoints and states that are being written, or were when their writer died: name, time."""
    found = set()
    for folder in ("checkpoints", "artifacts"):
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(path / folder):
                if name.endswith(".pt.part"):
                    found.add((name, os.stat(path / folder / name).st_ctime_ns))
    return found


def newest_step(path: Path) -> int:
    """Steps of its epoch after which the newest state was saved; 0 without a state."""
    try:
        return json.loads((path / "artifacts" / "state.json").read_text())[0]["step"]
    except FileNotFoundError:
        return 0


def _progress(path: Path) -> float:
    try:
        return (path / "artifacts" / "state.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def workers_of(launcher: int) -> list[int]:
    """PIDs of a run's workers."""
    return [pid for pid in alive_in_session(launcher) if pid != launcher and _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    """Whether a process of the run is no resource tracker of Python's."""
    try:
        return b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main() -> int:
    """Runs the campaigns, prints and saves their outcomes; 1 when a run differed or a fault was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--commands", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="campaign_"))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for kind in args.kinds:
        begin = time.monotonic()
        outcome = asdict(Campaign(kind, folder, args.commands, args.seed).run(args.kills))
        outcomes.append({**outcome, "minutes": round((time.monotonic() - begin) / 60, 1)})
        print(json.dumps(outcomes[-1]), flush=True)
        (folder / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
    return int(any(o["faults"] or o["equal"] < o["runs"] for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
