"""Batches decoded ahead in one thread. Reports a dead thread, an error or a timeout; stops with the iterator."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor

from utils.errors import RunError

BATCHES_AHEAD = 3
POLL_SECONDS = 0.2  # between two looks whether the other side still lives


class Prefetcher:
    """Run `fill` for one batch after another in a thread, `BATCHES_AHEAD` batches before they are needed.

    Args:
        fill: ``fill(k, buffer, pool)`` writes batch k into `buffer`, uint8 (sizes[k], *shape), with the pool's threads.
        sizes: images in each batch.
        shape: of an image.
        device: of the batches; for a GPU, buffers are pinned and copied asynchronously.
        threads: in the pool.
        timeout: seconds to wait for a batch.
        source: name of the file, for messages.
    """

    def __init__(
        self,
        fill: Callable[[int, Tensor, Executor], None],
        sizes: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device,
        threads: int,
        timeout: float,
        source: str,
    ):
        self.fill, self.sizes, self.device, self.threads = fill, sizes, device, threads
        self.timeout, self.source = timeout, source
        on_gpu = device.type == "cuda"
        self._free: queue.Queue[tuple[Tensor, torch.cuda.Event | None]] = queue.Queue()
        for _ in range(min(BATCHES_AHEAD, len(sizes)) + 1):
            self._free.put((torch.empty(max(sizes), *shape, dtype=torch.uint8, pin_memory=on_gpu), None))
        self._ready: queue.Queue[Tensor | Exception] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ffcv", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="ffcv") as pool:
                for k, size in enumerate(self.sizes):
                    buffer = self._take_buffer()
                    if buffer is None:
                        return
                    self.fill(k, buffer[:size], pool)
                    self._ready.put(buffer)
        except Exception as error:  # the consumer raises it; FFCV's own thread would die and leave it waiting
            self._ready.put(error)

    def _take_buffer(self) -> Tensor | None:
        """A buffer that nothing reads any more; None after `close`."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                buffer, copied = self._free.get(timeout=POLL_SECONDS)
                if copied is not None:
                    copied.synchronize()  # the GPU may still be copying from it
                return buffer
        return None

    def _next(self) -> Tensor:
        """The next filled buffer.

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

    def __iter__(self) -> Iterator[Tensor]:
        """uint8 batches on the device. On the CPU, asking for the next one may overwrite a batch."""
        try:
            for size in self.sizes:
                buffer, copied = self._next(), None
                batch = buffer[:size]
                if self.device.type == "cuda":
                    batch = batch.to(self.device, non_blocking=True)
                    copied = torch.cuda.Event(blocking=True)
                    copied.record()
                yield batch
                self._free.put((buffer, copied))
        finally:
            self.close()

    def close(self) -> None:
        """End the thread, whatever it is doing: after an epoch, an error, or an epoch that was cut short."""
        self._stop.set()
        self._thread.join(timeout=min(self.timeout, 10))
