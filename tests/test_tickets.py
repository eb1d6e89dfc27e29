"""Tickets: what level 0 takes from a run or a file, and what it changes on purpose."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness_params import Config, make_config
from tests.conftest import SMALL
from tests.test_saved_by_older_code import unpack
from tests.traps import SHORT
from utils.conv_type import masked_params
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import ConfigError, RunError
from utils.runs.points import read_rewind_point
from utils.runs.ticket_files import NetworkFiles
from utils.runs.ticket_weights import shuffle_global, shuffle_layer
from utils.runs.tickets import Ticket, start_from_ticket
from utils.training.setup import build_model, new_network

WEIGHTS = ("fc1.weight", "fc2.weight", "fc3.weight")
SOURCE = {**SHORT, "experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1}
SOURCE |= {"prune_params.num_levels": 3, "prune_params.save_steps": "0,2"}
ONE_LEVEL = {**SHORT, "prune_params.num_levels": 1, "prune_params.prune_rate": None}


@pytest.fixture(scope="module")
def source(forks):
    return forks("source", **SOURCE)


@pytest.fixture(scope="module")
def snip(forks):
    """Pruned at initialization: zeros stand where its model_init.pt is pruned."""
    options = {"prune_params.er_method": "snip", "prune_params.er_init": 0.5, "experiment_params.seed": 7}
    return forks("snip", **ONE_LEVEL, **options)


def config(folder: Path, **options) -> Config:
    values = {**SMALL, **SHORT, "prune_params.num_levels": 1, "experiment_params.base_dir": str(folder), **options}
    nested: dict = {}
    for path, value in values.items():
        section, key = path.split(".")
        nested.setdefault(section, {})[key] = value
    return make_config(nested)


def taken(folder: Path, source: str | Path = "source", seed: int = 0, **ticket) -> tuple[Ticket, dict[str, Tensor]]:
    """The ticket and the state that level 0 would start from."""
    more = {key: ticket.pop(key) for key in list(ticket) if "." in key}
    params = {f"ticket_params.{key}": value for key, value in ticket.items()}
    options = {"experiment_params.seed": seed, "ticket_params.source": str(source)}
    cfg = config(folder, **options, **params, **more)
    ctx = Context()
    data = load_data(cfg, ctx)
    model = build_model(cfg, data, ctx)
    found = start_from_ticket(cfg, ctx, data, model)
    assert found is not None
    return found, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fresh(folder: Path, seed: int) -> dict[str, Tensor]:
    cfg = config(folder)
    return new_network(cfg, load_data(cfg, Context()), seed).state_dict()


def masks_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[f"{name}_mask"] for name in WEIGHTS}


def rest(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name not in WEIGHTS and not name.endswith("_mask")]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "checkpoint"), [("auto", "init"), ("init", "init"), ("rewind", "rewind"), ("final", "level_2")]
)
def test_weights_are_those_of_the_checkpoint_below_the_mask_of_the_level(source, weights, checkpoint):
    ticket, state = taken(source.path.parent, weights=weights, level=2)
    masks, there = source.checkpoint("level_2"), source.checkpoint(checkpoint)
    for name in WEIGHTS:
        assert torch.equal(state[f"{name}_mask"], masks[f"{name}_mask"])
        assert torch.equal(state[name], there[name] * masks[f"{name}_mask"])
        assert state[name].count_nonzero() > 0
    assert all(torch.equal(state[name], there[name]) for name in rest(state))
    assert ticket.density == pytest.approx(0.25, abs=1e-5)
    assert ticket.record["weights"] == ("init" if weights == "auto" else weights)


def test_reinit_is_never_the_weights_of_init(source):
    """Not with the source's own seed either, and not a weight of it."""
    init, seen = source.checkpoint("init"), []
    for seed in (0, 1):
        _, state = taken(source.path.parent, weights="reinit", seed=seed)
        seen.append(state)
        for name in WEIGHTS:
            kept = state[f"{name}_mask"]
            assert (state[name] == init[name])[kept].float().mean() < 1e-3  # by chance: they are float32
            assert float(state[name][kept].std()) == pytest.approx(
                float(init[name].std()), rel=0.2
            )  # the same distribution
    assert not torch.equal(seen[0]["fc1.weight"], seen[1]["fc1.weight"])
    again = taken(source.path.parent, weights="reinit")[1]
    assert all(torch.equal(again[name], seen[0][name]) for name in again)


