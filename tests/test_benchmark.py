"""The benchmark's table comes out; what it says of speed is no test's business."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harness_params import make_config
from tests.benchmarks import gpu_figures
from tests.conftest import ROOT
from utils import benchmark
from utils.bench import contenders, memory, usual_harness
from utils.bench.arithmetic import step_bytes, step_flops
from utils.data import published
from utils.data.in_memory import MemoryTrainLoader
from utils.distributed import Context
from utils.errors import RunError
from utils.training.graphs import WARM_UP


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.benchmark", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_table():
    done = run("--rounds=1", "--steps=2", "--dataset.num_workers=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "threads of each: ours 1, plain loop" in lines[1], "ours is a small MLP"
    assert f"torch {torch.__version__}" in lines[1] and "core(s)" in lines[0]
    assert lines[2].startswith("lenet_300_100 on Digits (1437 images), batch 128")
    assert "n = 1 rounds" in lines[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "ours", "plain loop", "usual harness", "ours / plain", "ours / usual"]
    assert [row[0] for row in rows[2:]] == [
        "training step (one batch, 2 steps), images/s", rows[3][0], rows[4][0], "an epoch's training, images/s",
        "between two levels, s", "- checkpoint handed over, s", "- prune and evaluate, s", "- rewind, s",
        "- first batch, s",
        "peak resident memory, without loader workers, MB",
    ]  # fmt: skip
    number = r"[\d.e-]+"
    of_matmul = rf"step, share of matmul rate \({number} TFLOP/s, b?float\d+; 0\.263 MFLOP per image\), %"
    assert re.fullmatch(of_matmul, rows[3][0])
    of_copies = rf"step, share of copy rate \({number} TB/s, read and written; {number} MB per image\), %"
    assert re.fullmatch(of_copies, rows[4][0])
    for row in (*rows[2:6], rows[-1]):
        assert all(float(cell.rstrip("x").replace(",", "")) >= 0 for cell in row[1:])
    assert float(rows[6][3]) > 0 and rows[6][2] == rows[6][4] == ""


def test_parts_are_skipped():
    done = run("--rounds=1", "--steps=2", "--skip=usual,levels,memory")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")
    ]
    assert rows[0] == ["", "ours", "plain loop", "ours / plain"]
    assert [row[0].partition(" (")[0] for row in rows[2:]] == [
        "training step", "step, share of matmul rate", "step, share of copy rate", "an epoch's training, images/s",
    ]  # fmt: skip


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--skip=usual,speed"])
    assert end.value.code == 2 and "'speed' is not allowed: usual, levels, memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer.lr=-1"], "benchmark: optimizer.lr: -1"),
        (
            ["--dataset.dataset_name=ImageNet"],
            "benchmark: dataset.dataset_name: ImageNet is a tree of files; give --syn",
        ),
        (["--dataset.batch_size=2000"], "benchmark: dataset.batch_size: 2000 makes an epoch of one step"),
        (["--optimizer.grad_clip=1"], "benchmark: optimizer.grad_clip: 1.0: the other contenders have none"),
        (["--optimizer.optimizer_name=adam"], "benchmark: optimizer.optimizer_name: adam is not allowed here: all"),
        (["--dist_params.nproc=2"], "benchmark: dist_params.nproc: 2 is not started from here: torchrun --nproc"),
    ],
)
def test_faults_are_told_in_a_line(words, line, capsys):
    assert benchmark.main(words) == 2
    printed = capsys.readouterr()
    *notes, last = printed.err.splitlines()
    assert printed.out == "" and last.startswith(line) and all("note: " in note for note in notes)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN", "FashionMNIST"])
def test_without_data_and_network_a_line_says_so(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(published, "DOWNLOAD_TIMEOUT_SECONDS", 1)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("no_proxy", "")
    where = [f"--dataset.dataset_name={name}", f"--dataset.data_root={tmp_path / 'none'}"]
    for words, fault in (
        ([], f"the download of {name} failed ("),
        (["--dataset.download=false"], f"dataset.data_root: {name} has no "),
    ):
        assert benchmark.main([*where, *words]) == 1
        *notes, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"benchmark: {fault}") and all("note: " in note for note in notes)


def test_a_part_that_fails_is_told_in_a_line(tmp_path, monkeypatch):
    """Its process runs in the user's folder: a relative path means there what it means here."""
    monkeypatch.chdir(tmp_path)
    words = ["--dataset.dataset_name=MNIST", "--dataset.data_root=here", "--dataset.download=false"]
    with pytest.raises(RunError) as caught:
        memory.peak_memory(words, [contenders.OURS])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        "measuring the memory of ours failed: benchmark: dataset.data_root: MNIST has no "
    )
    assert str(tmp_path / "here") in str(caught.value)


