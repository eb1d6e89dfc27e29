"""Figures of utils/analysis: tables worked by hand, known landscapes, and random masks against simulation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.analysis.barrier import (
    along_line,
    alphas,
    barrier,
    evaluate,
    interpolated,
    recompute_statistics,
    whole_batches,
    with_masks,
)
from utils.analysis.command import table_text
from utils.analysis.overlap import expected_both, iou, overlap_rows
from utils.analysis.signs import sign_rows
from utils.errors import DataError

# --- overlap and signs -----------------------------------------------------------------------------------------------


def mask(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_overlap_worked_by_hand():
    """Layers of 4 and 8 weights: A keeps 2 and 4 of them, B 2 and 2; 1 and 2 in common."""
    a = {"x": mask("1100"), "y": mask("11110000")}
    b = {"x": mask("1010"), "y": mask("11000000")}
    whole, x, y = overlap_rows(a, b, ("A", "B"))
    assert x | {"layer": "x"} == {
        "layer": "x", "total": 4, "kept_a": 2, "kept_b": 2, "both": 1, "iou": 1 / 3, "share_of_a": 0.5,
        "share_of_b": 0.5, "random_both": 1.0, "random_iou": 1 / 3, "layerwise_both": 1.0, "layerwise_iou": 1 / 3,
    }  # fmt: skip
    assert (y["both"], y["iou"], y["share_of_a"], y["share_of_b"], y["random_both"]) == (2, 0.5, 0.5, 1.0, 1.0)
    assert y["random_iou"] == 1 / 5
    # 12 weights, 6 and 4 kept, 3 in common; at random 6 * 4 / 12 = 2; layer by layer 1 + 1 = 2.
    assert (whole["layer"], whole["total"], whole["kept_a"], whole["kept_b"], whole["both"]) == ("all", 12, 6, 4, 3)
    assert (whole["iou"], whole["random_iou"], whole["layerwise_iou"]) == (3 / 7, 2 / 8, 2 / 8)


def test_layers_alone_make_masks_agree():
    """Both keep all of one layer and nothing of the other: far above random over the network, as random within it."""
    a = {"x": torch.ones(10, dtype=torch.bool), "y": torch.zeros(90, dtype=torch.bool)}
    whole, _, y = overlap_rows(a, dict(a), ("A", "B"))
    assert (whole["both"], whole["random_both"], whole["layerwise_both"], whole["layerwise_iou"]) == (10, 1.0, 10.0, 1)
    assert math.isnan(y["iou"]) and math.isnan(y["share_of_a"])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 400), st.data())
def test_random_masks_have_what_is_expected(total, data):
    kept_a, kept_b = (data.draw(st.integers(1, total)) for _ in "ab")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    draws = 2000
    order = torch.rand(draws, total, generator=generator).argsort(1)  # A keeps the first ones: B's places in A
    both = (order[:, :kept_b] < kept_a).sum(1).double()
    expected = expected_both(total, kept_a, kept_b)
    # Six standard errors, of the hypergeometric distribution's variance.
    share = kept_a / total
    variance = kept_b * share * (1 - share) * (total - kept_b) / max(1, total - 1)
    assert abs(float(both.mean()) - expected) <= 6 * math.sqrt(variance / draws) + 1e-9
    ratios = both / (kept_a + kept_b - both)
    assert abs(float(ratios.mean()) - iou(expected, kept_a, kept_b)) <= 6 * float(ratios.std()) / draws**0.5 + 1 / total


def test_masks_of_other_networks_are_refused():
    a = {"x": mask("11")}
    for b in ({"x": mask("111")}, {"y": mask("11")}):
        with pytest.raises(DataError, match="A and B are different networks: x"):
            overlap_rows(a, b, ("A", "B"))


def test_signs_worked_by_hand():
    """Of 4 weights 3 are kept, of which 2 have their initial sign; the pruned one, now 0, does not count."""
    masks = {"x": mask("1110"), "y": mask("00")}
    end = {"x": torch.tensor([1.0, -2.0, 3.0, 0.0]), "y": torch.zeros(2)}
    init = {"x": torch.tensor([0.1, 0.2, 0.3, 0.4]), "y": torch.ones(2)}
    rewind = {"x": torch.tensor([0.1, -0.2, 0.3, 0.4]), "y": torch.ones(2)}
    whole, x, y = sign_rows(masks, end, {"init": init, "rewind": rewind})
    assert whole == x | {"layer": "all", "total": 6}
    assert x == {"layer": "x", "total": 4, "kept": 3, "same_init": 2, "share_init": 2 / 3,
                 "same_rewind": 3, "share_rewind": 1.0}  # fmt: skip
    assert y["kept"] == 0 and math.isnan(y["share_init"])


# --- barriers --------------------------------------------------------------------------------------------------------


def test_barrier_worked_by_hand():
    assert barrier([10.0, 30.0, 20.0]) == 15.0  # 30 - (10 + 20) / 2
    assert barrier([20.0, 5.0, 10.0]) == 5.0  # the highest point is an end
    assert barrier([7.0, 7.0]) == 0
    assert alphas(5) == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="at least 2"):
        alphas(1)


def test_line_between_states():
    a = {"w": torch.tensor([0.0, 2.0]), "w_mask": mask("01"), "n": torch.tensor(3)}
    b = {"w": torch.tensor([4.0, 0.0]), "w_mask": mask("10"), "n": torch.tensor(9)}
    middle = interpolated(a, b, 0.25)
    assert middle["w"].tolist() == [1.0, 1.5] and middle["n"] == 3
    for end, alpha in ((a, 0.0), (b, 1.0)):
        assert torch.equal(interpolated(a, b, alpha)["w"], end["w"])
    with pytest.raises(DataError, match=r"A and B have different masks \(1 of 1 layers\); --union"):
        with_masks(a, b, ("A", "B"), union=False)
    united = with_masks(a, b, ("A", "B"), union=True)
    assert all(state["w_mask"].tolist() == [True, True] for state in united)


def batches_of(images: torch.Tensor, labels: torch.Tensor, size: int):
    return lambda: zip(images.split(size), labels.split(size))


@pytest.fixture
def images():
    """200 points of 6 numbers in 3 classes, linearly almost separable."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 6, generator=generator)
    return points, (points[:, :3] + 0.3 * torch.randn(200, 3, generator=generator)).argmax(1)


