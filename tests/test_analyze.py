"""``python -m utils.analyze`` on real runs of Digits, and harness_utils.load_run."""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness_utils import load_run
from tests.conftest import ROOT
from tests.data_helpers import digit_tree
from tests.processes import Forks
from tests.traps import SHORT
from utils.analysis.barrier import evaluate
from utils.analysis.sharpness import Hessian, top_eigenvalue, trace
from utils.analyze import COMMANDS, main
from utils.conv_type import apply_masks, masked_params
from utils.errors import DataError, RunError
from utils.runs.loading import build_network

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


EXAMPLE = """
import torch
from harness_utils import load_run
from utils.conv_type import density

run = load_run("experiments/NAME/")            # level=-1: the last finished one
right = images = 0
with torch.no_grad():
    for x, y in run.test_batches():            # every test image once, on the model's device
        right += int((run.model(x).argmax(1) == y).sum())
        images += len(y)
print(run.cfg.model_params.model_name, run.level, density(run.model), 100 * right / images)
"""


def test_load_run_as_an_example_shows_it(runs, monkeypatch, capsys):
    """The lines of an example, on a run of this module."""
    monkeypatch.chdir(runs.parent)
    exec(EXAMPLE.replace("experiments/NAME", f"{runs.name}/wr_0"), {})
    said = capsys.readouterr().out.split()
    summary = pd.read_csv(runs / "wr_0" / "metrics" / "summary.csv").iloc[-1]
    assert float(said[-1]) == pytest.approx(summary["final_test_acc"], abs=1e-9)
    assert float(said[-2]) == pytest.approx(summary["density"])


