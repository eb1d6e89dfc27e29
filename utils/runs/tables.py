"""The CSVs of a run: columns, rows, reading and writing."""

from typing import Any

from torch import nn

from utils.conv_type import kept_counts, masked_params

SUMMARY_COLUMNS = [
    "level", "density", "sparsity", "final_test_acc", "max_test_acc", "final_test_loss", "epochs", "seconds",
]  # fmt: skip


EPOCH_COLUMNS = ["epoch", "train_loss", "test_loss", "train_acc", "test_acc", "lr", "seconds", "images_per_second"]


LAYER_COLUMNS = ["level", "layer", "kept", "total", "density", "dead"]


def _parsed(column: str, text: str) -> Any:
    if column == "layer":
        return text
    if column == "dead":
        return text == "True"
    if text == "":  # how not-a-number is written
        return float("nan")
    return int(text) if column in ("level", "epoch", "epochs", "kept", "total") else float(text)


def _columns(table: str) -> list[str]:
    return {"summary": SUMMARY_COLUMNS, "layerwise_density": LAYER_COLUMNS}.get(table, EPOCH_COLUMNS)


def layer_rows(model: nn.Module, level: int) -> list[dict[str, Any]]:
    """One row a masked layer: its name, kept and total weights, density, and whether it is dead (none kept)."""
    entries = [(name, mask) for name, _, mask in masked_params(model)]
    rows = []
    for (name, mask), kept in zip(entries, kept_counts([mask for _, mask in entries])):
        total = mask.numel()
        rows.append(dict(zip(LAYER_COLUMNS, (level, name, kept, total, kept / total, kept == 0))))
    return rows
