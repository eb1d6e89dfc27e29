"""utils.plot_results: runs into groups and tables; what is refused. Figures worked out by hand."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.plot_helpers import groups_of, one_shot, write_run, write_study
from utils.plot_results import load_groups, main, method_table, time_to_ticket
from utils.plots.figures import draw_accuracy
from utils.plots.groups import TIDY_COLUMNS, labels_of
from utils.plots.lines import dense_accuracy, points
from utils.plots.names import IGNORED
from utils.plots.runs import find_runs, read_runs


@pytest.fixture
def study(tmp_path) -> Path:
    return write_study(tmp_path)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_starting_densities_are_points_of_one_line(study):
    imp, snip = groups_of(study)
    assert [(g.label, g.seeds, g.one_shot) for g in (imp, snip)] == [("IMP", 3, False), ("SNIP", 2, True)]
    line = points(imp, "final_test_acc")
    assert line.to_dict("list") == {
        "density": [1, 0.5, 0.25], "mean": [90, 92, 83], "least": [88, 91, 80], "largest": [92, 93, 85],
        "seeds": [3, 3, 3],
    }  # fmt: skip
    line = points(snip, "max_test_acc")
    assert line.to_dict("list") == {
        "density": [0.5, 0.1], "mean": [88, 71.5], "least": [87, 71], "largest": [89, 72], "seeds": [2, 2],
    }  # fmt: skip
    assert dense_accuracy([imp, snip]).to_dict() == {0: 90, 1: 92, 2: 88}


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "IMP"),
        ({"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1}, "IMP + weight rewinding"),
        ({"experiment_params.training_type": "lrr"}, "IMP + LR rewinding"),
        ({"prune_params.prune_method": "snip"}, "Iterative pruning by SNIP"),
        ({"prune_params.er_method": "er_erk", "prune_params.er_init": 0.5}, "ERK, then IMP"),
        ({"prune_params.er_method": "synflow", "prune_params.er_init": 1.0}, "IMP"),  # nothing was pruned
    ],
)
def test_names_of_methods(tmp_path, options, label):
    write_run(tmp_path, "run", [90, 80], **options)
    assert groups_of(tmp_path)[0].label == label


def test_legend_tells_an_epoch_from_a_step(tmp_path):
    wr = {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1}
    write_run(tmp_path, "a", [90, 80], **wr)
    write_run(tmp_path, "b", [90, 80], **wr, **{"prune_params.rewind_step": 100})
    write_run(tmp_path, "c", [90, 80], **wr, **{"prune_params.rewind_step": 500, "prune_params.save_steps": [3]})
    labels = [group.label for group in groups_of(tmp_path)]
    assert labels == ["k = 1 epochs", "k = 100 optimizer steps", "k = 500 optimizer steps"]
    again = {"prune_params.rewind_step": 500, "prune_params.save_steps": [4]}
    write_run(tmp_path, "d", [90, 80], seed=1, **wr, **again)
    assert [group.seeds for group in groups_of(tmp_path)] == [1, 1, 2]
    write_run(tmp_path, "e", [90, 80])
    assert groups_of(tmp_path)[0].label == "IMP"


def test_legend_tells_what_differs_and_ignores_where_and_how_a_run_executed(tmp_path):
    write_run(tmp_path, "a", [90, 80], **{"optimizer.lr": 0.1, "experiment_params.base_dir": "x"})
    write_run(tmp_path, "b", [90, 80], seed=1, **{"optimizer.lr": 0.1, "dataset.data_root": "/elsewhere"})
    write_run(tmp_path, "c", [90, 80], **{"optimizer.lr": 0.03, "experiment_params.epochs_per_level": 5})
    assert [(g.label, g.seeds) for g in groups_of(tmp_path)] == [
        ("E = 20 epochs, lr 0.1", 2),
        ("E = 5 epochs, lr 0.03", 1),
    ]


def test_runs_of_one_yaml_on_machines_of_other_precision_are_two_lines(tmp_path):
    """Runs of older code noted nothing of what auto came to: beside them a config is taken as it stands."""
    for seed, precision in enumerate(["bf16", "fp32"]):
        run = write_run(tmp_path, f"run{seed}", [90.0], seed=seed)
        note = {"settled": {"precision": precision, "loader": "memory"}}
        (run / "artifacts").mkdir(exist_ok=True)
        (run / "artifacts" / "environment.json").write_text(json.dumps([note]))
    assert [group.label for group in groups_of(tmp_path)] == ["precision bf16", "precision fp32"]
    assert labels_of(read_runs(find_runs([str(tmp_path)]))[0]) == ["precision bf16", "precision fp32"]
    write_run(tmp_path, "older", [90.0], seed=2)
    (group,) = groups_of(tmp_path)
    assert group.seeds == 3


def test_an_empty_list_is_the_default(tmp_path):
    write_run(tmp_path, "a", [90, 80])
    write_run(tmp_path, "b", [90, 80], **{"prune_params.exclude": ["fc1", "fc2"]})
    assert [group.label for group in groups_of(tmp_path)] == ["exclude by default", "exclude fc1, fc2"]


def test_a_run_pruned_further_is_no_one_shot_run_at_its_first_level(tmp_path):
    options = {"prune_params.er_method": "snip", "prune_params.er_init": 0.5}
    write_run(tmp_path, "a", [90], [0.5], planned=3, **options)
    one_shot(tmp_path, "snip", 0.5, 80)
    groups = load_groups([str(tmp_path)], "accuracy", partial=True)
    assert {group.label: group.one_shot for group in groups} == {"SNIP, then IMP": False, "SNIP": True}


def test_legend_names_optimizers_that_differ_and_none_of_an_option_without_effect(tmp_path):
    adam = {"optimizer.optimizer_name": "adam", "optimizer.lr": 0.1}
    write_run(tmp_path, "a", [90, 80], **{"optimizer.lr": 0.1, "optimizer.beta1": 0.5})
    write_run(tmp_path, "b", [90, 80], seed=1, **{"optimizer.lr": 0.1, "optimizer.beta2": 0.5})
    write_run(tmp_path, "c", [90, 80], **adam, **{"optimizer.momentum": 0.5})
    write_run(tmp_path, "d", [90, 80], seed=1, **adam, **{"optimizer.nesterov": True})
    assert sorted((g.label, len(g.runs)) for g in groups_of(tmp_path)) == [("adam", 2), ("sgd", 2)]


def test_method_and_option_that_differ_are_both_told(tmp_path):
    write_run(tmp_path, "a", [90, 80], **{"optimizer.lr": 0.1})
    write_run(tmp_path, "b", [90, 80], **{"optimizer.lr": 0.03, "experiment_params.training_type": "lrr"})
    # prune_rate and training_type say nothing where nothing is pruned between levels.
    one_shot(tmp_path, "random", 0.5, 70, **{"optimizer.lr": 0.1, "prune_params.prune_rate": 0.7})
    assert [g.label for g in groups_of(tmp_path)] == ["IMP, lr 0.1", "IMP + LR rewinding, lr 0.03", "Random, lr 0.1"]


def test_trees_and_betons_are_data_sets_of_their_own(tmp_path, monkeypatch):
    """The root of a data set with a name is where it happens to lie; an ImageFolder's is all that tells what it is."""
    (tmp_path / "birds").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "birds")
    monkeypatch.setenv("HOME", str(tmp_path))

    def labels(name, *data) -> list[tuple[str, int]]:
        for seed, options in enumerate(data):
            chosen = {f"dataset.{key}": value for key, value in options.items()}
            write_run(tmp_path / name, f"seed{seed}", [90, 80], seed=seed, **chosen)
        return [(group.label, group.seeds) for group in groups_of(tmp_path / name)]

    tree = {"dataset_name": "ImageFolder"}
    birds, cars = tree | {"data_root": str(tmp_path / "birds")}, tree | {"data_root": str(tmp_path / "cars")}
    assert labels("trees", birds, cars) == [("data root birds", 1), ("data root cars", 1)]
    same = tree | {"data_root": str(tmp_path / "link")}, tree | {"data_root": "~/birds"}
    assert labels("links", birds, *same) == [("IMP", 3)]
    assert labels("inside", birds, tree | {"data_root": str(tmp_path / "birds/small")}) == [
        ("data root birds", 1), ("data root birds/small", 1),
    ]  # fmt: skip
    # In memory the images of a tree are cropped and normalised otherwise.
    ways = birds | {"loader": "memory"}, birds | {"loader": "torchvision"}
    assert labels("ways", *ways) == [("loader memory", 1), ("loader torchvision", 1)]
    named = {"dataset_name": "CIFAR10"}
    assert labels("loaders", named | {"loader": "memory"}, named) == [("IMP", 2)]
    assert labels("named", named | {"data_root": "/a"}, named | {"data_root": "/b"}) == [("IMP", 2)]

    ffcv = named | {"loader": "ffcv", "val_beton": "/b/val.beton"}
    first, second = ffcv | {"train_beton": "/b/birds.beton"}, ffcv | {"train_beton": "/b/cars.beton"}
    assert labels("betons", first, second) == [("train beton birds.beton", 1), ("train beton cars.beton", 1)]
    assert labels("roots", first, first | {"data_root": "/elsewhere"}) == [("IMP", 2)]
    folder = tree | {"loader": "ffcv"}
    assert labels("unnamed", folder | birds, folder | cars) == [("data root birds", 1), ("data root cars", 1)]
    found = {"dataset_name": "ImageNet", "loader": "ffcv"}
    assert labels("found", found, found | {"train_beton": "/b/half.beton"}) == [
        ("IMP", 1),
        ("train beton half.beton", 1),
    ]


