"""Files that are there whole or not at all; loading that runs no code; the writer in the background."""

import ast
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, product_files
from tests.traps import pack
from utils.errors import RunError
from utils.files import BackgroundWriter, scratch_folder, sha256, sweep_parts, write_whole
from utils.runs.weights import load


class Hostile:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_write_whole_replaces(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"old", b"", os.urandom(3_000_000)):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a.bin"]


def test_write_whole_tells_of_a_folder_that_is_gone(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*/gone/a.bin: No such file or directory"):
        write_whole(tmp_path / "gone" / "a.bin", b"x")


def test_write_whole_does_not_write_through_a_link(tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / ".a.bin.part").symlink_to(target)
    write_whole(tmp_path / "a.bin", b"new")
    assert target.read_bytes() == b"precious" and (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_death_while_writing_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "below" / "a.bin"
    path.parent.mkdir()
    write_whole(path, b"old")
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(path, name))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 2
    sweep_parts(tmp_path)
    assert list(path.parent.iterdir()) == [path]


def _die_writing(path: Path, name: str) -> None:
    setattr(os, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    write_whole(path, b"new")


def test_the_file_is_synced_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    """What a crash of the machine leaves no test can show; the order of the calls can be."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("name") or replace(*paths))
    write_whole(tmp_path / "a.bin", b"12345")
    assert done == ["file of 5", "name", "folder"]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_load_gives_back_tensors_and_plain_values(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pack({"a": torch.arange(3), "b": [1, 2.5, None, "x", True, {"c": {}}]}))
    state = load(path)
    assert torch.equal(state.pop("a"), torch.arange(3))
    assert state == {"b": [1, 2.5, None, "x", True, {"c": {}}]}


@pytest.mark.parametrize("wrap", [pickle.dumps, pack], ids=["pickle", "checkpoint"])
def test_a_hostile_file_runs_no_code(tmp_path, wrap):
    target = tmp_path / "owned"
    path = tmp_path / "a.pt"
    path.write_bytes(wrap({"a": torch.zeros(2), "b": Hostile(target)}))
    with pytest.raises(RunError, match=r"a\.pt is no checkpoint: it is damaged, or holds more than tensors"):
        load(path)
    assert not target.exists()


def test_load_tells_of_damage_in_one_line(tmp_path):
    path, whole = tmp_path / "a.pt", bytes(pack({"a": torch.arange(1000)}))
    for data in (b"", b"weights", whole[:100], whole[: len(whole) // 2], whole[:-1], b"PK\3\4" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"a\.pt is no") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(RunError, match=r"a\.pt is missing"):
        load(path)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert sha256(tmp_path / "b") == ""


def loads_of(source: str) -> list[tuple[int, str]]:
    """(line, call) of each call that loads what may run code: torch.load without weights_only, pickles, YAML's tags."""
    tree, found = ast.parse(source), []
    renamed = {}  # a name in the file -> what it means
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            renamed |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            renamed |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = ast.unparse(node.func).split(".")
        name = ".".join([renamed.get(first, first), *rest])
        safe = {key.arg for key in node.keywords if isinstance(key.value, ast.Constant) and key.value.value is True}
        if (
            (name in ("torch.load", "torch.serialization.load") and "weights_only" not in safe)
            or name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads")
            or name in ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "eval", "exec")
            or (name.startswith(("np.", "numpy.")) and "allow_pickle" in safe)
        ):
            found.append((node.lineno, name))
    return found


def test_what_loads_code_is_found():
    bad = (
        "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(\n p,\n weights_only=w)", "pickle.loads(b)",
        "import pickle as q; q.load(f)", "from torch import load; load(f)", "from yaml import load as y; y(f)",
        "yaml.unsafe_load(f)", "numpy.load(f, allow_pickle=True)", "pickle.Unpickler(f).load()", "eval(text)",
    )  # fmt: skip
    assert [len(loads_of(source)) for source in bad] == [1] * len(bad)
    good = (
        "torch.load(\n p,\n weights_only=True)",
        "yaml.safe_load(f)",
        "np.load(f)",
        "model.eval()",
        "'torch.load(x)'",
    )
    assert [loads_of(source) for source in good] == [[]] * len(good)


def test_nothing_in_the_program_loads_more_than_weights():
    """But for CIFAR, which is published as pickles: those are read when their checksum is the published one.

    And for plugins, which are the user's own programs.
    """
    found = {(file.name, name): (file, line) for file in product_files() for line, name in loads_of(file.read_text())}
    file, line = found.pop(("published.py", "pickle.loads"))
    assert "self.checked(root, name)" in file.read_text().splitlines()[line - 2]
    assert found.pop(("plugins.py", "exec"))
    assert not found


# --- in the background -----------------------------------------------------------------------------------------------


def test_writer_keeps_the_order():
    done, writer = [], BackgroundWriter()
    for i in range(50):
        writer.submit(lambda i=i: done.append(i))
    writer.flush()
    assert done == list(range(50))
    writer.close()
    assert "writer" not in {thread.name for thread in threading.enumerate()}


def test_nothing_is_written_after_a_write_that_failed():
    done, writer = [], BackgroundWriter(depth=10)
    hold = threading.Event()
    writer.submit(hold.wait)
    writer.submit(lambda: write_whole(Path("/nowhere/at/all"), b""))
    writer.submit(lambda: done.append("state"))
    hold.set()
    with pytest.raises(RunError, match="cannot write /nowhere/at/all"):
        writer.flush()
    with pytest.raises(RunError, match="cannot write /nowhere/at/all"):
        writer.submit(lambda: done.append("later"))
    writer.close()
    assert done == []


def test_writer_bounds_what_waits():
    """Snapshots are memory: no more than `depth` of them wait for a slow disk."""
    writer, hold, asked = BackgroundWriter(depth=2), threading.Event(), []

    def submit():
        for i in range(5):
            writer.submit(hold.wait)
            asked.append(i)

    thread = threading.Thread(target=submit)
    thread.start()
    time.sleep(0.3)
    assert asked == [0, 1, 2]  # one at work, two waiting
    hold.set()
    thread.join(10)
    writer.close()
    assert asked == list(range(5))


# --- scratch folders -------------------------------------------------------------------------------------------------

SCRATCH = """
import sys, time
from utils.files import scratch_folder
with scratch_folder("ours_") as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_scratch_folders_of_the_dead_are_swept_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = tmp_path / "other_"
    other.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SCRATCH], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    ) as process:
        theirs = Path(process.stdout.readline().decode().strip())
        assert theirs.parent == tmp_path
        with scratch_folder("ours_") as mine:
            assert mine.exists() and theirs.exists()
        assert not mine.exists() and theirs.exists()
        process.kill()
        process.wait()
        assert theirs.exists()
        with scratch_folder("ours_"):
            assert not theirs.exists()
    assert os.listdir(tmp_path) == ["other_"]