def test_load_run_finds_images_that_have_moved(forks, tmp_path):
    """Of a folder of images, with worker processes, which `close` ends."""
    root = digit_tree(tmp_path / "here")
    options = {
        "dataset.dataset_name": "ImageFolder", "dataset.loader": "torchvision", "dataset.resolution": 16,
        "dataset.batch_size": 16, "dataset.num_workers": 1, "dataset.data_root": root,
    }  # fmt: skip
    run = forks("moved", **SHORT | options)
    root.rename(tmp_path / "there")
    with pytest.raises(DataError, match="here"):
        load_run(run.path)
    with contextlib.closing(load_run(run.path, data_root=tmp_path / "there")) as loaded:
        _, error = evaluate(loaded.model, loaded.test_batches())
        assert 100 - error == pytest.approx(run.csv("summary")["final_test_acc"].iloc[-1], abs=1e-9)


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
    assert rows["before"].isna().tolist() == rows["recovered"].isna().tolist() == [True, False, False]
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
        "one alone": (["overlap", a], 2, "only one is named"),
        "named twice": (["overlap", a, a], 1, "named more than once"),
        "a run beside a checkpoint": (["overlap", a, own], 2, "a checkpoint beside runs"),
        "levels of checkpoints": (["overlap", own, lone, "--levels=1"], 2, "--levels: only for runs"),
        "levels that are no numbers": (["overlap", a, b, "--levels=1,x"], 2, "--levels: '1,x' is not allowed"),
        "a level too many": (["overlap", a, b, "--levels=1,9"], 1, "level 9 is not finished; levels 0 to 2 are"),
        "other networks": (["overlap", a, norms], 1, "different networks: conv1.weight"),
        "code in a file": (["overlap", own, evil], 1, "no checkpoint: it is damaged, or holds more than tensors"),
        "a file without masks": (["overlap", own, plain], 1, "holds no masks"),
        "no folder to write to": (["overlap", a, b, f"--out={tmp}/x/o.csv"], 2, "--out"),
        "no table": (["overlap", a, b, "--out=o.txt"], 2, "--out: o.txt: ends in none of .csv"),
        "no figure": (["overlap", a, b, "--figure=o.csv"], 2, "--figure: o.csv: ends in none of .png"),
        "signs of a checkpoint": (["signs", own], 2, "the directory of a run is expected"),
        "signs of several": (["signs", runs], 2, "runs: the directory of one is expected"),
        "barrier of other masks": (["barrier", a, b], 1, "level 1 of wr_0 and level 1 of wr_1 have different masks"),
        "barrier of other networks": (["barrier", a, norms], 1, "model_params.model_name is lenet_300_100 and resnet"),
        "no config": (["barrier", own, lone], 2, "--config: "),
        "a config of another network": (
            ["barrier", lone, plain, f"--config={norms / 'expt_config.yaml'}"], 1, "lone holds another model"),
        "a config that is none": (["barrier", own, lone, f"--config={tmp}/none.yaml"], 2, "no such file"),
        "a config that is not needed": (
            ["barrier", a, b, f"--config={norms / 'expt_config.yaml'}"], 2, "has no effect: each source lies in a run"),
        "images that are not used": (
            ["barrier", a, b, "--batchnorm=interpolate", "--batchnorm_images=5"], 2, "--batchnorm_images: 5 has no"),
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
        assert printed.err.startswith(f"analyze {words[0]}: ") and part in printed.err, (case, printed.err)
        assert sorted(tmp_path.rglob("*")) == before, case


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["drop", "a", "--lvls=1"], "drop: error: unrecognized arguments: --lvls=1"),
        (["signs", "a", "b"], "signs: error: unrecognized arguments: b"),
        (["overlap"], "overlap: error: the following arguments are required: RUN|CKPT"),
        (["barrier", "a", "b", "--points=x"], "barrier: error: argument --points: invalid int value: 'x'"),
    ],
)
def test_faults_of_arguments_name_the_command(words, fault, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m utils.analyze {fault}"


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
    assert "--out" in done.stdout and re.search(r"\b(19|20)\d\d\b", done.stdout), "a paper, by its year"
    assert max(map(len, done.stdout.splitlines())) <= 100


# --- what a network costs, and how sharp its minimum is --------------------------------------------------------------


def test_flops_of_lenet_worked_by_hand(runs, tmp_path, capsys):
    """64-300-100-10: one multiply-add per weight. Bytes: 4 per value; biases 410 values; CSR: 8 per kept weight and
    4 for each of 300 + 1, 100 + 1 and 10 + 1 pointers; bitmask: 1 bit per weight."""
    out, figure = tmp_path / "f.csv", tmp_path / "f.png"
    analyze("flops", runs / "wr_0", "--out", out, "--figure", figure)
    assert figure.exists() and len(capsys.readouterr().out.splitlines()) == 4
    rows = pd.read_csv(out).set_index(["level", "layer"])
    for level, kept in ((0, 50200), (1, 25100), (2, 12550)):
        whole = rows.loc[(level, "all")]
        assert (whole["multiply_adds"], whole["kept_multiply_adds"]) == (50200, kept)
        assert whole["dense_bytes"] == 4 * (50200 + 410)
        assert whole["sparse_bytes"] == 8 * kept + 4 * (301 + 101 + 11) + 4 * 410
        assert whole["bitmask_bytes"] == 50200 // 8 + 4 * kept + 4 * 410
    mask = checkpoint(runs / "wr_0", "level_2")["fc2.weight_mask"]
    assert rows.loc[(2, "fc2.weight")]["kept_multiply_adds"] == mask.sum()


def test_sharpness_of_the_levels_of_a_run(runs, tmp_path, capsys):
    out = tmp_path / "s.csv"
    words = ["--levels=0,2", "--images=128", "--samples=3", "--tolerance=0.01"]
    analyze("sharpness", runs / "wr_0", *words, "--out", out)
    rows = pd.read_csv(out)
    assert list(rows["parameters"]) == [50200 + 410, 12550 + 410] and set(rows["images"]) == {128}
    loaded = load_run(runs / "wr_0", 2)
    cfg = loaded.cfg.replace({"experiment_params": {"seed": 0}, "dataset": {"augment": "none"}})
    _, data = build_network(cfg)
    hessian = Hessian(loaded.model, lambda: [next(iter(data.train.batches(0, 2)))])
    assert rows["eigenvalue"][1] == pytest.approx(top_eigenvalue(hessian, 0, 0.01).value, rel=1e-4)
    assert rows["trace"][1] == pytest.approx(trace(hessian, 3).value, rel=1e-4)
    analyze("sharpness", runs / "wr_0/checkpoints/model_level_0.pt", "--images=128", "--samples=1", "--most=1")
    assert "has not converged" in capsys.readouterr().err


def test_sources_of_other_batches_and_losses_are_measured_in_any_order(runs, forks, tmp_path):
    """Each with its own label smoothing, on the same images."""
    smooth = {"optimizer.label_smoothing": 0.3, "dataset.batch_size": 100, "prune_params.num_levels": 1}
    forks("smooth", **smooth, **{"experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0})
    seen = []
    for names in (("wr_0", "smooth"), ("smooth", "wr_0")):
        words = [runs / name for name in names]
        out = tmp_path / "s.csv"
        analyze("sharpness", *words, "--levels=0", "--images=150", "--samples=2", "--most=2", "--out", out)
        seen.append(pd.read_csv(out).set_index("name").sort_index())
    pd.testing.assert_frame_equal(*seen)
    assert dict(seen[0]["label_smoothing"]) == {"smooth": 0.3, "wr_0": 0} and set(seen[0]["images"]) == {256}
    analyze("sharpness", runs / "smooth", "--images=0", "--samples=1", "--most=1", "--out", out)  # read anew
    assert pd.read_csv(out)["images"][0] > 1000


# --- stability -------------------------------------------------------------------------------------------------------


def test_stability_from_training_to_barriers(forks, tmp_path, capfd):
    """Two branches of step 6 under the mask of level 1; what is finished is not trained again."""
    run = forks("kept", **{"prune_params.save_steps": "0,6", "prune_params.num_levels": 2}).path
    into, out, figure = tmp_path / "pairs", tmp_path / "s.csv", tmp_path / "s.png"
    command = ["stability", run, "--steps=6", "--data_seeds=1,2", "--levels=1", "--points=3"]
    files = ["--jobs=2", "--into", into, "--out", out, "--figure", figure]
    analyze(*command, *files)
    names = [f"step6_level1_data{seed}" for seed in (1, 2)]
    assert sorted(path.name for path in into.iterdir() if not path.name.startswith(".")) == names
    rows = pd.read_csv(out)
    assert rows[["step", "level", "a", "b"]].drop_duplicates().to_numpy().tolist() == [[6, 1, *names]]
    ends = [pd.read_csv(into / name / "metrics/summary.csv")["final_test_acc"][0] for name in names]
    assert [100 - rows["error"].iloc[0], 100 - rows["error"].iloc[-1]] == pytest.approx(ends, abs=1e-9)
    assert ends[0] != ends[1] or rows["loss"].iloc[0] != rows["loss"].iloc[-1]  # other orders, other networks
    masks = [checkpoint(into / name, "level_0")["fc1.weight_mask"] for name in names]
    assert all(torch.equal(mask, checkpoint(run, "level_1")["fc1.weight_mask"]) for mask in masks)
    start = checkpoint(into / names[0], "init")["fc1.weight"]
    assert torch.equal(start, checkpoint(run, "step_6")["fc1.weight"] * masks[0])

    before = {path: path.stat().st_mtime_ns for path in into.rglob("*.pt")}
    first = out.read_bytes()
    capfd.readouterr()
    analyze(*command, *files)
    assert {path: path.stat().st_mtime_ns for path in into.rglob("*.pt")} == before
    assert out.read_bytes() == first and "run_grid" not in capfd.readouterr().out

    for words, status, part in [
        (
            ["stability", run, "--steps=5", "--data_seeds=1,2"],
            2,
            f"--steps: 5 is not allowed: those that {run} has kept (prune_params.save_steps): 0, 6",
        ),
        (["stability", run, "--steps=6", "--data_seeds=1"], 2, "--data_seeds: 1 is not allowed: two or more"),
        (["stability", run, "--steps=6", "--data_seeds=1,9999999999"], 2, "--data_seeds: 9999999999 is not allowed"),
        (["stability", run, "--steps=6", "--data_seeds=1,2", "--levels=4"], 1, "level 4 is not finished"),
    ]:
        analyze(*words, "--into", tmp_path / "none", status=status)
        assert part in capfd.readouterr().err and not (tmp_path / "none").exists()
