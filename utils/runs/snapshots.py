"""Copies of network and optimizer as they are at one moment, made without holding up training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ToHost:
    """From a GPU to pinned memory, on a CUDA stream of its own. All that needs a GPU here is in this class."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def takes(self, tensor: Tensor) -> bool:
        """Whether `tensor` is copied by the stream; the others are copied at once."""
        return tensor.is_cuda

    def buffer(self, tensor: Tensor) -> Tensor:
        """Pinned memory of the tensor's shape, dtype and strides.

        torch keeps what is freed and gives it out again, except after capturing a CUDA graph, which empties its store.
        """
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Begins to copy, for each (buffer, tensor), once the work is done that the device was given before.

        Args:
            pairs: all tensors on one device; they must stay unchanged until the copy has ended.

        Returns:
            a function that waits for the end of the copy, in any thread, without holding the GIL.
        """
        device = pairs[0][1].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for buffer, tensor in pairs:
                buffer.copy_(tensor, non_blocking=True)
            ended = torch.cuda.Event(blocking=True)
            ended.record(stream)
        return ended.synchronize


TO_HOST = ToHost()


class Transfer:
    """The tensors of one snapshot on their way to the CPU."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._wait: Callable[[], None] | None = None

    def add(self, tensor: Tensor) -> Tensor:
        """The CPU tensor that will hold `tensor` as it is now, whatever training does with it from now on."""
        copy = tensor.detach().clone()  # on a GPU: queued behind the steps before, and takes microseconds
        if not TO_HOST.takes(copy):
            return copy
        buffer = TO_HOST.buffer(copy)
        self._pairs.append((buffer, copy))
        return buffer

    def begin(self) -> None:
        """Begins to copy what was added."""
        if self._pairs:
            self._wait = TO_HOST.begin(self._pairs)

    def wait(self) -> None:
        """Waits until all tensors are on the CPU, and frees their copies on the device."""
        if self._wait:
            self._wait()
        self._pairs = []


class Snapshot:
    """Tensors in dicts and lists as they were when the snapshot was made; tuples become lists.

    Several files may be written from one snapshot: each part of it is a snapshot too, of the same copy.
    """

    def __init__(self, obj: Any):
        self._transfer = Transfer()
        self._content = _mapped(obj, self._transfer.add)
        self._transfer.begin()

    def __getitem__(self, key: str) -> Snapshot:
        part = Snapshot.__new__(Snapshot)
        part._transfer, part._content = self._transfer, self._content[key]
        return part

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def content(self) -> Any:
        """The copy, on the CPU. Waits for the device; meant for the thread that writes."""
        self._transfer.wait()
        return self._content


def _mapped(obj: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(obj, Tensor):
        return copy(obj)
    if isinstance(obj, dict):
        return {key: _mapped(value, copy) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_mapped(value, copy) for value in obj]
    return obj
