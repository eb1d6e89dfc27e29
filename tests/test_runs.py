"""Whole runs through the command line, on real digits: what they leave, and that it is right."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.conftest import ROOT, Finished, Launcher
from tests.processes import alive_in_session, all_gone
from utils.runs.tables import summary_row

EPOCHS, REWIND = 3, 1


KINDS = {
    "imp": {"experiment_params.training_type": "imp"},
    "wr": {
        "experiment_params.training_type": "wr",
        "prune_params.rewind_epoch": REWIND,
        "model_params.model_name": "resnet20",  # BN statistics to rewind
    },
    "lrr": {"experiment_params.training_type": "lrr"},
}


@pytest.fixture(scope="module")
def runs(shared_launch: Launcher) -> dict[str, Finished]:
    return {kind: shared_launch(kind, **options) for kind, options in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_directory_is_as_the_contract_says(runs, kind):
    run = runs[kind]
    files = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    expected = {"expt_config.yaml", "checkpoints/model_init.pt", "metrics/summary.csv", "metrics/layerwise_density.csv"}
    expected |= {f"checkpoints/model_level_{i}.pt" for i in range(3)}
    expected |= {f"metrics/epochwise_metrics/level_{i}_metrics.csv" for i in range(3)}
    expected |= {"checkpoints/model_rewind.pt"} if kind == "wr" else set()
    assert {f for f in files if not f.startswith("artifacts/")} == expected
    columns = "level,density,sparsity,final_test_acc,max_test_acc,final_test_loss,epochs,seconds,pruned_test_acc"
    assert (run.path / "metrics/summary.csv").read_text().splitlines()[0] == columns
    columns = "epoch,train_loss,test_loss,train_acc,test_acc,lr,seconds,images_per_second"
    assert (run.path / "metrics/epochwise_metrics/level_0_metrics.csv").read_text().splitlines()[0] == columns
    layers = (run.path / "metrics/layerwise_density.csv").read_text().splitlines()
    assert layers[0] == "level,layer,kept,total,density,dead"


@pytest.mark.parametrize("kind", KINDS)
def test_densities_and_epochs(runs, kind):
    run = runs[kind]
    summary = run.csv("summary")
    layers = run.csv("layerwise_density").groupby("level")[["kept", "total"]].sum()
    total = layers["total"][0]
    assert list(summary["level"]) == [0, 1, 2]
    for level, row in summary.set_index("level").iterrows():
        asked = 0.5**level
        assert abs(layers["kept"][level] - math.floor(asked * total + 0.5)) <= 1
        assert row["density"] == layers["kept"][level] / total
        assert row["sparsity"] == 1 - row["density"]
        epochs = run.csv(f"epochwise_metrics/level_{int(level)}_metrics")
        first = REWIND if kind == "wr" and level > 0 else 0
        assert list(epochs["epoch"]) == list(range(first, EPOCHS))
        assert row["epochs"] == len(epochs)
        assert row["final_test_acc"] == epochs["test_acc"].iloc[-1]
        assert row["max_test_acc"] == epochs["test_acc"].max()


def test_summary_of_a_level_whose_best_epoch_is_not_its_last():
    accuracies = [40.0, 92.5, 91.0]
    rows = [{"test_acc": acc, "test_loss": 1 / acc, "seconds": float(n)} for n, acc in enumerate(accuracies, start=1)]
    assert summary_row(3, 0.25, rows, pruned_test_acc=30.0) == {
        "level": 3, "density": 0.25, "sparsity": 0.75, "final_test_acc": 91.0, "max_test_acc": 92.5,
        "final_test_loss": 1 / 91, "epochs": 3, "seconds": 6.0, "pruned_test_acc": 30.0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rate_of_every_epoch(runs, kind):
    """Warm-up over epoch 0, drops at 1.5 and 2.25 of 3 epochs, in steps of 12 an epoch (1,437 images by 128)."""
    steps = 12
    rate_at = {0: 0.1 / steps, 1: 0.1, 2: 0.01}  # milestones: steps 18 and 27
    for level in range(3):
        epochs = runs[kind].csv(f"epochwise_metrics/level_{level}_metrics")
        assert list(epochs["lr"]) == pytest.approx([rate_at[e] for e in epochs["epoch"]])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_only_lose_ones_and_weights_are_masked(runs, kind):
    before = None
    for name in ("init", "level_0", "level_1", "level_2"):
        state = runs[kind].checkpoint(name)
        masks = {key: value for key, value in state.items() if key.endswith("_mask")}
        assert masks
        for key, mask in masks.items():
            assert mask.dtype is torch.bool
            assert not state[key.removesuffix("_mask")][~mask].any()
            assert before is None or not (mask & ~before[key]).any()
        before = masks


def test_magnitude_masks_are_the_largest_weights_of_the_level_before(runs):
    before, after = runs["lrr"].checkpoint("level_0"), runs["lrr"].checkpoint("level_1")
    names = [key for key in after if key.endswith("_mask")]
    weights = torch.cat([before[n.removesuffix("_mask")].abs().flatten() for n in names])
    masks = torch.cat([after[n].flatten() for n in names])
    assert weights[masks].min() >= weights[~masks].max()


def test_accuracy_is_far_above_chance(runs):
    for run in runs.values():
        assert run.csv("summary")["max_test_acc"].min() > 60


def test_saved_config_is_a_config(runs, launch):
    saved = yaml.safe_load((runs["imp"].path / "expt_config.yaml").read_text())
    assert saved["experiment_params"]["expt_name"] == "imp"
    assert saved["prune_params"]["num_levels"] == 3
    words = ["harness.py", "--config", str(runs["imp"].path / "expt_config.yaml")]
    words += ["--experiment_params.expt_name=again", f"--experiment_params.base_dir={launch.folder}"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    Finished(launch.folder / "again", 0, "", "").assert_same_figures(runs["imp"])


@pytest.mark.parametrize("kind", KINDS)
def test_single_process_harness_gives_the_same_bits(runs, launch, kind):
    launch(kind, program=("-m", "utils.single_gpu_harness"), **KINDS[kind]).assert_same_figures(runs[kind])


def test_single_process_harness_refuses_a_diverged_run_in_the_same_words(launch):
    diverged = {**KINDS["imp"], "optimizer.lr": 1e20}
    lines = [
        launch(name, status=1, program=program, **diverged).err.splitlines()[-1].partition(": ")[2]
        for name, program in (("one", ("-m", "utils.single_gpu_harness")), ("two", ("harness.py",)))
    ]
    assert lines[0] == lines[1] and lines[0].startswith("training loss is ")


def test_quiet_without_a_terminal_and_a_table_at_the_end(runs):
    run = runs["imp"]
    assert run.err == ""
    lines = run.out.strip().splitlines()
    how = "lenet_300_100 on Digits, fp32 on cpu, compile off, CUDA graphs off, loader memory"
    assert lines[:2] == [
        f"{run.path.name} in {run.path.parent}: {how}",
        "masks on 50,200 of 50,610 parameters (99.2%)",
    ]
    for level, line in enumerate(lines[2:5]):
        row = run.csv("summary").iloc[level]
        accuracy = f"accuracy {row['final_test_acc']:.2f}%, best {row['max_test_acc']:.2f}%"
        assert line == f"level {level}: density {0.5**level:.4g}, {accuracy}, {row['seconds']:.1f} s"
    assert lines[5] == ""
    lines = lines[6:]
    assert lines[0] == str(run.path)
    assert lines[1].split()[:3] == ["level", "density", "sparsity"]
    assert len(lines) == 5


def test_non_finite_loss_stops_with_level_epoch_and_step(launch):
    run = launch("hot", status=1, **{"optimizer.lr": 1e30, "optimizer.warmup_epochs": 0})
    assert run.last_line.startswith("harness: training loss is ")
    assert "at level 0, epoch 0, step" in run.last_line
    assert "Traceback" not in run.err


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [2, 3])
def test_processes_share_the_experiment(runs, launch, nproc):
    run = launch("many", **{"dist_params.nproc": nproc})
    for level in range(2):
        one = runs["imp"].csv(f"epochwise_metrics/level_{level}_metrics")
        many = run.csv(f"epochwise_metrics/level_{level}_metrics")
        gap = ((one["train_loss"] - many["train_loss"]) / one["train_loss"]).abs().max()
        assert gap < 1e-3, gap
    for level in range(3):
        a, b = runs["imp"].checkpoint(f"level_{level}"), run.checkpoint(f"level_{level}")
        masks = [key for key in a if key.endswith("_mask")]
        differing = sum(int((a[key] ^ b[key]).sum()) for key in masks)
        assert differing <= 1e-3 * sum(a[key].numel() for key in masks)
        assert len(b) == len(a)


def test_torchrun_starts_the_same_file(launch):
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "harness.py")
    by_torchrun = launch("torchrun", program=program, **{"dist_params.nproc": 2})
    launch("own", **{"dist_params.nproc": 2}).assert_same_figures(by_torchrun)


def test_dead_worker_ends_the_run_and_leaves_no_orphan(launch):
    process = launch.start("killed", **{"dist_params.nproc": 2, "experiment_params.epochs_per_level": 100000})
    worker = _a_worker(process, launch.folder / "killed" / "metrics" / "epochwise_metrics")
    os.kill(worker, 9)
    done = launch.finish("killed", process, timeout=30)
    assert done.status == 1
    assert "was killed by SIGKILL" in done.last_line
    assert all_gone(process.pid)


def test_workers_do_not_outlive_a_killed_parent(launch):
    process = launch.start("orphan", **{"dist_params.nproc": 2, "experiment_params.epochs_per_level": 100000})
    _a_worker(process, launch.folder / "orphan" / "metrics" / "epochwise_metrics")
    process.kill()
    process.wait()
    assert all_gone(process.pid)


def _a_worker(process: subprocess.Popen, until) -> int:
    """PID of a training worker, once the run has written its first epoch."""
    for _ in range(1200):
        if any(until.glob("*.csv")):
            break
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        time.sleep(0.1)
    children = [pid for pid in alive_in_session(process.pid) if pid != process.pid]
    spawned = [pid for pid in children if "spawn_main" in _cmdline(pid)]
    assert len(spawned) == 2
    return spawned[-1]


def _cmdline(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().replace("\0", " ")
    except OSError:
        return ""
