"""How many kept weights two masks have in common, beside what random masks of the same densities would have."""

from torch import Tensor

from utils.errors import DataError
from utils.runs.tables import Row

WHOLE = "all"  # stands for the whole network in a column of layers
OVERLAP_COLUMNS = [
    "layer", "total", "kept_a", "kept_b", "both", "iou", "share_of_a", "share_of_b",
    "random_both", "random_iou", "layerwise_both", "layerwise_iou",
]  # fmt: skip


def expected_both(total: int, kept_a: int, kept_b: int) -> float:
    """Expected number of weights that two independent, uniformly random masks both keep: kept_a * kept_b / total.

    It is the mean of the hypergeometric distribution, exact for any counts.
    """
    return kept_a * kept_b / total


def iou(both: float, kept_a: int, kept_b: int) -> float:
    """Intersection over union (Jaccard 1912): both / (kept_a + kept_b - both); not-a-number where neither keeps any.

    Of an expected intersection it is the ratio of the expectations. The expectation of the ratio is larger by less
    than a term of order 1 / total (Jensen's inequality): 0.0003 for 1000 weights at density 0.1.
    """
    union = kept_a + kept_b - both
    return both / union if union else float("nan")


def overlap_rows(a: dict[str, Tensor], b: dict[str, Tensor], names: tuple[str, str]) -> list[Row]:
    """One row for the whole network, then one per layer, with the columns `OVERLAP_COLUMNS`.

    Args:
        a, b: {name of the parameter: bool mask}.
        names: what a fault calls the two.

    Raises:
        DataError: they are masks of different networks.
    """
    check_same_layers(a, b, names)
    layers = []
    for name in a:
        kept_a, kept_b = int(a[name].count_nonzero()), int(b[name].count_nonzero())
        layers.append((name, a[name].numel(), kept_a, kept_b, int((a[name] & b[name]).count_nonzero())))
    layerwise = [expected_both(total, kept_a, kept_b) for _, total, kept_a, kept_b, _ in layers]
    total, kept_a, kept_b, both = (sum(column) for column in list(zip(*layers))[1:])
    whole = _row(WHOLE, total, kept_a, kept_b, both, sum(layerwise))
    return [whole, *(_row(*counts, expected) for counts, expected in zip(layers, layerwise))]


def _row(name: str, total: int, kept_a: int, kept_b: int, both: int, layerwise: float) -> Row:
    expected = expected_both(total, kept_a, kept_b)
    values = (
        name, total, kept_a, kept_b, both, iou(both, kept_a, kept_b), _share(both, kept_a), _share(both, kept_b),
        expected, iou(expected, kept_a, kept_b), layerwise, iou(layerwise, kept_a, kept_b),
    )  # fmt: skip
    return dict(zip(OVERLAP_COLUMNS, values))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def check_same_layers(a: dict[str, Tensor], b: dict[str, Tensor], names: tuple[str, str]) -> None:
    """Checks that two sets of tensors have the same names and shapes.

    Raises:
        DataError: they have not; names up to three of them.
    """
    different = sorted(a.keys() ^ b.keys()) or [name for name in a if a[name].shape != b[name].shape]
    if different:
        raise DataError(f"{names[0]} and {names[1]} are different networks: {', '.join(different[:3])} differ")
