"""Whether torch.compile pays (experiment_params.compile: auto), what it compiles, and where its kernels are kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from harness_params import make_config
from tests.conftest import ROOT
from utils.dataset import load_data
from utils.distributed import Context
from utils.models import create_model
from utils.runs import resume
from utils.training import compiling
from utils.training.compiling import EVALUATION, PARTS, STEPS
from utils.training.setup import build_model
from utils.training.trainer import Trainer
from utils.training.work import Work, count_work

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: torch.compile did not run on the CPU")

RESNET18 = Work(operations=67, elementwise=1_417_728, moved=0)


# --- work ------------------------------------------------------------------------------------------------------------


def test_work_of_lenet():
    """Three products of 64 x 300, 300 x 100 and 100 x 10, with a ReLU after the first two."""
    work = count_work(create_model("lenet_300_100", 10, (1, 8, 8)), (1, 8, 8))
    assert work == Work(operations=5, elementwise=300 + 100, moved=3 * (64 + 300 + 300 + 100 + 100 + 10))


def test_work_of_convolutions_with_batch_norm():
    """4 channels of 6x6 from 3 of 8x8, normalized, rectified, pooled, classified."""
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(6)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 5))
    convolution, norm, product = 3 * (3 * 64 + 4 * 36), 8 * 4 * 36, 3 * (4 + 5)
    assert count_work(model, (3, 8, 8)) == Work(5, 4 * 36 + 4 * 36 + 4, convolution + norm + product)


@pytest.mark.parametrize("name", ["resnet20", "vit_b_32", "googlenet"])
def test_counting_changes_nothing(name):
    model = create_model(name, 10, (3, 64, 64)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    work = count_work(model, (3, 64, 64))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert work == count_work(model, (3, 64, 64)) and min(work) > 50


def test_work_of_resnet18():
    """The network that the rule's constants were measured on."""
    assert count_work(create_model("resnet18", 10, (3, 32, 32)), (3, 32, 32))[:2] == RESNET18[:2]


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "images", "sizes", "expected"),
    [
        # 4.6 us saved per image and 13.1 s to compile: 26.2 s are 5.69 million images.
        (RESNET18, 5_600_000, 1, False),
        (RESNET18, 5_700_000, 1, True),
        (RESNET18, 12 * 16 * 50_000, 1, True),  # 12 levels of 16 epochs of CIFAR-10: 44 s
        (RESNET18, 16 * 50_000, 1, False),  # one level: 3.7 s
        (RESNET18, 12 * 16 * 50_000, 2, False),  # two sizes of images: 52.4 s
        (Work(67, 400, 0), 10**9, 1, False),  # hardly anything elementwise: 1.3 s
        (Work(134, 1_417_728, 0), 11_300_000, 1, False),  # twice the operations
        (Work(134, 1_417_728, 0), 11_400_000, 1, True),
        (RESNET18, 0, 1, False),
    ],
)
def test_pays(work, images, sizes, expected):
    assert compiling.pays(work, images, sizes) is expected


@given(st.integers(1, 10**4), st.integers(1, 10**8), st.integers(0, 10**10), st.integers(1, 10**10))
def test_what_pays_goes_on_paying(operations, elementwise, images, more):
    work = Work(operations, elementwise, 0)
    assert not compiling.pays(work, images) or compiling.pays(work, images + more)


