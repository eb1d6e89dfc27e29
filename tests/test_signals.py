"""Asked to stop: the step ends, the state is saved, 128 + signal; a second time: at once. Nobody is left behind."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.processes import alive_in_session, all_gone
from tests.test_resume_launches import workers_of
from tests.traps import KINDS, SHORT, MustBeMet, begun, states_of
from utils.processes import signals
from utils.runs import stopping

ENDLESS = {**KINDS["imp"], "experiment_params.epochs_per_level": 100000}
# Minutes of pruning at initialization.
STUCK = {"prune_params.er_method": "synflow", "prune_params.er_init": 0.1, "prune_params.synflow_rounds": 1000000}
HINT = "go on with: python harness.py --resume "


@pytest.fixture
def scratch(tmp_path) -> Path:
    """Where a run's TMPDIR points to, to see what it leaves there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def left_in(scratch: Path) -> list[Path]:
    """Files there but torch's own cache, which it keeps for every program of its user."""
    return [file for file in scratch.iterdir() if not file.name.startswith("torchinductor_")]


def shared_memory_of(pids: list[int]) -> list[Path]:
    """Shared memory named after one of `pids`: a whole part of the name, since random parts hold digits too."""
    named = {str(pid) for pid in pids}
    return [file for file in Path("/dev/shm").iterdir() if named & set(re.split(r"[-_.]", file.name))]


@pytest.mark.parametrize(
    ("name", "nproc"), [("SIGINT", 1), ("SIGTERM", 1), ("SIGUSR1", 1), ("SIGHUP", 1), ("SIGTERM", 2), ("SIGHUP", 2)]
)
def test_stop_saves_and_tells_how_to_go_on(fork, name, nproc):
    options = {**ENDLESS, "dist_params.nproc": nproc}
    run = fork.start("run", **options)
    run.wait_for_rows(1)
    run.kill(signal.Signals[name])
    done = run.finish(128 + signal.Signals[name])
    assert done.err == f"harness: stopped by {name}; {HINT}{run.path}\n"
    assert all_gone(run.pid, seconds=1)
    rows = len(done.csv("epochwise_metrics/level_0_metrics"))
    again = fork.start("run", resume=True, **options)
    again.wait_for_rows(rows + 1)
    again.kill(signal.SIGTERM)
    again.finish(143)
    epochs = again.path / "metrics/epochwise_metrics/level_0_metrics.csv"
    written = [int(line.split(",")[0]) for line in epochs.read_text().splitlines()[1:]]
    assert written == list(range(len(written)))


@pytest.mark.parametrize(("seconds", "nproc"), [(0.05, 1), (0.4, 1), (0.05, 2), (0.3, 2), (0.8, 2), (1.6, 2)])
def test_stop_at_any_moment_of_starting(fork, nproc, seconds):
    """Before there is a state: the same status, one line, and the run can be started or resumed."""
    options = {**KINDS["imp"], "dist_params.nproc": nproc}
    run = fork.start("early", **options)
    run.wait_for(lambda: run.logs[1].exists())
    run.process.join(seconds)
    run.kill(signal.SIGTERM)
    done = run.finish(None)
    if done.status != 0:
        assert done.status in (143, -signal.SIGTERM)  # the latter before harness.py's first lines, which a fork lacks
        assert len(done.err.splitlines()) == (done.status == 143)
    else:
        assert seconds > 0.1  # a run takes longer than that: its first moment is always met
    assert all_gone(run.pid, seconds=1)
    fork("early", resume=begun(run.path), **options)


def test_second_signal_ends_at_once(fork):
    """Two processes in the middle of a long pruning, which a first signal waits for."""
    run = fork.start("stuck", **{**SHORT, **STUCK, "dist_params.nproc": 2})
    run.wait_for(lambda: begun(run.path))
    run.process.join(1)
    run.kill(signal.SIGINT)
    run.process.join(1)
    assert run.process.exitcode is None
    run.kill(signal.SIGINT)
    begin = time.monotonic()
    run.finish(130)
    assert time.monotonic() - begin < 5
    assert all_gone(run.pid, seconds=5)


# --- several processes -----------------------------------------------------------------------------------------------


class SlowSaving(MustBeMet):
    """Saving the state of a stopped epoch takes two seconds; and the worker is torchrun's, not our launcher's."""

    def lay(self) -> None:
        from harness_utils import Run

        signals.multiprocessing.parent_process = self.met  # which returns None
        plain = Run._write_state

        def write(run, name, state, tables) -> None:
            if state.content()["mid_epoch"]:
                time.sleep(2)
            plain(run, name, state, tables)

        Run._write_state = write


