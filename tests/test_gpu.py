"""Runs on a GPU, each a process of its own. Skipped where there is none; nothing else of the tests needs one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import GPU, ROOT
from tests.traps import StopAt

pytestmark = pytest.mark.skipif(not GPU, reason="no GPU: nothing of the harness was run on one")

ENV = {"CUDA_VISIBLE_DEVICES": GPU, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
OPTIONS = {
    "model_params.model_name": "resnet20",
    "experiment_params.precision": "auto",
    "experiment_params.training_type": "lrr",
    "experiment_params.epochs_per_level": 4,
    "optimizer.warmup_epochs": 1,
}


def in_process(call: str) -> dict:
    """What `call`, a function of this module and its arguments, returns in a new process that sees the GPU."""
    words = [sys.executable, "-c", f"import json; from tests.test_gpu import *; print(json.dumps({call}))"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | ENV, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("compiled", ["off", "auto"])
def test_a_run_learns(fork, compiled):
    run = fork("run", env=ENV, **OPTIONS, **{"experiment_params.compile": compiled})
    what_ran = json.loads((run.path / "artifacts" / "environment.json").read_text())[0]
    assert what_ran["devices"]
    summary = run.csv("summary")
    assert list(summary["density"]) == pytest.approx([1, 0.5, 0.25], abs=1e-4)
    assert summary["final_test_acc"].min() > 80


def test_stopped_and_resumed_runs_are_equal(fork):
    """Deterministic kernels: the same bits."""
    options = {**OPTIONS, "experiment_params.deterministic": True, "experiment_params.compile": "off"}
    whole = fork("whole", env=ENV, **options)
    fork("parts", status=143, env=ENV, trap=StopAt(30), **options)
    fork("parts", env=ENV, resume=True, **options).assert_same_figures(whole)


def test_cuda_graphs_train_as_without(fork):
    options = {**OPTIONS, "experiment_params.precision": "fp32", "experiment_params.compile": "on"}
    plain = fork("plain", env=ENV, **options)
    graphs = fork("graphs", env=ENV, **options, **{"experiment_params.cuda_graphs": True})
    one, other = plain.csv("summary"), graphs.csv("summary")
    assert list(one["density"]) == list(other["density"])
    assert (one["final_test_acc"] - other["final_test_acc"]).abs().max() < 5


def overlaps(device: str) -> dict[str, float]:
    """{method: share of the weights kept on the CPU to 10% that are kept on `device` too}."""
    from utils.conv_type import insert_masks, masked_params
    from utils.models import create_model
    from utils.pruning_utils import CRITERIA, prune

    draws = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 3, 32, 32, generator=draws), torch.randint(10, (64,), generator=draws)

    def kept(where: str, method: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = insert_masks(create_model("resnet20", 10, (3, 32, 32))).to(where, memory_format=torch.channels_last)
        batch = images.to(where, memory_format=torch.channels_last), labels.to(where)
        prune(model, method, 0.1, [batch], torch.Generator().manual_seed(1), rounds=10, dtype=torch.float64)
        return torch.cat([mask.cpu().flatten() for _, _, mask in masked_params(model)])

    found = {}
    for method in CRITERIA:
        here, there = kept("cpu", method), kept(device, method)
        assert here.sum() == there.sum()
        found[method] = (here & there).sum().item() / here.sum().item()
    return found


def test_masks_are_those_of_the_cpu():
    """Magnitude and random methods to the weight; the others, which compute, in float64 but for a rounding at most."""
    for method, share in in_process("overlaps('cuda')").items():
        exact = method == "mag" or "random" in method or method.startswith("er_")
        assert share == 1 if exact else share > 0.999, f"{method}: {share}"


def steps_watched(device: str) -> dict[str, int]:
    """Trains a level's second epoch with every wait for the device forbidden; the number of its steps."""
    from harness import build_model
    from harness_params import load_config
    from utils.dataset import load_data
    from utils.distributed import join
    from utils.training import Trainer

    cfg = load_config(["--model_params.model_name=resnet20", "--experiment_params.compile=off"])
    with join() as ctx:
        assert ctx.device.type == device
        data = load_data(cfg, ctx)
        trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        trainer.train_epoch(0, 0, trainer.new_tally(), lambda steps: False)
        tally = trainer.new_tally()

        def stop(steps: int) -> bool:  # from the first step's end: an epoch's order and draws come from the CPU
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error" if steps < trainer.timeline.steps_per_epoch else "default")
            return False

        trainer.train_epoch(0, 1, tally, stop)
        return {"steps": tally.step}


def test_no_step_waits_for_the_device():
    assert in_process("steps_watched('cuda')")["steps"] == 12
