"""One's own network and data through the Python API: masks, pruning, an ordinary training loop, a ticket."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import ROOT
from tests.processes import in_ranks
from utils.conv_type import density, insert_masks, keep_masked, masked_params
from utils.pruning_utils import CRITERIA, prune

# The README's own lines.
OWN_NETWORK = next(
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if "keep_masked" in block
)


def test_the_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(OWN_NETWORK, {})
    assert capsys.readouterr().out.split("\n")[:3] == ["0 1.0", "1 0.5", "2 0.25"]
    ticket = torch.load("ticket.pt", weights_only=True)
    for name in ("0.weight", "2.weight"):
        assert not ticket[name][~ticket[f"{name}_mask"]].any() and ticket[name].any()
    kept = sum(int(tensor.count_nonzero()) for name, tensor in ticket.items() if name.endswith("weight"))
    assert kept == (6400 + 1000) // 4


class Reader(nn.Module):
    """Classifies sequences of tokens; with LayerNorm behind the embedding, as in BERT."""

    def __init__(self, bag: bool = False, wrap=lambda logits: logits):
        super().__init__()
        self.bag, self.wrap = bag, wrap
        self.words = nn.EmbeddingBag(50, 16) if bag else nn.Embedding(50, 16, padding_idx=0)
        self.norm, self.hidden, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, tokens: Tensor):
        vectors = self.norm(self.words(tokens))
        return self.wrap(self.out(F.relu(self.hidden(vectors if self.bag else vectors.mean(1)))))


@pytest.fixture
def tokens() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [(torch.randint(50, (8, 7), generator=draws), torch.randint(5, (8,), generator=draws))]


def reader(**options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return insert_masks(Reader(**options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("method", CRITERIA)
def test_tokens(tokens, method, bag, dtype):
    """Every criterion scores a network that reads whole numbers."""
    model = reader(bag=bag)
    batches = [(inputs.to(dtype), labels) for inputs, labels in tokens]
    assert prune(model, method, 0.3, batches) == pytest.approx(0.3, abs=1e-3)
    assert all(mask.any() for _, _, mask in masked_params(model))


def test_snip_of_tokens_by_hand(tokens):
    """The scores are abs(gradient * weight) of the plain network."""
    model, plain = reader(), reader()
    (inputs, labels) = tokens[0]
    F.cross_entropy(plain(inputs), labels).backward()
    scores = torch.cat([(param.grad * param).abs().flatten() for _, param, _ in masked_params(plain)])
    prune(model, "snip", 0.25, tokens)
    kept = torch.cat([mask.flatten() for _, _, mask in masked_params(model)])
    assert torch.equal(kept.nonzero().flatten(), scores.topk(int(kept.sum())).indices.sort().values)


def test_synflow_sees_an_embedding_as_a_linear_layer(tokens):
    """One-hot vectors through a linear layer, and an input of ones: the same masks; and the words do not matter."""
    draws = torch.Generator().manual_seed(1)
    table = torch.randn(50, 16, generator=draws)
    first, second = (torch.randn(shape, generator=draws) for shape in ((32, 16), (5, 32)))

    def layers(start: nn.Module) -> nn.Module:
        model = nn.Sequential(start, nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 5, bias=False))
        model[1].weight.data, model[3].weight.data = first.clone(), second.clone()
        return insert_masks(model, exclude=["0"] if isinstance(start, nn.Linear) else [])

    embedding, linear = nn.Embedding.from_pretrained(table), nn.Linear(50, 16, bias=False)
    linear.weight.data = table.T.clone()
    found = []
    for start, inputs in ((embedding, torch.zeros(1, 1, dtype=torch.int64)), (embedding, torch.full((1, 1), 7)),
                          (linear, torch.zeros(1, 50))):  # fmt: skip
        model = layers(start)
        prune(model, "synflow", 0.2, [(inputs, torch.zeros(1, dtype=torch.int64))])
        found.append([mask for _, _, mask in masked_params(model)])
    for masks in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], masks))


class WithLogits:
    """As the outputs of transformers: an object that has the logits."""

    def __init__(self, logits: Tensor):
        self.logits, self.loss = logits, None


@pytest.mark.parametrize("wrap", [WithLogits, lambda logits: {"logits": logits, "loss": None}])
@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_outputs_that_have_logits(tokens, method, wrap):
    plain, model = reader(), reader(wrap=wrap)
    prune(plain, method, 0.3, tokens)
    prune(model, method, 0.3, tokens)
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(masked_params(plain), masked_params(model)))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda logits: (logits, None), "tuple"),
        (lambda logits: [logits], "list"),
        (lambda logits: {"scores": logits}, "dict"),
        (lambda logits: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_outputs_without_logits_are_refused(tokens, method, wrap, kind):
    model = reader(wrap=wrap)
    with pytest.raises(ValueError, match=f"{method} to density 0.3: the network returns a {kind}, .*logits"):
        prune(model, method, 0.3, tokens)
    assert density(model) == 1 and model.training


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.zeros(1)}, "dict"),
        ((torch.zeros(1, 3, dtype=torch.int64),), "tuple of 1"),
        ((torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1), torch.zeros(1)), "tuple of 3"),
        (torch.zeros(2, 3, dtype=torch.int64), "Tensor"),
        (([1, 2], [0]), "tuple of 2"),
    ],
)
def test_batches_that_are_not_pairs_are_refused(method, batch, kind):
    with pytest.raises(ValueError, match=rf"a batch must be two tensors, \(inputs, labels\), and is a {kind}$"):
        prune(reader(), method, 0.3, [batch])


def _sharded(ctx) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    told = "0.weight is split over processes"
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=told):
        insert_masks(model)
    model = insert_masks(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=told):
        keep_masked(optimizer, model)
    with pytest.raises(ValueError, match=told):
        prune(model, "mag", 0.5)
    assert density(model) == 1


def test_parameters_that_are_split_over_processes_are_refused():
    in_ranks(2, _sharded)


@pytest.mark.parametrize(
    ("exclude", "told"),
    [
        (
            ["conv1", "fc*"],
            "conv1 matches no layer; nothing left to prune with fc.*; layers are fc1.weight, ",
        ),
        (["conv1"], "conv1 matches no layer; layers are fc1.weight, fc2.weight"),
        (["fc1", "fc2"], "nothing left to prune with fc1, fc2; layers are fc1.weight, fc2.weight"),
    ],
)
def test_patterns_that_leave_nothing_name_the_layers(exclude, told):
    model = nn.Sequential()
    model.fc1, model.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)
    with pytest.raises(ValueError, match=f"^prune_params.exclude: {told}"):
        insert_masks(model, exclude)
