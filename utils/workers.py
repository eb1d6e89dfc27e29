"""The workers of one machine: started, watched and ended by ``torch.multiprocessing``.

It is what torchrun's engine starts functions by, too, but that engine's workers end by waiting for an Event, and one
that is killed in that wait leaves the launcher waiting for ever (a comment in torch's MultiprocessContext says so).
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import multiprocessing

from utils.distributed import is_lost_connection, serve_store
from utils.files import scratch_folder
from utils.signals import ECHO_SECONDS, SHUTDOWN_SECONDS, Stopped, end_at_once, exit_quietly, handled

# Each worker imports all afresh: CUDA does not survive a fork.
START_METHOD = "spawn"
# When a worker has ended, the others find it out by themselves and say what they met; then they are sent SIGTERM, and
# after as long again SIGKILL.
LAST_WORDS_SECONDS = 10


class WorkerFailure(RuntimeError):
    """A worker ended before its work did.

    Attributes:
        traceback: the worker's own, empty when it was killed.
        kind: class name of the exception it died of, empty when it was killed.
    """

    def __init__(self, message: str, traceback: str = "", kind: str = ""):
        super().__init__(message)
        self.traceback = traceback
        self.kind = kind


def launch(worker: Callable[..., int], args: tuple, nproc: int, address: str = "localhost", port: int = 0) -> int:
    """Starts `nproc` processes running ``worker(*args)`` on this machine and waits for them.

    The workers live until `worker` returns its exit status, 0 or 128 + the signal that stopped it; when one ends
    otherwise, the others are ended.

    Returns:
        the workers' exit status.

    Raises:
        WorkerFailure: a worker died; tells of the first that died of itself.
        Stopped: a signal came before the workers could save their state, or they did not end in time.
    """
    # torch tells of the workers that it ends; ours is one line (and the worker's traceback).
    logging.disable(logging.WARNING)
    # Python's resource tracker warns of the queues of a killed worker, after our last line; the kernel has freed them.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    with scratch_folder() as errors, _stopped_once():
        store = serve_store(address, port)
        place = {"MASTER_ADDR": address, "MASTER_PORT": store.port, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
        try:
            workers = multiprocessing.start_processes(
                _work_as_rank, (place, worker, args, errors), nproc, join=False, start_method=START_METHOD
            )
            while not workers.join(grace_period=LAST_WORDS_SECONDS):
                pass
        except Stopped as stop:
            if all(status > 128 for status in _end_children(stop.signum)):
                return 128 + stop.signum
            raise
        except multiprocessing.ProcessExitedException as end:
            if end.exit_code > 128:  # the signal came to a worker, and all of them have stopped
                return end.exit_code
            raise _first_cause(end, [process.exitcode for process in workers.processes], errors) from None
    return 0


def _work_as_rank(rank: int, place: dict, worker: Callable[..., int], args: tuple, errors: Path) -> None:
    """A worker's life. What it dies of it writes to `errors`."""
    exit_quietly(worker=True)
    # The last one says that the launcher holds the store, not rank 0.
    place = {**place, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in place.items()})
    try:
        status = worker(*args)
        if status:
            sys.stderr.flush()
            os._exit(status)  # nobody waits for what Python does at its end
    except Exception as error:
        told = type(error).__name__, str(error), traceback.format_exc()
        (errors / f"{rank}.json").write_text(json.dumps(told))
        sys.exit(1)
    finally:
        end_at_once()


@contextlib.contextmanager
def _stopped_once() -> Iterator[None]:
    """The first stopping signal raises `Stopped`, on which the workers are sent it and waited for.

    A second one ends this process at once, and the kernel its workers (`die_with_parent`).
    """
    since = 0.0

    def stop(signum: int, frame: Any) -> None:
        nonlocal since
        now = time.monotonic()
        if not since:
            since = now
            raise Stopped(signum)
        if now - since > ECHO_SECONDS:
            os._exit(128 + signum)

    before = {signum: signal.signal(signum, stop) for signum in handled()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end_children(signum: int) -> list[int]:
    """Sends `signum` to this process's children and waits, but not for ever. Returns their exit codes."""
    children, end = multiprocessing.active_children(), time.monotonic() + SHUTDOWN_SECONDS
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signum)
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        child.kill()
        child.join()
    return [child.exitcode for child in children] or [-signum]


def _first_cause(end: multiprocessing.ProcessExitedException, exitcodes: list[int], errors: Path) -> WorkerFailure:
    """What the worker that ended first died of, or, where that was a lost connection, what another one died of."""
    told = []
    for file in sorted(errors.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            kind, message, trace = json.loads(file.read_text())
            told.append((is_lost_connection(kind, message), file.stem, kind, message, trace))
    echo, _, kind, message, trace = min(told, default=(True, "", "", "", ""))
    if end.exit_code > 0 and not echo:
        return WorkerFailure(message, trace, kind)
    # One that is killed says nothing, and its connection may be missed before it is. (SIGTERM ends the others.)
    killed = [rank for rank, code in enumerate(exitcodes) if code < 0 and code != -signal.SIGTERM]
    rank = end.error_index if end.exit_code < 0 or not killed else killed[0]
    if exitcodes[rank] < 0:
        name = signal.Signals(-exitcodes[rank]).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return WorkerFailure(f"worker {rank} was killed by {name}{hint}")
    if told:
        return WorkerFailure(f"a worker was lost: {message}", trace, kind)
    return WorkerFailure(f"worker {rank} ended with exit code {exitcodes[rank]}")
