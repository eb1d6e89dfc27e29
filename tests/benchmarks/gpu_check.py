"""The harness on a GPU: its tests, its speed beside its targets, start-up and a whole study. Prints a table at the end.

    python -m tests.benchmarks.gpu_check TREE [--photographs TREE] [--seconds 530] [--only STEP,...]

TREE holds CIFAR-10 as images. Each step is a process with a time limit of its own; one that fails, or is cut off, stops
no other. After --seconds what runs is cut off, and what is left is left out. The order is that of importance. What was
found is written after each step. Kernels are compiled into an empty folder, so the study starts cold and what follows
starts warm. The exit status is 0 if every step but the optional ones ended well and every target was met.

- Images/s of a run: the median over its CSV's rows, without the first four epochs of a level.
- Wall time of a level: between the writing of two levels' checkpoints. Its steps: images over images/s, summed over the
  level's rows. The level evaluates after every epoch, its steps do not.
- Start-up: from the command to the first row of the first level's CSV, evaluation included.
- Masked and dense: the training step of this harness without CUDA graphs, beside the plain loop, in turns.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.benchmarks.gpu_figures import Figure, bench_rows, level_ratio, median_of, rate, table

ROOT = Path(__file__).parents[2]
RESNET18, RESNET20 = "configs/cifar10_resnet18_fast.yaml", "configs/cifar10_resnet20_fast.yaml"
LRR = {"experiment_params.training_type": "lrr"}
STUDY = {**LRR, "prune_params.num_levels": 12, "experiment_params.epochs_per_level": 16}
# Long enough that compile: auto compiles; stopped once level 2 has begun.
LONG = {**LRR, "prune_params.num_levels": 60, "experiment_params.epochs_per_level": 8}
TOGETHER = 4  # runs that share the GPU


@dataclasses.dataclass
class Check:
    """What the steps share, and what they found.

    Attributes:
        out: folder of runs, logs and kernels.
        common: options of all runs: where the data are.
        images: training images of an epoch.
        photographs: a tree of large images, for FFCV; empty for none.
        end: when nothing may run any more, by time.monotonic.
    """

    out: Path
    common: dict[str, object]
    images: int
    photographs: str = ""
    end: float = math.inf
    figures: list[Figure] = dataclasses.field(default_factory=list)

    def command(self, config: str, name: str, options: dict[str, object]) -> list[str]:
        """harness.py on `config`; without `config`, on what the options alone say."""
        place = {"experiment_params.base_dir": self.out / "runs", "experiment_params.expt_name": name}
        words = [f"--{key}={value}" for key, value in {**self.common, **options, **place}.items()]
        return [sys.executable, "harness.py", *(["--config", config] if config else []), *words]

    def run(
        self,
        command: list[str],
        log: str,
        limit: float,
        until: Callable[[], bool] | None = None,
        watch: Callable[[], None] | None = None,
        **env: str,
    ) -> float:
        """Runs a command to its end, or until `until` is true; returns the seconds that took.

        Meanwhile `watch` is called every 20 ms.

        Raises:
            StepFailed: it failed, ended before `until`, or was cut off after `limit` seconds, or at `end`.
        """
        limit = min(limit, self.end - time.monotonic())
        start, file = time.monotonic(), self.out / f"{log}.log"
        with open(file, "w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while process.poll() is None and not (until and until()):
                if time.monotonic() - start > limit:
                    raise StepFailed(f"cut off after {limit:.0f} s")
                if watch:
                    watch()
                time.sleep(0.02)
            seconds, ended = time.monotonic() - start, process.poll()
        finally:
            end(process)
        if ended or (until and not until()):
            raise StepFailed(f"exit status {ended}: {last_line(file)}")
        return seconds

    def path(self, name: str) -> Path:
        return self.out / "runs" / name

    def has_row(self, name: str, level: int = 0) -> bool:
        """Whether an epoch of the level is in its CSV."""
        file = self.path(name) / "metrics" / "epochwise_metrics" / f"level_{level}_metrics.csv"
        return file.exists() and len(file.read_text().splitlines()) > 1

    def add(self, what: str, value: float, unit: str, target: str = "", ok: bool | None = None) -> None:
        self.figures.append(Figure(what, value, unit, target, ok))

    def write(self) -> None:
        """Writes what was found so far: figures.json and table.md."""
        (self.out / "figures.json").write_text(json.dumps([*map(dataclasses.asdict, self.figures)], indent=1))
        (self.out / "table.md").write_text("\n".join([*table(self.figures), ""]))


class StepFailed(Exception):
    """Why a step has no figures, in a line."""


class LeftOut(Exception):
    """What a step needs and this machine does not have."""


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    for signum, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        if process.poll() is None:
            os.killpg(process.pid, signum)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


# --- the steps -------------------------------------------------------------------------------------------------------


def gpu_tests(check: Check) -> None:
    """tests/test_gpu.py, none skipped."""
    command = [sys.executable, "-m", "pytest", "-n", "9", "-q", "tests/test_gpu.py"]
    try:
        seconds = check.run(command, "tests", 170, REQUIRE_GPU="1")
    except StepFailed:
        print("\n".join((check.out / "tests.log").read_text().splitlines()[-60:]), flush=True)
        raise
    check.add("GPU tests", seconds, "s", "< 150", seconds < 150)


def study(check: Check, config: str = RESNET18, limit: float = 230) -> None:
    """The 12-level study from a cold start: start-up, total time, images/s, and levels beside their steps."""
    first: list[float] = []
    start = time.monotonic()

    def watch() -> None:
        if not first and check.has_row("study"):
            first.append(time.monotonic() - start)

    seconds = check.run(check.command(config, "study", STUDY), "study", limit, watch=watch)
    check.add("ResNet-18: command to end of first epoch, cold", first[0], "s", "< 15", first[0] < 15)
    check.add("ResNet-18: 12 levels of 16 epochs, cold", seconds, "s", "< 180", seconds < 180)
    run_figures(check, "study", "ResNet-18, batch 512", 69_000)


def run_figures(check: Check, name: str, what: str, at_least: float) -> None:
    """Images/s of a run's CSVs, and the wall time of its levels beside their steps."""
    speed = median_of(check.path(name), "images_per_second")
    check.add(f"{what}: images/s in the CSV", speed, "images/s", f">= {at_least:,.0f}", speed >= at_least)
    ratio = level_ratio(check.path(name), check.images)
    check.add(f"{what}: wall time of a level / its steps'", ratio, "x", "<= 1.10", ratio <= 1.10)


