"""Load the weights of a network from a file of another program or of a dense network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pyro_sbp.deployment.description import INDEX
from pyro_sbp.errors import RequestError, first_line

__all__ = ["load_weights"]


def load_weights(net: nn.Module, path: Path, classes: int | None = None) -> None:
    """Load a state dict into a network, from a file of `torch.save` or safetensors.

    Args:
        net: the network, which is changed in place.
        path: the file.
        classes: the number of classes of the data. If the network has one layer with this number of
            outputs, and the file has another number for it, the layer keeps its initial values,
            with a `UserWarning`. With None, such a file raises an error.

    Raises:
        RequestError: the file cannot be read, does not contain a state dict, or contains that of
            another network or values that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {path} to read weights from") from error
    except Exception as error:  # a file of another kind may raise anything
        raise RequestError(
            f"{path} cannot be read as weights; expected safetensors, or a state dict of torch.save"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        if isinstance(state, Mapping) and "request" in state:
            raise RequestError(
                f"{path} is a checkpoint of a run; expected a state dict of the network"
            )
        raise RequestError(f"{path} has no state dict, which maps parameter names to tensors")
    own = net.state_dict()
    for name, value in state.items():
        if name in own and own[name].is_floating_point() != value.is_floating_point():
            raise RequestError(f"{path} has {value.dtype} for {name!r}; expected {own[name].dtype}")
    layer = None if classes is None else _other_classes(state, own, classes)
    if layer is not None:
        for name in own:
            if name.rpartition(".")[0] == layer:
                state = {**state, name: own[name]}
    try:
        net.load_state_dict(state)
    except Exception as error:  # damaged metadata of a state dict may raise anything
        if (path.parent / INDEX).exists():
            raise RequestError(
                f"{path} has the weights of a pruned network; expected those of the dense network"
            ) from error
        raise RequestError(
            f"{path} has the weights of another network: "
            f"{_differences(state, own) or first_line(error)}"
        ) from error
    if layer is not None:
        warnings.warn(
            f"{path} has another number of classes than {classes} in the layer {layer!r}, so that "
            "layer keeps its initial values",
            stacklevel=2,
        )
    # A buffer may be infinite on purpose, for example a mask.
    wrong = [name for name, value in net.named_parameters() if not bool(value.isfinite().all())]
    wrong += [name for name, value in net.named_buffers() if bool(value.isnan().any())]
    if wrong:
        raise RequestError(f"{path} has values that are not finite, in {wrong[0]!r}")


def _other_classes(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], classes: int
) -> str | None:
    """The layer with one output per class for which a file has another number of outputs; None if
    there is not exactly one."""
    others = [name for name in own if name in state and state[name].shape != own[name].shape]
    layers = {name.rpartition(".")[0] for name in others}
    fits = all(
        state[name].ndim == own[name].ndim > 0
        and len(own[name]) == classes
        and state[name].shape[1:] == own[name].shape[1:]
        for name in others
    )
    return layers.pop() if fits and len(layers) == 1 else None


def _differences(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """One line that says in which tensors a state dict differs from that of a network; may be
    empty."""
    parts = []
    missing = [name for name in own if name not in state]
    others = [name for name in state if name not in own]
    shapes = [n for n in own if n in state and state[n].shape != own[n].shape]
    if shapes:
        name = shapes[0]
        parts.append(
            f"{name!r} is {list(state[name].shape)}, not {list(own[name].shape)}{_more(shapes)}"
        )
    if missing:
        parts.append(f"{missing[0]!r}{_more(missing)} is missing")
    if others:
        parts.append(f"{others[0]!r}{_more(others)} belongs to no layer")
    return "; ".join(parts)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