@pytest.mark.parametrize(
    ("options", "images"),
    [
        # 1,437 training images: 11 batches of 128 and one of 29; 360 test images.
        ({"num_levels": 1, "epochs_per_level": 1}, (1408, 29, 2 * 360)),
        ({"num_levels": 3, "epochs_per_level": 4}, (12 * 1408, 12 * 29, 15 * 360)),
        ({"num_levels": 3, "epochs_per_level": 4, "training_type": "wr"}, (10 * 1408, 10 * 29, 13 * 360)),
        (
            {"num_levels": 3, "epochs_per_level": 4, "training_type": "wr", "rewind_step": 30},
            (8 * 1408, 8 * 29, 11 * 360),
        ),
        ({"num_levels": 1, "epochs_per_level": 4, "eval_every_epochs": 2}, (4 * 1408, 4 * 29, 3 * 360)),
        ({"num_levels": 1, "epochs_per_level": 1, "ema_decay": 0.9}, (1408, 29, 3 * 360)),
        ({"num_levels": 1, "epochs_per_level": 2, "drop_last": True}, (2 * 1408, 0, 3 * 360)),
        ({"num_levels": 1, "epochs_per_level": 1, "batch_size": 479}, (1437, 0, 2 * 360)),
        ({"num_levels": 1, "epochs_per_level": 1, "batch_size": 5000}, (1437, 0, 2 * 360)),
    ],
)
def test_images_of_a_run(options, images):
    """wr starts at epoch 1 in levels 1 and 2, so it trains 4 + 3 + 3 epochs; from step 30, 4 + 2 + 2."""
    sections: dict[str, dict] = {"dataset": {"batch_size": 128}, "prune_params": {"rewind_epoch": 1}}
    of = {"num_levels": "prune_params", "rewind_step": "prune_params", "drop_last": "dataset", "batch_size": "dataset"}
    for key, value in options.items():
        sections.setdefault(of.get(key, "experiment_params"), {})[key] = value
    cfg = make_config({**sections, "optimizer": {"warmup_epochs": 0}})
    assert compiling.images_of(cfg, load_data(cfg, Context())) == dict(zip(PARTS, images))


@pytest.mark.parametrize(
    ("steps", "last", "tests", "parts"),
    [
        (5_000_000, 5_000_000, 5_000_000, ()),
        (9_600_000, 64_512, 1_920_000, (STEPS,)),
        (50_000_000, 300_000, 10_000_000, (STEPS, EVALUATION)),
        (5_000_000_000, 30_000_000, 1_000_000_000, PARTS),
        (5_000_000, 0, 50_000_000, ()),  # evaluation alone is not compiled
    ],
)
def test_parts_that_pay(steps, last, tests, parts):
    assert compiling.parts_that_pay(RESNET18, dict(zip(PARTS, (steps, last, tests)))) == parts


def test_the_decision_is_explained():
    assert compiling.explain(RESNET18, 9_600_000, (STEPS,)) == (
        "compiles training steps (not last batches, evaluation: too few images): on 9,600,000 images it saves about "
        "44 s, and costs about 13 s"
    )
    assert compiling.explain(RESNET18, 800_000, ()) == (
        "is off here: on 800,000 images it saves about 4 s, and costs about 13 s"
    )


# --- what is compiled ------------------------------------------------------------------------------------------------


def auto_trainer(monkeypatch, device_allows: bool, **options) -> Trainer:
    """A trainer with compile: auto on Digits, on a device where compiling is possible, or on this CPU."""
    if device_allows:
        monkeypatch.setattr(compiling, "_not_on_a_gpu", lambda cfg, ctx: "")
    cfg = make_config({"experiment_params": {"precision": "fp32", **options}, "dataset": {"batch_size": 500}})
    data = load_data(cfg, Context())
    return Trainer(cfg, Context(), build_model(cfg, data, Context()), data)


def test_auto_is_off_on_a_cpu(monkeypatch, capsys):
    trainer = auto_trainer(monkeypatch, False, epochs_per_level=10**6)
    assert trainer.compiled == () and "forward" not in vars(trainer.model) and capsys.readouterr().err == ""


def test_auto_is_off_in_a_short_run(monkeypatch, capsys):
    assert auto_trainer(monkeypatch, True).compiled == ()
    assert "compile: auto is off here: on " in capsys.readouterr().err


def surroundings_of(trainer: Trainer, **changes) -> dict:
    return {"surroundings": {**resume.surroundings(trainer.cfg, trainer), **changes}, "level": 0}


