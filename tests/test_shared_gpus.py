"""Grids whose runs share a GPU through MPS, with doubles of NVIDIA's programs (tests/mps_double.py)."""

import contextlib
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL
from tests.mps_double import GPUS, Doubles, compile_driver
from tests.processes import _CONTEXT
from utils.errors import ConfigError
from utils.grids import process
from utils.grids.grid import read_grid, runs_per_gpu
from utils.grids.mps import thread_share
from utils.grids.mps_daemon import pipes_place
from utils.run_grid import main

FIRST, SECOND = (f"GPU-{uuid}" for uuid in GPUS)
PROGRAM = "nvidia-cuda-mps-control"
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", SHARE)
# In the harness's stead: notes its environment, and when it ends.
RUN = f"""
import json, os, time
def record(what):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps({{"what": what}} | {{name: os.environ.get(name) for name in {VARIABLES}}}) + chr(10))
record("run")
time.sleep(0.3)
record("run ended")
raise SystemExit("as it should")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def doubles(tmp_path, driver, monkeypatch) -> Iterator[Doubles]:
    """The doubles, found by this process and what it starts: one GPU, no daemon, and an own folder for pipes."""
    multiprocessing.util.get_temp_dir()  # of the fork server, which outlives this test
    installed = Doubles(tmp_path, driver)
    short = tempfile.TemporaryDirectory(dir="/tmp")  # a socket's path is short
    installed.env["TMPDIR"] = short.name
    monkeypatch.setattr(tempfile, "tempdir", short.name)
    for name, value in installed.env.items():
        monkeypatch.setenv(name, value)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield installed
    for start in installed.records("start"):  # daemons that a failed test has left
        with contextlib.suppress(OSError):
            os.kill(int((Path(start["pipes"]) / f"{PROGRAM}.pid").read_text()), signal.SIGKILL)
    short.cleanup()


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    (tmp_path / "stand_in.py").write_text(RUN)
    monkeypatch.setattr(process, "HARNESS", tmp_path / "stand_in.py")


def grid_file(folder: Path, **grid) -> str:
    options = {**SMALL, "prune_params.num_levels": 1, "experiment_params.epochs_per_level": 1}
    grid = {
        "config": str(ROOT / "configs" / "digits_lenet.yaml"), "base_dir": str(folder / "runs"), "threads": 1,
        "seeds": [0, 1], "jobs": 2, "gpus": [0], "set": options | {"optimizer.warmup_epochs": 0}, "runs": {"a": {}},
        **grid,
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in grid.items() if value is not None}))
    return str(path)


def wait_for(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def order(doubles: Doubles) -> list[str]:
    return [record["what"] for record in doubles.records()]


# --- a daemon of the grid --------------------------------------------------------------------------------------------


def test_runs_share_a_gpu_through_a_daemon_of_the_grid(tmp_path, doubles, stand_in, capsys):
    """The daemon is tried out before the first run starts, and ended after the last one has."""
    main([grid_file(tmp_path, seeds=[0, 1, 2, 3, 4], jobs=4)])
    assert order(doubles)[:2] == ["start", "get_server_list"]
    assert order(doubles)[-2:] == ["quit", "daemon ended"]
    assert sorted(order(doubles)[2:-2]) == ["run"] * 5 + ["run ended"] * 5
    [start] = doubles.records("start")
    assert start["gpus"] == FIRST, "no index: the daemon's clients would count anew"
    folder = Path(start["pipes"])
    for run in doubles.records("run"):
        assert [run[name] for name in VARIABLES] == [FIRST, str(folder), start["logs"], "50"]
    assert not folder.exists() and str(folder.parent) == tempfile.gettempdir()
    out, err = capsys.readouterr()
    assert "run_grid: 4 runs share a GPU through MPS, each with at most 50% of its threads" in out.splitlines()
    assert "mps" not in err


def test_each_run_has_its_own_of_several_gpus(tmp_path, doubles, stand_in, monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", ",".join(GPUS))
    main([grid_file(tmp_path, seeds=[0, 1, 2, 3], jobs=4, gpus=[1, 0])])
    [start] = doubles.records("start")
    assert start["gpus"] == f"{SECOND},{FIRST}"
    runs = doubles.records("run")
    assert sorted(run["CUDA_VISIBLE_DEVICES"] for run in runs) == [FIRST, FIRST, SECOND, SECOND]
    assert {run[SHARE] for run in runs} == {"100"}, "two runs on each GPU"


@pytest.mark.parametrize(("inherited", "seen"), [(None, f"{FIRST},{SECOND}"), ("1", SECOND), (SECOND, SECOND)])
def test_without_gpus_every_run_sees_what_the_grid_sees(tmp_path, doubles, stand_in, monkeypatch, inherited, seen):
    monkeypatch.setenv("FAKE_GPUS", ",".join(GPUS))
    if inherited:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    main([grid_file(tmp_path, gpus=None, jobs=3, seeds=[0, 1, 2])])
    assert [start["gpus"] for start in doubles.records("start")] == [seen]
    runs = doubles.records("run")
    assert [run["CUDA_VISIBLE_DEVICES"] for run in runs] == [seen] * 3 and {run[SHARE] for run in runs} == {"67"}


def test_the_users_own_share_stays(tmp_path, doubles, stand_in, monkeypatch, capsys):
    monkeypatch.setenv(SHARE, "30")
    main([grid_file(tmp_path)])
    assert [run[SHARE] for run in doubles.records("run")] == ["30", "30"]
    assert "2 runs share a GPU through MPS, each with at most 30% of its threads" in capsys.readouterr().out


def test_shares_of_threads():
    """200 / n percent, rounded up and at most 100; by hand."""
    assert [thread_share(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 48)] == [100, 100, 67, 50, 40, 34, 29, 25, 5]
    assert [runs_per_gpu(*case) for case in ((4, "0"), (5, "01"), (2, "01"), (3, ""), (0, ""))] == [4, 3, 1, 3, 0]


def test_pipes_lie_where_their_paths_are_short(monkeypatch):
    """A socket's path has at most 107 characters; TMPDIR may be longer."""
    for usual, place in (("/scratch/me", "/scratch/me"), ("/scratch/" + 50 * "m", "/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", usual)
        assert pipes_place() == place


def test_a_daemon_of_somebody_else_is_used_and_left_alone(tmp_path, doubles, stand_in, monkeypatch, capsys):
    """It is tried out too: where CUDA does not use it, runs take turns."""
    theirs = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": doubles.env["FAKE_DEFAULT_PIPES"]}
    subprocess.run([doubles.program, "-d"], env=theirs, check=True, timeout=20)
    try:
        monkeypatch.setenv("FAKE_DEAF_DRIVER", "1")
        assert main([grid_file(tmp_path, base_dir=str(tmp_path / "more")), "--mps=on"]) == 2
        main([grid_file(tmp_path, base_dir=str(tmp_path / "more"))])
        refusal, note = [line for line in capsys.readouterr().err.splitlines() if "mps: " in line]
        assert refusal == "run_grid: mps: on is not allowed here: CUDA does not use the daemon"
        assert note == "run_grid: note: mps: auto is off here: CUDA does not use the daemon"
        assert [run[SHARE] for run in doubles.records("run")] == [None, None]
        monkeypatch.delenv("FAKE_DEAF_DRIVER")
        main([grid_file(tmp_path, jobs=2, seeds=[0, 1])])
        assert len(doubles.records("start")) == 1 and not doubles.records("quit", "daemon ended")
        for run in doubles.records("run")[2:]:
            assert [run[name] for name in VARIABLES] == ["0", None, None, "100"]
        assert "2 runs share a GPU through the MPS daemon that was there before" in capsys.readouterr().out
    finally:
        subprocess.run([doubles.program], input="quit\n", env=theirs, check=True, timeout=20, text=True)
    wait_for(lambda: doubles.records("daemon ended"))


# --- no daemon -------------------------------------------------------------------------------------------------------

REFUSALS = {
    "no program": ({"PATH": "/nowhere"}, f"there is no {PROGRAM} on PATH"),
    "not permitted": ({"FAKE_REFUSAL": "not allowed for this user"}, f"{PROGRAM} -d: not allowed for this user"),
    "no server": ({"FAKE_NO_SERVER": "1"}, "CUDA error 805: MPS client failed to connect"),
    "not used": ({"FAKE_DEAF_DRIVER": "1"}, "CUDA does not use the daemon"),
    "broken driver": ({"FAKE_BROKEN_DRIVER": "1"}, "CUDA error 999: unknown error"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_where_mps_cannot_be_used_a_note_says_why(tmp_path, doubles, stand_in, monkeypatch, capsys, case):
    more, reason = REFUSALS[case]
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    assert main([grid_file(tmp_path), "--mps=on"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"run_grid: mps: on is not allowed here: {reason}"
    assert not (tmp_path / "runs").exists() and not doubles.records("run")

    main([grid_file(tmp_path)])
    out, err = capsys.readouterr()
    assert f"run_grid: note: mps: auto is off here: {reason}" in err.splitlines() and "share a GPU" not in out
    for run in doubles.records("run"):
        assert [run[name] for name in VARIABLES] == ["0", None, None, None]
    ended = case in ("no server", "not used")
    assert len(doubles.records("start")) == (2 if ended or case == "not permitted" else 0)
    assert len(doubles.records("daemon ended")) == (2 if ended else 0)
    assert not any(Path(start["pipes"]).exists() for start in doubles.records("start"))


def test_without_a_gpu_nothing_happens_and_nothing_is_said(tmp_path, doubles, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_GPUS", "")
    path = grid_file(tmp_path, gpus=None)
    main([path])
    out, err = capsys.readouterr()
    assert "mps" not in (out + err).lower() and set(order(doubles)) == {"run", "run ended"}
    assert main([path, "--mps=on"]) == 2
    assert "mps: on is not allowed here: there is no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("grid", [{"mps": "off"}, {"jobs": 1}, {"seeds": [0]}])
def test_nothing_is_shared(tmp_path, doubles, stand_in, grid, capsys):
    """Asked for, one run at a time, or one run that is left."""
    main([grid_file(tmp_path, **grid)])
    assert set(order(doubles)) == {"run", "run ended"} and "mps" not in capsys.readouterr().err
    assert [run[SHARE] for run in doubles.records("run")] in ([None], [None, None])


def test_faults(tmp_path, doubles):
    for grid, fault in (
        ({"mps": "yes"}, "mps: 'yes' is not allowed: one of auto, on, off"),
        ({"mps": "on", "jobs": 1}, "mps: on is not allowed: no GPU is shared by runs (jobs: 1, 1 gpus)"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_grid(grid_file(tmp_path, **grid))
        assert caught.value.faults == [fault]
    assert read_grid(grid_file(tmp_path), {"mps": "off"}).mps == "off"


# --- with real runs --------------------------------------------------------------------------------------------------

KINDS = {"run": str(ROOT / "harness.py"), "keeper": "utils.grids.mps_daemon"}


def children(pid: int) -> dict[str, int]:
    """{"run" or "keeper": a process} of those that a grid has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        found |= {kind: int(child) for kind, word in KINDS.items() if word in words}
    return found


def test_a_grid_of_real_runs(tmp_path, doubles):
    assert main([grid_file(tmp_path)]) == 0
    assert order(doubles) == ["start", "get_server_list", "quit", "daemon ended"]


def test_a_stopped_grid_ends_its_daemon(tmp_path, doubles):
    path = grid_file(tmp_path, set={"experiment_params.epochs_per_level": 100000})
    words = [sys.executable, "-m", "utils.run_grid", path]
    grid = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: any((tmp_path / "runs").rglob("level_0*.csv")))
        grid.send_signal(signal.SIGINT)
        out, _ = grid.communicate(timeout=60)
    finally:
        grid.kill()
    assert grid.returncode == 130, out
    assert "run_grid: 2 runs share a GPU through MPS, each with at most 100% of its threads" in out.splitlines()
    assert order(doubles) == ["start", "get_server_list", "quit", "daemon ended"]


def _run_grid(path: str, env: dict[str, str]) -> None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(env)
    tempfile.tempdir = None
    main([path])


@pytest.fixture
def start_grid(doubles):
    """start_grid(path): a grid in a process of its own, whose start costs no import of torch."""
    started = []

    def start(path: str):
        started.append(_CONTEXT.Process(target=_run_grid, args=(path, doubles.env)))
        started[-1].start()
        return started[-1]

    yield start
    for process_ in started:
        process_.kill()
        process_.join()


def test_a_killed_grid_leaves_no_daemon(tmp_path, doubles, start_grid, stand_in):
    """Its keeper ends it; where that was killed too, the next grid does, before it starts its own."""
    path = grid_file(tmp_path, set={"experiment_params.epochs_per_level": 100000})
    grid = start_grid(path)
    wait_for(lambda: "run" in children(grid.pid))
    grid.kill()
    wait_for(lambda: doubles.records("daemon ended"))
    [first] = doubles.records("start")
    wait_for(lambda: not Path(first["pipes"]).exists())

    grid = start_grid(path)
    wait_for(lambda: "run" in children(grid.pid))
    for pid in (children(grid.pid)["keeper"], grid.pid):
        os.kill(pid, signal.SIGKILL)
    grid.join()
    assert len(doubles.records("daemon ended")) == 1
    second = doubles.records("start")[-1]
    assert Path(second["pipes"]).exists()
    main([path])
    assert order(doubles).count("daemon ended") == 3
    assert order(doubles)[4:9] == ["start", "get_server_list", "quit", "daemon ended", "start"]
    assert doubles.records("quit")[1]["pipes"] == second["pipes"] and not Path(second["pipes"]).exists()
