"""Process group: rank and device, rendezvous, collectives.

The only file that uses ``torch.distributed``. harness.py starts its own workers (utils/launcher.py), unless
``torchrun`` has started it: then rank and world size come from the environment. One process needs no process group: all
collectives below are no-ops.
"""

import contextlib
import errno
import hashlib
import inspect
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness_params import Config, Note, make_config, unused_alone
from utils.errors import ConfigError, ConnectionLost, RunError
from utils.output import note
from utils.processes.place import share_of_cores
from utils.processes.tasks import check_tasks

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Rank and device of this process, and its collectives: all ranks must call them, in the same order."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def broadcast_object(self, obj: Any = None) -> Any:
        """Rank 0's picklable object, on every rank. Trusted: it comes from a process of the same run."""
        if self.world == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @torch.no_grad()
    def broadcast_tensors(self, tensors: list[Tensor]) -> None:
        """Overwrite `tensors` (same shapes and order on all ranks) with rank 0's, in one message per dtype."""
        if self.world == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            group = [t for t in tensors if t.dtype == dtype]
            # As uint8, which NCCL and gloo both support; bool they do not.
            flat = torch.cat([t.detach().reshape(-1) for t in group])
            dist.broadcast(flat.view(torch.uint8), src=0)
            for tensor, part in zip(group, flat.split([t.numel() for t in group])):
                tensor.copy_(part.view(tensor.shape))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> torch.futures.Future:
        """Start summing over the ranks, in place; the future is done when `tensor` holds the sum."""
        return dist.all_reduce(tensor, async_op=True).get_future()

    @property
    def backend(self) -> str:
        """Backend for tensors of this device: gloo or nccl; empty with one process."""
        if self.world == 1:
            return ""
        return "nccl" if f"{self.device.type}:nccl" in dist.get_backend_config() else "gloo"

    def gather_objects(self, obj: T) -> list[T]:
        """All ranks' picklable objects, by rank, on every rank."""
        if self.world == 1:
            return [obj]
        objects = [obj] * self.world
        dist.all_gather_object(objects, obj)
        return objects

    def largest(self, numbers: list[int]) -> list[int]:
        """Elementwise maximum of the ranks' integers, by a message between CPUs that waits for no GPU."""
        if self.world == 1:
            return numbers
        box = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return box.tolist()

    def same_everywhere(self, tensors: list[Tensor]) -> bool:
        """Whether all ranks hold the same bits, by SHA-256."""
        if self.world == 1:
            return True
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return len(set(self.gather_objects(digest.hexdigest()))) == 1

    def wrap(
        self, model: nn.Module, gradient_hook: Callable[[dist.GradBucket], torch.futures.Future[Tensor]] | None = None
    ) -> nn.Module:
        """The model in DDP, without buffer broadcast: masks and BN statistics are not sent in a step.

        Args:
            gradient_hook: replaces DDP's averaging of a bucket of gradients; takes a ``GradBucket``, returns the future
                of its flat tensor.
        """
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # The option has a new name in newer versions of torch, which warn of the old one.
        known = inspect.signature(ddp).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        no_sync: dict[str, Any] = {option: False}
        wrapped = ddp(model, device_ids=ids, gradient_as_bucket_view=True, **no_sync)
        if gradient_hook is not None:
            wrapped.register_comm_hook(None, lambda state, bucket: gradient_hook(bucket))
        return wrapped


def default_nproc(nproc: int) -> int:
    """Number of processes to start on this machine for ``dist_params.nproc``: 0 is one per GPU, or one on a CPU."""
    return nproc or max(1, torch.cuda.device_count())


def notes_on(cfg: Config) -> list[Note]:
    """The notes to print. Under torchrun, its own options replace some of dist_params, and so do their notes.

    Raises:
        ConfigError: one process was asked for, and torchrun has started several; see also `check_tasks`.
    """
    check_tasks(cfg.dist_params.distributed)
    d, usual = cfg.dist_params, make_config().dist_params
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [*cfg.notes, *(unused_alone(cfg) if default_nproc(d.nproc) == 1 else [])]
    world, local_world = os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    if not d.distributed and int(world) > 1:
        raise ConfigError([f"dist_params.distributed: False, but torchrun has started {world} processes"])
    ignored = [key for key in ("address", "port") if getattr(d, key) != getattr(usual, key)]
    ignored += ["nproc"] if d.nproc not in (0, int(local_world)) else []
    notes = [Note(f"dist_params.{key}", f"{getattr(d, key)} has no effect under torchrun") for key in ignored]
    # The config's own notes on dist_params assume as many processes as it asks for.
    return [*(known for known in cfg.notes if known.section != "dist_params"), *notes]


