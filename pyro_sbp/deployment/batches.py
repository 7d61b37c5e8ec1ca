"""Treat an input of any kind as a batch: read and change its size, and name its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.errors import RequestError
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.nested import map_tensors, tensors_of

__all__ = [
    "CalledFlat",
    "batch_size",
    "example_of",
    "has_batch",
    "is_shape",
    "named_tensors",
    "on_device",
    "shapes_of",
    "with_batch_size",
]


def _is_images(x: Any) -> bool:
    """Whether an input is a list of images, as for detectors. Each image is one example."""
    return (
        isinstance(x, list)
        and len(x) > 0
        and all(isinstance(image, Tensor) and image.ndim == 3 for image in x)
    )


def batch_size(x: Any) -> int:
    """The number of examples in an input: the length of its first tensor, or of a list of images.

    Raises:
        RequestError: the input has no tensor with a dimension.
    """
    if _is_images(x):
        return len(x)
    for tensor in tensors_of(x):
        if tensor.ndim > 0:
            return len(tensor)
    raise RequestError("the example input has no tensor with examples in dimension 0")


def has_batch(tensor: Tensor, size: int) -> bool:
    """Whether a tensor of an input with `size` examples has one row for each."""
    return tensor.ndim > 0 and len(tensor) == size


def with_batch_size(x: Any, size: int) -> Any:
    """A copy of an input with another number of examples.

    The examples are repeated, or the last ones are omitted. A tensor whose length is not the number
    of examples is not changed.
    """
    before = batch_size(x)
    if _is_images(x):
        return [x[place % before].clone() for place in range(size)]

    def repeated(tensor: Tensor) -> Tensor:
        if not has_batch(tensor, before):
            return tensor.clone()
        return tensor[torch.arange(size, device=tensor.device) % before]

    return map_tensors(repeated, x)


def on_device(x: Any, device: torch.device) -> Any:
    """A copy of an input on a device."""
    return map_tensors(lambda tensor: tensor.to(device), x)


def is_shape(x: Any) -> bool:
    """Whether this is a shape, valid or not, and not an input: a sequence without tensors."""
    if isinstance(x, str):
        return True
    parts = (Tensor, list, tuple, Mapping)
    return isinstance(x, Sequence) and not any(isinstance(part, parts) for part in x)


def shapes_of(x: Any) -> str:
    """The shapes of examples in words, for an input or a shape."""
    if is_shape(x):
        return str(x)
    try:
        return ", ".join(str(list(tensor.shape[1:])) for tensor in tensors_of(x)) or "no tensor"
    except TypeError:
        return f"a {type(x).__name__}"


def example_of(x: Any, dtype: torch.dtype, size: int, generator: torch.Generator) -> Any:
    """An input with `size` examples.

    Args:
        x: an input, whose examples are repeated; or the shape of one example, for random examples
            in [0, 1).
        dtype: the dtype of random examples.
        generator: the generator that draws random examples.
    """
    if is_shape(x):
        return torch.rand(size, *x, generator=generator, device="cpu").to(dtype)
    return with_batch_size(map_tensors(lambda tensor: tensor.detach().cpu(), x), size)


def named_tensors(net: nn.Module, x: Any) -> dict[str, Tensor]:
    """The tensors of an input, each under the name of the argument that it is a part of."""
    if isinstance(x, Tensor):
        return {"input": x}
    if isinstance(x, Mapping):
        parts = {str(key): value for key, value in x.items()}
    elif isinstance(x, tuple):
        known = list(inspect.signature(net.forward).parameters.values())
        names = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
        names += [f"input_{place}" for place in range(len(names), len(x))]
        parts = dict(zip(names, x, strict=False))
    else:
        parts = {"input": x}
    found = {}
    for name, part in parts.items():
        tensors = list(tensors_of(part))
        for place, tensor in enumerate(tensors):
            found[name if len(tensors) == 1 else f"{name}_{place}"] = tensor
    return found


class CalledFlat(nn.Module):
    """A network that takes the tensors of its input as separate positional arguments.

    Args:
        net: the network.
        x: an input. The network is called with its structure, and with its values that are not
            tensors.
    """

    def __init__(self, net: nn.Module, x: Any) -> None:
        super().__init__()
        self.net = net
        self._structure = [x]

    def forward(self, *tensors: Tensor) -> Any:
        """The outputs of the network: one tensor, or a tuple of them."""
        given = iter(tensors)
        output = call(self.net, map_tensors(lambda _: next(given), self._structure[0]))
        outputs = tuple(tensors_of(output))
        return outputs[0] if len(outputs) == 1 else outputs
