"""Runs on a GPU, each a process of its own. Skipped where torch finds none, failed there with REQUIRE_GPU=1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness_params import make_config
from tests.conftest import ROOT, SMALL, Finished, Launcher
from utils.dataset import load_data
from utils.distributed import Context
from utils.training.setup import build_model
from utils.training.trainer import Trainer

OPTIONS = {
    "model_params.model_name": "resnet20",
    "experiment_params.precision": "bf16",
    "experiment_params.training_type": "lrr",
    "experiment_params.epochs_per_level": 4,
    "experiment_params.compile": "off",
    "experiment_params.deterministic": True,
    "optimizer.warmup_epochs": 1,
}
GRAPHS, NO_GRAPHS = {"experiment_params.cuda_graphs": "on"}, {"experiment_params.cuda_graphs": "off"}
COMPILED = {"experiment_params.compile": "on"}
TRAPPED = """
import sys
from tests.traps import *
import harness
trap = {trap}
trap()
status = harness.main(sys.argv[1:])
sys.exit(UNMET if unmet(trap) else status)
"""


class OnGpu:
    """Starts processes that see the GPU. Not forks: a process that has asked for GPUs cannot share them with those.

    Args:
        kernels: folder of compiled kernels, the same for all tests.
    """

    def __init__(self, launch: Launcher, gpu: str, kernels: Path):
        self.launch = launch
        self.env = {
            "CUDA_VISIBLE_DEVICES": gpu, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_CACHE_DIR": str(kernels),
        }  # fmt: skip

    def start(self, name: str, resume: bool = False, trap: str = "", **options) -> subprocess.Popen:
        """A run called `name`, or its continuation; `trap` is an expression of tests/traps.py."""
        options = {**OPTIONS, **options}
        if resume:
            options |= {"experiment_params.expt_name": None, "experiment_params.resume_expt_name": name}
        if trap:
            options["program"] = ("-c", TRAPPED.format(trap=trap))
        return self.launch.start(name, env=self.env, **options)

    def __call__(self, name: str, status: int = 0, **more) -> Finished:
        done = self.launch.finish(name, self.start(name, **more))
        assert done.status == status, f"exit {done.status}\n{done.out}\n{done.err}"
        return done

    def answer(self, call: str) -> dict:
        """What `call`, a function of tests/gpu_process.py and its arguments, returns in a new process."""
        words = [sys.executable, "-c", f"import json; from tests.gpu_process import *; print(json.dumps({call}))"]
        done = subprocess.run(words, env=os.environ | self.env, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def on_gpu(launch, gpu, tmp_path_factory) -> OnGpu:
    base = tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    return OnGpu(launch, gpu, kernels)


# First, since it takes longest.
def test_compiled_runs_are_equal_with_graphs_and_resumed(on_gpu):
    """Compiled in bfloat16: as graphs, launch by launch, and stopped in the middle of an epoch."""
    whole = on_gpu("whole", **COMPILED, **GRAPHS)
    assert whole.csv("summary")["final_test_acc"].min() > 80
    on_gpu("parts", trap="StopAt(30)", status=143, **COMPILED, **GRAPHS)
    on_gpu("parts", resume=True, **COMPILED, **GRAPHS).assert_same_figures(whole)
    on_gpu("launches", **COMPILED, **NO_GRAPHS).assert_same_figures(whole)


def test_a_run_learns(on_gpu):
    """Every option that this part of the program decides by itself left to it; what auto decided is told."""
    auto = {f"experiment_params.{key}": "auto" for key in ("precision", "compile", "cuda_graphs")}
    run = on_gpu("run", **auto, **{"experiment_params.deterministic": False})
    assert json.loads((run.path / "artifacts" / "environment.json").read_text())[0]["devices"]
    assert list(run.csv("summary")["density"]) == pytest.approx([1, 0.5, 0.25], abs=1e-4)
    assert run.csv("summary")["final_test_acc"].min() > 80
    assert "note: experiment_params.compile: auto is off here: on 16,896 images it saves about 0 s" in run.err


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["imp", "wr", "lrr"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_train_as_without(on_gpu, precision, kind):
    """Three levels, each with a smaller last batch: weights, masks and every figure, evaluation's among them."""
    options = {
        "experiment_params.precision": precision, "experiment_params.training_type": kind,
        "prune_params.rewind_epoch": 1,
    }  # fmt: skip
    on_gpu("graphs", **options, **GRAPHS).assert_same_figures(on_gpu("launches", **options, **NO_GRAPHS))


@pytest.mark.parametrize(
    "option",
    [
        {"optimizer.grad_clip": 0.5},
        {"dataset.augment": "crop_flip", "dataset.alternate_flip": True, "optimizer.nesterov": True},
        {"optimizer.no_decay_bn": True, "optimizer.label_smoothing": 0.1, "experiment_params.channels_last": False},
        {"optimizer.optimizer_name": "adam", "optimizer.lr": 2e-3, "optimizer.grad_clip": 0.5},
        {"optimizer.optimizer_name": "adamw", "optimizer.lr": 2e-3, "optimizer.no_decay_bn": True},
    ],
    ids=["clipped", "augmented", "smoothed", "adam", "adamw"],
)
def test_options_of_the_step_are_captured(on_gpu, option):
    levels = {"prune_params.num_levels": 2}
    on_gpu("graphs", **levels, **option, **GRAPHS).assert_same_figures(
        on_gpu("launches", **levels, **option, **NO_GRAPHS)
    )


