"""Two machines on one: the network namespaces of tests/benchmarks/allreduce.py, for tests."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.benchmarks import allreduce

ADDRESSES = [f"{allreduce.NETWORK}.{number}" for number in (1, 2)]
INTERFACE = allreduce.LINK
MBIT = 1000


@contextlib.contextmanager
def two_machines() -> Iterator[list[str]]:
    """Yields the names of two namespaces; skips, loudly, where the machine does not let us make any."""
    with contextlib.ExitStack() as stack:
        try:
            if reason := allreduce.missing():
                raise RuntimeError(reason)
            spaces = stack.enter_context(allreduce.two_machines(MBIT))
        except RuntimeError as error:
            pytest.skip(f"no network namespaces here ({error}): the test of two machines did not run")
        stack.callback(lambda: [kill_all(space) for space in spaces])
        yield spaces


def pids_in(space: str) -> list[int]:
    """Processes of a machine, in whatever session they are."""
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=20)
    return [int(pid) for pid in done.stdout.split()]


def kill_all(space: str) -> None:
    """kill -9 of everything on a machine."""
    end = time.monotonic() + 10
    while pids := pids_in(space):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < end, f"{pids} in {space} cannot be killed"
        time.sleep(0.05)


def unplug(space: str) -> None:
    """Takes a machine off the network: from now on the other hears nothing, not even that a connection has ended."""
    subprocess.run(["ip", "-n", space, "link", "set", INTERFACE, "down"], check=True, timeout=20)
