"""Copies from host memory to a GPU that run beside its computing: pinned memory, and a stream of their own.

A copy on the stream that computes would wait for the steps launched before it, and the steps after it for the copy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class ToDevice:
    """Copies to one GPU, in order, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def enter_thread(self) -> None:
        """To be called first in a thread that copies: else it opens GPU 0 too, in every process."""
        torch.cuda.set_device(self.device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned host memory, which the GPU reads without a detour."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def device_buffer(self, host: Tensor) -> Tensor:
        """Memory of the GPU for the content of `host`, to be written by `copy` alone."""
        buffer = torch.empty_like(host, device=self.device, pin_memory=False)
        # Kernels that are still queued may read what this memory held before, and copies what it holds when freed.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        buffer.record_stream(self.stream)
        return buffer

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: torch.cuda.Event | None) -> torch.cuda.Event:
        """Start to copy the first tensor of each pair, on the host, into the second; return the event of its end.

        Args:
            after: the event of the last use of the second tensors.
        """
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            for host, target in pairs:
                target.copy_(host, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            copied.record(self.stream)
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        """Have what is launched from here on wait for a copy; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def used(self) -> torch.cuda.Event:
        """The event of the end of everything that has been launched up to here."""
        return torch.cuda.current_stream(self.device).record_event()

    def send(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copies on the GPU of pinned host tensors, ready for what is launched from here on."""
        with torch.cuda.stream(self.stream):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in sent:
            # The memory is the side stream's: freed, it is reused there only when this stream is done with it.
            tensor.record_stream(computing)
        return sent
