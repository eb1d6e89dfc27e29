"""Trees of image files: held in memory when small, through a DataLoader's workers when not."""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from tests import data_helpers as help_
from tests.conftest import ROOT
from utils.data import worker_batches
from utils.data.by_workers import FolderTrainLoader
from utils.data.image_tree import find_tree, image_pixels, open_image
from utils.data.images import random_crop_box
from utils.data.in_memory import MemoryTrainLoader
from utils.errors import DataError
from utils.processes.signals import STOPPING, NotedSignal, Stopped


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return help_.photo_tree(tmp_path_factory.mktemp("photos"))


def by_workers(root, **more):
    more = {"resolution": 32, "batch_size": 5, "num_workers": 0, **more}
    return help_.load(root, dataset_name="ImageFolder", loader="torchvision", **more)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------------- small: memory


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".JPEG"])
def test_a_small_tree_is_held_in_memory(tmp_path, suffix):
    root = help_.digit_tree(tmp_path, suffix=suffix)
    data = help_.load(root, dataset_name="ImageFolder", batch_size=8)
    assert isinstance(data.train, MemoryTrainLoader)
    assert (data.num_classes, data.image_shape, data.train.num_images, data.test.num_images) == (3, (3, 16, 16), 40, 10)
    images, labels = next(iter(data.test.batches()))
    files = sorted((root / "val").glob("*/*"))
    assert labels.tolist() == [int(path.parent.name[-1]) for path in files]
    assert np.array_equal(help_.pixels_of(images, data), [np.asarray(Image.open(p).convert("RGB")) for p in files])


def test_a_small_tree_is_normalised_by_its_own_training_images(tmp_path):
    root = help_.digit_tree(tmp_path)
    data = help_.load(root, dataset_name="ImageFolder", batch_size=8, augment="none")
    images, _ = help_.epoch(data)
    assert abs(images.mean()) < 1e-5
    assert images.double().std(correction=0) == pytest.approx(1, abs=1e-5)


def test_fast_decoding_gives_the_same_pixels(photos):
    paths = sorted(photos.glob("*/*/*.JPEG"))
    assert len(paths) > 1
    for path in paths:
        assert np.array_equal(image_pixels(str(path)), np.asarray(open_image(str(path))))


def test_auto_leaves_memory_when_sizes_differ_or_pixels_are_asked_for(tmp_path, photos):
    root = help_.digit_tree(tmp_path)
    assert isinstance(help_.load(root, dataset_name="ImageFolder", resolution=16).train, MemoryTrainLoader)
    asked = help_.load(root, dataset_name="ImageFolder", resolution=24, num_workers=0)
    assert isinstance(asked.train, FolderTrainLoader) and asked.image_shape == (3, 24, 24)
    own = help_.load(root, dataset_name="ImageFolder", loader="torchvision", num_workers=0)
    assert own.image_shape == (3, 16, 16)
    Image.new("RGB", (20, 16)).save(root / "train" / "digit0" / "wide.png")
    unequal = help_.load(root, dataset_name="ImageFolder", num_workers=0)
    assert isinstance(unequal.train, FolderTrainLoader)
    large = help_.load(photos, dataset_name="ImageFolder", batch_size=4, num_workers=0)
    assert isinstance(large.train, FolderTrainLoader) and large.image_shape == (3, 224, 224)


def test_names_are_sorted_and_hidden_files_and_files_beside_classes_left_out(tmp_path):
    root = help_.digit_tree(tmp_path)
    (root / "train" / "digit1" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "names.txt").write_text("x")
    (root / "train" / ".cache").mkdir()
    deep = root / "val" / "digit0" / "more"
    deep.mkdir()
    Image.new("RGB", (16, 16)).save(deep / "a.png")
    train, test = find_tree(root)
    assert train.classes == ("digit0", "digit1", "digit2")
    assert [train.path(i) for i in range(40)] == sorted(str(p) for p in (root / "train").glob("*/[!.]*"))
    assert str(deep / "a.png") in [test.path(i) for i in range(len(test.files))]


# ------------------------------------------------------------------------------------------------- large: DataLoader


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(photos, world):
    batch = {"batch_size": 6, "resolution": 24}
    alone = by_workers(photos, **batch)
    ranks = [by_workers(photos, rank=rank, world=world, **batch) for rank in range(world)]
    for (images, labels), *parts in zip(
        alone.train.batches(1, 2), *(data.train.batches(1, 2) for data in ranks), strict=True
    ):
        assert torch.equal(images, torch.cat([part for part, _ in parts]))
        assert torch.equal(labels, torch.cat([part for _, part in parts]))
    tested = [batch for data in ranks for batch in data.test.batches()]
    whole = list(alone.test.batches())
    assert torch.equal(torch.cat([x for x, _ in tested]), torch.cat([x for x, _ in whole]))
    assert sum(len(labels) for _, labels in tested) == 12 == alone.test.num_images
    scored = ranks[1].train.score_batches(0, 2)
    assert same(scored, list(alone.train.batches(0, 0)))


