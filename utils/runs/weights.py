"""Checkpoints: saved to files and loaded from them; and the CSV rows of masks."""

import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from utils.conv_type import check_masked, kept_counts, masked_params
from utils.errors import RunError
from utils.files import HashedFile
from utils.runs.tables import LAYER_COLUMNS, Row


def save(obj: Any, file: HashedFile) -> None:
    """``torch.save`` into a file that is hashed on the way, so nothing is held in memory a second time."""
    torch.save(obj, cast(IO[bytes], file))  # torch calls write and flush alone


def load(path: Path) -> Any:
    """A checkpoint's content, on the CPU; only tensors and plain containers, so a hostile file cannot run code.

    Raises:
        RunError: the file is missing, truncated, or no checkpoint of tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} is missing") from None
    except pickle.UnpicklingError:
        raise RunError(f"{path} is no checkpoint: it is damaged, or holds more than tensors and plain values") from None
    except Exception as error:  # torch.load raises a different class for each way a file can be damaged
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path} is no readable checkpoint: {reason}") from error


def tensors_by_name(content: Any, source: Path) -> dict[str, Tensor]:
    """`content`, the state_dict of the file `source`.

    Raises:
        RunError: it is empty, or holds anything but tensors by name.
    """
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise RunError(f"{source} holds no weights of a network")
    return content


def check_level(model: nn.Module, level: int) -> None:
    """Check that a trained level has kept its masks, before it is saved.

    Raises:
        RunError: pruned weights are not zero; names their layers.
    """
    try:
        check_masked(model)
    except ValueError as error:
        raise RunError(f"level {level}: {error}") from error


def layer_rows(model: nn.Module, level: int) -> list[Row]:
    """One row per masked layer: its name, kept and total weights, density, and whether it is dead (none kept)."""
    entries = [(name, mask) for name, _, mask in masked_params(model)]
    rows = []
    for (name, mask), kept in zip(entries, kept_counts([mask for _, mask in entries])):
        total = mask.numel()
        rows.append(dict(zip(LAYER_COLUMNS, (level, name, kept, total, kept / total, kept == 0))))
    return rows
