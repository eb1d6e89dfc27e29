"""utils.analysis.sharpness against the exact Hessian of a small network, and against matrices known beforehand."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from utils.analysis.sharpness import Hessian, top_eigenvalue, trace
from utils.conv_type import apply_masks, insert_masks, masked_params
from utils.errors import RunError

SHAPE = (1, 6, 6)


def network() -> nn.Module:
    """122 parameters: a convolution, BatchNorm with statistics of its own, and two linear layers; half is pruned."""
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Tanh()
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    insert_masks(model, exclude=["6"])
    for _, _, mask in masked_params(model):
        mask.copy_(torch.rand(mask.shape) < 0.5)
    apply_masks(model)
    return model


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unlike size."""
    draws = torch.Generator().manual_seed(5)
    pixels, labels = torch.randn(count, *SHAPE, generator=draws), torch.randint(3, (count,), generator=draws)
    return list(zip(pixels.split(5), labels.split(5)))


def exact(model: nn.Module, batches, smoothing: float = 0.0, all_weights: bool = False) -> torch.Tensor:
    """The Hessian of the mean loss in the free parameters, by torch.func."""
    model = model.double().eval()
    names = [name for name, _ in model.named_parameters()]
    params = [param.detach() for param in model.parameters()]
    pixels, labels = (torch.cat(parts) for parts in zip(*batches))

    def loss(flat):
        parts = flat.split([param.numel() for param in params])
        values = {name: part.view_as(param) for name, part, param in zip(names, parts, params)}
        return F.cross_entropy(functional_call(model, values, pixels.double()), labels, label_smoothing=smoothing)

    whole = torch.func.hessian(loss)(torch.cat([param.flatten() for param in params]))
    masks = {name: mask for name, _, mask in masked_params(model)}
    free = [masks.get(name, torch.ones_like(param, dtype=torch.bool)) for name, param in zip(names, params)]
    kept = torch.cat([mask.flatten() for mask in free])
    return whole if all_weights else whole[kept][:, kept]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_largest_eigenvalue_is_the_exact_one(smoothing):
    batches = images(13)
    hessian = Hessian(network(), lambda: batches, torch.float64, smoothing)
    matrix = exact(network(), batches, smoothing)
    expected = torch.linalg.eigvalsh(matrix)[-1].item()
    found = top_eigenvalue(hessian, tolerance=1e-7, most=5000)
    assert found.converged and found.residual <= 1e-7 * found.value
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert hessian.size == len(matrix) and hessian.images == 13
    whole = torch.linalg.eigvalsh(exact(network(), batches, smoothing, all_weights=True))[-1].item()
    assert whole > 1.02 * expected, "pruned directions would change it"


def test_float32_is_near():
    batches = images(13)
    expected = torch.linalg.eigvalsh(exact(network(), batches))[-1].item()
    assert top_eigenvalue(Hessian(network(), lambda: batches), most=2000).value == pytest.approx(expected, rel=1e-3)


def test_the_trace_is_within_its_error_of_the_exact_one():
    batches = images(13)
    expected = exact(network(), batches).trace().item()
    found = trace(Hessian(network(), lambda: batches, torch.float64), samples=300)
    assert 0 < found.standard_error < 0.1 * expected and found.samples == 300
    assert abs(found.value - expected) < 4 * found.standard_error


def test_products_are_those_of_the_exact_hessian():
    """Column by column, pruned weights included: theirs are zero."""
    batches = images(7)
    hessian, matrix = Hessian(network(), lambda: batches, torch.float64), exact(network(), batches)
    free = torch.cat([mask.flatten() for mask in hessian.free])
    found = []
    for place in range(len(free)):
        unit = torch.zeros(len(free), dtype=torch.float64)
        unit[place] = 1
        parts = unit.split([param.numel() for param in hessian.params])
        column = hessian.product([part.view_as(param) for part, param in zip(parts, hessian.params)])
        found.append(torch.cat([part.flatten() for part in column]))
    columns = torch.stack(found)
    assert not columns[~free].any() and not columns[:, ~free].any()
    torch.testing.assert_close(columns[free][:, free], matrix, rtol=1e-9, atol=1e-12)


class Diagonal:
    """A Hessian known beforehand."""

    def __init__(self, *values: float):
        self.values = torch.tensor(values, dtype=torch.float64)

    def product(self, vector):
        return [self.values * vector[0]]

    def random(self, generator, signs):
        drawn = torch.randn(len(self.values), generator=generator, dtype=torch.float64)
        return [drawn.sign() if signs else drawn]


@pytest.mark.parametrize(
    ("values", "top"), [((5, -3, 1), 5), ((-5, 3, 1), 3), ((-5, -3, -1), -1), ((0, 0), 0), ((-4, 0, 0), 0)]
)
def test_the_most_positive_eigenvalue_is_found_whatever_the_signs(values, top):
    found = top_eigenvalue(Diagonal(*values), tolerance=1e-6, most=2000)
    assert found.converged and found.value == pytest.approx(top, abs=1e-5)


def test_an_iteration_that_ends_too_soon_says_so():
    found = top_eigenvalue(Diagonal(5, 4.99, 1), tolerance=1e-9, most=3)
    assert not found.converged and found.iterations == 3 and found.residual > 1e-9 * found.value
    assert min(abs(found.value - value) for value in (5, 4.99, 1)) <= found.residual


def test_the_trace_of_a_diagonal_is_exact():
    found = trace(Diagonal(5, -3, 1), samples=4)
    assert (found.value, found.standard_error) == (3, 0)
    assert math.isnan(trace(Diagonal(1), samples=1).standard_error)
    with pytest.raises(ValueError, match="at least 1"):
        trace(Diagonal(1), samples=0)


def test_figures_depend_on_the_seed_alone_and_leave_the_network_as_it_was():
    model, batches = network().train(), images(6)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first, again, other = (trace(Hessian(model, lambda: batches), 3, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert top_eigenvalue(Hessian(model, lambda: batches), 1) == top_eigenvalue(Hessian(model, lambda: batches), 1)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_what_has_no_hessian():
    with pytest.raises(ValueError, match="at least one image"):
        Hessian(network(), list)
    model = network()
    model[6].bias.data.fill_(math.nan)
    hessian = Hessian(model, lambda: images(3))
    with pytest.raises(RunError, match="the training loss is nan"):
        top_eigenvalue(hessian)
