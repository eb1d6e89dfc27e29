"""The check of a GPU (tests/benchmarks/gpu_check.sh) measures what it says it measures: here, on runs of a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest

from harness_params import load_config
from tests.benchmarks import gpu_check, gpu_figures, kernels
from tests.benchmarks.gpu_check import Check, StepFailed
from tests.benchmarks.gpu_figures import Figure
from tests.conftest import ROOT, SMALL

DIGITS = {key: value for key, value in SMALL.items() if not key.startswith("prune_params")}


@pytest.fixture
def check(tmp_path) -> Check:
    return Check(tmp_path, DIGITS, images=1437)


def test_a_study_is_measured(check, monkeypatch):
    """A run of three levels, as the study: start-up, total time, images/s and level time are those of its files."""
    monkeypatch.setattr(gpu_check, "STUDY", {"prune_params.num_levels": 3, "experiment_params.epochs_per_level": 6})
    gpu_check.study(check, config="")
    found = {figure.what: figure.value for figure in check.figures}
    start, total, speed, ratio = found.values()
    rows = gpu_figures.epochs_of(check.path("study"))
    assert len(rows) == 3 and 0.5 < start < total
    speeds = sorted(value for level in rows for value in level["images_per_second"][4:])
    assert speeds[0] <= speed <= speeds[-1]
    written = [os.stat(check.path("study") / "checkpoints" / f"model_level_{level}.pt").st_mtime for level in range(3)]
    steps = [(1437 / level["images_per_second"]).sum() for level in rows]
    ratios = [(b - a) / s for a, b, s in zip(written, written[1:], steps[1:])]
    assert ratio == pytest.approx(sum(ratios) / 2)
    assert [figure.target for figure in check.figures] == ["< 15", "< 180", ">= 69,000", "<= 1.10"]


def test_a_start_is_measured_and_ended(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "STUDY", {"prune_params.num_levels": 9, "experiment_params.epochs_per_level": 500})
    gpu_check.start_short(check, config="")
    gpu_check.start_warm(check, config="")
    assert [figure.value > 0.5 for figure in check.figures] == [True, True]
    assert not (check.path("warm") / "metrics" / "summary.csv").exists(), "stopped after its first epoch"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; print('no such thing', file=sys.stderr); sys.exit(3)", "exit status 3: no such thing"),
        ("import time; time.sleep(60)", "cut off after 1 s"),
        ("pass", "exit status 0: no output"),
    ],
)
def test_a_failing_command_is_told(check, program, message):
    with pytest.raises(StepFailed, match=message):
        check.run([sys.executable, "-c", program], "log", 1, until=lambda: False)


def test_a_failing_step_stops_no_other(check, monkeypatch, capsys):
    def fails(check: Check) -> None:
        raise StepFailed("no GPU")

    def breaks(check: Check) -> None:
        raise ZeroDivisionError

    def works(check: Check) -> None:
        check.add("speed", 123456.0, "images/s", ">= 1", True)

    monkeypatch.setattr(gpu_check, "STEPS", {"fails": fails, "breaks": breaks, "works": works})
    assert not gpu_check.run_steps(check, ["fails", "breaks", "works"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--- fails: no GPU") and lines[1].startswith("--- breaks: ZeroDivisionError")
    assert lines[2].startswith("--- works: done") and lines[3] == "    | speed | 123,456 images/s | >= 1 | met |"
    assert json.loads((check.out / "figures.json").read_text())[0]["value"] == 123456.0
    assert (check.out / "table.md").read_text().splitlines()[-1] == "| speed | 123,456 images/s | >= 1 | met |"


def test_a_check_ends_in_time(check, monkeypatch, capsys):
    """The step that runs then is cut off; what is left is left out, and is missed unless it is optional."""

    def long(check: Check) -> None:
        check.run([sys.executable, "-c", "import time; time.sleep(60)"], "log", 50)

    def works(check: Check) -> None:
        check.add("speed", 1.0, "images/s")

    monkeypatch.setattr(gpu_check, "STEPS", {"long": long, "works": works, "kernels": works})
    check.end = time.monotonic() + 1
    assert gpu_check.run_steps(check, ["works", "kernels"])
    assert not gpu_check.run_steps(check, ["long", "works"])
    assert gpu_check.run_steps(check, ["kernels"])
    told = [line for line in capsys.readouterr().out.splitlines() if "long" in line or "left out" in line]
    assert told[0].startswith("--- long: cut off after 1 s")
    assert [line.split(" have")[0] for line in told[1:]] == ["--- works: left out: 1 s", "--- kernels: left out: 0 s"]
    assert len(check.figures) == 2


def test_the_benchmark_is_read(check):
    words = ["--rounds=1", "--steps=2", "--skip=usual,levels,memory"]
    gpu_check.benchmark(check, "bench", "LeNet", words, 120)
    values = {figure.what: figure.value for figure in check.figures}
    rows = gpu_figures.bench_rows((check.out / "bench.log").read_text())
    epoch = next(label for label in rows if "epoch" in label)
    assert values[f"LeNet: {epoch}, plain loop"] == gpu_figures.rate(rows[epoch]["plain loop"]) > 100
    ours, plain = (values[f"LeNet: {epoch}, {name}"] for name in ("ours", "plain loop"))
    assert values["LeNet: masked / dense, launch by launch"] == pytest.approx(ours / plain)


def test_table():
    figures = [Figure("a", 0.987, "x", ">= 0.98", True), Figure("b", 199.6, "s", "< 180", False), Figure("c", 5, "")]
    assert gpu_figures.table(figures)[2:] == [
        "| a | 0.99 x | >= 0.98 | met |", "| b | 200 s | < 180 | MISSED |", "| c | 5.00  |  |  |",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["batch 1024", "contiguous"])
def test_kernels_are_compared(variant):
    words = ["--model_params.model_name=conv2", "--experiment_params.compile=off", "--dataset.batch_size=16"]
    found = kernels.compare(variant, load_config([*kernels.WORDS, *words]), images=32, rounds=1)
    assert found["usual"] > 0 and found["variant"] > 0
    assert found["ratio"] == pytest.approx(found["variant"] / found["usual"])


def test_the_script_starts_it(tmp_path):
    (tmp_path / "train").mkdir()
    command = [str(ROOT / "tests/benchmarks/gpu_check.sh"), str(tmp_path), "--only=ffcv"]
    env = {"OUT": str(tmp_path / "out"), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert "--- ffcv: left out: " in done.stdout and "| figure | measured | target | |" in done.stdout, done.stderr
    assert done.returncode == 0 and json.loads((tmp_path / "out" / "check" / "figures.json").read_text()) == []
