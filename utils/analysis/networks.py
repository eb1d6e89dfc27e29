"""The network and the images of the checkpoints that are analysed: one config for all of them, images as they are."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness_params import SCHEMA, Config, make_config
from utils.analysis.barrier import Batches, whole_batches
from utils.analysis.sources import Source
from utils.config.sources import read_yaml
from utils.data.loaders import Data
from utils.distributed import share_out_threads
from utils.errors import ConfigError, DataError
from utils.plots.names import data_files
from utils.runs.loading import build_network
from utils.runs.saved import saved_config
from utils.training.hardware import configure_kernels

# What the runs of one analysis must have in common: the network and its images.
SHARED = (
    "model_params.model_name", "model_params.blurpool", "dataset.dataset_name", "dataset.num_classes",
    "dataset.resolution", "dataset.eval_resolution",
)  # fmt: skip


@dataclass
class Bench:
    """A network to load states into, and images to evaluate it on.

    Attributes:
        model: in evaluation mode, on the GPU if there is one.
        data: its loaders; training images are not augmented.
        cfg: the config of the sources, as `plain` changes it.
    """

    model: nn.Module
    data: Data
    cfg: Config

    def images(self, split: str, at_least: int = 0) -> Batches:
        """The batches of ``test`` or ``train`` images; training images in one fixed random order.

        Args:
            at_least: number of training images after which to stop, at the end of a batch; 0 = all of them.
        """
        if split == "test":
            return self.data.test.batches
        last = self.cfg.experiment_params.epochs_per_level - 1  # there, training images have their final size
        return lambda: whole_batches(self.data.train.batches(0, last), at_least)


@contextlib.contextmanager
def open_bench(sources: Sequence[Source], config: str | None, data_root: str | None) -> Iterator[Bench]:
    """The network and images of the sources; ends the loaders' processes on exit.

    Raises:
        ConfigError: no config is known for a checkpoint, or --config is faulty.
        DataError: the sources have different networks or data; the images are missing or damaged.
    """
    cfg = plain(common_config(sources, config, data_root is not None), data_root)
    configure_kernels(deterministic=False)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in full float32, as matrix products are
    share_out_threads(1, cfg.dist_params.threads)
    model, data = build_network(cfg)
    with contextlib.closing(data):
        yield Bench(model, data, cfg)


def common_config(sources: Sequence[Source], config: str | None, moved: bool = False) -> Config:
    """The config of the sources, which have the network and the images in common.

    Args:
        config: the file of --config, which stands for checkpoints that lie in no run.
        moved: whether another folder of images is given.

    Raises:
        ConfigError, DataError: as `open_bench`.
    """
    if config is not None and all(source.run for source in sources):
        raise ConfigError(f"--config: {config} has no effect: each source lies in a run, which has its own config")
    found = []
    for source in sources:
        if source.run is None and config is None:
            raise ConfigError(f"--config: {source.path} lies in no run: a config with its network and data is expected")
        found.append((source.name, saved_config(source.run) if source.run else _read_config(str(config))))
    (name, first), *others = found
    for other, cfg in others:
        for path in SHARED:
            if first.value(path) != cfg.value(path):
                raise DataError(
                    f"{name} and {other} differ in network or data: {path} is {first.value(path)} and {cfg.value(path)}"
                )
        if not moved and data_files(first) != data_files(cfg):
            raise DataError(f"{name} and {other} have images in different folders; --data_root says which to take")
    return first


def _read_config(file: str) -> Config:
    values, faults = read_yaml(file)
    if faults:
        raise ConfigError(faults)
    try:
        return make_config(values)
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {fault}" for fault in error.faults) from error


def plain(cfg: Config, data_root: str | None = None) -> Config:
    """The config for analysis: one process, images without augmentation, in an order that no seed of a run decides."""
    changes: dict = {
        "dataset": {"augment": "none", "alternate_flip": False, "download": False},
        "experiment_params": {"seed": 0},
        "dist_params": {"distributed": False},
    }
    if SCHEMA.find("experiment_params.data_seed"):
        changes["experiment_params"]["data_seed"] = -1
    if data_root is not None:
        changes["dataset"]["data_root"] = str(Path(data_root))
    return cfg.replace(changes)
