"""`main` of the harnesses and commands, called from Python: the process is as it was before, the run a command's."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, SMALL
from tests.processes import _CONTEXT, rows_of

CONV = {"model_params.model_name": "conv2", "experiment_params.deterministic": True}
# One thread, unlike the caller's three.
SHORT = {"prune_params.num_levels": 2, "experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}
SHORT |= {"dist_params.threads": 1}
CONFIG = ROOT / "configs" / "digits_lenet.yaml"
MISSING = {"dataset.dataset_name": "MNIST", "dataset.download": False}


def words(folder: Path, name: str, **options) -> list[str]:
    values = {**SMALL, **SHORT, "experiment_params.base_dir": folder, "experiment_params.expt_name": name, **options}
    return [f"--{key}={value}" for key, value in values.items()]


def inside(work: Callable, *args, timeout: float = 300) -> dict:
    """Result of ``work(folder, ...)`` in a process of its own, which has torch and the harness imported."""
    file = args[0] / "result.json"
    process = _CONTEXT.Process(target=_inside, args=(file, work, args))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process did not end")
    assert process.exitcode == 0, file.with_suffix(".err").read_text()
    return json.loads(file.read_text())


def _inside(file: Path, work: Callable, args: tuple) -> None:
    from utils import launcher

    os.setsid()
    launcher.START_METHOD = "fork"
    with open(file.with_suffix(".out"), "w") as out, open(file.with_suffix(".err"), "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        file.write_text(json.dumps(work(*args)))


def mine(signum, frame) -> None:
    """A handler of the caller's."""


def unusual() -> None:
    """Settings unlike the defaults and unlike a run's."""
    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(3)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    torch.rand(3)
    warnings.filterwarnings("error", message="never said")
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def settings() -> dict[str, str]:
    from tqdm import tqdm

    cudnn = torch.backends.cudnn
    return {
        "handlers": repr([signal.getsignal(s) for s in sorted(signal.valid_signals())]),
        "mask": repr(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "threads": repr(torch.get_num_threads()),
        "generators": repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())),
        "seed": repr(torch.initial_seed()),
        "filters": repr(warnings.filters),
        "warnings": repr(warnings.showwarning),
        "environment": repr(sorted(os.environ.items())),
        "folder": os.getcwd(),
        "cudnn": repr((cudnn.benchmark, cudnn.deterministic, cudnn.enabled, cudnn.allow_tf32)),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": repr(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        ),
        "dtype": repr((torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_cpu_enabled())),
        "dynamo": repr(sys.modules["torch._dynamo"].config.recompile_limit),
        "streams": repr((sys.stdout, sys.stderr)),
        "path": repr(sys.path),
        "bars": repr(tqdm.monitor_interval),
    }


def changed_by(calls: dict[str, Callable]) -> dict:
    """{name of a call: [its status, the settings that it has changed]}"""
    unusual()
    found = {}
    for name, call in calls.items():
        before = settings()
        try:
            status = call()
        except SystemExit as end:
            status = f"SystemExit {end.code}"
        after = settings()
        found[name] = [status, [key for key in before if before[key] != after[key]]]
    return found


# --- nothing global stays changed ------------------------------------------------------------------------------------


def all_mains(folder: Path) -> dict:
    import harness
    from utils import analyze, benchmark, plot_results, run_grid, single_gpu_harness

    few = ["--rounds=1", "--steps=2", "--epoch_steps=2", "--skip=usual,levels,memory"]
    a, grid = str(folder / "a"), folder / "grid.yaml"
    grid.write_text(f"base_dir: {folder}/grid\nconfig: {CONFIG}\nseeds: [0]\nruns: {{x: {{}}}}\n")
    small = [f"--{key}={value}" for key, value in {**SMALL, **SHORT, "experiment_params.save_every_epochs": 0}.items()]
    return changed_by(
        {
            "harness": lambda: harness.main(words(folder, "a", **CONV)),
            "processes": lambda: harness.main(words(folder, "two", **{"dist_params.nproc": 2})),
            "bad config": lambda: harness.main(words(folder, "c", **{"optimizer.lr": -1})),
            "bad data": lambda: harness.main(words(folder, "c", **{**MISSING, "dataset.data_root": folder / "no"})),
            "help": lambda: harness.main(["--help"]),
            "single": lambda: single_gpu_harness.main(words(folder, "d", **CONV)),
            "single, bad config": lambda: single_gpu_harness.main(words(folder, "d", **CONV)),
            "benchmark": lambda: benchmark.main([*few, *small]),
            "analyze": lambda: analyze.main(["barrier", a, str(folder / "d"), "--levels=1", "--points=3"]),
            "analyze, bad": lambda: analyze.main(["barrier", a, str(folder / "none")]),
            "plot": lambda: plot_results.main([a, "--out", str(folder / "f.png")]),
            "grid": lambda: run_grid.main([str(grid), *small]),
        }
    )


