"""Figures of utils/analyze.py: a line per recipe, and never a mean over different densities."""

import pandas as pd
from matplotlib import pyplot as plt

from tests.plot_helpers import LAYERS, one_shot, write_run
from utils.analysis.figures import draw_barriers, draw_drop, draw_overlap
from utils.analysis.recipes import recipes, with_pair_recipes, with_recipes
from utils.analysis.sources import find_sources


def lines(ax: plt.Axes) -> dict[str, list[tuple[float, float]]]:
    found = {str(line.get_label()): line for line in ax.get_lines()}
    return {
        label: [(round(float(x), 3), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata())]
        for label, line in found.items()
    }


def test_accuracy_after_pruning_is_a_line_per_recipe(tmp_path):
    """Two seeds of one prune rate, one of another, and SNIP at two densities."""
    write_run(tmp_path, "a0", [90, 80], [1, 0.5], seed=0, **{"prune_params.prune_rate": 0.5})
    write_run(tmp_path, "a1", [92, 84], [1, 0.5], seed=1, **{"prune_params.prune_rate": 0.5})
    write_run(tmp_path, "b0", [70, 60], [1, 0.8], seed=0, **{"prune_params.prune_rate": 0.2})
    for start in (0.5, 0.1):
        one_shot(tmp_path, "snip", start, 100 * start)
    sources = find_sources([str(tmp_path)])
    rows = [
        {"run": source.name, **row, "pruned_test_acc": row["final_test_acc"] - 1}
        for source in sources
        for row in pd.read_csv(source.path / "metrics" / "summary.csv").to_dict("records")
    ]
    figure = draw_drop(with_recipes(pd.DataFrame(rows), recipes(sources)))
    assert {label: found for label, found in lines(figure.axes[0]).items() if "training" in label} == {
        "IMP, prune rate 0.5, after training": [(100, 91), (50, 82)],
        "IMP, prune rate 0.2, after training": [(100, 70), (80, 60)],
        "SNIP, after training": [(50, 50), (10, 10)],
    }
    plt.close(figure)


def test_pairs_of_other_recipes_and_densities_are_lines_of_their_own(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"a{seed}", [90, 80], [1, 0.5], seed=seed, **{"prune_params.prune_rate": 0.5})
        write_run(tmp_path, f"b{seed}", [70, 60], [1, 0.8], seed=seed, **{"prune_params.prune_rate": 0.2})
    known = recipes(find_sources([str(tmp_path)]))
    masks, points = [], []
    for (a, b), iou in {("a0", "a1"): 0.2, ("b0", "b1"): 0.6, ("a0", "b0"): 0.4, ("a1", "b1"): 0.5}.items():
        for level in (0, 1):
            kept = [1.0, {"a": 0.5, "b": 0.8}[a[0]]][level], [1.0, {"a": 0.5, "b": 0.8}[b[0]]][level]
            pair = {"a": a, "b": b, "level": level}
            shown = {"iou": iou, "random_iou": 0.1, "layerwise_iou": 0.1}
            masks += [pair | shown | {"density_a": kept[0], "density_b": kept[1], "layer": n} for n in ("all", *LAYERS)]
            for alpha in (0, 1):
                errors = {"alpha": alpha, "error": 5, "loss": 1, "error_barrier": 10 * iou, "loss_barrier": iou}
                points.append(pair | errors | {"density": sum(kept) / 2})
    figure = draw_overlap(with_pair_recipes(pd.DataFrame(masks), known))
    expected = {
        "prune rate 0.5": [(100, 0.2), (50, 0.2)],
        "prune rate 0.2": [(100, 0.6), (80, 0.6)],
        "prune rate 0.2 with prune rate 0.5": [(100, 0.45), (65, 0.45)],
    }
    found = {label.partition(":")[0]: line for label, line in lines(figure.axes[0]).items() if ": masks" in label}
    assert found == expected
    assert len([line for line in figure.axes[1].get_lines() if line.get_linestyle() == "-"]) == 6
    figure = draw_barriers(with_pair_recipes(pd.DataFrame(points), known))
    assert lines(figure.axes[0]) == {label: [(x, 10 * y) for x, y in line] for label, line in expected.items()}
    plt.close("all")


def test_checkpoints_are_not_averaged(tmp_path):
    """Each pair of .pt files is a line, whatever their densities."""
    known = {name: (name, 1.0) for name in ("x", "y", "z")}
    pair = {"level": -1, "random_iou": 0.1, "layerwise_iou": 0.1}
    rows = [
        pair | {"a": a, "b": b, "iou": iou, "density_a": 0.5, "density_b": density, "layer": layer}
        for a, b, iou, density in (("x", "y", 0.3, 0.5), ("x", "z", 0.1, 0.1))
        for layer in ("all", *LAYERS)
    ]
    figure = draw_overlap(with_pair_recipes(pd.DataFrame(rows), known))
    seen = {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert seen["x with y"] == [0.3] * 3 and seen["x with z"] == [0.1] * 3
    plt.close(figure)
