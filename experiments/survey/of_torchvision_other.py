"""The networks of torchvision for detection, segmentation, video and optical flow."""

from __future__ import annotations

from typing import Any

import torch

from pyro_sbp.experiments.survey.collections import Surveyed

__all__ = ["LIBRARIES", "build", "names"]

LIBRARIES = ("torchvision",)
#: The modules of `torchvision.models`, with the shape of an input.
SHAPES = {
    "detection": (2, 3, 96, 96),
    "segmentation": (2, 3, 64, 64),
    "video": (2, 3, 8, 64, 64),
    "optical_flow": (1, 3, 128, 128),
}
#: Shapes of inputs of single networks.
OWN_SHAPES = {
    "s3d": (1, 3, 16, 224, 224),
    "mvit_v1_b": (1, 3, 16, 224, 224),
    "mvit_v2_s": (1, 3, 16, 224, 224),
}


def names() -> list[str]:
    """The names of all networks, ordered by module."""
    import torchvision

    return [
        name
        for module in SHAPES
        for name in torchvision.models.list_models(module=getattr(torchvision.models, module))
    ]


def build(name: str) -> Surveyed:
    """A network without pretrained weights."""
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    family = next(module for module in SHAPES if f".{module}." in builder.__module__)
    options: dict[str, Any] = {}
    if family != "optical_flow":
        options["weights"] = None
    if family in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if family == "detection" and "ssd" not in name:
        options |= {"min_size": 96, "max_size": 96}
    if "rcnn" in name:
        options |= {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
    net = builder(**options)
    x: Any = torch.randn(OWN_SHAPES.get(name, SHAPES[family]))
    if family == "optical_flow":
        x = (x, torch.randn(x.shape))
    if family == "detection":
        x = {"images": list(x.sigmoid())}
    return Surveyed(family, net, x)
