"""Tickets in grids and in figures: which run waits for which, and what a legend says of what was changed."""

import json
from pathlib import Path

import pytest
import yaml

from harness_params import make_config
from tests.conftest import ROOT
from tests.plot_helpers import groups_of, write_run
from utils.errors import ConfigError, DataError
from utils.grids.grid import read_grid
from utils.grids.runner import GridRunner
from utils.plot_results import load_groups, main
from utils.plots.lines import dense_accuracy, points
from utils.run_grid import main as run_grid

CONFIG = str(ROOT / "configs" / "digits_lenet.yaml")
IMP = {"options": {"experiment_params": {"training_type": "imp"}, "prune_params": {"num_levels": 3}}}


# --- grids -----------------------------------------------------------------------------------------------------------


def write(folder: Path, **grid) -> str:
    grid = {"config": CONFIG, "base_dir": str(folder / "runs"), **grid}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return str(folder / "grid.yaml")


def branch(**ticket) -> dict:
    return {f"ticket_params.{key}": value for key, value in {"source": "imp_seed{seed}", **ticket}.items()}


def test_ablations_over_levels_and_seeds_are_one_grid(tmp_path):
    one = {"prune_params.num_levels": 1, "each": {"ticket_params.level": [1, 2, 3]}}
    runs = {"reinit": branch(weights="reinit") | one, "imp": {"prune_params.num_levels": 4}}
    grid = read_grid(write(tmp_path, seeds=[0, 7], runs=runs))
    assert [run.name for run in grid.runs][:3] == [f"reinit_{level}_seed0" for level in (1, 2, 3)]
    for run in grid.runs:
        seed = run.cfg.experiment_params.seed
        of_imp = run.name.startswith("imp")
        assert run.cfg.ticket_params.source == ("" if of_imp else f"imp_seed{seed}")
        assert run.after == ("" if of_imp else f"imp_seed{seed}")
    runner, waiting = GridRunner(grid, terminal=False), list(grid.runs)
    first = runner._next(waiting)
    assert first is not None and first.name == "imp_seed0"  # the branches before it wait
    runner.failed.append("imp_seed0")
    second = runner._next(waiting)
    assert second is not None and second.name == "imp_seed7"
    assert runner.failed == ["imp_seed0", *(f"reinit_{level}_seed0" for level in (1, 2, 3))]
    assert [run.name for run in waiting] == [f"reinit_{level}_seed7" for level in (1, 2, 3)]


