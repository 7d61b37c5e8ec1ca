"""Gates: where multiplicative noise enters a network, and how it is folded into the weights.

The noise of a gate is applied at the inputs of the readers of its units, not at the output of their
writer. A reader is linear in its input columns. Therefore theta can be folded into its weight, and
theta_c = 0 is equivalent to deleting column c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.layers import (
    argument,
    channel_dim,
    column_factor,
    multiplies,
    operands,
    serves,
    weight_of,
)
from pyro_sbp.gates.nested import same
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.products import multiplied, products
from pyro_sbp.gates.recurrent import (
    HIDDEN,
    Call,
    call_of,
    column_factors,
    first_weight,
    is_recurrent,
    scaled_call,
)
from pyro_sbp.gates.steady import eager

__all__ = [
    "Gate",
    "GatedNetwork",
    "Size",
    "Span",
    "call",
    "check_theta",
    "evaluating",
    "factors",
    "fold",
    "gating",
]


@dataclass(frozen=True, eq=False)
class Span:
    """Which unit each row or column of one layer belongs to.

    Two spans are equal if all attributes are equal.

    Attributes:
        layer: the name of the module.
        units: the number of the unit of each row or column, ``[rows]`` or ``[columns]``, and -1 for
            a row or column that belongs to no unit of the gate.
        groups: the number of groups of the layer. All groups that remain must keep the same number
            of rows or columns.
        tensor: the name of a parameter or buffer of the module, if the rows or columns are those of
            this tensor and not of the weight of the layer.
        dim: the dimension of `tensor` along which they lie.
        power: the network multiplies the weight by the number of its columns to this power.
    """

    layer: str
    units: Tensor
    groups: int = 1
    tensor: str = ""
    dim: int = 0
    power: float = 0.0
    _on: dict[torch.device, tuple[Tensor, bool]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((self.layer, len(self.units), self.groups))

    @property
    def key(self) -> str:
        """The layer whose rows or columns these are, or a dimension of one of its tensors."""
        return f"{self.layer}.{self.tensor}[{self.dim}]" if self.tensor else self.layer

    def expand(self, values: Tensor) -> Tensor:
        """Expand a value per unit to a value per row or column.

        Args:
            values: ``[..., units]``.

        Returns:
            ``[..., columns]``, with 1 for columns that belong to no unit.
        """
        if values.device not in self._on:
            units = self.units.to(values.device)
            whole = torch.equal(self.units, torch.arange(len(self.units), device="cpu"))
            self._on[values.device] = (units, whole)
        units, whole = self._on[values.device]
        if whole and len(units) == values.shape[-1]:
            return values
        padded = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
        return padded.index_select(-1, units % padded.shape[-1])


@dataclass(frozen=True)
class Size:
    """An integer attribute of a module that depends on the number of units, such as `num_heads`.

    Attributes:
        module: the name of the module.
        attribute: the name of the attribute: an integer, or a tuple or a list of integers.
        place: the index of the integer in the tuple or list, or None for a single integer.
        per_unit: the integer is `per_unit` times the number of units.
    """

    module: str
    attribute: str
    place: int | None
    per_unit: int


@dataclass(frozen=True, repr=False)
class Gate:
    """A set of units, which one noise variable theta of shape ``[size]`` multiplies.

    A unit is one or more rows of every writer, and one or more columns of every reader. For
    example, the head of an attention layer is a block of rows of the layers of queries, keys and
    values.

    Attributes:
        name: the name of the gate, and of its Pyro sample site.
        size: the number of units.
        readers: the layers that take the units as input columns.
        writers: the layers that produce the units as output rows. A gate on input features has no
            writers.
        channelwise: the layers in between that process every channel separately (batch norms,
            depthwise convolutions), and the parameters and buffers with one element per channel.
        selects: the `Select` modules in between, which earlier cuts put before a reader, with the
            unit of each of their input features.
        sizes: the attributes of modules that depend on the number of units.
    """

    name: str
    size: int
    readers: tuple[Span, ...]
    writers: tuple[Span, ...] = ()
    channelwise: tuple[Span, ...] = ()
    selects: tuple[Span, ...] = ()
    sizes: tuple[Size, ...] = ()

    def __repr__(self) -> str:
        parts = [repr(self.name), f"{self.size} units"]
        for kind in ("writers", "readers", "channelwise", "selects"):
            layers = ", ".join(span.key for span in getattr(self, kind))
            parts += [f"{kind}: {layers}"] if layers else []
        names = ", ".join(dict.fromkeys(f"{s.module}.{s.attribute}" for s in self.sizes))
        parts += [f"sizes: {names}"] if names else []
        return f"Gate({'; '.join(parts)})"


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """A context in which a network is in evaluation mode. Afterwards every mode is restored."""
    before = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def call(net: Callable[..., Any], x: Any) -> Any:
    """Call a network on an input.

    Args:
        net: the network, or a function.
        x: the input. A tuple (also a named tuple) is passed as positional arguments. A mapping (a
            dict, or the ``BatchEncoding`` of a tokenizer) is passed as named arguments. Any other
            object, such as a tensor, a list or a dataclass, is passed as one argument. To pass a
            tuple or a mapping as one argument, wrap it in a tuple of length 1.

    Returns:
        The output of the network.
    """
    if isinstance(x, Mapping):
        return net(**x)
    return net(*x) if isinstance(x, tuple) else net(x)


@dataclass(frozen=True)
class _Scaled:
    """A reader and the factor of its columns, the product over the gates that it reads."""

    layer: str
    tensor: str
    dim: int
    scale: Tensor

    @property
    def name(self) -> str:
        """The name of the reader in messages."""
        return ".".join(part for part in (self.layer, self.tensor) if part)


def _scaled_readers(gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> list[_Scaled]:
    found: dict[str, _Scaled] = {}
    for gate in gates:
        if gate.name not in theta:
            continue
        for span in gate.readers:
            scale = span.expand(theta[gate.name])
            if span.key in found:
                scale = found[span.key].scale * scale
            found[span.key] = _Scaled(span.layer, span.tensor, span.dim, scale)
    return list(found.values())


def check_theta(gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> None:
    """Raise ValueError if theta names an unknown gate, or has a wrong shape."""
    sizes = {gate.name: gate.size for gate in gates}
    for name, value in theta.items():
        if name not in sizes:
            raise ValueError(f"theta names the gate {name!r}; the gates are {', '.join(sizes)}")
        if value.ndim == 0 or value.shape[-1] != sizes[name]:
            raise ValueError(
                f"theta of gate {name!r} has shape {list(value.shape)}; "
                f"expected [{sizes[name]}], [batch, {sizes[name]}] or [draws, batch, {sizes[name]}]"
            )


def fold(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold noise into the weights of the readers.

    Args:
        net: the network.
        gates: its gates, from `find_gates`.
        theta: from gate name to a tensor ``[units]``. Gates that are not named are not changed.

    Returns:
        From parameter name to the folded weight, of the shape and dtype of the parameter. Pass it
        to `torch.func.functional_call`. The network itself is not changed.

    Raises:
        ValueError: theta names an unknown gate, or has a wrong shape.
    """
    return {name: weight * factor for name, weight, factor in factors(net, gates, theta)}


