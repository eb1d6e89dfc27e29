"""Masks: where they are stored, how they are applied, and their density.

A mask is a bool buffer beside the parameter it masks, named ``<param>_mask`` as in ``torch.nn.utils.prune``. Layers
keep their class, initialisation and forward: the *weight itself* is kept masked, by one fused multiply after every
optimizer step (`keep_masked`). For the kept weights this is the same arithmetic as multiplying by the mask in the
forward, so the trajectories agree bit for bit (tests/test_masks.py), while the forward costs what a dense one costs and
a checkpoint's weights load into plain torchvision models.

Masks alone do not keep a weight at zero: name the optimizer to `keep_masked`, or the next step makes the network dense.

    insert_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_masked(optimizer, model)                       # from now on pruned weights stay zero
    prune(model, "mag", 0.1)                            # utils.pruning_utils
"""

import copy
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

MASK_SUFFIX = "_mask"


def _maskable(module: nn.Module) -> list[str]:
    """Names of the parameters of `module` itself (not of its children) that can be masked."""
    if isinstance(module, _ConvNd | nn.Linear):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        # One packed matrix, or three if key and value have sizes of their own; out_proj is a Linear child.
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [name for name in names if getattr(module, name) is not None]
    if isinstance(module, nn.RNNBase):  # weight_ih_l0, weight_hh_l0, ...: LSTM, GRU, RNN; masks change them in place
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return []


def insert_masks(model: nn.Module, exclude: Sequence[str] = ()) -> nn.Module:
    """Register an all-ones bool buffer beside every weight of Conv*, Linear, LSTM, GRU and RNN, and in_proj_weight.

    Embeddings, norms, biases and parameters of one's own modules stay dense: `unmasked_params` lists them. Existing
    masks stay as they are. A parameter that two modules share gets one mask, at its first name, the only one that
    `masked_params` and ``model.parameters()`` list.

    Args:
        exclude: name patterns (shell-style, matched against the state_dict name of the weight and of its layer) of
            layers to leave dense.

    Returns:
        the same model.

    Raises:
        TypeError: `exclude` is one string, whose letters would be taken for patterns.
        ValueError: a pattern matches no layer, or one that has a mask already; nothing is left to mask; a weight is
            computed from other parameters (torch.nn.utils.parametrize), which a mask would not reach; or it is split
            over processes (`check_whole`).
    """
    if isinstance(exclude, str | bytes):
        raise TypeError(f"exclude: {exclude!r} is not allowed: a list of patterns, such as [{exclude!r}]")
    unused, seen, excluded = set(exclude), set(), set()
    found = []
    for prefix, module in model.named_modules():
        for name in _maskable(module):
            full = f"{prefix}.{name}" if prefix else name
            hits = {pattern for pattern in exclude if matches(full, pattern)}
            unused -= hits
            param = getattr(module, name)
            if hits:  # a shared parameter: by any of its names
                excluded.add(id(param))
            found.append((full, module, name, param))
    for full, module, name, param in found:
        masked = getattr(module, name + MASK_SUFFIX, None) is not None
        if id(param) in excluded:
            if masked:
                raise ValueError(f"prune_params.exclude: {full} has a mask already")
            continue
        check_whole(full, param)
        if not isinstance(param, nn.Parameter):
            raise ValueError(f"{full} is no parameter but made from others: it cannot be masked; exclude its layer")
        if id(param) not in seen and not masked:
            module.register_buffer(name + MASK_SUFFIX, torch.ones_like(param, dtype=torch.bool))
        seen.add(id(param))
    _check_excluded(unused, set(exclude) - unused, [full for full, _, _, _ in found], bool(seen))
    return model


