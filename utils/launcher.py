"""The workers of one machine: started, watched and ended.

Torch's own launcher (torchrun's engine, MultiprocessContext) would do it, but its workers end by waiting for an Event,
and one that is killed in that wait leaves the launcher waiting for ever, as a comment in it says; a study of days on
machines that are taken away meets that.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from utils.distributed import serve_store
from utils.errors import ConnectionLost, RunError, to_record
from utils.files import scratch_folder
from utils.processes.place import share_of_cores
from utils.processes.signals import SHUTDOWN_SECONDS, NotedSignal, Stopped, exit_quietly, handled, held_back

# Each worker imports all afresh: CUDA does not survive a fork.
START_METHOD = "spawn"
# When a worker has died, the others find it out by themselves and say what they met; then they are sent SIGTERM, which
# ends only those that have not begun, and after as long as a last save may take SIGKILL.
LAST_WORDS_SECONDS = 10
LAST_SAVE_SECONDS = 20
POLL_SECONDS = 0.2
LIKELY = {
    "SIGKILL": " (out of memory?)",
    "SIGABRT": " (a library gave up: see above; nccl does after dist_params.timeout_minutes without an answer)",
}


class WorkerFailure(RuntimeError):
    """A worker ended before its work did.

    Attributes:
        record: what it died of, for `utils.errors.print_report`.
    """

    def __init__(self, record: dict[str, Any]):
        super().__init__("; ".join(record["lines"]))
        self.record = record


def launch(worker: Callable[..., int], args: tuple, nproc: int, address: str = "localhost", port: int = 0) -> int:
    """Starts `nproc` processes running ``worker(*args)`` on this machine and waits for them.

    The workers live until `worker` returns its exit status, 0 or 128 + the signal that stopped it; when one ends
    otherwise, the others are ended.

    Returns:
        the workers' exit status.

    Raises:
        WorkerFailure: a worker died; tells of the first that died of itself.
        Stopped: a signal came before the workers could save their state, or they did not end in time.
        ConfigError: `address` is not this machine's.
    """
    # Python's resource tracker warns of the queues of a killed worker, after our last line; the kernel has freed them.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(nproc)))
    context = multiprocessing.get_context(START_METHOD)
    with scratch_folder() as errors, _noted() as stop:
        store = serve_store(address, port)
        place = {"MASTER_ADDR": address, "MASTER_PORT": store.port, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
        crew: list[BaseProcess] = []
        try:
            with held_back():
                for rank in range(nproc):
                    process = context.Process(target=_work_as_rank, args=(rank, place, worker, args, errors))
                    process.start()
                    crew.append(process)
            codes, first = _watch(crew, stop)
        finally:
            _end(crew)
        if all(code == 0 or (code or 0) > 128 for code in codes):  # finished, or stopped with the state saved
            return max(codes)
        raise _cause(codes, first, errors, stop.signum)


def _work_as_rank(rank: int, place: dict, worker: Callable[..., int], args: tuple, errors: Path) -> None:
    """A worker's life. What it dies of it writes to `errors`."""
    exit_quietly(worker=True)
    # The last one says that the launcher holds the store, not rank 0.
    place = {**place, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in place.items()})
    status = 1
    try:
        status = worker(*args)
    except Exception as error:
        with contextlib.suppress(OSError):
            (errors / f"{rank}.json").write_text(json.dumps(to_record(error)))
    end_at_once(status)


def end_at_once(status: int) -> None:
    """Ends this process: what Python and the libraries do at their end can only hang, or fail a run that has finished.

    (A process group, say, may wait for ranks that have not heard of a fault.)
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _noted() -> Iterator[NotedSignal]:
    """Within it a signal is noted; a second one ends this process, and the kernel its workers (`die_with_parent`)."""
    stop = NotedSignal()
    before = {signum: signal.signal(signum, stop.note) for signum in handled()}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _watch(crew: list[BaseProcess], stop: NotedSignal) -> tuple[list[int | None], int]:
    """Waits until the workers have ended, but not for ever once one has died; a signal is passed on to them.

    Returns:
        (exit codes, None for those still at work; rank of the first that ended with another code than 0).
    """
    first, passed_on, end = -1, False, math.inf
    while True:
        codes = [process.exitcode for process in crew]
        if first < 0 and any(codes):
            first = next(rank for rank, code in enumerate(codes) if code)
            end = min(end, time.monotonic() + LAST_WORDS_SECONDS)
        if stop.signum and not passed_on:
            passed_on, end = True, time.monotonic() + SHUTDOWN_SECONDS
            for process in crew:
                if process.exitcode is None:  # so not yet waited for: its number is its own
                    os.kill(process.pid, stop.signum)
        working = [process.sentinel for process, code in zip(crew, codes) if code is None]
        if not working or time.monotonic() > end:
            return codes, first
        # A worker's own children, data loaders, hold on to its sentinel: so the exit codes are asked for, too.
        wait(working, timeout=POLL_SECONDS)


def _end(crew: list[BaseProcess]) -> None:
    """Ends the workers that have not ended."""
    end = time.monotonic() + LAST_SAVE_SECONDS
    for process in crew:
        process.terminate()
    for process in crew:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _cause(codes: list[int | None], first: int, errors: Path, signum: int) -> WorkerFailure | Stopped:
    """The root cause of the run's end, not the connection errors that it triggered in other workers."""
    records: dict[int, dict[str, Any]] = {}
    for file in sorted(errors.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError):
            records[int(file.stem)] = json.loads(file.read_text())
    causes = {rank: record for rank, record in records.items() if record["kind"] != ConnectionLost.__name__}
    # One that is killed says nothing, and its connection may be missed before it is.
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    if first in causes or (causes and first not in killed):
        return WorkerFailure(causes.get(first) or next(iter(causes.values())))
    if killed:
        rank = first if first in killed else killed[0]
        number = -codes[rank]
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return WorkerFailure(to_record(RunError(f"worker {rank} was killed by {name}{LIKELY.get(name, '')}")))
    if signum:
        return Stopped(signum)
    if records:
        return WorkerFailure(next(iter(records.values())))
    return WorkerFailure(to_record(RunError(f"worker {first} ended with exit code {codes[first]}")))