def test_networks_pruned_once_are_apart_where_density_is_no_axis(study):
    assert [g.label for g in groups_of(study, "layers")] == ["IMP", "SNIP", "SNIP"]


@pytest.mark.parametrize("kind", ["accuracy", "layers"])
def test_starting_densities_of_runs_pruned_further_are_lines_of_their_own(tmp_path, kind):
    for start in (0.5, 0.3):
        options = {"prune_params.er_method": "snip", "prune_params.er_init": start}
        for seed in (0, 1):
            densities = [start, start / 2]
            write_run(tmp_path, f"{start}_{seed}", [80, 70], densities, seed, **options)
    one_shot(tmp_path, "snip", 0.1, 60)
    groups = groups_of(tmp_path, kind)
    assert [(g.label, g.seeds) for g in groups] == [
        ("SNIP", 1), ("SNIP, then IMP, er init 0.3", 2), ("SNIP, then IMP, er init 0.5", 2),
    ]  # fmt: skip
    assert points(groups[2], "final_test_acc")["density"].to_list() == [0.5, 0.25]


@pytest.mark.parametrize("kind", ["accuracy", "layers"])
def test_an_er_init_of_one_is_no_pruning_at_initialization(tmp_path, kind):
    write_run(tmp_path, "a", [90, 80])
    write_run(tmp_path, "b", [90, 80], seed=1, **{"prune_params.er_method": "snip", "prune_params.er_init": 1.0})
    assert [(g.label, g.seeds) for g in groups_of(tmp_path, kind)] == [("IMP", 2)]


