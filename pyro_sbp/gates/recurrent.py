"""The recurrent layers of torch: where their hidden units lie, and how to remove them.

A hidden unit is one row in the block of every gate of the cell, in weights and biases. It is also
one column of every weight that reads the state: of the recurrent weights, and in a stack of the
input weights of the next layer. `torch.nn` has one `hidden_size` for all layers of a stack and both
directions. Therefore the hidden units with the same number form one unit.

Noise multiplies these columns, as it multiplies the columns of other readers. A unit with theta = 0
has no effect on later time steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "HIDDEN",
    "RECURRENT_SIZES",
    "Call",
    "call_of",
    "column_factors",
    "first_weight",
    "is_recurrent",
    "recurrent_weights",
    "resize_recurrent",
    "scaled_call",
    "weight_sizes",
]

#: The value of `Span.tensor` for the columns of all weights that read the hidden state.
HIDDEN = "weight_hh"
#: The attributes of recurrent layers that store their sizes.
RECURRENT_SIZES = ("hidden_size", "input_size")

_LAYERS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_SEQUENCES = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_CELLS = {torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell}
_LAYER = re.compile(r"_l(\d+)")


def is_recurrent(module: nn.Module) -> bool:
    """Whether a layer is recurrent and its hidden units can be removed."""
    return isinstance(module, _LAYERS) and not getattr(module, "proj_size", 0)


@dataclass(frozen=True)
class Call:
    """The arguments of a function that runs a recurrent layer.

    Attributes:
        x: the input, with the features in the last dimension.
        state: the tensors of the initial state, with the units in the last dimension.
        weights: the weights of all layers and directions, in the order of the parameters.
        batch_dim: the dimension of the batch in `x`, or None for packed sequences.
        place: the position of the weights in the arguments (for a cell, of the first weight).
    """

    x: Tensor
    state: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    batch_dim: int | None
    place: int


def call_of(func: Any, args: Sequence[Any]) -> Call | None:
    """The arguments of a call of a recurrent function, or None if the function is another one."""
    if func in _CELLS:
        batch_dim = 0 if args[0].ndim > 1 else None
        return Call(args[0], _tensors(args[1]), tuple(args[2:6]), batch_dim, 2)
    if func not in _SEQUENCES:
        return None
    place = next(index for index, value in enumerate(args) if isinstance(value, list))
    packed = place == 3  # the weights come after the batch sizes
    batch_dim = None if packed else int(not args[8])
    return Call(args[0], _tensors(args[place - 1]), tuple(args[place]), batch_dim, place)


def _tensors(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def first_weight(module: nn.Module) -> Tensor:
    """The weight by which a recurrent layer is recognised."""
    return next(module.parameters(recurse=False))


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor, bool, bool]]:
    """The parameters of a recurrent layer.

    Yields:
        The name, the tensor, whether its columns read the input features of the layer, and whether
        its columns read hidden units. A bias has no columns.
    """
    for name, tensor in module._parameters.items():
        if tensor is not None:
            found = _LAYER.search(name)
            stacked = found is not None and int(found[1]) > 0
            of_input = name.startswith("weight_ih") and not stacked
            yield name, tensor, of_input, name.startswith("weight") and not of_input


def column_factors(
    module: nn.Module, scale: Tensor, hidden: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors of the weights of a recurrent layer, if their columns are multiplied by a scale.

    Args:
        module: a recurrent layer.
        scale: the factors of the input features, or of the hidden units if `hidden` is true.
        hidden: whether to scale the columns that read hidden units.

    Yields:
        The name of a weight, the weight, and its factor ``[columns]``.
    """
    for name, tensor, of_input, of_hidden in _weights(module):
        if of_hidden if hidden else of_input:
            # A layer above a bidirectional one has the columns of both directions.
            factor = scale.to(tensor.dtype).repeat(tensor.shape[1] // len(scale))
            yield name, tensor, factor


def recurrent_weights(module: nn.Module, hidden: bool) -> int:
    """The number of elements of all weights that read the input features of a recurrent layer, or
    its hidden units if `hidden` is true."""
    return sum(
        tensor.numel()
        for _, tensor, of_input, of_hidden in _weights(module)
        if (of_hidden if hidden else of_input)
    )


def scaled_call(
    module: nn.Module, args: Sequence[Any], call: Call, x: Tensor, hidden: Tensor | None
) -> list[Any]:
    """Replace the input and scale the recurrent weights in the arguments of a recurrent function.

    Args:
        module: the layer.
        args, call: the original arguments, and their parts from `call_of`.
        x: the new input.
        hidden: the factor of every hidden unit, or None.

    Returns:
        The new arguments.
    """
    weights = list(call.weights)
    if hidden is not None:
        factors = {name: factor for name, _, factor in column_factors(module, hidden, hidden=True)}
        for index, (name, *_) in enumerate(_weights(module)):
            if name in factors:
                weights[index] = weights[index] * factors[name]
    rest = list(args[1:])
    at = call.place - 1
    if isinstance(rest[at], list):
        rest[at] = weights
    else:
        rest[at : at + len(weights)] = weights
    return [x, *rest]


def resize_recurrent(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep only some hidden units and input features of a recurrent layer, in place.

    Args:
        module: the layer.
        rows: the indices of the hidden units to keep; None keeps all.
        columns: the indices of the input features to keep; None keeps all.
    """
    size = module.hidden_size
    assert isinstance(size, int)
    for name, tensor, of_input, of_hidden in list(_weights(module)):
        new = tensor.detach()
        if rows is not None:
            new = new.index_select(0, _in_blocks(rows, size, new.shape[0]).to(new.device))
            if of_hidden:
                new = new.index_select(1, _in_blocks(rows, size, new.shape[1]).to(new.device))
        if columns is not None and of_input:
            new = new.index_select(1, columns.to(new.device))
        setattr(module, name, nn.Parameter(new, requires_grad=tensor.requires_grad))
    for attribute, index in zip(RECURRENT_SIZES, (rows, columns), strict=True):
        if index is not None:
            setattr(module, attribute, len(index))
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def _in_blocks(index: Tensor, size: int, length: int) -> Tensor:
    """Repeat the indices of units for every block of length `size` in `length` rows or columns."""
    return torch.cat([index + start for start in range(0, length, size)])


def weight_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a recurrent layer, computed from its attributes."""
    hidden, features = module.hidden_size, module.input_size
    assert isinstance(hidden, int) and isinstance(features, int)
    blocks = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
    rows = hidden * next((n for kind, n in blocks.items() if isinstance(module, kind)), 1)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    shapes: dict[str, tuple[int, ...]] = {}
    for name, _, of_input, of_hidden in _weights(module):
        below = hidden * (directions if name.startswith("weight_ih") else 1)
        columns = features if of_input else below
        shapes[name] = (rows, columns) if of_input or of_hidden else (rows,)
    return shapes
