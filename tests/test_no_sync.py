"""A training step never waits for the device.

The device is torch's "meta" here, which has no values to give: to read one, as `.item()`, `nonzero` or a mask used as
an index do, raises where a GPU would have to be waited for.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.optim import adam, sgd

from harness_params import make_config
from utils import conv_type
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data
from utils.distributed import Context
from utils.training.graphs import CudaGraphs
from utils.training.setup import build_model
from utils.training.trainer import Trainer


class Repeated(CudaGraphs):
    """Graphs for a device without any: a captured step is called again instead of replayed."""

    def __init__(self, device, required):
        super().__init__(device, required)
        self.recorded = 0

    @staticmethod
    def missing(device):
        return ""

    def own_stream(self):
        return contextlib.nullcontext()

    def new_pool(self):
        return None

    def record(self, work, pool):
        self.recorded += 1
        return work

    def watch(self):
        return contextlib.nullcontext()


META = torch.device("meta")
SHAPE = (3, 32, 32)


@pytest.fixture
def prepared(monkeypatch):
    """prepared(model, options) -> its trainer on the meta device, with what that lacks put right."""
    # It has no fused optimizers: it is given some that do nothing, as everything there.
    for module in (sgd, adam):
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda param: None)
    for kernel in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        monkeypatch.setattr(torch, kernel, lambda *args, **named: None)
    # Read once a level, when the masks have changed.
    monkeypatch.setattr(conv_type, "kept_counts", lambda masks: [0] * len(masks))

    def prepare(model: str, options: dict) -> Trainer:
        cfg = make_config({"model_params": {"model_name": model}, **options})
        cfg = cfg.replace({"experiment_params": {"precision": "fp32"}})  # it has no autocast
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (50, *SHAPE[1:], 3), dtype=np.uint8)
        labels = rng.integers(0, 10, 50)
        normalize = Normalizer((0.5,) * 3, (0.25,) * 3, SHAPE, META)
        plan = {"batch_size": 16, "drop_last": False, "seed": 0, "rank": 0, "world": 1}
        alternate = cfg.dataset.alternate_flip
        train = MemoryTrainLoader(images, labels, normalize, crop=True, flip=True, alternate=alternate, **plan)
        data, ctx = Data(train, MemoryTestLoader(images, labels, normalize), 10, SHAPE), Context(device=META)
        if cfg.dataset.validation_images:
            data.validation = MemoryTestLoader(images, labels, normalize)
        return Trainer(cfg, ctx, build_model(cfg, data, ctx), data)

    return prepare


OPTIONS = [
    ("resnet20", {}),
    (
        "resnet20",
        {
            "dataset": {"augment": "flip", "alternate_flip": True},
            "optimizer": {"nesterov": True, "label_smoothing": 0.1},
        },
    ),
    ("vgg11_bn", {"optimizer": {"grad_clip": 1.0, "no_decay_bn": True}}),
    ("lenet_300_100", {}),
    ("lenet_300_100", {"optimizer": {"optimizer_name": "adam"}}),
    ("lenet_300_100", {"optimizer": {"optimizer_name": "adamw", "grad_clip": 1.0}}),
    ("preresnet", {"experiment_params": {"channels_last": False}}),
    ("resnet20", {"dataset": {"validation_images": 10}, "experiment_params": {"ema_decay": 0.9}}),
]


@pytest.mark.parametrize("kind", [CudaGraphs, Repeated])
@pytest.mark.parametrize(("model", "options"), OPTIONS)
def test_an_epoch_reads_nothing_from_the_device(prepared, monkeypatch, model, options, kind):
    """Its steps, the evaluation, the check of network and losses: all up to the end, where all is read at once."""
    monkeypatch.setattr(Trainer, "graphs_class", kind)
    trainer = prepared(model, options)
    assert all(tensor.device == META for tensor in trainer.model.state_dict().values())
    for epoch in range(2):  # with graphs, whole batches are captured in the second one
        tally = trainer.new_tally()
        assert trainer.train_epoch(0, epoch, tally, stop=lambda steps: False)
        assert tally.step == 4
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or [0.0] * tensor.numel())
    trainer.finish_epoch(0, 0, tally, evaluate=True)
    tensors = [t for t in trainer.model.state_dict().values() if t.is_floating_point()]
    evaluations = 4 if trainer.average else 1  # two networks, each on two sets
    # Correct, evaluations, losses, whether each tensor is finite.
    assert reads == [(1 + 2 * evaluations + 4 + len(tensors),)]
    if kind is Repeated:
        assert trainer.graphs.graphs.recorded == 1


def test_a_read_is_noticed(prepared):
    """The same, with a step that looks at its loss: the usual way, `.item()`."""
    trainer = prepared("resnet20", {})
    tally = trainer.new_tally()
    with pytest.raises(RuntimeError, match="meta"):
        trainer.train_epoch(0, 0, tally, stop=lambda steps: tally.losses.sum().item() > 0)
    trainer.train_epoch(0, 0, trainer.new_tally(), stop=lambda steps: False)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        trainer.finish_epoch(0, 0, tally, evaluate=True)