def test_workers_live_on_and_change_nothing(photos):
    alone, data = by_workers(photos), by_workers(photos, num_workers=2)
    before = torch.get_rng_state()
    assert same(data.train.batches(0, 0), alone.train.batches(0, 0))
    workers = data.train.reader.loader._iterator._workers
    first = next(data.train.batches(0, 1))  # left in the middle, with batches on their way
    assert same([first], [next(alone.train.batches(0, 1))])
    assert same(data.train.batches(1, 0), alone.train.batches(1, 0))
    assert same(data.train.batches(1, 0, 1), list(alone.train.batches(1, 0))[1:])
    assert same(data.test.batches(), alone.test.batches())
    assert workers is data.train.reader.loader._iterator._workers and all(worker.is_alive() for worker in workers)
    assert torch.equal(before, torch.get_rng_state())
    data.close()
    assert not any(worker.is_alive() for worker in workers)


def signal_then_start(start, signum, worker):
    """What a worker meets when the signal comes before it is ready."""
    os.kill(os.getpid(), signum)
    start(worker)


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(photos, signum):
    alone, data = by_workers(photos), by_workers(photos, num_workers=2)
    loader = data.train.reader.loader
    loader.worker_init_fn = partial(signal_then_start, loader.worker_init_fn, signum)
    batches = data.train.batches(0, 0)
    first = next(batches)
    workers = loader._iterator._workers
    for worker in workers:
        os.kill(worker.pid, signum)
    assert same([first, *batches], alone.train.batches(0, 0))
    data.close()
    assert not any(worker.is_alive() for worker in workers)


def test_going_on_with_an_older_pass_is_an_error_not_other_images(photos):
    data = by_workers(photos)
    older = data.train.batches(0, 0)
    next(older)
    next(data.train.batches(0, 1))
    with pytest.raises(RuntimeError, match="these batches ended"):
        next(older)


def test_epochs_and_levels_crop_differently(photos):
    data = by_workers(photos, batch_size=12)
    views = []
    for level, epoch in ((0, 0), (0, 1), (1, 0)):
        images, labels = help_.epoch(data, level, epoch)
        assert images.shape == (12, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
        views.append(images)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(x, y) for x in views[a] for y in views[b])


def test_an_unaugmented_view_by_hand(tmp_path):
    """A 64x32 image, left half red and right half blue: the middle of it, at any size, is half and half."""
    for split in ("train", "test"):
        pixels = np.zeros((32, 64, 3), dtype=np.uint8)
        pixels[:, :32, 0], pixels[:, 32:, 2] = 255, 255
        for name in "ab":
            folder = tmp_path / split / f"flag_{name}"
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "flag.png")
    data = by_workers(tmp_path, resolution=28, batch_size=2, augment="none", eval_resolution=14)
    images, _ = next(data.train.batches(0, 0))  # 28 * 256/224 = 32: no resizing, columns 18 to 46 are left
    red, blue = images[0, 0], images[0, 2]
    high = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.406, 0.225))]
    low = [-mean / std for mean, std in ((0.485, 0.229), (0.406, 0.225))]
    torch.testing.assert_close(red, torch.tensor([high[0]] * 14 + [low[0]] * 14).expand(28, 28))
    torch.testing.assert_close(blue, torch.tensor([low[1]] * 14 + [high[1]] * 14).expand(28, 28))
    assert next(data.test.batches())[0].shape == (2, 3, 14, 14)


