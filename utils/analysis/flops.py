"""Multiply-adds of one image, dense and of kept weights alone, and bytes of a checkpoint, dense and sparse.

A weight of a convolution is used once per output position, one of a linear layer once per token: an image makes
sum(uses * weights) multiply-adds (He et al. 2015 call them FLOPs; a multiply-add is two floating-point operations).
Zeros of the padding count as pixels, as is usual. Bias, normalisation, activation and pooling do not count. Of a sparse
network only the kept weights' products are needed; ordinary kernels compute them all, and take a dense network's time.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from utils.conv_type import MASK_SUFFIX

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
WITH_WEIGHT = (F.linear, *CONVOLUTIONS, *TRANSPOSED)
# Functions, operators and methods, each of which a network may call.
MATRIX_PRODUCTS = (
    torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__,
)  # fmt: skip
VALUE_BYTES = 4  # float32
INDEX_BYTES = 4  # of a column or a row pointer: 32-bit, as in cuSPARSE and SciPy


@dataclass(frozen=True)
class Uses:
    """How often each weight of a network enters a product, for one image.

    Attributes:
        weights: {state_dict name: uses of each weight of this parameter}, of the network's convolutions, linear layers
            and attention projections, in model order.
        activations: multiply-adds of products without weights: attention, and fixed filters such as BlurPool's.
    """

    weights: dict[str, int]
    activations: int


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one parameter for one image.

    Attributes:
        name: in the state_dict.
        uses: of each weight, for one image.
        weights, kept: numbers of weights.
        masked: whether it has a mask; without one all weights are kept.
    """

    name: str
    uses: int
    weights: int
    kept: int
    masked: bool

    @property
    def multiply_adds(self) -> int:
        return self.uses * self.weights

    @property
    def kept_multiply_adds(self) -> int:
        return self.uses * self.kept


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a checkpoint's tensors, masks counted only as far as a format needs them.

    Attributes:
        dense: float32 for all weights and statistics; integers as they are.
        sparse: each masked parameter, as a matrix of one row per output, as compressed sparse rows (CSR): a float32 and
            a column index of `INDEX_BYTES` per kept weight, and a row pointer of as many bytes per row and one more.
        bitmask: each masked parameter as one bit per weight and a float32 per kept weight.
    """

    dense: int
    sparse: int
    bitmask: int


def weight_uses(model: nn.Module, image_shape: tuple[int, int, int]) -> Uses:
    """How often each weight is used for one image of this shape; the model may be on the meta device.

    One image of zeros is passed through the model in eval mode. The model stays as it was.
    """
    counter = _Counter({id(param): name for name, param in model.named_parameters()})
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), counter:
            model.eval()(torch.zeros((1, *image_shape), device=next(model.parameters()).device))
    finally:
        for module, training in modes:
            module.training = training
    ordered = {name: counter.uses[name] for name, _ in model.named_parameters() if name in counter.uses}
    return Uses(ordered, counter.activations)


class _Counter(TorchFunctionMode):
    """Counts products while it is entered. Functions are watched, not modules: attention calls some layers' own.

    Args:
        names: {id of a parameter: its name}.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names = names
        self.uses: defaultdict[str, int] = defaultdict(int)
        self.activations = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._attention(*args, **kwargs)
            return func(*args, **kwargs)  # its own products are counted here, not again within
        out = func(*args, **kwargs)
        if func in WITH_WEIGHT:
            images, weight = (_argument(args, kwargs, k, name) for k, name in enumerate(("input", "weight")))
            if func is F.linear:
                self._add(weight, images.numel() // images.shape[-1])
            else:
                self._add(weight, math.prod((images if func in TRANSPOSED else out).shape[2:]))
        elif func in MATRIX_PRODUCTS:
            self.activations += out.numel() * args[0].shape[-1]
        elif func is torch.einsum:
            self.activations += _einsum_products(*args)
        elif func is F.scaled_dot_product_attention:
            query, key, value = (_argument(args, kwargs, k, name) for k, name in enumerate(("query", "key", "value")))
            self.activations += query.numel() * key.shape[-2] + out.numel() * value.shape[-2]
        return out

    def _add(self, weight: Tensor, uses: int) -> None:
        if id(weight) in self.names:
            self.uses[self.names[id(weight)]] += uses
        else:
            self.activations += uses * weight.numel()

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, *args, **kwargs) -> None:
        """Projections and products of `multi_head_attention_forward`; (tokens, 1, features) or (tokens, features)."""
        tokens, sources = query.shape[0], key.shape[0]
        packed, out_weight = args[1], args[7]
        if kwargs.get("use_separate_proj_weight"):
            for name, count in (("q", tokens), ("k", sources), ("v", sources)):
                self._add(kwargs[f"{name}_proj_weight"], count)
        else:
            # Three projections in one parameter. For self-attention each is of the same tokens; else the mean is used.
            self._add(packed, (tokens + 2 * sources) // 3)
        self._add(out_weight, tokens)
        self.activations += 2 * tokens * sources * embed_dim


def _einsum_products(equation: str, *operands: Tensor) -> int:
    """Multiply-adds of a product of two tensors: one per combination of all indices; 0 if they are not two.

    Raises:
        ValueError: the equation has an ellipsis.
    """
    if "..." in equation:
        raise ValueError(f"torch.einsum({equation!r}): an ellipsis is not counted here")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes = {index: size for term, operand in zip(terms, operands) for index, size in zip(term, operand.shape)}
    return math.prod(sizes.values()) if len(operands) == 2 else 0


def _argument(args: tuple, kwargs: Mapping, place: int, name: str) -> Tensor:
    return args[place] if len(args) > place else kwargs[name]


def layer_costs(uses: Uses, state: Mapping[str, Tensor]) -> list[LayerCost]:
    """The cost of each parameter that is used in products, with the masks of a state_dict."""
    costs = []
    for name, count in uses.weights.items():
        mask = state.get(name + MASK_SUFFIX)
        weights = state[name].numel()
        costs.append(LayerCost(name, count, weights, weights if mask is None else _kept(mask), mask is not None))
    return costs


def stored_bytes(state: Mapping[str, Tensor]) -> StoredBytes:
    """Bytes of the tensors of a state_dict in three formats; names and headers of a file are not counted."""
    dense = sparse = bitmask = 0
    for name, tensor in state.items():
        if name.endswith(MASK_SUFFIX) and name.removesuffix(MASK_SUFFIX) in state:
            continue
        whole = tensor.numel() * (VALUE_BYTES if tensor.is_floating_point() else tensor.element_size())
        mask = state.get(name + MASK_SUFFIX)
        dense += whole
        if mask is None:
            sparse, bitmask = sparse + whole, bitmask + whole
            continue
        kept, rows = _kept(mask), mask.shape[0]
        sparse += kept * (VALUE_BYTES + INDEX_BYTES) + (rows + 1) * INDEX_BYTES
        bitmask += kept * VALUE_BYTES + -(-mask.numel() // 8)
    return StoredBytes(dense, sparse, bitmask)


def _kept(mask: Tensor) -> int:
    return int(mask.count_nonzero())
