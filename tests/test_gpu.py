"""Runs on a GPU, each a process of its own. Skipped where there is none; nothing else of the tests needs one."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import GPU, ROOT
from tests.traps import Both, Dropout, StopAt
from utils.runs.snapshots import Snapshot

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
    # The variables are set after the import, which hides the GPU, as it does from the tests.
    program = f"import json, os; from tests.test_gpu import *; os.environ.update(ENV); print(json.dumps({call}))"
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """Kernels are compiled once for all tests here."""
    return ENV | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))}


@pytest.mark.parametrize("compiled", ["off", "auto"])
def test_a_run_learns(fork, env, compiled):
    run = fork("run", env=env, **OPTIONS, **{"experiment_params.compile": compiled}, timeout=600)
    what_ran = json.loads((run.path / "artifacts" / "environment.json").read_text())[0]
    assert what_ran["devices"]
    summary = run.csv("summary")
    assert list(summary["density"]) == pytest.approx([1, 0.5, 0.25], abs=1e-4)
    assert summary["final_test_acc"].min() > 80


@pytest.mark.parametrize("compiled", ["off", "auto"])
def test_stopped_and_resumed_runs_are_equal(fork, env, compiled):
    """Deterministic kernels: the same bits."""
    options = {**OPTIONS, "experiment_params.deterministic": True, "experiment_params.compile": compiled}
    whole = fork("whole", env=env, timeout=600, **options)
    fork("parts", env=env, trap=StopAt(30), status=143, timeout=600, **options)
    fork("parts", env=env, resume=True, timeout=600, **options).assert_same_figures(whole)


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_train_as_without(fork, env, compiled, precision):
    """Deterministic kernels: the same bits, also after a stop in the middle of an epoch; with dropout."""
    options = {
        **OPTIONS, "experiment_params.precision": precision, "experiment_params.compile": compiled,
        "experiment_params.deterministic": True, "optimizer.grad_clip": 1.0,
    }  # fmt: skip
    plain = fork("plain", env=env, timeout=600, trap=Dropout(), **options, **{"experiment_params.cuda_graphs": "off"})
    options["experiment_params.cuda_graphs"] = "on"
    fork("graphs", env=env, trap=Both(Dropout(), StopAt(30)), status=143, timeout=600, **options)
    resumed = fork("graphs", env=env, resume=True, timeout=600, trap=Dropout(), **options)
    resumed.assert_same_figures(plain)


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


def steps_watched(device: str, *words: str) -> dict[str, int]:
    """Trains the second epoch of a pruned network with every wait for the device forbidden; the number of its steps."""
    from harness_params import load_config
    from utils.dataset import load_data
    from utils.distributed import join
    from utils.pruning_utils import prune
    from utils.training.setup import build_model
    from utils.training.trainer import Trainer

    cfg = load_config(["--model_params.model_name=resnet20", "--experiment_params.compile=off", *words])
    with join() as ctx:
        assert ctx.device.type == device
        data = load_data(cfg, ctx)
        trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
        prune(trainer.model, "mag", 0.2)
        trainer.train_epoch(0, 0, trainer.new_tally(), lambda steps: False)
        tally = trainer.new_tally()

        def stop(steps: int) -> bool:  # from the first step's end: an epoch's order and draws come from the CPU
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error" if steps < trainer.timeline.steps_per_epoch else "default")
            return False

        trainer.train_epoch(0, 1, tally, stop)
        return {"steps": tally.step}


@pytest.mark.parametrize("option", ["experiment_params.precision=bf16", "experiment_params.precision=fp16",
                                    "experiment_params.cuda_graphs=off",
                                    "optimizer.grad_clip=1"])  # fmt: skip
def test_no_step_waits_for_the_device(option):
    assert in_process(f"steps_watched('cuda', '--{option}')")["steps"] == 12


def snapshot_behind_work() -> bool:
    """A snapshot taken while the device is busy, of tensors that are overwritten before it has been copied."""
    weight, mask = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, device="cuda", dtype=torch.bool)
    factor = torch.eye(4096, device="cuda")
    for _ in range(50):
        weight = weight @ factor + 1
    snapshot = Snapshot({"weight": weight, "optimizer": [mask, torch.arange(3), 0.5]})
    weight.fill_(-1)
    mask.fill_(False)
    content = snapshot.content()
    copied, step, rate = content["optimizer"]
    same = bool((content["weight"] == 50).all() and copied.all()) and step.tolist() == [0, 1, 2] and rate == 0.5
    return same and content["weight"].is_pinned() and copied.is_pinned()


def test_a_snapshot_is_taken_in_the_order_of_the_device():
    assert in_process("snapshot_behind_work()")
