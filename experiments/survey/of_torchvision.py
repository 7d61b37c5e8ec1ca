"""The classifiers of torchvision, on images of 64 x 64 where they accept them."""

from __future__ import annotations

from typing import Any

import torch

from pyro_sbp.experiments.survey.collections import Surveyed

__all__ = ["LIBRARIES", "build", "names"]

LIBRARIES = ("torchvision",)
#: Image sizes of families that do not accept 64 x 64.
SIZES = {"inception": 299, "maxvit": 224}


def names() -> list[str]:
    """The names of all classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def build(name: str) -> Surveyed:
    """A classifier for 10 classes."""
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    family = builder.__module__.rpartition(".")[2]
    size = SIZES.get(family, 64)
    options: dict[str, Any] = {}
    if family == "vision_transformer":
        size = options["image_size"] = 4 * int(name.rpartition("_")[2])  # 4 x 4 patches
    if family == "maxvit":
        options["input_size"] = (size, size)
    if family in ("inception", "googlenet"):
        options["init_weights"] = False
    return Surveyed(family, builder(num_classes=10, **options), torch.randn(2, 3, size, size))
