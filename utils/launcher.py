"""Launcher: starts, watches and ends the workers of one machine.

Not torch's own launcher (torchrun's engine, MultiprocessContext): its workers wait for an Event at their end, and if
one is killed in that wait, the launcher hangs (see the comment in its source). Machines that are taken away cause this.
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
from typing import Any, Literal

from utils.distributed import serve_store
from utils.errors import ConnectionLost, RunError, to_record
from utils.files import scratch_folder
from utils.processes.place import share_of_cores
from utils.processes.signals import SHUTDOWN_SECONDS, NotedSignal, Stopped, exit_quietly, held_back, installed

# A new interpreter per worker: CUDA does not survive a fork.
START_METHOD: Literal["spawn"] = "spawn"
# After a worker has died, the others have this time to notice and to record what they met. Then they get SIGTERM, which
# ends those that have not begun, and after the time that a last save may take, SIGKILL.
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
        record: its fault, for `utils.errors.print_report`.
    """

    def __init__(self, record: dict[str, Any]):
        super().__init__("; ".join(record["lines"]))
        self.record = record


def launch(worker: Callable[..., int], args: tuple, nproc: int, address: str = "localhost", port: int = 0) -> int:
    """Start `nproc` processes that run ``worker(*args)`` on this machine, and wait for them.

    A worker ends when `worker` returns its exit status, 0 or 128 + the signal that stopped it. If one ends in another
    way, the others are ended.

    Returns:
        the workers' exit status.

    Raises:
        WorkerFailure: a worker died; its record is the root cause.
        Stopped: a signal came before the workers could save their state, or they did not end in time.
        ConfigError: `address` is not an address of this machine.
    """
    # After the last line Python's resource tracker would warn of the queues of a killed worker; the kernel frees them.
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
        ended = [code for code in codes if code is not None]
        if len(ended) == nproc and all(code == 0 or code > 128 for code in ended):  # finished, or stopped and saved
            return max(ended)
        raise _cause(codes, first, errors, stop.signum)


def _work_as_rank(rank: int, place: dict, worker: Callable[..., int], args: tuple, errors: Path) -> None:
    """Run a worker; record a fault in the folder `errors`."""
    exit_quietly(worker=True)
    # The last one: the store is in the launcher, not in rank 0.
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
    """End this process without the exit handlers of Python and libraries.

    They could only hang, or fail a run that has finished: a process group may wait for ranks that know of no fault.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _noted() -> Iterator[NotedSignal]:
    """Note signals; a second one ends this process, and the kernel then ends its workers (`die_with_parent`)."""
    stop = NotedSignal()
    with installed(stop.note):
        yield stop


def _watch(crew: list[BaseProcess], stop: NotedSignal) -> tuple[list[int | None], int]:
    """Wait for the workers, for a limited time once one has died; pass signals on to them.

    Returns:
        (exit codes, None for workers that still run; rank of the first with a code other than 0, -1 if there is none).
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
                if process.exitcode is None and process.pid:  # not yet reaped: the pid is still its own
                    os.kill(process.pid, stop.signum)
        working = [process.sentinel for process, code in zip(crew, codes) if code is None]
        if not working or time.monotonic() > end:
            return codes, first
        # Children of a worker (data loaders) keep its sentinel open: so the exit codes are polled, too.
        wait(working, timeout=POLL_SECONDS)


def _end(crew: list[BaseProcess]) -> None:
    """End the workers that still run."""
    end = time.monotonic() + LAST_SAVE_SECONDS
    for process in crew:
        process.terminate()
    for process in crew:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()


def _cause(codes: list[int | None], first: int, errors: Path, signum: int) -> WorkerFailure | Stopped:
    """Return the root cause, not the connection errors that it triggered in other workers."""
    records: dict[int, dict[str, Any]] = {}
    for file in sorted(errors.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError):
            records[int(file.stem)] = json.loads(file.read_text())
    causes = {rank: record for rank, record in records.items() if record["kind"] != ConnectionLost.__name__}
    # A killed worker leaves no record, and others may lose their connection to it before its exit code is seen.
    killed = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    if first in causes or (causes and first not in killed):
        return WorkerFailure(causes.get(first) or next(iter(causes.values())))
    if killed:
        rank = first if first in killed else min(killed)
        number = killed[rank]
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return WorkerFailure(to_record(RunError(f"worker {rank} was killed by {name}{LIKELY.get(name, '')}")))
    if signum:
        return Stopped(signum)
    if records:
        return WorkerFailure(next(iter(records.values())))
    return WorkerFailure(to_record(RunError(f"worker {first} ended with exit code {codes[first]}")))
