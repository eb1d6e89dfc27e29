"""What a resume is: which options may change, what becomes of tables and later levels, what is recorded."""

import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from harness_params import load_config
from tests.conftest import ROOT, Finished
from tests.data_helpers import digit_tree
from tests.traps import KINDS, SHORT, Both, DieAt, MustBeMet, StopAt, begun
from utils.errors import ConfigError


@pytest.fixture(scope="module")
def undisturbed(forks) -> dict[str, Finished]:
    return {kind: forks(kind, **options) for kind, options in KINDS.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def copy_of(run: Finished, folder: Path, name: str = "copy") -> Finished:
    shutil.copytree(run.path, folder / name)
    return Finished(folder / name, 0, "", "")


def test_finished_run_resumed_does_nothing(undisturbed, fork):
    run = copy_of(undisturbed["wr"], fork.folder)
    before = {name: (run.path / name).stat().st_mtime_ns for name in contents(run.path)}, contents(run.path)
    again = fork("copy", resume=True, **KINDS["wr"])
    assert again.err == ""
    assert {name: (run.path / name).stat().st_mtime_ns for name in contents(run.path)} == before[0]
    assert contents(run.path) == before[1]


def test_more_levels_prolong_a_study(undisturbed, fork):
    two = fork("longer", **{**KINDS["lrr"], "prune_params.num_levels": 2})
    assert len(two.csv("summary")) == 2
    before = yaml.safe_load((two.path / "expt_config.yaml").read_text())
    fork("longer", resume=True, **KINDS["lrr"]).assert_same_figures(undisturbed["lrr"])
    before["prune_params"]["num_levels"] = 3  # from the start on: stopped on its way, the run is not finished
    assert yaml.safe_load((two.path / "expt_config.yaml").read_text()) == before


def test_fewer_levels_than_are_trained_are_refused(undisturbed, fork):
    """The config would tell of another study: of one level, a dense network."""
    run = copy_of(undisturbed["wr"], fork.folder)
    before = contents(run.path)
    done = fork("copy", resume=True, status=2, **{**KINDS["wr"], "prune_params.num_levels": 2})
    fault = "2 is less than the 3 levels that the run has trained; resume_level starts one of them again"
    assert done.err == f"harness: prune_params.num_levels: {fault}\n"
    assert contents(run.path) == before
    fewer = {**KINDS["wr"], "prune_params.num_levels": 2, "experiment_params.resume_level": 1}
    assert list(fork("copy", resume=True, **fewer).csv("summary")["level"]) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [1, 2])
def test_resume_level_starts_a_level_again(undisturbed, fork, kind, level):
    copy_of(undisturbed[kind], fork.folder)
    options = {**KINDS[kind], "experiment_params.resume_level": level}
    # Stopped in its middle, a plain resume goes on with the new attempt rather than with the old, finished run.
    stopped = fork("copy", resume=True, status=143, trap=StopAt(5), **options)
    assert not (stopped.path / "checkpoints" / "model_level_2.pt").exists()
    assert list(stopped.csv("summary")["level"]) == list(range(level))
    again = fork("copy", resume=True, **KINDS[kind])
    again.assert_same_figures(undisturbed[kind])


@pytest.mark.parametrize("place", range(0, 15))
def test_rows_stay_until_resume_level_has_its_state(undisturbed, fork, place):
    """kill -9 at each of its first writes: as long as the old state stands, so do its rows and checkpoints."""
    run = copy_of(undisturbed["imp"], fork.folder)
    before = contents(run.path)
    options = {**KINDS["imp"], "experiment_params.resume_level": 1}
    killed = fork.start("copy", resume=True, trap=DieAt(place), **options).finish(None)
    assert killed.status == -signal.SIGKILL
    after = contents(run.path)
    stands = after["artifacts/state.json"] == before["artifacts/state.json"]
    assert stands or place > 2  # environment.json is written first
    if stands:
        kept = [name for name in before if name.startswith(("metrics/", "checkpoints/"))]
        assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    fork("copy", resume=True, **KINDS["imp"]).assert_same_figures(undisturbed["imp"])


class Auto(MustBeMet):
    """What ``precision: auto`` means here; other things on one rank, if asked for."""

    def __init__(self, dtype: torch.dtype | None, rank: str = ""):
        self.dtype, self.rank = dtype, rank

    def lay(self) -> None:
        from utils.training import trainer as training

        mine = self.rank in ("", os.environ.get("RANK", ""))

        def meaning(precision: str, device: torch.device) -> torch.dtype | None:
            if precision == "auto":
                self.met()
            return self.dtype if mine else None

        training.autocast_dtype = meaning