def test_reinit_of_a_reinit_is_not_the_same_again(source, forks):
    """With the same seed, and also of a branch of it that kept its weights."""
    changed = {"ticket_params.source": "source", "ticket_params.weights": "reinit"}
    once = forks("once", **ONE_LEVEL, **changed)
    kept = forks("kept", **ONE_LEVEL, **{"ticket_params.source": "once"})
    init = once.checkpoint("init")
    assert torch.equal(kept.checkpoint("init")["fc1.weight"], init["fc1.weight"])
    for run in (once, kept):
        for place in (run.path.name, run.path / "checkpoints" / "model_level_0.pt"):
            _, state = taken(source.path.parent, place, weights="reinit")
            masked = state["fc1.weight_mask"]
            assert (state["fc1.weight"] == init["fc1.weight"])[masked].float().mean() < 1e-3
    signs = taken(source.path.parent, "once", weights="init_signs")[1]["fc1.weight"]
    assert (signs.abs() == init["fc1.weight"].abs())[init["fc1.weight_mask"]].float().mean() < 1e-3


def test_what_differs_or_has_no_effect_is_noted(source, capsys):
    folder = source.path.parent
    taken(folder, mask="none", level=1)
    assert "ticket_params.level: 1 has no effect: mask is none" in capsys.readouterr().err
    taken(folder, weights="rewind", level=1)
    assert capsys.readouterr().err == ""
    changes = {"optimizer.lr": 0.05, "experiment_params.epochs_per_level": 4, "optimizer.beta1": 0.5}
    taken(folder, weights="rewind", level=1, **changes, **{"dataset.mixup": 0.2})
    err = capsys.readouterr().err
    assert "with other options: optimizer.lr 0.05 (there 0.1), experiment_params.epochs_per_level 4 (there 2)" in err
    assert ", dataset.mixup 0.2 (there 0.0)" in err


def test_signs_and_sizes(source):
    folder, init, final = source.path.parent, source.checkpoint("init"), source.checkpoint("level_2")
    reinit = taken(folder, weights="reinit")[1]
    init_signs, final_signs = (taken(folder, weights=f"{which}_signs")[1] for which in ("init", "final"))
    for name in WEIGHTS:
        kept = final[f"{name}_mask"]
        assert torch.equal(init_signs[name].abs(), reinit[name].abs())
        assert torch.equal(init_signs[name][kept].sign(), init[name][kept].sign())
        assert torch.equal(final_signs[name].abs(), init[name].abs() * kept)
        assert torch.equal(final_signs[name][kept] < 0, final[name][kept] < 0)
    dense = taken(folder, weights="final_signs", level=0)[1]
    changed = (dense["fc1.weight"] != init["fc1.weight"]) & (init["fc1.weight"] != 0)
    assert changed.any()  # small weights change their signs in training
    assert torch.equal(dense["fc1.weight"][changed], -init["fc1.weight"][changed])
    assert all(torch.equal(init_signs[name], reinit[name]) for name in rest(reinit))
    assert all(torch.equal(final_signs[name], init[name]) for name in rest(init))


def test_a_kept_step_of_level_0_brings_its_optimizer(source):
    folder = source.path.parent
    for step, first in ((-1, read_rewind_point(source.path, 3).step), (0, 0), (2, 2)):
        ticket, state = taken(folder, weights="rewind", step=step)
        name = "rewind" if step == -1 else f"step_{step}"
        saved = torch.load(source.path / "artifacts" / f"optimizer_{name}.pt", weights_only=True)
        assert ticket.first_step == first and ticket.optimizer is not None
        assert str(ticket.optimizer["optimizer"]["state"]) == str(saved["optimizer"]["state"])
        assert torch.equal(state["fc1.bias"], source.checkpoint(name)["fc1.bias"])


