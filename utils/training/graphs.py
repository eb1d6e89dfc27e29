"""Training steps and evaluations as CUDA graphs: captured once, from then on launched by one call each.

A graph is a list of kernels with the addresses that they read and write. What the host computes is not in it, so a
step is captured from fixed tensors alone: the draws and learning rates of the whole epoch are copied to the device
before its first step, and a step finds its own by a counter that it advances. Weights, momentum, BatchNorm statistics
and masks change in place. Launches, most of the time of a small network's step, no longer count then.

The bits are those of the same kernels without graphs. So are the draws of dropout: a replay moves torch's generator on
by what the captured kernels draw, so that it stands where it would stand without graphs, and a state saved between two
steps holds it.
"""

import collections
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness_params import Config
from utils.conv_type import MaskVersions
from utils.data.in_memory import MemoryTestLoader
from utils.data.loaders import Batch, Data, ResidentLoader
from utils.data.mixing import hard_labels
from utils.distributed import Context
from utils.errors import ConfigError, RunError
from utils.output import note
from utils.training.tally import Tally

# Calls of a piece of work before it is captured. They compile it, let cuDNN choose its kernels, and make what the
# optimizer and its hook keep from one step to the next.
WARM_UP = 3

# The host is less than three times so many steps ahead of the device: a stop waits for the steps that are launched.
STEPS_PER_MARK = 16

TrainOn = Callable[[Batch], tuple[Tensor, Tensor]]


