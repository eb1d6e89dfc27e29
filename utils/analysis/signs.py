"""How many of the kept weights still have the sign that they had at an earlier time of the run."""

import torch
from torch import Tensor

from utils.analysis.overlap import WHOLE, check_same_layers
from utils.runs.tables import Row


def sign_rows(masks: dict[str, Tensor], end: dict[str, Tensor], earlier: dict[str, dict[str, Tensor]]) -> list[Row]:
    """One row for the whole network, then one per layer: layer, total, kept; per earlier time, same_TIME, share_TIME.

    share = |{i kept: sign(w_i then) = sign(w_i at the end)}| / kept; not-a-number in a layer that keeps no weight.

    Args:
        masks: {name of the parameter: bool mask}.
        end: the weights at the end of the level, by the same names.
        earlier: {time: the weights at that time}.

    Raises:
        DataError: the weights are another network's.
    """
    for time, weights in earlier.items():
        check_same_layers(masks, {name: weights[name] for name in masks if name in weights}, ("the level", time))
    layers = []
    for name, mask in masks.items():
        counts = {"total": mask.numel(), "kept": int(mask.count_nonzero())}
        for time, weights in earlier.items():
            same = torch.sign(weights[name]) == torch.sign(end[name])
            counts[f"same_{time}"] = int((same & mask).count_nonzero())
        layers.append((name, counts))
    whole = {key: sum(counts[key] for _, counts in layers) for key in layers[0][1]}
    return [_row(name, counts, list(earlier)) for name, counts in [(WHOLE, whole), *layers]]


def _row(name: str, counts: dict[str, int], times: list[str]) -> Row:
    row: Row = {"layer": name, "total": counts["total"], "kept": counts["kept"]}
    for time in times:
        same = counts[f"same_{time}"]
        row |= {f"same_{time}": same, f"share_{time}": same / counts["kept"] if counts["kept"] else float("nan")}
    return row