@pytest.mark.parametrize("when", ["other ended", "saving"])
def test_stop_of_one_worker_leaves_the_others_time_to_save(fork, when):
    """As under torchrun: when one worker has ended, it sends the others a signal; they had none of their own yet."""
    options = {**ENDLESS, "dataset.batch_size": 16}
    for attempt in range(4):  # a stop that comes at an epoch's end, as one of six does, saves at once
        ranks = fork.ranks(f"run_{attempt}", 2, trap=SlowSaving(), **options)
        ranks[0].wait_for_rows(1)
        ranks[1].kill(signal.SIGTERM)
        ranks[1].process.join(1 if when == "saving" else 60)
        ranks[0].kill(signal.SIGTERM)
        done, _ = [rank.finish(143) for rank in ranks]
        assert done.err == f"harness: stopped by SIGTERM; {HINT}{done.path}\n"
        if json.loads((done.path / "artifacts" / "state.json").read_text())[0]["step"] > 0:
            return
    pytest.fail("no stop came in mid-epoch")


class Ranks:
    """Two ranks that say the same; notes at which steps they were asked."""

    world, steps, is_main = 2, 0, True

    def __init__(self):
        self.asked = []

    def largest(self, numbers: list[int]) -> list[int]:
        self.asked.append(self.steps)
        return numbers


@pytest.mark.parametrize(("seconds", "interval"), [(0.001, 16), (0.2, 5), (0.7, 1), (5.0, 1)])
def test_ranks_agree_once_a_second(monkeypatch, seconds, interval):
    monkeypatch.setattr(signal, "signal", lambda signum, handler: None)
    ctx, now = Ranks(), [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = stopping.StopRequest(ctx)
    for ctx.steps in range(1, 60):
        now[0] += seconds
        stop(ctx.steps)
    gaps = {b - a for a, b in zip(ctx.asked, ctx.asked[1:])}
    assert ctx.asked[0] == 1 and gaps == {interval}


# --- as typed by a user ----------------------------------------------------------------------------------------------


def wait_for(process, what, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_signal_while_torch_is_imported(launch, name):
    process = launch.start("early", **SHORT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.Signals[name])
    done = launch.finish("early", process)
    assert done.status == 128 + signal.Signals[name]
    assert done.err == f"harness: stopped by {name}\n"
    assert not done.path.exists()


def test_second_ctrl_c_of_a_single_process(launch):
    process = launch.start("stuck", **SHORT, **STUCK)
    wait_for(process, lambda: begun(launch.folder / "stuck"))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    done = launch.finish("stuck", process)
    assert done.status == 130 and time.monotonic() - begin < 5
    assert done.err == ""


def test_ctrl_c_reaches_the_whole_group(launch, fork, scratch):
    """A terminal sends it to the launcher and to its workers, and the launcher passes it on: one stop all the same."""
    options = {**KINDS["imp"], "dist_params.nproc": 2, "experiment_params.epochs_per_level": 10}
    process = launch.start("group", env={"TMPDIR": str(scratch)}, **options)
    epochs = launch.folder / "group" / "metrics" / "epochwise_metrics"
    wait_for(process, lambda: any(epochs.glob("*.csv")))
    pids = alive_in_session(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    done = launch.finish("group", process)
    assert done.status == 130
    assert done.err == f"harness: stopped by SIGINT; {HINT}{done.path}\n"
    assert all_gone(process.pid, seconds=1)
    assert not shared_memory_of(pids) and not left_in(scratch)
    assert states_of(done.path)[0].exists() and not list(done.path.rglob("*.part"))
    resumed = fork("group", resume=True, **options)
    resumed.assert_same_figures(fork("whole", **options))


def test_nothing_is_left_after_the_next_start(fork, scratch):
    """kill -9 of the launcher leaves its scratch folder; the next start of any run removes it."""
    env = {"TMPDIR": str(scratch)}
    run = fork.start("killed", env=env, **{**ENDLESS, "dist_params.nproc": 2})
    run.wait_for_rows(1)
    pids = alive_in_session(run.pid)
    run.kill()
    run.finish(None)
    assert all_gone(run.pid, seconds=5)
    fork("next", env=env, **SHORT, **{"dist_params.nproc": 2})
    assert not shared_memory_of(pids) and not left_in(scratch)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "a worker"])
def test_stop_under_torchrun(launch, fork, to):
    """Passed on by torchrun; or by the workers to each other, whereupon torchrun ends those that have not ended yet."""
    options = {**KINDS["imp"], "dist_params.nproc": 2, "experiment_params.epochs_per_level": 40}
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "harness.py")
    process = launch.start("torchrun", program=program, **options)
    epochs = launch.folder / "torchrun" / "metrics" / "epochwise_metrics"
    wait_for(process, lambda: any(epochs.glob("*.csv")))
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(process.pid if to == "torchrun" else workers[1], signal.SIGINT)
    done = launch.finish("torchrun", process)
    torchrun = HINT.replace("python", "python " + " ".join(program[:-1]))
    assert f"harness: stopped by SIGINT; {torchrun}{done.path}\n" in done.err
    assert all_gone(process.pid, seconds=5) and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    resumed = fork("torchrun", resume=True, **options)
    resumed.assert_same_figures(fork("whole", **options))
