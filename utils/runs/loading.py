"""Networks of saved runs: checkpoints read and checked, models built from a run's config, test batches beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from harness_params import Config
from utils.config.run_folder import is_run
from utils.conv_type import MASK_SUFFIX
from utils.data.loaders import Batch, Data
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import DataError, RunError
from utils.runs.plugin_files import kept_copies
from utils.runs.saved import finished_levels, read_csv, read_summary, saved_config
from utils.runs.tables import EPOCH_COLUMNS, LAYER_COLUMNS, LAYERS, epoch_table, table_file
from utils.runs.weights import load, tensors_by_name
from utils.state_dicts import check_weights
from utils.training.caller import generators_left_as_found
from utils.training.setup import build_model

State = dict[str, Tensor]


@dataclass
class LoadedRun:
    """A level of a saved run, ready to be evaluated or trained further.

    Attributes:
        path: the run's directory.
        cfg: its config.
        level: the level whose checkpoint `model` holds.
        model: the network with its masks, in evaluation mode, on the GPU if there is one.
        data: the run's loaders, in one process; ``data.train.batches(level, epoch)`` are the run's own batches.
        summary: summary.csv, one row per finished level.
        layers: layerwise_density.csv, of all finished levels.
        epochs: the CSV of the level's epochs.
    """

    path: Path
    cfg: Config
    level: int
    model: nn.Module
    data: Data
    summary: pd.DataFrame
    layers: pd.DataFrame
    epochs: pd.DataFrame

    def test_batches(self) -> Iterator[Batch]:
        """Every test image once: float32 (N, C, H, W) and labels int64 (N,), on the model's device."""
        return self.data.test.batches()

    def close(self) -> None:
        """Ends the processes of the loaders, if there are any: `contextlib.closing` calls it."""
        self.data.close()


def load_run(path: str | Path, level: int = -1, data_root: str | Path = "") -> LoadedRun:
    """A level of a saved run: network, config, tables and data. The run's own copies of its plugins are loaded.

    The network is the one that the run has saved, in float32; a run in bf16 or fp16 has evaluated it under autocast.

    Args:
        path: the run's directory.
        level: a finished level; -1 is the last one.
        data_root: folder of the images, where it is not that of the run's config.

    Raises:
        DataError: there is no such run, or its files are damaged; its data set is missing.
        RunError: the level is not finished, or its checkpoint or a copy of a plugin is missing or damaged.
    """
    path = Path(path)
    if not is_run(path):
        raise DataError(f"{path}: not the directory of a run: no expt_config.yaml")
    cfg, summary = saved_config(path, kept_copies(path)), read_summary(path)
    if data_root:
        cfg = cfg.replace({"dataset": {"data_root": str(data_root)}})
    chosen = chosen_level(path, level)
    checkpoint = level_checkpoint(path, chosen)
    state = read_state(checkpoint)
    with generators_left_as_found():
        model, data = build_network(cfg)
    put_state(model, state, str(checkpoint))
    layers = read_csv(table_file(path, LAYERS), LAYER_COLUMNS)
    epochs = read_csv(table_file(path, epoch_table(chosen)), EPOCH_COLUMNS)
    return LoadedRun(path, cfg, chosen, model, data, summary, layers, epochs)


# --- levels and their checkpoints ------------------------------------------------------------------------------------


def level_checkpoint(run: Path, level: int) -> Path:
    """Path of the checkpoint that ends a level."""
    return run / "checkpoints" / f"model_level_{level}.pt"


def chosen_level(run: Path, level: int) -> int:
    """A finished level of a run by its number, where -1 is the last one.

    Raises:
        RunError: the level is not finished; the line names those that are.
    """
    levels = finished_levels(run)
    if not levels:
        raise RunError(f"{run}: no level is finished")
    if level != -1 and level not in levels:
        raise RunError(f"{run}: level {level} is not finished; levels 0 to {levels[-1]} are")
    return levels[-1] if level == -1 else level


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in; None if it lies elsewhere."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and is_run(folder.parent) else None


def read_state(path: Path) -> State:
    """The state_dict in a checkpoint, on the CPU.

    Raises:
        RunError: the file is missing or damaged, or holds anything but tensors by name.
    """
    return tensors_by_name(load(path), path)


def masks_in(state: State, source: str) -> State:
    """{name of the masked parameter: bool mask}, in model order.

    Raises:
        DataError: the state holds no masks, or one without its parameter.
    """
    found = {
        name.removesuffix(MASK_SUFFIX): mask
        for name, mask in state.items()
        if name.endswith(MASK_SUFFIX) and mask.dtype is torch.bool
    }
    if not found:
        raise DataError(f"{source} holds no masks: it is no checkpoint of a run")
    for name, mask in found.items():
        if name not in state or state[name].shape != mask.shape:
            raise DataError(f"{source} holds a mask of {name}, but no such parameter of its shape")
    return found


# --- networks --------------------------------------------------------------------------------------------------------


def build_network(cfg: Config) -> tuple[nn.Module, Data]:
    """(network with masks in evaluation mode, its data), in one process, on the GPU if there is one.

    Raises:
        ConfigError, DataError, RunError: as `load_data` and `build_model`.
    """
    ctx = Context(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(cfg, ctx)
    return build_model(cfg, data, ctx).eval(), data


def put_state(model: nn.Module, state: State, source: str) -> None:
    """Weights, buffers and masks of `state` into the model, in place.

    Raises:
        RunError: it is the state of another network.
    """
    check_weights(model, state, source)
    model.load_state_dict(state)
