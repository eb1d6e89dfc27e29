"""utils.show: the table of runs, whatever state they are in, and the options in which two differ."""

import csv
import io
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_params import dump_yaml, make_config
from tests.plot_helpers import write_run
from tests.traps import SHORT, StopAt
from utils.overview.rows import RunRow, find_all_runs, read_row
from utils.overview.table import table_text
from utils.show import main

ENDLESS = {**SHORT, "experiment_params.epochs_per_level": 100000}


def shown(capsys, *words) -> list[list[str]]:
    """The words of each line that is printed."""
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return [line.split() for line in out.out.splitlines()]


# --- real runs -------------------------------------------------------------------------------------------------------


def test_states_of_real_runs(forks, capsys):
    """One of each state, with the figures of its CSVs; the faults are in the file of --csv."""
    folder, lrr = forks.folder, {**SHORT, "experiment_params.training_type": "lrr"}
    done = forks("done", **lrr)
    forks("stopped", status=143, trap=StopAt(8), **SHORT)
    hot = {**SHORT, "optimizer.lr": 1e30, "optimizer.warmup_epochs": 0}
    failed = forks("failed", status=1, **hot)
    killed = forks.start("killed", **ENDLESS)
    running = forks.start("running", **ENDLESS)
    for run in (killed, running):
        run.wait_for_rows(1)
    killed.kill(signal.SIGKILL)
    killed.finish(None)
    shutil.copytree(done.path, folder / "broken")
    (folder / "broken" / "metrics" / "summary.csv").write_text("level,density\n0,1\n")
    try:
        assert main([str(folder), "--csv", str(folder / "table.csv")]) == 0
    finally:
        running.kill(signal.SIGKILL)
        running.finish(None)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "6 runs: 1 running, 2 stopped, 1 finished, 1 failed, 1 damaged"
    table = {Path(row["folder"]).name: row for row in csv.DictReader(io.StringIO((folder / "table.csv").read_text()))}
    states = {name: row["state"] for name, row in table.items()}
    assert states == {
        "broken": "damaged", "done": "finished", "failed": "failed", "killed": "stopped", "running": "running",
        "stopped": "stopped",
    }  # fmt: skip
    summary, row = done.csv("summary"), table["done"]
    assert (row["levels"], row["num_levels"], row["method"]) == ("2", "2", "IMP + LR rewinding")
    assert float(row["density"]) == summary["density"].iloc[-1]
    assert float(row["last_test_acc"]) == summary["final_test_acc"].iloc[-1]
    assert float(row["best_test_acc"]) == summary["max_test_acc"].max()
    assert float(row["seconds_left"]) == 0
    assert table["failed"]["fault"] == failed.last_line.removeprefix("harness: ")
    assert "columns" in table["broken"]["fault"] and table["broken"]["method"] == ""
    assert float(table["running"]["seconds_left"]) > 0 and float(table["running"]["last_test_acc"]) > 0
    assert table["stopped"]["levels"] == "1" and float(table["stopped"]["seconds_left"]) > 0


# --- folders and damage ----------------------------------------------------------------------------------------------