def test_every_main_leaves_the_process_as_it_was(tmp_path):
    found = inside(all_mains, tmp_path)
    statuses = {name: status for name, (status, _) in found.items()}
    assert statuses == {
        "harness": 0, "processes": 0, "bad config": 2, "bad data": 1, "help": "SystemExit 0",
        "single": 0, "single, bad config": 2, "benchmark": 0, "analyze": 0, "analyze, bad": 1, "plot": 0, "grid": 0,
    }, (tmp_path / "result.err").read_text()  # fmt: skip
    assert {name: changed for name, (_, changed) in found.items() if changed} == {}


def loaded(folder: Path) -> dict:
    import harness
    from harness_utils import load_run

    harness.main(words(folder, "a"))
    return changed_by({"load_run": lambda: load_run(folder / "a").level})


def test_a_loaded_run_draws_from_no_global_generator(tmp_path):
    assert inside(loaded, tmp_path) == {"load_run": [1, []]}


# --- the same bits ---------------------------------------------------------------------------------------------------


def twice(folder: Path) -> list[int]:
    import harness

    unusual()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    return [harness.main(words(folder, "x", **CONV)), harness.main(words(folder, "y"))]


def test_two_runs_in_one_interpreter_are_those_of_two_commands(tmp_path, launch):
    folder = tmp_path / "called"
    folder.mkdir()
    assert inside(twice, folder) == [0, 0]
    for name, options in (("x", CONV), ("y", {})):
        command = launch(name, **SHORT, **options)
        command.assert_same_figures(type(command)(folder / name, 0, "", ""))


# --- signals ---------------------------------------------------------------------------------------------------------

ENDLESS = {"experiment_params.epochs_per_level": 100000}


def interrupt_once_begun(folder: Path) -> None:
    while rows_of(folder / "a", 0) < 1:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(folder: Path) -> dict:
    import harness

    unusual()
    threading.Thread(target=interrupt_once_begun, args=(folder,)).start()
    status = harness.main(words(folder, "a", **ENDLESS))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        return {"status": status, "afterwards": "KeyboardInterrupt"}
    return {"status": status, "afterwards": "swallowed"}


def test_ctrl_c_stops_the_run_and_the_next_one_is_the_callers(tmp_path):
    assert inside(interrupted, tmp_path) == {"status": 130, "afterwards": "KeyboardInterrupt"}
    assert "stopped by SIGINT" in (tmp_path / "result.err").read_text()


def in_a_thread(folder: Path) -> dict:
    import harness
    from utils import run_grid, single_gpu_harness

    unusual()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found: dict = {}
    begun = folder / "a" / "metrics"

    def run() -> None:
        found["first"] = harness.main(words(folder, "a", **{"experiment_params.epochs_per_level": 30}))
        found["two processes"] = harness.main(words(folder, "two", **{"dist_params.nproc": 2}))
        found["single"] = single_gpu_harness.main(words(folder, "c"))
        (folder / "g.yaml").write_text(f"base_dir: {folder}\nconfig: {CONFIG}\nseeds: [0]\nruns: {{g: {{}}}}\n")
        own = ("expt_name", "base_dir")  # the grid's
        options = [word for word in words(folder, "g") if not any(key in word for key in own)]
        found["grid"] = run_grid.main([str(folder / "g.yaml"), *options])

    handlers = settings()["handlers"]
    thread = threading.Thread(target=run)
    thread.start()
    while not begun.exists():
        time.sleep(0.01)
    found["meanwhile"] = harness.main(words(folder, "b"))
    found["untouched"] = settings()["handlers"] == handlers
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    thread.join()
    return found


def test_in_a_thread_it_runs_and_signals_are_the_callers(tmp_path):
    found = inside(in_a_thread, tmp_path)
    said = (tmp_path / "result.err").read_text()
    assert found == {
        "meanwhile": 1, "untouched": True, "first": 0, "two processes": 0, "single": 0, "grid": 0,
    }, said  # fmt: skip
    assert "harness: another run is in progress in this process" in said and not (tmp_path / "b").exists()
    left = "note: this runs in a thread: signals that would stop it are left to the program that started the thread"
    assert said.count(f"harness: {left}") == 2 and said.count(f"run_grid: {left}") == 1
