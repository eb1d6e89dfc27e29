"""Masks: kept by the optimizer hook, with the same trajectory as multiplying by them in the forward."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from harness_params import make_config
from utils.conv_type import (
    apply_masks,
    check_masked,
    coverage,
    density,
    insert_masks,
    keep_masked,
    mask_gradients,
    masked_params,
    unmasked_params,
)
from utils.training.setup import make_optimizer


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def random_masks(model: nn.Module, keep: float = 0.4) -> nn.Module:
    insert_masks(model)
    generator = torch.Generator().manual_seed(1)
    for _, _, mask in masked_params(model):
        mask.copy_(torch.rand(mask.shape, generator=generator) < keep)
    return model


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-3, nesterov=True),
    "fused nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-3, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_trajectory_as_forward_multiply_bit_for_bit(name):
    ours = random_masks(small_net())
    reference = copy.deepcopy(ours)  # its weights are never masked: it multiplies in every forward
    apply_masks(ours)
    opt_ours, opt_ref = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](reference.parameters())
    keep_masked(opt_ours, ours)
    assert_same_trajectory(ours, reference, opt_ours, opt_ref)


def assert_same_trajectory(ours: nn.Module, reference: nn.Module, opt_ours, opt_ref) -> None:
    """25 steps of both, the reference's forward with its weights times the masks."""
    data = torch.Generator().manual_seed(2)
    for step in range(25):
        x, y = torch.randn(16, 3, 8, 8, generator=data), torch.randint(0, 5, (16,), generator=data)
        loss_ours = F.cross_entropy(ours(x), y)
        effective = {n: p * m for n, p, m in masked_params(reference)}
        loss_ref = F.cross_entropy(functional_call(reference, effective, (x,)), y)
        assert loss_ours.item() == loss_ref.item(), f"step {step}"
        for opt, loss in ((opt_ours, loss_ours), (opt_ref, loss_ref)):
            opt.zero_grad()
            loss.backward()
            opt.step()
    for (n, p, m), (_, q, _) in zip(masked_params(ours), masked_params(reference)):
        assert torch.equal(p, q * m), n
        assert not p[~m].any(), n
    for p, q in zip(ours.named_buffers(), reference.named_buffers()):
        assert torch.equal(p[1], q[1]), p[0]


HARNESS_OPTIMIZERS = {
    "sgd": {"lr": 0.1, "weight_decay": 5e-3},
    "adam": {"lr": 1e-2, "weight_decay": 0.1},
    "adam without decay of vectors": {"optimizer_name": "adam", "lr": 1e-2, "weight_decay": 0.1, "no_decay_bn": True},
    "adamw": {"lr": 1e-2, "weight_decay": 1.0, "beta1": 0.8, "beta2": 0.95},
}


@pytest.mark.parametrize("name", HARNESS_OPTIMIZERS)
def test_the_harness_optimizers_have_that_trajectory(name):
    """Weights and moments; moments of pruned weights differ, and no kept weight reads them."""
    options = {"optimizer_name": name, **HARNESS_OPTIMIZERS[name]}
    cfg = make_config({"optimizer": options, "experiment_params": {"precision": "fp32"}})
    ours = random_masks(small_net())
    reference = copy.deepcopy(ours)
    apply_masks(ours)
    opt_ours, opt_ref = make_optimizer(cfg, ours), make_optimizer(cfg, reference)
    opt_ref._optimizer_step_post_hooks.clear()  # its weights are never masked: it multiplies in every forward
    assert_same_trajectory(ours, reference, opt_ours, opt_ref)
    for p, q in zip(ours.parameters(), reference.parameters()):
        mask = {id(param): mask for _, param, mask in masked_params(ours)}.get(id(p), torch.ones_like(p).bool())
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            assert (key in opt_ours.state[p]) == (key in opt_ref.state[q]) == (("momentum" in key) == (name == "sgd"))
            if key in opt_ours.state[p]:
                assert torch.equal(opt_ours.state[p][key][mask], opt_ref.state[q][key][mask])


def test_custom_loop_cannot_unmask_a_weight():
    model = random_masks(small_net())
    apply_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    keep_masked(optimizer, model)
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):  # LBFGS-style closures, hand-made gradients, two steps on one gradient
        optimizer.step(closure)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        assert all(not p[~m].any() for _, p, m in masked_params(model))


