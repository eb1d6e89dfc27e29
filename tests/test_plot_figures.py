"""The figures of utils.plot_results: what is drawn where, and how it is labelled."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot as plt

from tests.plot_helpers import LAYERS, groups_of, one_shot, write_run, write_study
from utils.plot_results import main
from utils.plots.colours import COLOURS, DENSE
from utils.plots.figures import draw_accuracy, draw_curves, draw_layers
from utils.plots.lines import layer_frame


@pytest.fixture(autouse=True)
def _no_figure_left():
    yield
    plt.close("all")


@pytest.fixture
def study(tmp_path) -> Path:
    return write_study(tmp_path)


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_figure(study):
    figure = draw_accuracy(groups_of(study))
    [ax] = figure.axes
    assert ax.get_xscale() == "log"
    left, right = ax.get_xlim()
    assert left > 100 > 10 > right, "densest left"
    assert ax.get_xlabel() == "Density (% of prunable weights kept)"
    assert ax.get_ylabel() == "Test accuracy, last epoch (%)"
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["10", "20", "50", "100"]
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["IMP", "SNIP", "Dense"]
    np.testing.assert_allclose(lines["IMP"].get_xydata(), [[100, 90], [50, 92], [25, 83]])
    assert set(lines["Dense"].get_ydata()) == {90}
    assert (lines["IMP"].get_linestyle(), lines["SNIP"].get_linestyle()) == ("-", "--")
    low, high = ax.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (80, 93)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["IMP", "SNIP", "Dense"]
    assert legend.get_title().get_text() == "mean and range\nof 2 to 3 seeds"
    assert legend.get_window_extent().x0 > ax.get_window_extent().x1, "outside the data"


def test_a_lone_point_has_its_range(tmp_path):
    for seed, accuracy in enumerate((70, 74, 71)):
        one_shot(tmp_path, "synflow", 0.1, accuracy, seed)
    [bar] = draw_accuracy(groups_of(tmp_path)).axes[0].collections
    [segment] = bar.get_segments()
    np.testing.assert_allclose(segment, [[10, 70], [10, 74]])


def test_legend_tells_of_points_with_fewer_seeds(study):
    one_shot(study, "snip", 0.05, 60)
    write_run(study, "short", [90, 91], seed=3)
    [legend] = draw_accuracy(groups_of(study)).legends
    assert legend.get_title().get_text() == "mean and range\nof 1 to 4 seeds"


def test_networks_trained_otherwise_have_a_dense_line_each(tmp_path):
    write_run(tmp_path, "a", [90, 80], **{"optimizer.lr": 0.1})
    write_run(tmp_path, "b", [70, 60], **{"optimizer.lr": 0.01})
    figure = draw_accuracy(groups_of(tmp_path))
    dense = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    own = {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    assert [(line.get_ydata()[0], line.get_label(), line.get_color()) for line in dense] == [
        (90, "Dense, lr 0.1", own["lr 0.1"]), (70, "Dense, lr 0.01", own["lr 0.01"]),
    ]  # fmt: skip
    assert legend_of(figure) == ["lr 0.1", "lr 0.01", "Dense, lr 0.1", "Dense, lr 0.01"]


def test_a_dense_line_that_several_methods_share_is_one_entry(tmp_path):
    """The first group has no dense run."""
    one_shot(tmp_path, "snip", 0.5, 80, **{"optimizer.lr": 0.1})
    for rate in (0.03, 0.01):
        for kind in ("imp", "lrr"):
            options = {"optimizer.lr": rate, "experiment_params.training_type": kind}
            write_run(tmp_path, f"{kind}{rate}", [1000 * rate, 5], **options)
    figure = draw_accuracy(groups_of(tmp_path))
    dense = [line for line in figure.axes[0].lines if line.get_color() == DENSE]
    assert [(line.get_label(), line.get_ydata()[0], line.get_linestyle()) for line in dense] == [
        ("Dense, lr 0.01", 10, ":"), ("Dense, lr 0.03", 30, "-."),
    ]  # fmt: skip
    assert [name for name in legend_of(figure) if name.startswith("Dense")] == ["Dense, lr 0.01", "Dense, lr 0.03"]


def test_ways_of_training_have_a_dense_line_each(tmp_path):
    """Grey, where several methods train that way; in the colour of the one method that does."""
    for kind in ("imp", "lrr"):
        write_run(tmp_path, kind, [90, 80], **{"experiment_params.training_type": kind})
    write_run(tmp_path, "longer", [95, 85], **{"experiment_params.epochs_per_level": 9})
    figure = draw_accuracy(groups_of(tmp_path))
    lines = {line.get_ydata()[0]: line for line in figure.axes[0].lines if line.get_linestyle() == ":"}
    assert sorted(lines) == [90, 95]
    assert [lines[90].get_label(), lines[95].get_label()] == ["Dense, E = 20 epochs", "Dense, E = 9 epochs"]
    solid = {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    assert lines[90].get_color() == DENSE
    assert lines[95].get_color() == solid["IMP, E = 9 epochs"]


def write_methods(folder: Path) -> None:
    """The nine methods of configs/grids."""
    for kind in ("imp", "wr", "lrr"):
        write_run(folder, kind, [90, 80], **{"experiment_params.training_type": kind})
    for method in ("snip", "grasp", "synflow", "random", "random_erk", "random_balanced"):
        one_shot(folder, method, 0.5, 70)


def test_nine_methods_look_different(tmp_path):
    write_methods(tmp_path)
    figure = draw_accuracy(groups_of(tmp_path))
    lines = [line for line in figure.axes[0].lines if line.get_label() != "Dense"]
    assert len(lines) == len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 9
    assert [line.get_label() for line in lines][:3] == ["IMP", "IMP + weight rewinding", "IMP + LR rewinding"]


# Linear RGB as seen with no cones of one kind (Machado, Oliveira & Fernandes 2009, severity 1).
SEEN = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def seen(colour: str, sight: str) -> np.ndarray:
    """CIELAB (D65) of a colour as someone with such sight sees it."""
    srgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(SEEN[sight] @ linear, 0, 1) / [0.95047, 1, 1.08883]
    fx, fy, fz = (np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("sight", SEEN)
def test_colours_are_told_apart_by_the_colour_blind(sight):
    """CIE76 differences; about 2 is just noticeable, and thin lines need several times as much."""
    found = [seen(colour, sight) for colour in (*COLOURS, "white")]
    assert len(COLOURS) == 9
    assert min(np.linalg.norm(a - b) for place, a in enumerate(found) for b in found[:place]) > 15


@pytest.mark.parametrize("kind", ["accuracy", "layers", "curves"])
def test_more_lines_than_colours_differ_in_dashes_or_markers(tmp_path, kind):
    for place in range(2 * len(COLOURS)):
        write_run(tmp_path, f"{place}", [90, 80], **{"optimizer.lr": 0.01 * (place + 1)})
    groups = groups_of(tmp_path, kind)
    figure = {"accuracy": draw_accuracy, "layers": draw_layers, "curves": draw_curves}[kind](groups)
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("lr")]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert len(set(looks)) == len(looks) == len(groups) == 18


@pytest.mark.parametrize("kind", ["accuracy", "layers", "curves"])
def test_many_long_names_have_room(tmp_path, kind):
    for training in ("imp", "wr", "lrr"):
        for place in range(6):
            options = {"experiment_params.training_type": training, "optimizer.lr": 0.01 * (place + 1)}
            options |= {"experiment_params.epochs_per_level": 20 + place, "optimizer.weight_decay": 0.001 * place}
            write_run(tmp_path, f"{training}{place}", [90, 80], **options)
    draw = {"accuracy": draw_accuracy, "layers": draw_layers, "curves": draw_curves}[kind]
    figure = draw(groups_of(tmp_path, kind), title="title")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= legend.y0 < legend.y1 <= figure.bbox.y1
    boxes = [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.get_xlabel()] + [legend]
    assert not any(box.overlaps(other) for place, box in enumerate(boxes) for other in boxes[:place])


def test_layers_of_one_method_at_every_level(tmp_path):
    write_run(tmp_path, "a", [90, 80], layers=[[1, 1, 1], [0.4, 0, 0.8]])
    write_run(tmp_path, "b", [90, 80], seed=1, layers=[[1, 1, 1], [0.2, 0, 1.0]])
    [group] = groups_of(tmp_path, "layers")
    table = layer_frame(group)
    assert list(table.columns) == LAYERS
    np.testing.assert_allclose(table.loc[0.4], [0.3, 0, 0.9])
    figure = draw_layers([group])
    ax = figure.axes[0]
    assert ax.get_yscale() == "log"
    [dead] = [line for line in ax.lines if line.get_marker() == "x"]
    assert dead.get_xdata() == [1] and dead.get_ydata() == ax.get_ylim()[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["fc1", "fc2", "fc3"]
    assert "no weight left" in ax.get_xlabel()
    assert figure.axes[1].get_ylabel() == "Density of the network (%)"


def test_layers_of_several_methods_at_one_density(study):
    figure = draw_layers(groups_of(study, "layers"), density=0.2)
    assert legend_of(figure) == ["IMP (25%)", "SNIP (10%)"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [25, 25, 25])
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [10, 10, 10])
    figure = draw_layers(groups_of(study, "layers"))
    assert legend_of(figure) == ["IMP (25%)", "SNIP (10%)", "SNIP (50%)"], "no density is asked for"


def test_a_run_that_lacks_layers_of_a_level_is_refused(tmp_path):
    run = write_run(tmp_path, "a", [90, 80])
    path = run / "metrics" / "layerwise_density.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + len(LAYERS)]))
    with pytest.raises(ValueError, match=r"layerwise_density\.csv: 1 of the 2 levels of summary\.csv"):
        draw_layers(groups_of(tmp_path, "layers"))


def test_layers_of_other_networks_are_refused(tmp_path):
    write_run(tmp_path, "a", [90, 80])
    other = write_run(tmp_path, "b", [90, 80], **{"model_params.model_name": "conv2"})
    path = other / "metrics" / "layerwise_density.csv"
    path.write_text(path.read_text().replace("fc1.weight", "conv1.weight"))
    with pytest.raises(ValueError, match=r"conv2.* has other layers than"):
        draw_layers(groups_of(tmp_path, "layers"))


def test_curves(study):
    figure = draw_curves(groups_of(study, "curves"), level=0)
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "Training loss (nats)", "Test loss (nats)", "Training accuracy (%)", "Test accuracy (%)",
    ]  # fmt: skip
    imp = figure.axes[2].lines[0]
    np.testing.assert_allclose(imp.get_xydata(), [[1, 51], [2, 51]])  # mean of 50 + seed; epochs count from 1
    assert legend_of(figure) == ["IMP (100%)", "SNIP (10%)", "SNIP (50%)"]
    figure = draw_curves(groups_of(study, "curves"), density=0.4)
    assert legend_of(figure) == ["IMP", "SNIP"]
    assert figure.legends[0].get_title().get_text().startswith("density 50%\nmean and range")
    np.testing.assert_allclose(figure.axes[2].lines[1].get_xydata(), [[1, 50.5], [2, 50.5]])
    figure = draw_curves(groups_of(study, "curves")[:1])
    assert len(figure.axes[0].lines) == 3, "one line per level"


def test_curves_go_through_the_evaluated_epochs(tmp_path):
    """Of four epochs of two seeds, 1 and 3 (from 0) are evaluated: test lines have two points, training lines four."""
    for seed in (0, 1):
        run = write_run(tmp_path, f"{seed}", [90], seed=seed)
        table = ["epoch,train_loss,test_loss,train_acc,test_acc,lr,seconds,images_per_second"]
        table += [f"{e},1,{f'{0.5 + e},60,{70 + e + seed}' if e % 2 else ',60,'},0.1,5,1" for e in range(4)]
        (run / "metrics" / "epochwise_metrics" / "level_0_metrics.csv").write_text("\n".join(table))
    for groups in (groups_of(tmp_path, "curves"), groups_of(tmp_path, "curves") * 2):  # by level, by method
        axes = draw_curves(groups).axes
        np.testing.assert_allclose(axes[0].lines[0].get_xydata(), [[1, 1], [2, 1], [3, 1], [4, 1]])
        np.testing.assert_allclose(axes[1].lines[0].get_xydata(), [[2, 1.5], [4, 3.5]])
        np.testing.assert_allclose(axes[3].lines[0].get_xydata(), [[2, 71.5], [4, 73.5]])
        for band in axes[3].collections:
            assert sorted({x for x, _ in band.get_paths()[0].vertices}) == [2, 4]


def test_curves_of_a_level_that_some_seeds_lack(tmp_path):
    for seed, accuracies in enumerate([[90, 91, 80], [90, 91], [90, 92, 81]]):
        write_run(tmp_path, f"{seed}", accuracies, seed=seed)
    groups = groups_of(tmp_path, "curves")
    figure = draw_curves(groups, level=2)
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), [51, 51])  # mean of 50 + seed, of 0 and 2
    assert legend_of(figure) == ["IMP (25%)"]
    assert figure.legends[0].get_title().get_text() == "method (density)\nmean and range\nof 2 seeds"
    title = draw_layers(groups, density=0.25).legends[0].get_title().get_text()
    assert title == "method (network density)\nmean of 2 seeds"
    with pytest.raises(ValueError, match=r"no level 3: it has levels 0 to 2"):
        draw_curves(groups, level=3)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> Path:
    """Twenty networks of four methods."""
    folder = tmp_path_factory.mktemp("crowd")
    for method in ("snip", "synflow", "random", "random_erk"):
        for start in (0.5, 0.2, 0.1, 0.05, 0.02):
            one_shot(folder, method, start, 70)
    return folder


@pytest.mark.parametrize("kind", ["layers", "curves"])
def test_of_many_networks_each_method_s_next_to_one_density_is_drawn(crowd, kind, tmp_path, capsys):
    out = ["--kind", kind, "--out", str(tmp_path / "f.png")]
    assert main([str(crowd), *out]) == 2
    assert capsys.readouterr().err == (
        "plot_results: 20 lines are asked for, 18 at most can be told apart: --density keeps one run of each method, "
        "the one closest to it; or name fewer runs\n"
    )
    assert main([str(crowd), "--density", "0.04", *out]) == 0
    groups = groups_of(crowd, kind)
    figure = draw_layers(groups, 0.04) if kind == "layers" else draw_curves(groups, density=0.04)
    assert legend_of(figure) == ["SNIP", "SynFlow", "Random", "Random ERK"]
    assert "density 5%" in figure.legends[0].get_title().get_text()


def test_more_lines_than_can_be_told_apart_are_refused(tmp_path, capsys):
    for place in range(19):
        write_run(tmp_path, f"{place}", [90, 80], **{"optimizer.lr": 0.01 * (place + 1)})
    for words in (
        ["accuracy"],
        ["layers", "--density", "0.5"],
        ["curves", "--density", "0.5"],
        ["curves", "--level", "1"],
    ):
        assert main([str(tmp_path), "--out", str(tmp_path / "f.png"), "--kind", *words]) == 2
        message = capsys.readouterr().err
        assert message.startswith("plot_results: 19 lines are asked for, 18 at most can be told apart: ")
        assert ("in place of --level" in message) == ("--level" in words) and message.endswith("name fewer runs\n")
    assert not (tmp_path / "f.png").exists()


@pytest.mark.parametrize("kind", ["accuracy", "layers", "curves"])
@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files(study, kind, suffix, head):
    out = study / f"f.{suffix}"
    assert main([str(study), "--kind", kind, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(head)
    assert not plt.get_fignums(), "no figure is left open"
    if suffix == "png":
        pixels = matplotlib.image.imread(out)
        assert pixels.shape[1] >= 1000 and pixels[..., :3].std() > 0.05, "not blank"


def test_methods_are_told_by_their_markers_in_curves_too(tmp_path):
    for kind in ("imp", "lrr"):
        write_run(tmp_path, kind, [90, 80], **{"experiment_params.training_type": kind})
    figure = draw_curves(groups_of(tmp_path, "curves"))
    markers = {line.get_label(): line.get_marker() for line in figure.legends[0].legend_handles}
    assert len(set(markers.values())) == 2
    for ax in figure.axes:
        assert {line.get_label(): line.get_marker() for line in ax.lines} == markers
