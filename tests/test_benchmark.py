"""The benchmark's table comes out; what it says of speed is no test's business."""

import subprocess
import sys

import pytest
import torch

from harness_params import make_config
from tests.conftest import ROOT
from utils import benchmark
from utils.distributed import Context


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.benchmark", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_table():
    done = run("--rounds=1", "--steps=2", "--dataset.num_workers=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in lines[1] and "core(s)" in lines[0]
    assert lines[2].startswith("lenet_300_100 on Digits (1437 images), batch 128")
    assert "n = 1 rounds" in lines[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "ours", "plain loop", "usual harness", "ours / plain", "ours / usual"]
    assert [row[0] for row in rows[2:]] == [
        "training step (one batch, 2 steps), images/s", "the first 2 of 12 steps of an epoch, images/s",
        "between two levels, s", "- checkpoint handed over, s", "- prune, s", "- rewind, s", "- first batch, s",
        "peak resident memory, without loader workers, MB",
    ]  # fmt: skip
    for row in (rows[2], rows[3], rows[-1]):
        assert all(float(cell.rstrip("x").replace(",", "")) > 0 for cell in row[1:])
    assert float(rows[4][3]) > 0 and rows[4][2] == rows[4][4] == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer.lr=-1"], "benchmark: optimizer.lr: -1"),
        (["--dataset.dataset_name=ImageNet"], "benchmark: dataset.dataset_name: ImageNet is a tree of files; measured"),
    ],
)
def test_faults_are_told_in_a_line(words, line, capsys):
    assert benchmark.main(words) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(line) and len(told.err.splitlines()) == 1


def test_all_contenders_train_the_same_number_of_images():
    """On images of random pixels; the networks with masks are at the density that is told."""
    cfg = make_config({
        "model_params": {"model_name": "resnet20"}, "dataset": {"dataset_name": "CIFAR10", "batch_size": 16},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip
    ctx = Context()
    data, arrays = benchmark.load(cfg, ctx, synthetic=40)
    made = benchmark.contenders(cfg, ctx, data, arrays, steps=3)
    for timed in made.values():
        assert [timed[what]()[0] for what in ("step", "epoch")] == [48, 40]  # 16 + 16 + 8 images make an epoch


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
