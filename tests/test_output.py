"""Output is best effort: words that cannot be written cost no run. Notes and warnings name their program and level."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, SMALL, product_files

RUN = {**SMALL, "prune_params.num_levels": 1, "experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}
CONFIG = ROOT / "configs" / "digits_lenet.yaml"
# What a shell adds to a command, and what then is left of its output.
PLACES = {
    "ascii": "",
    "closed": ">&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "full": ">/dev/full",
    "both full": ">/dev/full 2>/dev/full",
    "no reader": "| true",
    "no reader of either": "2>&1 | true",
}


def in_shell(words: list[str], place: str, env: dict | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``python WORDS`` in bash."""
    quoted = " ".join(f"'{word}'" for word in [sys.executable, *words])
    script = f"{quoted} {PLACES[place]}; exit ${{PIPESTATUS[0]}}"
    usual = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=usual | (env or {}), capture_output=True, timeout=200, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def words(folder: Path, name: str) -> list[str]:
    values = {**RUN, "experiment_params.base_dir": folder, "experiment_params.expt_name": name}
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, forks) -> Path:
    """A finished run with a name that is not ASCII."""
    return forks("größe €", **RUN).path


# --- each program, each place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["ascii", "closed", "no reader", "both full"])
def test_a_run_finishes_wherever_its_output_goes(place, tmp_path):
    status, _, err = in_shell(["harness.py", *words(tmp_path, "größe €")], place)
    assert status == 0, err
    summary = tmp_path / "größe €" / "metrics" / "summary.csv"
    assert len(summary.read_text().splitlines()) == 2
    checkpoint = torch.load(tmp_path / "größe €" / "checkpoints" / "model_level_0.pt", weights_only=True)
    assert checkpoint and not (tmp_path / "größe €" / "artifacts" / "lock").read_bytes()


@pytest.mark.parametrize("place", PLACES)
def test_a_table_is_told_as_far_as_it_can_be(place, run):
    status, out, err = in_shell(["-m", "utils.plot_results", str(run), "--kind", "table"], place)
    assert status == 0, err
    lost = "plot_results: note: stdout cannot be written (No space left on device): what it lacks is lost\n"
    assert err == (lost if place == "full" else "")
    assert ("dense acc" in out) == (place == "ascii")


@pytest.mark.parametrize("place", ["both closed", "both full"])
def test_a_figure_is_written_wherever_words_go(place, run, tmp_path):
    figure = tmp_path / "f.png"
    status, _, err = in_shell(["-m", "utils.plot_results", str(run), "--out", str(figure)], place)
    assert status == 0, err
    assert figure.stat().st_size > 1000


@pytest.mark.parametrize(
    ("program", "place"),
    [*(("harness.py", place) for place in PLACES), ("-m utils.run_grid", "closed"), ("-m utils.analyze", "both full")],
)
def test_help_and_faults_keep_their_status(program, place):
    assert in_shell([*program.split(), "--help"], place)[0] == 0
    assert in_shell([*program.split(), "--optimizer.größe=€"], place)[0] == 2


def test_a_finished_grid_says_so_to_nobody(run, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base_dir: {tmp_path}\nconfig: {CONFIG}\nseeds: [0]\nruns: {{größe: {{}}}}\n")
    options = [word for word in words(tmp_path, "x") if "base_dir" not in word and "expt_name" not in word]
    assert in_shell(["-m", "utils.run_grid", str(grid), *options], "closed")[0] == 0
    assert (tmp_path / "größe_seed0" / "metrics" / "summary.csv").exists()
    for place in ("full", "no reader"):  # once more: there is nothing left to do
        assert in_shell(["-m", "utils.run_grid", str(grid), *options], place)[0] == 0


def test_an_analysis_prints_to_nobody(run):
    for place in ("full", "no reader"):
        assert in_shell(["-m", "utils.analyze", "flops", str(run)], place)[0] == 0


def test_a_closed_stream_lends_its_number_to_no_file(tmp_path):
    """A file opened while stdout is closed would be number 1, and what C code prints would go into it."""
    code = """
from utils.output import best_effort_streams, say
best_effort_streams()
with open(r"{}", "w") as file:
    assert file.fileno() > 2, file.fileno()
    import os
    os.write(1, b"of C code"), os.write(2, b"of C code")
    say("a line"), file.write("mine")
"""
    file = tmp_path / "file"
    script = tmp_path / "script.py"
    script.write_text(code.format(file))
    status, _, _ = in_shell([str(script)], "all closed", {"PYTHONPATH": str(ROOT)})
    assert (status, file.read_text()) == (0, "mine")


def calls_in(path: Path) -> set[str]:
    """The functions that a file calls, as they are written."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_no_product_file_prints_by_itself():
    """All words go through utils/output.py, but for what processes print for each other."""
    alone = {"output", "grids/cuda_probe", "grids/mps_daemon", "bench/usual_harness"}
    own = {"print", "warnings.warn", *(f"log.{kind}" for kind in ("debug", "info", "warning", "error", "exception"))}
    found = {str(path.relative_to(ROOT)) for path in product_files() if own & calls_in(path)}
    assert found == {f"utils/{name}.py" for name in alone}


# --- notes and warnings ----------------------------------------------------------------------------------------------


DEAD = "dead network: mag to density 0.0001 leaves no weight in "


class Complaining:
    """Python's own warning, from within a level."""

    def __call__(self) -> None:
        from harness import Harness

        plain = Harness.finish_level

        def finish(harness) -> None:
            import warnings

            warnings.warn(f"of a library,\n  in two lines: {harness.position.level}", stacklevel=1)
            plain(harness)

        Harness.finish_level = finish


def test_warnings_name_program_and_level(fork):
    sparse = {**RUN, "prune_params.num_levels": 2, "prune_params.prune_rate": 0.9999, "prune_params.scope": "global"}
    done = fork("run", trap=Complaining(), **sparse)
    lines = [line for line in done.err.splitlines() if "warning" in line]
    place = r"\(test_output\.py:\d+\)"
    assert re.fullmatch(rf"harness: warning: level 0: UserWarning: of a library, in two lines: 0 {place}", lines[0])
    assert lines[1].startswith(f"harness: warning: level 1: {DEAD}")
    assert re.fullmatch(rf"harness: warning: level 1: UserWarning: of a library, in two lines: 1 {place}", lines[2])
    assert len(lines) == 3


def test_the_plain_harness_names_itself(launch):
    sparse = {**RUN, "prune_params.num_levels": 2, "prune_params.prune_rate": 0.9999}
    command = launch.command("plain", program=("-m", "utils.single_gpu_harness"), **sparse)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert f"single_gpu_harness: warning: level 1: {DEAD}" in done.stderr


def test_without_a_program_warnings_are_records_of_logging(caplog, capsys):
    from utils.conv_type import insert_masks
    from utils.pruning_utils import prune

    model = insert_masks(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)))
    with torch.no_grad():
        model[0].weight *= 1000
    prune(model, "mag", 0.001)
    assert "dead network" in caplog.text and capsys.readouterr().err == ""


# --- what users have -------------------------------------------------------------------------------------------------

INTERNAL = re.compile(r"DESIGN|\bissues? \d|\bissue #|section \d+ of the design|/work/|/root/|moves\.txt", re.I)


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_refers_to_a_file_that_users_do_not_have(path):
    text = re.sub(r"pytorch issue \d+", "", path.read_text())
    assert not INTERNAL.findall(text)