WR = {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 2, "prune_params.num_levels": 4}
BAD = {
    "level": (branch(level=4), "ticket_params.level: 4 is not allowed"),
    "rewind": (branch(weights="rewind", step=50) | WR, "has no state of step 50"),
    "batch": (branch(weights="rewind") | WR | {"dataset.batch_size": 64}, "dataset.batch_size: 64 is not allowed"),
    "nowhere": (branch(source="impp_seed{seed}"), "ticket_params.source: impp_seed0: no run and no file"),
    "itself": (branch(source="b_seed0"), "its source starts, through other runs, from the run itself"),
    "final": (branch(mask="shuffle_layer", weights="final"), "ticket_params.weights: final is not allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_source_still_to_be_trained_is_checked_by_its_config(tmp_path, case):
    options, fault = BAD[case]
    with pytest.raises(ConfigError) as caught:
        read_grid(write(tmp_path, runs={"imp": WR, "b": options}))
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("run b_seed0: ") and fault in caught.value.faults[0]
    assert not (tmp_path / "runs").exists()


def test_runs_that_wait_for_each_other_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_grid(write(tmp_path, runs={"a": branch(source="b_seed0"), "b": branch(source="a_seed0")}))
    assert len(caught.value.faults) == 2


@pytest.mark.slow
def test_a_grid_of_a_run_and_its_branches(tmp_path, capsys):
    short = {"experiment_params.epochs_per_level": 2, "dataset.batch_size": 500, "optimizer.warmup_epochs": 0}
    one = {"prune_params.num_levels": 1, "each": {"ticket_params.level": [1, 2]}}
    runs = {"shuffle": branch(mask="shuffle_layer") | one, "imp": {"prune_params.num_levels": 3}}
    path = write(tmp_path, seeds=[0], jobs=2, threads=1, set=short, runs=runs)
    assert run_grid([path]) == 0
    out = capsys.readouterr().out
    assert out.index("imp_seed0: done") < out.index("shuffle_1_seed0: started")
    groups = groups_of(tmp_path / "runs")
    assert [group.label for group in groups] == ["IMP", "IMP, layers shuffled"]
    assert [list(points(group, "final_test_acc")["density"].round(2)) for group in groups] == [
        [1, 0.8, 0.64],
        [0.8, 0.64],
    ]
    assert run_grid([path]) == 0 and "3 finished before" in capsys.readouterr().out


# --- legends ---------------------------------------------------------------------------------------------------------


def write_branch(folder: Path, name: str, accuracies, densities, seed=0, source=IMP, ticket=None, **options) -> Path:
    """A run that says it started from a ticket."""
    ticket = {"level": 1, "step": -1, "mask": "same", "weights": "init", **(ticket or {}), **source}
    options |= {f"ticket_params.{key}": ticket[key] for key in ("level", "mask", "weights")}
    options["ticket_params.source"] = f"imp_{seed}"
    run = write_run(folder, name, accuracies, densities, seed, **options)
    (run / "artifacts").mkdir()
    entry = {"started": "today", "ticket": {**ticket, "density": densities[0], "first_epoch": 0}}
    (run / "artifacts" / "environment.json").write_text(json.dumps([entry]))
    return run


CHANGES = {
    "IMP, initial weights": {},
    "IMP, reinit": {"weights": "reinit"},
    "IMP, init signs": {"weights": "init_signs"},
    "IMP, layers shuffled": {"mask": "shuffle_layer"},
    "IMP, shuffled globally": {"mask": "shuffle_global"},
    "IMP, layers shuffled, reinit": {"mask": "shuffle_layer", "weights": "reinit"},
}


def test_ablations_are_lines_of_their_own_over_density_and_seeds(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"imp_{seed}", [90, 91, 80], seed=seed)
        for number, ticket in enumerate(CHANGES.values()):
            for level, density in ((0, 1.0), (1, 0.5), (2, 0.25)):
                accuracy = 60 + 10 * density + number + seed
                name = f"b{number}_{level}_{seed}"
                write_branch(tmp_path, name, [accuracy], [density], seed, ticket={**ticket, "level": level})
    groups = groups_of(tmp_path)
    assert [group.label for group in groups] == ["IMP", *CHANGES]
    for number, group in enumerate(groups[1:]):
        line = points(group, "final_test_acc")
        assert list(line["density"]) == [1, 0.5, 0.25] and list(line["seeds"]) == [2, 2, 2]
        assert list(line["mean"]) == pytest.approx([70.5 + number, 65.5 + number, 63 + number])
        assert group.one_shot
    assert list(dense_accuracy(groups)) == [90, 90]  # that of the runs alone, not of their reinitialized branches
    assert main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    assert main([str(tmp_path), "--kind", "table", "--out", str(tmp_path / "a.csv")]) == 0
    table = load_groups([str(tmp_path / "a.csv")])
    assert [group.label for group in table] == ["IMP", *CHANGES]
    assert list(dense_accuracy(table)) == [90, 90]


def test_other_kinds_of_sources_and_further_levels(tmp_path):
    snip = {"prune_params": {"num_levels": 1, "er_method": "snip", "er_init": 0.5}}
    snip = {"options": {"experiment_params": {"training_type": "imp"}, **snip}}
    write_branch(tmp_path, "a", [80], [0.5], source=snip, ticket={"mask": "shuffle_layer"})
    write_branch(tmp_path, "b", [80, 70], [0.5, 0.25], ticket={"weights": "reinit"})
    write_branch(tmp_path, "c", [80], [0.5], source={}, ticket={"weights": "final", "level": -1})
    nested = {**IMP, "ticket": {**IMP, "mask": "same", "weights": "reinit"}}
    write_branch(tmp_path, "d", [80], [0.5], source=nested, ticket={"mask": "shuffle_layer"})
    more = {"prune_params.er_method": "mag", "prune_params.er_init": 0.1}
    write_branch(tmp_path, "e", [80], [0.1], ticket={"mask": "none", "weights": "final"}, **more)
    assert {group.label for group in groups_of(tmp_path)} == {
        "SNIP, layers shuffled", "IMP, reinit, then IMP", "Checkpoint, final weights",
        "IMP, reinit, then IMP, layers shuffled", "IMP, no mask, final weights, then Magnitude",
    }  # fmt: skip


def source_with(**options) -> dict:
    """What a branch notes of a source run: all of its options."""
    nested: dict = {"prune_params": {"num_levels": 3}}
    for path, value in options.items():
        section, key = path.split(".")
        nested.setdefault(section, {})[key] = value
    cfg = make_config(nested)
    return {"options": cfg.to_dict(), "seed": cfg.experiment_params.seed, "ticket": None}


def test_branches_of_other_sources_are_other_lines(tmp_path):
    """Sources that differ in their seed or length alone are one; other options, and other files, are named."""
    reinit = {"weights": "reinit"}
    for seed in (0, 1):
        source = source_with(**{"experiment_params.seed": seed, "prune_params.num_levels": 3 + seed})
        write_branch(tmp_path, f"a{seed}", [80 + seed], [0.5], seed, source, reinit)
        source = source_with(**{"experiment_params.seed": seed, "optimizer.lr": 0.5})
        write_branch(tmp_path, f"b{seed}", [70 + seed], [0.5], seed, source, reinit)
    groups = {group.label: list(points(group, "final_test_acc")["mean"]) for group in groups_of(tmp_path)}
    assert groups == {"ticket of lr 0.1": [80.5], "ticket of lr 0.5": [70.5]}


def test_branches_of_other_files_are_other_lines(tmp_path):
    for name, digest in (("x.pt", "1" * 64), ("y.pt", "2" * 64)):
        source = {"source": f"/somewhere/{name}", "sha256_of_file": digest}
        write_branch(tmp_path, name[0], [80], [0.5], source=source, ticket={"weights": "final", "level": -1})
    assert {group.label for group in groups_of(tmp_path)} == {"ticket of x.pt 11111111", "ticket of y.pt 22222222"}


def test_branches_of_one_seed_from_sources_of_other_seeds_are_replicates(tmp_path):
    for seed in (0, 1, 2):
        source = source_with(**{"experiment_params.seed": seed})
        write_branch(tmp_path, f"b{seed}", [80 + seed], [0.5], 5, source)
    (group,) = groups_of(tmp_path)
    assert list(group.frame["seed"]) == ["5 of 0", "5 of 1", "5 of 2"]
    assert points(group, "final_test_acc")[["mean", "seeds"]].to_numpy().tolist() == [[81, 3]]
    write_branch(tmp_path, "again", [80], [0.5], 5, source)
    with pytest.raises(DataError, match="same experiment with the same seed 5 of 2"):
        groups_of(tmp_path)


def test_a_branch_that_has_not_noted_its_ticket_is_named(tmp_path):
    run = write_branch(tmp_path, "a", [80], [0.5])
    (run / "artifacts" / "environment.json").write_text("[]")
    with pytest.raises(DataError, match=r"environment\.json does not say what ticket"):
        groups_of(tmp_path)


def test_runs_of_one_seed_that_differ_in_data_seed_are_replicates(tmp_path):
    for data_seed in (-1, 0, 1, 2):
        if data_seed:
            options = {"experiment_params.data_seed": data_seed}
            write_run(tmp_path, f"run_{data_seed}", [90, 80 + data_seed], seed=0, **options)
    (group,) = groups_of(tmp_path)
    assert group.seeds == 3 and list(points(group, "final_test_acc")["seeds"]) == [3, 3]
    assert main([str(tmp_path), "--kind", "table", "--out", str(tmp_path / "t.csv")]) == 0
    assert load_groups([str(tmp_path / "t.csv")])[0].seeds == 3
    write_run(tmp_path, "again", [90, 80], seed=0, **{"experiment_params.data_seed": 0})
    with pytest.raises(DataError, match="same experiment with the same seed"):
        groups_of(tmp_path)


def test_inverted_scores_are_named(tmp_path):
    inverted = {"prune_params.invert_scores": True}
    write_run(tmp_path, "a", [90, 91])
    write_run(tmp_path, "b", [90, 51], **inverted)
    snip = {"prune_params.er_method": "snip", "prune_params.er_init": 0.5}
    write_run(tmp_path, "c", [50], [0.5], **snip, **inverted)
    lots = {"prune_params.er_method": "random", "prune_params.er_init": 0.5}
    write_run(tmp_path, "d", [50], [0.5], **lots, **inverted)
    assert {group.label for group in groups_of(tmp_path)} == {"IMP", "IMP inverted", "SNIP inverted", "Random"}
