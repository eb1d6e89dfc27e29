"""Processes: who am I, how do they find each other, what do they say to each other.

The only file that says ``torch.distributed``. Started plainly, harness.py starts its own workers (utils/launcher.py);
started by ``torchrun`` it finds its place in the environment and starts none.
One process needs no process group: every collective below is then a no-op.
"""

import contextlib
import errno
import hashlib
import inspect
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness_params import Config, Note, make_config, unused_alone
from utils.errors import ConfigError, ConnectionLost, RunError
from utils.processes.place import share_of_cores


@dataclass(frozen=True)
class Context:
    """This process's place among all of them, and what it may say to the others."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast_object(self, obj: Any = None) -> Any:
        """Rank 0's (picklable, trusted: it comes from our own process) object, on every rank."""
        if self.world == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @torch.no_grad()
    def broadcast_tensors(self, tensors: list[Tensor]) -> None:
        """Overwrites `tensors` (same shapes and order everywhere) with rank 0's, packed into one message a dtype."""
        if self.world == 1:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            group = [t for t in tensors if t.dtype == dtype]
            # NCCL and gloo both carry uint8; bool is not on every backend's list.
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
        """Starts summing over the ranks, in place; the future ends when `tensor` holds the sum."""
        return dist.all_reduce(tensor, async_op=True).get_future()

    @property
    def backend(self) -> str:
        """What carries this device's tensors between the ranks: gloo or nccl; empty with one process."""
        if self.world == 1:
            return ""
        return "nccl" if f"{self.device.type}:nccl" in dist.get_backend_config() else "gloo"

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's (picklable) object, by rank, on every rank."""
        if self.world == 1:
            return [obj]
        objects: list[Any] = [None] * self.world
        dist.all_gather_object(objects, obj)
        return objects

    def largest(self, numbers: list[int]) -> list[int]:
        """Largest of the ranks' integers, place by place, by a message between CPUs that waits for no GPU."""
        if self.world == 1:
            return numbers
        box = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return box.tolist()

    def any(self, flag: int) -> int:
        """Largest of the ranks' flags, as `largest`."""
        return self.largest([int(flag)])[0]

    def same_everywhere(self, tensors: list[Tensor]) -> bool:
        """Whether all ranks hold the same bits, by SHA-256 of each rank's own."""
        if self.world == 1:
            return True
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return len(set(self.gather_objects(digest.hexdigest()))) == 1

    def wrap(self, model: nn.Module, gradient_hook: Callable | None = None) -> nn.Module:
        """DDP without buffer broadcast: masks and BN statistics never travel with a step.

        Args:
            gradient_hook: averages a bucket of gradients over the ranks in DDP's stead; takes DDP's ``GradBucket``,
                returns the future of its flat tensor.
        """
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # The option has got a new name; the old one warns where both are known.
        known = inspect.signature(ddp).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        wrapped = ddp(model, device_ids=ids, gradient_as_bucket_view=True, **{option: False})
        if gradient_hook is not None:
            wrapped.register_comm_hook(None, lambda state, bucket: gradient_hook(bucket))
        return wrapped


def default_nproc(nproc: int) -> int:
    """Processes to start on this machine for ``dist_params.nproc``: 0 means one a GPU, or one on the CPU."""
    return nproc or max(1, torch.cuda.device_count())


def notes_on(cfg: Config) -> list[Note]:
    """The notes to print. Under torchrun, its own options replace some of dist_params, and so do their notes.

    Raises:
        ConfigError: one process was asked for, and torchrun has started several.
    """
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
    return [*(note for note in cfg.notes if note.section != "dist_params"), *notes]


@contextlib.contextmanager
def join(backend: str = "auto", timeout_minutes: float = 10.0, threads: int = 0) -> Iterator[Context]:
    """Enters this process among the others, and leaves on exit.

    Args:
        backend: auto is nccl where there are as many GPUs as local processes, gloo otherwise. With nccl, messages
            between CPUs still go by gloo.
        timeout_minutes: how long a collective waits for a rank that says nothing.
        threads: CPU threads of this process; 0 is its share of the cores.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    # A launcher may show each process one GPU, its own (Slurm's --gpus-per-task): whether it is, only the user knows.
    own_shown = gpus == 1 and backend == "nccl"
    on_gpu = (gpus >= local_world and backend != "gloo") or own_shown
    if backend == "nccl" and not on_gpu:
        raise ConfigError([f"dist_params.backend: nccl needs a GPU for each of {local_world} processes; {gpus} found"])
    if backend == "auto" and gpus and not on_gpu and rank == 0:
        told = f"auto is gloo, for {local_world} processes see {gpus} GPU(s); nccl if each has one of its own"
        print(f"harness: note: dist_params.backend: {told}", file=sys.stderr)
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")  # more ranks than GPUs share them
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share_out_threads(local_world, threads)
    ctx = Context(rank, world, local_rank, local_world, device)
    if world == 1:
        yield ctx
        return
    timeout = timedelta(minutes=timeout_minutes)
    with _lost_connections():
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
    # Not after an exception: nccl's would wait for the other ranks, which wait for this one.
    dist.destroy_process_group()


def agreed_name(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that these processes have in common with none that met in this `store` before.

    torchrun's store outlives its workers: those started anew would look their peers up below the names of the old ones,
    and find the addresses of the dead (pytorch issue 135712; its count of restarts differs between machines). So rank 0
    draws a name and answers whatever words it finds with it, until every rank has said the name; each waits for the
    answer to a word that it has just drawn.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def pause(missing: str) -> None:  # not the store's own wait, during which Python would answer no signal
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
    """`threads` for this process; 0 is its share of the cores, or what OMP_NUM_THREADS says."""
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_of_cores(local_world))


def serve_store(address: str, port: int) -> dist.TCPStore:
    """The store by which workers find each other, on `port` of `address` where that is free, else on any other.

    Raises:
        ConfigError: `address` is not this machine's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that ended a minute ago is no hindrance
        try:
            sock.bind((address, port))
            sock.listen()  # another's bind may succeed until then
            return _store_on(sock, address)
        except OSError as error:
            why = error.strerror or error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError([f"dist_params.address: {address}: {why}"]) from error
    print(f"harness: note: dist_params.port: {port} on {address}: {why}; took a free one", file=sys.stderr)
    return serve_store(address, 0)


def _store_on(listening: socket.socket, address: str) -> dist.TCPStore:
    port, handle = listening.getsockname()[1], listening.detach()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=handle)


@contextlib.contextmanager
def _lost_connections() -> Iterator[None]:
    """Within it, what torch raises in a collective when another process has died or is silent is `ConnectionLost`.

    The one place that looks at an error's text: nccl raises classes of its own, gloo a plain RuntimeError such as
    "Connection closed by peer" or "Timed out waiting".
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistError and its kinds are RuntimeErrors, too
        ours = isinstance(error, RunError)
        if not ours and any(word in str(error) for word in ("Connection", "gloo", "NCCL", "recvBytes")):
            raise ConnectionLost(f"a worker was lost: {error}") from error
        raise