@pytest.mark.parametrize("level", [0, 1])
def test_auto_precision_stays_what_it_was(fork, level):
    options = {**KINDS["imp"], "experiment_params.precision": "auto"}
    whole = fork("whole", trap=Auto(torch.bfloat16), **options)
    fork("moved", status=143, trap=Both(Auto(torch.bfloat16), StopAt(41)), **options)
    run = fork("moved", resume=True, trap=Auto(None), **options, **{"experiment_params.resume_level": level})
    run.assert_same_figures(whole)
    assert run.err == (
        "harness: note: experiment_params.precision: auto stays bfloat16, which it was where the run began; "
        "here it would be float32\n"
    )


class Worthwhile(MustBeMet):
    """Compiling is possible here, and pays from two levels on: 3 epochs of 1,408 images each, LeNet's 400 values."""

    def lay(self) -> None:
        from utils.training import compiling

        def possible(cfg, ctx) -> str:
            self.met()
            return ""

        compiling._not_on_a_gpu, compiling.SAVED_SECONDS_PER_VALUE = possible, 6e-7


def test_a_run_that_grows_is_not_compiled_from_the_middle_on(fork):
    options = {**KINDS["imp"], "prune_params.num_levels": 3}
    whole = fork("whole", **options)
    first = fork("grown", trap=Worthwhile(), **{**options, "prune_params.num_levels": 1})
    assert "compile: auto is off here" in first.err
    run = fork("grown", resume=True, trap=Worthwhile(), **options)
    run.assert_same_figures(whole)
    assert "compile: auto compiles training steps" in run.err
    assert "compile: auto stays nothing, which it was where the run began; here it would be training steps" in run.err


def test_auto_precision_is_rank_0s(fork):
    options = {**SHORT, "experiment_params.precision": "auto"}
    one, _ = [rank.finish() for rank in fork.ranks("one", 2, trap=Auto(None), **options)]
    other, _ = [rank.finish() for rank in fork.ranks("other", 2, trap=Auto(torch.bfloat16, rank="1"), **options)]
    other.assert_same_figures(one)


def test_edited_tables_are_put_right(undisturbed, fork):
    """A plain resume goes by its state's tables, so that no row is lost or doubled."""
    fork("edited", status=143, trap=StopAt(50), **KINDS["imp"])
    metrics = fork.folder / "edited" / "metrics"
    (metrics / "summary.csv").write_text("level\n0\n0\n")
    (metrics / "epochwise_metrics" / "level_2_metrics.csv").write_text("rows of another attempt")
    with open(metrics / "epochwise_metrics" / "level_1_metrics.csv", "a") as file:
        file.write("1,2,3,4,5,6,7,8\n")
    fork("edited", resume=True, **KINDS["imp"]).assert_same_figures(undisturbed["imp"])


@pytest.mark.parametrize(
    "damage",
    ["level,density\n0,1\n", "", None, "0,1", "not,a\ntable"],
    ids=["columns", "empty", "missing", "row", "other"],
)
def test_damaged_table_stops_resume_level(undisturbed, fork, damage):
    run = copy_of(undisturbed["imp"], fork.folder)
    summary = run.path / "metrics" / "summary.csv"
    summary.unlink() if damage is None else summary.write_text(damage)
    before = contents(run.path)
    options = {**KINDS["imp"], "experiment_params.resume_level": 2}
    last = fork("copy", resume=True, status=1, **options).last_line
    assert last.startswith("harness: ") and "summary.csv" in last
    before.pop("artifacts/environment.json")
    after = contents(run.path)
    assert {name: after[name] for name in before} == before


def test_a_resume_within_level_0_makes_no_table_of_levels(fork):
    """An empty summary.csv would have figures take the run for one with levels."""
    run = fork("begun", status=143, trap=StopAt(3), **KINDS["imp"])
    assert not (run.path / "metrics" / "summary.csv").exists()
    fork("begun", status=143, resume=True, trap=StopAt(3), **KINDS["imp"])
    assert not (run.path / "metrics" / "summary.csv").exists()


CHANGED = {
    "optimizer.lr": 0.2,
    "optimizer.milestones": "0.5",
    "dataset.batch_size": 64,
    "model_params.model_name": "conv2",
    "prune_params.prune_rate": 0.4,
    "prune_params.prune_method": "random",
    "experiment_params.seed": 1,
    "experiment_params.epochs_per_level": 4,
    "experiment_params.training_type": "lrr",
    "experiment_params.precision": "bf16",
}


