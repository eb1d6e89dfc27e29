"""Batches that are copied to a GPU beside its computing: none is read before it is there or after it is overwritten."""

import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.data_helpers import load
from tests.streams_double import WAITS, LateDevice
from utils.data.side_stream import SideStream
from utils.ffcv.prefetch import BATCHES_AHEAD, Prefetcher

COUNTS = [3] * 20 + [2]  # the last batch is smaller


def read_all(device: LateDevice, slow: bool = False) -> list[tuple[list[int], list[int]]]:
    """(pixels, labels) of each batch as the device has read them; all pixels of batch k are k + 1, labels too."""

    def fill(k, pixels, labels, pool):
        assert len(pixels) == len(labels) == COUNTS[k]
        pixels.fill_(k + 1)
        labels.fill_(k + 1)

    found: list = [None] * len(COUNTS)

    def read(k, pixels, labels):
        found[k] = pixels.flatten().tolist(), labels.tolist()

    for k, (pixels, labels) in enumerate(Prefetcher(fill, COUNTS, (2, 2, 3), device, 2, 30, "x.beton")):
        device.launch(lambda k=k, pixels=pixels, labels=labels: read(k, pixels, labels))
        if slow:
            time.sleep(0.005)  # the thread is as far ahead as it may be
    device.finish()
    return found


EXPECTED = [([k + 1] * n * 12, [k + 1] * n) for k, n in enumerate(COUNTS)]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_the_device_reads_each_batch_whole(eager, slow):
    device = LateDevice(eager)
    assert read_all(device, slow) == EXPECTED
    assert device.copies == len(COUNTS)


@pytest.mark.parametrize("wait", WAITS)
def test_each_wait_is_needed(wait):
    """The double finds a wait that is left out: of a copy for its target's last use, of a use for the copy, and of the
    decoder for the copy from its memory."""
    assert any(read_all(LateDevice(eager, careless=wait), slow=True) != EXPECTED for eager in (False, True))


def test_batches_are_copied_before_they_are_asked_for():
    device, asked = LateDevice(), []
    fill = lambda k, pixels, labels, pool: None  # noqa: E731
    batches = iter(Prefetcher(fill, COUNTS, (2, 2, 3), device, 1, 30, "x.beton"))
    for _ in range(3):
        next(batches)
        asked.append(device.copies)
        end = time.monotonic() + 10
        while device.copies < len(asked) + BATCHES_AHEAD and time.monotonic() < end:
            time.sleep(0.01)
        assert device.copies == len(asked) + BATCHES_AHEAD, "and no more: the memory is bounded"
    batches.close()


def test_a_fault_of_a_copy_reaches_the_trainer():
    class Broken(LateDevice):
        def copy(self, pairs, after):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_all(Broken())


@pytest.mark.parametrize("careless", ["", "wait"])
def test_torchvisions_loader_sends_its_batches(tmp_path, careless):
    """The same bits by way of the device; where the wait for the copy is left out, others."""
    rng = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), "ab", range(5)):
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    options = {"dataset_name": "ImageFolder", "loader": "torchvision", "num_workers": 0, "batch_size": 4}
    plain, sent = (load(tmp_path, resolution=32, **options) for _ in range(2))
    sent.train.reader.side = sent.test.reader.side = LateDevice(careless=careless)
    for mine, other in (
        (sent.train.batches(0, 1), plain.train.batches(0, 1)),
        (sent.test.batches(), plain.test.batches()),
    ):
        pairs = list(zip(mine, other, strict=True))
        same = [torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs]
        assert same == [not careless] * 3


def test_the_double_has_what_the_real_one_has():
    names = {name for name in vars(SideStream) if not name.startswith("_")}
    assert names <= set(dir(LateDevice))


ON_A_GPU = """
import torch
from utils.data.side_stream import SideStream
from utils.ffcv.prefetch import Prefetcher

device = torch.device("cuda", 0)
side, counts = SideStream(device), [256] * 40 + [100]

def fill(k, pixels, labels, pool):
    pixels.copy_(torch.arange(pixels.numel()).view(pixels.shape) % 251)
    pixels[:, 0, 0, 0] = k
    labels.fill_(k)

busy, sums = torch.randn(4096, 4096, device=device), []
for pixels, labels in Prefetcher(fill, counts, (64, 64, 3), side, 1, 60, "x"):
    for _ in range(3):  # the GPU is behind
        busy = busy @ busy / 4096
    sums.append((pixels[:, 0, 0, 0].long().sum(), labels.sum(), pixels.flatten(1)[:, 1:].long().sum()))
host = torch.empty(256, 64, 64, 3, dtype=torch.uint8)
for k, (first, labels, rest) in enumerate(sums):
    fill(k, host[: counts[k]], torch.empty(counts[k], dtype=torch.int64), None)
    assert (first, labels) == (k * counts[k], k * counts[k])
    assert rest == host[: counts[k]].flatten(1)[:, 1:].long().sum()
many = [torch.full((1 << 20,), k).pin_memory() for k in range(50)]
for k, (sent,) in enumerate(side.send([tensor]) for tensor in many):
    busy = busy @ busy / 4096
    assert sent.is_cuda
    sums.append((sent != k).sum())
assert not any(sums[-50:])
print("right")
"""


def test_on_a_gpu(gpu):
    words, env = [sys.executable, "-c", ON_A_GPU], os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "right", done.stderr
