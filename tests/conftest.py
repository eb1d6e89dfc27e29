"""Shared by the tests that run the harness as its users do: through the command line, on real data."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parent.parent

# Tests run on the CPU, also where there is a GPU: but for those of test_gpu.py, which show one to what they start. The
# workers of xdist inherit what this sets, so what was shown before is kept aside.
SHOWN = os.environ.setdefault("GPUS_SHOWN_TO_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
COUNT_GPUS = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"

# scikit-learn's real digits, small enough that a level of two epochs takes well under a second. So short a level would
# leave no state within it: most tests want one per epoch.
SMALL = {
    "model_params.model_name": "lenet_300_100",
    "dataset.dataset_name": "Digits",
    "dataset.batch_size": 128,
    "prune_params.num_levels": 3,
    "prune_params.prune_rate": 0.5,
    "experiment_params.epochs_per_level": 3,
    "experiment_params.precision": "fp32",
    "experiment_params.save_every_epochs": 1,
    "optimizer.lr": 0.1,
    "optimizer.warmup_epochs": 1,
    "dist_params.nproc": 1,
}


def product_files() -> list[Path]:
    """Every Python file of the program, in whatever folder: all that git knows or would add, but for the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        hidden = [path for path in ROOT.iterdir() if path.name.startswith((".", "experiments", "data"))]
        files = [path for path in ROOT.rglob("*.py") if not any(path.is_relative_to(folder) for folder in hidden)]
    files = [path for path in files if path.exists() and not path.is_relative_to(ROOT / "tests")]
    assert {"harness.py", "harness_params.py"} <= {path.name for path in files} and len(files) > 40
    return sorted(files)


@dataclass
class Finished:
    """A harness run that has ended."""

    path: Path
    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    def csv(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.path / "metrics" / f"{name}.csv")

    def checkpoint(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.path / "checkpoints" / f"model_{name}.pt", weights_only=True)

    def assert_same_figures(self, other: "Finished") -> None:
        """Weights, masks and every CSV figure but times are equal, bit for bit."""
        mine = sorted(p.relative_to(self.path) for p in self.path.rglob("model_*.pt"))
        assert mine == sorted(p.relative_to(other.path) for p in other.path.rglob("model_*.pt"))
        for name in mine:
            a = torch.load(self.path / name, weights_only=True)
            b = torch.load(other.path / name, weights_only=True)
            assert a.keys() == b.keys()
            different = [key for key in a if not torch.equal(a[key], b[key])]
            assert not different, f"{name}: {different}"
        tables = sorted(p.relative_to(self.path) for p in self.path.rglob("*.csv"))
        assert tables == sorted(p.relative_to(other.path) for p in other.path.rglob("*.csv"))
        for name in tables:
            a, b = (pd.read_csv(p / name, dtype=str) for p in (self.path, other.path))  # text: equal to the last digit
            times = [c for c in ("seconds", "images_per_second") if c in a]
            pd.testing.assert_frame_equal(a.drop(columns=times), b.drop(columns=times))


class Launcher:
    """Starts harness.py in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def command(self, name: str, *words: str, program: tuple[str, ...] = ("harness.py",), **options) -> list[str]:
        values = {**SMALL, "experiment_params.base_dir": self.folder, "experiment_params.expt_name": name, **options}
        return [sys.executable, *program, *(f"--{k}={v}" for k, v in values.items() if v is not None), *words]

    def start(self, name: str, *words: str, env: dict | None = None, **options) -> subprocess.Popen:
        """Starts a run in its own session, so that a test can look for what it leaves behind."""
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {k: v for k, v in os.environ.items() if k not in launcher} | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command(name, *words, **options), cwd=ROOT, env=environment | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def finish(self, name: str, process: subprocess.Popen, timeout: float = 300) -> Finished:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"run {name} did not end within {timeout} s\n{out}\n{err}")
        return Finished(self.folder / name, process.returncode, out, err)

    def __call__(self, name: str, *words: str, status: int = 0, **options) -> Finished:
        done = self.finish(name, self.start(name, *words, **options))
        assert done.status == status, f"exit {done.status}\n{done.out}\n{done.err}"
        return done


@functools.cache
def first_gpu() -> str:
    """What CUDA_VISIBLE_DEVICES is to be for a process that uses one GPU; empty if torch finds none."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    env |= {} if SHOWN == "all" else {"CUDA_VISIBLE_DEVICES": SHOWN}
    done = subprocess.run([sys.executable, "-c", COUNT_GPUS], env=env, capture_output=True, text=True, check=True)
    if done.stdout.split()[-1] == "0":
        return ""
    return "0" if SHOWN == "all" else SHOWN.split(",")[0]


@pytest.fixture(scope="session")
def gpu() -> str:
    """`first_gpu`; without one the test is skipped, or with REQUIRE_GPU=1 fails."""
    found = first_gpu()
    if not found:
        (pytest.fail if os.environ.get("REQUIRE_GPU") == "1" else pytest.skip)("torch finds no GPU")
    return found


@pytest.fixture
def launch(tmp_path) -> Launcher:
    return Launcher(tmp_path)


@pytest.fixture(scope="module")
def shared_launch(tmp_path_factory) -> Launcher:
    """For runs that several tests of a module look at."""
    return Launcher(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def fork(tmp_path):
    """Starts runs without the cost of a start (tests/processes.py)."""
    from tests.processes import Forks

    return Forks(tmp_path)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """The same, for runs that several tests of a module look at."""
    from tests.processes import Forks

    return Forks(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def in_file(tmp_path):
    """in_file(text) -> the words that load it as a config file."""

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--config", str(path)]

    return write