def test_hook_follows_masks_that_change_or_are_replaced():
    model = random_masks(small_net())
    apply_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    keep_masked(optimizer, model)

    def step():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return all(not p[~m].any() for _, p, m in masked_params(model))

    assert step()
    _, _, mask = next(masked_params(model))
    mask.view(-1)[:50] = False
    assert step()
    model[0].weight_mask = torch.zeros_like(mask)
    assert step()
    assert not model[0].weight.any()
    model.to(torch.float64)
    assert step()


def test_masked_gradients_and_density():
    model = random_masks(small_net())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    mask_gradients(model)
    kept = sum(int(m.sum()) for _, _, m in masked_params(model))
    assert sum(int(p.grad.sum()) for _, p, _ in masked_params(model)) == kept
    assert density(model) == kept / (216 + 144 + 160)
    assert density(insert_masks(small_net())) == 1.0


def test_names_are_state_dict_names_and_layers_keep_their_class():
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 3, 2), "attn": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)})
    classes = [type(m) for m in model.modules()]
    assert insert_masks(model) is model
    assert [type(m) for m in model.modules()] == classes
    names = [name for name, _, _ in masked_params(model)]
    assert names == ["conv.weight", "attn.in_proj_weight", "attn.out_proj.weight"]
    state = model.state_dict()
    for name, param, mask in masked_params(model):
        assert state[name].data_ptr() == param.data_ptr()
        assert state[name + "_mask"].data_ptr() == mask.data_ptr()
        assert mask.dtype is torch.bool and mask.shape == param.shape and mask.all()
    plain = nn.ModuleDict({"conv": nn.Conv1d(2, 3, 2), "attn": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)})
    missing = plain.load_state_dict(state, strict=False).missing_keys
    assert missing == []


def test_insert_is_idempotent_and_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    insert_masks(model)
    mask = model[0].weight_mask
    mask[0] = False
    insert_masks(model)
    assert model[0].weight_mask is mask and not mask[0].any()
    assert [name for name, _, _ in masked_params(model)] == ["0.weight"]


def test_a_shared_weight_is_excluded_by_any_of_its_names():
    for name in ("0", "1"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].weight = model[0].weight
        insert_masks(model, exclude=[name])
        assert [full for full, _, _ in masked_params(model)] == ["2.weight"]


def test_weights_that_masks_would_not_reach_are_refused():
    """What is set on a weight made from parameters is gone with the next look at it."""
    for made in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = nn.Sequential(made(nn.Linear(8, 8)), nn.Linear(8, 4))
        with pytest.raises(ValueError, match=r"0.weight is no parameter but made from others"):
            insert_masks(model)
        assert [full for full, _, _ in masked_params(insert_masks(model, exclude=["0"]))] == ["1.weight"]
    with pytest.raises(ValueError, match=r"prune_params.exclude: 1.weight has a mask already"):
        insert_masks(model, exclude=["*"])


def test_exclude():
    model = insert_masks(small_net(), exclude=["0", "7.*"])
    assert [name for name, _, _ in masked_params(model)] == ["3.weight"]
    with pytest.raises(ValueError, match=r"prune_params.exclude: conv9 matches no layer; layers are 0.weight"):
        insert_masks(small_net(), exclude=["conv9"])
    with pytest.raises(ValueError, match="nothing left to prune"):
        insert_masks(small_net(), exclude=["*"])
    with pytest.raises(ValueError, match="no masks"):
        density(small_net())


@pytest.mark.parametrize("exclude", ["10", "0", b"0"])
def test_a_string_is_no_list_of_patterns(exclude):
    with pytest.raises(TypeError, match=r"exclude: .* is not allowed: a list of patterns, such as \["):
        insert_masks(small_net(), exclude=exclude)


# --- masks that are lost ---------------------------------------------------------------------------------------------


def masked_pair(keep: float = 0.4):
    model = random_masks(small_net(), keep)
    apply_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_masked(optimizer, model)
    return model, optimizer


def train_steps(model, optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("order", ["model first", "optimizer first", "in a dict"])
def test_a_deep_copy_of_model_and_optimizer_keeps_the_masks(order):
    model, optimizer = masked_pair()
    if order == "model first":
        copied, other = copy.deepcopy((model, optimizer))
    elif order == "optimizer first":
        other, copied = copy.deepcopy((optimizer, model))
    else:
        both = copy.deepcopy({"optimizer": optimizer, "model": model})
        copied, other = both["model"], both["optimizer"]
    before = [p.clone() for p in model.parameters()]
    train_steps(*copy.deepcopy((copied, other)))  # and a copy of a copy
    train_steps(copied, other)
    check_masked(copied)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert not any(torch.equal(p, q) for (_, p, _), (_, q, _) in zip(masked_params(model), masked_params(copied)))
    assert other.state.keys() == set(copied.parameters())


def test_a_removed_hook_stays_removed_in_a_copy():
    model = random_masks(small_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_masked(optimizer, model).remove()
    copied, other = copy.deepcopy((model, optimizer))
    train_steps(copied, other)
    with pytest.raises(ValueError, match="not zero"):
        check_masked(copied)


def swap_parameter(model):
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))