# --- masks -----------------------------------------------------------------------------------------------------------


def test_shuffled_masks_of_a_run(source):
    folder, there = source.path.parent, source.checkpoint("level_2")
    kept = {name: int(mask.sum()) for name, mask in masks_of(there).items()}
    for kind in ("shuffle_layer", "shuffle_global"):
        _, state = taken(folder, mask=kind, level=2)
        mine = {name: int(mask.sum()) for name, mask in masks_of(state).items()}
        assert (mine == kept) == (kind == "shuffle_layer")
        assert sum(mine.values()) == sum(kept.values())
        assert not any(torch.equal(state[f"{name}_mask"], there[f"{name}_mask"]) for name in WEIGHTS)
        again, other = (masks_of(taken(folder, mask=kind, level=2, seed=seed)[1]) for seed in (0, 1))
        assert all(torch.equal(again[name], state[f"{name}_mask"]) for name in WEIGHTS)
        assert not any(torch.equal(other[name], state[f"{name}_mask"]) for name in WEIGHTS)
        before = masks_of(taken(folder, mask=kind, level=1)[1])  # nested, as the masks of the run are
        assert not any((state[f"{name}_mask"] & ~before[name]).any() for name in WEIGHTS)


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=5),
    st.integers(0, 2**32),
)
def test_shuffles_permute(layers, seed):
    masks = {str(n): torch.tensor(layer).view(1, -1) for n, layer in enumerate(layers)}
    for shuffle in (shuffle_layer, shuffle_global):
        new = shuffle(masks, torch.Generator().manual_seed(seed))
        assert [mask.shape for mask in new.values()] == [mask.shape for mask in masks.values()]
        assert sum(int(mask.sum()) for mask in new.values()) == sum(int(mask.sum()) for mask in masks.values())
    by_layer = shuffle_layer(masks, torch.Generator().manual_seed(seed))
    assert all(by_layer[name].sum() == mask.sum() for name, mask in masks.items())


def test_no_mask_is_dense(source, capsys):
    ticket, state = taken(source.path.parent, mask="none")
    assert ticket.density == 1 and all(mask.all() for mask in masks_of(state).values())
    assert all(torch.equal(state[name], source.checkpoint("init")[name]) for name in WEIGHTS)
    assert capsys.readouterr().err == ""
    taken(source.path.parent, mask="none", weights="final")
    assert "weights are 0 in" in capsys.readouterr().err


def test_a_mask_pruned_at_initialization_is_shuffled_over_weights_drawn_again(snip, forks):
    """Its model_init.pt holds zeros where the shuffled mask keeps weights; the run's seed gives them back."""
    assert (snip.checkpoint("init")["fc1.weight"] == 0).float().mean() > 0.3
    dense = fresh(snip.path.parent, seed=7)
    for kind in ("shuffle_layer", "none"):
        _, state = taken(snip.path.parent, "snip", mask=kind)
        for name in WEIGHTS:
            assert torch.equal(state[name], dense[name] * state[f"{name}_mask"])
    changed = {"ticket_params.source": "snip", "ticket_params.weights": "reinit"}
    forks("branch_of_snip", **ONE_LEVEL, **changed)
    with pytest.raises(ConfigError, match="cannot be drawn again"):
        taken(snip.path.parent, "branch_of_snip", mask="shuffle_layer")


# --- files -----------------------------------------------------------------------------------------------------------


def plain(source) -> dict[str, Tensor]:
    """A state_dict without masks, as torchvision's are."""
    return {name: t for name, t in source.checkpoint("level_2").items() if not name.endswith("_mask")}


def test_a_file_of_ours_has_its_masks(source, capsys):
    _, state = taken(source.path.parent, source.path / "checkpoints" / "model_level_1.pt")
    there = source.checkpoint("level_1")
    assert all(torch.equal(state[name], there[name]) for name in there)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module.", "half"])
