"""Processes: who am I, how are workers started, what do they say to each other.

The only file that says ``torch.distributed``. Started plainly, harness.py starts its own workers here, by
``torch.multiprocessing``; started by ``torchrun`` it finds its place in the environment and starts none. (Not by
torchrun's engine, though that starts functions by the same means: its workers end by waiting for an Event, and one that
is killed in that wait leaves the launcher waiting for ever, as a comment in torch's MultiprocessContext says.)
One process needs no process group: every collective below is then a no-op.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from harness_params import Config, ConfigError, make_config, unused_alone
from utils.files import scratch_folder
from utils.signals import ECHO_SECONDS, SHUTDOWN_SECONDS, Stopped, end_at_once, exit_quietly, handled

# Each worker imports all afresh: CUDA does not survive a fork.
START_METHOD = "spawn"
# When a worker has ended, the others find it out by themselves and say what they met; then they are sent SIGTERM, and
# after as long again SIGKILL.
LAST_WORDS_SECONDS = 10


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


def started_by_launcher() -> bool:
    """Whether torchrun (or our own launcher) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def started_rank() -> int:
    """This process's rank as its launcher gave it; 0 where there is none."""
    return int(os.environ.get("RANK", 0))


def launch_id() -> str:
    """Names the torchrun that started this process, the same when it starts the workers anew; empty without one.

    It is the ``--rdzv_id``, which a job that is queued again may keep. Without one torchrun says "none": then its own
    process is what tells it from others. (Its count of restarts tells nothing: each machine's torchrun keeps its own,
    and does not count the restarts that another machine caused.)
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run_id != "none":
        return run_id
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {parent} {started}"
    except OSError:  # not Linux
        return ""


def notes_on(cfg: Config) -> list[str]:
    """The config's notes; under torchrun its own on dist_params, some of which torchrun's options take the place of.

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
    told = [f"dist_params.{key}: {getattr(d, key)} has no effect under torchrun" for key in ignored]
    # The config's own on this section suppose that as many processes run as it asks for.
    return [*(note for note in cfg.notes if not note.startswith("dist_params.")), *told]


@contextlib.contextmanager
def join(backend: str = "auto", timeout_minutes: float = 10.0, threads: int = 0) -> Iterator[Context]:
    """Enters this process among the others, and leaves on exit.

    Args:
        backend: auto is nccl where each local process has a GPU of its own, gloo otherwise. With nccl, messages
            between CPUs still go by gloo.
        timeout_minutes: how long a collective waits for a rank that says nothing.
        threads: CPU threads of this process; 0 is its share of the cores.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    on_gpu = gpus >= local_world and backend != "gloo"
    if backend == "nccl" and not on_gpu:
        raise ConfigError([f"dist_params.backend: nccl needs a GPU for each of {local_world} processes; {gpus} found"])
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")  # more ranks than GPUs share them
    if device.type == "cuda":
        torch.cuda.set_device(device)
    share_out_threads(local_world, threads)
    ctx = Context(rank, world, local_rank, local_world, device)
    if world == 1:
        yield ctx
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(agreed_name(store, rank, world, timeout), store),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    try:
        yield ctx
    finally:
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
            raise RuntimeError(f"Connection to {missing} timed out: not started")
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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def serve_store(address: str, port: int) -> dist.TCPStore:
    """The store by which workers find each other, on `port` of `address` where that is free, else on any other."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that ended a minute ago is no hindrance
        try:
            sock.bind((address, port))
            sock.listen()  # for another's bind may succeed until then
        except OSError as error:
            why = error.strerror or error
            print(f"harness: note: dist_params.port: {port} on {address}: {why}; took a free one", file=sys.stderr)
            sock.close()
            return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        port, listening = sock.getsockname()[1], sock.detach()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)


class WorkerFailure(RuntimeError):
    """A worker ended before its work did.

    Attributes:
        traceback: the worker's own, empty when it was killed.
        kind: class name of the exception it died of, empty when it was killed.
    """

    def __init__(self, message: str, traceback: str = "", kind: str = ""):
        super().__init__(message)
        self.traceback = traceback
        self.kind = kind


