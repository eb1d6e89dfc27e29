"""Averaging gradients between two machines, dense and sparse, over a network of a given speed.

    python tests/benchmarks/allreduce.py [--rates 1000,100] [--densities 1,0.2,0.05,0.01] [--rounds 5]

The two machines are network namespaces of this one, joined by a veth pair whose ends are both shaped by the kernel's
token bucket (tc tbf) to the rate in Mbit/s; each holds one process, started as torchrun starts it. That takes root and
iproute2. Rate 0 is the loopback of one machine, unshaped, which takes neither.

Dense: DDP's own all-reduce. Sparse: the hook of utils/training/sparse_allreduce.py. Both in fp32, on two copies of one
network with the same random masks, in turns, step by step. Two kinds of step: "gradients" makes gradients at no cost
and averages them; "training" is forward, backward and optimizer on `--batch` images per process. Bytes are those that
the sender's interface counted per step (headers included); allowed are density x dense + 1% + the parameters without a
mask. The gradients of each row are compared: the sparse ones must be the dense ones times the mask, bit for bit.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.conv_type import apply_masks, insert_masks, keep_masked, masked_params
from utils.distributed import Context, join
from utils.models import create_model
from utils.training.sparse_allreduce import KeptGradients

PREFIX, LINK, PORT = "tickets", "tickets0", 29400
NETWORK = "10.213.77"


# --- one of the two machines -----------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Measure as one of two ranks; rank 0 writes the rows to ``args.worker``."""
    torch.set_num_threads(args.threads)
    with join("gloo", timeout_minutes=args.limit / 60) as ctx:
        rows = []
        for kind in args.kinds.split(","):
            pair = Pair(args, ctx, kind)
            rows += [pair.measure(float(density)) for density in args.densities.split(",")]
        if ctx.is_main:
            Path(args.worker).write_text(json.dumps(rows))


class Given(nn.Module):
    """A network whose gradients are fixed numbers, at the cost of one product."""

    def __init__(self, net: nn.Module, rank: int):
        super().__init__()
        self.net = net
        generator = torch.Generator().manual_seed(rank)
        self.gradients = [torch.empty_like(p).normal_(generator=generator) for p in net.parameters()]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sum(torch.sum(p * g) for p, g in zip(self.net.parameters(), self.gradients))


class Pair:
    """Two copies of one network, one with dense and one with sparse averaging, for one kind of step."""

    def __init__(self, args: argparse.Namespace, ctx: Context, kind: str):
        self.args, self.ctx, self.kind = args, ctx, kind
        self.models = {"dense": self._build(), "sparse": self._build()}
        hook = KeptGradients(self.models["sparse"], ctx.world, ctx.start_sum)
        self.nets = {"dense": ctx.wrap(self.models["dense"]), "sparse": ctx.wrap(self.models["sparse"], hook)}
        self.optimizers = {}
        for name, model in self.models.items():
            self.optimizers[name] = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            keep_masked(self.optimizers[name], model)
        generator = torch.Generator().manual_seed(ctx.rank)
        images = torch.randn(args.batch, 3, 32, 32, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(args.batch) % 10

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        net = insert_masks(create_model(self.args.model, 10, (3, 32, 32))).to(memory_format=torch.channels_last)
        return Given(net, self.ctx.rank) if self.kind == "gradients" else net

    def measure(self, density: float) -> dict:
        """The row of one density."""
        self._prune(density)
        seconds, sent, gaps = {name: [] for name in self.nets}, {}, []
        # The first step is not counted: it computes the indices, and DDP rebuilds its buckets, so that gradients are
        # compared in one layout.
        started = time.perf_counter()
        for number in range(1 + self.args.rounds):
            for name in self.nets:
                took, sent[name] = self._step(name)
                seconds[name].append(took)
            gaps = gaps or self._unequal()
            if number and self.ctx.largest([int(time.perf_counter() - started > self.args.seconds)])[0]:
                break
        masks = [mask for _, _, mask in masked_params(self.models["sparse"])]
        kept, maskable = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        total = sum(p.numel() for p in self.models["sparse"].parameters())
        return {
            "kind": self.kind, "density": kept / maskable, "dense": seconds["dense"][1:],
            "sparse": seconds["sparse"][1:], "dense_bytes": sent["dense"], "sparse_bytes": sent["sparse"],
            "unmasked": 4 * (total - maskable), "unequal": gaps,
        }  # fmt: skip

    def _prune(self, density: float) -> None:
        """The same random masks for both, on either rank."""
        for model in self.models.values():
            generator = torch.Generator().manual_seed(1)
            for _, _, mask in masked_params(model):
                mask.copy_(torch.rand(mask.shape, generator=generator) < density)
            apply_masks(model)

    def _step(self, name: str) -> tuple[float, int]:
        """(seconds, bytes sent) of a step."""
        self.models[name].zero_grad(set_to_none=True)
        self.ctx.barrier()
        counted, start = _counted(), time.perf_counter()
        out = self.nets[name](self.images)
        (out if self.kind == "gradients" else F.cross_entropy(out, self.labels)).backward()
        if self.kind == "training":
            self.optimizers[name].step()
        seconds = time.perf_counter() - start
        self.ctx.barrier()
        return seconds, _counted() - counted

    def _unequal(self) -> list[str]:
        """Names of the parameters whose sparse gradient is not the dense one times the mask."""
        masks = {name: mask for name, _, mask in masked_params(self.models["sparse"])}
        pairs = zip(self.models["sparse"].named_parameters(), self.models["dense"].parameters())
        wanted = ((name, p.grad, q.grad * masks[name] if name in masks else q.grad) for (name, p), q in pairs)
        return [name for name, mine, theirs in wanted if not torch.equal(mine, theirs)]


def _counted() -> int:
    """Bytes that left by the shaped link so far; 0 on the loopback, which carries everyone's."""
    try:
        return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())
    except FileNotFoundError:
        return 0


