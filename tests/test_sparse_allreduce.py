"""Sparse all-reduce between two real gloo processes: kept gradients are the dense all-reduce's, bit for bit."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing import spawn
from torch.nn import functional as F

from harness_params import make_config
from tests.conftest import ROOT
from utils.conv_type import insert_masks, masked_params
from utils.distributed import Context, join
from utils.errors import ConfigError
from utils.models import create_model
from utils.training import sparse_allreduce
from utils.training.sparse_allreduce import KeptGradients, gradient_hook

DENSITIES = (1.0, 0.2, 0.05, 0.01)
# Small buckets, so that small networks have several.
BUCKET_MB = 0.05


def grouped_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.Conv2d(32, 64, 1), nn.ReLU(),
        nn.Conv2d(64, 96, (3, 1), groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, 10),
    )  # fmt: skip


NETS = {
    "lenet": lambda: create_model("lenet_300_100", 10, (1, 8, 8)),
    "resnet20": lambda: create_model("resnet20", 10, (3, 8, 8)).to(memory_format=torch.channels_last),
    "grouped": lambda: grouped_net().to(memory_format=torch.channels_last),
    "grouped_nchw": grouped_net,
    "attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 32, dropout=0.0), nn.Flatten(), nn.Linear(192, 10)
    ),
}  # fmt: skip
SHAPES = {"lenet": (1, 8, 8)}


class World:
    """Two networks with the same weights, one averaged by DDP itself and one by the hook."""

    def __init__(self, ctx: Context, name: str, **options):
        torch.manual_seed(0)
        self.ctx, self.shape = ctx, SHAPES.get(name, (3, 8, 8))
        self.dense, self.sparse = insert_masks(NETS[name]()), insert_masks(NETS[name]())
        self.sparse.load_state_dict(self.dense.state_dict())
        self.hook = KeptGradients(self.sparse, ctx.world, ctx.start_sum, **options)
        self.dense_net, self.sparse_net = ctx.wrap(self.dense), ctx.wrap(self.sparse, self.hook)
        self.step = 0

    def prune(self, density: float, dead: str = "") -> None:
        """New masks in place; the layer `dead` keeps nothing."""
        generator = torch.Generator().manual_seed(int(1000 * density))
        for name, _, mask in masked_params(self.sparse):
            mask.copy_(torch.rand(mask.shape, generator=generator) < (0 if name == dead else density))

    def backward(self) -> None:
        """Each rank's own images, through both networks."""
        generator = torch.Generator().manual_seed(100 * self.step + self.ctx.rank)
        images, labels = torch.randn(4, *self.shape, generator=generator), torch.tensor([1, 2, 3, 4])
        images = images.contiguous(memory_format=torch.channels_last)
        for net in (self.dense_net, self.sparse_net):
            net.zero_grad(set_to_none=True)
            F.cross_entropy(net(images), labels).backward()
        self.step += 1

    def gaps(self) -> list[str]:
        """Names of the parameters whose gradients are not the dense ones times the mask, bit for bit."""
        masks = {name: mask for name, _, mask in masked_params(self.sparse)}
        dense = {name: param.grad for name, param in self.dense.named_parameters()}
        wanted = {name: grad * masks[name] if name in masks else grad for name, grad in dense.items()}
        assert all(grad.any() for name, grad in wanted.items() if name not in masks or masks[name].any())
        # -0.0 * False is -0.0, which equals 0.0.
        return [name for name, p in self.sparse.named_parameters() if not torch.equal(p.grad, wanted[name])]

    def counts(self) -> dict[str, int]:
        masks = [mask for _, _, mask in masked_params(self.sparse)]
        total, maskable = sum(p.numel() for p in self.sparse.parameters()), sum(m.numel() for m in masks)
        return {"kept": sum(int(m.sum()) for m in masks), "maskable": maskable, "unmasked": total - maskable}


def _study(ctx: Context, name: str) -> list[dict]:
    """All densities in turn; two steps at each, since DDP makes its buckets anew after the first."""
    world, rows = World(ctx, name), []
    dead = [n for n, _, _ in masked_params(world.sparse)][1]
    for density, dead_layer in [*((d, "") for d in DENSITIES), (0.2, dead), (0.5, "")]:
        world.prune(density, dead_layer)
        for _ in range(2):
            sent = world.hook.sent
            world.backward()
            counts = {"sent": world.hook.sent - sent, "buckets": len(world.hook._known), **world.counts()}
            rows.append({"density": density, "gaps": world.gaps(), **counts})
    return rows


