"""Batches decoded, and sent to the device, ahead of their use, in one thread.

Reports a dead thread, an error or a timeout; stops with the iterator.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.side_stream import ToDevice
from utils.errors import RunError

BATCHES_AHEAD = 3
POLL_SECONDS = 0.2  # between two looks whether the other side still lives


Pair = tuple[Tensor, Tensor]  # pixels, labels


@dataclass
class Slot:
    """Memory of one batch, used again and again.

    Attributes:
        host: where the batch is decoded; pinned for a GPU.
        device: where it is read; on a CPU the same memory.
        copied: the end of the last copy from `host` to `device`.
        used: the end of the last use of `device`.
    """

    host: Pair
    device: Pair
    copied: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class Prefetcher:
    """Run `fill` for one batch after another in a thread, `BATCHES_AHEAD` batches before they are needed.

    Args:
        fill: ``fill(k, pixels, labels, pool)`` writes batch k, uint8 (sizes[k], *shape) and int64 (sizes[k],), with the
            pool's threads.
        sizes: images in each batch.
        shape: of an image.
        side: copies to the GPU, where each slot has its memory too; None for the CPU.
        threads: in the pool.
        timeout: seconds to wait for a batch.
        source: name of the file, for messages.
    """

    def __init__(
        self,
        fill: Callable[[int, Tensor, Tensor, Executor], None],
        sizes: Sequence[int],
        shape: tuple[int, ...],
        side: ToDevice | None,
        threads: int,
        timeout: float,
        source: str,
    ):
        self.fill, self.sizes, self.side, self.threads = fill, sizes, side, threads
        self.timeout, self.source = timeout, source
        self._free: queue.Queue[Slot] = queue.Queue()
        for _ in range(min(BATCHES_AHEAD, len(sizes)) + 1):
            self._free.put(self._slot(max(sizes), shape))
        self._ready: queue.Queue[Slot | Exception] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ffcv", daemon=True)
        self._thread.start()

    def _slot(self, size: int, shape: tuple[int, ...]) -> Slot:
        allocate = self.side.host_buffer if self.side else lambda shape, dtype: torch.empty(shape, dtype=dtype)
        host = allocate((size, *shape), torch.uint8), allocate((size,), torch.int64)
        return Slot(host, (self.side.device_buffer(host[0]), self.side.device_buffer(host[1])) if self.side else host)

    def _run(self) -> None:
        try:
            if self.side:
                self.side.enter_thread()
            with ThreadPoolExecutor(self.threads, thread_name_prefix="ffcv") as pool:
                for k, size in enumerate(self.sizes):
                    slot = self._take_slot()
                    if slot is None:
                        return
                    pixels, labels = (tensor[:size] for tensor in slot.host)
                    self.fill(k, pixels, labels, pool)
                    if self.side:
                        pairs = [(host[:size], device[:size]) for host, device in zip(slot.host, slot.device)]
                        slot.copied = self.side.copy(pairs, after=slot.used)
                    self._ready.put(slot)
        except Exception as error:  # the consumer raises it; FFCV's own thread would die and leave it waiting
            self._ready.put(error)

    def _take_slot(self) -> Slot | None:
        """A slot whose host memory nothing reads any more; None after `close`."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                slot = self._free.get(timeout=POLL_SECONDS)
                if slot.copied is not None:
                    slot.copied.synchronize()
                return slot
        return None

    def _next(self) -> Slot:
        """The next filled slot.

        Raises:
            RunError: the file cannot be read, the thread has died, or no batch comes in time.
            Exception: any other error of `fill`, as it was raised.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            alive = self._thread.is_alive()  # asked first: what it put before its end is then in the queue
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not alive:
                    raise RunError(f"{self.source}: the thread that decodes images has died") from None
                if time.monotonic() > deadline:
                    raise RunError(f"{self.source}: no batch for {self.timeout:g} s; is the disk reachable?") from None
                continue
            if isinstance(item, OSError):
                raise RunError(f"{self.source}: reading images failed: {item}") from item
            if isinstance(item, Exception):
                raise item
            return item

    def __iter__(self) -> Iterator[Pair]:
        """Pixels and labels of each batch, on the device. Asking for the next batch may overwrite them.

        On a GPU they are to be read by work launched on the current stream before the next batch is asked for.
        """
        try:
            for size in self.sizes:
                slot = self._next()
                if self.side and slot.copied:
                    self.side.wait(slot.copied)
                pixels, labels = slot.device
                yield pixels[:size], labels[:size]
                if self.side:
                    slot.used = self.side.used()
                self._free.put(slot)
        finally:
            self.close()

    def close(self) -> None:
        """End the thread, whatever it is doing: after an epoch, an error, or an epoch that was cut short."""
        self._stop.set()
        self._thread.join(timeout=min(self.timeout, 10))
