"""The collections of networks that are surveyed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from torch import nn

__all__ = ["COLLECTIONS", "Collection", "Surveyed", "collection"]


@dataclass(frozen=True)
class Surveyed:
    """A network to survey.

    Attributes:
        family: the group of networks that share a row of a table.
        net: the network, with random weights.
        x: an input of it.
        blocks: a regular expression for the names of its blocks, the parts between embeddings and
            output layers. With None they are found by their attention (see `block_names`).
        ignore: the layers that the network never calls, as for `find_gates`.
    """

    family: str
    net: nn.Module
    x: Any
    blocks: str | None = None
    ignore: Sequence[str] = ()


class Collection(Protocol):
    """The interface of the module of a collection."""

    #: The libraries whose versions are recorded.
    LIBRARIES: Sequence[str]
    #: The names of all networks.
    names: Callable[[], Sequence[str]]
    #: Makes the network of a name.
    build: Callable[[str], Surveyed]


#: The modules of the collections.
COLLECTIONS = {
    "transformers": "of_transformers",
    "timm": "of_timm",
    "segmentation-models-pytorch": "of_segmentation_models",
    "torchvision": "of_torchvision",
    "torchvision-other": "of_torchvision_other",
}


def collection(name: str) -> Collection:
    """The collection of a name, one of `COLLECTIONS`."""
    return cast(Collection, import_module(f"{__package__}.{COLLECTIONS[name]}"))
