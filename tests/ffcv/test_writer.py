"""Writing .beton files: whole or not at all, and never a hang."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.ffcv_helpers import SETTINGS, TRAIN, VAL, make_tree, nothing_left, write, write_raw
from utils.data.image_tree import find_tree, open_image
from utils.data.published import files_of
from utils.errors import RunError
from utils.ffcv.beton import Beton
from utils.ffcv.writer import Encoding, write_beton

pytestmark = pytest.mark.ffcv
RAW = Encoding(0, 0.0, 90)


class Numbers:
    """A source of tiny images that does `deed` when it is asked for one of them."""

    def __init__(self, deed, at: int = 5, count: int = 200, side: int = 4):
        self.deed, self.at, self.count, self.side = deed, at, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.at:
            self.deed()
        return np.full((self.side, self.side, 3), index % 256, dtype=np.uint8), index

    def largest(self) -> int:
        return self.side**2


def stored_pixels(beton: Beton, index: int) -> np.ndarray:
    """Plain pixels, read without our decoder."""
    content = beton.bytes[beton.starts[index] : beton.starts[index] + beton.sizes[index]]
    return content.reshape(beton.heights[index], beton.widths[index], 3)


def test_pixels_and_labels_are_those_of_the_tree(tree, tmp_path):
    write_raw(tree, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train_{SETTINGS}.beton", f"val_{SETTINGS}.beton"]
    for split, name, count in zip(find_tree(tree), ("train", "val"), (TRAIN, VAL)):
        beton = Beton(tmp_path / f"{name}_{SETTINGS}.beton")
        assert beton.num_images == count
        np.testing.assert_array_equal(beton.labels, split.labels)
        for index in range(count):
            np.testing.assert_array_equal(stored_pixels(beton, index), np.asarray(open_image(split.path(index))))


def test_settings_are_obeyed_and_the_coin_does_not_depend_on_the_workers(tree, tmp_path):
    words = ("--max_resolution", "100", "--compress_probability", "0.5", "--jpeg_quality", "70")
    assert write(tree, tmp_path / "a", *words) == 0
    assert write(tree, tmp_path / "b", *words, "--num_workers", "1") == 0
    one, two = (Beton(tmp_path / folder / "train_100_0.50_70.beton") for folder in "ab")
    longer = np.maximum(one.heights, one.widths)
    assert longer.max() == 100 and longer.min() < 100
    assert 5 < one.is_jpeg.sum() < TRAIN - 5
    np.testing.assert_array_equal(one.is_jpeg, two.is_jpeg)
    for index in np.flatnonzero(one.is_jpeg):
        contents = [b.bytes[b.starts[index] : b.starts[index] + b.sizes[index]].tobytes() for b in (one, two)]
        assert contents[0] == contents[1]


def test_a_data_set_by_name(tmp_path):
    assert write("digits", tmp_path, "--compress_probability", "0") == 0
    images, labels = files_of("Digits").read(tmp_path, train=True)
    beton = Beton(tmp_path / "train_500_0.00_90.beton")
    np.testing.assert_array_equal(beton.labels, labels)
    np.testing.assert_array_equal(stored_pixels(beton, 700), np.repeat(images[700], 3, axis=2))


def test_a_large_image_gets_a_page_that_holds_it(tmp_path):
    side = 1800  # 9.7 MB, more than FFCV's usual page
    write_beton(tmp_path / "x.beton", Numbers(lambda: None, count=3, side=side), RAW, 1, False)
    assert stored_pixels(Beton(tmp_path / "x.beton"), 2).shape == (side, side, 3)


@pytest.mark.parametrize("content", ["cut off", "empty", "text", "16 bits"])
def test_a_broken_image_is_named_and_nothing_is_left(content, tmp_path, capfd):
    root, out = make_tree(tmp_path / "tree"), tmp_path / "out"
    path = root / "train" / "class1" / "004.jpg"
    whole = path.read_bytes()
    if content == "16 bits":
        path = path.with_suffix(".png")
        Image.fromarray(np.zeros((50, 50), dtype=np.uint16)).save(path)
    else:
        path.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[content])
    assert write(root, out) == 1
    assert path.name in capfd.readouterr().err.splitlines()[-1]
    assert [file.name for file in out.iterdir()] == ["val_500_0.50_90.beton"]


def test_skip_broken_lists_what_it_left_out(tmp_path, capfd):
    root = make_tree(tmp_path / "tree")
    broken = [root / "train" / "class1" / "004.jpg", root / "train" / "class0" / "012.jpg"]
    for path in broken:
        path.write_bytes(b"")
    labels = find_tree(root)[0].labels
    files = [Path(find_tree(root)[0].path(index)) for index in range(TRAIN)]
    kept = [index for index in range(TRAIN) if files[index] not in broken]
    words = ("--max_resolution", "0", "--compress_probability", "0", "--skip_broken")
    assert write(root, tmp_path, *words) == 0
    out = capfd.readouterr().out
    assert "left out 2 broken images" in out and all(path.name in out for path in broken)
    beton = Beton(tmp_path / f"train_{SETTINGS}.beton")
    np.testing.assert_array_equal(beton.labels, labels[kept])
    for place in (0, 3, len(kept) - 1):
        np.testing.assert_array_equal(stored_pixels(beton, place), np.asarray(open_image(files[kept[place]])))


def test_a_broken_image_ends_the_command_too(tmp_path):
    root = make_tree(tmp_path / "tree", 6, 3)
    (root / "test" / "class0" / "006.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "utils.write_beton", "--source", str(root), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "006.jpg" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and nothing_left(tmp_path / "out")


def test_a_worker_that_is_killed_is_noticed(tmp_path):
    source = Numbers(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match="a worker died with exit code -9"):
        write_beton(tmp_path / "x.beton", source, RAW, 2, False)
    assert nothing_left(tmp_path)


def test_control_c_leaves_nothing(tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        write_beton(tmp_path / "x.beton", Numbers(lambda: time.sleep(60)), RAW, 2, False)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_status_when_stopped(signum, status, tmp_path):
    root = make_tree(tmp_path / "tree", 6, 3)
    os.mkfifo(root / "test" / "class0" / "pipe.jpg")  # reading it waits forever
    threading.Timer(1.0, os.kill, (os.getpid(), signum)).start()
    with pytest.raises(SystemExit) as stopped:
        write(root, tmp_path / "out")
    assert stopped.value.code == status and nothing_left(tmp_path / "out")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(b"the old file")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*x\.beton"):
            write_beton(path, Numbers(lambda: None), RAW, 2, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "CIFAR11"], "CIFAR10"),
        (["--source", "."], "train"),
        (["--compress_probability", "1.5"], "0 to 1"),
        (["--jpeg_quality", "0"], "1 to 100"),
        (["--max_resolution", "x"], "whole number"),
        (["--out", __file__], "not a folder"),
        (["--quality", "5"], "unrecognized"),
    ],
)
def test_wrong_usage(words, said, tree, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = write(tree, tmp_path / "out", *words)
    except SystemExit as stopped:
        status = stopped.code
    err = capfd.readouterr().err
    assert status == 2 and said in err and "dataset.data_root" not in err and nothing_left(tmp_path)
