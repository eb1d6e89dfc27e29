"""Options and messages that once misled: what is left out, names of files, merged YAML, figures in a notebook."""

import os
import subprocess
import sys

import pytest

from harness_params import load_config, make_config
from tests.conftest import ROOT
from utils.errors import ConfigError


@pytest.mark.parametrize(("epochs", "k"), [(2, 1), (10, 1), (11, 10), (160, 10)])
def test_a_short_level_rewinds_to_a_tenth_of_it(epochs, k):
    cfg = make_config({"experiment_params": {"training_type": "wr", "epochs_per_level": epochs}})
    assert cfg.prune_params.rewind_epoch == k


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_rewind_epoch_that_is_given_must_fit(epochs):
    given = {"prune_params": {"rewind_epoch": 10}} if epochs > 1 else {}
    with pytest.raises(ConfigError, match=r"prune_params.rewind_epoch: .*1 <= rewind_epoch"):
        make_config({"experiment_params": {"training_type": "wr", "epochs_per_level": epochs}, **given})


@pytest.mark.parametrize("method", ["snip", "er_erk"])
def test_pruning_at_initialization_needs_its_density(method):
    with pytest.raises(ConfigError, match=rf"prune_params.er_init: missing: er_method {method} prunes to this"):
        make_config({"prune_params": {"er_method": method}})
    with pytest.raises(ConfigError, match=r"prune_params.er_init: missing"):
        load_config([f"--prune_params.er_method={method}"])
    dense = make_config({"prune_params": {"er_method": method, "er_init": 1.0}})  # as older configs may say
    assert make_config(dense.to_dict()) == dense and "er_init is 1" in str(dense.notes)


def test_merged_yaml(in_file):
    text = "experiment_params:\n  <<: {seed: 7, epochs_per_level: 4}\n  seed: 8\n"
    cfg = load_config(in_file(text))
    assert (cfg.experiment_params.seed, cfg.experiment_params.epochs_per_level) == (8, 4)
    with pytest.raises(ConfigError, match=r"seed.* is given twice"):
        load_config(in_file(text + "  seed: 9\n"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("nope", ""), ("x", ""), ("digits_lnet", "; did you mean configs/digits_lenet.yaml?")],
)
def test_only_near_names_of_files_are_suggested(name, hint):
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(os.path.relpath(ROOT / f"configs/{name}.yaml", ROOT))])
    assert str(caught.value).endswith(f"no such file{hint}")


def test_figures_leave_the_backend_of_a_notebook_alone(tmp_path):
    """A backend that cannot be loaded is never asked for, and stays the user's."""
    code = f"""
import matplotlib, sys
from utils.plots import style
from utils import plot_results
from utils.analysis import figures as analysis
fig = analysis.Figure()
assert "matplotlib.pyplot" not in sys.modules, "pyplot chooses a backend"
axes = fig.subplots()
style.density_axis(axes, 0.5)
fig.savefig({str(tmp_path / "a.png")!r})
assert matplotlib.rcParams["backend"] == "module://no_such.backend"
"""
    env = {**os.environ, "MPLBACKEND": "module://no_such.backend"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 1000
