"""A run in somebody else's process: what it changes there, for all of the process, it puts back."""

import contextlib
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from utils.errors import RunError
from utils.output import program
from utils.processes.signals import handlers_left_as_found

# Environment variables that a run may set: see `configure_kernels`, `keep_kernels` and `launch`.
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "PYTHONWARNINGS", "TORCHINDUCTOR_CACHE_DIR")

_in_progress = threading.Lock()


@contextlib.contextmanager
def left_as_found(name: str) -> Iterator[None]:
    """For a run of program `name`, called by its ``main`` or from Python: on exit the process is as it was before.

    That is: handlers of signals, environment variables, warnings filters, the global random generators (Python, NumPy,
    torch), the number of CPU threads, and torch's settings. Notes and warnings within name the program.

    Raises:
        RunError: another run is in progress in this process. Both would draw from one generator.
    """
    if not _in_progress.acquire(blocking=False):
        raise RunError("another run is in progress in this process; runs side by side need a process each (run_grid)")
    with contextlib.ExitStack() as stack:
        stack.callback(_in_progress.release)
        for put_back in (_environment(), _torch_settings()):
            stack.callback(put_back)
        stack.enter_context(generators_left_as_found())
        stack.enter_context(handlers_left_as_found())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(program(name))
        yield


def _environment() -> Callable[[], None]:
    before = {name: os.environ.get(name) for name in VARIABLES}

    def put_back() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return put_back


@contextlib.contextmanager
def generators_left_as_found() -> Iterator[None]:
    """On exit the global random generators of Python, NumPy and torch are where they were before."""
    python, numpy, cpu, seed = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.initial_seed()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        elif torch.cuda.is_initialized():  # a generator that nobody has used begins with the CPU's seed
            torch.cuda.manual_seed_all(seed)


def _torch_settings() -> Callable[[], None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, dynamo = torch.backends.cudnn.benchmark, sys.modules.get("torch._dynamo")
    limit = dynamo.config.recompile_limit if dynamo else None
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it is set for each kind of operator, which a run leaves alone
        tf32 = None

    def put_back() -> None:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark
        if tf32 is not None:
            torch.backends.cudnn.allow_tf32 = tf32
        if device is not None:
            torch.cuda.set_device(device)
        if dynamo:
            dynamo.config.recompile_limit = limit

    return put_back