def test_folders_of_grids_are_walked(tmp_path, capsys, monkeypatch):
    """All below a folder, each run once, nothing hidden and nothing in a run; links are followed, circles too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    base = tmp_path / "experiments"
    for place in ("a", "grid/imp_seed0", "grid/deep/x", ".hidden/b"):
        write_run((base / place).parent, Path(place).name, [90, 91])
    write_run(base / "a" / "checkpoints", "copy", [90])
    write_run(tmp_path / "disk", "far", [80])
    (base / "link").symlink_to(tmp_path / "disk")
    (base / "grid" / "circle").symlink_to(base)
    names = [line[-1] for line in shown(capsys)[1:-1]]
    assert names == [f"experiments/{place}" for place in ("a", "grid/deep/x", "grid/imp_seed0", "link/far")]
    assert [line[-1] for line in shown(capsys, "a", base / "a", "experiments/grid/deep/")[1:-1]] == [
        "experiments/a", "experiments/grid/deep/x",
    ]  # fmt: skip


DAMAGES = {
    "no config": lambda run: (run / "expt_config.yaml").unlink(),
    "an empty config": lambda run: (run / "expt_config.yaml").write_text(""),
    "a folder as config": lambda run: ((run / "expt_config.yaml").unlink(), (run / "expt_config.yaml").mkdir()),
    "no YAML": lambda run: (run / "expt_config.yaml").write_text("a: [" * 5000),
    "bytes": lambda run: (run / "expt_config.yaml").write_bytes(b"\xff\x00\xfe"),
    "an option of newer code": lambda run: (run / "expt_config.yaml").write_text("optimizer: {rho: 1}"),
    "an empty summary": lambda run: (run / "metrics" / "summary.csv").write_text(""),
    "half a row": lambda run: (run / "metrics" / "summary.csv").write_text(
        (run / "metrics" / "summary.csv").read_text()[:-20]
    ),
    "words": lambda run: (run / "metrics" / "summary.csv").write_text(
        (run / "metrics" / "summary.csv").read_text().replace("91", "many")
    ),
    "no ticket": lambda run: (run / "expt_config.yaml").write_text(
        dump_yaml(make_config({"ticket_params": {"source": "x"}, "prune_params": {"num_levels": 2}}))
    ),
    "a ticket of other hands": lambda run: (
        (run / "expt_config.yaml").write_text(dump_yaml(make_config({"ticket_params": {"source": "x"}}))),
        (run / "artifacts" / "environment.json").write_text(
            json.dumps([{"ticket": {"level": 1, "step": 0, "mask": "?", "weights": "?", "options": 3}}])
        ),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_a_row(damage, tmp_path, capsys):
    run = write_run(tmp_path, "bad", [90, 91])
    for folder in ("artifacts", "checkpoints"):
        (run / folder).mkdir()
    write_run(tmp_path, "good", [90, 91])
    DAMAGES[damage](run)
    _, bad, good, last = shown(capsys, tmp_path)
    assert bad[0] == "damaged" and bad[-1].endswith("/bad") and good[0] == "finished"
    assert last == ["2", "runs:", "1", "finished,", "1", "damaged"]
    assert read_row(run).fault


def test_damage_of_what_only_notes_a_start_is_none(tmp_path, capsys):
    run = write_run(tmp_path, "a", [90, 91], planned=3)
    (run / "artifacts").mkdir()
    for text in ("", "{", "[]", "[3]", '{"failed": "x"}', '[{"failed": null}]'):
        (run / "artifacts" / "environment.json").write_text(text)
        assert shown(capsys, tmp_path)[1][0] == "stopped"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["nope"], "RUN: nope: no run in experiments; did you mean note?"),
        (["--cvs=x.csv"], "--cvs: unknown option: --csv FILE.csv is the only one (see --help)"),
        (["--csv"], "--csv: '' is not allowed: the name of a file that ends in .csv"),
        (["diff", "note"], "diff: two runs are expected, not 1: python -m utils.show diff A B"),
        (["diff", "note", "nite"], "diff: nite: no run in experiments; did you mean note?"),
    ],
)
def test_faults(words, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0 and capsys.readouterr().out == "no runs in experiments\n"
    write_run(tmp_path / "experiments", "note", [90])
    assert main(words) == 2
    assert capsys.readouterr().err == f"show: {fault}\n"


# --- the table -------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1, max_size=80)
ROWS = st.builds(
    RunRow, TEXT.map(Path), st.sampled_from(["running", "stopped", "finished", "failed", "damaged"]),
    st.integers(0, 999), st.integers(0, 999), st.floats(0, 1), st.floats(0, 100), st.floats(0, 100), TEXT,
    st.sampled_from([math.nan, 0.0, 59.7, 1e6]),
)  # fmt: skip


@given(rows=st.lists(ROWS, min_size=1, max_size=5), width=st.integers(20, 120))
def test_no_line_is_wider_than_the_terminal(rows, width):
    lines = table_text(rows, width).splitlines()
    assert len(lines) == len(rows) + 2
    assert max(map(len, lines)) <= width
    for line, row in zip(lines[1:], rows):
        assert line.startswith(row.state)
        if width >= 60:  # the end of its folder is there
            assert line[-1] == str(row.path)[-1]


ROW = RunRow(Path("experiments/a_grid_with_a_long_name/imp_seed0"), "running", 3, 16, 0.512, 91.234, 92.5,
             "IMP + weight rewinding", 3725.2)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (100, """\
state    level  density   last   best  method            time left  folder
running   3/16    0.512  91.23  92.50  IMP + weight re…    1:02:05  …grid_with_a_long_name/imp_seed0"""),
        (60, """\
state    level   last  method        time left  folder
running   3/16  91.23  IMP + weigh…    1:02:05  …e/imp_seed0"""),
    ],
    ids=["100", "60"],
)  # fmt: skip
def test_the_table_by_hand(width, text):
    first, second, _ = table_text([ROW], width).splitlines()
    assert [first, second] == text.splitlines()


def test_the_width_is_that_of_the_terminal(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "a" * 90, [90])
    for columns, most in [("70", 70), ("200", 100), ("0", 100)]:
        monkeypatch.setenv("COLUMNS", columns)
        assert main([str(tmp_path)]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= most


def test_runs_by_name(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path, name, [90])
    assert [path.name for path in find_all_runs([tmp_path / "b", tmp_path])] == ["b", "a"]


# --- differences -----------------------------------------------------------------------------------------------------


def test_diff_tells_the_options_that_differ(tmp_path, capsys, monkeypatch):
    """Names are left out; auto tells what it came to; an option without effect says so."""
    monkeypatch.chdir(tmp_path)
    more = {"optimizer.lr": 0.3, "optimizer.milestones": [0.5, 0.75], "dataset.batch_size": 64}
    a = write_run(Path(), "a", [90, 91], **more)
    b = write_run(Path(), "b", [90, 91], seed=7, **{"optimizer.optimizer_name": "adam", "dataset.batch_size": 64})
    for run, precision in ((a, "bf16"), (b, "fp32")):
        (run / "artifacts").mkdir()
        settled = {"settled": {"precision": precision, "loader": "memory"}}
        (run / "artifacts" / "environment.json").write_text(json.dumps([settled]))
    lines = shown(capsys, "diff", a, b)
    assert lines[0] == ["option", str(a), str(b)]
    assert {line[0]: line[1:] for line in lines[1:]} == {
        "experiment_params.seed": ["0", "7"],
        "experiment_params.precision": ["auto", "(bf16)", "auto", "(fp32)"],
        "optimizer.optimizer_name": ["sgd", "adam"],
        "optimizer.lr": ["0.3", "0.1"],
        "optimizer.milestones": ["0.5,0.75", '""'],
    }
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == f"{a} and {a} have the same options\n"


def test_diff_of_long_values_stands_below_the_option(tmp_path, capsys):
    data = {"dataset.dataset_name": "MNIST"}
    a, b = (write_run(tmp_path, n, [90], **data, **{"dataset.data_root": f"/{n * 90}"}) for n in ("a", "b"))
    assert main(["diff", str(a), str(b)]) == 0
    assert capsys.readouterr().out == f"dataset.data_root\n  {a}  /{'a' * 90}\n  {b}  /{'b' * 90}\n"
