"""Checkpoints: copied off the device, packed into bytes, loaded from files; and the CSV rows of masks."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.conv_type import kept_counts, masked_params
from utils.errors import RunError
from utils.runs.tables import LAYER_COLUMNS, Row


def pack(obj: Any) -> memoryview:
    """The bytes of ``torch.save(obj)``."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getbuffer()


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


def cpu_copy(obj: Any) -> Any:
    """`obj` with every tensor in it copied to the CPU, safe to write while training goes on; tuples become lists."""
    if isinstance(obj, Tensor):
        return obj.detach().to("cpu", copy=True)
    if isinstance(obj, dict):
        return {key: cpu_copy(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [cpu_copy(value) for value in obj]
    return obj


def layer_rows(model: nn.Module, level: int) -> list[Row]:
    """One row per masked layer: its name, kept and total weights, density, and whether it is dead (none kept)."""
    entries = [(name, mask) for name, _, mask in masked_params(model)]
    rows = []
    for (name, mask), kept in zip(entries, kept_counts([mask for _, mask in entries])):
        total = mask.numel()
        rows.append(dict(zip(LAYER_COLUMNS, (level, name, kept, total, kept / total, kept == 0))))
    return rows
