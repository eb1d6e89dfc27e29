"""Files written whole or not at all, in the background if asked for. Imports no torch."""

import contextlib
import fcntl
import hashlib
import io
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from utils.errors import RunError


class HashedFile:
    """A file that is hashed while it is written, chunk by chunk: hash and write let other threads run meanwhile.

    After a write has failed nothing more is written; `finish` raises that error. (An error raised within torch.save
    would come out as another one, behind warnings.)
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._digest = file, hashlib.sha256()
        self._error: OSError | None = None
        self._finished = False

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; return its size in bytes."""
        data = memoryview(data)
        if self._error is None:
            try:
                self._digest.update(data)
                self._file.write(data)
            except OSError as error:
                self._error = error
        return data.nbytes

    def flush(self) -> None:
        """Nothing: `finish` flushes. torch.save asks for it."""

    def finish(self) -> str:
        """Sync the file; return the SHA-256 as hex digits. The last call that changes anything.

        Raises:
            OSError: of the first write that failed.
        """
        if self._error is not None:
            raise self._error
        if not self._finished:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._finished = True
        return self._digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[HashedFile]:
    """A new file that gets the name `path` at the end of the block, so that a crash leaves the old file or the new one.

    A temporary file in the same folder is written and synced, then renamed, then the folder is synced. What the block
    itself does after `HashedFile.finish` is done before the file has its name.

    Raises:
        RunError: the disk is full, read-only or gone; the old file is still there, the temporary one is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # never write through a link that somebody left there
        with open(part, "xb") as file:
            hashed = HashedFile(file)
            yield hashed
            hashed.finish()
        rename(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write `path` so that a crash at any moment leaves the old file or the new one. Errors as `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def rename(part: Path, path: Path) -> None:
    """Give a finished file its name, and sync the folder so that the name survives a crash."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep_parts(folder: Path) -> None:
    """Remove temporary files of killed `write_whole` calls from anywhere below `folder`."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(prefix: str = "ticket_harness_") -> Iterator[Path]:
    """A temporary folder, removed on exit; also removes the folders of processes that were killed.

    A process locks its folder. The kernel drops the lock when the process dies, in whatever way.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with _locked(folder):
            folder.mkdir(exist_ok=True)  # another process may have removed it before it was locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    except OSError:
        return ""


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


class BackgroundWriter:
    """Writes in a background thread, in the order of the calls.

    After a write has failed, those queued behind it are dropped, since they may refer to the file that is missing; the
    next `submit`, `wait` or `flush` raises the error.
    """

    def __init__(self, depth: int = 2):
        self._jobs: queue.Queue[tuple[Callable[[], None], bool, threading.Event] | None] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while entry := self._jobs.get():
            job, snapshot, done = entry
            if snapshot:
                self._room.release()
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # raised in the main thread
                self._error = error
            finally:
                done.set()
                self._jobs.task_done()

    def submit(self, job: Callable[[], None], snapshot: bool = True) -> threading.Event:
        """Queue `job`; return its event for `wait`.

        A snapshot blocks while `depth` others wait, which bounds their memory.
        """
        if self._error is not None:
            raise self._error
        if snapshot:
            self._room.acquire()
        done = threading.Event()
        self._jobs.put((job, snapshot, done))
        return done

    def wait(self, done: threading.Event) -> None:
        """Wait until one job is done, but not for those queued behind it."""
        done.wait()
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait until all queued jobs are done."""
        self._jobs.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Finish the queued jobs and end the thread; raises nothing."""
        self._jobs.put(None)
        self._thread.join()
