"""Batches of a single image: networks without BatchNorm train on them, those with it are refused."""

import pandas as pd
import pytest
import torch
from torch import nn

from harness_params import make_config
from tests.processes import in_ranks
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import ConfigError
from utils.training.setup import build_model

# Of Digits' 1437 training images: 359 batches of 4 and one of 1; 1437 of 1.
LAST_OF_ONE, OF_ONE = 4, 1


@pytest.mark.parametrize(("model", "batch"), [("lenet_300_100", OF_ONE), ("conv2", LAST_OF_ONE)])
def test_networks_without_batchnorm_train_on_single_images(fork, model, batch):
    slow = {"optimizer.lr": 0.001, "experiment_params.epochs_per_level": 1, "prune_params.num_levels": 1}
    one = {"model_params.model_name": model, "dataset.batch_size": batch, "optimizer.warmup_epochs": 0}
    done = fork("run", **slow, **one)
    assert pd.read_csv(done.path / "metrics" / "summary.csv")["final_test_acc"][0] > 50


@pytest.mark.parametrize(
    ("model", "batch", "drop_last", "says"),
    [
        ("resnet20", OF_ONE, False, r"dataset.batch_size: 1 is not allowed: .* 2 images \(the network has BatchNorm\)"),
        ("vgg16_bn", OF_ONE, True, r"dataset.batch_size: 1 is not allowed: .* 2 images \(the network has BatchNorm\)"),
        ("preresnet", LAST_OF_ONE, False, r"dataset.batch_size: 4 leaves a last batch of 1 .* dataset.drop_last: true"),
        ("mobilenet_v2", 1436, False, r"dataset.batch_size: 1436 leaves a last batch of 1 "),
        ("preresnet", LAST_OF_ONE, True, ""),
        ("resnet20", 2000, False, ""),
    ],
)
def test_with_batchnorm_each_batch_needs_two(model, batch, drop_last, says):
    cfg = make_config({"dataset": {"batch_size": batch, "drop_last": drop_last}, "model_params": {"model_name": model}})
    ctx = Context()
    data = load_data(cfg, ctx)
    if says:
        with pytest.raises(ConfigError, match=says):
            build_model(cfg, data, ctx)
        return
    network = build_model(cfg, data, ctx).train()
    images, labels = list(data.train.batches(0, 0))[-1]
    nn.functional.cross_entropy(network(images), labels).backward()
    assert all(torch.isfinite(param.grad).all() for param in network.parameters())


def on_each_of_two(ctx: Context) -> None:
    cfg = make_config({"dataset": {"batch_size": 4}, "dist_params": {"nproc": 2, "backend": "gloo"}})
    with pytest.raises(ConfigError, match=r"4 leaves a last batch of 1 .* 1 image for each of 2 processes"):
        load_data(cfg, ctx)
    data = load_data(cfg.replace({"dataset": {"batch_size": 3}}), ctx)  # 1437 = 479 * 3
    assert [len(labels) for _, labels in data.train.batches(0, 0)] == [1 + ctx.rank] * 479


def test_each_process_needs_an_image():
    in_ranks(2, on_each_of_two)
    with pytest.raises(ConfigError, match=r"dataset.batch_size: 2 is not allowed: at least 1 image per process"):
        make_config({"dataset": {"batch_size": 2}, "dist_params": {"nproc": 3}})
