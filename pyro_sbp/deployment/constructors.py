"""The constructors of saved networks: their names, and which of them are trusted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyro_sbp import networks

__all__ = ["name_of", "resolve", "trusted"]

#: Arguments of constructors that would download weights or read other files.
_READS_FILES = {
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_backbone",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
}


def name_of(constructor: Callable[..., nn.Module]) -> str:
    """The name ``module:callable`` of a constructor."""
    qualified = getattr(constructor, "__qualname__", type(constructor).__qualname__)
    return f"{constructor.__module__}:{qualified}"


def resolve(name: str) -> Callable[..., nn.Module]:
    """Import a constructor by its name ``module:callable``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def trusted(name: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module] | None:
    """Find the constructor of a network of pyro_sbp, torchvision, timm or transformers by its name.

    Returns:
        The constructor. None for any other name, because a file must not choose which code runs,
        and for arguments that make the constructor read other files.

    Raises:
        ImportError: the library is not installed.
    """
    module, _, attribute = name.partition(":")
    if module == "pyro_sbp.networks":
        return getattr(networks, attribute) if attribute in networks.__all__ else None
    if _READS_FILES & set(kwargs):
        return None
    if module.startswith("torchvision.models"):
        from torchvision.models import get_model_builder, list_models

        return get_model_builder(attribute) if attribute in list_models() else None
    if module.startswith("timm.models."):
        import timm

        return timm.model_entrypoint(attribute) if timm.is_model(attribute) else None
    if module.startswith("transformers.models."):
        import transformers

        found = getattr(transformers, attribute, None)
        known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        return found if known else None
    return None