def test_a_file_without_masks_is_masked_where_it_is_zero(source, tmp_path, capsys, form):
    content: dict = plain(source)
    if form == "module.":
        content = {f"module.{name}": tensor for name, tensor in content.items()}
    elif form == "half":
        content = {name: tensor.half().float() for name, tensor in content.items()}
    elif form != "plain":
        content = {form: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    ticket, state = taken(tmp_path, tmp_path / "weights.pth")
    expected = plain(source)
    for name in WEIGHTS:
        assert torch.equal(state[f"{name}_mask"], state[name] != 0)
        assert torch.allclose(state[name], expected[name], atol=1e-3)
    assert ticket.record["weights"] == "final"
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and f"holds no masks: same keeps its weights that are not 0: density {ticket.density:.4g}" in err
    )


def test_a_dense_file_says_so(source, tmp_path, capsys):
    torch.save(
        {name: t for name, t in source.checkpoint("init").items() if not name.endswith("_mask")}, tmp_path / "a.pt"
    )
    ticket, _ = taken(tmp_path, tmp_path / "a.pt")
    assert ticket.density == 1 and "density 1\n" in capsys.readouterr().err


def test_torchvision_weights_of_another_classifier_are_named():
    from torchvision.models import resnet18

    from utils.conv_type import insert_masks
    from utils.models import create_model

    state = resnet18(num_classes=1000).state_dict()
    ours = insert_masks(create_model("resnet18", 1000, (3, 224, 224)))
    assert NetworkFiles(ours).fitting(state, Path("r.pt")) is state
    ten = NetworkFiles(insert_masks(create_model("resnet18", 10, (3, 224, 224))))
    with pytest.raises(ConfigError) as caught:
        ten.fitting(state, Path("r.pt"))
    assert str(caught.value) == (
        "ticket_params.source: r.pt does not fit the network: fc.weight is (1000, 512) in it and (10, 512) in the "
        "network; fc.bias is (1000,) in it and (10,) in the network"
    )
    before_counters = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert NetworkFiles(ours).fitting(before_counters, Path("r.pt")) is before_counters


def test_a_damaged_checkpoint_of_a_run_is_refused(source, tmp_path):
    import shutil

    shutil.copytree(source.path, tmp_path / "copy")
    torch.save(source.checkpoint("level_1"), tmp_path / "copy" / "checkpoints" / "model_init.pt")
    with pytest.raises(RunError, match=r"model_init\.pt was changed since this run wrote it"):
        taken(tmp_path, "copy")


def test_a_run_of_older_code_is_a_source(tmp_path):
    """Its rewind point does not say its step, and level 0 is pruned at initialization."""
    run = unpack(tmp_path)
    ticket, state = taken(tmp_path, "run", weights="rewind", **{"dataset.batch_size": 128, "optimizer.nesterov": True})
    there = torch.load(run / "checkpoints" / "model_rewind.pt", weights_only=True)
    assert ticket.first_step == 12 and all(torch.equal(state[name], there[name]) for name in there)
    assert ticket.density == pytest.approx(0.5, abs=1e-3)


def test_taking_a_ticket_draws_nothing_from_the_global_generator(source):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    cfg = config(source.path.parent, **{"ticket_params.source": "source", "ticket_params.weights": "reinit"})
    data = load_data(cfg, Context())
    model = build_model(cfg, data, Context())
    torch.random.set_rng_state(before)
    start_from_ticket(cfg, Context(), data, model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(param[~mask].any() for _, param, mask in masked_params(model))


def test_the_record_says_where_it_comes_from(source):
    ticket, _ = taken(source.path.parent, weights="reinit", level=1)
    record = json.loads(json.dumps(ticket.record))
    assert record["source"] == str(source.path.resolve()) and record["seed"] == 0
    assert (record["level"], record["mask"], record["weights"]) == (1, "same", "reinit")
    assert len(record["sha256"]) == 64 and record["density"] == pytest.approx(0.5, abs=1e-5)
    other, _ = taken(source.path.parent, weights="reinit", level=2)
    assert other.record["sha256"] != record["sha256"]