@pytest.mark.parametrize(("recorded", "parts"), [("training steps, evaluation", (STEPS, EVALUATION)), ("nothing", ())])
def test_a_resumed_run_keeps_what_auto_decided(monkeypatch, capsys, recorded, parts):
    """Also where it would decide otherwise: with more levels, or on code that weighs otherwise."""
    monkeypatch.setattr(compiling, "parts_that_pay", lambda *_, **__: () if parts else PARTS)
    trainer = auto_trainer(monkeypatch, True)
    assert trainer.compiled == (() if parts else PARTS)
    resume.keep_auto(trainer.cfg, trainer, surroundings_of(trainer, compiled=recorded))
    assert trainer.compiled == parts and ("forward" in vars(trainer.model)) == bool(parts)
    assert trainer.model._compiled_call_impl is None
    here = "nothing" if parts else ", ".join(PARTS)
    told = f"compile: auto stays {recorded}, which it was where the run began; here it would be {here}"
    assert told in capsys.readouterr().err


def test_a_resumed_run_decides_anew_where_nothing_was_decided(monkeypatch):
    """Saved by older code; begun with another option; or on a machine that cannot compile."""
    trainer = auto_trainer(monkeypatch, True)
    state = surroundings_of(trainer, compiled="training steps")
    for changes in ({"compile": "on"}, {"compile": "off"}):
        resume.keep_auto(trainer.cfg, trainer, surroundings_of(trainer, compiled="training steps", **changes))
        assert trainer.compiled == ()
    older = surroundings_of(trainer)
    del older["surroundings"]["compiled"]
    resume.keep_auto(trainer.cfg, trainer, older)
    resume.keep_auto(trainer.cfg, trainer, {"level": 0})
    monkeypatch.setattr(compiling, "_not_on_a_gpu", lambda cfg, ctx: "there is no GPU")
    resume.keep_auto(trainer.cfg, trainer, state)
    assert trainer.compiled == () and "forward" not in vars(trainer.model)


@needs_compiler
def test_auto_compiles_whole_batches_alone(monkeypatch, capsys, tmp_path):
    """500, 500 and 437 images: one graph; the last batch and evaluation give the plain network's bits."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "parts_that_pay", lambda *_, **__: (STEPS,))
    trainer = auto_trainer(monkeypatch, True)
    assert "compile: auto compiles training steps (not last batches, evaluation: too" in capsys.readouterr().err
    names, plain = list(trainer.model.state_dict()), auto_trainer(monkeypatch, False)
    counters.clear()
    assert trainer.train_epoch(0, 0, trainer.new_tally(), stop=lambda steps: False)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(trainer.model.state_dict()) == names == list(plain.model.state_dict())
    plain.model.load_state_dict(trainer.model.state_dict())
    assert plain.evaluate() == trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == 1


# --- where kernels are kept ------------------------------------------------------------------------------------------


@pytest.fixture
def no_folder(monkeypatch):
    """The user has set no folder; torch has set its own when it was imported. What a test sets is undone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize(
    ("xdg", "folder"),
    [("{}/cache", "cache/torchinductor"), ("", ".cache/torchinductor"), ("relative", ".cache/torchinductor")],
)
def test_kernels_are_kept_in_the_cache_folder(monkeypatch, tmp_path, xdg, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg.format(tmp_path))
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / folder)
    assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("no_folder")
def test_the_users_own_folder_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere" and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_folder")
def test_a_home_that_cannot_be_written_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # no folder can be made in a file, also not by root
    compiling.keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


STEP = """
import json
import torch
from harness_params import make_config
from utils.dataset import load_data
from utils.distributed import Context
from utils.training.compiling import compile_network

cfg = make_config({"experiment_params": {"compile": "on"}})
network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
compile_network(cfg, Context(), network, load_data(cfg, Context()))
network(torch.ones(4, 8)).sum().backward()
from torch._dynamo.utils import counters
print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
"""


@pytest.mark.slow
@needs_compiler
def test_a_second_process_finds_the_kernels(tmp_path):
    """Through the default folder: nothing is compiled again, neither by inductor nor by AOTAutograd."""
    env = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    Path(env["TMPDIR"]).mkdir()
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(SimpleNamespace(**json.loads(done.stdout.splitlines()[-1])))
    first, second = found
    assert first.fxgraph_cache_miss == 2 and first.autograd_cache_miss == 1
    assert second.fxgraph_cache_hit == 2 and second.autograd_cache_hit == 1
    assert not hasattr(second, "fxgraph_cache_miss") and not hasattr(second, "autograd_cache_miss")
    assert list((tmp_path / "torchinductor").iterdir())
