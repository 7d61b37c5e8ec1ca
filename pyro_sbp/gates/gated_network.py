"""Multiply the units of a network by theta during its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_sbp.gates.calling import call
from pyro_sbp.gates.folding import Scaled, scaled_readers
from pyro_sbp.gates.gate import Gate, check_theta
from pyro_sbp.gates.layers import (
    argument,
    channel_dim,
    column_factor,
    multiplies,
    operands,
    serves,
    weight_of,
)
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.products import multiplied, products
from pyro_sbp.gates.recurrent import (
    HIDDEN,
    Call,
    call_of,
    first_weight,
    is_recurrent,
    scaled_call,
)
from pyro_sbp.gates.steady import eager

__all__ = ["GatedNetwork", "gating"]


class _Gating(TorchFunctionMode):
    """A mode that scales the columns of readers, which are recognised by their weights.

    In a layer, factors ``[columns]`` multiply the weight or the input, whichever is cheaper.
    Factors ``[batch, columns]`` multiply the input, and so do all factors of products with weights.
    The factors of hidden units multiply the recurrent weights.

    Args:
        net: the network.
        readers: its readers, with their factors.
    """

    def __init__(self, net: nn.Module, readers: Sequence[Scaled]) -> None:
        super().__init__()
        #: From the id of a weight, or of a multiple of it, to its reader and layer.
        self.layers: dict[int, tuple[Scaled, nn.Module]] = {}
        #: The multiples are kept alive, so that their ids are not reused.
        self.multiples: list[Tensor] = []
        #: From the id of the first weight of a recurrent layer to its readers: the input features
        #: and the hidden units.
        self.recurrent: dict[int, dict[str, tuple[Scaled, nn.Module]]] = {}
        #: From the id of a tensor to its reader, for weights of products and views of them. The
        #: tensors are kept alive, so that their ids are not reused.
        self.weights: dict[int, tuple[Scaled, Tensor]] = {}
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
    """Replace one argument.

    Args:
        args: the positional arguments.
        given: the named arguments, which are changed in place.
        place: the position or the name of the argument.
        new: its new value.

    Returns:
        The positional arguments.
    """
    if isinstance(place, str):
        given[place] = new
        return args
    return (*args[:place], new, *args[place + 1 :])


def _scaled_recurrence(
    args: Sequence[Any], call: Call, parts: Mapping[str, tuple[Scaled, nn.Module]]
) -> Sequence[Any]:
    """The arguments of a recurrent function with scaled input and scaled recurrent weights.

    Raises:
        ValueError: the hidden units have a theta for every example.
    """
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


#: If the input is data with at least this many rows, scaling the weight is cheaper in training.
_MANY_ROWS = 64


def _is_cheaper_in_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether scaling the weight is cheaper than scaling the input."""
    if weight.numel() < x.numel():
        return True
    # The input is data, which need no gradient. Scaled data would need one, for the gradient of
    # theta, and this takes another product of matrices.
    rows = x.numel() // x.shape[-1]
    trained = torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad
    return trained and weight.ndim == 2 and rows >= _MANY_ROWS


def gating(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> TorchFunctionMode:
    """A context in which calls of a network multiply its units by theta.

    Args:
        net, gates: as for `GatedNetwork`.
        theta: from gate name to a tensor ``[units]`` or ``[batch, units]``.
    """
    return _Gating(net, scaled_readers(gates, theta))


def _scaled_input(reader: Scaled, x: Tensor, dim: int, batch_dim: int | None = 0) -> Tensor:
    """The input of a reader, scaled along the dimension of its columns.

    Args:
        reader: the reader.
        x: its input.
        dim: the dimension of the columns in `x`.
        batch_dim: the dimension of the batch in `x`, or None if there is none.

    Raises:
        ValueError: the scale has a row for every example, and `x` has no such batch.
    """
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
    """A network whose units are multiplied by theta, which is an argument of every call.

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
            ValueError: theta names an unknown gate or has a wrong number of units; theta is given
                per example, and the input of a reader does not have the batch in dimension 0 (in a
                recurrent layer, in its batch dimension), or the units are the hidden units of a
                recurrent layer; the gates have different numbers of draws; there are several draws,
                and the output of the network is not a tensor; or the noise of a `Pruner` is
                attached to the network, so that noise would multiply the units twice.
        """
        check_no_noise(self.net, "called with theta")
        check_theta(self.gates, theta)
        draws = {value.shape[:-2] for value in theta.values()}
        if any(draws):
            return self._each(x, theta, draws)
        # A compiled network would use the theta with which it was compiled.
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
        if 0 in shape:
            raise ValueError(f"theta has no draws: its shape begins with {list(shape)}")
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
