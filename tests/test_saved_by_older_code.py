"""A run that older code began, and that was stopped in the middle of an epoch, is finished by today's code.

The run, and the same command run without a stop, are files of tests/fixtures/run_2ece772 (see its README).
"""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import ROOT, Finished

SAVED = ROOT / "tests" / "fixtures" / "run_2ece772"
UNBROKEN = SAVED / "unbroken"
MASKS = ("fc1.weight_mask", "fc2.weight_mask", "fc3.weight_mask")
BEFORE_THE_STOP = (
    "checkpoints/model_init.pt", "checkpoints/model_rewind.pt", "checkpoints/model_level_0.pt",
    "artifacts/optimizer_rewind.pt",
)  # fmt: skip


def unpack(folder: Path) -> Path:
    """A copy of the saved run in `folder`, as the older code left it."""
    for file in (SAVED / "run").rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(SAVED)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = file.read_bytes()
            if file.suffix == ".gz":
                target, data = target.with_suffix(""), gzip.decompress(data)
            target.write_bytes(data)
    return folder / "run"


def own_command(run: Path) -> list[str]:
    command = json.loads((run / "artifacts" / "environment.json").read_text())[0]["command"]
    return [word for word in command[1:] if "base_dir=" not in word and "expt_name=" not in word]


def own_config(run: Path) -> list[str]:
    return [f"--config={run / 'expt_config.yaml'}"]


def level_again(run: Path) -> list[str]:
    """From level 0's checkpoint and CSV rows, without the saved state."""
    return [*own_command(run), "--experiment_params.resume_level=1"]


def hashes(checkpoint: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    bytes_of = {name: tensor.contiguous().numpy().tobytes() for name, tensor in checkpoint.items()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in bytes_of.items()}


def assert_rows_agree(run: Finished, name: str, exact: list[str]) -> None:
    """All rows are those of the unbroken run: columns `exact` to the last digit, losses and accuracies nearly."""
    rows, expected = (pd.read_csv(p / "metrics" / f"{name}.csv", dtype=str) for p in (run.path, UNBROKEN))
    assert list(rows)[: len(expected.columns)] == list(expected)  # more to the right
    pd.testing.assert_frame_equal(rows[exact], expected[exact])
    # Another CPU rounds otherwise (1e-8 where AVX is forbidden). Two images of the test set, one in 700 of training.
    near = {"train_loss": 3e-4, "test_loss": 3e-4, "final_test_loss": 3e-4}
    near |= {"train_acc": 0.15, "test_acc": 0.6, "final_test_acc": 0.6, "max_test_acc": 0.6}
    compared = [column for column in rows if column in near]
    assert compared
    for column in compared:
        found, wanted = rows[column].astype(float), expected[column].astype(float)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=near[column], err_msg=f"{name}: {column}")
    assert (rows["seconds"].astype(float) > 0).all()


@pytest.mark.parametrize("words", [own_command, own_config, level_again])
def test_run_of_2ece772_is_finished(tmp_path, words):
    path = unpack(tmp_path)
    index = json.loads((path / "artifacts" / "state.json").read_text())
    assert [(state["level"], state["epoch"], state["step"]) for state in index] == [(1, 2, 7), (1, 2, 0)]
    before = {name: (path / name).read_bytes() for name in BEFORE_THE_STOP}

    resumed = ["--experiment_params.resume_expt_name=run", f"--experiment_params.base_dir={tmp_path}"]
    command = [sys.executable, "harness.py", *words(path), *resumed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("harness: note: resumed with ") for line in done.stderr.splitlines()), done.stderr
    run = Finished(path, done.returncode, done.stdout, done.stderr)

    assert {name: (path / name).read_bytes() for name in before} == before
    index = json.loads((path / "artifacts" / "state.json").read_text())
    assert (index[0]["level"], index[0]["step"]) == (3, 0)

    assert_rows_agree(run, "summary", ["level", "density", "sparsity", "epochs"])
    # Only today's code records it, where it prunes: level 1 had been pruned before the stop, but by `level_again`.
    recorded = run.csv("summary")["pruned_test_acc"].notna().tolist()
    assert recorded == [False, words is level_again, True]
    for level in range(3):
        assert_rows_agree(run, f"epochwise_metrics/level_{level}_metrics", ["epoch", "lr"])
    layers, expected = (pd.read_csv(p / "metrics" / "layerwise_density.csv") for p in (path, UNBROKEN))
    pd.testing.assert_frame_equal(layers[layers["level"] < 2], expected[expected["level"] < 2])
    assert layers.groupby("level")["kept"].sum().tolist() == [25100, 12550, 6275]

    checkpoints = {file.name: torch.load(file, weights_only=True) for file in (path / "checkpoints").glob("*.pt")}
    wanted = json.loads((UNBROKEN / "tensors.json").read_text())
    assert checkpoints.keys() == wanted.keys()
    found = {name: hashes(checkpoint) for name, checkpoint in checkpoints.items()}
    for name in ("model_init.pt", "model_rewind.pt", "model_level_0.pt"):
        assert found[name] == wanted[name]
    # Level 1's masks were in the state (or follow from level 0's weights): the same on any machine.
    assert [found["model_level_1.pt"][mask] for mask in MASKS] == [wanted["model_level_1.pt"][mask] for mask in MASKS]
    # Level 2's follow from weights trained here, of which one or two may lie on the other side of the threshold.
    last = np.concatenate([checkpoints["model_level_2.pt"][mask].numpy().ravel() for mask in MASKS])
    unbroken = np.unpackbits(np.frombuffer((UNBROKEN / "level_2_masks.bin").read_bytes(), np.uint8), count=last.size)
    assert last.sum() == unbroken.sum() == 6275
    assert (last != unbroken.astype(bool)).sum() <= 20
    if found["model_level_1.pt"] == wanted["model_level_1.pt"]:  # this machine has the other one's arithmetic
        assert found == wanted

    figure = tmp_path / "figure.png"
    command = [sys.executable, "-m", "utils.plot_results", str(path), "--out", str(figure)]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (drawn.returncode, drawn.stderr) == (0, "") and figure.stat().st_size > 1000
