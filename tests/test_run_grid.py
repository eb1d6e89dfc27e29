"""utils.run_grid: grids checked as a whole, run, stopped, gone on with; all on real runs of the harness."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness_params import dump_yaml
from tests.conftest import ROOT, SMALL
from utils.errors import ConfigError
from utils.grids import process, runner
from utils.grids.grid import Grid, read_grid, summary
from utils.grids.grid_run import GridRun
from utils.grids.process import environment
from utils.plot_results import main as plot
from utils.plots.names import method_name
from utils.run_grid import Asked, main, parse
from utils.runs.tables import EPOCH_COLUMNS, SUMMARY_COLUMNS

CONFIG = str(ROOT / "configs" / "digits_lenet.yaml")


def write(folder: Path, **grid) -> str:
    grid = {"config": CONFIG, "base_dir": str(folder / "runs"), "runs": {"a": {}}, **grid}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in grid.items() if value is not None}, sort_keys=False))
    return str(path)


def faults(folder: Path, overrides=None, **grid) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_grid(write(folder, **grid), overrides)
    assert not (folder / "runs").exists()
    return caught.value.faults


# --- reading ---------------------------------------------------------------------------------------------------------


def test_runs_are_the_product_of_names_lists_and_seeds(tmp_path):
    runs = {
        "imp": {"experiment_params.training_type": "imp"},
        "snip": {
            "prune_params.er_method": "snip",
            "each": {"prune_params.er_init": [0.5, 0.1], "optimizer.milestones": [[0.5], [0.5, 0.75]]},
        },
    }
    grid = read_grid(write(tmp_path, seeds=[0, 7], jobs=3, runs=runs, set={"optimizer.lr": 0.3}))
    variants = [f"snip_{d}_{m}" for d in ("0.5", "0.1") for m in ("0.5", "0.5,0.75")]
    assert [run.name for run in grid.runs] == [f"{n}_seed{s}" for s in (0, 7) for n in ("imp", *variants)]
    assert grid.parallel == 3
    last = grid.runs[-1].cfg
    assert (last.prune_params.er_init, last.experiment_params.seed, last.optimizer.lr) == (0.1, 7, 0.3)
    assert last.optimizer.milestones == (0.5, 0.75)
    assert last.experiment_params.expt_name == "snip_0.1_0.5,0.75_seed7"
    assert grid.runs[-1].path == tmp_path / "runs" / grid.runs[-1].name


def test_a_run_and_the_command_line_win_over_set(tmp_path):
    common = {"optimizer.lr": 0.3, "optimizer.gamma": 0.5, "optimizer.momentum": 0.8}
    path = write(tmp_path, set=common, runs={"a": {"optimizer.lr": 0.2}})
    assert read_grid(path).runs[0].cfg.optimizer.lr == 0.2
    grid = read_grid(path, {"optimizer.gamma": "0.7", "jobs": "4", "base_dir": str(tmp_path / "other")})
    optimizer = grid.runs[0].cfg.optimizer
    assert (optimizer.lr, optimizer.gamma, optimizer.momentum) == (0.2, 0.7, 0.8)
    assert (grid.parallel, grid.runs[0].path.parent) == (4, tmp_path / "other")


def test_values_are_text_that_the_options_read(tmp_path):
    """YAML's own guesses would make 5e-4 a word, and `on` true."""
    path = tmp_path / "g.yaml"
    path.write_text(
        f"config: {CONFIG}\nruns: {{a: {{optimizer.weight_decay: 5e-4, experiment_params.compile: on, "
        "prune_params.exclude: [fc3, fc1*]}}\n"
    )
    cfg = read_grid(str(path), {"base_dir": str(tmp_path)}).runs[0].cfg
    assert (cfg.optimizer.weight_decay, cfg.experiment_params.compile) == (5e-4, "on")
    assert cfg.prune_params.exclude == ("fc3", "fc1*")


