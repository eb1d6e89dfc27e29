"""A training step never waits for the device.

The device is torch's "meta" here, which has no values to give: to read one, as `.item()`, `nonzero` or a mask used as
an index do, raises where a GPU would have to be waited for.
"""

import numpy as np
import pytest
import torch

from harness_params import make_config
from utils import conv_type
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data
from utils.distributed import Context
from utils.training.setup import build_model
from utils.training.trainer import Trainer

META = torch.device("meta")
SHAPE = (3, 32, 32)


@pytest.fixture
def prepared(monkeypatch):
    """prepared(model, options) -> its trainer on the meta device, with what that lacks put right."""
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **named: plain(*args, **named))  # it fuses nothing
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
    ("preresnet", {"experiment_params": {"channels_last": False}}),
]


@pytest.mark.parametrize(("model", "options"), OPTIONS)
def test_an_epoch_reads_nothing_from_the_device(prepared, model, options):
    trainer = prepared(model, options)
    assert all(tensor.device == META for tensor in trainer.model.state_dict().values())
    tally = trainer.new_tally()
    assert trainer.train_epoch(0, 0, tally, stop=lambda steps: False)
    assert tally.step == 4
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the one place where an epoch waits
        trainer.epoch_result(0, 0, tally)


def test_a_read_is_noticed(prepared):
    """The same, with a step that looks at its loss: the usual way, `.item()`."""
    trainer = prepared("resnet20", {})
    tally = trainer.new_tally()
    with pytest.raises(RuntimeError, match="meta"):
        trainer.train_epoch(0, 0, tally, stop=lambda steps: tally.losses.sum().item() > 0)
