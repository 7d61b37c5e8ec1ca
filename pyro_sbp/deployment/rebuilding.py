"""Build a saved network: call its constructor, then set the stored sizes and tensors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from pyro_sbp.datasets.memory import available_memory
from pyro_sbp.deployment.description import Description
from pyro_sbp.gates.attention import separate_attention
from pyro_sbp.gates.functions import is_inexact
from pyro_sbp.gates.layers import Select
from pyro_sbp.gates.recurrent import is_recurrent, weight_sizes
from pyro_sbp.gates.sizes import all_sizes, follows, ratios_around, set_size
from pyro_sbp.networks import PlaceChannels

__all__ = [
    "check_fit",
    "construct",
    "fill",
    "non_persistent_buffers",
    "resize_layers",
    "settle_lazy_layers",
]

#: The functions with which layers create their parameters.
_CREATORS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)


#: Tensors of at most this many bytes are created without checking the available memory.
_SMALL = 2**24


class _WithinMemory(TorchFunctionMode):
    """Refuses to create a tensor that is larger than the available memory.

    A damaged argument of a constructor may ask for a tensor of any size, and the system may kill
    the process when it runs out of memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CREATORS and str(kwargs.get("device")) != "meta":
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            size = _elements(args, kwargs) * dtype.itemsize
            if size > _SMALL:
                available = available_memory(torch.device("cpu"))
                if available is not None and size > available:
                    raise MemoryError(
                        "the constructor builds a tensor that does not fit into memory"
                    )
        return func(*args, **kwargs)