def test_options_that_change_the_experiment_are_refused_by_name(undisturbed, fork):
    run = copy_of(undisturbed["imp"], fork.folder)
    before = contents(run.path)
    done = fork("copy", resume=True, status=2, **{**KINDS["imp"], **CHANGED})
    for name in CHANGED:
        (line,) = [line for line in done.err.splitlines() if line.startswith(f"harness: {name}: ")]
        assert "would change the experiment being resumed, where it is " in line
    assert len(done.err.splitlines()) == len(CHANGED)
    assert contents(run.path) == before


def test_free_options_and_other_processes(undisturbed, fork):
    """What says where and how a run executes may change; that the last bits may, too, is said once."""
    fork("free", status=143, trap=StopAt(5), **KINDS["imp"])
    free = {
        "dist_params.timeout_minutes": 5, "experiment_params.save_every_epochs": 2, "experiment_params.compile": "off",
        "experiment_params.channels_last": "false", "dataset.data_root": "elsewhere", "dist_params.nproc": 2,
    }  # fmt: skip
    ranks = fork.ranks("free", 2, resume=True, **{**KINDS["imp"], **free})
    done = [rank.finish() for rank in ranks]
    changes = "processes 2 (was 1), compile off (was auto), channels_last False (was True)"
    notes = [
        "harness: note: dataset.data_root: elsewhere has no effect: Digits are embedded in scikit-learn",
        f"harness: note: resumed with {changes}: the last bits of figures may differ",
    ]
    assert (done[0].err + done[1].err).splitlines() == notes
    gap = undisturbed["imp"].csv("summary")["final_test_loss"] - done[0].csv("summary")["final_test_loss"]
    assert gap.abs().max() < 0.05
    assert len(done[0].csv("epochwise_metrics/level_0_metrics")) == 3


def test_other_processes_change_more_than_bits_of_batch_norm(fork):
    options = {**KINDS["imp"], "model_params.model_name": "resnet20", "experiment_params.epochs_per_level": 1,
               "optimizer.warmup_epochs": 0, "experiment_params.save_every_epochs": None}  # fmt: skip
    fork("norms", status=143, trap=StopAt(5), **options)
    ranks = fork.ranks("norms", 2, resume=True, **{**options, "dist_params.nproc": 2})
    notes = "".join(rank.finish().err for rank in ranks)
    change = "processes 2 (was 1)"
    assert (
        notes == f"harness: note: resumed with {change}: BatchNorm sees other parts of a batch, so figures may differ\n"
    )


@pytest.mark.parametrize("loader", ["memory", "torchvision"])
def test_other_data_are_refused_and_the_same_elsewhere_are_not(fork, tmp_path, loader):
    options = {
        **KINDS["imp"], "dataset.dataset_name": "ImageFolder", "dataset.loader": loader, "dataset.resolution": 16,
        "dataset.batch_size": 16, "dataset.num_workers": 0,
    }  # fmt: skip
    root = digit_tree(tmp_path / "here")
    shutil.copytree(root, tmp_path / "moved")
    fork("run", status=143, trap=StopAt(5), **options, **{"dataset.data_root": root})
    other = digit_tree(tmp_path / "other", train=41)
    refused = fork("run", resume=True, status=2, **options, **{"dataset.data_root": other})
    fault = f"dataset.data_root: {other} holds other data than the run being resumed began with"
    assert refused.last_line == f"harness: {fault}"
    resumed = fork("run", resume=True, **options, **{"dataset.data_root": tmp_path / "moved"})
    resumed.assert_same_figures(fork("whole", **options, **{"dataset.data_root": root}))


def test_two_runs_in_one_directory(fork):
    first = fork.start("one", **{**KINDS["imp"], "experiment_params.epochs_per_level": 10000})
    first.wait_for_rows(1)
    second = fork("one", resume=True, status=1, **{**KINDS["imp"], "experiment_params.epochs_per_level": 10000})
    assert second.last_line == f"harness: another process is running in {fork.folder / 'one'}"
    first.kill()
    first.finish(None)