@pytest.mark.parametrize(
    ("grid", "fault"),
    [
        ({"seed": [0]}, "seed: unknown key of a grid: did you mean seeds?"),
        ({"jobs": 0}, "jobs: '0' is not allowed: a whole number >= 1"),
        ({"seeds": [0, "x"]}, "seeds: 'x' is not allowed: a whole number >= 0"),
        ({"seeds": []}, "seeds: at least one is expected"),
        ({"seeds": [1, 1]}, "seeds: ['1', '1'] holds a number twice"),
        ({"runs": None}, "runs: at least one run is expected: {NAME: {section.key: value, ...}, ...}"),
        ({"runs": ["a"]}, "runs: ['a'] is not allowed: a mapping is expected"),
        ({"config": None}, "run a: config: the path of a YAML file is expected, here or for the whole grid"),
        (
            {"runs": {"a": {"optimizer": {"lr": 1}}}},
            "run a: optimizer: options are written with a dot, as in optimizer.lr",
        ),
        (
            {"set": {"experiment_params.seed": 1}},
            "set: experiment_params.seed: the grid itself sets it: seeds in the grid file",
        ),
        (
            {"runs": {"a": {"optimizer.lr": 1, "each": {"optimizer.lr": [1]}}}},
            "run a: optimizer.lr: given twice, also in each",
        ),
        ({"runs": {"a": {"each": {"optimizer.lr": []}}}}, "run a: each: optimizer.lr: at least one value is expected"),
        (
            {"runs": {"a_1": {}, "a": {"each": {"optimizer.lr": [1]}}}},
            "run a_1: two runs have this name",
        ),
    ],
)
def test_faults_of_the_grid(tmp_path, grid, fault):
    assert fault in faults(tmp_path, **grid)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("seed", "seeds in the grid file"),
        ("base_dir", "base_dir in the grid file, or --base_dir"),
        ("expt_name", "the names in runs"),
        ("resume_expt_name", "a run that has begun is resumed"),
        ("resume_level", "a run goes on where it stands"),
    ],
)
def test_what_the_grid_decides_is_no_option_of_the_command_line(tmp_path, option, instead):
    key = f"experiment_params.{option}"
    assert faults(tmp_path, {key: "7"}) == [f"command line: {key}: the grid itself sets it: {instead}"]


@pytest.mark.parametrize(
    ("key", "runs"),
    [
        ("prune_params.er_init", "snip_0.5 and 1 more"),
        ("prune_params.er_method", "snip_0.5 and 1 more"),
        ("experiment_params.training_type", "wr"),
    ],
)
def test_the_command_line_does_not_change_what_a_run_is_named_for(tmp_path, key, runs):
    grid = {
        "wr": {"experiment_params.training_type": "wr"},
        "snip": {"prune_params.er_method": "snip", "each": {"prune_params.er_init": [0.5, 0.1]}},
    }
    fault = f"command line: {key}: set by run {runs}; change it in the grid file"
    assert faults(tmp_path, {key: "x"}, runs=grid) == [fault]