def _cast(ctx: Context) -> dict:
    """bfloat16 on the wire, packed and whole."""
    found = {}
    for pays_below in (0.0, 1.0):
        world = World(ctx, "resnet20", wire=torch.bfloat16, pays_below=pays_below)
        world.prune(0.2)
        world.backward()
        world.backward()
        masks = {name: mask for name, _, mask in masked_params(world.sparse)}
        pairs = []
        for (name, p), q in zip(world.dense.named_parameters(), world.sparse.parameters()):
            pairs.append((p.grad * masks[name] if pays_below and name in masks else p.grad, q.grad))
        far = max(float((p - q).norm() / p.norm()) for p, q in pairs)
        found[pays_below] = {"far": far, "sent": world.hook.sent, "dtypes": {q.dtype for _, q in pairs}}
    return found


def _refused(ctx: Context) -> str:
    class Fussy(Context):
        def start_sum(self, tensor):
            raise RuntimeError("Invalid scalar type")

    fussy = Fussy(ctx.rank, ctx.world, ctx.local_rank, ctx.local_world, ctx.device)
    try:
        gradient_hook(make_config({"dist_params": {"wire": "bf16"}}), fussy, NETS["lenet"]())
    except ConfigError as error:
        return error.faults[0]
    return ""


def _options(ctx: Context) -> dict:
    model = insert_masks(NETS["lenet"]())
    found = {}
    for sparse in ("auto", "on", "off"):
        for wire in ("fp32", "bf16"):
            cfg = make_config({"dist_params": {"sparse_allreduce": sparse, "wire": wire}})
            hook = gradient_hook(cfg, ctx, model)
            found[sparse, wire] = None if hook is None else (hook.pays_below, hook.wire)
    return found