class CudaGraphs:
    """Captures work as CUDA graphs.

    Attributes:
        required: whether ``cuda_graphs`` is on; with auto, work that cannot be captured runs as it stands.
        refused: why nothing is captured; empty while capturing is allowed.
    """

    def __init__(self, device: torch.device, required: bool):
        self.device, self.required, self.refused = device, required, ""
        self.steps, self.marks = 0, collections.deque[Any]()

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """What is captured runs here: the default stream cannot be captured."""
        return torch.cuda.Stream(self.device)

    @staticmethod
    def missing(device: torch.device) -> str:
        """What graphs lack on this device; empty if nothing."""
        return "" if device.type == "cuda" else "there is no GPU"

    @contextlib.contextmanager
    def own_stream(self) -> Iterator[None]:
        """What is queued inside runs on the graphs' stream: after all queued before it, before all queued after."""
        outer = torch.cuda.current_stream()
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    def new_pool(self) -> Any:
        """Memory for graphs that never need their values at the same time: those captured with one pool share it."""
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """A function that launches what `work` does, captured without doing it; `work` itself where that fails.

        Work that waits for the device cannot be captured, nor can some other things. Errors as `refuse`.
        """
        try:
            return self.record(work, pool)
        except RuntimeError as error:
            self.refuse(f"capturing failed ({str(error.__context__ or error).strip().partition(chr(10))[0]})")
            self.recover(pool)
            return work

    def record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """A function that launches what `work` does, captured without doing it. Errors are torch's own."""
        self.newest = graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that copies and writes states goes on with its own calls.
        with torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def recover(self, pool: Any) -> None:
        """Puts torch right after a capture into `pool` that failed: it has not ended all that it had begun."""
        self.failed = self.newest  # torch's host allocator goes on asking it
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        # The random generator may still count as captured, and refuse to draw; a capture that succeeds ends that.
        with contextlib.suppress(RuntimeError):
            self.record(self._next_to_nothing, self.new_pool())

    def _next_to_nothing(self) -> None:
        torch.zeros((), device=self.device)

    def pace(self) -> None:
        """Called after each step: waits for the first of 3 * `STEPS_PER_MARK` steps that are launched and not done."""
        self.steps += 1
        if self.steps % STEPS_PER_MARK == 0:
            self.marks.append(self.mark())
            if len(self.marks) > 2:
                self.marks.popleft().synchronize()

    def mark(self) -> Any:
        """An event that ends with all that is launched so far; who waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Refuses to capture from now on if what is done inside waits for the device. Errors as `refuse`."""
        with self.note_waits() as waits:
            yield
        if waits:
            self.refuse("the network waits for the GPU in its step")

    @contextlib.contextmanager
    def note_waits(self) -> Iterator[list[str]]:
        """A list of the waits for the device inside, which is complete at the end. Other warnings are shown then."""
        waits: list[str] = []
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits.append(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def refuse(self, reason: str) -> None:
        """Captures nothing from now on, with a note.

        Raises:
            RunError: ``cuda_graphs`` is on.
        """
        if self.required:
            raise RunError(f"experiment_params.cuda_graphs: on is not possible: {reason}")
        note(f"experiment_params.cuda_graphs: auto is off here: {reason}")
        self.refused = reason


class Captured:
    """Work that runs as it stands `WARM_UP` times, is then captured, and from then on replayed: one launch per call.

    Work that cannot be captured goes on as it stands, unless ``cuda_graphs`` is on.

    Args:
        clear: called after a capture that failed; removes what that has left.
    """

    def __init__(
        self, graphs: CudaGraphs, work: Callable[[], None], pool: Any, clear: Callable[[], None] = lambda: None
    ):
        self.graphs, self.work, self.pool, self.clear = graphs, work, pool, clear
        self.runs = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is not None:
            self.replay()
        elif self.runs < WARM_UP or self.graphs.refused:
            self.runs += 1
            last = self.runs == WARM_UP and not self.graphs.refused
            with self.graphs.watch() if last else contextlib.nullcontext():
                self.work()
        else:
            self.replay = self.graphs.capture(self.work, self.pool)
            if self.graphs.refused:
                self.clear()
            self.replay()


class StepGraphs:
    """The steps of an epoch as CUDA graphs: one for whole batches, one for a smaller last batch.

    Args:
        step: trains on a batch; returns its loss and logits.
    """

    def __init__(self, graphs: CudaGraphs, model: nn.Module, loader: ResidentLoader, step: TrainOn):
        self.graphs, self.model, self.loader, self.train_on = graphs, model, loader, step
        device, steps = next(model.parameters()).device, loader.steps_per_epoch
        self.draws = torch.empty(loader.draws_shape, dtype=torch.int64, device=device)  # of the epoch in progress
        self.offsets = torch.arange(loader.batch_size, device=device)
        self.rates = torch.zeros(steps, device=device)  # of the epoch's steps
        self.rate = torch.zeros(1, device=device)  # of the step in progress: what the optimizer reads
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # steps done
        self.numbers = torch.arange(steps, device=device)
        self.losses = torch.zeros(steps, dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.drop()

    def drop(self) -> None:
        """Forgets what is captured: another optimizer, or other masks, are used from now on."""
        self.captured: dict[int, Captured] = {}  # by size of the batch
        self.masks = MaskVersions(self.model)
        self.pool = self.graphs.new_pool()  # torch refuses a pool whose graphs are all gone

    def new_tally(self, first: int) -> Tally:
        """Zeros, for an epoch trained from step `first` on; the tensors are those that the graphs count in."""
        return Tally(self.losses.zero_(), self.correct.zero_(), first, first)

    def steps(
        self, level: int, epoch: int, rates: Sequence[float], optimizer: torch.optim.Optimizer, tally: Tally
    ) -> Iterator[None]:
        """Trains from ``tally.step`` to the epoch's end, one step per item; counts into `tally`, of `new_tally`.

        Args: rates: learning rate of each step of the epoch.
        """
        if not self.masks.current():
            self.drop()
        for group in optimizer.param_groups:
            group["lr"] = self.rate  # for good: what a graph has captured reads this tensor, also in later epochs
        host = torch.tensor(rates, dtype=torch.float32, pin_memory=self.rates.device.type == "cuda")
        self.rates.copy_(host, non_blocking=True)
        self.draws.copy_(self.loader.draws(level, epoch))
        self.step.fill_(tally.step)
        for step in range(tally.step, len(rates)):
            self._captured(self.loader.global_batch(step))()
            tally.step += 1
            self.graphs.pace()
            yield

    def _captured(self, size: int) -> Captured:
        if size not in self.captured:
            self.captured[size] = Captured(self.graphs, lambda: self._step(size), self.pool, self._clear_gradients)
        return self.captured[size]

    def _clear_gradients(self) -> None:
        """Gradients made while capturing hold no values."""
        for param in self.model.parameters():
            param.grad = None

    def _step(self, size: int) -> None:
        """One step from fixed tensors alone, which is what a graph captures."""
        places = torch.add(self.offsets[:size], self.step, alpha=self.loader.batch_size)
        images, labels = self.loader.gather(self.draws.index_select(1, places))
        torch.index_select(self.rates, 0, self.step, out=self.rate)
        loss, logits = self.train_on((images, labels))
        torch.where(self.numbers == self.step, loss.detach().double(), self.losses, out=self.losses)
        self.correct += (logits.detach().argmax(1) == hard_labels(labels)).sum()
        self.step += 1


def choose_graphs(
    cfg: Config, ctx: Context, data: Data, dtype: torch.dtype | None, graphs_class: type[CudaGraphs]
) -> CudaGraphs | None:
    """The graphs that ``experiment_params.cuda_graphs`` asks for; None for none.

    Raises:
        ConfigError: they are asked for where there can be none.
    """
    option = cfg.experiment_params.cuda_graphs
    if option == "off":
        return None
    reason = _reason_against(ctx, data, dtype, graphs_class)
    if not reason:
        return graphs_class(ctx.device, required=option == "on")
    if option == "on":
        raise ConfigError([f"experiment_params.cuda_graphs: on is not allowed here: {reason}"])
    if ctx.device.type == "cuda" and ctx.is_main:
        note(f"experiment_params.cuda_graphs: auto is off here: {reason}")
    return None


def _reason_against(ctx: Context, data: Data, dtype: torch.dtype | None, graphs_class: type[CudaGraphs]) -> str:
    if missing := graphs_class.missing(ctx.device):
        return missing
    if ctx.world > 1:
        return "there are several processes"
    if dtype is torch.float16:
        return "precision is fp16, and the loss scaler's steps are not captured"
    if not (
        isinstance(data.train, ResidentLoader)
        and all(isinstance(loader, MemoryTestLoader) for loader in data.evaluated)
    ):
        return "the images are not held in memory"
    return ""