def start_warm(check: Check, config: str = RESNET18) -> None:
    """The study's start once more, its kernels compiled."""
    until = lambda: check.has_row("warm")  # noqa: E731
    seconds = check.run(check.command(config, "warm", STUDY), "warm", 60, until)
    check.add("ResNet-18: command to end of first epoch, warm", seconds, "s", "< 6", seconds < 6)


def start_short(check: Check, config: str = RESNET18) -> None:
    """A run of one level, for which compile: auto is off."""
    until = lambda: check.has_row("short")  # noqa: E731
    options = {**STUDY, "prune_params.num_levels": 1}
    seconds = check.run(check.command(config, "short", options), "short", 60, until)
    check.add("ResNet-18: command to end of first epoch, one level", seconds, "s", "< 6", seconds < 6)


def real_runs(check: Check, config: str = RESNET20) -> None:
    """ResNet-20 at two batch sizes."""
    for batch, at_least in ((256, 120_000), (512, 200_000)):
        name = f"resnet20_{batch}"
        options = {**LONG, "dataset.batch_size": batch}
        until = lambda name=name: check.has_row(name, level=2)  # noqa: E731
        check.run(check.command(config, name, options), name, 90, until)
        run_figures(check, name, f"ResNet-20, batch {batch}", at_least)


def benchmarks(check: Check) -> None:
    """python -m utils.benchmark: ours with and without graphs, and the plain dense loop, compiled."""
    for network, config, batch in (("18", RESNET18, 512), ("20", RESNET20, 256), ("20", RESNET20, 512)):
        log = f"bench_resnet{network}_{batch}"
        words = ["--config", config, f"--dataset.batch_size={batch}", "--experiment_params.compile=auto"]
        words += ["--synthetic=50000", "--rounds=3", "--steps=0", "--skip=usual,levels,memory"]
        benchmark(check, log, f"ResNet-{network}, batch {batch}", words, 80)


def benchmark(check: Check, log: str, what: str, words: list[str], limit: float) -> None:
    """One table of the benchmark, and its figures."""
    check.run([sys.executable, "-m", "utils.benchmark", *words], log, limit)
    text = (check.out / f"{log}.log").read_text()
    print(text, flush=True)
    rows = bench_rows(text)
    for label, cells in rows.items():
        for name in ("ours", "ours, no graphs", "plain loop"):
            if name in cells:
                check.add(f"{what}: {label}, {name}", rate(cells[name]), "")
    epoch = next(cells for label, cells in rows.items() if "epoch" in label)
    masked = epoch.get("ours, no graphs", epoch["ours"])
    ratio = rate(masked) / rate(epoch["plain loop"])
    check.add(f"{what}: masked / dense, launch by launch", ratio, "x", ">= 0.98", ratio >= 0.98)


