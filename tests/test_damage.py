"""Damaged, foreign and hostile files in a run's directory: reported in one line, never run, never rewound to."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Finished
from tests.processes import Forks
from tests.test_files import Hostile
from tests.traps import KINDS, StopAt, pack, states_of
from utils.files import sha256

IMP = KINDS["imp"]


@pytest.fixture(scope="module")
def whole(forks) -> Finished:
    return forks("whole", **IMP)


@pytest.fixture(scope="module")
def stopped(forks) -> Finished:
    """Stopped in the middle of level 1, with two generations of state."""
    return forks("stopped", status=143, trap=StopAt(50), **IMP)


def copy_of(run: Finished, fork: Forks) -> Path:
    shutil.copytree(run.path, fork.folder / "copy")
    return fork.folder / "copy"


def resume(fork: Forks, status: int = 0, **more) -> Finished:
    return fork("copy", resume=True, status=status, **IMP, **more)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {"truncated": truncate, "flipped": flip, "empty": lambda data: b"", "foreign": lambda data: pack({"a": 1})}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_falls_back_to_the_older(whole, stopped, fork, damage):
    path = copy_of(stopped, fork)
    newest, _ = states_of(path)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    run = resume(fork)
    assert run.err == f"harness: warning: {newest} is damaged; trying the older state\n"
    run.assert_same_figures(whole)


def test_no_state_left(whole, stopped, fork):
    path = copy_of(stopped, fork)
    for state in states_of(path):
        state.write_bytes(truncate(state.read_bytes()))
    run = resume(fork, status=1)
    assert run.last_line == (
        f"harness: {path}/artifacts: every saved state is damaged; start a level again with resume_level"
    )
    resume(fork, **{"experiment_params.resume_level": 1}).assert_same_figures(whole)


@pytest.mark.parametrize("text", ["", "[", "{}", '[{"file": "state_0.pt"}]', "[1]", '[{"file": 1, "sha256": 2}]', "7"])
def test_damaged_index(stopped, fork, text):
    path = copy_of(stopped, fork)
    (path / "artifacts" / "state.json").write_text(text)
    run = resume(fork, status=1)
    assert len(run.err.splitlines()) == 1
    assert f"{path}/artifacts/state.json is damaged" in run.err and "resume_level" in run.err


def test_index_cannot_name_other_files(stopped, fork, tmp_path):
    path = copy_of(stopped, fork)
    other = tmp_path / "other.pt"
    shutil.copy(states_of(path)[0], other)
    index = [{"file": "../../other.pt", "sha256": sha256(other), "level": 1}]
    (path / "artifacts" / "state.json").write_text(json.dumps(index))
    assert "every saved state is damaged" in resume(fork, status=1).last_line


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_not_rewound_to(stopped, fork, damage):
    path = copy_of(stopped, fork)
    init = path / "checkpoints" / "model_init.pt"
    init.write_bytes(DAMAGE[damage](init.read_bytes()))
    run = resume(fork, status=1)
    assert run.err == f"harness: {init} was changed since this run wrote it: it is damaged, or another checkpoint\n"
    states_before = [sha256(state) for state in states_of(path)]
    assert "was changed since" in resume(fork, status=1).last_line
    assert [sha256(state) for state in states_of(path)] == states_before


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, [1, 2], 5], ids=["other", "list", "number"])
def test_foreign_checkpoint_without_digest(whole, fork, content):
    """A run from before digests were kept: the checkpoint is judged by what is in it."""
    path = copy_of(whole, fork)
    (path / "artifacts" / "checkpoints.json").unlink()
    init = path / "checkpoints" / "model_init.pt"
    init.write_bytes(pack(content))
    run = resume(fork, status=1, **{"experiment_params.resume_level": 1})
    assert re.fullmatch(rf"harness: {init} holds (another model: .*|no weights of a network)\n", run.err)


@pytest.mark.parametrize("name", ["state", "checkpoint"])
def test_hostile_files_run_no_code(stopped, fork, name, tmp_path):
    """Even with the digest that the run expects."""
    path = copy_of(stopped, fork)
    target = tmp_path / "owned"
    hostile = bytes(pack({"a": Hostile(target)}))
    if name == "state":
        index = json.loads((path / "artifacts" / "state.json").read_text())
        (path / "artifacts" / index[0]["file"]).write_bytes(hostile)
        index[0]["sha256"] = sha256(path / "artifacts" / index[0]["file"])
        (path / "artifacts" / "state.json").write_text(json.dumps(index))
    else:
        (path / "checkpoints" / "model_init.pt").write_bytes(hostile)
        (path / "artifacts" / "checkpoints.json").unlink()
    run = resume(fork, status=1)
    assert len(run.err.splitlines()) == 1 and "holds more than tensors and plain values" in run.err
    assert not target.exists()


@pytest.mark.parametrize("text", ["", "- 1", "a: 1", "a: [", "!!python/object/apply:os.mkdir [owned]"])
def test_damaged_saved_config(stopped, fork, text):
    path = copy_of(stopped, fork)
    (path / "expt_config.yaml").write_text(text)
    run = resume(fork, status=2)
    assert len(run.err.splitlines()) == 1
    assert run.err.startswith("harness: experiment_params.resume_expt_name: 'copy': no run to resume at ")


@pytest.mark.parametrize("key", ["expt_name", "resume_expt_name"])
def test_a_name_that_is_a_link_does_not_leave_base_dir(stopped, fork, key, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (fork.folder / "link").symlink_to(elsewhere)
    run = fork("link", resume=key == "resume_expt_name", status=2, **IMP)
    assert run.err == (f"harness: experiment_params.{key}: 'link' leaves {fork.folder}: it is a link to {elsewhere}\n")
    assert not list(elsewhere.iterdir())