def factors(
    net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name, the weight and the factor of every weight that `fold` multiplies."""
    check_theta(gates, theta)
    for reader in _scaled_readers(gates, theta):
        scale, module = reader.scale, net.get_submodule(reader.layer)
        if scale.ndim != 1:
            raise ValueError(
                f"theta has a value for every example, which cannot be folded into the weight of "
                f"{reader.name!r}: use theta of shape [units]"
            )
        if is_recurrent(module):
            found = column_factors(module, scale, hidden=reader.tensor == HIDDEN)
        elif reader.tensor:
            weight = getattr(module, reader.tensor)
            shape = [-1 if dim == reader.dim else 1 for dim in range(weight.ndim)]
            found = iter([(reader.tensor, weight, scale.to(weight.dtype).view(shape))])
        else:
            weight = weight_of(module)
            found = iter([("weight", weight, column_factor(module, scale.to(weight.dtype)))])
        for leaf, weight, factor in found:
            yield f"{reader.layer}.{leaf}" if reader.layer else leaf, weight, factor


class _Gating(TorchFunctionMode):
    """A mode that scales the columns of readers, which are recognised by their weights.

    Factors ``[columns]`` multiply the weight or the input, whichever is cheaper. Factors
    ``[batch, columns]`` multiply the input.
    """

    def __init__(self, net: nn.Module, readers: Sequence[_Scaled]) -> None:
        super().__init__()
        self.layers: dict[int, tuple[_Scaled, nn.Module]] = {}
        #: Multiples of the weights of layers, kept alive, so that their ids are not reused.
        self.multiples: list[Tensor] = []
        self.recurrent: dict[int, dict[str, tuple[_Scaled, nn.Module]]] = {}
        #: From the id of a tensor to its reader: weights of products, and views of them. The
        #: tensors are kept alive, so that their ids are not reused.
        self.weights: dict[int, tuple[_Scaled, Tensor]] = {}
        for reader in readers:
            module = net.get_submodule(reader.layer)
            if is_recurrent(module):
                parts = self.recurrent.setdefault(id(first_weight(module)), {})
                parts[reader.tensor] = reader, module
            elif reader.tensor:
                weight = getattr(module, reader.tensor)
                self.weights[id(weight)] = reader, weight
            else:
                weight = weight_of(module)
                self.layers[id(weight)] = reader, module
                if multiplies(module):
                    self.weights[id(weight)] = reader, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if self.recurrent and (recurrent := call_of(func, args)) is not None:
            parts = self.recurrent.get(id(recurrent.weights[0]), {})
            return func(*_scaled_recurrence(args, recurrent, parts), **given)
        of_x, of_weight = operands(func)
        weight = argument(of_weight, args, given)
        reader, layer = self.layers.get(id(weight), (None, None))
        if reader is None or layer is None or weight is None or not serves(func, layer):
            return self._call(func, args, given)
        x, scale = argument(of_x, args, given), reader.scale
        if scale.ndim == 1 and _is_cheaper_in_weight(x, weight):
            (position, key), new = of_weight, weight * column_factor(layer, scale.to(weight.dtype))
        else:
            (position, key), new = of_x, _scaled_input(reader, x, channel_dim(layer, x))
        return func(*_put(args, given, position if position < len(args) else key, new), **given)

    def _call(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        """Call a function that does not use a layer of `layers`. It may be a product."""
        if not self.weights:
            return self._followed(func(*args, **given), func, args)
        for product in products(func, args, given):
            found = self.weights.get(id(product.weight))
            if found is not None and id(product.x) not in self.weights:
                x = _scaled_input(found[0], product.x, product.x.ndim + product.x_dim)
                return func(*_put(args, given, product.place, x), **given)
        out = func(*args, **given)
        for value in args:
            found = self.weights.get(id(value))
            if found is not None and isinstance(out, Tensor) and out.numel() == value.numel():
                self.weights[id(out)] = found[0], out
        return self._followed(out, func, args)

    def _followed(self, out: Any, func: Any, args: Any) -> Any:
        """Record the result of a call if it is a multiple of the weight of a layer."""
        for tensor, _ in multiplied(func, args, out):
            if id(tensor) in self.layers:
                self.layers[id(out)] = self.layers[id(tensor)]
                self.multiples.append(out)
        return out


def _put(args: Sequence[Any], given: dict[str, Any], place: int | str, new: Any) -> Sequence[Any]:
    """Replace one argument: in a copy of the positional ones, or in place in the named ones."""
    if isinstance(place, str):
        given[place] = new
        return args
    return (*args[:place], new, *args[place + 1 :])


def _scaled_recurrence(
    args: Sequence[Any], call: Call, parts: Mapping[str, tuple[_Scaled, nn.Module]]
) -> Sequence[Any]:
    x, hidden = call.x, None
    for tensor, (reader, _) in parts.items():
        if tensor != HIDDEN:
            x = _scaled_input(reader, x, x.ndim - 1, call.batch_dim)
        elif reader.scale.ndim == 1 or len(reader.scale) == 1:
            hidden = reader.scale.flatten()
        else:
            raise ValueError(
                f"the hidden units of the recurrent layer {reader.layer!r} can have only one theta "
                "for a batch, because it multiplies recurrent weights: use noise_per='batch'"
            )
    module = next((module for _, module in parts.values()), None)
    return args if module is None else scaled_call(module, args, call, x, hidden)


#: The number of rows of the input from which scaling the weight is cheaper during training.
_MANY_ROWS = 64


def _is_cheaper_in_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether scaling the weight is cheaper than scaling the input."""
    if weight.numel() < x.numel():
        return True
    # Data need no gradient. Scaled data would need one, which takes another product.
    rows = x.numel() // x.shape[-1]
    trained = torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad
    return trained and weight.ndim == 2 and rows >= _MANY_ROWS


def gating(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> TorchFunctionMode:
    """A context in which calls of a network multiply its units by theta.

    Args:
        net, gates: as for `GatedNetwork`.
        theta: from gate name to a tensor ``[units]`` or ``[batch, units]``.
    """
    return _Gating(net, _scaled_readers(gates, theta))


def _scaled_input(reader: _Scaled, x: Tensor, dim: int, batch_dim: int | None = 0) -> Tensor:
    """The input of a reader, scaled along the dimension of its columns."""
    scale = reader.scale
    shape = [1] * x.ndim
    shape[dim] = scale.shape[-1]
    if scale.ndim == 2 and len(scale) > 1:
        if batch_dim is None or dim == batch_dim or x.shape[batch_dim] != len(scale):
            where = "0" if batch_dim is None else str(batch_dim)
            raise ValueError(
                f"layer {reader.name!r} gets an input of shape {list(x.shape)}, without the batch "
                f"of {len(scale)} in dimension {where}, which noise per example requires: use "
                "noise_per='batch'"
            )
        shape[batch_dim] = len(scale)
        if batch_dim > dim:
            scale = scale.T
    return x * scale.to(x.dtype).reshape(shape)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


class GatedNetwork(nn.Module):
    """A network whose units are multiplied by theta. It is a pure function of the input and theta.

    Args:
        net: the network. Its parameters are shared, not copied.
        gates: its gates, from `find_gates`.
    """

    def __init__(self, net: nn.Module, gates: Sequence[Gate]) -> None:
        super().__init__()
        self.net = net
        self.gates = tuple(gates)

    def forward(self, x: Any, theta: Mapping[str, Tensor]) -> Any:
        """Call the network on `x` with the noise `theta`.

        Args:
            x: the input of the network, as for `call`: a tensor, a tuple of positional arguments,
                or a mapping of named arguments.
            theta: from gate name to a tensor ``[units]`` (one draw for the batch) or
                ``[batch, units]`` (one draw for each example, or for all if the batch is 1). With
                leading dimensions, ``[*draws, batch, units]``, the network is called once for each
                draw, and the outputs are stacked to ``[*draws, ...]``.

        Returns:
            The output of the network.

        Raises:
            ValueError: theta names an unknown gate or has a wrong shape; theta is given per
                example, and the input of a reader does not have the batch in dimension 0; the gates
                have different numbers of draws; there are several draws, and the output of the
                network is not a tensor; or the noise of a `Pruner` is attached to the network,
                which would then have noise twice.
        """
        check_no_noise(self.net, "called with theta")
        check_theta(self.gates, theta)
        draws = {value.shape[:-2] for value in theta.values()}
        if any(draws):
            return self._each(x, theta, draws)
        # A compiled network would use theta of an earlier call.
        compiled = any(_is_compiled(module) for module in self.net.modules())
        with eager() if compiled else nullcontext(), gating(self.net, self.gates, theta):
            return call(self.net, x)

    def _each(self, x: Any, theta: Mapping[str, Tensor], draws: set[torch.Size]) -> Tensor:
        """The outputs of several draws, stacked."""
        if len(draws) > 1:
            raise ValueError(
                f"the gates of theta have different numbers of draws: {sorted(map(list, draws))}"
            )
        (shape,) = draws
        flat = {name: value.flatten(0, -3) for name, value in theta.items()}
        outputs = [
            self(x, {name: value[index] for name, value in flat.items()})
            for index in range(shape.numel())
        ]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise ValueError(
                "for several draws of theta, the output of the network must be a single tensor"
            )
        return torch.stack(outputs).unflatten(0, shape)
