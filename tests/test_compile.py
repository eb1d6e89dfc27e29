"""torch.compile (experiment_params.compile: on) by inductor on the CPU: one set of graphs for all levels, exact resume.

Needs a C++ compiler.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from harness_params import make_config
from tests.conftest import Finished
from tests.processes import rows_of
from tests.traps import Both, StopAt
from utils.dataset import load_data
from utils.distributed import Context
from utils.training.compiling import compile_network, missing_tools

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: torch.compile did not run on the CPU")

LEVELS = 5
# 1,437 training images: 11 batches of 128 and one of 29.
OPTIONS = {
    "experiment_params.compile": "on",
    "experiment_params.epochs_per_level": 2,
    "prune_params.num_levels": LEVELS,
    "experiment_params.training_type": "wr",
    "prune_params.rewind_epoch": 1,
}


class CountGraphs:
    """Writes what torch.compile has counted when each level ends, and evaluates in batches of 100, 100, 100 and 60."""

    def __init__(self, out: Path):
        self.out = out

    def __call__(self) -> None:
        from torch._dynamo.utils import counters

        from harness import Harness
        from utils.data import in_memory as memory_loader

        memory_loader.EVAL_IMAGES = 100
        plain = Harness.finish_level

        def finish_level(harness: Harness) -> None:
            plain(harness)
            with open(self.out, "a") as file:
                file.write(json.dumps({name: dict(values) for name, values in counters.items()}) + "\n")

        Harness.finish_level = finish_level


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """Kernels are compiled once for all tests here, in their own processes."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("kernels")), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(scope="module")
def counted(forks, env) -> tuple[Finished, list[dict]]:
    """A run of `LEVELS` levels, and the counts at the end of each."""
    out = forks.folder / "counts"
    run = forks("compiled", env=env, trap=CountGraphs(out), **OPTIONS)
    return run, [json.loads(line) for line in out.read_text().splitlines()]


def check_counts(counts: list[dict], graphs: int) -> None:
    assert len(counts) == LEVELS
    assert counts[0]["stats"]["unique_graphs"] == graphs
    assert counts[0]["frames"]["ok"] == counts[0]["frames"]["total"] == graphs
    for later in counts:
        assert later["frames"] == counts[0]["frames"]
        assert later["stats"]["unique_graphs"] == graphs
        assert not later.get("graph_break") and not later.get("unimplemented")


def test_no_recompilation_over_levels(counted):
    """Four graphs in all: training and evaluation, of whole batches and of the last ones."""
    run, counts = counted
    densities = list(run.csv("summary")["density"])
    assert densities == pytest.approx([0.5**level for level in range(LEVELS)], abs=1e-3)
    check_counts(counts, graphs=4)


def test_trains_as_without(counted, fork):
    run, _ = counted
    plain = fork("plain", **{**OPTIONS, "experiment_params.compile": "off"})
    gap = (run.csv("summary")["final_test_loss"] - plain.csv("summary")["final_test_loss"]).abs()
    assert gap.max() < 0.02
    one, other = run.checkpoint("level_0"), plain.checkpoint("level_0")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


def test_stopped_and_resumed_runs_are_equal(counted, fork, env):
    """Stopped in the middle of an epoch, resumed; then level 2 again from level 1: the same bits."""
    trap = CountGraphs(fork.folder / "ignored")
    fork("again", status=143, env=env, trap=Both(trap, StopAt(30)), **OPTIONS)
    run = fork("again", resume=True, env=env, trap=trap, **OPTIONS)
    run.assert_same_figures(counted[0])
    run = fork("again", resume=True, env=env, trap=trap, **{**OPTIONS, "experiment_params.resume_level": 2})
    run.assert_same_figures(counted[0])


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_criteria_score_as_without(fork, env, method):
    options = {
        **OPTIONS, "prune_params.num_levels": 2, "experiment_params.training_type": "imp",
        "experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0,
        "prune_params.er_method": method, "prune_params.er_init": 0.3, "prune_params.prune_method": method,
        "prune_params.synflow_rounds": 5,
    }  # fmt: skip
    compiled = fork("on", env=env, **options)
    plain = fork("off", **{**options, "experiment_params.compile": "off"})
    one, other = compiled.checkpoint("init"), plain.checkpoint("init")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert list(compiled.csv("summary")["density"]) == list(plain.csv("summary")["density"])


@pytest.mark.slow
def test_every_speed_option_at_once(fork, env):
    """Two processes, compiled, sparse gradients, bfloat16: killed once, stopped in an epoch's middle, the same bits."""
    options = {
        **OPTIONS, "model_params.model_name": "resnet20", "prune_params.num_levels": 3, "dist_params.nproc": 2,
        "dist_params.sparse_allreduce": "on", "experiment_params.precision": "bf16",
    }  # fmt: skip
    whole = fork("whole", env=env, timeout=600, **options)
    parts = fork.start("parts", env=env, **options)
    parts.wait_for(lambda: rows_of(parts.path, 1) >= 1, timeout=600)
    parts.kill()
    parts.finish(-signal.SIGKILL)
    fork("parts", env=env, resume=True, trap=StopAt(5), status=143, timeout=600, **options)
    fork("parts", env=env, resume=True, timeout=600, **options).assert_same_figures(whole)


@pytest.mark.slow
def test_no_recompilation_of_resnet20(fork, env):
    options = {**OPTIONS, "model_params.model_name": "resnet20", "experiment_params.training_type": "lrr"}
    out = fork.folder / "counts"
    fork("compiled", env=env, trap=CountGraphs(out), **options)
    check_counts([json.loads(line) for line in out.read_text().splitlines()], graphs=4)


def test_each_size_of_progressive_resizing_has_its_graphs():
    """Torch's own limit is 8; what comes after those runs uncompiled, with a warning."""
    from torch._dynamo.utils import counters

    sizes = range(4, 14)
    net = torch.nn.Flatten()
    counters.clear()
    cfg = make_config({"experiment_params": {"compile": "on"}})
    compile_network(cfg, Context(), net, load_data(cfg, Context()))
    for size in sizes:
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 3 * size * size)
    assert counters["stats"]["unique_graphs"] == len(sizes)


def test_triton_needs_a_compiler(monkeypatch, tmp_path):
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" not in missing_tools()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert "C compiler" in missing_tools()
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert "C compiler" not in missing_tools()
