"""The notebook that takes one's own network to a ticket runs as it stands."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "assets" / "own_network.ipynb"


def code_of(notebook: dict) -> str:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def test_notebook_runs_in_its_folder_with_jupyters_backend(tmp_path):
    """With figures kept instead of shown, as a notebook has them."""
    code = code_of(json.loads(NOTEBOOK.read_text()))
    env = {**os.environ, "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore:FigureCanvasAgg", "-c", code]
    done = subprocess.run(command, cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    levels = [line for line in done.stdout.splitlines() if line.startswith("level") and "test accuracy" in line]
    densities = [float(line.split()[3]) for line in levels]
    assert densities == pytest.approx([0.7**level for level in range(14)], abs=1e-4), "a whole number of weights"
    accuracies = [float(line.split()[-1].rstrip("%")) for line in levels]
    assert min(accuracies[:8]) > 95
    assert "level 3, density 0.512" in done.stdout


def test_notebook_was_saved_after_a_whole_run():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