def _worker(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="localhost")
    nn.parallel.DistributedDataParallel = functools.partial(
        nn.parallel.DistributedDataParallel, bucket_cap_mb=BUCKET_MB
    )
    with join("gloo", timeout_minutes=1) as ctx:
        found = {name: _study(ctx, name) for name in NETS}
        found |= {"cast": _cast(ctx), "refused": _refused(ctx), "options": _options(ctx)}
        torch.save(found, Path(out) / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("found")
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    spawn(_worker, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", NETS)
def test_kept_gradients_are_the_dense_ones_to_the_last_bit(found, name):
    for rows in (found[0][name], found[1][name]):
        assert [row["gaps"] for row in rows] == [[]] * len(rows)


@pytest.mark.parametrize("name", NETS)
def test_bytes_follow_the_density(found, name):
    for row in found[0][name]:
        assert row["sent"] == 4 * (row["kept"] + row["unmasked"])
        assert row["sent"] <= 4 * (row["density"] * row["maskable"] * 1.25 + 0.01 * row["maskable"] + row["unmasked"])


def test_several_buckets_were_packed(found):
    assert found[0]["resnet20"][-1]["buckets"] >= 3
    assert found[0]["lenet"][-1]["buckets"] >= 2


def test_bfloat16_on_the_wire(found):
    for cast in (found[0]["cast"], found[1]["cast"]):
        for row in cast.values():
            assert 1e-5 < row["far"] < 2**-7  # rounded, to 8 bits
            assert row["dtypes"] == {torch.float32}
        assert cast[1.0]["sent"] < 0.3 * cast[0.0]["sent"]
    params = sum(p.numel() for p in NETS["resnet20"]().parameters())
    assert found[0]["cast"][0.0]["sent"] == 2 * 2 * params


def test_bfloat16_is_refused_where_the_backend_cannot(found):
    assert found[0]["refused"] == "dist_params.wire: bf16 is not allowed: gloo does not: Invalid scalar type"


def test_options_choose_the_hook(found):
    pays = sparse_allreduce.PAYS_BELOW["gloo"]
    assert found[0]["options"] == {
        ("auto", "fp32"): (pays, torch.float32),
        ("auto", "bf16"): (pays, torch.bfloat16),
        ("on", "fp32"): (1.0, torch.float32),
        ("on", "bf16"): (1.0, torch.bfloat16),
        ("off", "fp32"): None,
        ("off", "bf16"): (0.0, torch.bfloat16),
    }
    assert gradient_hook(make_config({"dist_params": {"sparse_allreduce": "on"}}), Context(), NETS["lenet"]()) is None


class Bucket:
    """A bucket of one process, as DDP hands it over."""

    def __init__(self, params: list[nn.Parameter]):
        self._params, self._buffer = params, torch.randn(sum(p.numel() for p in params))

    def buffer(self):
        return self._buffer

    def parameters(self):
        return self._params

    def index(self):
        return 0


def _summed(tensor: torch.Tensor) -> torch.futures.Future:
    future = torch.futures.Future()
    future.set_result(tensor)
    return future


def test_indices_are_worked_out_once_a_level_and_follow_every_change_of_masks():
    model = insert_masks(nn.Linear(8, 4))
    found = []
    hook = KeptGradients(model, 1, _summed)
    find = hook._find
    hook._find = lambda *args: found.append(1) or find(*args)

    def kept() -> int:
        sent = hook.sent
        hook(Bucket([model.weight, model.bias])).wait()
        return (hook.sent - sent) // 4 - 4

    assert [kept(), kept()] == [32, 32]
    assert len(found) == 1
    model.weight_mask[0] = False
    assert [kept(), kept(), kept()] == [24, 24, 24]
    assert len(found) == 2
    model.weight_mask = torch.zeros_like(model.weight_mask)
    assert [kept(), kept()] == [0, 0]
    assert len(found) == 3


def test_buckets_above_the_threshold_are_sent_whole():
    model = insert_masks(nn.Linear(8, 4, bias=False))
    model.weight_mask[0] = False  # 24 of 32 are kept
    for pays_below, sent in ((0.75, 32), (0.76, 24), (0.0, 32)):
        hook = KeptGradients(model, 1, _summed, pays_below=pays_below)
        bucket = Bucket([model.weight])
        before = bucket.buffer().clone()
        after = hook(bucket).wait()
        assert hook.sent == 4 * sent
        assert torch.equal(after, before if sent == 32 else before * model.weight_mask.flatten())


def test_a_whole_bucket_with_nothing_kept():
    model = insert_masks(nn.Linear(8, 4, bias=False))
    model.weight_mask.zero_()
    assert not KeptGradients(model, 1, _summed)(Bucket([model.weight])).wait().any()


def test_a_bucket_of_unknown_layout_is_refused():
    model = insert_masks(nn.Linear(8, 4))
    bucket = Bucket([model.weight])
    bucket._buffer = torch.randn(40)
    with pytest.raises(RuntimeError, match="a gradient bucket of 40 entries does not hold its parameters alone"):
        KeptGradients(model, 1, _summed)(bucket)


def test_whole_runs_are_equal_with_and_without(launch):
    """Two levels of ResNet-20 by two processes: weights, masks and every CSV figure."""
    options = {
        "model_params.model_name": "resnet20", "experiment_params.epochs_per_level": 1, "prune_params.prune_rate": 0.8,
        "optimizer.warmup_epochs": 0, "dist_params.nproc": 2, "prune_params.num_levels": 2,
    }  # fmt: skip
    runs = [launch(word, **options, **{"dist_params.sparse_allreduce": word}) for word in ("off", "on")]
    runs[0].assert_same_figures(runs[1])


@pytest.mark.slow
def test_clipped_and_rewound_runs_are_equal_with_and_without(launch):
    options = {
        "model_params.model_name": "lenet_300_100", "prune_params.prune_rate": 0.8, "dist_params.nproc": 2,
        "experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1, "optimizer.grad_clip": 1.0,
        "prune_params.er_method": "er_erk", "prune_params.er_init": 0.3,
    }  # fmt: skip
    runs = [launch(word, **options, **{"dist_params.sparse_allreduce": word}) for word in ("off", "on")]
    runs[0].assert_same_figures(runs[1])


# --- the benchmark ---------------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, str(ROOT / "tests" / "benchmarks" / "allreduce.py")]


def test_benchmark_without_its_tools_says_that_it_was_skipped():
    done = subprocess.run(PROGRAM, capture_output=True, text=True, env={"PATH": ""}, timeout=60)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("allreduce.py: SKIPPED, nothing was measured: ip and tc not found")


@pytest.mark.slow
def test_benchmark_between_two_namespaces():
    """The interface's own counters: at most density x dense, 1% and the unmasked parameters; equal gradients."""
    words = ["--rates=100", "--densities=1,0.05", "--rounds=2", "--model=resnet20", "--limit=300"]
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=400)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    if "netns add" in done.stderr or "tc -n" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    assert [row[1] for row in rows] == ["gradients", "gradients", "training", "training"]
    assert [float(row[2]) for row in rows] == pytest.approx([1, 0.05, 1, 0.05], abs=0.002)
    for row in rows:
        dense, sparse, allowed = map(float, row[6:9])
        assert sparse <= allowed + 0.005 and dense >= 1.07  # MB: 268,976 parameters and headers
        assert row[9] == "yes"
    assert not any(name.startswith("tickets_") for name in os.listdir("/run/netns"))