def test_every_run_is_checked_before_any_starts(tmp_path, capsys):
    runs = {
        "good": {},
        "typo": {"optimizer.lrr": 1},
        "wr": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 99},
        "gone": {"config": str(tmp_path / "no.yaml")},
        "bad/name": {},
    }
    assert main([write(tmp_path, runs=runs)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "run typo_seed0: optimizer.lrr: unknown option" in lines[0]
    assert "run wr_seed0: prune_params.rewind_epoch: 99 is not allowed" in lines[1]
    assert "run gone_seed0:" in lines[2] and "no such file" in lines[2]
    assert "bad/name_seed0" in lines[3]
    assert not (tmp_path / "runs").exists()


LENET = "configs/grids/fashionmnist_lenet.yaml"
BASELINES = [ROOT / LENET, *sorted(ROOT.glob("configs/grids/*_resnet20*.yaml"))]


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_shipped_grids_are_the_baselines_of_three_seeds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(str(path), {"base_dir": str(tmp_path)})
    small = path.stem.endswith("_small")  # one density, and no GraSP
    assert len(grid.runs) == 3 * (3 + (5 if small else 6 * 5))
    methods = {method_name(run.cfg) for run in grid.runs}
    between = {"IMP", "IMP + weight rewinding", "IMP + LR rewinding"}
    once = {"SNIP", "SynFlow", "Random ERK", "Random balanced", "Random"} | (set() if small else {"GraSP"})
    assert methods == between | once
    assert not any(run.cfg.notes for run in grid.runs), "no option without effect"


def test_the_shipped_grid_of_tickets_has_a_branch_per_level(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(str(ROOT / LENET).replace(".yaml", "_tickets.yaml"), {"base_dir": str(tmp_path)})
    levels = grid.runs[0].cfg.prune_params.num_levels
    assert levels == 16 and len(grid.runs) == 3 * (1 + 2 * (levels - 1))
    branches = [run for run in grid.runs if run.after]
    assert sorted(run.cfg.ticket_params.level for run in branches) == sorted([*range(1, levels)] * 6)
    assert all(run.after == f"imp_seed{run.cfg.experiment_params.seed}" for run in branches)
    assert not any(run.cfg.notes for run in grid.runs), "no option without effect"


def test_a_file_that_is_no_grid(tmp_path):
    (tmp_path / "g.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="is not a mapping"):
        read_grid(str(tmp_path / "g.yaml"))
    with pytest.raises(ConfigError, match="no such file"):
        read_grid(str(tmp_path / "none.yaml"))


def test_a_run_left_before_its_config_was_written_is_started(tmp_path):
    """As after a full disk or a kill at the start; it stops no other run of the grid."""
    artifacts = tmp_path / "runs" / "a_seed0" / "artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "lock").touch()
    grid = read_grid(write(tmp_path, seeds=[0, 1]))
    assert [run.cfg.experiment_params.expt_name for run in grid.runs] == ["a_seed0", "a_seed1"]
    assert summary(grid.runs) == "2 runs: 0 finished before, 0 to resume, 2 to start"


def shown(run: GridRun) -> tuple:
    """What a grid shows of a run: levels, epochs, density, accuracy."""
    progress = run.progress()
    return progress.levels, progress.epochs, progress.density, progress.accuracy


def test_a_damaged_csv_of_a_run_is_named(tmp_path, capsys):
    path = write(tmp_path)
    [run] = read_grid(path).runs
    (run.path / "metrics").mkdir(parents=True)
    (run.path / "expt_config.yaml").write_text(dump_yaml(run.cfg))
    table = run.path / "metrics" / "summary.csv"
    header = ",".join([*SUMMARY_COLUMNS, "more"])
    for text, fault in (
        ("level,density\n0,1\n", f"{table}: missing columns: sparsity, final_test_acc, "),
        (
            ",".join([*SUMMARY_COLUMNS, "more"]) + "\n0,dense,0,90,91,0.5,2,10,x\n",
            "metrics: not a number in summary.csv",
        ),
    ):
        table.write_text(text)
        assert main([path]) == 1
        message = capsys.readouterr().err
        assert message.startswith("run_grid: ") and fault in message and message.count("\n") == 1
    table.write_text(header + "\n0,1,0,90,91,0.5,2,10,x\n")
    assert shown(run) == (1, 2, 1.0, 90.0), "newer tables have more columns"
    epochs = table.parent / "epochwise_metrics" / "level_1_metrics.csv"
    epochs.parent.mkdir(exist_ok=True)
    for cells, accuracy in ((("",), 90.0), (("", "85.5"), 85.5), (("", "85.5", ""), 85.5)):
        rows = [f"{epoch},1,{cell and 0.5},60,{cell},0.1,5,1" for epoch, cell in enumerate(cells)]
        epochs.write_text("\n".join([",".join(EPOCH_COLUMNS), *rows]))
        assert shown(run) == (1, 2 + len(cells), 1.0, accuracy), "the last evaluation's"


def test_command_line():
    assert parse(["g.yaml", "--jobs=2", "--optimizer.lr=1"]) == Asked("g.yaml", {"jobs": "2", "optimizer.lr": "1"})
    for words in ([], ["a", "b"], ["a", "--job=2"], ["a", "--jobs"], ["a", "--jobs=1", "--jobs=2"]):
        with pytest.raises(ConfigError):
            parse(words)


def test_help_tells_the_format(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "base_dir:" in text and "seeds:" in text and "Exit status" in text
    assert main([]) == 2


def test_threads_and_gpus_of_a_place(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    shared = environment(Grid((), parallel=2), 0)
    assert shared["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    grid = Grid((), parallel=3, threads=5, gpus=("4", "6"))
    assert [environment(grid, place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    assert environment(grid, 0)["OMP_NUM_THREADS"] == "5"
    assert [environment(grid, 0, processes)["OMP_NUM_THREADS"] for processes in (2, 9)] == ["2", "1"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    assert environment(Grid((), parallel=2), 0, processes=3)["OMP_NUM_THREADS"] == "2"


def test_a_run_of_a_grid_under_torchrun_is_no_worker_of_it(tmp_path):
    """Asked of torchrun itself, which knows best what it sets."""
    code = "import json, os; from utils.grids.grid import Grid; from utils.grids.process import environment; "
    code += f"json.dump([list(os.environ), list(environment(Grid(()), 0))], open({str(tmp_path / 'said')!r}, 'w'))"
    script = tmp_path / "worker.py"
    script.write_text(code)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    of_the_worker, of_the_run = (
        set(names) - os.environ.keys() for names in json.loads((tmp_path / "said").read_text())
    )
    assert {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} <= of_the_worker
    assert of_the_run - {"PYTHONPATH", "TORCH_NCCL_ASYNC_ERROR_HANDLING"} == {"OMP_NUM_THREADS"} - os.environ.keys()


def test_each_gpu_has_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    grid = read_grid(write(tmp_path, gpus=[0, 1, 3]))
    assert (grid.parallel, grid.gpus) == (3, ("0", "1", "3"))
    assert grid.runs[0].processes == 1, "of one GPU, whatever else the machine has"
    assert read_grid(write(tmp_path, gpus=[0, 1], jobs=5)).parallel == 5
    fault = "jobs: 1 leaves some of 3 gpus unused; at least 3"
    assert faults(tmp_path, gpus=[0, 1, 3], jobs=1) == [fault]
    assert faults(tmp_path, {"jobs": "1"}, gpus=[0, 1, 3]) == [fault]


def test_gpus_are_counted_in_the_inherited_list(tmp_path, monkeypatch):
    """The others may be someone else's."""
    for inherited, gpus, found in (
        ("4,5", [0, 1], ("4", "5")),
        ("4, 5", [1], ("5",)),
        ("GPU-8932f937,MIG-b7c1", [1, 0], ("MIG-b7c1", "GPU-8932f937")),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
        assert read_grid(write(tmp_path, gpus=gpus)).gpus == found
    for inherited, devices in (("4,5", 2), ("4,-1,5", 1), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
        fault = f"gpus: 2 is not allowed: CUDA_VISIBLE_DEVICES={inherited} has {devices} devices"
        assert faults(tmp_path, gpus=[2]) == [fault]


def test_threads_are_an_option_of_the_run(tmp_path):
    """A small MLP takes no notice of OMP_NUM_THREADS."""
    runs = {
        "one": {"dist_params.nproc": 1},
        "two": {"dist_params.nproc": 2},
        "nine": {"dist_params.nproc": 9},
        "alone": {"dist_params.nproc": 9, "dist_params.distributed": False},
        "own": {"dist_params.nproc": 2, "dist_params.threads": 3},
    }
    path = write(tmp_path, threads=4, runs=runs)
    started = read_grid(path).runs
    assert [run.cfg.dist_params.threads for run in started] == [4, 2, 1, 4, 3]
    assert [run.processes for run in started] == [1, 2, 9, 1, 2]
    assert "--dist_params.threads=2" in started[1].words
    assert [run.cfg.dist_params.threads for run in read_grid(path, {"threads": "6"}).runs] == [6, 3, 1, 6, 3]
    assert [run.cfg.dist_params.threads for run in read_grid(path, {"threads": "0"}).runs] == [0, 0, 0, 0, 3]
    common = write(tmp_path, threads=4, set={"dist_params.threads": 7})
    assert read_grid(common).runs[0].cfg.dist_params.threads == 7
    assert read_grid(common, {"threads": "2"}).runs[0].cfg.dist_params.threads == 2


def test_a_grid_begun_with_other_threads_is_gone_on_with(tmp_path):
    [run] = read_grid(write(tmp_path)).runs
    run.path.mkdir(parents=True)
    (run.path / "expt_config.yaml").write_text(dump_yaml(run.cfg))
    [run] = read_grid(write(tmp_path, threads=2)).runs
    assert run.begun and "--dist_params.threads=2" in run.words


# --- running ---------------------------------------------------------------------------------------------------------


class Running:
    """``python -m utils.run_grid`` in progress; on a terminal, or with its output in a pipe."""

    def __init__(self, path: str, terminal: bool = False):
        self.near, far = pty.openpty() if terminal else os.pipe()
        if terminal:
            fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        words = [sys.executable, "-m", "utils.run_grid", path]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=far, stderr=subprocess.STDOUT)
        os.close(far)

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in tasks.read_text().split()]

    def finish(self) -> tuple[int, str]:
        output = b""
        while True:
            try:
                part = os.read(self.near, 4096)
            except OSError:  # how a terminal says that its other end is closed
                break
            if not part:
                break
            output += part
        os.close(self.near)
        return self.process.wait(timeout=60), output.decode()


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_stopped_gone_on_with_and_a_failure_that_stops_no_other(tmp_path, capsys):
    """Stopped halfway by SIGINT; the same run goes on beside one that fails; a finished grid has nothing left to do."""
    options = {key: value for key, value in SMALL.items() if not key.startswith(("model", "dist"))}
    options |= {"experiment_params.epochs_per_level": 20, "prune_params.num_levels": 3}
    path = write(tmp_path, threads=1, set=options, runs={"imp": {}})
    tables = tmp_path / "runs" / "imp_seed0" / "metrics"

    first = Running(path)
    wait_for(lambda: any(tables.rglob("level_0*.csv")))
    [child] = first.children()
    first.process.send_signal(signal.SIGINT)
    status, said = first.finish()
    assert status == 130
    assert gone(child)
    lines = said.splitlines()
    assert lines[0] == "run_grid: 1 runs: 0 finished before, 0 to resume, 1 to start; 1 at a time"
    assert lines[1] == "imp_seed0: started"
    assert any(line.startswith("imp_seed0: stopped: ") for line in lines)
    assert lines[-1].startswith("run_grid: stopped by SIGINT")
    assert (tmp_path / "runs" / "imp_seed0" / "artifacts" / "state.json").exists()
    before = pd.read_csv(tables / "epochwise_metrics" / "level_0_metrics.csv", dtype=str)

    hot = {"optimizer.lr": "1e30", "optimizer.warmup_epochs": 0}
    both = write(tmp_path, jobs=2, threads=1, set=options, runs={"hot": hot, "imp": {}})
    status, said = Running(both, terminal=True).finish()
    assert status == 1
    assert "2 runs: 0 finished before, 1 to resume, 1 to start" in said
    log = tmp_path / "runs" / ".logs" / "hot_seed0.log"
    assert "hot_seed0: FAILED, exit 1: harness: training loss is" in said and str(log) in said
    assert "imp_seed0: done in " in said and "3 of 3 levels, density 0.25" in said
    assert re.search(r"grid \d/2 runs \|.*\| +\d+% .* left", said) and re.search(r"imp_seed0 \d/3 levels \|", said)
    assert re.search(r"\d\d:\d\d left, accuracy \d", said)
    assert "run_grid: 1 of 2 runs failed: hot_seed0" in said
    after = pd.read_csv(tables / "epochwise_metrics" / "level_0_metrics.csv", dtype=str)
    pd.testing.assert_frame_equal(after.head(len(before)), before)  # with its times: those epochs were not run again
    assert len(pd.read_csv(tables / "summary.csv")) == 3

    assert [run.finished for run in read_grid(both).runs] == [False, True]
    for kind in ("accuracy", "layers", "curves"):  # figures of a real run
        figure = tmp_path / f"{kind}.png"
        assert plot([str(tmp_path / "runs" / "imp_seed0"), "--kind", kind, "--out", str(figure)]) == 0
        assert figure.exists()
    path = write(tmp_path, set=options, runs={"imp": {}})
    [run] = read_grid(path).runs
    assert run.progress().epochs == run.progress().total == 60
    assert main([path]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run_grid: all 1 runs are finished"
    with pytest.raises(ConfigError, match=r"run imp_seed0: optimizer.lr: 0.2 would change the experiment"):
        read_grid(path, {"optimizer.lr": "0.2"})


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """harness(code): has grids run this in the harness's stead."""

    def install(code: str) -> None:
        path = tmp_path / "stand_in.py"
        path.write_text(code)
        monkeypatch.setattr(process, "HARNESS", path)

    return install


def test_the_log_keeps_what_earlier_starts_of_a_run_said(tmp_path, harness, capsys):
    path, log = write(tmp_path), tmp_path / "runs" / ".logs" / "a_seed0.log"
    for code, fault in (("raise SystemExit('disk full')", "disk full"), ("raise SystemExit(3)", "no output on stderr")):
        harness(code)
        assert main([path]) == 1
        assert f"a_seed0: FAILED, exit {1 if fault in code else 3}: {fault}" in capsys.readouterr().out
    assert log.read_text() == "disk full\n"


def test_each_note_of_the_configs_is_told_once(tmp_path, harness, capsys):
    harness("raise SystemExit(3)")
    runs = {"imp": {}, "wr": {"experiment_params.training_type": "wr"}}
    common = {"dataset.num_workers": 4, "prune_params.rewind_epoch": 3, "dist_params.wire": "bf16"}
    main([write(tmp_path, set=common | {"dist_params.nproc": 1}, seeds=[0, 1], runs=runs)])
    assert [line for line in capsys.readouterr().err.splitlines() if "note" in line] == [
        "run_grid: note: prune_params.rewind_epoch: 3 has no effect: training_type is imp: only wr rewinds to an epoch "
        "(2 of 4 runs)",
        "run_grid: note: dataset.num_workers: 4 has no effect: the set is held in memory, where no worker is needed",
        "run_grid: note: dist_params.wire: bf16 has no effect: nproc is 1: one process",
    ]


def test_a_signal_reaches_a_run_that_is_being_started(tmp_path, harness, monkeypatch):
    harness("import time; time.sleep(10)")
    made = []

    class Signalled(process.RunProcess):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runner, "RunProcess", Signalled)
    assert main([write(tmp_path, seeds=[0, 1])]) == 128 + signal.SIGTERM
    assert [active.process.returncode for active in made] == [-signal.SIGTERM]


def test_a_run_does_not_outlive_a_killed_grid(tmp_path):
    grid = Running(write(tmp_path, threads=1, set={"experiment_params.epochs_per_level": 100000}))
    wait_for(grid.children)
    [child] = grid.children()
    grid.process.kill()
    grid.finish()
    wait_for(lambda: gone(child), 30)
