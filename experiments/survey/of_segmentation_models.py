"""The networks of segmentation-models-pytorch, one for each decoder and some encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_sbp.experiments.survey.collections import Surveyed
from pyro_sbp.gates.calling import evaluating

__all__ = ["LIBRARIES", "build", "names"]

LIBRARIES = ("segmentation-models-pytorch", "timm")
DECODERS = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
    "DPT",
)
#: Encoders that are tried with the first decoder.
ENCODERS = ("mobilenet_v2", "efficientnet-b0", "mit_b0", "densenet121", "timm-regnetx_002")


def names() -> list[str]:
    """The names of the networks, each a decoder and an encoder."""
    own = [f"{decoder}/resnet18" for decoder in DECODERS if decoder != "DPT"]
    return [*own, "DPT/tu-vit_tiny_patch16_224", *(f"Unet/{encoder}" for encoder in ENCODERS)]


def build(name: str) -> Surveyed:
    """A network for 3 classes, with an input."""
    import segmentation_models_pytorch as smp

    decoder, _, encoder = name.partition("/")
    options = {"dynamic_img_size": True} if decoder == "DPT" else {}
    net = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3, **options)
    size = 128 if decoder == "PAN" else 64
    x = torch.randn(2, 3, size, size)
    family = decoder if encoder == "resnet18" else encoder
    return Surveyed(family, net, x, ignore=_not_called(net, x))


def _not_called(net: nn.Module, x: Tensor) -> list[str]:
    """The layers with weights that a network never calls.

    These networks take only the features of an encoder: the layers of its classifier, and of stages
    that the decoder does not use, are not called.
    """
    called: set[nn.Module] = set()
    layers = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    hooks = [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in layers.values()
    ]
    with torch.no_grad(), evaluating(net):
        net(x)
    for hook in hooks:
        hook.remove()
    return [name for name, module in layers.items() if module not in called]