def test_directory_left_before_the_run_began(fork):
    """Death before the config is written leaves nothing to resume, and nothing in the way of starting."""
    first = fork.start("early", trap=DieAt(0), **SHORT).finish(None)
    assert first.status == -signal.SIGKILL and first.path.exists() and not begun(first.path)
    refused = fork("early", resume=True, status=2, **SHORT)
    assert "stopped before it began; start it with expt_name instead" in refused.last_line
    assert fork("early", **SHORT).csv("summary").shape[0] == 2


def test_environment_is_recorded_at_every_start(fork, launch):
    """The second start is a user's: its command line is recorded word by word."""
    fork("second", status=143, trap=StopAt(3), **SHORT)
    again = {**SHORT, "experiment_params.expt_name": None, "experiment_params.resume_expt_name": "second"}
    begin = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    run = launch("second", **again)
    first, second = json.loads((run.path / "artifacts" / "environment.json").read_text())
    assert second["command"] == launch.command("second", **again)[1:]
    assert "--experiment_params.expt_name=second" in first["command"]
    assert second["torch"] == torch.__version__ and second["host"] == platform.node()
    assert second["folder"] == str(ROOT) and second["processes"] == second["threads"] == 1
    assert second["images"] == {"training": 1437, "validation": 0, "test": 360} and second["processor"]
    started = datetime.datetime.fromisoformat(second["started"])
    assert begin <= started <= datetime.datetime.now(datetime.timezone.utc)
    assert datetime.datetime.fromisoformat(first["started"]) <= begin
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert second["git_commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert isinstance(second["git_dirty"], bool)  # which one depends on what else runs in this checkout


# --- the directory of a run, as a shell completes it -----------------------------------------------------------------


@pytest.mark.parametrize("given", ["exp/a", "exp/a/", "./exp/a//", "{root}/exp/a/", "link/a", "a/", "a"])
def test_a_run_is_resumed_by_its_directory(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp").mkdir()
    (tmp_path / "link").symlink_to("exp")
    e = load_config(
        ["--experiment_params.base_dir=exp", f"--experiment_params.resume_expt_name={given.format(root=tmp_path)}"]
    ).experiment_params
    assert (e.base_dir, e.resume_expt_name) == ("exp", "a")


@pytest.mark.parametrize(("given", "folder"), [("elsewhere/a/", "elsewhere"), ("./a", "."), ("/x/y/a", "/x/y")])
def test_the_directory_names_base_dir_where_nothing_else_does(given, folder):
    e = load_config([f"--experiment_params.resume_expt_name={given}"]).experiment_params
    assert (e.base_dir, e.resume_expt_name) == (folder, "a")
    with pytest.raises(ConfigError, match=r"resume_expt_name: .* a run in experiment_params.base_dir, which is exp"):
        load_config(["--experiment_params.base_dir=exp", f"--experiment_params.resume_expt_name={given}"])


def test_the_directory_may_begin_at_home(tmp_path, monkeypatch):
    """A shell leaves the ~ behind the = of an option as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    e = load_config(["--experiment_params.resume_expt_name=~/runs/a/"]).experiment_params
    assert (e.base_dir, e.resume_expt_name) == (f"{tmp_path}/runs", "a")


@pytest.mark.parametrize("given", ["/", "exp/..", "exp/.hidden", "exp/a b /", "3/.", "exp/none"])
def test_what_names_no_run_is_refused(given):
    with pytest.raises(ConfigError, match=r"experiment_params.resume_expt_name: .* is not allowed"):
        load_config([f"--experiment_params.resume_expt_name={given}"])


def test_a_run_goes_on_by_its_directory(fork, monkeypatch):
    short = {"experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}
    fork("a", **short, **{"prune_params.num_levels": 1})
    options = {"experiment_params.base_dir": None, "experiment_params.resume_expt_name": f"{fork.folder}/a/"}
    fork("a", resume=True, **short, **options, **{"prune_params.num_levels": 2})
    assert len((fork.folder / "a" / "metrics" / "summary.csv").read_text().splitlines()) == 3


def test_a_finished_run_gets_lost_tables_back(fork):
    """From its saved state; a grid goes by the tables, and would take the run for unfinished."""
    short = {"experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0, "prune_params.num_levels": 2}
    fork("a", **short)
    tables = [fork.folder / "a" / "metrics" / name for name in ("summary.csv", "layerwise_density.csv")]
    for table in tables:
        before = table.read_bytes()
        table.unlink()
        assert "finished, all" not in fork("a", resume=True, **short).out
        assert table.read_bytes() == before
    assert "finished, all 2 levels" in fork("a", resume=True, **short).out
