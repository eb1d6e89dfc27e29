"""``prune_params.target_density`` in place of num_levels."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness_params import dump_yaml, load_config, make_config
from tests.traps import KINDS
from utils.pruning.methods import level_density, levels_to_reach


@pytest.mark.parametrize(
    ("target", "start", "rate", "levels"),
    [
        (0.5, 1.0, 0.2, 5),  # 0.8^3 = 0.512, 0.8^4 = 0.4096
        (0.64, 1.0, 0.2, 3),  # 0.8^2, reached up to rounding
        (0.6399, 1.0, 0.2, 4),
        (0.01, 1.0, 0.2, 22),  # 0.8^21 = 0.0092
        (0.1, 0.2, 0.5, 2),  # from d0 = 0.2
        (0.2, 0.2, 0.5, 1),
        (0.5, 0.2, 0.5, 1),
        (0.1, 1.0, 0.9, 2),  # one shot
    ],
)
def test_by_hand(target, start, rate, levels):
    assert levels_to_reach(target, start, rate) == levels
    er = {"er_method": "synflow", "er_init": start} if start < 1 else {}
    p = make_config({"prune_params": {"target_density": target, "prune_rate": rate, **er}}).prune_params
    assert (p.num_levels, p.target_density) == (levels, target)


@given(st.floats(1e-6, 0.999), st.floats(0.01, 1.0), st.floats(0.01, 0.99))
def test_the_fewest_levels_that_reach_it(target, start, rate):
    levels = levels_to_reach(target, start, rate)
    assert level_density(start, rate, levels - 1) <= target * (1 + 1e-6)
    assert levels == 1 or level_density(start, rate, levels - 2) > target


def write(folder, prune_params: dict) -> list[str]:
    (folder / "a.yaml").write_text(yaml.safe_dump({"prune_params": prune_params}))
    return [f"--config={folder / 'a.yaml'}"]


def test_the_command_lines_of_the_two_holds(tmp_path):
    p = load_config([*write(tmp_path, {"num_levels": 5}), "--prune_params.target_density=0.5"]).prune_params
    assert (p.num_levels, p.target_density) == (5, 0.5)
    p = load_config([*write(tmp_path, {"num_levels": 7}), "--prune_params.target_density=0.3"]).prune_params
    assert (p.num_levels, p.target_density) == (7, 0.3)
    p = load_config([*write(tmp_path, {"num_levels": 7}), "--prune_params.target_density=0.6"]).prune_params
    assert (p.num_levels, p.target_density) == (4, 0.6)
    p = load_config([*write(tmp_path, {"target_density": 0.3}), "--prune_params.num_levels=4"]).prune_params
    assert (p.num_levels, p.target_density) == (4, 0.0)


def test_a_dumped_config_reads_back_and_changes(tmp_path):
    cfg = make_config({"prune_params": {"target_density": 0.3}})
    (tmp_path / "a.yaml").write_text(dump_yaml(cfg))
    assert load_config([f"--config={tmp_path / 'a.yaml'}"]) == cfg
    assert cfg.replace({"prune_params": {"target_density": 0.1}}).prune_params.num_levels == 12
    assert cfg.replace({"optimizer": {"lr": 0.2}}).prune_params.num_levels == 7


def test_a_run_reaches_it_and_goes_on_to_another(fork):
    kind = {**KINDS["lrr"], "prune_params.num_levels": None}  # the launcher sets it otherwise
    kind |= {"prune_params.prune_rate": 0.5, "dataset.batch_size": 500}
    kind |= {"experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}
    done = fork("target", **kind, **{"prune_params.target_density": 0.6})
    assert [row["density"] for row in done.csv("summary").to_dict("records")] == pytest.approx([1.0, 0.5], abs=1e-3)
    again = fork("target", resume=True, **kind, **{"prune_params.target_density": 0.3})
    assert [row["density"] for row in again.csv("summary").to_dict("records")] == pytest.approx(
        [1, 0.5, 0.25], abs=1e-3
    )
    saved = yaml.safe_load((again.path / "expt_config.yaml").read_text())["prune_params"]
    assert (saved["target_density"], saved["num_levels"]) == (0.3, 3)
    fewer = fork("target", resume=True, status=2, **kind, **{"prune_params.target_density": 0.6})
    assert "prune_params.target_density: 0.6 takes 2 levels, less than the 3 levels" in fewer.err