def _check_excluded(unused: set[str], used: set[str], layers: list[str], any_left: bool) -> None:
    """Raises ValueError if patterns of `insert_masks` match no layer, or no layer is left to prune."""
    if not layers:
        raise ValueError("the model has no layer to prune")
    faults = [f"{', '.join(sorted(unused))} matches no layer"] if unused else []
    faults += [] if any_left else [f"nothing left to prune with {', '.join(sorted(used))}"]
    if faults:
        raise ValueError(f"prune_params.exclude: {'; '.join(faults)}; layers are {', '.join(layers)}")


def check_whole(name: str, param: Tensor) -> None:
    """Raises ValueError if the parameter is a DTensor: pruning compares whole weights."""
    if hasattr(param, "full_tensor"):  # told by what it has: utils/distributed.py alone imports torch.distributed
        raise ValueError(
            f"{name} is split over processes (a DTensor, as fully_shard makes it), which masks do not support: use "
            "DistributedDataParallel"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits the state_dict name of a parameter, or of its layer."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def masked_params(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yields (state_dict name of the parameter, parameter, its bool mask of the same shape), in model order."""
    for prefix, module in model.named_modules():
        for name in _maskable(module):
            mask = getattr(module, name + MASK_SUFFIX, None)
            if mask is not None:
                yield (f"{prefix}.{name}" if prefix else name), getattr(module, name), mask


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """param *= mask, in place, for every masked parameter.

    Hooks of `keep_masked` read the masks anew at their next step. Call it after a change of a mask that torch does not
    see: through ``mask.data`` or ``mask.numpy()``.

    Raises:
        ValueError: a parameter is split over processes (`check_whole`).
    """
    for name, param, _ in masked_params(model):
        check_whole(name, param)
    pairs = [(param, mask) for _, param, mask in masked_params(model)]
    if pairs:
        torch._foreach_mul_([param.data for param, _ in pairs], [mask for _, mask in pairs])
        torch.autograd.graph.increment_version([mask for _, mask in pairs])


@torch.no_grad()
def check_masked(model: nn.Module) -> None:
    """Check that the pruned weights are zero. `density` counts masks alone, and cannot tell.

    Raises:
        ValueError: the model has no masks, or a layer has pruned weights that are not zero; names each with its number.
    """
    entries = list(masked_params(model))
    if not entries:
        raise ValueError("the model has no masks: call insert_masks first")
    counts = kept_counts([(param != 0) & ~mask for _, param, mask in entries])
    faults = [f"{name} ({count})" for (name, _, _), count in zip(entries, counts) if count]
    if faults:
        raise ValueError(
            f"pruned weights are not zero in {', '.join(faults)}: apply_masks makes them zero once, "
            "keep_masked(optimizer, model) after every step of that optimizer"
        )


def unmasked_params(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(state_dict name, parameter) of the parameters without a mask, which stay dense: the largest first."""
    masked = {id(param) for _, param, _ in masked_params(model)}
    rest = [(name, param) for name, param in model.named_parameters() if id(param) not in masked]
    return sorted(rest, key=lambda entry: -entry[1].numel())


def coverage(model: nn.Module) -> float:
    """Parameters that have a mask over all parameters, 0..1: the part of the network that `density` speaks of."""
    total = sum(param.numel() for param in model.parameters())
    return sum(param.numel() for _, param, _ in masked_params(model)) / max(1, total)


def density(model: nn.Module) -> float:
    """Kept weights over all weights, 0..1, of the masked parameters (biases and BN do not count).

    It counts the masks: `check_masked` says whether the weights agree, `coverage` how much of the network has masks.

    Raises:
        ValueError: the model has no masks.
    """
    masks = [mask for _, _, mask in masked_params(model)]
    if not masks:
        raise ValueError("the model has no masks: call insert_masks first")
    return density_of(masks)


def density_of(masks: Sequence[Tensor]) -> float:
    """Ones over all entries of `masks`, 0..1."""
    return sum(kept_counts(masks)) / sum(mask.numel() for mask in masks)


def kept_counts(masks: Sequence[Tensor]) -> list[int]:
    """Number of ones in each mask, with one transfer to the host for all."""
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()


class MaskVersions:
    """The masks that a model has now: `current` says later whether they are still the same, unchanged.

    What is noticed: a mask changed in place (``_version`` counts the in-place changes of a tensor), replaced (as
    ``model.to`` does), or inserted; its storage, its parameter or the module that holds them replaced. What is not: a
    change of values through ``mask.data`` or ``mask.numpy()``, which torch does not count.
    """

    def __init__(self, model: nn.Module):
        # (owner, name of the parameter, parameter, mask or None, the mask's version and address)
        self.seen: list[tuple[nn.Module, str, object, Tensor | None, tuple[int, int]]] = []
        self.places: list[tuple[nn.Module, str, nn.Module]] = []  # (parent, name, child), down to each owner
        for parent in model.modules():
            self.places += [(parent, name, child) for name, child in parent._modules.items() if child is not None]
            for name in _maskable(parent):
                mask = getattr(parent, name + MASK_SUFFIX, None)
                self.seen.append((parent, name, parent._parameters.get(name), mask, _state_of(mask)))

    def current(self) -> bool:
        return all(parent._modules.get(name) is child for parent, name, child in self.places) and all(
            owner._parameters.get(name) is param
            and owner._buffers.get(name + MASK_SUFFIX) is mask
            and _state_of(mask) == state
            for owner, name, param, mask, state in self.seen
        )


def _state_of(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask._version, mask.data_ptr())


class _MaskHook:
    """Step post-hook of `keep_masked`: weights *= masks, with copies of the masks in the weights' dtype.

    With copies of that dtype `_foreach_mul_` runs as one fused kernel (mixed dtypes take one kernel per tensor). They
    are made again when the masks have changed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.versions: MaskVersions | None = None
        self.weights: list[Tensor] = []
        self.factors: list[Tensor] = []  # the masks of `weights`, in their dtype

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.versions is None or not self.versions.current():
            self._refresh()
        if self.weights:
            torch._foreach_mul_(self.weights, self.factors)

    def _refresh(self) -> None:
        entries = list(masked_params(self.model))
        if not entries:
            raise ValueError("the model has no masks: call insert_masks first")
        self.versions, self.weights, self.factors = MaskVersions(self.model), [], []
        for (name, param, mask), kept in zip(entries, kept_counts([mask for _, _, mask in entries])):
            check_whole(name, param)
            if kept < mask.numel():  # a full mask changes nothing: a dense level costs nothing
                self.weights.append(param)
                self.factors.append(mask.to(param.dtype))


def keep_masked(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Mask the model's weights after every ``optimizer.step()``, in any training loop.

    ``copy.deepcopy`` of model and optimizer together keeps that up for the copy. A pickled optimizer, or a new one,
    needs a call of its own. Before clipping gradients call `mask_gradients`: the norm of a dense gradient counts pruned
    weights.

    Raises:
        ValueError: a parameter is split over processes (`check_whole`); after a later `fully_shard`, the next step.
    """
    for name, param, _ in masked_params(model):
        check_whole(name, param)
    handle = optimizer.register_step_post_hook(_MaskHook(model))
    optimizer.__deepcopy__ = lambda memo: _copy_with_hooks(optimizer, memo)  # type: ignore[attr-defined]
    return handle


def _copy_with_hooks(optimizer: torch.optim.Optimizer, memo: dict[int, object]) -> torch.optim.Optimizer:
    """A deep copy that masks the copy of the model; torch's own leaves the step hooks behind."""
    new = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = new
    new.__setstate__(copy.deepcopy(optimizer.__getstate__(), memo))
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(hook, _MaskHook):
            keep_masked(new, copy.deepcopy(hook.model, memo))
    return new


@torch.no_grad()
def mask_gradients(model: nn.Module) -> None:
    """grad *= mask, in place, for every masked parameter that has a gradient."""
    pairs = [(param.grad, mask) for _, param, mask in masked_params(model) if param.grad is not None]
    if pairs:
        torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])
