"""Faults of disks, numbers, clocks and ports: one clear line, the last good state intact; or survived."""

import ast
import json
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Finished, product_files
from tests.processes import Forks
from tests.traps import KINDS, SHORT, Both, KillAfterWrite, StopAt, states_of

IMP = KINDS["imp"]


@pytest.fixture(scope="module")
def whole(forks) -> Finished:
    return forks("whole", **IMP)


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """A file system of 16 MB."""
    folder = Path(tempfile.mkdtemp(prefix="small_disk_"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


class FillDisk:
    """Fills the disk right before the n-th write of a file of this name: the kernel refuses that write."""

    def __init__(self, disk: Path, name: str, count: int = 1):
        self.disk, self.name, self.count = disk, name, count

    def __call__(self) -> None:
        from utils import files

        plain = files.HashedFile.__init__

        def begin(hashed, file) -> None:
            if file.name.endswith(f".{self.name}.part"):
                self.count -= 1
                if self.count == 0:
                    fill(self.disk)
            plain(hashed, file)

        files.HashedFile.__init__ = begin


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


WRITES = {
    "first_checkpoint": ("model_init.pt", 1),
    "checkpoint": ("model_level_1.pt", 1),
    "digests": ("checkpoints.json", 2),
    "csv_row": ("level_1_metrics.csv", 2),
    "summary": ("summary.csv", 2),
    "state": ("state_0.pt", 3),
    "index": ("state.json", 4),
    "rewind": ("model_rewind.pt", 1),
    "config": ("expt_config.yaml", 1),
}


@pytest.mark.parametrize("case", WRITES)
def test_full_disk(small_disk, whole, case, tmp_path):
    """The run ends with one line; once there is space it is taken up where it stood, and no bit is lost."""
    forks, (name, count) = Forks(small_disk, tmp_path), WRITES[case]
    options = KINDS["wr"] if case == "rewind" else IMP
    run = forks("full", status=1, trap=FillDisk(small_disk, name, count), **options)
    assert re.fullmatch(rf"harness: cannot write {run.path}/.*{name}: No space left on device\n", run.err)
    assert not list(run.path.rglob("*.part"))
    (small_disk / "ballast").unlink()
    again = forks("full", resume=case != "config", **options)
    if options is IMP:
        again.assert_same_figures(whole)
    assert len(again.csv("summary")) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_full_disk_with_two_processes(small_disk, tmp_path, count):
    """The line is of the disk, not of the connection that the other process lost.

    The second state_0.pt is the run's last file: the other process has done its work, and must not be waited for.
    """
    forks = Forks(small_disk, tmp_path)
    run = forks.start("full", trap=FillDisk(small_disk, "state_0.pt", count), **SHORT, **{"dist_params.nproc": 2})
    done = run.finish(1, timeout=25)
    assert done.last_line == f"harness: cannot write {run.path}/artifacts/state_0.pt: No space left on device"


def test_disk_too_full_to_begin(small_disk, tmp_path):
    fill(small_disk)
    run = Forks(small_disk, tmp_path)("full", status=1, **SHORT)
    assert len(run.err.splitlines()) == 1 and "No space left on device" in run.err


def test_read_only_base_dir(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = Forks(small_disk / "below", tmp_path)("new", status=2, **SHORT)
    assert run.err == (
        f"harness: experiment_params.base_dir: '{small_disk}/below': {small_disk} is not a writable folder\n"
    )


def test_disk_that_becomes_read_only(small_disk):
    """By the immutable flag of a folder: what a run meets when its disk is remounted read-only after an error."""
    forks = Forks(Path(tempfile.mkdtemp(prefix="read_only_", dir=Path(__file__).parent)))
    try:
        run = forks.start("run", **{**SHORT, "experiment_params.epochs_per_level": 100000})
        run.wait_for_rows(2)
        folder = run.path / "artifacts"
        if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
            run.kill()
            pytest.skip("folders cannot be made immutable here")
        done = run.finish(1)
        assert re.fullmatch(rf"harness: cannot write {folder}/state.*: Operation not permitted\n", done.err)
        subprocess.run(["chattr", "-i", str(folder)], check=True)
        done = forks.start("run", resume=True, **{**SHORT, "experiment_params.epochs_per_level": 100000})
        rows = len((run.path / "metrics/epochwise_metrics/level_0_metrics.csv").read_text().splitlines()) - 1
        done.wait_for_rows(rows + 2)
        done.kill()
    finally:
        subprocess.run(["chattr", "-R", "-i", str(forks.folder)], capture_output=True)
        shutil.rmtree(forks.folder, ignore_errors=True)


def test_vanished_base_dir(fork):
    run = fork.start("gone", **{**SHORT, "experiment_params.epochs_per_level": 100000})
    run.wait_for_rows(2)
    # In one step: deleting file by file, the run may write another into a folder that was just emptied.
    run.path.rename(run.path.with_name("taken away"))
    done = run.finish(1)
    assert re.fullmatch(rf"harness: cannot write {run.path}/.*: No such file or directory\n", done.err)


# --- numbers, clocks, ports ------------------------------------------------------------------------------------------


class BadGradient:
    """A gradient that is not a number, in one step, while the losses up to it are finite."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self) -> None:
        from utils.training import setup

        plain, self.calls = setup.create_model, 0

        def create(*args, **kwargs):
            model = plain(*args, **kwargs)
            next(model.parameters()).register_hook(self.spoilt)
            return model

        setup.create_model = create

    def spoilt(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return gradient * float("nan") if self.calls == self.step else gradient


@pytest.mark.parametrize("nproc", [1, 2])
def test_bad_gradient_in_the_last_step_of_an_epoch(fork, nproc):
    """Step 24 is the last of epoch 1: its loss was finite, the weights after it are not, and are saved nowhere."""
    step = 24 if nproc == 1 else 25  # the first step of several processes is taken twice, once for nothing
    if nproc == 1:
        run = fork("bad", status=1, trap=BadGradient(step), **IMP)
    else:
        run, _ = [rank.finish(1) for rank in fork.ranks("bad", nproc, trap=BadGradient(step), **IMP)]
    assert run.last_line == (
        "harness: fc1.weight is no longer finite at level 0, epoch 1, after step 11, though every loss was: "
        "a gradient was not"
    )
    assert list(run.csv("epochwise_metrics/level_0_metrics")["epoch"]) == [0]
    for state in states_of(run.path):
        model = torch.load(state, weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in model.values())


def test_bad_gradient_before_a_stop(fork):
    run = fork("bad", status=1, trap=Both(BadGradient(15), StopAt(15)), **IMP)
    assert "fc1.weight is no longer finite at level 0, epoch 1, after step 2" in run.last_line
    assert json.loads((run.path / "artifacts" / "state.json").read_text())[0]["step"] == 0


@pytest.mark.parametrize(("minutes", "place"), [(0.00001, (0, 0, True)), (1, (1, 0, False))])
def test_states_by_the_minute(fork, minutes, place):
    """Killed at its first state: after a step where one takes longer than the minutes, else at the end of level 0.

    Seconds are counted by clocks that nobody sets back (test_no_duration_hangs_on_the_wall_clock).
    """
    options = {**IMP, "experiment_params.save_every_epochs": 0, "experiment_params.save_every_minutes": minutes}
    run = fork("clock", status=-signal.SIGKILL, trap=KillAfterWrite("state.json", 1), **options)
    (state,) = json.loads((run.path / "artifacts" / "state.json").read_text())
    assert (state["level"], state["epoch"] if state["level"] == 0 else 0, state["step"] > 0) == place


def wall_clock_calls(source: str) -> list[str]:
    """Names of the clocks that a program reads, and that an administrator or a time server may set back."""
    tree = ast.parse(source)
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "time"]
    names += [f"time.{alias.name}" for node in imported for alias in node.names]
    return [name for name in names if name in ("time.time", "time.time_ns", "time.clock_gettime")]


def test_no_duration_hangs_on_the_wall_clock():
    assert wall_clock_calls("import time\nfrom time import time\nx = time.time() - y") == ["time.time", "time.time"]
    found = {str(file.relative_to(ROOT)): wall_clock_calls(file.read_text()) for file in product_files()}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_port_in_use(fork):
    """The port of a YAML is a wish: two runs of one YAML run beside each other, and the second one says so."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        sock.listen()
        port = sock.getsockname()[1]
        run = fork("port", **SHORT, **{"dist_params.nproc": 2, "dist_params.port": port})
    assert run.err == (
        f"harness: note: dist_params.port: {port} on localhost: Address already in use; took a free one\n"
    )
    assert len(run.csv("summary")) == 2


def test_states_every_second_epoch(fork):
    """Fewer states cost the epochs since the last one, and no bit."""
    options = {**IMP, "experiment_params.save_every_epochs": 2}
    run = fork.start("rare", trap=KillAfterWrite("level_1_metrics.csv", 3), **options).finish(None)
    assert run.status < 0
    (newest, *_) = json.loads((run.path / "artifacts" / "state.json").read_text())
    assert (newest["level"], newest["epoch"]) == (1, 2)
    again = fork("rare", resume=True, **options)
    again.assert_same_figures(fork("whole", **IMP))