@contextlib.contextmanager
def join(backend: str = "auto", timeout_minutes: float = 10.0, threads: int = 0) -> Iterator[Context]:
    """Join the process group; leave it on exit.

    Args:
        backend: auto is nccl if there are as many GPUs as local processes, else gloo. With nccl, messages between CPUs
            still use gloo.
        timeout_minutes: time that a collective waits for a silent rank.
        threads: CPU threads of this process; 0 is its share of the cores.

    Raises:
        ConfigError: nccl without enough GPUs.
        ConnectionLost: another process has died or does not answer.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    # A launcher may show each process only its own GPU (Slurm's --gpus-per-task). The user says so by backend nccl.
    own_shown = gpus == 1 and backend == "nccl"
    on_gpu = (gpus >= local_world and backend != "gloo") or own_shown
    if backend == "nccl" and not on_gpu:
        raise ConfigError([f"dist_params.backend: nccl needs a GPU for each of {local_world} processes; {gpus} found"])
    if backend == "auto" and gpus and not on_gpu and rank == 0:
        text = f"auto is gloo, for {local_world} processes see {gpus} GPU(s); nccl if each has one of its own"
        note(f"dist_params.backend: {text}")
    # Ranks share GPUs if there are more ranks than GPUs.
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share_out_threads(local_world, threads)
    ctx = Context(rank, world, local_rank, local_world, device)
    if world == 1:
        yield ctx
        return
    timeout = timedelta(minutes=timeout_minutes)
    with lost_connections():
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(agreed_name(store, rank, world, timeout), store),
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        yield ctx
        # Not after an exception: with nccl it would wait for the other ranks, which wait for this one.
        dist.destroy_process_group()


def agreed_name(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name for the keys of these processes, different from those of earlier processes in this `store`.

    torchrun's store outlives its workers. After a restart, new workers would look up their peers under the old keys and
    find the addresses of dead processes (pytorch issue 135712; torchrun's count of restarts is of no use, since it
    differs between machines). So every rank but 0 writes a random word and waits for the answer to that word. Rank
    0 draws a name and answers every word with it, until every rank has confirmed the name.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def pause(missing: str) -> None:  # not the wait of the store, during which Python handles no signals
        if time.monotonic() > end:
            raise ConnectionLost(f"a worker was lost: connection to {missing} timed out: not started")
        time.sleep(0.01)

    if rank > 0:
        store.set(f"word/{rank}", own)
        while not store.check([f"name/{own}"]):
            pause("rank 0")
        name = store.get(f"name/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    others = range(1, world)
    while missing := [other for other in others if not store.check([f"{own}/{other}"])]:
        for other in missing:
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", own)
        pause(f"ranks {missing}")
    return own


def share_out_threads(local_world: int, threads: int = 0) -> None:
    """Set the CPU threads of this process; 0 is OMP_NUM_THREADS, or its share of the cores."""
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_of_cores(local_world))


def serve_store(address: str, port: int) -> dist.TCPStore:
    """The store for the rendezvous of workers, on `port` of `address`, or on another port if that is taken.

    Raises:
        ConfigError: `address` is not this machine's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also right after another run has ended
        try:
            sock.bind((address, port))
            sock.listen()  # until then another process may bind, too
            return _store_on(sock, address)
        except OSError as error:
            reason = error.strerror or error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError([f"dist_params.address: {address}: {reason}"]) from error
    note(f"dist_params.port: {port} on {address}: {reason}; took a free one")
    return serve_store(address, 0)


def _store_on(listening: socket.socket, address: str) -> dist.TCPStore:
    """A store that takes over a listening socket."""
    port, handle = listening.getsockname()[1], listening.detach()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=handle)


@contextlib.contextmanager
def lost_connections() -> Iterator[None]:
    """Turns what torch raises in a collective, when another process has died or is silent, into `ConnectionLost`.

    NCCL and the store raise classes of their own. gloo raises plain RuntimeErrors, which nothing but their text tells
    from others: this is the one place that reads it.
    """
    try:
        yield
    except RunError:  # a RuntimeError, too
        raise
    except RuntimeError as error:
        words = ("Connection", "gloo", "NCCL", "recvBytes")  # an error in a gradient hook comes as a RuntimeError, too
        if isinstance(error, dist.DistError) or any(word in str(error) for word in words):
            raise ConnectionLost(f"a worker was lost: {error}") from error
        raise
