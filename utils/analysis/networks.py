"""The network and the images of the checkpoints that are analysed: one config for all of them, images as they are."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness_params import Config, make_config
from utils.analysis.barrier import Batches, whole_batches
from utils.analysis.sources import Source
from utils.config.sources import read_yaml
from utils.data.loaders import Data
from utils.distributed import share_out_threads
from utils.errors import ConfigError, DataError
from utils.plots.names import data_files, plugin_files
from utils.runs.loading import build_network
from utils.runs.plugin_files import kept_copies
from utils.runs.records import saved_plugins
from utils.runs.saved import saved_config
from utils.training.caller import left_as_found
from utils.training.hardware import configure_kernels

# What the runs of one analysis must have in common: the network and its images.
SHARED = (
    "model_params.model_name", "model_params.model_args", "model_params.blurpool", "dataset.dataset_name",
    "dataset.num_classes", "dataset.resolution", "dataset.eval_resolution", "dataset.validation_images",
)  # fmt: skip


@dataclass
class Bench:
    """A network to load states into, and images to evaluate it on.

    Attributes:
        model: in evaluation mode, on the GPU if there is one.
        data: its loaders; training images are not augmented.
        cfg: the config of network and images, as `plain` changes it.
        own: {path of a source: its own config, unchanged}.
    """

    model: nn.Module
    data: Data
    cfg: Config
    own: dict[Path, Config]

    def images(self, split: str, at_least: int = 0) -> Batches:
        """The batches of ``test``, ``validation`` or ``train`` images; training images in one fixed random order.

        Args:
            at_least: number of training images after which to stop, at the end of a batch; 0 = all of them.

        Raises:
            ConfigError: the config holds no validation images out.
        """
        if split == "test":
            return self.data.test.batches
        if split == "validation":
            if self.data.validation is None:
                raise ConfigError("--split: validation is not allowed here: dataset.validation_images of the run is 0")
            return self.data.validation.batches
        last = self.cfg.experiment_params.epochs_per_level - 1  # there, training images have their final size
        return lambda: whole_batches(self.data.train.batches(0, last), at_least)


@contextlib.contextmanager
def open_bench(sources: Sequence[Source], config: str | None, data_root: str | None) -> Iterator[Bench]:
    """The network and images of the sources; ends the loaders' processes on exit.

    Raises:
        ConfigError: no config is known for a checkpoint, or --config is faulty.
        DataError: the sources have different networks or data; the images are missing or damaged.
    """
    own = own_configs(sources, config)
    cfg = plain(common_config(sources, list(own.values()), data_root is not None), data_root)
    with left_as_found("analyze"):
        configure_kernels(deterministic=False)
        torch.backends.cudnn.allow_tf32 = False  # convolutions in full float32, as matrix products are
        share_out_threads(1, cfg.dist_params.threads)
        model, data = build_network(cfg)
        with contextlib.closing(data):
            yield Bench(model, data, cfg, own)


def own_configs(sources: Sequence[Source], config: str | None) -> dict[Path, Config]:
    """{path of a source: the config of its run}.

    Args:
        config: the file of --config, which stands for checkpoints that lie in no run.

    Raises:
        ConfigError: no config is known for a checkpoint, or --config is faulty or has no effect.
        DataError: the config of a run is missing or damaged.
        RunError: a run's copy of a plugin is.
    """
    if config is not None and all(source.run for source in sources):
        raise ConfigError(f"--config: {config} has no effect: each source lies in a run, which has its own config")
    found = {}
    for source in sources:
        if source.run is None and config is None:
            raise ConfigError(f"--config: {source.path} lies in no run: a config with its network and data is expected")
        found[source.path] = (
            saved_config(source.run, kept_copies(source.run)) if source.run else _read_config(str(config))
        )
    return found


def common_config(sources: Sequence[Source], own: Sequence[Config], moved: bool = False) -> Config:
    """One config for all sources, which have the network and the images in common; their order does not matter.

    Its batches are the largest of theirs, and the incomplete last one is dropped if a source drops it. It has as many
    epochs as the longest of them: the last epoch gives training images their order and final size.

    Args:
        own: the config of each source.
        moved: whether another folder of images is given.

    Raises:
        DataError: the sources have different networks or data.
    """
    (name, first), *others = [(source.name, cfg) for source, cfg in zip(sources, own, strict=True)]
    (parts, *other_parts) = [_own_parts(source, cfg) for source, cfg in zip(sources, own, strict=True)]
    for (other, cfg), theirs in zip(others, other_parts, strict=True):
        if parts != theirs:
            raise DataError(f"{name} and {other} differ in network or data: their plugins are {parts} and {theirs}")
        for path in SHARED:
            if first.value(path) != cfg.value(path):
                raise DataError(
                    f"{name} and {other} differ in network or data: {path} is {first.value(path)} and {cfg.value(path)}"
                )
        if not moved and data_files(first) != data_files(cfg):
            raise DataError(f"{name} and {other} have images in different folders; --data_root says which to take")
    batches = {
        "batch_size": max(cfg.dataset.batch_size for cfg in own),
        "drop_last": any(c.dataset.drop_last for c in own),
    }
    epochs = max(cfg.experiment_params.epochs_per_level for cfg in own)
    return first.replace({"dataset": batches, "experiment_params": {"epochs_per_level": epochs}})


def _own_parts(source: Source, cfg: Config) -> str:
    """The plugins that the network or the data are from, with their digests; "none" without one."""
    files = plugin_files(cfg, saved_plugins(source.run)) if source.run else {}
    return ", ".join(f for path, f in files.items() if path.removesuffix(" from") in SHARED) or "none"


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
        "experiment_params": {"seed": 0, "data_seed": -1},
        "dist_params": {"distributed": False},
    }
    if data_root is not None:
        changes["dataset"]["data_root"] = str(Path(data_root))
    return cfg.replace(changes)
