"""The layers of torch: where the rows and columns of their weights lie, and how to remove them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sbp.gates.recurrent import RECURRENT_SIZES, is_recurrent, resize_recurrent
from pyro_sbp.networks import PlaceChannels, place_channels

__all__ = [
    "CHANNELWISE_FUNCTIONS",
    "SIZE_ATTRIBUTES",
    "Select",
    "argument",
    "channel_dim",
    "column_factor",
    "groups_of",
    "is_channelwise",
    "is_linear_in_weight",
    "is_matrix",
    "is_reader",
    "known_tensors",
    "most_of_columns",
    "multiplies",
    "num_columns",
    "num_rows",
    "operands",
    "resize",
    "resize_tensor",
    "row_dimension",
    "rows_of",
    "serves",
    "weight_of",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Batch norms and instance norms of every kind.
_NORMS = (nn.modules.batchnorm._NormBase,)
#: From functions with the arguments (input, weight, ...) to the layers that they compute.
_MATRIX_FUNCTIONS: dict[Any, tuple[type, ...]] = {
    F.linear: (nn.Linear,),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTIONS),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    F.embedding: (nn.Embedding,),
    place_channels: (PlaceChannels,),
}
#: Functions that process every channel, or every group of channels, separately.
CHANNELWISE_FUNCTIONS = frozenset(
    {F.batch_norm, torch.batch_norm, F.instance_norm, F.group_norm, torch.group_norm, F.prelu}
)

#: The attributes of layers that store the number of rows, and the number of columns.
_ROW_SIZES = (
    "out_features",
    "out_channels",
    "num_features",
    "num_channels",
    "num_parameters",
    "embedding_dim",
    "nf",
)
_COLUMN_SIZES = ("in_features", "in_channels", "nx")
#: All attributes of layers that `resize` may change.
SIZE_ATTRIBUTES = (*_ROW_SIZES, *_COLUMN_SIZES, "groups", "num_groups", *RECURRENT_SIZES)


class Select(nn.Module):
    """Select features along the last dimension of the input.

    `shrink` puts it before a dense layer that keeps only some of its input features.

    Args:
        index: the features to keep, int64 ``[kept]``.
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., features]`` to ``[..., len(index)]``."""
        return x.index_select(-1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} features"


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer produces units as rows of its weight, so that it can be a writer.

    These are dense layers, convolutions, embeddings, recurrent layers and `PlaceChannels`. Excluded
    are depthwise convolutions, transposed convolutions with groups, embeddings with `max_norm`, and
    LSTMs with `proj_size`.
    """
    if isinstance(module, _TRANSPOSED):
        return module.groups == 1
    if isinstance(module, nn.Embedding):
        return module.max_norm is None  # normalising a row mixes its columns
    layers = (nn.Linear, *_CONVOLUTIONS, PlaceChannels)
    known = isinstance(module, layers) or _is_conv1d(module) or is_recurrent(module)
    return known and not is_channelwise(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the `Conv1D` of GPT-2, a dense layer with a transposed weight.

    It is recognised by its name, because transformers need not be installed, and because other
    packages have copies of the class.
    """
    weight = module._parameters.get("weight")
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and weight is not None and weight.ndim == 2


def is_reader(module: nn.Module) -> bool:
    """Whether a layer can be a reader: its input units are the columns of its weight."""
    return is_matrix(module) and not isinstance(module, nn.Embedding)


def is_linear_in_weight(module: nn.Module) -> bool:
    """Whether a layer is a dense layer or a convolution, also a depthwise or transposed one.

    Without its bias, the output of such a layer is linear in its weight and in its input.
    """
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))


def is_channelwise(module: nn.Module) -> bool:
    """Whether a layer processes channels, or groups of channels, separately.

    These are batch norms, instance norms, group norms with several groups, depthwise convolutions,
    and PReLU with one parameter for each channel.
    """
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if isinstance(module, nn.GroupNorm):
        return module.num_groups > 1
    return isinstance(module, _NORMS) or (
        isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def known_tensors(module: nn.Module) -> tuple[str, ...]:
    """The names of the tensors of a module that `resize` cuts."""
    if isinstance(module, Select):
        return ("index",)
    if isinstance(module, PlaceChannels):
        return ("weight", "source")
    if is_channelwise(module):
        return ("weight", "bias", "running_mean", "running_var")
    if is_recurrent(module):
        return tuple(module._parameters)
    return ("weight", "bias") if is_matrix(module) else ()


def serves(function: Any, module: nn.Module) -> bool:
    """Whether a function, called with the tensors of a layer, computes what the layer computes."""
    if function in CHANNELWISE_FUNCTIONS:
        return is_channelwise(module)
    if function is Tensor.index_select:
        return isinstance(module, Select)
    if function is torch.addmm:
        return _is_conv1d(module)
    return isinstance(module, _MATRIX_FUNCTIONS.get(function, ()))


def multiplies(module: nn.Module) -> bool:
    """Whether a dense layer overrides `forward`, for example with ``x @ self.weight.T``."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def operands(function: Any) -> tuple[tuple[int, str], tuple[int, str]]:
    """The position and the name of the input and of the weight in the arguments of a function."""
    if function is torch.addmm:
        return (1, "mat1"), (2, "mat2")
    return (0, "input"), (1, "weight")


def argument(operand: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value of one of the `operands`, or None if it is not given."""
    position, name = operand
    return args[position] if position < len(args) else kwargs.get(name)


def groups_of(module: nn.Module) -> int:
    """The number of groups of a layer. The rows of a group read only the columns of this group."""
    return getattr(module, "groups", 1)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer. It is a parameter, or a buffer if it is not trained."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def row_dimension(module: nn.Module) -> int:
    """The dimension of the rows in the weight of a layer."""
    if isinstance(module, _TRANSPOSED):
        return 0 if is_channelwise(module) else 1
    return 1 if isinstance(module, nn.Embedding) or _is_conv1d(module) else 0


def num_rows(module: nn.Module) -> int:
    """The number of units that a layer produces."""
    if isinstance(module, PlaceChannels):
        return len(module.source)
    if is_recurrent(module):
        return int(module.hidden_size)  # type: ignore[arg-type]  # an attribute of all of them
    return module.get_parameter("weight").shape[row_dimension(module)]


def num_columns(module: nn.Module) -> int:
    """The number of input units of a reader."""
    if isinstance(module, PlaceChannels):
        return len(module.weight)
    if is_recurrent(module):
        return int(module.input_size)  # type: ignore[arg-type]  # an attribute of all of them
    return module.get_parameter("weight").shape[1 - row_dimension(module)] * groups_of(module)


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The dimension of the channels or features in the input or output of a layer."""
    if isinstance(module, nn.Linear | nn.Embedding | Select) or _is_conv1d(module):
        return x.ndim - 1
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return x.ndim - module.get_parameter("weight").ndim + 1
    return 1


def column_factor(module: nn.Module, scale: Tensor) -> Tensor:
    """The factor of the weight of a reader, if its columns are multiplied by a scale.

    Args:
        module: the reader, which is not recurrent.
        scale: the factors of the columns, ``[columns]``.

    Returns:
        The factor, which broadcasts to the weight.
    """
    if isinstance(module, PlaceChannels):
        return scale
    weight, groups = module.get_parameter("weight"), groups_of(module)
    if groups > 1:
        rows = weight.shape[0] // groups
        scale = scale.view(groups, 1, -1).expand(-1, rows, -1).reshape(weight.shape[0], -1)
        return scale.view(*scale.shape, *(1,) * (weight.ndim - 2))
    shape = [1] * weight.ndim
    shape[1 - row_dimension(module)] = -1
    return scale.view(shape)


def rows_of(module: nn.Module, rows: Tensor) -> Tensor:
    """Reshape values ``[rows]`` so that they broadcast over the weight of a layer."""
    shape = [1] * module.get_parameter("weight").ndim
    shape[row_dimension(module)] = -1
    return rows.view(shape)


def most_of_columns(module: nn.Module, values: Tensor) -> Tensor:
    """The maximum of the values of each input column.

    Args:
        module: a reader.
        values: one value for each weight, with the shape of the weight of the reader.

    Returns:
        The maxima, ``[columns]``.
    """
    values = values.transpose(0, row_dimension(module))
    kernel = values.shape[2:].numel()
    return values.reshape(groups_of(module), -1, values.shape[1], kernel).amax((1, 3)).flatten()


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, value)


def _keep(module: nn.Module, names: tuple[str, ...], index: Tensor, dim: int) -> None:
    for name in names:
        tensor: Any = getattr(module, name, None)
        if tensor is not None:
            _set(module, name, tensor.detach().index_select(dim, index.to(tensor.device)))


def _resized(module: nn.Module, names: tuple[str, ...], size: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, size)


def resize(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep only some rows (outputs) and columns (inputs) of a layer, in place.

    Args:
        module: a layer with rows and columns, or a channelwise layer, which has only rows.
        rows, columns: the indices to keep; None keeps all. In a layer with groups, all groups that
            remain must keep the same number of rows, and of columns.

    Raises:
        ValueError: a group of a convolution keeps rows but no columns, or columns but no rows; or
            only a part of a group of a group norm is kept.
    """
    if is_channelwise(module):
        if rows is not None:
            if isinstance(module, nn.GroupNorm):
                module.num_groups = _whole_groups(rows, module.num_channels // module.num_groups)
            _keep(module, ("weight", "bias", "running_mean", "running_var"), rows, 0)
            _resized(module, _ROW_SIZES, len(rows))
            if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
                module.groups = module.in_channels = len(rows)
        return
    if isinstance(module, PlaceChannels):
        _resize_places(module, rows, columns)
        return
    if is_recurrent(module):
        resize_recurrent(module, rows, columns)
        return
    if groups_of(module) > 1:
        _resize_groups(module, rows, columns)
        return
    if rows is not None:
        _keep(module, ("weight",), rows, row_dimension(module))
        _keep(module, ("bias",), rows, 0)
        _resized(module, _ROW_SIZES, len(rows))
    if columns is not None:
        _keep(module, ("weight",), columns, 1 - row_dimension(module))
        _resized(module, _COLUMN_SIZES, len(columns))


def resize_tensor(
    module: nn.Module, name: str, dim: int, rows: Tensor | None, columns: Tensor | None
) -> None:
    """Keep only some rows or columns of one tensor of a module, in place.

    If the module is not a layer that `resize` cuts, its attributes that store their number, such as
    `out_features`, are updated.

    Args:
        module: the module.
        name: the name of the tensor, a parameter or a buffer.
        dim: the dimension of the rows or columns.
        rows, columns: the indices to keep. At least one of them is None.
    """
    for index, attributes in ((rows, _ROW_SIZES), (columns, _COLUMN_SIZES)):
        if index is not None:
            size = getattr(module, name).shape[dim]
            _keep(module, (name,), index, dim)
            if not known_tensors(module):
                written = [a for a in attributes if getattr(module, a, None) == size]
                _resized(module, tuple(written), len(index))


def _whole_groups(rows: Tensor, width: int) -> int:
    """The number of groups of channels that are kept.

    Args:
        rows: the channels to keep.
        width: the number of channels of a group.

    Raises:
        ValueError: only a part of a group is kept.
    """
    groups, counts = (rows // width).unique(return_counts=True)
    if bool((counts < width).any()):
        raise ValueError("only a part of a group of a group norm is kept")
    return len(groups)


def _resize_places(module: PlaceChannels, rows: Tensor | None, columns: Tensor | None) -> None:
    source = module.source
    if rows is not None:
        source = source[rows.to(source.device)]
        module.out_channels = len(rows)
    if columns is not None:
        columns = columns.to(source.device)
        # Channels that are not kept are copied from the channel of zeros after the last one.
        number = source.new_full((module.in_channels + 1,), len(columns))
        number[columns] = torch.arange(len(columns), device=source.device)
        source = number[source]
        module.weight = module.weight[columns]
        module.in_channels = len(columns)
    module.source = source


def _resize_groups(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    groups, weight = groups_of(module), module.get_parameter("weight").detach()
    rows = torch.arange(num_rows(module), device="cpu") if rows is None else rows
    columns = torch.arange(num_columns(module), device="cpu") if columns is None else columns
    width = weight.shape[1]
    row_group = rows // (num_rows(module) // groups)
    kept = row_group.unique()
    if not torch.equal(kept, (columns // width).unique()):
        raise ValueError(
            "a group of a convolution keeps rows but no columns, or columns but no rows"
        )
    # The columns that each row keeps, numbered within its group.
    inside = (columns % width).reshape(len(kept), -1)
    index = inside[torch.searchsorted(kept, row_group)].to(weight.device)
    weight = weight.index_select(0, rows.to(weight.device))
    index = index.view(*index.shape, *(1,) * (weight.ndim - 2)).expand(-1, -1, *weight.shape[2:])
    _set(module, "weight", weight.gather(1, index))
    _keep(module, ("bias",), rows, 0)
    _resized(module, ("groups",), len(kept))
    _resized(module, _ROW_SIZES, len(rows))
    _resized(module, _COLUMN_SIZES, len(columns))
