"""Pruning of a level: method and density from the config, then `prune`."""

import torch
from torch import nn

from harness_params import Config
from utils.conv_type import kept_counts, masked_params, matches
from utils.data.epochs import score_steps
from utils.data.loaders import Data
from utils.errors import ConfigError, RunError
from utils.pruning.allocation import layer_counts
from utils.pruning.methods import METHODS, NO_METHOD, initial_density, level_density
from utils.pruning_utils import CRITERIA, prune, unreachable
from utils.seeds import stable_seed

# Seeds random pruning apart from the epochs, which are seeded by (seed, level, epoch).
PRUNING_DRAWS = -1


def pruning_of(cfg: Config, level: int, start: float) -> tuple[str, float]:
    """(method, density): at initialization er_method to er_init, later prune_method to d0 * (1 - prune_rate)^level.

    Args:
        start: d0, what pruning at initialization or the ticket left (1 without either).
    """
    p = cfg.prune_params
    if level == 0:
        return p.er_method, initial_density(p)
    return p.prune_method, level_density(start, p.prune_rate, level)


def check_pruning(cfg: Config, model: nn.Module, data: Data, start: float = 1.0) -> None:
    """Check before training that every level can be pruned.

    Args:
        start: density that level 0 starts from, before pruning at initialization: below 1 for a ticket.

    Raises:
        ConfigError: a criterion has no function, an epoch has not as many batches as are to be scored, a level keeps
            fewer weights than layers, or a pattern of layer_rates fits no layer.
    """
    p = cfg.prune_params
    layer_rates(cfg, model)
    start = initial_density(p) if p.er_method != NO_METHOD else start
    used = [pruning_of(cfg, level, start) for level in range(p.num_levels)]
    try:
        _ = [CRITERIA[method] for method, _ in used if method != NO_METHOD]
    except ValueError as error:  # a line of a plugin names a function that does not exist
        raise ConfigError(str(error)) from error
    if any(_needs_batches(method) for method, _ in used):
        score_steps(p.score_batches, data.train.num_images, data.train.batch_size)
    for level, (method, target) in enumerate(used):
        if fault := unreachable(model, method, target):
            raise ConfigError(f"prune_params.{'num_levels' if level else 'er_init'}: {fault} (level {level})")


def layer_rates(cfg: Config, model: nn.Module) -> list[float]:
    """Share of its weights that each masked parameter loses before a level, in model order, with scope layer.

    Raises:
        ConfigError: a pattern fits none of them.
    """
    p = cfg.prune_params
    names = [name for name, _, _ in masked_params(model)]
    rates = dict.fromkeys(names, p.prune_rate)
    for entry in p.layer_rates:
        pattern, _, rate = entry.rpartition(":")
        found = [name for name in names if matches(name, pattern)]
        if not found:
            raise ConfigError(
                f"prune_params.layer_rates: {pattern} matches no layer that is pruned; these are {', '.join(names)}"
            )
        rates |= dict.fromkeys(found, float(rate))
    return list(rates.values())


def _shares_of_layers(cfg: Config, model: nn.Module, level: int, start: float) -> list[int] | None:
    """Number of weights that each layer keeps at `level`; None where the method itself shares them out."""
    if level == 0 or cfg.prune_params.scope == "global":
        return None
    masks = [mask for _, _, mask in masked_params(model)]
    totals = [mask.numel() for mask in masks]
    return layer_counts(layer_rates(cfg, model), totals, kept_counts(masks), level, dense=start == 1)


def prune_level(cfg: Config, model: nn.Module, data: Data, level: int, start: float) -> None:
    """Prune to the level's method and density."""
    p, seed = cfg.prune_params, cfg.experiment_params.seed
    method, target = pruning_of(cfg, level, start)
    if method == NO_METHOD:
        return
    shares = _shares_of_layers(cfg, model, level, start)
    if shares is not None:
        target = sum(shares) / sum(mask.numel() for _, _, mask in masked_params(model))
    try:
        prune(
            model,
            method,
            target,
            # Read only for the criteria that look at data: on ImageNet a batch takes seconds to load.
            batches=data.train.score_batches(level, p.score_batches) if _needs_batches(method) else None,
            generator=torch.Generator().manual_seed(stable_seed(seed, level, PRUNING_DRAWS)),
            rounds=p.synflow_rounds,
            shares=shares,
            invert_scores=p.invert_scores,
            dtype={"float32": torch.float32, "float64": torch.float64}[p.score_dtype],
        )
    except ValueError as error:  # no such density, or scores that are not finite: the line says which
        raise RunError(f"level {level}: {error}") from error


def _needs_batches(method: str) -> bool:
    """True for a method that looks at training batches; False for `NO_METHOD`, too."""
    return method in METHODS and METHODS[method].needs_batches
