"""How workers end, and what their launcher makes of it: workers that do nothing but that."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from utils import launcher as workers
from utils.distributed import lost_connections, serve_store
from utils.errors import ConfigError
from utils.processes.signals import STOPPING, Stopped

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


def die_on_the_way_out() -> int:
    """Rank 1's work is done; it is killed before it can say so."""
    if place_kept() == "1":
        workers.end_at_once = lambda status: os.kill(os.getpid(), signal.SIGKILL)
    written(Path("go"))
    return 0


def end_by(fault: str) -> int:
    """Rank 1 dies of `fault`; rank 0 as one that has lost it, and sooner."""
    if place_kept() == "0":
        written(Path("place_1"))
        with lost_connections():
            raise RuntimeError("Connection closed by peer")
    time.sleep(0.3)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raised":
        raise ZeroDivisionError("the cause")
    os._exit(7)


def stick(fault: str) -> int:
    """Rank 1 dies; rank 0 notices nothing, nor any signal but SIGKILL."""
    if place_kept() == "0":
        for signum in STOPPING:
            signal.signal(signum, signal.SIG_IGN)
        time.sleep(60)
    if fault == "lost":
        with lost_connections():
            raise RuntimeError("[gloo] Timed out waiting 600000ms for recv operation to complete")
    os._exit(7)


def finish_all_the_same() -> int:
    """A signal comes when there is nothing left to save."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    place_kept()
    written(Path("go"))
    return 0


def leave_a_child() -> int:
    """Rank 1 is killed; a child of its own, a data loader, lives on for a while with all that it had open."""
    if place_kept() == "0":
        time.sleep(60)
    if os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def outcome(worker, *args) -> str:
    try:
        return f"ended {workers.launch(worker, args, 2)}"
    except workers.WorkerFailure as failure:
        return f"{failure.record['kind']}: {failure}"
    except (Stopped, OSError) as failure:
        return f": {failure}"


def launcher(folder: Path, worker, *args) -> None:
    os.chdir(folder)
    workers.START_METHOD = "fork"
    workers.LAST_WORDS_SECONDS = workers.LAST_SAVE_SECONDS = 1
    said = outcome(worker, *args)
    (folder / "outcome.part").write_text(said)
    (folder / "outcome.part").rename(folder / "outcome")


def launcher_short_of_processes(folder: Path, worker, *args) -> None:
    """The second process cannot be started."""
    start, started = BaseProcess.start, []

    def start_one(process) -> None:
        started.append(process)
        if len(started) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process)

    BaseProcess.start = start_one
    launcher(folder, worker, *args)


@pytest.fixture
def start(tmp_path):
    """Starts a launcher in a folder of its own; kills those that are left."""
    started = []

    def start(worker, *args, launcher=launcher):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        process = FORK.Process(target=launcher, args=(folder, worker, *args))
        process.start()
        started.append(process)
        (folder / "launcher").write_text(str(process.pid))
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
    killed = "RunError: worker 1 was killed by SIGKILL (out of memory?)"
    assert set(ends) <= {"ended 0", killed} and ends.count(killed) >= 5, ends
    folder = start(die_on_the_way_out)
    (folder / "go").write_text("go")
    assert written(folder / "outcome") == killed


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("killed", "RunError: worker 1 was killed by SIGKILL (out of memory?)"),
        ("raised", "ZeroDivisionError: ZeroDivisionError: the cause"),
        ("gone without a word", "ConnectionLost: a worker was lost: Connection closed by peer"),
    ],
)
def test_the_cause_is_told_not_the_connection_that_another_lost(start, fault, cause):
    assert written(start(end_by, fault) / "outcome") == cause


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("lost", "ConnectionLost: a worker was lost: [gloo] Timed out waiting 600000ms for recv operation to complete"),
        ("gone without a word", "RunError: worker 1 ended with exit code 7"),
    ],
)
def test_a_worker_that_the_launcher_has_killed_is_not_the_cause(start, fault, cause):
    assert written(start(stick, fault) / "outcome") == cause


def test_a_death_is_noticed_though_a_child_of_the_dead_lives_on(start):
    begin = time.monotonic()
    cause = written(start(leave_a_child) / "outcome")
    assert cause == "RunError: worker 1 was killed by SIGKILL (out of memory?)" and time.monotonic() - begin < 6


def test_a_worker_that_cannot_be_started_leaves_no_other_behind(start):
    begin, folder = time.monotonic(), start(stick, "", launcher=launcher_short_of_processes)
    assert written(folder / "outcome") == ": [Errno 11] Resource temporarily unavailable"
    assert time.monotonic() - begin < 20


def test_a_signal_to_a_run_that_has_finished_stops_nothing(start):
    folder = start(finish_all_the_same)
    for rank in range(2):
        written(folder / f"place_{rank}")
    os.kill(int(written(folder / "launcher")), signal.SIGTERM)
    time.sleep(0.5)
    (folder / "go").write_text("go")
    assert written(folder / "outcome") == "ended 0"


def test_the_port_is_another_when_it_is_taken_and_the_address_is_this_machines(capsys):
    first = serve_store("localhost", 0)
    second = serve_store("localhost", first.port)
    assert second.port != first.port
    note = f"harness: note: dist_params.port: {first.port} on localhost: Address already in use; took a free one\n"
    assert capsys.readouterr().err == note
    with pytest.raises(ConfigError, match=r"dist_params.address: 192.0.2.1: Cannot assign requested address"):
        serve_store("192.0.2.1", 0)  # an address of no machine (RFC 5737)
