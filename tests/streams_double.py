"""A double of a GPU's streams (`utils.data.side_stream.ToDevice`) for machines without one: work that is launched is
done late, in the order of its stream, as a GPU may do it.

Copies are done as late as they may be: when an event after them is waited for. Computing is done at once, or as late.
Memory of the device begins as zeros. With `careless`, one of the waits is left out, which must spoil what is read.
"""

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WAITS = ("after", "wait", "synchronize")


class Stream:
    """Work in order; an item is a call, done once."""

    def __init__(self):
        self.waiting: list[Callable[[], object]] = []
        self.done = 0

    def run(self, count: int) -> None:
        """Does the first `count` items that were ever launched here."""
        while self.done < count:
            self.done += 1
            self.waiting[self.done - 1]()


class Event:
    """The end of what has been launched on a stream so far."""

    def __init__(self, device: "LateDevice", stream: Stream):
        self.device, self.stream, self.count = device, stream, len(stream.waiting)

    def reach(self) -> None:
        self.stream.run(self.count)

    def synchronize(self) -> None:
        if self.device.careless != "synchronize":
            with self.device.lock:
                self.reach()


class LateDevice:
    """What `ToDevice` is to the loaders; `launch` is what a training step is."""

    def __init__(self, eager: bool = True, careless: str = ""):
        assert careless in ("", *WAITS)
        self.eager, self.careless = eager, careless
        self.lock = threading.RLock()
        self.copying, self.computing = Stream(), Stream()
        self.copies = 0
        self.threads: list[threading.Thread] = []  # that have said that they will copy

    def enter_thread(self) -> None:
        self.threads.append(threading.current_thread())

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def device_buffer(self, host: Tensor) -> Tensor:
        return torch.zeros_like(host)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event | None) -> Event:
        with self.lock:
            assert threading.current_thread() in (*self.threads, threading.main_thread())
            self.copies += 1
            if after is not None and self.careless != "after":
                self.copying.waiting.append(after.reach)
            for host, target in pairs:
                self.copying.waiting.append(lambda host=host, target=target: target.copy_(host))
            return Event(self, self.copying)

    def wait(self, copied: Event) -> None:
        if self.careless != "wait":
            self.launch(copied.reach)

    def used(self) -> Event:
        with self.lock:
            return Event(self, self.computing)

    def launch(self, work: Callable[[], object]) -> None:
        with self.lock:
            self.computing.waiting.append(work)
            if self.eager:
                self.computing.run(len(self.computing.waiting))

    def finish(self) -> None:
        with self.lock:
            for stream in (self.computing, self.copying):
                stream.run(len(stream.waiting))

    def send(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        pairs = [(tensor, torch.zeros_like(tensor)) for tensor in tensors]
        self.wait(self.copy(pairs, after=None))
        return [target for _, target in pairs]
