"""The yardstick of accuracy compares what it says it compares; what comes out of it is no test's business."""

import ast
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST

from tests.benchmarks import accuracy, plain_recipe
from tests.benchmarks.accuracy import HARNESS, PLAIN, SETTINGS
from tests.conftest import ROOT
from tests.data_helpers import idx_files
from utils.models import create_model


@pytest.fixture
def tree(tmp_path):
    """Random 32x32 images: three classes of 5 + 3, and one that has training images only."""
    random = np.random.default_rng(0)
    for split, count, classes in (("train", 5, "abcd"), ("test", 3, "abc")):
        for name in classes:
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return tmp_path / "tree"


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_end_to_end(tree, tmp_path):
    out = tmp_path / "results.csv"
    program = [sys.executable, "tests/benchmarks/accuracy.py", "--networks", "resnet20", f"--tree={tree}"]
    options = ["--images=4", "--test_images=2", "--epochs=1", "--seeds=1", "--jobs=2", f"--out={out}"]
    done = subprocess.run([*program, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = accuracy.read(out)
    assert {row["contender"] for _, row in rows} == {PLAIN, HARNESS}
    assert {setting for setting, _ in rows} == {replace(SETTINGS["resnet20"], images=4, test_images=2, epochs=1)}
    sixths = [100 * n / 6 for n in range(7)]
    assert all(min(abs(row[level] - a) for a in sixths) < 1e-6 for _, row in rows for level in ("dense", "pruned"))
    head, _, dense, pruned = cells(done.stdout.splitlines())
    assert len(head) == len(dense) == 9
    assert dense[:4] == ["resnet20", dense[1], "100%", "1"] and pruned[2] == "20%"
    assert dense[-1] == "-", "one seed has no standard deviation"


def test_an_interrupted_yardstick_goes_on(tree, tmp_path, monkeypatch, capsys):
    out, ran = tmp_path / "results.csv", []

    def contend(contender, setting, seed, root, threads):
        ran.append((setting.network, contender, seed))
        if len(ran) == 3:
            raise RuntimeError("the third run fails")
        return {"dense": 50.0, "pruned": 40.0, "seconds": 1.0}

    monkeypatch.setattr(accuracy, "contend", contend)
    words = [f"--tree={tree}", f"--out={out}", "--images=2", "--test_images=1", "--networks", "conv4", "--seeds=2"]
    with pytest.raises(SystemExit, match="accuracy: the third run fails"):
        accuracy.main(words)
    assert ran[:3] == [("conv4", PLAIN, 0), ("conv4", HARNESS, 0), ("conv4", PLAIN, 1)]
    kept = len(accuracy.read(out))
    ran[:] = [None] * 3
    accuracy.main(words)
    assert len(ran) - 3 == 4 - kept and len(accuracy.read(out)) == 4
    assert cells(capsys.readouterr().out.splitlines())[2][3:] == [
        "2",
        "50.00 ± 0.00",
        "50.00 ± 0.00",
        "+0.00",
        "0.00",
        "-",
    ]


def test_the_table_by_hand(tmp_path, capsys):
    out = tmp_path / "results.csv"
    setting = SETTINGS["conv4"]
    figures = {PLAIN: [(60, 50), (62, 53), (64, 56)], HARNESS: [(63, 50), (67, 50)]}
    for contender, runs in figures.items():
        for seed, (dense, pruned) in enumerate(runs):
            measured = (contender, seed, dense, pruned, 1.5, "abc")
            accuracy.append(out, vars(setting) | dict(zip(accuracy.MEASURED, measured)))
    accuracy.append(out, vars(SETTINGS["vgg16_bn"]) | dict(zip(accuracy.MEASURED, (PLAIN, 0, 1, 2, 3, ""))))
    accuracy.main([f"--report={out}"])
    printed = capsys.readouterr().out
    _, _, *rows = cells(printed.splitlines())
    # Dense: 62 and 65; variances 4 / 3 and 8 / 2; 3 / sqrt(16 / 3) = 1.299. Pruned: 53 and 50; 9 / 3 and 0.
    assert [row[2:] for row in rows] == [
        ["100%", "3 and 2", "62.00 ± 2.00", "65.00 ± 2.83", "+3.00", "2.31", "+1.3"],
        ["20%", "3 and 2", "53.00 ± 3.00", "50.00 ± 0.00", "-3.00", "1.73", "-1.7"],
    ]
    assert rows[0][:2] == ["conv4", "ImageFolder, 1000 a class, 4 epochs of 64, lr 0.05, decay 0.0005, bf16"]
    assert printed.endswith("harness.py at abc\n")


def test_the_same_images(tree, tmp_path):
    accuracy.link_tree(tree, tmp_path / "links", 2, 1)
    found = sorted(str(path.relative_to(tmp_path / "links")) for path in (tmp_path / "links").rglob("*.jpg"))
    assert found == [f"test/{c}/0.jpg" for c in "abc"] + [f"train/{c}/{n}.jpg" for c in "abc" for n in (0, 1)]
    with pytest.raises(SystemExit, match="5 images; 6 are asked for"):
        accuracy.link_tree(tree, tmp_path / "more", 6, 1)


def test_a_part_of_fashion_mnist(tmp_path):
    idx_files(tmp_path / "whole" / "FashionMNIST" / "raw", train=80, test=40)
    accuracy.cut_fashion_mnist(tmp_path / "whole", tmp_path / "part", 3, 0)
    whole, part = (FashionMNIST(tmp_path / name) for name in ("whole", "part"))
    assert part.targets.bincount().tolist() == [3] * 10
    chosen = torch.cat([(whole.targets == label).nonzero().flatten()[:3] for label in range(10)]).sort().values
    assert torch.equal(part.data, whole.data[chosen]) and torch.equal(part.targets, whole.targets[chosen])
    whole, part = (FashionMNIST(tmp_path / name, train=False) for name in ("whole", "part"))
    assert torch.equal(part.data, whole.data) and torch.equal(part.targets, whole.targets)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_same_network_drawn_alike(name):
    """With the harness's values in it, the contender's network gives the harness's logits."""
    shape = (1, 28, 28) if name == "lenet_300_100" else (3, 32, 32)
    torch.manual_seed(0)
    theirs, ours = plain_recipe.NETWORKS[name](10, shape), create_model(name, 10, shape)
    pairs = list(zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True))
    for plain, harness in pairs:
        assert plain.shape == harness.shape
        if plain.ndim == 4:  # drawn from one distribution: both deviations within four standard errors
            assert torch.isclose(plain.std(), harness.std(), rtol=4 / plain.numel() ** 0.5)
        plain.copy_(harness)
    images = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_contender_imports_nothing_of_the_harness():
    nodes = list(ast.walk(ast.parse((ROOT / "tests" / "benchmarks" / "plain_recipe.py").read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {path.stem for path in ROOT.iterdir()}
    assert not {module.split(".")[0] for module in modules} & own
