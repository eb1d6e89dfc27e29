"""The table of optimizers. Imports no torch.

A new optimizer is one line in `OPTIMIZERS`, and its options in utils/config/sections/optimizer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from utils.registry import Facts, Table


class Section(Protocol):
    """The options of section ``optimizer`` that not every optimizer reads."""

    momentum: float
    nesterov: bool
    beta1: float
    beta2: float


@dataclass(frozen=True)
class Optimizer:
    """A line of `OPTIMIZERS`.

    Attributes:
        title: name of its class in ``torch.optim``, which must have a fused kernel; or a class that is called without
            ``fused``, as ``title(groups, lr=..., **arguments)``, where a group has params and weight_decay.
        options: the options that it reads and some other optimizer does not.
        arguments: the arguments of the class that follow from these.
    """

    title: str | Callable[..., Any]
    options: tuple[str, ...] = ()
    arguments: Callable[[Section], dict[str, Any]] = lambda _: {}


def _sgd(o: Section) -> dict[str, Any]:
    return {"momentum": o.momentum, "nesterov": o.nesterov}


def _adam(o: Section) -> dict[str, Any]:
    # Capturable: torch captures Adam's step in a CUDA graph only with this. The fused kernel is the same either way.
    return {"betas": (o.beta1, o.beta2), "capturable": True}


def _stand_in(name: str, facts: Facts) -> Optimizer:
    """An optimizer of a saved run, as far as its facts are known."""
    return replace(Optimizer(name), **facts)


_LINES = {
    "sgd": Optimizer("SGD", ("momentum", "nesterov"), _sgd),
    "adam": Optimizer("Adam", ("beta1", "beta2"), _adam),  # Kingma & Ba 2015; weight decay is an L2 penalty
    "adamw": Optimizer("AdamW", ("beta1", "beta2"), _adam),  # Loshchilov & Hutter 2019; weight decay is decoupled
}
OPTIMIZERS: Table[Optimizer] = Table("optimizer", Optimizer, _LINES, _stand_in)


def own_options() -> list[str]:
    """Options that some optimizers read and others do not."""
    return list(dict.fromkeys(key for optimizer in OPTIMIZERS.values() for key in optimizer.options))
