"""``python -m utils.analyze`` on real runs of Digits, and harness_utils.load_run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness_utils import load_run
from tests.conftest import ROOT
from tests.processes import Forks
from utils.analysis.barrier import evaluate
from utils.analyze import COMMANDS, main
from utils.conv_type import apply_masks, masked_params
from utils.errors import DataError, RunError

RUNS = {
    "wr_0": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1},
    "wr_1": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1, "experiment_params.seed": 1},
    "norms": {
        "model_params.model_name": "resnet20", "prune_params.num_levels": 1, "experiment_params.epochs_per_level": 1,
        "optimizer.warmup_epochs": 0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(forks: Forks) -> Path:
    """The folder of the runs `RUNS`."""
    for name, options in RUNS.items():
        forks(name, **options)
    return forks.folder


def checkpoint(run: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"model_{name}.pt", weights_only=True)


def analyze(*words, status: int = 0) -> None:
    assert main([str(word) for word in words]) == status


# --- a run read back -------------------------------------------------------------------------------------------------


def test_load_run_gives_the_network_of_a_level(runs):
    loaded = load_run(runs / "wr_0")
    assert (loaded.level, len(loaded.summary), loaded.cfg.experiment_params.training_type) == (2, 3, "wr")
    assert list(loaded.epochs["epoch"]) == [1, 2] and set(loaded.layers["level"]) == {0, 1, 2}
    for level in (-1, 0):
        loaded = load_run(runs / "wr_0", level)
        row = loaded.summary.iloc[level]
        loss, error = evaluate(loaded.model, loaded.test_batches())
        assert 100 - error == pytest.approx(row["final_test_acc"], abs=1e-9)
        assert loss == pytest.approx(row["final_test_loss"], rel=1e-5)
        assert not loaded.model.training


def test_load_run_refuses(runs, tmp_path):
    with pytest.raises(RunError, match="level 7 is not finished; levels 0 to 2 are"):
        load_run(runs / "wr_0", 7)
    with pytest.raises(DataError, match="not the directory of a run"):
        load_run(tmp_path)


# --- commands --------------------------------------------------------------------------------------------------------


def test_barrier_through_the_command_line(runs, tmp_path):
    """The ends of the line are the runs' own networks: their errors are those that the runs have recorded."""
    out, figure = tmp_path / "b.csv", tmp_path / "b.png"
    command = [sys.executable, "-m", "utils.analyze", "barrier", runs / "wr_0", runs / "wr_1", "--levels=0"]
    command += ["--points=5", f"--out={out}", f"--figure={figure}"]
    done = subprocess.run([str(w) for w in command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows = pd.read_csv(out)
    assert list(rows) == ["a", "b", "level", "density", "alpha", "loss", "error", "loss_barrier", "error_barrier"]
    assert list(rows["alpha"]) == [0, 0.25, 0.5, 0.75, 1] and set(rows["density"]) == {1}
    recorded = [pd.read_csv(runs / run / "metrics/summary.csv")["final_test_acc"][0] for run in ("wr_0", "wr_1")]
    errors = rows["error"].to_numpy()
    assert [100 - errors[0], 100 - errors[-1]] == pytest.approx(recorded, abs=1e-9)
    assert rows["error_barrier"].to_numpy() == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2)
    assert figure.stat().st_size > 1000
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["A", "B", "level", "density"] and lines[1].split()[:2] == ["wr_0", "wr_1"]
    assert max(map(len, lines)) <= 100


def test_barrier_level_by_level_with_masks_united(runs, tmp_path, capsys):
    out, figure = tmp_path / "b.csv", tmp_path / "b.pdf"
    analyze("barrier", runs / "wr_0", runs / "wr_1", "--union", "--points=3", "--out", out, "--figure", figure)
    rows = pd.read_csv(out)
    assert list(rows["level"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and figure.exists()
    masks = [checkpoint(runs / run, "level_2") for run in ("wr_0", "wr_1")]
    names = [name for name in masks[0] if name.endswith("_mask")]
    kept = sum(int((masks[0][n] | masks[1][n]).sum()) for n in names)
    assert rows["density"].iloc[-1] == kept / sum(masks[0][n].numel() for n in names)
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("batchnorm", ["recompute", "interpolate"])
def test_a_checkpoint_and_its_copy_have_no_barrier(runs, tmp_path, batchnorm):
    """The copy lies in no run: --config says what it is. Recomputed statistics are not those of training."""
    copy, out = tmp_path / "copy.pt", tmp_path / "b.csv"
    own = runs / "norms/checkpoints/model_level_0.pt"
    shutil.copy(own, copy)
    config = f"--config={runs / 'norms/expt_config.yaml'}"
    analyze("barrier", own, copy, config, "--points=2", f"--batchnorm={batchnorm}", "--out", out)
    rows = pd.read_csv(out)
    assert "level" not in rows and (rows["error_barrier"] == 0).all() and (rows["loss_barrier"] == 0).all()
    recorded = pd.read_csv(runs / "norms/metrics/summary.csv")["final_test_loss"][0]
    assert (abs(rows["loss"] - recorded) < 1e-4).all() == (batchnorm == "interpolate")


def test_overlap_of_two_runs(runs, tmp_path, capsys):
    out, figure = tmp_path / "o.csv", tmp_path / "o.svg"
    analyze("overlap", runs / "wr_0", runs / "wr_1", "--out", out, "--figure", figure)
    assert figure.exists()
    rows = pd.read_csv(out).set_index(["level", "layer"])
    assert (rows.loc[0]["iou"] == 1).all()
    a, b = (checkpoint(runs / run, "level_2")["fc2.weight_mask"] for run in ("wr_0", "wr_1"))
    row = rows.loc[(2, "fc2.weight")]
    assert (row["both"], row["kept_a"]) == ((a & b).sum(), a.sum())
    assert row["random_both"] == pytest.approx(float(a.sum()) * float(b.sum()) / a.numel())
    layers = rows.loc[2].drop("all")
    assert rows.loc[(2, "all")]["both"] == layers["both"].sum()
    assert len(capsys.readouterr().out.splitlines()) == 4  # a heading and the whole network at each level


def test_overlap_of_checkpoints_shows_their_layers(runs, capsys):
    folder = runs / "wr_0/checkpoints"
    analyze("overlap", folder / "model_level_1.pt", folder / "model_level_2.pt")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["all", "fc1.weight", "fc2.weight", "fc3.weight"]
    assert lines[1].split()[:2] == ["level_1", "level_2"] and lines[1].split()[-1] == "1"  # level 2 lies within level 1


def test_signs_of_a_run_with_a_rewind_point(runs, tmp_path):
    out, figure = tmp_path / "s.csv", tmp_path / "s.png"
    analyze("signs", runs / "wr_0", "--out", out, "--figure", figure)
    assert figure.exists()
    rows = pd.read_csv(out).set_index(["level", "layer"])
    end, kept = (checkpoint(runs / "wr_0", "level_1")[name] for name in ("fc1.weight", "fc1.weight_mask"))
    for time in ("init", "rewind"):
        same = (torch.sign(checkpoint(runs / "wr_0", time)["fc1.weight"]) == torch.sign(end)) & kept
        assert rows.loc[(1, "fc1.weight")][f"same_{time}"] == same.sum()
        assert rows.loc[(1, "fc1.weight")][f"share_{time}"] == pytest.approx(float(same.sum()) / float(kept.sum()))
    analyze("signs", runs / "norms", "--out", out)
    assert "share_rewind" not in pd.read_csv(out)


def test_drop_is_measured_right_after_pruning(runs, tmp_path, capsys):
    """Level k - 1's network under level k's masks; at level 0 the initial network."""
    out, figure = tmp_path / "d.csv", tmp_path / "d.png"
    analyze("drop", runs / "wr_0", "--out", out, "--figure", figure)
    rows = pd.read_csv(out)
    assert figure.exists() and list(rows["level"]) == [0, 1, 2]
    for level in (0, 1, 2):
        loaded = load_run(runs / "wr_0", max(0, level - 1))
        masks = checkpoint(runs / "wr_0", f"level_{level}")
        if level == 0:
            loaded.model.load_state_dict(checkpoint(runs / "wr_0", "init"))
        for name, _, mask in masked_params(loaded.model):
            mask.copy_(masks[f"{name}_mask"])
        apply_masks(loaded.model)
        _, error = evaluate(loaded.model, loaded.test_batches())
        assert rows["pruned_test_acc"][level] == pytest.approx(100 - error, abs=1e-9)
    assert rows["before"].isna().tolist() == [True, False, False]
    assert rows["drop"][2] == pytest.approx(rows["final_test_acc"][1] - rows["pruned_test_acc"][2])
    analyze("drop", runs / "wr_0", runs / "wr_1", "--levels=1", "--figure", figure)
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(runs: Path, tmp: Path) -> dict[str, tuple[list, int, str]]:
    """{case: (words, exit status, part of the line)}."""
    a, b, norms = runs / "wr_0", runs / "wr_1", runs / "norms"
    lone, evil, plain = tmp / "lone.pt", tmp / "evil.pt", tmp / "plain.pt"
    shutil.copy(a / "checkpoints/model_level_1.pt", lone)
    torch.save({"code": Path}, evil)
    torch.save({"w": torch.ones(2)}, plain)
    old = tmp / "old"
    shutil.copytree(a, old)
    summary = pd.read_csv(old / "metrics/summary.csv")
    summary.drop(columns="pruned_test_acc").to_csv(old / "metrics/summary.csv", index=False)
    own = a / "checkpoints/model_level_1.pt"
    return {
        "no such run": (["overlap", a, tmp / "none"], 1, "none: no such directory"),
        "no such file": (["overlap", own, tmp / "none.pt"], 1, "none.pt: no such file"),
        "one alone": (["overlap", a], 2, "one alone has no pair"),
        "named twice": (["overlap", a, a], 1, "named more than once"),
        "a run beside a checkpoint": (["overlap", a, own], 2, "a checkpoint beside runs"),
        "levels of checkpoints": (["overlap", own, lone, "--levels=1"], 2, "--levels: only for runs"),
        "levels that are no numbers": (["overlap", a, b, "--levels=1,x"], 2, "--levels: '1,x' is not allowed"),
        "a level too many": (["overlap", a, b, "--levels=1,9"], 1, "level 9 is not finished"),
        "other networks": (["overlap", a, norms], 1, "different networks: conv1.weight"),
        "code in a file": (["overlap", own, evil], 1, "no checkpoint: it is damaged, or holds more than tensors"),
        "a file without masks": (["overlap", own, plain], 1, "holds no masks"),
        "no folder to write to": (["overlap", a, b, f"--out={tmp}/x/o.csv"], 2, "--out"),
        "no table": (["overlap", a, b, "--out=o.txt"], 2, "--out: o.txt: ends in none of .csv"),
        "no figure": (["overlap", a, b, "--figure=o.csv"], 2, "--figure: o.csv: ends in none of .png"),
        "signs of a checkpoint": (["signs", own], 2, "the directory of a run is expected"),
        "signs of several": (["signs", runs], 2, "a folder of 3 runs"),
        "barrier of other masks": (["barrier", a, b], 1, "level 1 of wr_0 and level 1 of wr_1 have different masks"),
        "barrier of other networks": (["barrier", a, norms], 1, "model_params.model_name is lenet_300_100 and resnet"),
        "no config": (["barrier", own, lone], 2, "--config: "),
        "a config of another network": (
            ["barrier", lone, plain, f"--config={norms / 'expt_config.yaml'}"], 1, "lone holds another model"),
        "a config that is none": (["barrier", own, lone, f"--config={tmp}/none.yaml"], 2, "no such file"),
        "one point": (["barrier", a, b, "--points=1"], 2, "--points: 1 is not allowed"),
        "drop of older code": (["drop", old], 1, "summary.csv has no pruned_test_acc"),
    }  # fmt: skip


def test_bad_input_is_one_line_and_writes_nothing(runs, tmp_path, capsys):
    for case, (words, status, part) in bad(runs, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        if not any(str(word).startswith(("--out", "--figure")) for word in words):
            words = [*words, "--out", tmp_path / "out.csv", "--figure", tmp_path / "figure.png"]
        assert main([str(word) for word in words]) == status, case
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1, (case, printed)
        assert printed.err.startswith("analyze: ") and part in printed.err, (case, printed.err)
        assert sorted(tmp_path.rglob("*")) == before, case


@pytest.mark.parametrize("command", COMMANDS)
def test_help_defines_the_figures_without_loading_torch(command):
    program = f"""
import sys
from utils.analyze import main
try:
    main([{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
    assert not {{"torch", "matplotlib"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout and any(f"{year})" in done.stdout or f"{year} (" in done.stdout or f"{year}," in
                                          done.stdout for year in range(1900, 2030))  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= 100