# --- the network -----------------------------------------------------------------------------------------------------


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def missing() -> str:
    """Why no namespaces can be made here; empty where they can."""
    tools = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if tools:
        return f"{' and '.join(tools)} not found (apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return ""


@contextlib.contextmanager
def two_machines(mbit: int) -> Iterator[list[str]]:
    """Names of two namespaces joined by a link of `mbit` Mbit/s each way; gone afterwards, whatever happens."""
    for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else []:
        parts = name.split("_")  # left by a killed run
        if parts[0] == PREFIX and len(parts) == 3 and not os.path.exists(f"/proc/{parts[1]}"):
            _run("ip", "netns", "del", name)
    spaces = [f"{PREFIX}_{os.getpid()}_{i}" for i in range(2)]
    made = []
    try:
        for space in spaces:
            _run("ip", "netns", "add", space)
            made.append(space)
        _run("ip", "-n", spaces[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", spaces[1])
        for number, space in enumerate(spaces, start=1):
            _run("ip", "-n", space, "address", "add", f"{NETWORK}.{number}/30", "dev", LINK)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", LINK, "up")
            # A bucket of 2 ms: the kernel refills it at its own ticks, and a smaller one would not reach the rate.
            shape = ["rate", f"{mbit}mbit", "burst", str(max(65536, mbit * 250)), "latency", "100ms"]
            _run("tc", "-n", space, "qdisc", "add", "dev", LINK, "root", "tbf", *shape)
        yield spaces
    finally:
        for space in made:
            _run("ip", "netns", "del", space)


def run_pair(args: argparse.Namespace, mbit: int) -> list[dict]:
    """Run both processes at one rate; return their rows.

    Raises:
        RuntimeError: one failed, or they took longer than ``args.limit`` seconds.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spaces = stack.enter_context(two_machines(mbit)) if mbit else ["", ""]
        processes: list[subprocess.Popen] = []
        stack.callback(_end, processes)
        for rank, space in enumerate(spaces):
            place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
            env = os.environ | {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": "1"}
            env["CUDA_VISIBLE_DEVICES"] = ""  # the network is what is measured
            env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns that the namespaces have no names for their addresses
            env["MASTER_ADDR"] = f"{NETWORK}.1" if space else "127.0.0.1"
            env["GLOO_SOCKET_IFNAME"] = LINK if space else "lo"
            words = [sys.executable, __file__, *sys.argv[1:], "--worker", str(folder / "rows.json")]
            words = ["ip", "netns", "exec", space, *words] if space else words
            processes.append(subprocess.Popen(words, env=env))
        end = time.monotonic() + args.limit
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                raise RuntimeError(f"the processes failed, or took more than {args.limit} s")
            time.sleep(0.1)
        if any(process.returncode for process in processes):
            raise RuntimeError("a process failed")
        return json.loads((folder / "rows.json").read_text())


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


# --- the table -------------------------------------------------------------------------------------------------------


def line(rate: str, row: dict) -> str:
    """One row of the table; times are medians (smallest to largest)."""

    def cell(name: str) -> str:
        middle, *ends = (f"{1000 * f(row[name]):.0f}" for f in (statistics.median, min, max))
        return f"{middle} ({ends[0]}-{ends[1]})"

    gain = statistics.median(row["dense"]) / statistics.median(row["sparse"])
    sent = "| | | "
    if row["dense_bytes"]:
        allowed = (row["density"] + 0.01) * row["dense_bytes"] + row["unmasked"]
        figures = [row["dense_bytes"], row["sparse_bytes"], allowed]
        sent = "".join(f"| {bytes_ / 1e6:.2f} " for bytes_ in figures)
    equal = f"no: {', '.join(row['unequal'][:3])}" if row["unequal"] else "yes"
    times = f"{cell('dense')} | {cell('sparse')} | {gain:.2f}"
    return f"| {rate} | {row['kind']} | {row['density']:.3f} | {times} {sent}| {equal} | {len(row['dense'])} |"


def main() -> int:
    """Print the table; return 0, or 3 if the network asked for cannot be made here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", default="1000,100", help="Mbit/s, comma separated; 0 = loopback")
    parser.add_argument("--densities", default="1,0.2,0.05,0.01")
    parser.add_argument("--kinds", default="gradients,training", help="of step")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=8, help="images per process in a training step")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind, dense and sparse in turn")
    parser.add_argument("--seconds", type=float, default=60, help="time after which a row gets no further rounds")
    parser.add_argument("--limit", type=float, default=900, help="most seconds per rate")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    rates = [int(rate) for rate in args.rates.split(",")]
    if any(rates) and (reason := missing()):
        print(f"allreduce.py: SKIPPED, nothing was measured: {reason}; --rates 0 needs neither", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that namespaces are removed
    from utils.benchmark import machine

    print(machine())
    print(f"{args.model}, fp32, 2 processes of {args.threads} thread(s), batch {args.batch} each in a training step\n")
    print("| Mbit/s | step | density | dense ms | sparse ms | dense / sparse | dense MB | sparse MB | allowed MB "
          "| equal | n |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for rate in rates:
        for row in run_pair(args, rate):
            print(line(f"{rate:,}" if rate else "loopback", row), flush=True)
    print(f"\nload average {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
