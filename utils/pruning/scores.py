"""Criteria: one function each, from a model to one score tensor per masked parameter. The largest scores are kept.

Every function takes ``(model, masks, inputs)`` and returns scores of the masked parameters' shapes, in `masked_params`
order; scores of pruned weights do not matter. None of them changes anything: the network is called on copies or views
of its own tensors (`functional_call`), so that weights, BN statistics and ``.grad`` are never written. `prune` calls
them within `scoring`, which sets eval mode and restores modes and random states, after an exception too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from utils.conv_type import masked_params

SYNFLOW_ROUNDS = 100
GRASP_TEMPERATURE = 200.0
# Images per forward pass of snip and grasp: a global batch of ImageNet training would not fit into one GPU.
SCORE_IMAGES = 128


Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What a criterion may use besides the model.

    Attributes:
        batches: re-iterable of (images, labels) on the model's device.
        generator: source of the random methods.
        dtype: snip and grasp compute in it; None is the weights' own, at least float32.
        rounds: of synflow.

    Raises:
        ValueError: a dtype that is neither float32 nor float64, or no round.
    """

    batches: Batches = ()
    generator: torch.Generator | None = None
    dtype: torch.dtype | None = None
    rounds: int = SYNFLOW_ROUNDS

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"prune_params.score_dtype: {self.dtype} is not allowed: float32 or float64")
        if self.rounds < 1:
            raise ValueError(f"prune_params.synflow_rounds: {self.rounds} is not allowed: at least 1")


Scores = Callable[[nn.Module, Sequence[Tensor], Inputs], list[Tensor]]


def mag_scores(model: nn.Module, masks: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """abs(w): Frankle & Carbin 2019, after Han et al. 2015."""
    wide = [param.detach().to(_wide(param)) for _, param, _ in masked_params(model)]
    return [weight.abs() for weight in wide]


def random_scores(model: nn.Module, masks: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """U(0, 1), drawn on the CPU so that a seed gives the same masks on any device.

    The draws come from a generator that is seeded by one number from `inputs.generator`, not from `inputs.generator`
    itself: if that were seeded like the model, its stream would be the one that initialised the weights, and the
    "random" masks would be a function of the weights. Without a generator, a new one with torch's initial seed is used;
    the global one is not drawn from.
    """
    source = inputs.generator or torch.Generator().manual_seed(torch.initial_seed())
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))
    draws = torch.Generator().manual_seed(seed)
    return [torch.rand(mask.shape, generator=draws).to(mask.device) for mask in masks]