def test_all_contenders_train_the_same_number_of_images():
    """On images of random pixels; the networks with masks are at the density that is printed."""
    cfg = make_config({
        "model_params": {"model_name": "resnet20"}, "dataset": {"dataset_name": "CIFAR10", "batch_size": 16},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip
    ctx = Context()
    data, arrays = benchmark.load(cfg, ctx, synthetic=40)
    made, _ = benchmark.contenders(cfg, ctx, data, arrays, steps=3, epoch_steps=3)
    assert list(made) == ["ours", "plain loop", "usual harness"]
    for timed in made.values():
        assert [timed[what]()[0] for what in ("step", "epoch")] == [48, 40]  # 16 + 16 + 8 images make an epoch


def test_a_round_of_ours_draws_one_epoch(monkeypatch):
    """As an epoch of a run: the next one's draws are made while the device is at work, and used."""
    cfg = make_config({"dataset": {"dataset_name": "Digits"}, "experiment_params": {"epochs_per_level": 3}})
    ctx = Context()
    data, arrays = benchmark.load(cfg, ctx, synthetic=200)
    made, _ = benchmark.contenders(cfg, ctx, data, arrays, steps=1, epoch_steps=2, names=["ours"])
    drawn, plain = [], MemoryTrainLoader._draw
    monkeypatch.setattr(MemoryTrainLoader, "_draw", lambda self, *words: drawn.append(words[:2]) or plain(self, *words))
    for _ in range(5):
        made["ours"]["epoch"]()
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_rounds_that_warm_up():
    """With CUDA graphs, whole batches are captured in the first round, and the one smaller batch in the fourth."""
    calls = []

    def timed():
        calls.append(1)
        return len(calls), 1.0

    found = contenders.images_per_second(Context(), {"ours": {"epoch": timed}}, "epoch", 2)
    assert found == {"ours": [2.0, 3.0]}
    assert contenders.warm_up_rounds(["ours", "plain loop"]) == 1
    assert contenders.warm_up_rounds(["ours", "ours, no graphs", "plain loop"]) == WARM_UP + 1
    assert gpu_figures.WARM_UP == WARM_UP + 1


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_each_contender_has_its_own_threads(monkeypatch):
    """Ours takes one for a small MLP; that must not slow the others down, the level's subprocess included."""
    cfg, ctx, seen = make_config({"dataset": {"dataset_name": "Digits", "num_workers": 0}}), Context(), []
    data, arrays = benchmark.load(cfg, ctx, synthetic=0)
    made, threads = benchmark.contenders(cfg, ctx, data, arrays, steps=1, epoch_steps=1)
    assert threads == {"ours": 1, "plain loop": 2, "usual harness": 2}
    for what in ("step", "epoch"):
        for name in (*made, *reversed(made)):
            made[name][what]()
            assert torch.get_num_threads() == threads[name]
    torch.set_num_threads(2)
    monkeypatch.setattr(benchmark.level_change, "ours", lambda *_: seen.append(torch.get_num_threads()) or [])
    monkeypatch.setattr(benchmark.level_change, "usual", lambda settings, *_: seen.append(settings["threads"]) or [])
    monkeypatch.setattr(benchmark, "peak_memory", lambda argv, names: {"ours": []})
    list(benchmark.measure(cfg, ctx, SimpleNamespace(synthetic=0, steps=1, epoch_steps=1, rounds=1, skip=()), []))
    assert seen == [2, 2]


def test_all_contenders_have_the_same_network():
    cfg = make_config({
        "model_params": {"model_name": "resnet18", "blurpool": True},
        "dataset": {"dataset_name": "ImageFolder", "resolution": 32, "num_classes": 3, "batch_size": 2},
    })  # fmt: skip
    ctx = Context()
    data, _ = benchmark.load(cfg, ctx, synthetic=4)
    usual = usual_harness.make_model(contenders.usual_settings(cfg, data), ctx.device)
    for model in (contenders.Ours(cfg, ctx, data).trainer.model, contenders.PlainLoop(cfg, ctx, data).model, usual):
        assert sum(hasattr(module, "blur_kernel") for module in model.modules()) == 6


def test_plain_loop_is_compiled_as_ours_is(monkeypatch):
    """Also where its memory is measured."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **_: asked.append(model))
    for option in ("off", "on"):
        cfg = make_config({"dataset": {"dataset_name": "Digits"}, "experiment_params": {"compile": option}})
        memory.train_alone(cfg, Context(), "plain loop", synthetic=0)
        assert len(asked) == (option == "on")


def test_the_peak_is_of_training_not_of_loading(monkeypatch):
    load = memory.load

    def load_at_a_cost(*args):
        np.ones(250_000_000, dtype=np.uint8).sum()
        return load(*args)

    peaks = []
    for loading in (load, load_at_a_cost):
        monkeypatch.setattr(memory, "load", loading)
        cfg = make_config({"dataset": {"dataset_name": "Digits"}})
        peaks.append(memory.train_alone(cfg, Context(), "ours", synthetic=0))
    assert min(peaks) > 50 and abs(peaks[1] - peaks[0]) < 100


def test_trees_in_memory_are_measured(tmp_path):
    for number in range(6):
        folder = tmp_path / ("train" if number < 4 else "val") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 40 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    options = {"dataset_name": "ImageFolder", "data_root": str(tmp_path), "loader": "memory", "batch_size": 2}
    data, (images, labels) = benchmark.load(make_config({"dataset": options}), Context(), synthetic=0)
    assert data.image_shape == (3, 16, 16) and labels.tolist() == [0, 0, 1, 1]
    assert (images == 40 * np.array([0, 2, 1, 3])[:, None, None, None]).all() and images.shape == (4, 16, 16, 3)


def test_flops_of_a_step():
    """LeNet-300-100 on 8x8 images, by hand: forward, gradients of weights and, but for the first layer, of inputs."""
    cfg = make_config({"dataset": {"dataset_name": "Digits"}})
    data, _ = benchmark.load(cfg, Context(), synthetic=0)
    first, others = 64 * 300, 300 * 100 + 100 * 10
    assert step_flops(cfg, data) == 2 * (2 * first + 3 * others)


def test_bytes_of_a_step():
    """The same network: 3 times the inputs and outputs of its products, and 24 bytes of each weight per 128 images."""
    cfg = make_config({"dataset": {"dataset_name": "Digits", "batch_size": 128}})
    data, _ = benchmark.load(cfg, Context(), synthetic=0)
    moved, weights = 3 * (64 + 300 + 300 + 100 + 100 + 10), 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert step_bytes(cfg, data, torch.bfloat16) == 2 * moved + 24 * weights / 128
    assert step_bytes(cfg, data, None) == 4 * moved + 24 * weights / 128


def test_contenders_on_a_gpu():
    """Ours without graphs is one of them only where there can be graphs."""
    gpu, cfg = Context(device=torch.device("cuda")), make_config({})
    assert contenders.names_on(cfg, Context()) == ("ours", "plain loop", "usual harness")
    assert contenders.names_on(cfg, gpu) == ("ours", "ours, no graphs", "plain loop", "usual harness")
    assert contenders.names_on(contenders.without_graphs(cfg), gpu, ["usual harness"]) == ("ours", "plain loop")


@pytest.mark.parametrize(
    ("found", "cells"),
    [
        (
            {"ours": [10.0, 30.0, 20.0], "plain loop": [20.0, 20.0, 20.0]},
            ["20.00 (10.00-30.00)", "20.00 (20.00-20.00)"],
        ),
        ({"ours": [1000.0]}, ["1,000", ""]),
    ],
)
def test_rows(found, cells):
    assert benchmark.row("what", found, "unit").split(" | ")[1:3] == cells


def test_ratios_are_of_one_round():
    found = {"ours": [10.0, 30.0, 20.0], "plain loop": [20.0, 20.0, 10.0], "usual harness": [5.0]}
    assert benchmark.row("what", found, "s").rstrip(" |").split(" | ")[-2:] == ["1.50x", "2.00x"]
    assert benchmark.row("what", found, "s", smaller=True).rstrip(" |").split(" | ")[-2:] == ["0.67x", "0.50x"]