def swap_storage(model):
    model[0].weight_mask.data = torch.rand(model[0].weight_mask.shape) < 0.2


def swap_layer(model):
    model[7] = nn.Linear(32, 5)
    insert_masks(model)
    model[7].weight_mask[:3] = False


def swap_block(model):
    """A module further up is replaced: the layer within it was never seen."""
    model[7] = nn.Sequential(random_masks(nn.Sequential(nn.Linear(32, 5))))


def mask_by_data(model):
    model[0].weight_mask.data[:3] = False
    apply_masks(model)


def mask_by_numpy(model):
    model[0].weight_mask.numpy()[:3] = False
    apply_masks(model)


def mask_late(model):
    insert_masks(model)
    model[3].weight_mask[:2] = False


@pytest.mark.parametrize(
    "change", [swap_parameter, swap_storage, swap_layer, swap_block, mask_by_data, mask_by_numpy, mask_late]
)
def test_what_happens_behind_the_hook_is_noticed(change):
    model = small_net()
    insert_masks(model, exclude=["3"] if change is mask_late else [])
    model[0].weight_mask[4:] = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keep_masked(optimizer, model)
    train_steps(model, optimizer)
    change(model)
    optimizer.add_param_group(
        {"params": [p for p in model.parameters() if p not in set(optimizer.param_groups[0]["params"])]}
    )
    train_steps(model, optimizer)
    assert any(not mask.all() for _, _, mask in masked_params(model))
    check_masked(model)


def test_check_masked_names_the_layers():
    model = random_masks(small_net())
    with pytest.raises(
        ValueError, match=r"pruned weights are not zero in 0\.weight \(\d+\), 3\.weight \(\d+\), 7\.weight"
    ):
        check_masked(model)
    apply_masks(model)
    check_masked(model)
    model[3].weight.data[~model[3].weight_mask] = torch.nan
    pruned = int((~model[3].weight_mask).sum())
    with pytest.raises(ValueError, match=rf"pruned weights are not zero in 3\.weight \({pruned}\): "):
        check_masked(model)
    with pytest.raises(ValueError, match="no masks"):
        check_masked(small_net())


# --- what has masks --------------------------------------------------------------------------------------------------

RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
    "lstm with projections": lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(6, 5, batch_first=True),
    "rnn": lambda: nn.RNN(6, 5, bias=False, batch_first=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_weights_are_masked_and_stay_so(name):
    torch.manual_seed(0)
    model = RECURRENT[name]()
    random_masks(model, 0.3)
    expected = [n for n, _ in model.named_parameters() if n.startswith("weight")]
    assert [n for n, _, _ in masked_params(model)] == expected
    assert {f"{n}_mask" for n in expected} <= model.state_dict().keys()
    apply_masks(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    keep_masked(optimizer, model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7, 6))[0].square().sum().backward()
        optimizer.step()
    check_masked(model)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    # What the forward uses are these very weights.
    plain = RECURRENT[name]()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.endswith("_mask")})
    x = torch.randn(2, 3, 6)
    assert torch.equal(plain(x)[0], model(x)[0])


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_are_masked(cell):
    assert [n for n, _, _ in masked_params(insert_masks(cell(4, 3)))] == ["weight_ih", "weight_hh"]


def test_coverage_and_what_stays_dense():
    model = nn.ModuleDict({"words": nn.Embedding(100, 8), "lstm": nn.LSTM(8, 4), "out": nn.Linear(4, 2)})
    insert_masks(model, exclude=["out"])
    weights = 16 * 8 + 16 * 4
    total = 800 + weights + 32 + 8 + 2
    assert coverage(model) == weights / total
    dense = [(name, param.numel()) for name, param in unmasked_params(model)]
    assert dense == [
        ("words.weight", 800),
        ("lstm.bias_ih_l0", 16),
        ("lstm.bias_hh_l0", 16),
        ("out.weight", 8),
        ("out.bias", 2),
    ]
    assert coverage(small_net()) == 0