def snip_scores(model: nn.Module, masks: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """abs(g * w), g the gradient of the cross-entropy summed over `inputs.batches` (Lee et al. 2019).

    The paper's dL/dc for a multiplier c = 1 on each weight is g * w. BN is in eval mode. Memory: three times the model
    (weights, sum of gradients, gradients of `SCORE_IMAGES` images), and the activations of so many images.
    """
    state, leaves = _leaves(model, inputs.dtype)
    grads = _summed_gradients(model, state, leaves, inputs)
    return [grad.mul_(leaf.detach()).abs_() for grad, leaf in zip(grads, leaves)]


def grasp_scores(model: nn.Module, masks: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """w * Hg, g the gradient and H the Hessian of the cross-entropy of logits / 200 (Wang et al. 2020).

    The paper removes the weights with the largest -w * Hg, so those with the largest w * Hg are kept. Both g and Hg are
    sums over all of `inputs.batches`: with B batches, g = sum g_b first, then Hg = sum H_b g. BN is in eval mode.
    Memory: three times the model for up to `SCORE_IMAGES` images, four times for more, and the activations of a forward
    and two backwards of so many images.
    """
    state, leaves = _leaves(model, inputs.dtype)
    stopped = _summed_gradients(model, state, leaves, inputs, GRASP_TEMPERATURE)
    product: list[Tensor] = []
    for loss in _losses(model, state, leaves, inputs, GRASP_TEMPERATURE):
        hessian_vector = _double_backward(loss, leaves, stopped)
        if product:
            torch._foreach_add_(product, hessian_vector)
        else:
            product = hessian_vector
    return [each.mul_(leaf.detach()) for each, leaf in zip(product, leaves)]


def synflow_scores(model: nn.Module, masks: Sequence[Tensor], inputs: Inputs) -> list[Tensor]:
    """One round of abs(dR/dw * w), R the sum of the outputs for one input of ones (Tanaka et al. 2020).

    As in the authors' code every parameter and every floating buffer (BN's running means) is replaced by its absolute
    value and BN is in eval mode. In float64, since R grows by the fan-in of every layer and overflows float32. Weights
    are multiplied by `masks`, which change from round to round. Of the images only the shape is used, of the labels
    nothing. Memory: float64 copies of the model and of its gradients, each twice a float32 model.

    Two cases that the networks of the paper do not have would make every score zero:

    - A clipped ReLU (ReLU6 in MobileNet) is taken as ReLU: the flow is far above 6 and would stop there. The theory
      asks for a network that is linear for positive activations.
    - A layer whose weights are all zero, as torchvision's ViT initialises its classifier, counts as if initialised at
      random (fixed seed). How large it is scales the scores of all layers alike if all flow goes through it.

    Integer inputs (tokens) cannot be ones: the network gets the first of them as it is. An embedding is a linear layer
    of one-hot vectors, so an input of ones makes it give the sum of its rows, whatever the token.
    """
    images = next((images for images, _ in _pairs(inputs, labelled=False)), None)
    if images is None:
        raise ValueError(NO_BATCH)
    state, leaves = _leaves(model, torch.float64, absolute=True)
    for leaf, mask in zip(leaves, masks):
        leaf.detach().mul_(mask.double())  # mul_ by the bool mask is not vectorised
    sums = torch.stack([leaf.detach().sum() for leaf in leaves]).tolist()
    for leaf, mask, total in zip(leaves, masks, sums):
        if total == 0:
            # Not a constant: a LayerNorm's output sums to zero, so its flow through equal weights would be zero.
            stand_in = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            leaf.detach().copy_(stand_in.abs_()).mul_(mask)
    if images.is_floating_point():
        ones = torch.ones((1, *images.shape[1:]), dtype=torch.float64, device=images.device)
    else:
        ones = images[:1]
    with _LinearFlow():
        flow = _call(model, state, ones).sum()
    grads = torch.autograd.grad(flow, leaves, allow_unused=True, materialize_grads=True)
    return [grad.mul_(leaf.detach()).abs_() for grad, leaf in zip(grads, leaves)]


# --- how the network is called ---------------------------------------------------------------------------------------

NO_BATCH = "batches gave no (images, labels); an iterator can be read only once, a list as often as needed"


def _wide(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, or float32 if that is wider: no score is computed or compared in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _LinearFlow(TorchFunctionMode):
    """Within it relu6 and hardtanh, as functions or as modules, are relu; an embedding gives the sum of its rows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.relu6, F.hardtanh, F.hardtanh_):
            return F.relu(args[0])
        out = func(*args, **(kwargs or {}))
        if func in (F.embedding, torch.embedding, F.embedding_bag):
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            rows = next(tensor for tensor in tensors if tensor.is_floating_point())
            return rows.sum(0).expand_as(out)
        return out


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode, eager execution and full precision; restores modes, random states and precision afterwards."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    matmul_precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        # Batches may come from a DataLoader, which draws from the global generator when iteration starts.
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(True, False, deterministic=True, allow_tf32=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels cannot be differentiated twice
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # nor can compiled graphs
        try:
            if matmul_precision != "highest":
                # Only if needed: setting it, even to its own value, changes state that compiled graphs are guarded by.
                torch.set_float32_matmul_precision("highest")
                stack.callback(torch.set_float32_matmul_precision, matmul_precision)
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def _leaves(
    model: nn.Module, dtype: torch.dtype | None, absolute: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(All tensors of the model by name, detached and in `dtype`; those under masks, which require gradients).

    Tensors that have the dtype already are views and take no memory; `absolute` copies all. A tensor that several
    modules share is one tensor here too, under each of its names; see `_call`.
    """
    state, by_id = {}, {}
    for prefix, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is None:
                continue
            if id(tensor) not in by_id:
                copy = tensor.detach()
                if tensor.is_floating_point():
                    copy = copy.to(dtype or _wide(tensor))
                    copy = copy.abs() if absolute else copy
                by_id[id(tensor)] = copy
            state[f"{prefix}.{name}" if prefix else name] = by_id[id(tensor)]
    leaves = [by_id[id(param)].requires_grad_() for _, param, _ in masked_params(model)]
    return state, leaves


def _call(model: nn.Module, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The model's output with the tensors of `state` in place of its own.

    `state` names every tensor of every module. If functional_call tied weights itself, it would swap the tensors of a
    module that has two names twice, and leave one of ours in the model.
    """
    return _logits(functional_call(model, state, (images,), tie_weights=False))


def _logits(output: object) -> Tensor:
    """The tensor that a network gives: its output, or the entry or attribute `logits` of its output."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the network returns a {type(output).__name__}, and a criterion needs one tensor of logits, or an output "
            "with `logits`: give prune a network whose forward returns them, such as a wrapper of this one"
        )
    return found


def _pairs(inputs: Inputs, labelled: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, checked: each is two tensors; labels that are not used (not `labelled`) may be anything."""
    for batch in inputs.batches:
        several = isinstance(batch, tuple | list)
        if not several or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch[: 1 + labelled]):
            size = f" of {len(batch)}" if several else ""
            raise ValueError(f"a batch must be two tensors, (inputs, labels), and is a {type(batch).__name__}{size}")
        yield batch[0], batch[1]


def _losses(
    model: nn.Module, state: dict[str, Tensor], leaves: Sequence[Tensor], inputs: Inputs, temperature: float
) -> Iterator[Tensor]:
    """Losses of parts of at most `SCORE_IMAGES` images, which add up to the mean cross-entropy of each batch, summed.

    BN in eval mode does not couple images, so parts only bound the memory. A BN without running statistics does, and
    then a batch is one part. The graph of a part is freed before the next is made if the caller drops the loss.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    coupled = any(norm.running_mean is None for norm in norms)
    loss = None
    for images, labels in _pairs(inputs):
        size = len(images) if coupled else SCORE_IMAGES
        for part, answers in zip(images.split(size), labels.split(size)):
            part = part.to(leaves[0].dtype) if part.is_floating_point() else part  # tokens stay whole numbers
            logits = _call(model, state, part)
            loss = F.cross_entropy(logits / temperature, answers, reduction="sum") / len(labels)
            del logits
            yield loss
    if loss is None:
        raise ValueError(NO_BATCH)


def _summed_gradients(
    model: nn.Module, state: dict[str, Tensor], leaves: Sequence[Tensor], inputs: Inputs, temperature: float = 1.0
) -> list[Tensor]:
    total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
    for loss in _losses(model, state, leaves, inputs, temperature):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(total, grads)
    return total


def _double_backward(loss: Tensor, leaves: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v = d(g . v)/dw for the Hessian H and gradient g of `loss`, v held constant."""
    grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    # The gradient of an unused weight is a constant zero. Of the others only the graph is needed, not the values.
    pairs = [(get_gradient_edge(grad), v) for grad, v in zip(grads, vector) if grad.requires_grad]
    del grads
    if not pairs:
        return [torch.zeros_like(v) for v in vector]
    edges, vectors = zip(*pairs)
    product = torch.autograd.grad(edges, leaves, grad_outputs=vectors, allow_unused=True, materialize_grads=True)
    return list(product)