def together(check: Check, config: str = RESNET20, limit: float = 90) -> None:
    """Several runs on one GPU by run_grid, through MPS and in turns."""
    for mps in ("on", "off"):
        base = check.out / "runs" / f"grid_{mps}"
        grid = check.out / f"grid_{mps}.json"  # JSON is YAML
        grid.write_text(json.dumps({
            "config": str(ROOT / config), "base_dir": str(base), "jobs": TOGETHER, "seeds": list(range(TOGETHER)),
            "runs": {"run": LRR},
        }))  # fmt: skip
        options = {**check.common, "prune_params.num_levels": 1, "experiment_params.epochs_per_level": 10}
        words = [f"--{key}={value}" for key, value in options.items()]
        try:
            check.run([sys.executable, "-m", "utils.run_grid", str(grid), f"--mps={mps}", *words], f"grid_{mps}", limit)
        except StepFailed as failure:
            print(f"{TOGETHER} runs, mps {mps}: {failure}", flush=True)
            continue
        speeds = [median_of(path, "images_per_second") for path in sorted(base.glob("run_seed*"))]
        check.add(f"{TOGETHER} x ResNet-20, batch 256, mps {mps}: images/s in all", sum(speeds), "images/s")


def ffcv(check: Check) -> None:
    """Loading of large images beside the step; needs FFCV and photographs."""
    if importlib.util.find_spec("ffcv") is None:
        raise LeftOut("FFCV is not installed here")
    if not check.photographs:
        raise LeftOut("--photographs names no tree")
    command = [sys.executable, "tests/benchmarks/loading.py", "--source", check.photographs]
    check.run(command, "ffcv", 150)
    print((check.out / "ffcv.log").read_text(), flush=True)


def kernels(check: Check) -> None:
    """What may move ResNet-18's kernels, each against the same plain loop (kernels.py)."""
    for variant in ("batch 1024", "contiguous", "max-autotune"):
        log = "kernels_" + variant.replace(" ", "_")
        try:
            check.run([sys.executable, "-m", "tests.benchmarks.kernels", variant], log, 90)
        except StepFailed as failure:
            print(f"{variant}: {failure}", flush=True)
            continue
        found = json.loads(last_line(check.out / f"{log}.log"))
        check.add(f"ResNet-18 kernels, {variant} / usual", found["ratio"], "x")


STEPS: dict[str, Callable[[Check], None]] = {
    "tests": gpu_tests, "study": study, "start_warm": start_warm, "start_short": start_short, "real_runs": real_runs,
    "together": together, "benchmarks": benchmarks, "ffcv": ffcv, "kernels": kernels,
}  # fmt: skip
OPTIONAL = ("ffcv", "kernels")  # left out where there is no time for them


def run_steps(check: Check, names: Iterable[str]) -> bool:
    """Runs the steps, prints and writes what each found; returns whether all but the `OPTIONAL` ones ended well."""
    start, succeeded = time.monotonic(), True
    for name in names:
        began, figures_before = time.monotonic(), len(check.figures)
        if began > check.end:
            print(f"--- {name}: left out: {began - start:.0f} s have passed", flush=True)
            succeeded &= name in OPTIONAL
            continue
        outcome = "done"
        try:
            STEPS[name](check)
        except LeftOut as reason:
            outcome = f"left out: {reason}"
        except StepFailed as failure:
            outcome = str(failure)
            succeeded &= name in OPTIONAL and time.monotonic() > check.end
        except Exception as error:  # a step's own fault must not cost the others' figures
            outcome, succeeded = f"{type(error).__name__}: {error}", False
        now = time.monotonic()
        print(f"--- {name}: {outcome}, {now - began:.0f} s, at {now - start:.0f} s", flush=True)
        for figure in check.figures[figures_before:]:
            print(f"    {figure}", flush=True)
        check.write()
    return succeeded


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests/benchmarks/gpu_check.sh")
    parser.add_argument("tree")
    parser.add_argument("--photographs", default="")
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, of {', '.join(STEPS)}")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT") or "/tmp/gpu_check") / "check"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out / "kernels")
    common: dict[str, object] = {"dataset.dataset_name": "ImageFolder", "dataset.data_root": Path(args.tree).resolve()}
    images = sum(len(files) for _, _, files in os.walk(Path(args.tree) / "train"))
    check = Check(out, common, images, args.photographs, end=time.monotonic() + args.seconds)
    try:
        succeeded = run_steps(check, args.only.split(","))
    finally:
        shutil.rmtree(out / "kernels", ignore_errors=True)
        print("\n".join(table(check.figures)), flush=True)
    return 0 if succeeded and all(figure.ok is not False for figure in check.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
