"""Colours, ticks and places in figures: the same for a method wherever it is drawn."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plot_helpers import groups_of, one_shot, write_run
from tests.test_plot_figures import SEEN, legend_of, seen, write_methods
from tests.test_ticket_figures import CHANGES, write_branch
from utils.plot_results import load_groups, main
from utils.plots.colours import COLOURS, DENSE, MOST_LINES, OWNERS, SHADES, method_styles
from utils.plots.figures import draw_accuracy, draw_curves, draw_layers
from utils.plots.groups import group_styles

NAMES = [*OWNERS, "Magnitude", "ERK", "IMP, reinit", "IMP, layers shuffled", "SNIP, then IMP", "IMP inverted", "My own"]


def look(style) -> tuple[str, str, str]:
    return style["color"], style["marker"], style["linestyle"]


@given(st.lists(st.sampled_from(NAMES), unique=True, min_size=1).flatmap(lambda names: st.tuples(
    st.just(names), st.permutations(names))))  # fmt: skip
def test_a_methods_own_colour_depends_on_nothing_else(both):
    names, again = both
    found = dict(zip(names, method_styles([(name, name) for name in names])))
    assert found == dict(zip(again, method_styles([(name, name) for name in again])))
    for name, style in found.items():
        if name in OWNERS:
            assert style["color"] == [*COLOURS, DENSE][OWNERS.index(name)]
    assert len({look(style) for style in found.values()}) == len(names)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["lr 0.1", "lr 0.03", "lr 1", "E 5"])), unique=True,
                min_size=1, max_size=MOST_LINES))  # fmt: skip
def test_no_two_lines_of_a_figure_look_alike(lines):
    assert len({look(style) for style in method_styles(lines)}) == len(lines)


def test_the_numbers_of_recipes_give_their_order():
    rates = ["lr 1", "lr 0.1", "lr 0.03"]
    found = [style["color"] for style in method_styles([("IMP", rate) for rate in rates])]
    assert found == [SHADES[0][1], SHADES[0][0], COLOURS[0]]


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("place", range(len(SHADES)))
def test_shades_are_told_from_each_other_and_from_white(place, sight):
    found = [seen(colour, sight) for colour in ([*COLOURS, DENSE][place], *SHADES[place], "white")]
    assert min(np.linalg.norm(a - b) for number, a in enumerate(found) for b in found[:number]) > 12


def test_a_method_looks_the_same_in_every_figure_and_order(tmp_path):
    """Also alone, and from a table."""
    write_methods(tmp_path / "all")
    for kind, draw in (("accuracy", draw_accuracy), ("layers", draw_layers), ("curves", draw_curves)):
        paths = sorted(map(str, (tmp_path / "all").iterdir()))
        drawn = []
        for chosen in (paths, paths[::-1], paths[3:5], paths[4:5] + paths[:1]):
            lines = draw(load_groups(chosen, kind)).axes[0].lines
            drawn.append({line.get_label().split(" (")[0]: (line.get_color(), line.get_marker()) for line in lines})
            drawn[-1] = {name: of for name, of in drawn[-1].items() if not name.startswith(("Dense", "_"))}
        for names in drawn[1:]:
            assert names.items() <= drawn[0].items()
        assert {colour for colour, _ in drawn[0].values()} == set(COLOURS)
    table = tmp_path / "t.csv"
    for runs in ([tmp_path / "all"], [write_run(tmp_path, "snip_then", [80, 70], **{"optimizer.lr": 0.3})]):
        assert main([*map(str, runs), "--kind", "table", "--out", str(table)]) == 0
        assert group_styles(load_groups([str(table)])) == group_styles(load_groups([*map(str, runs)]))


def test_ablations_are_shades_of_their_source(tmp_path):
    write_run(tmp_path, "imp", [90, 91, 80])
    for number, ticket in enumerate(CHANGES.values()):
        write_branch(tmp_path, f"b{number}", [60], [0.5], ticket=ticket)
    groups = groups_of(tmp_path)
    own, *others = group_styles(groups)
    assert own["color"] == COLOURS[0] and own["markerfacecolor"] == COLOURS[0]
    assert {style["color"] for style in others} == set(SHADES[0])
    assert all(style["markerfacecolor"] == "white" for style in others)
    assert len({look(style) for style in others}) == len(CHANGES)
    assert look(group_styles(groups[2:3])[0]) == look(others[1])


# --- places and ticks ------------------------------------------------------------------------------------------------


def test_methods_at_one_density_stand_side_by_side(tmp_path):
    write_run(tmp_path, "imp", [90, 80, 70, 60])
    for seed in (0, 1):
        for method, accuracy in (("snip", 50), ("synflow", 55), ("random", 52), ("random_erk", 53)):
            one_shot(tmp_path, method, 0.125, accuracy + seed, seed)
    one_shot(tmp_path, "grasp", 0.5, 60)
    figure = draw_accuracy(groups_of(tmp_path))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    x = {line.get_label(): float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1}
    assert x.pop("GraSP") == 50, "a lone point stays where it is"
    pixels = [ax.transData.transform((at, 50))[0] for at in x.values()]
    assert list(x) == ["SNIP", "SynFlow", "Random", "Random ERK"] and np.all(np.diff(pixels) > 5)
    assert np.prod(list(x.values())) ** 0.25 == pytest.approx(12.5)
    bars = [
        bar.get_segments()[0] for bar in ax.collections if len(bar.get_paths()) == 1 and hasattr(bar, "get_segments")
    ]
    assert {float(bar[0][0]) for bar in bars} >= set(x.values()), "bars stand with their points"
    assert legend_of(figure)[-1] == "Dense"
    assert figure.legends[0].get_title().get_text().endswith("equal densities: side by side")
    _, right = ax.get_xlim()
    assert right < min(x.values()) and ax.get_xticklabels()[0].get_text() == "12.5"


@pytest.mark.parametrize("sparsest", [0.9, 0.5, 0.0119, 3e-4, 5e-7])
def test_ticks_of_densities_span_the_axis(tmp_path, sparsest):
    write_run(tmp_path, "a", [90.3, 81.2], [1, sparsest])
    figure = draw_accuracy(groups_of(tmp_path))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    ticks = ax.get_xticks()
    assert (ticks[0], ticks[-1]) == (100 * sparsest, 100) and 2 <= len(ticks) <= 11
    boxes = sorted((label.get_window_extent() for label in ax.get_xticklabels()), key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert ax.get_yticks()[0] <= 81.2 and ax.get_yticks()[-1] >= 90.3


def deep(folder: Path, levels: int) -> Path:
    return write_run(folder, "deep", [90.0] * levels, [0.8**level for level in range(levels)])


@pytest.mark.parametrize("kind", ["layers", "curves"])
def test_last_levels_alone(tmp_path, kind):
    deep(tmp_path, 9)
    draw = {"layers": draw_layers, "curves": draw_curves}[kind]
    figure = draw(groups_of(tmp_path, kind), last=3)
    assert len(figure.axes[0].lines) == 3
    bar = figure.axes[-1]
    assert bar.get_ylim() == pytest.approx((100 * 0.8**8, 100 * 0.8**6), rel=0.01)
    assert len(draw(groups_of(tmp_path, kind), last=50).axes[0].lines) == 9
    words = [str(tmp_path), "--kind", kind, "--last", "2", "--out", str(tmp_path / "f.png")]
    assert main(words) == 0


@pytest.mark.parametrize(("log", "loss", "epochs"), [(None, "linear", "linear"), ("loss", "log", "linear"),
                                                    ("epochs", "linear", "log"), ("both", "log", "log")])  # fmt: skip
def test_logarithmic_axes_of_curves(tmp_path, log, loss, epochs):
    deep(tmp_path, 3)
    figure = draw_curves(groups_of(tmp_path, "curves"), log=log)
    figure.draw_without_rendering()
    panels = figure.axes[:4]
    assert [ax.get_yscale() for ax in panels] == [loss, loss, "linear", "linear"]
    assert {ax.get_xscale() for ax in panels} == {epochs}
    assert list(panels[2].get_xticks()) == [1, 2]
    words = [str(tmp_path), "--kind", "curves", "--out", str(tmp_path / "f.png")]
    assert main([*words, *(["--log", log] if log else [])]) == 0