def test_random_crop_boxes_lie_inside_and_have_the_published_ranges():
    rng, areas, ratios = Random(0), [], []
    for _ in range(3000):
        top, left, height, width = random_crop_box(200, 300, rng)
        assert top >= 0 and left >= 0 and top + height <= 200 and left + width <= 300
        areas.append(height * width / 60000)
        ratios.append(width / height)
    # At most 4:3 in a 3:2 image: 200 * 4/3 of 300 columns.
    assert 0.078 < min(areas) < 0.1 and 0.85 < max(areas) < 0.9
    assert 0.73 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.36
    # So long that nothing fits: the middle, at the nearest ratio allowed.
    assert random_crop_box(10, 1000, Random(0)) == (0, (1000 - 13) // 2, 10, 13)
    assert random_crop_box(1000, 10, Random(0)) == ((1000 - 13) // 2, 0, 13, 10)


# -------------------------------------------------------------------------------------------------------- one class


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_class_is_refused_with_a_hint_for_a_wrapper_folder(tmp_path, split):
    root = help_.digit_tree(tmp_path)
    inner = root / split / "images"
    (root / "aside").mkdir()
    for folder in list((root / split).iterdir()):
        folder.rename(root / "aside" / folder.name)
    (root / "aside").rename(inner)
    with pytest.raises(DataError, match=r"one class folder, images; .* holds only folders \(digit0, digit1"):
        find_tree(root)
    for folder in list(inner.iterdir())[1:]:
        shutil.rmtree(folder)
    other = root / ("val" if split == "train" else "train")
    for folder in list(other.iterdir()):
        folder.rename(other / "images") if folder.name == "digit0" else shutil.rmtree(folder)
    for file in list((only := next(inner.iterdir())).iterdir()):
        file.rename(inner / file.name)
    only.rmdir()
    with pytest.raises(DataError, match=r"one class folder, images; two classes or more are expected in \S+/CLASS/$"):
        find_tree(root)


# ------------------------------------------------------------------------------------------------------ shared memory


def in_small_shared_memory(megabytes: int, code: str) -> subprocess.CompletedProcess:
    """Runs Python code with a /dev/shm of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("NOT TESTED: a full /dev/shm: no right to make a mount namespace here")
    mount = f'mount -t tmpfs -o size={megabytes}m none /dev/shm && exec "$0" -c "$1"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, code],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )


READ = """
import os, sys
from pathlib import Path
from tests import data_helpers
from utils.data import worker_batches
more = dict(dataset_name="ImageFolder", loader="torchvision", resolution=256, batch_size=20, num_workers=2)
data = data_helpers.load(Path({root!r}), **more)
Path("/dev/shm/fill").write_bytes(bytes(10**6 * {fill}))
print(len(list(data.train.batches(0, 0))), "batches")
"""


@pytest.mark.parametrize(("megabytes", "fill", "says"), [
    (8, 0, "dataset.num_workers: 2 is not allowed here: the batches of 2 workers take 16 MB of /dev/shm, where 8 MB"),
    (18, 16, "a loading worker cannot hand over its batch through /dev/shm: take fewer dataset.num_workers"),
    (18, 0, "2 batches"),
])  # fmt: skip
def test_a_full_shared_memory_is_told(tmp_path, megabytes, fill, says):
    help_.digit_tree(tmp_path)
    done = in_small_shared_memory(megabytes, READ.format(root=str(tmp_path), fill=fill))
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize("stop", [False, True])
def test_the_wait_for_a_batch_ends(tmp_path, monkeypatch, stop):
    """The worker waits for files that never answer: pipes that nobody writes to."""
    help_.digit_tree(tmp_path)
    data = by_workers(tmp_path, num_workers=1)
    for path in [path for path in (tmp_path / "train").rglob("*") if path.is_file()]:
        path.unlink()
        os.mkfifo(path)
    monkeypatch.setattr(worker_batches, "STOP_SECONDS" if stop else "BATCH_SECONDS", 1.0)
    noted = NotedSignal()
    before = signal.signal(signal.SIGTERM, noted.note)
    try:
        if stop:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped if stop else DataError, match="SIGTERM" if stop else "no batch for"):
            list(data.train.batches(0, 0))
        (worker,) = data.train.reader.loader._iterator._workers
    finally:
        signal.signal(signal.SIGTERM, before)
        data.close()
    assert not worker.is_alive()


def test_python_ends_though_nobody_closed_the_loader(tmp_path):
    """Workers ignore the signal by which Python ends them."""
    help_.digit_tree(tmp_path)
    read = READ.replace('Path("/dev/shm/fill").write_bytes(bytes(10**6 * {fill}))', "")
    code = read.format(root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "2 batches\n"), done.stderr


@pytest.mark.parametrize("kept", [10, 200, 0.3, 0.9])
def test_a_damaged_jpeg_is_told_in_words_for_users(tmp_path, kept):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((40, 30), 60).convert("RGB").save(whole)
    content = whole.read_bytes()
    path = tmp_path / "cut.jpg"
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(DataError, match=r"cut\.jpg is not a readable image: ") as caught:
        image_pixels(str(path))
    reason = str(caught.value).partition("image: ")[2].replace(str(path), "")
    assert reason and not re.search(r"\.cpp|/|decode_jpeg", reason), reason


def test_decoding_warns_of_nothing_and_needs_no_jpeg_decoder_of_torchvision(tmp_path):
    """In processes of their own: with every warning an error, and with a torchvision that has lost its decoder."""
    path = tmp_path / "a.jpg"
    Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    code = f"""
import hashlib, sys
if "lost" in sys.argv:
    import torchvision.io
    del torchvision.io.decode_jpeg
else:
    import warnings
    import torchvision
    warnings.filterwarnings("error", category=DeprecationWarning)
from utils.data import image_tree
assert (image_tree.decode_jpeg is None) == ("lost" in sys.argv)
print(hashlib.sha256(image_tree.image_pixels({str(path)!r}).tobytes()).hexdigest())
"""
    digests = [
        subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for words in ([], ["lost"])
    ]
    assert digests[0] == digests[1]