@pytest.mark.parametrize("graphs", [GRAPHS, NO_GRAPHS], ids=["graphs", "launches"])
def test_stopped_and_resumed_runs_are_equal(on_gpu, graphs):
    """Stopped in the third epoch of level 0, and again a few steps later."""
    whole = on_gpu("whole", **graphs)
    on_gpu("parts", trap="StopAt(30)", status=143, **graphs)
    on_gpu("parts", resume=True, trap="StopAt(7)", status=143, **graphs)
    on_gpu("parts", resume=True, **graphs).assert_same_figures(whole)


def test_dropout_draws_on_where_it_stopped(on_gpu):
    """Random numbers within a graph: those of the whole run, also after a stop in the middle of an epoch."""
    whole = on_gpu("whole", trap="Dropout()", **GRAPHS)
    on_gpu("parts", trap="Both(Dropout(), StopAt(30))", status=143, **GRAPHS)
    on_gpu("parts", resume=True, trap="Dropout()", **GRAPHS).assert_same_figures(whole)
    plain = on_gpu("without", **GRAPHS)
    assert list(plain.csv("summary")["final_test_loss"]) != list(whole.csv("summary")["final_test_loss"])


@pytest.mark.parametrize("level", [1, 2])
def test_a_state_is_of_one_moment(on_gpu, level):
    """States are copied while training goes on. Killed once `level` has begun, the run goes on from one of them."""
    options = {**GRAPHS, "experiment_params.save_every_epochs": 1, "experiment_params.epochs_per_level": 8}
    whole = on_gpu("whole", **options)
    on_gpu("parts", trap=f"KillAfterWrite('level_{level}_metrics.csv', 3)", status=-9, **options)
    on_gpu("parts", resume=True, **options).assert_same_figures(whole)


def test_rewinding_into_an_epoch_by_graphs(on_gpu):
    """Levels 1 and 2 begin with the sixth step of an epoch; every second epoch is evaluated."""
    options = {
        "experiment_params.training_type": "wr", "experiment_params.eval_every_epochs": 2,
        "prune_params.rewind_step": 17,
    }  # fmt: skip
    on_gpu("graphs", **options, **GRAPHS).assert_same_figures(on_gpu("launches", **options, **NO_GRAPHS))


def test_a_snapshot_is_taken_in_the_order_of_the_device(on_gpu):
    assert on_gpu.answer("snapshot_behind_work()")


# --- what runs -------------------------------------------------------------------------------------------------------


def test_evaluation_is_that_of_the_cpu(on_gpu):
    """The checkpoint evaluated on the CPU; convolutions on the GPU are of TF32."""
    run = on_gpu("run", **GRAPHS, **{"experiment_params.precision": "fp32"})
    sections: dict[str, dict] = {}
    for path, value in {**SMALL, **OPTIONS, "experiment_params.precision": "fp32"}.items():
        section, _, key = path.partition(".")
        sections.setdefault(section, {})[key] = value
    cfg, ctx = make_config(sections), Context()
    data = load_data(cfg, ctx)
    trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
    for level, row in run.csv("summary").iterrows():
        trainer.model.load_state_dict(run.checkpoint(f"level_{level}"))
        loss, accuracy = trainer.evaluate()
        assert accuracy == pytest.approx(row["final_test_acc"], abs=0.6)  # two images of 360
        assert loss == pytest.approx(row["final_test_loss"], rel=0.02)


def test_graphs_are_refused_with_a_loss_scale(on_gpu):
    done = on_gpu("run", status=2, **GRAPHS, **{"experiment_params.precision": "fp16"})
    assert "experiment_params.cuda_graphs: " in done.err and "fp16" in done.err and not done.path.exists()


def test_half_precision_runs_launch_by_launch(on_gpu):
    """cuda_graphs: auto with a loss scale."""
    run = on_gpu("run", **{"experiment_params.precision": "fp16", "experiment_params.cuda_graphs": "auto"})
    assert "note: experiment_params.cuda_graphs: auto is off here: precision is fp16" in run.err
    assert run.csv("summary")["final_test_acc"].min() > 80


def test_masks_are_those_of_the_cpu(on_gpu):
    """Magnitude and random methods to the weight; the others, which compute, in float64 but for a rounding at most."""
    for method, share in on_gpu.answer("overlaps('cuda')").items():
        exact = method == "mag" or "random" in method or method.startswith("er_")
        assert share == 1 if exact else share > 0.999, f"{method}: {share}"


WATCHED = [
    ("bf16", "on", "0"), ("fp32", "on", "1"), ("bf16", "off", "0"), ("fp16", "off", "0"), ("bf16", "off", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("precision", "graphs", "clip"), WATCHED)
def test_no_step_waits_for_the_device(on_gpu, precision, graphs, clip):
    options = {"experiment_params.precision": precision, "experiment_params.cuda_graphs": graphs}
    words = [f"--{key}={value}" for key, value in {**options, "optimizer.grad_clip": clip}.items()]
    assert on_gpu.answer(f"steps_watched('cuda', *{words!r})")["steps"] == 12