def _elements(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of elements that a function in `_CREATORS` would create; 0 for invalid sizes."""
    sizes = kwargs.get("size", args)
    sizes = sizes[0] if sizes and isinstance(sizes[0], list | tuple) else sizes
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return 0
    return math.prod(sizes)


def construct(
    constructor: Callable[..., nn.Module], kwargs: Mapping[str, Any], separate: bool
) -> nn.Module:
    """Call a constructor with arguments from a file.

    Raises:
        MemoryError: the network does not fit into memory.
        TypeError: the constructor does not build a network.
        Exception: any error of the constructor.
    """
    with _WithinMemory():
        net = constructor(**kwargs)
    if not isinstance(net, nn.Module):
        raise TypeError(f"the constructor builds a {type(net).__name__}, which is not a network")
    return separate_attention(net) if separate else net


def settle_lazy_layers(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give lazy layers the number of columns or features of the stored tensors, in place.

    Args:
        net: the network from the constructor.
        state: the stored tensors.
    """
    for name, module in net.named_modules():
        if not isinstance(module, LazyModuleMixin):
            continue
        weight = state.get(f"{name}.weight", state.get(f"{name}.running_mean"))
        if (index := state.get(f"{name}.select.index")) is not None:
            columns = int(index.max()) + 1 if index.numel() else 0
        elif weight is None or weight.ndim == 0:
            continue
        elif isinstance(module, nn.modules.conv._ConvTransposeNd) or weight.ndim == 1:
            columns = weight.shape[0]
        else:
            columns = weight.shape[1] * getattr(module, "groups", 1)
        ndim = 2 if weight is None else max(weight.ndim, 2)
        # torch does the same at the first call. Only the shape of the input matters.
        example = torch.empty(1, columns, *(1,) * (ndim - 2), device="meta")
        lazy: Any = module
        lazy._infer_parameters(lazy, (example,))


def resize_layers(
    net: nn.Module, description: Description, state: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Set the sizes of layers, and insert a `Select` before layers that have one, as described.

    The tensors keep their shapes until `fill` replaces them.

    Args:
        net: the network from the constructor. It is changed in place.
        description: the description of the saved network.
        state: the stored tensors.

    Returns:
        The shapes that follow from the sizes, by the name of the tensor. Other tensors, such as
        those of modules that torch does not define, may have any shape.

    Raises:
        ValueError: a layer does not exist, does not have a size, or has an index that does not fit;
            or a size of a module is not a number of units of the layers in it, or does not change
            in the same ratio.
    """
    # The weight of a subclass may have another layout. Its shape is not checked in that case.
    regular = {
        (module, leaf)
        for module in net.modules()
        for leaf, shape in _shapes(module).items()
        if isinstance(tensor := getattr(module, leaf, None), Tensor) and tensor.shape == shape
    }
    modules = dict(net.named_modules())
    for layer in description.layers:
        if layer not in modules:
            raise ValueError(f"there is no layer {layer!r}")
    ratios = ratios_around(net, description.layers)
    for layer, sizes in description.layers.items():
        module = modules[layer]
        if "select" in sizes:
            _put_select(net, layer, module, sizes["select"], state)
        for name, size in sizes.items():
            if name == "select":
                continue
            if not isinstance(getattr(module, name, None), int):
                raise ValueError(f"layer {layer!r} has no {name}")
            setattr(module, name, size)
        groups = getattr(module, "groups", 1)
        channels = [getattr(module, name, 0) for name in ("in_channels", "out_channels")]
        if groups == 0 or any(number % groups for number in channels):
            raise ValueError(
                f"the channels of layer {layer!r} cannot be divided into {groups} groups"
            )
    _set_sizes(modules, description, ratios)
    changed = tuple(f"{layer}." for layer in description.layers)
    shapes = {}
    for name in net.state_dict():
        module, leaf = _owner(net, name)
        tensor = getattr(module, leaf, None)
        of_torch = type(module).__module__.startswith("torch.nn.")
        if (module, leaf) in regular:
            shapes[name] = _shapes(module)[leaf]
        elif of_torch and isinstance(tensor, Tensor) and not name.startswith(changed):
            # A layer of torch that is not resized keeps the shapes from its constructor.
            shapes[name] = tuple(tensor.shape)
    return shapes


def _set_sizes(
    modules: Mapping[str, nn.Module],
    description: Description,
    ratios: Mapping[str, Set[Fraction]],
) -> None:
    """Set attributes of modules that are sizes, if they agree with those of the layers inside."""
    for name, sizes in description.sizes.items():
        old = all_sizes(modules[name]) if name in ratios else {}
        for attribute, size in sizes.items():
            if attribute not in old:
                raise ValueError(
                    f"{attribute!r} of {name!r} is not a size of a module around a resized layer"
                )
            if not follows(size, old[attribute], ratios[name]):
                raise ValueError(
                    f"{attribute!r} of {name!r} is {size}, which does not follow from "
                    f"{old[attribute]} by the sizes of the layers"
                )
            value = type(old[attribute])(size)  # type: ignore[arg-type]
            set_size(modules[name], attribute, value)


def check_fit(
    net: nn.Module,
    description: Description,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that the stored tensors fit a network.

    Args:
        net: the network, after `resize_layers`.
        description: the description of the saved network.
        state: the stored tensors. A tensor with two names is included under both.
        shapes: the shapes from `resize_layers`.

    Raises:
        ValueError: a tensor is missing, does not belong to the network, or has another shape or
            type.
    """
    names = {*net.state_dict(), *description.buffers}
    for words, wrong in (
        ("is missing", names - state.keys()),
        ("belongs to no layer", state.keys() - names),
    ):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"the tensor {min(wrong)!r}{more} {words}")
    buffers = dict(non_persistent_buffers(net))
    for name in description.buffers:
        if name not in buffers:
            raise ValueError(f"{name!r} is not a buffer outside the state dict")
    for name, tensor in state.items():
        module, leaf = _owner(net, name)
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name!r} has shape {list(tensor.shape)}, not {list(shapes[name])}")
        old = getattr(module, leaf, None)
        if isinstance(old, Tensor) and old.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name!r} has the type {tensor.dtype}, not {old.dtype}")
        if isinstance(module, PlaceChannels) and leaf == "source":
            inside = (tensor >= 0) & (tensor <= module.in_channels)
            if not bool(inside.all()):
                raise ValueError(f"{name!r} has indices of channels that the input does not have")
    parameters = dict(net.named_parameters(remove_duplicate=False))
    for name in description.frozen or ():
        if name not in parameters:
            raise ValueError(f"{name!r} is frozen, but is not a parameter")