def launch(worker: Callable[..., int], args: tuple, nproc: int, address: str = "localhost", port: int = 0) -> int:
    """Starts `nproc` processes running ``worker(*args)`` on this machine and waits for them.

    The workers live until `worker` returns its exit status, 0 or 128 + the signal that stopped it; when one ends
    otherwise, the others are ended.

    Returns:
        the workers' exit status.

    Raises:
        WorkerFailure: a worker died; tells of the first that died of itself.
        Stopped: a signal came before the workers could save their state, or they did not end in time.
    """
    # torch tells of the workers that it ends; ours is one line (and the worker's traceback).
    logging.disable(logging.WARNING)
    # Python's resource tracker warns of the queues of a killed worker, after our last line; the kernel has freed them.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    with scratch_folder() as errors, _stopped_once():
        store = serve_store(address, port)
        place = {"MASTER_ADDR": address, "MASTER_PORT": store.port, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
        try:
            workers = multiprocessing.start_processes(
                _work_as_rank, (place, worker, args, errors), nproc, join=False, start_method=START_METHOD
            )
            while not workers.join(grace_period=LAST_WORDS_SECONDS):
                pass
        except Stopped as stop:
            if all(status > 128 for status in _end_children(stop.signum)):
                return 128 + stop.signum
            raise
        except multiprocessing.ProcessExitedException as end:
            if end.exit_code > 128:  # the signal came to a worker, and all of them have stopped
                return end.exit_code
            raise _first_cause(end, [process.exitcode for process in workers.processes], errors) from None
    return 0


def _work_as_rank(rank: int, place: dict, worker: Callable[..., int], args: tuple, errors: Path) -> None:
    """A worker's life. What it dies of it writes to `errors`."""
    exit_quietly(worker=True)
    # The last one says that the launcher holds the store, not rank 0.
    place = {**place, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in place.items()})
    try:
        status = worker(*args)
        if status:
            sys.stderr.flush()
            os._exit(status)  # nobody waits for what Python does at its end
    except Exception as error:
        told = type(error).__name__, str(error), traceback.format_exc()
        (errors / f"{rank}.json").write_text(json.dumps(told))
        sys.exit(1)
    finally:
        end_at_once()


@contextlib.contextmanager
def _stopped_once() -> Iterator[None]:
    """The first stopping signal raises `Stopped`, on which the workers are sent it and waited for.

    A second one ends this process at once, and the kernel its workers (`die_with_parent`).
    """
    since = 0.0

    def stop(signum: int, frame: Any) -> None:
        nonlocal since
        now = time.monotonic()
        if not since:
            since = now
            raise Stopped(signum)
        if now - since > ECHO_SECONDS:
            os._exit(128 + signum)

    before = {signum: signal.signal(signum, stop) for signum in handled()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end_children(signum: int) -> list[int]:
    """Sends `signum` to this process's children and waits, but not for ever. Returns their exit codes."""
    children, end = multiprocessing.active_children(), time.monotonic() + SHUTDOWN_SECONDS
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signum)
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        child.kill()
        child.join()
    return [child.exitcode for child in children] or [-signum]


def is_lost_connection(kind: str, message: str) -> bool:
    """Whether an error of this class is what a process meets in a collective when another has died or is silent.

    It is "DistBackendError", or gloo's "Connection closed by peer" or "Timed out waiting".
    """
    return "Error" in kind and any(word in message for word in ("Connection", "gloo", "NCCL", "recvBytes"))


def _first_cause(end: multiprocessing.ProcessExitedException, exitcodes: list[int], errors: Path) -> WorkerFailure:
    """What the worker that ended first died of, or, where that was a lost connection, what another one died of."""
    told = []
    for file in sorted(errors.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            kind, message, trace = json.loads(file.read_text())
            told.append((is_lost_connection(kind, message), file.stem, kind, message, trace))
    echo, _, kind, message, trace = min(told, default=(True, "", "", "", ""))
    if end.exit_code > 0 and not echo:
        return WorkerFailure(message, trace, kind)
    # One that is killed says nothing, and its connection may be missed before it is. (SIGTERM ends the others.)
    killed = [rank for rank, code in enumerate(exitcodes) if code < 0 and code != -signal.SIGTERM]
    rank = end.error_index if end.exit_code < 0 or not killed else killed[0]
    if exitcodes[rank] < 0:
        name = signal.Signals(-exitcodes[rank]).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return WorkerFailure(f"worker {rank} was killed by {name}{hint}")
    if told:
        return WorkerFailure(f"a worker was lost: {message}", trace, kind)
    return WorkerFailure(f"worker {rank} ended with exit code {exitcodes[rank]}")