def random_state(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(t.shape, generator=generator) + 0.1 if "var" in name
        else torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_logistic_regression_has_no_barrier(images, seed):
    """Its loss is convex: on the line it is nowhere above the chord, so the barrier is half the ends' difference."""
    model = nn.Linear(6, 3)
    a, b = (random_state(model, 2 * seed + n) for n in range(2))
    line = list(along_line(model, a, b, alphas(21), batches_of(*images, 64), None))
    first, last = line[0].loss, line[-1].loss
    assert all(point.loss <= (1 - point.alpha) * first + point.alpha * last + 1e-5 for point in line)
    assert barrier([point.loss for point in line]) == pytest.approx(abs(first - last) / 2)


def test_permuted_hidden_units_have_the_barrier_worked_by_hand():
    """|x| = relu(x) + relu(-x), and the same function with its two units exchanged.

    Halfway both units have the weight 0: the logits are the biases alone, every image falls into class 0. Of points
    at distance 2 (class 1) and at 0 (class 0), half of all, the error goes from 0 to 50%, and the loss likewise.
    """
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    state = {
        "0.weight": torch.tensor([[1.0], [-1.0]]), "2.weight": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "2.bias": torch.tensor([0.0, -1.0]),
    }  # fmt: skip
    exchanged = {**state, "0.weight": state["0.weight"].flip(0), "2.weight": state["2.weight"].flip(1)}
    points, labels = torch.tensor([[2.0], [-2.0], [0.0], [0.0]]), torch.tensor([1, 1, 0, 0])
    line = list(along_line(model, state, exchanged, alphas(3), batches_of(points, labels, 3), None))
    assert [point.error for point in line] == [0.0, 50.0, 0.0]
    assert barrier([point.error for point in line]) == 50
    # At the ends all logits are 0 and +-1, the right one larger by 1; halfway class 0 has 0 and class 1 has -1.
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert [point.loss for point in line] == pytest.approx([right, (right + wrong) / 2, right])


class WithNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.1), nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))


def test_a_network_and_itself_have_no_barrier(images):
    model = WithNorms()
    state = random_state(model, 3)
    data = batches_of(*images, 64)
    line = list(along_line(model, state, dict(state), alphas(7), data, data))
    assert len({(point.loss, point.error) for point in line}) == 1  # to the last bit
    assert barrier([point.loss for point in line]) == barrier([point.error for point in line]) == 0


def test_recomputed_statistics_are_means_over_images(images):
    """Batches of 64, 64, 64 and 8 images, each weighted by its size; dropout stays off, momentum comes back."""
    model, (points, labels) = WithNorms(), images
    model.load_state_dict(random_state(model, 3))
    recompute_statistics(model, batches_of(points, labels, 64)())
    hidden = [model.first(part).detach() for part in points.split(64)]
    mean = sum(len(part) * part.mean(0) for part in hidden) / 200
    variance = sum(len(part) * part.var(0) for part in hidden) / 200
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.momentum == 0.1 and not any(module.training for module in model.modules())


def test_interpolated_statistics_differ_from_recomputed_ones(images):
    model = WithNorms()
    a, b = random_state(model, 1), random_state(model, 2)
    data = batches_of(*images, 64)
    middle = [next(along_line(model, a, b, [0.5], data, how)) for how in (None, data)]
    assert middle[0].loss != middle[1].loss
    model.load_state_dict(interpolated(a, b, 0.5))
    assert (middle[0].loss, middle[0].error) == evaluate(model, data())


def test_whole_batches_until_there_are_enough_images(images):
    data = batches_of(*images, 64)
    sizes = {n: [len(labels) for _, labels in whole_batches(data(), n)] for n in (0, 1, 64, 65, 1000)}
    assert sizes == {0: [64, 64, 64, 8], 1: [64], 64: [64], 65: [64, 64], 1000: [64, 64, 64, 8]}


def test_evaluation_worked_by_hand():
    """Weights of 0: each of 3 classes has probability 1/3, and class 0 is chosen, right for 1 of 4 images."""
    model = nn.Linear(2, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    loss, error = evaluate(model, batches_of(torch.ones(4, 2), torch.tensor([0, 1, 2, 2]), 3)())
    assert (loss, error) == (pytest.approx(math.log(3)), 75.0)


# --- tables on the screen --------------------------------------------------------------------------------------------


def test_tables_are_at_most_100_columns_wide():
    import pandas as pd

    name = "features.denseblock3.denselayer12.conv2.weight"
    frame = pd.DataFrame({"run": ["experiments/study/" + 60 * "x" + "_seed0"], "layer": [name], "density": [1 / 3]})
    text = table_text(frame)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" in text and "_seed0" in text and "conv2.weight" in text and "0.3333" in text
    short = pd.DataFrame({"layer": ["fc1"], "iou": [float("nan")]})
    assert table_text(short).split() == ["layer", "iou", "fc1", "-"]