def fill(net: nn.Module, description: Description, state: Mapping[str, Tensor]) -> None:
    """Load stored tensors, which `check_fit` has checked, into a network in place.

    Parameters and buffers get the stored shape and type. They share a tensor if and only if they
    shared it when they were saved.
    """
    placed: dict[str, Tensor] = {}  # by the name under which a tensor is stored
    used: set[Tensor] = set()
    for name, tensor in state.items():
        module, leaf = _owner(net, name)
        old = getattr(module, leaf, None)
        if not isinstance(old, Tensor):
            continue  # extra state of a module
        stored = description.same.get(name, name)
        is_parameter = isinstance(old, nn.Parameter)
        new = placed.get(stored)
        if new is None or isinstance(new, nn.Parameter) != is_parameter:
            new = old
            if old in used or old.shape != tensor.shape or old.dtype != tensor.dtype:
                new = torch.empty_like(tensor)
                if is_parameter:
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
            placed.setdefault(stored, new)
        used.add(old)
        if new is not old:
            setattr(module, leaf, new)
    with torch.no_grad():
        for name in description.buffers:
            module, leaf = _owner(net, name)
            getattr(module, leaf).copy_(state[name])
    net.load_state_dict({n: t for n, t in state.items() if n not in description.buffers})
    if description.frozen is not None:
        frozen = set(description.frozen)
        for name, parameter in net.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen and is_inexact(parameter))


def non_persistent_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not part of a network's state dict, by name."""
    return {
        f"{prefix}.{leaf}" if prefix else leaf: buffer
        for prefix, module in net.named_modules()
        for leaf, buffer in module.named_buffers(recurse=False)
        if leaf in module._non_persistent_buffers_set
    }


def _put_select(
    net: nn.Module, layer: str, module: nn.Module, length: int, state: Mapping[str, Tensor]
) -> None:
    index = state.get(f"{layer}.select.index")
    if index is None or index.ndim != 1 or index.dtype != torch.int64 or len(index) != length:
        raise ValueError(
            f"layer {layer!r} selects {length} features, but has no valid index for them"
        )
    if not isinstance(module, nn.Linear) or not layer:
        raise ValueError(f"layer {layer!r} cannot select features")
    if length and not 0 <= int(index.min()) <= int(index.max()) < module.in_features:
        raise ValueError(
            f"layer {layer!r} selects features that are not among its {module.in_features}"
        )
    parent, _, leaf = layer.rpartition(".")
    select = Select(torch.empty_like(index))
    wrapped = nn.Sequential(OrderedDict(select=select, layer=module))
    setattr(net.get_submodule(parent), leaf, wrapped)


def _owner(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return net.get_submodule(parent), leaf


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a layer that follow from its sizes."""
    weight: tuple[int, ...]
    match module:
        case nn.Linear():
            weight = (module.out_features, module.in_features)
            return {"weight": weight, "bias": weight[:1]}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            columns = module.in_channels // module.groups
            weight = (module.out_channels, columns, *module.kernel_size)
            return {"weight": weight, "bias": weight[:1]}
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            rows = module.out_channels // module.groups
            weight = (module.in_channels, rows, *module.kernel_size)
            return {"weight": weight, "bias": (module.out_channels,)}
        case nn.modules.batchnorm._NormBase():
            names = ("weight", "bias", "running_mean", "running_var")
            return dict.fromkeys(names, (module.num_features,))
        case nn.GroupNorm():
            return dict.fromkeys(("weight", "bias"), (module.num_channels,))
        case nn.PReLU():
            return {"weight": (module.num_parameters,)}
        case nn.Embedding():
            return {"weight": (module.num_embeddings, module.embedding_dim)}
        case _ if is_recurrent(module):
            return weight_sizes(module)
        case PlaceChannels():
            return {"weight": (module.in_channels,), "source": (module.out_channels,)}
        case _:
            return {}
