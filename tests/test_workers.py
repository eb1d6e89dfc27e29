"""How workers end, and what their launcher makes of it: workers that do nothing but that."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from utils import workers

FORK = multiprocessing.get_context("fork")


def written(file: Path, seconds: float = 20) -> str:
    """What `file` holds, as soon as it holds anything."""
    end = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end, f"no {file.name}"
        time.sleep(0.002)
    return file.read_text()


def place_kept() -> str:
    """This worker's rank, once its place has been written down for the test."""
    rank = os.environ["RANK"]
    Path(f"place_{rank}").write_text(json.dumps([os.getpid(), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]]))
    return rank


def end_together() -> int:
    place_kept()
    written(Path("go"))
    return 0


def end_by(fault: str) -> int:
    """Rank 1 dies of `fault`; rank 0 as one that has lost it, and sooner."""
    if place_kept() == "0":
        written(Path("place_1"))
        raise RuntimeError("Connection closed by peer")
    time.sleep(0.3)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raised":
        raise ZeroDivisionError("the cause")
    os._exit(7)


def outcome(worker, *args) -> str:
    try:
        return f"ended {workers.launch(worker, args, 2)}"
    except workers.WorkerFailure as failure:
        return f"{failure.kind}: {failure}"


def launcher(folder: Path, worker, *args) -> None:
    os.chdir(folder)
    workers.START_METHOD = "fork"
    said = outcome(worker, *args)
    (folder / "outcome.part").write_text(said)
    (folder / "outcome.part").rename(folder / "outcome")


@pytest.fixture
def start(tmp_path):
    """Starts a launcher in a folder of its own; kills those that are left."""
    started = []

    def start(worker, *args):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        process = FORK.Process(target=launcher, args=(folder, worker, *args))
        process.start()
        started.append(process)
        return folder

    yield start
    for process in started:
        process.kill()
        process.join()


def test_each_worker_knows_its_place(start):
    folder = start(end_together)
    places = [json.loads(written(folder / f"place_{rank}"))[1:] for rank in range(2)]
    (folder / "go").write_text("go")
    assert places == [["2", "0"], ["2", "1"]]
    assert written(folder / "outcome") == "ended 0"


def test_a_worker_killed_on_its_way_out_leaves_nobody_waiting(start):
    # Torch's elastic launcher waited for ever after 4 of 20 such kills.
    rng, ends = random.Random(0), []
    for _ in range(25):
        folder = start(end_together)
        pid = [json.loads(written(folder / f"place_{rank}"))[0] for rank in range(2)][1]
        (folder / "go").write_text("go")
        time.sleep(rng.choice([0, rng.uniform(0, 0.02)]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ends.append(written(folder / "outcome"))
    assert set(ends) <= {"ended 0", ": worker 1 was killed by SIGKILL (out of memory?)"}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("killed", ": worker 1 was killed by SIGKILL (out of memory?)"),
        ("raised", "ZeroDivisionError: the cause"),
        ("gone without a word", "RuntimeError: a worker was lost: Connection closed by peer"),
    ],
)
def test_the_cause_is_told_not_the_connection_that_another_lost(start, fault, told):
    assert written(start(end_by, fault) / "outcome") == told
