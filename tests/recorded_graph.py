"""CUDA graphs, emulated on the CPU: what a graph would do on a GPU, with every limit of it.

A recording keeps each operation of the work with its very tensors and the Python numbers it was given; a replay does
the operations again on those tensors. So whatever Python would compute between two replays, and whatever is not in a
fixed tensor, is as frozen as on a GPU. Recording itself does nothing, as on a GPU: weights, counts and the random state
are put back, and what was made while recording holds no values until the first replay. Reading a value while recording
fails, and so does making a tensor of Python's numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.training.graphs import CudaGraphs

aten = torch.ops.aten
# Reads of a value: on a GPU the host waits for it. (On the CPU, tolist and numpy pass no operation: see `_Reads`.)
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.is_nonzero}
INDEXED = {
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
}  # by a mask: as many values as it has ones
FROM_PYTHON = {aten.lift_fresh}
METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}


class RecordedGraphs(CudaGraphs):
    """Takes the place of `CudaGraphs`; `graphs_class` of a `Trainer`.

    Attributes:
        recorded: number of recordings made; `replays`: of replays.
    """

    def __init__(self, device: torch.device, required: bool):
        super().__init__(device, required)
        self.recorded, self.replays = 0, 0

    @staticmethod
    def missing(device: torch.device) -> str:
        return ""

    @contextlib.contextmanager
    def own_stream(self) -> Iterator[None]:
        yield

    def new_pool(self) -> Any:
        return None

    def recover(self, pool: Any) -> None:
        pass

    def mark(self) -> Any:
        return self

    def synchronize(self) -> None:
        """All work is done at once here."""

    def record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        recording = Recording(work)
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay

    @contextlib.contextmanager
    def note_waits(self) -> Iterator[list[str]]:
        waits: list[str] = []
        with _Reads(waits.append), _ReadOperations(waits.append):
            yield waits


class _Reads(TorchFunctionMode):
    def __init__(self, found: Callable[[str], None]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self.found(METHODS[func])
        return func(*args, **(kwargs or {}))


class _ReadOperations(TorchDispatchMode):
    def __init__(self, found: Callable[[str], None]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _reads(func, args):
            self.found(str(func))
        return func(*args, **(kwargs or {}))


def _reads(func, args: tuple) -> bool:
    """Whether the host needs a value to go on."""
    masks = func.overloadpacket in INDEXED and any(tensor.dtype is torch.bool for tensor in _tensors(args[1]))
    return masks or func.overloadpacket in READS


def _refuse(what: str) -> None:
    raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class Recording(TorchDispatchMode):
    """The operations of `work`, which is called once, without effect."""

    def __init__(self, work: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # (storage, copy of it)
        self.made: dict[int, torch.UntypedStorage] = {}
        state = torch.get_rng_state()
        try:
            with _Reads(_refuse), self:
                work()
        finally:
            torch.set_rng_state(state)
            for storage, values in self.before.values():
                storage.copy_(values)
            for storage in self.made.values():
                storage.fill_(255)  # NaN, -1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _reads(func, args) or func.overloadpacket in FROM_PYTHON:
            _refuse(str(func))
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.made[storage.data_ptr()] = storage
        if not _is_view(func):
            self.calls.append((func, args, kwargs, _tensors(out)))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                for out, again in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                    if out.untyped_storage().data_ptr() != again.untyped_storage().data_ptr():
                        assert out.shape == again.shape and out.stride() == again.stride()
                        out.copy_(again)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func) -> bool:
    """Whether it only gives its argument another shape: there is nothing to do again."""
    infos = [value.alias_info for value in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)
