"""Configurations of the models of Hugging Face transformers."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import nn

from pyro_sbp.deployment.description import parse_json
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES
from pyro_sbp.gates.sizes import written_sizes

__all__ = [
    "CONFIG",
    "build_from_config",
    "config_of",
    "parse_config",
    "takes_config",
    "with_sizes_of",
]

#: The file with the configuration. It has this name in transformers too.
CONFIG = "config.json"
#: The implementations of attention that need no other package.
_ATTENTION = ("sdpa", "eager")
#: With more different ratios, the search for a configuration is skipped, because a configuration
#: has only a few numbers.
_MOST_RATIOS = 4
#: The largest number of values of a configuration that are changed together.
_MOST_CHANGES = 4


def takes_config(constructor: Callable[..., nn.Module]) -> bool:
    """Whether a constructor is a model class of transformers, which takes a configuration."""
    return isinstance(constructor, type) and getattr(constructor, "config_class", None) is not None


def config_of(net: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a model as plain values, and the constructor's arguments that it does
    not contain.

    Raises:
        ValueError: the model has no configuration, or JSON cannot represent it.
    """
    config: Any = getattr(net, "config", None)
    if not hasattr(config, "to_json_string"):
        raise ValueError(f"{type(net).__name__} has no configuration")
    try:
        content = json.loads(config.to_json_string())
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration of {type(net).__name__}: {error}") from error
    attention = getattr(config, "_attn_implementation", None)
    kwargs = {"attn_implementation": attention} if attention in _ATTENTION else {}
    return {**content, "architectures": [type(net).__name__]}, kwargs


def parse_config(text: str) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        ValueError: it is not a JSON object.
    """
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def build_from_config(
    constructor: Callable[..., nn.Module], content: Mapping[str, Any], **kwargs: Any
) -> nn.Module:
    """Build a model from its configuration, with initial weights.

    Args:
        constructor: the class of the model.
        content: its configuration, as plain values.
        kwargs: further arguments of the class, and ``attn_implementation``.

    Raises:
        ValueError: ``attn_implementation`` is not one of the built-in implementations.
    """
    attention = kwargs.pop("attn_implementation", None)
    if attention not in (None, *_ATTENTION):
        raise ValueError(
            f"attn_implementation is {attention!r}; expected one of {', '.join(_ATTENTION)}"
        )
    config = constructor.config_class.from_dict(copy.deepcopy(dict(content)))  # type: ignore[attr-defined]
    # Overrides the value of the file: transformers would download and run another implementation.
    config._attn_implementation = attention
    return constructor(config, **kwargs)


def with_sizes_of(
    small: nn.Module,
    constructor: Callable[..., nn.Module],
    content: dict[str, Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of a pruned model with its new numbers of units.

    A configuration has one number for all layers. If every layer has kept the same number of units,
    this number is set, and transformers can load the model without this package. The values to
    change are found by building the model on the meta device.

    Args:
        small: the model after pruning.
        constructor: its class.
        content: its configuration before pruning.
        kwargs: as for `build_from_config`.

    Returns:
        The new configuration; the old one if no configuration builds a model of these sizes.
    """
    target = _sizes(small)

    def built(changes: Mapping[str, int]) -> dict[str, Any]:
        with torch.device("meta"):
            return _sizes(build_from_config(constructor, {**content, **changes}, **kwargs))

    try:
        found = built({})
    except Exception:  # some models cannot be built on the meta device
        return content
    wrong = {name for name, value in target.items() if found.get(name) != value}
    ratios = {
        Fraction(target[name], found[name])
        for name in wrong
        if type(target[name]) is int and type(found.get(name)) is int and found[name] > target[name]
    }
    if not wrong or target.keys() != found.keys() or len(ratios) > _MOST_RATIOS:
        return content
    useful: dict[tuple[str, int], None] = {}
    for key, value in content.items():
        for ratio in ratios if type(value) is int else ():
            change = (key, int(value * ratio))
            with contextlib.suppress(Exception):  # a configuration may reject the value
                trial = built(dict([change]))
                if any(trial.get(name) == target[name] for name in wrong):
                    useful[change] = None
    for number in range(1, _MOST_CHANGES + 1):
        for changes in map(dict, combinations(useful, number)):
            with contextlib.suppress(Exception):
                trial = built(changes)
                left = {name for name, value in target.items() if trial.get(name) != value}
                if all(_is_unused(name, changes, trial) for name in left) and (
                    not left
                    or _computes_the_same(small, constructor, {**content, **changes}, kwargs)
                ):
                    return {**content, **changes}
    return content


def _is_unused(name: str, changes: Mapping[str, int], trial: Mapping[str, Any]) -> bool:
    """Whether a size is only a copy of a value of the configuration, in an attribute of the same
    name.

    Pruning does not change such an attribute if the code of the module does not use it.
    """
    _, colon, attribute = name.partition(":")
    return bool(colon) and trial.get(name) == changes.get(attribute)


@torch.no_grad()
def _computes_the_same(
    small: nn.Module,
    constructor: Callable[..., nn.Module],
    content: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether the model that a configuration builds has the same outputs, on the dummy input of
    transformers."""
    net = build_from_config(constructor, content, **kwargs).eval()
    net.load_state_dict(small.state_dict())
    here: Any = copy.deepcopy(small).cpu().to(torch.float32).eval()
    x = {name: value.cpu() for name, value in here.dummy_inputs.items()}
    return bool(torch.equal(here(**x)[0], net.to(torch.float32)(**x)[0]))


def _sizes(net: nn.Module) -> dict[str, Any]:
    """The shapes of the tensors of a network, and the sizes written into its modules."""
    sizes: dict[str, Any] = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    for module, layer in net.named_modules():
        for attribute, value in written_sizes(layer).items():
            sizes[f"{module}:{attribute}"] = value if isinstance(value, int) else tuple(value)
        for attribute in SIZE_ATTRIBUTES:
            if type(getattr(layer, attribute, None)) is int:
                sizes[f"{module}:{attribute}"] = getattr(layer, attribute)
    return sizes
