"""Batches on their way from a DataLoader's workers: the room that they take in /dev/shm, and the wait for them.

A worker hands over a batch through shared memory. Where that is full (Docker gives a container 64 MB), torch's own
worker loses the batch in a background thread, and its parent waits for ever. Here the need is worked out
before the workers start, a worker that finds no room says so, and the wait itself has an end.
"""

import atexit
import os
import time
import weakref
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.errors import ConfigError, DataError
from utils.processes.signals import Stopped, noted_signal

SHARED_MEMORY = "/dev/shm"
BATCHES_AHEAD = 2  # of each worker: DataLoader's prefetch_factor
# A wait for one batch. Slow disks and busy servers of files take a minute; beyond this nothing is to be expected.
BATCH_SECONDS = 300.0
# A stop is answered between two steps, with the state saved. A run that has waited so long for its batch just ends.
STOP_SECONDS = 10.0
POLL_SECONDS = 1.0
REMEDY = (
    "take fewer dataset.num_workers (0 needs no shared memory), a smaller dataset.batch_size, "
    "or more shared memory (docker run --shm-size=8g)"
)


def check_room(workers: int, batch_bytes: int, processes: int) -> None:
    """Check that the batches that workers have ready at one time fit in the free part of /dev/shm.

    Args:
        workers: per process.
        batch_bytes: of one process's batch.
        processes: on this machine.

    Raises:
        ConfigError: they do not; names dataset.num_workers and how many would do.
    """
    try:
        system = os.statvfs(SHARED_MEMORY)
    except OSError:  # not Linux: torch shares memory in another way
        return
    free, per_worker = system.f_bavail * system.f_frsize, BATCHES_AHEAD * batch_bytes * processes
    if workers * per_worker <= free:
        return
    raise ConfigError(
        f"dataset.num_workers: {workers} is not allowed here: the batches of {workers * processes} workers take "
        f"{workers * per_worker / 1e6:.0f} MB of {SHARED_MEMORY}, where {free / 1e6:.0f} MB are free: at most "
        f"{free // per_worker}; or {REMEDY}"
    )


def in_shared_memory(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | DataError:
    """The tensors in shared memory, in a worker; as they are in the run's own process. The fault if there is no room.

    Torch would do the same later, in a thread whose faults reach nobody.
    """
    if get_worker_info() is None:
        return tensors
    try:
        return tuple(tensor.share_memory_() for tensor in tensors)
    except RuntimeError as error:
        return DataError(f"a loading worker cannot hand over its batch through {SHARED_MEMORY}: {REMEDY} ({error})")


class _PatientIterator(_MultiProcessingDataLoaderIter):
    """Torch's own, with an end to the wait for a batch, which torch looks for again and again by `_try_get_data`."""

    since: float | None = None  # when the wait for a batch began; None = no wait

    def _try_get_data(self, timeout: float = POLL_SECONDS) -> tuple[bool, Any]:
        success, batch = super()._try_get_data(min(timeout, POLL_SECONDS))
        now = time.monotonic()
        self.since = None if success else self.since or now - POLL_SECONDS
        if self.since is not None:
            waited, stop = now - self.since, noted_signal()
            if stop and waited > STOP_SECONDS:
                raise Stopped(stop)
            if waited > BATCH_SECONDS:
                raise DataError(
                    f"no batch for {waited:.0f} s from the {self._num_workers} loading workers: the files cannot be "
                    f"read (a disk or server that does not answer), or {SHARED_MEMORY} is full: {REMEDY}"
                )
        return success, batch


class PatientLoader(DataLoader):
    """A DataLoader whose wait for a batch ends.

    Iterating raises:
        DataError: no batch came for `BATCH_SECONDS`.
        Stopped: a signal was noted, and no batch came for `STOP_SECONDS`: the last saved state stands.
    """

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        # Python's end would wait for ever for workers that ignore signals, where nobody closed their loader.
        atexit.register(_close_at_exit, weakref.ref(self))
        return _PatientIterator(self)

    def close(self) -> None:
        """End the workers now, also those that hang: they ignore the signals that stop a run."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join()


def _close_at_exit(loader: "weakref.ref[PatientLoader]") -> None:
    if (alive := loader()) is not None:
        alive.close()
