"""One control daemon of NVIDIA's Multi-Process Service (MPS): started, asked, and ended whatever becomes of the grid.

    python -m utils.grids.mps_daemon FOLDER

is the keeper of a daemon. It starts the daemon, prints why it could not or an empty line, and waits until its standard
input ends, which the kernel sees to when the grid dies, by kill -9 too. Then it ends the daemon. A folder whose grid
and keeper are both dead is dealt with by the next start.

Programs and variables: https://docs.nvidia.com/deploy/mps/
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.processes.signals import SHUTDOWN_SECONDS, STOPPING

PROGRAM = "nvidia-cuda-mps-control"
ROOT = Path(__file__).parents[2]
PREFIX = "run_grid_mps_"
LONGEST_PLACE = 50  # characters: a socket's path may have 107, and the daemon's own names need some
ANSWER_SECONDS = 20
LEFTOVER_SECONDS = 5  # for a daemon without a grid
POLL_SECONDS = 0.05


class MpsRefusal(Exception):
    """MPS cannot be used here; the message says why."""


def ask(command: str, env: Mapping[str, str] | None = None) -> str:
    """The answer of the control daemon that the environment names to one of its commands.

    Raises:
        MpsRefusal: there is no daemon, or it does not answer.
    """
    return _call([PROGRAM], env, command)


def servers(env: Mapping[str, str] | None = None) -> list[str]:
    """Process IDs of the daemon's servers, one per user that has had clients.

    Raises:
        MpsRefusal: as `ask`.
    """
    answer = ask("get_server_list", env).split()
    if not all(word.isdigit() for word in answer):
        raise MpsRefusal(f"{PROGRAM} get_server_list: {' '.join(answer)}")
    return answer


def _call(words: list[str], env: Mapping[str, str] | None, text: str = "") -> str:
    try:
        done = subprocess.run(
            words, env=env, input=f"{text}\n", capture_output=True, text=True, errors="replace",
            timeout=ANSWER_SECONDS, start_new_session=True,  # a terminal's Ctrl-C is the grid's alone
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MpsRefusal(f"{' '.join(words)} does not answer within {ANSWER_SECONDS} s") from None
    except OSError as error:
        raise MpsRefusal(f"{words[0]}: {error.strerror}") from error
    if done.returncode or (done.stderr.strip() and not done.stdout.strip()):
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise MpsRefusal(f"{' '.join([*words, text]).strip()}: {lines[-1]}")
    return done.stdout.strip()


def variables(folder: Path) -> dict[str, str]:
    """The variables that connect the daemon of `folder`, its command and its clients."""
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}


@contextlib.contextmanager
def own_daemon(gpus: str) -> Iterator[dict[str, str]]:
    """A daemon of this process alone, in a temporary folder; ended on exit.

    Args:
        gpus: CUDA_VISIBLE_DEVICES of the daemon, as UUIDs: indices would be counted anew for its clients.

    Yields:
        the variables that its clients need.

    Raises:
        MpsRefusal: it cannot be started.
    """
    end_leftovers()
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=pipes_place()))
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "log").mkdir()
            keeper = stack.enter_context(_keeper(folder, lock, gpus))
        except OSError as error:
            raise MpsRefusal(f"no folder for its pipes: {error}") from error
        assert keeper.stdout
        answer = keeper.stdout.readline()
        if answer != "\n":
            raise MpsRefusal(answer.strip() or "its keeper has died")
        yield variables(folder)


@contextlib.contextmanager
def _keeper(folder: Path, lock: int, gpus: str) -> Iterator[subprocess.Popen[str]]:
    """The process that starts the daemon of `folder`, and ends it at the exit or when this process dies."""
    # A session of its own: a terminal's Ctrl-C would reach it. It inherits the lock.
    keeper = subprocess.Popen(
        [sys.executable, "-m", "utils.grids.mps_daemon", str(folder)], cwd=ROOT, text=True, pass_fds=[lock],
        env={**os.environ, **variables(folder), "CUDA_VISIBLE_DEVICES": gpus}, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with keeper:  # on exit its standard input is closed and it is waited for
        yield keeper


def _keep(folder: Path) -> None:
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    try:
        _call([PROGRAM, "-d"], os.environ)
        print(flush=True)
    except MpsRefusal as refusal:
        print(refusal, flush=True)
    sys.stdin.read()
    # The runs of a killed grid save their state first: the daemon waits for its clients.
    end_daemon(folder, SHUTDOWN_SECONDS)


def end_leftovers() -> None:
    """End the daemons of this user whose grid and keeper were killed."""
    for folder in Path(pipes_place()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or gone meanwhile
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_daemon(folder, LEFTOVER_SECONDS)
            finally:
                os.close(lock)


def end_daemon(folder: Path, seconds: float) -> None:
    """Ask the daemon of `folder` to end, wait for that, and remove the folder.

    A daemon ends when its last client has ended. One that has not ended within `seconds` keeps its folder.
    """
    with contextlib.suppress(MpsRefusal):
        ask("quit", {**os.environ, **variables(folder)})
    end = time.monotonic() + seconds
    while _alive(folder):
        if time.monotonic() > end:
            return
        time.sleep(POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _alive(folder: Path) -> bool:
    """Whether the process in the daemon's pid file lives. One that has ended may stay a zombie: not all inits wait."""
    try:
        pid = int((folder / f"{PROGRAM}.pid").read_text())
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, ValueError):
        return False


def pipes_place() -> str:
    """The folder for temporary files; /tmp if its path is too long for sockets."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_PLACE else "/tmp"


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
