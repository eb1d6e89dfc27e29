"""timm's classification models, freshly initialised: an optional package, imported when a model of it is asked for."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from utils.config.sections.model_params import TIMM
from utils.networks.cifar import ImageShape, UnsuitableImages

# Arguments that are decided elsewhere, and where.
_GIVEN = {
    "num_classes": "dataset.num_classes",
    "in_chans": "the data set",
    "img_size": "the data set",
    "device": "the run",
    "dtype": "experiment_params.precision",
}


def timm_model(name: str, num_classes: int, image_shape: ImageShape, arguments: Sequence[str] = ()) -> nn.Module:
    """The model `name` of timm for images of `image_shape`, never with trained weights.

    A model that is made for one size of image (a vision transformer has an embedding for each position) is made for
    this one.

    Args:
        name: a name of ``timm.list_models()``, without tag.
        arguments: ``argument:value`` each, arguments of the model's class, such as patch_size:4.

    Raises:
        ValueError: timm is not installed, has no such model, or its model has no such argument; or masks would have no
            effect on its weights.
        UnsuitableImages: it cannot be built for images of this shape, or with these arguments.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"model_params.model_name: {TIMM}{name} needs the package timm, which is not installed: pip install timm"
        ) from error
    names = timm.list_models()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
        raise ValueError(
            f"model_params.model_name: '{TIMM}{name}' is not a model of timm {timm.__version__}; nearest: "
            f"{', '.join(TIMM + each for each in nearest) or 'none'}"
        )
    channels, height, width = image_shape
    common: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
    state = torch.get_rng_state()
    model = timm.create_model(name, **common)  # which arguments it takes, only its class says
    options = _options(model, arguments)
    if "img_size" in _accepted(model):
        options["img_size"] = height if height == width else (height, width)
    if options:
        torch.set_rng_state(state)
        try:
            model = timm.create_model(name, **common, **options)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            given = f"with model_params.model_args [{', '.join(arguments)}]: " if arguments else ""
            raise UnsuitableImages(given + str(error).partition("\n")[0]) from error
    _check_weights(name, model)
    _check_patches(model, height, width)
    return model


def _accepted(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's class."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [name for name, parameter in inspect.signature(type(model)).parameters.items() if parameter.kind in kinds]


def _options(model: nn.Module, arguments: Sequence[str]) -> dict[str, Any]:
    """`arguments` as keyword arguments of the model's class."""
    accepted = [name for name in _accepted(model) if name not in _GIVEN]
    options: dict[str, Any] = {}
    for entry in arguments:
        name, _, value = entry.partition(":")
        if name in _GIVEN:
            raise ValueError(f"model_params.model_args: {name} is not allowed: {_GIVEN[name]} decides it")
        if name not in accepted:
            nearest = difflib.get_close_matches(name, accepted, n=5, cutoff=0.4)
            raise ValueError(
                f"model_params.model_args: {name} is no argument of {type(model).__name__}; nearest: "
                f"{', '.join(nearest) or 'none'}; it has {', '.join(accepted)}"
            )
        options[name] = _value(value)
    return options


def _value(text: str) -> bool | int | float | str:
    """true and false, whole numbers and numbers; anything else stays text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_weights(name: str, model: nn.Module) -> None:
    """Refuse layers that standardise their weights in the forward pass: weights set to zero would not act as zero."""
    from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

    standardising = (ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame)
    for layer, module in model.named_modules():
        if isinstance(module, standardising):
            raise ValueError(
                f"model_params.model_name: {TIMM}{name} cannot be pruned: {layer} ({type(module).__name__}) "
                "standardises its weights, so that pruned ones would not act as zeros"
            )


def _check_patches(model: nn.Module, height: int, width: int) -> None:
    """Refuse images whose last rows or columns a patch embedding would leave out."""
    from timm.layers import PatchEmbed

    for module in model.modules():
        if isinstance(module, PatchEmbed) and not module.dynamic_img_pad:
            rows, columns = module.patch_size
            if height % rows or width % columns:
                raise UnsuitableImages(f"its patches of {rows}x{columns} pixels do not divide them")
            return