def test_runs_of_one_name_in_several_folders_are_several_runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}", "exp", [90, 80, 95], [1, 0.5, 0.05], seed=seed)
    groups = load_groups([str(tmp_path / "seed0"), str(tmp_path / "seed1")])
    table = method_table(groups).iloc[0]
    assert table["time to ticket (s)"] == "30 ± 0 (2 of 2 runs)" and table["total (s)"] == "30 ± 0"


def test_whatever_is_free_on_resume_makes_no_other_method(tmp_path):
    from utils.runs.directory import FREE_ON_RESUME

    assert FREE_ON_RESUME <= IGNORED
    write_run(tmp_path, "a", [90, 80], **{"dist_params.threads": 1})
    write_run(tmp_path, "b", [90, 80], seed=1, **{"dist_params.threads": 2})
    assert [(g.label, g.seeds) for g in groups_of(tmp_path)] == [("IMP", 2)]


def test_a_run_given_twice_counts_once(study):
    assert len(find_runs([str(study), str(study / "imp_0"), str(study / "." / "imp_0")])) == 7


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(capsys, *words) -> str:
    assert main([*map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("plot_results: ")
    return lines[0]


def test_missing_and_unfinished_runs(tmp_path, capsys):
    out = tmp_path / "f.png"
    assert "none: no such directory" in refused(capsys, tmp_path / "none", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a directory of runs" in refused(capsys, tmp_path / "empty", "--out", out)
    run = write_run(tmp_path, "half", [90, 80], planned=12)
    assert "half: unfinished: 2 of 12 levels exist; use --partial to include them" in refused(capsys, run, "--out", out)
    assert main([str(run), "--partial", "--out", str(out)]) == 0
    other = write_run(tmp_path, "whole", [90, 80], seed=1)
    (run / "metrics" / "summary.csv").unlink()
    assert "half: unfinished: 0 of 12 levels exist" in refused(capsys, run, "--partial", "--out", out)
    assert main([str(run), str(other), "--partial", "--out", str(out)]) == 0
    assert capsys.readouterr().err == f"plot_results: note: left out: {run}: unfinished: 0 of 12 levels exist\n"


def test_unfit_runs_among_many_are_left_out_with_a_note(tmp_path, capsys):
    """Unfinished, damaged, of another data set; a damaged table of layers counts only where layers are drawn."""
    for seed in (0, 1):
        write_run(tmp_path, f"good_{seed}", [90, 80], seed=seed)
    half = write_run(tmp_path, "half", [90, 80], seed=2, planned=12)
    words = write_run(tmp_path, "words", [90, 80], seed=3)
    change(words / "metrics" / "summary.csv", ",90,", ",high,")
    other = write_run(tmp_path, "other", [90, 80], seed=4, **{"dataset.dataset_name": "MNIST"})
    twice = write_run(tmp_path, "twice", [90, 80], seed=5)
    change(twice / "metrics" / "layerwise_density.csv", "fc3", "fc2")
    head = "plot_results: note: left out: "
    expected = [
        f"{head}{half}: unfinished: 2 of 12 levels exist; use --partial to include them",
        f"{head}{words / 'metrics' / 'summary.csv'}: column final_test_acc does not hold numbers only",
        f"{head}{other}: its data set is MNIST, not Digits",
    ]
    for kind, more in (
        ("accuracy", []),
        ("curves", []),
        ("layers", [f"{head}{twice}/metrics/layerwise_density.csv: "]),
    ):
        out = tmp_path / f"{kind}.png"
        assert main([str(tmp_path), "--kind", kind, "--out", str(out)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines[:3] == expected and len(lines) == 3 + len(more)
        assert all(line.startswith(start) for line, start in zip(lines[3:], more))
        assert out.exists()
    assert [group.seeds for group in groups_of(tmp_path)] == [3]
    capsys.readouterr()
    assert "unfinished" in refused(capsys, half, "--out", tmp_path / "none.png")


def test_damaged_runs(tmp_path, capsys):
    run = write_run(tmp_path, "a", [90, 80])
    summary = run / "metrics" / "summary.csv"
    whole = summary.read_text()
    summary.write_text(whole.replace("final_test_acc", "accuracy"))
    assert "summary.csv: column final_test_acc missing" in refused(capsys, run, "--out", tmp_path / "f.png")
    first, second, third = whole.splitlines()
    summary.write_text("\n".join([first, third, second]))
    assert "does not hold each level once: 1, 0" in refused(capsys, run, "--out", tmp_path / "f.png")
    (run / "expt_config.yaml").write_text("optimizer: {lrr: 1}")
    assert "unknown option" in refused(capsys, run, "--out", tmp_path / "f.png")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_damaged_csvs_are_named_in_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "f.png"]
    run = write_run(tmp_path, "words", [90, 80])
    change(run / "metrics" / "summary.csv", ",90,", ",high,")
    assert "summary.csv: column final_test_acc does not hold numbers only" in refused(capsys, run, *out)
    run = write_run(tmp_path, "twice", [90, 80])
    change(run / "metrics" / "layerwise_density.csv", "fc3", "fc2")
    assert "density.csv: a layer is listed twice in one level" in refused(capsys, run, "--kind", "layers", *out)
    run = write_run(tmp_path, "dead", [90], layers=[[0, 0, 0]])
    assert "no layer to draw" in refused(capsys, run, "--kind", "layers", *out)
    run = write_run(tmp_path, "gone", [90])
    (run / "metrics" / "epochwise_metrics" / "level_0_metrics.csv").unlink()
    assert "level_0_metrics.csv: no such file" in refused(capsys, run, "--kind", "curves", *out)
    table = tmp_path / "t.csv"
    table.write_text(",".join(TIDY_COLUMNS) + "\n")
    assert "t.csv: no rows" in refused(capsys, table, *out)
    assert not (tmp_path / "f.png").exists()


def test_a_saved_config_is_named_as_the_run_s_own(tmp_path, capsys):
    run = write_run(tmp_path, "a", [90])
    config = run / "expt_config.yaml"
    for text, fault in (
        ("just text", "is not a mapping"),
        ("a: 1\na: 2", "line 2: a is given twice"),
        ("optimizer: {lr: -1}", "optimizer.lr: -1 is not allowed"),
    ):
        config.write_text(text)
        message = refused(capsys, run, "--out", tmp_path / "f.png")
        assert message.startswith(f"plot_results: {run}: expt_config.yaml: {fault}")


def test_tables_may_have_more_columns(tmp_path):
    run = write_run(tmp_path, "a", [90, 80])
    for path in (run / "metrics").rglob("*.csv"):
        pd.read_csv(path).assign(newer="x").to_csv(path, index=False)
    for kind in ("accuracy", "layers", "curves"):
        assert main([str(run), "--kind", kind, "--out", str(tmp_path / "f.png")]) == 0


def test_a_figure_that_cannot_be_written(study, capsys):
    title = r"$\no_such_symbol$"
    assert "f.png: cannot be written: " in refused(capsys, study, "--title", title, "--out", study / "f.png")
    (study / "folder.png").mkdir()
    assert "folder.png: cannot be written: " in refused(capsys, study, "--out", study / "folder.png")


def test_runs_that_do_not_go_together(tmp_path, capsys):
    a = write_run(tmp_path, "a", [90, 80])
    b = write_run(tmp_path, "b", [90, 80], **{"dataset.dataset_name": "MNIST"})
    message = refused(capsys, a, b, "--out", tmp_path / "f.png")
    assert "different data sets" in message and "Digits" in message and "MNIST" in message
    again = write_run(tmp_path, "again", [90, 80])
    assert "same experiment with the same seed 0" in refused(capsys, a, again, "--out", tmp_path / "f.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out: a file to write is expected"),
        (["--out", "f.doc"], "--out: f.doc: ends in none of .png, .pdf"),
        (["--out", "no/such/f.png"], "no/such: no such directory"),
        (["--kind", "table", "--out", "f.png"], "ends in none of .csv"),
        (["--out", "f.png", "--ylim", "0", "nan"], "--ylim: 0 nan is not allowed: finite numbers"),
        (["--out", "f.png", "--level", "2"], "--level: only with --kind curves (it is accuracy)"),
        (["--out", "f.png", "--kind", "layers", "--ylim", "0", "1"], "--ylim: only with --kind accuracy"),
        (["--out", "f.png", "--kind", "layers", "--density", "5"], "--density: 5 is not allowed"),
        (["--out", "f.png", "--kind", "curves", "--level", "1", "--density", "0.5"], "--level: not with --density"),
        (["--out", "f.png", "--last", "2"], "--last: only with --kind layers or curves (it is accuracy)"),
        (["--out", "f.png", "--kind", "curves", "--last", "0"], "--last: 0 is not allowed: at least 1"),
        (["--out", "f.png", "--kind", "curves", "--last", "2", "--level", "1"], "--last: not with --level"),
        (["--out", "f.png", "--kind", "layers", "--log", "loss"], "--log: only with --kind curves (it is layers)"),
        (
            ["snip_0.1_0", "--out", "f.png", "--kind", "curves", "--last", "2"],
            "--last: name the runs of one method; these are of several: IMP, SNIP",
        ),
        (["--out", "f.png", "--kind", "curves", "--level", "9"], "imp_0: no level 9: it has levels 0 to 2"),
    ],
)
def test_bad_command_lines(study, capsys, monkeypatch, words, message):
    monkeypatch.chdir(study)
    assert message in refused(capsys, "imp_0", *words)
    assert not list(study.glob("f.*"))


# --- points of fewer seeds -------------------------------------------------------------------------------------------


def note_on_seeds(capsys, *words) -> str:
    """The one note on stderr, without its head; "" if there is none."""
    assert main([*map(str, words)]) == 0
    message = capsys.readouterr().err
    head = "plot_results: note: points with fewer seeds than others of their method: "
    assert message == "" or (message.startswith(head) and message.count("\n") == 1)
    return message.removeprefix(head).strip()


@pytest.mark.parametrize("kind", ["accuracy", "table"])
def test_points_that_some_seeds_lack_are_told(tmp_path, capsys, kind):
    out = ["--kind", kind, "--out", tmp_path / ("f.png" if kind == "accuracy" else "f.csv")]
    study = write_study(tmp_path / "study")
    assert note_on_seeds(capsys, study, *out) == "", "methods may have other numbers of seeds"
    for start in (0.5, 0.1):
        one_shot(study, "snip", start, 80, seed=2)
    one_shot(study, "snip", 0.05, 60)
    assert note_on_seeds(capsys, study, *out) == "SNIP at 5% (1 of 3)"
    write_run(study, "short", [90, 91], seed=3)
    assert note_on_seeds(capsys, study, *out) == "IMP at 25% (3 of 4); SNIP at 5% (1 of 3)"
    write_run(study, "unfinished", [90], seed=4, planned=3)
    assert note_on_seeds(capsys, study, "--partial", *out) == (
        "IMP at 50% (4 of 5); IMP at 25% (3 of 5); SNIP at 5% (1 of 3)"
    )
    if kind == "table":
        assert (
            note_on_seeds(capsys, out[-1], "--kind", "table")
            == "IMP at 50% (4 of 5); IMP at 25% (3 of 5); SNIP at 5% (1 of 3)"
        )


@pytest.mark.parametrize("kind", ["layers", "curves"])
def test_levels_that_some_seeds_lack_are_drawn_of_the_others_and_told(tmp_path, capsys, kind):
    """Notes name only the levels that are drawn."""
    folder, out = tmp_path / "runs", ["--kind", kind, "--out", tmp_path / "f.png"]
    for seed, accuracies in enumerate([[90, 91, 80], [90, 91, 80], [90, 92]]):
        write_run(folder, f"imp_{seed}", accuracies, seed=seed)
    write_run(folder, "imp_3", [90], seed=3, planned=3)
    words = [folder, "--partial", *out]
    assert note_on_seeds(capsys, *words) == "IMP at 50% (3 of 4); IMP at 25% (2 of 4)"
    assert note_on_seeds(capsys, *words, "--density", 0.25) == "IMP at 25% (2 of 4)"
    assert note_on_seeds(capsys, *words, "--density", 1) == ""
    # Without --partial, seeds of a different number of levels.
    assert note_on_seeds(capsys, *(folder / f"imp_{seed}" for seed in (0, 1, 2)), *out) == "IMP at 25% (2 of 3)"
    # Each starting density is a group of its own here; seeds are still those of the method.
    one_shot(folder, "snip", 0.25, 60)
    for seed in (0, 1):
        one_shot(folder, "snip", 0.5, 80, seed)
    assert note_on_seeds(capsys, *words, "--density", 0.25) == "IMP at 25% (2 of 4); SNIP at 25% (1 of 2)"
    assert note_on_seeds(capsys, *words, "--density", 0.5) == "IMP at 50% (3 of 4)"


# --- tables ----------------------------------------------------------------------------------------------------------


def ladder(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["density", "final_test_acc", "seconds"])


def test_time_to_ticket():
    levels = [
        (1.0, 90.0, 10.0),
        (0.5, 95.0, 20.0),
        (0.1, 95.0, 30.0),
        (0.09, 89.9, 40.0),
        (0.08, 90.0, 50.0),
        (0.05, 91.0, 60.0),
    ]
    assert time_to_ticket(ladder(*levels)) == 150.0  # 10% is not below 10%; equal to dense is enough
    assert time_to_ticket(ladder(*levels), density=0.6) == 30.0
    assert time_to_ticket(ladder(*levels), dense_accuracy=90.5) == 210.0
    assert time_to_ticket(ladder(*levels), dense_accuracy=99.0) is None
    with pytest.raises(ValueError, match="level 0 has density"):
        time_to_ticket(ladder(*levels[1:]))


def test_the_table_fits_a_terminal_and_says_whose_dense_networks_it_compares_with(study, capsys):
    write_run(study, "long", [90, 91], **{
        "optimizer.lr": 0.03, "experiment_params.training_type": "lrr", "experiment_params.epochs_per_level": 77,
        "optimizer.weight_decay": 0.0123,
    })  # fmt: skip
    assert main([str(study), "--kind", "table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    assert text.endswith("SNIP: compared with the dense networks of IMP, by seed")
    assert "IMP + LR rewinding, E = 77 epochs, lr 0.03, weight decay 0.0123" in [g.label for g in groups_of(study)]
    assert main([*(str(study / f"snip_0.5_{seed}") for seed in (0, 1)), "--kind", "table"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("SNIP: no dense network to compare with\n") and "0 of" not in out


def test_a_very_sparse_network_is_not_at_density_zero(tmp_path, capsys):
    write_run(tmp_path, "a", [90, 91], [1, 5e-7])
    [row] = method_table(groups_of(tmp_path)).to_dict("records")
    assert row["lowest density (%)"] == "5e-05"
    assert row["lowest density >= dense acc. (%)"] == "0.000050 (1 of 1)"
    figure = draw_accuracy(groups_of(tmp_path))
    figure.draw_without_rendering()
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels[0] == "5e-05" and labels[-1] == "100" and "0" not in labels
    assert main([str(tmp_path), "--kind", "table", "--out", str(tmp_path / "t.csv")]) == 0
    assert pd.read_csv(tmp_path / "t.csv")["density"].tolist() == [1, 5e-7]
    capsys.readouterr()


def test_a_tie_with_the_mean_of_dense_networks_is_a_tie(tmp_path):
    accuracy = 100 * 25 / 360
    assert pd.Series([accuracy] * 3).mean() > accuracy, "by its last bit"
    for kind in ("imp", "wr", "lrr"):
        options = {"experiment_params.training_type": kind, "prune_params.rewind_epoch": int(kind == "wr")}
        write_run(tmp_path, kind, [accuracy, accuracy], [1, 0.05], **options)
    for _, method in method_table(groups_of(tmp_path)).iterrows():
        assert (
            method["lowest density >= dense acc. (%)"] == "5.0 (1 of 1)"
            and method["time to ticket (s)"] == "20 (1 of 1 runs)"
        )


def test_table_of_methods(study, capsys):
    """SNIP has no dense network of its own: it is measured against that of the same training and seed."""
    one_shot(study, "synflow", 0.05, 90, seed=0)
    one_shot(study, "synflow", 0.05, 91, seed=1)
    table = method_table(groups_of(study), density=0.3).set_index("method")
    assert table.loc["IMP", "dense acc. (%)"] == "90.00 ± 2.00"
    assert table.loc["IMP", "lowest density >= dense acc. (%)"] == "50.0 ± 0.0 (3 of 3)"
    assert table.loc["IMP", "time to ticket (s)"] == "- (0 of 3 runs)"
    assert table.loc["SynFlow", "time to ticket (s)"] == "10 (1 of 2 runs)"
    assert table.loc["SNIP", "acc. there (%)"] == "70.50 ± 0.71"
    assert main([str(study), "--kind", "table"]) == 0
    assert "time to ticket" in capsys.readouterr().out


def test_a_table_of_seeds_with_unequal_levels(tmp_path):
    """An average is over one density, and says of how many seeds it is."""
    write_run(tmp_path, "a", [90, 91, 70, 60])
    write_run(tmp_path, "b", [92, 90, 74], seed=1)
    [row] = method_table(groups_of(tmp_path)).to_dict("records")
    assert (row["lowest density (%)"], row["acc. there (%)"]) == ("25", "72.00 ± 2.83")
    assert row["lowest density >= dense acc. (%)"] == "75.0 ± 35.4 (2 of 2)"  # level 0 is as good as itself

    # Measured against those: one seed of three is good enough, and the seeds share one density only.
    for seed, accuracy in enumerate([95, 80]):
        one_shot(tmp_path, "snip", 0.2, accuracy, seed=seed)
    one_shot(tmp_path, "snip", 0.1, 50)
    for seed, start in enumerate([0.2, 0.1]):
        one_shot(tmp_path, "synflow", start, 80, seed=seed)
    _, snip, synflow = method_table(groups_of(tmp_path)).to_dict("records")
    assert (snip["lowest density (%)"], snip["acc. there (%)"]) == ("20", "87.50 ± 10.61")
    assert snip["lowest density >= dense acc. (%)"] == "20.0 (1 of 2)"
    assert (synflow["lowest density (%)"], synflow["acc. there (%)"]) == ("-", "-")
    assert synflow["lowest density >= dense acc. (%)"] == "- (0 of 2)"


def test_a_table_read_back_draws_the_same_lines(study, tmp_path_factory, capsys):
    """Also of the dense networks: those trained otherwise are not averaged with these."""
    for kind in ("imp", "lrr"):
        options = {"experiment_params.training_type": kind, "optimizer.lr": 0.01}
        write_run(study, f"{kind}_slow", [100 * 2 / 3, 70, 60], **options)
    path = tmp_path_factory.mktemp("table") / "t.csv"
    assert main([str(study), "--kind", "table", "--out", str(path)]) == 0
    before, after = groups_of(study), load_groups([str(path)])
    assert [g.label for g in after] == [g.label for g in before]
    pd.testing.assert_frame_equal(method_table(after), method_table(before))
    for old, new in zip(before, after):
        assert new.one_shot == old.one_shot
        pd.testing.assert_frame_equal(points(old, "final_test_acc"), points(new, "final_test_acc"), check_dtype=False)
        alike = [[g for g in groups if g.training == one.training] for groups, one in ((before, old), (after, new))]
        assert len(alike[0]) == len(alike[1])
        pd.testing.assert_series_equal(*map(dense_accuracy, alike))
    capsys.readouterr()
    assert main([str(path), "--kind", "table"]) == 0
    assert "SNIP" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a table holds no layers"):
        load_groups([str(path)], "layers")
    with pytest.raises(ValueError, match="a table goes alone"):
        load_groups([str(path), str(study)])


def test_a_run_that_cannot_be_looked_at_is_one_line(capsys):
    assert main(["x" * 300, "--out", "figure.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot_results: ") and "File name too long" in line


# --- validation images -----------------------------------------------------------------------------------------------


@pytest.fixture
def validated(tmp_path) -> Path:
    """Three seeds: as accurate as dense down to 50% at the best validation epoch, at no density at the last epoch."""
    (tmp_path / "runs").mkdir()
    for seed in range(3):
        best = [90 + seed, 91 + seed, 80 + seed]
        options = {"dataset.validation_images": 100, "prune_params.prune_rate": 0.5}
        write_run(tmp_path / "runs", f"imp_{seed}", [95, 94, 70], seed=seed, best_val=best, **options)
    return tmp_path / "runs"


def test_accuracy_at_the_best_validation_epoch(validated, tmp_path, capsys):
    """From the runs, and from the table that holds all of their levels."""
    table = tmp_path / "table.csv"
    words = ["--kind", "table", "--metric", "best_val"]
    assert main([str(validated), *words, "--out", str(table)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("acc.: test accuracy, best validation epoch of each level\n")
    assert "91.00 ± 1.00" in printed and "50.0 ± 0.0 (3 of 3)" in printed
    assert main([str(table), *words]) == 0
    assert capsys.readouterr().out == printed
    assert list(pd.read_csv(table)) == [*TIDY_COLUMNS, "best_val_test_acc", "pruning"]
    assert main([str(validated), "--kind", "table"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("acc.: test accuracy, last epoch of each level\n") and "95.00 ± 0.00" in printed
    [group] = groups_of(validated)
    assert points(group, "best_val_test_acc")["mean"].tolist() == [91, 92, 81]
    [ax] = draw_accuracy([group], "best_val").axes
    assert ax.get_ylabel() == "Test accuracy, best validation epoch (%)"
    assert list(ax.lines[0].get_ydata()) == [91, 92, 81]
    assert main([str(validated), "--metric", "best_val", "--out", str(tmp_path / "f.png")]) == 0


def test_runs_without_validation_images_have_no_best_validation_epoch(validated, tmp_path, capsys):
    other = write_run(tmp_path, "other", [90, 80])
    for words in (["--out", tmp_path / "f.png"], ["--kind", "table"]):
        message = refused(capsys, validated, other, "--metric", "best_val", *words)
        assert message.endswith(
            "other: no best_val_test_acc: --metric best_val needs runs with dataset.validation_images"
        )
    assert main([str(validated), str(other), "--kind", "table", "--out", str(tmp_path / "t.csv")]) == 0
    capsys.readouterr()
    assert "other: no best_val_test_acc" in refused(
        capsys, tmp_path / "t.csv", "--kind", "table", "--metric", "best_val"
    )
