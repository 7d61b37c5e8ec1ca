"""Recognise the function calls of a network that compute a layer or a product with a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_sbp.gates.gate import Span
from pyro_sbp.gates.layers import (
    Select,
    argument,
    channel_dim,
    groups_of,
    is_channelwise,
    is_matrix,
    is_reader,
    multiplies,
    num_rows,
    operands,
    row_dimension,
    serves,
    weight_of,
)
from pyro_sbp.gates.loose import LooseTensors, Place
from pyro_sbp.gates.products import Product, products
from pyro_sbp.gates.recurrent import HIDDEN, call_of, first_weight, is_recurrent

__all__ = ["Layout", "Use", "Uses", "hidden_of"]

_NO_LAYER = nn.Identity()
#: Functions of layers with a bias, and its position and name in their arguments.
_WITH_BIAS = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d})
_BIAS = (2, "bias")


@dataclass(frozen=True)
class Layout:
    """Where the rows and columns of a layer or a product lie.

    Attributes:
        layer: the name of the module.
        role: what the layer is for units that reach its columns. "other" is an embedding, which has
            no such columns.
        groups: the number of groups of rows and columns.
        tensor: the name of the weight, or "" if it is the usual weight of the module.
        dims: the dimensions of the rows and of the columns in this weight.
        size: the number of rows.
        power: the power of the number of columns by which the network multiplies the weight.
    """

    layer: str
    role: Literal["reader", "channelwise", "select", "other"]
    groups: int = 1
    tensor: str = ""
    dims: tuple[int, int] = (0, 1)
    size: int = 0
    power: float = 0.0

    @property
    def place(self) -> Place:
        """The place of the weight."""
        return self.layer, self.tensor or "weight"

    def rows(self, units: Tensor) -> Span:
        """The span of the rows, for the unit of each row."""
        return Span(self.layer, units, self.groups, self.tensor, self.dims[0] if self.tensor else 0)

    def columns(self, units: Tensor) -> Span:
        """The span of the columns, for the unit of each column."""
        dim = self.dims[1] if self.tensor else 0
        return Span(self.layer, units, self.groups, self.tensor, dim, self.power)


@dataclass(frozen=True)
class Use:
    """A function call that computes a layer or a product.

    Attributes:
        name: the name of the layer or product.
        sees: for each input, the name of the layer or product to whose columns it belongs, the
            tensor, and the dimension of its channels.
        writes: whether the layer produces units.
        out_dim: the dimension of the units in the output, or None for the usual one of the layer.
        bias: the bias that is added to the output, if it is not the stored bias of a known layer,
            or None.
        weight: the weight, if it depends on other tensors than the stored one, such as a gain, or
            None.
        weight_dims: the dimensions of the rows and of the columns in `weight`.
    """

    name: str
    sees: tuple[tuple[str, Tensor, int], ...]
    writes: bool
    out_dim: int | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    weight_dims: tuple[int, int] = (0, 1)


def hidden_of(name: str) -> str:
    """The name for the columns of a recurrent layer that read hidden units."""
    return f"{name}.{HIDDEN}"


class Uses:
    """The layers of a network and its products with weights, as they are used by function calls.

    A layer is recognised by its weight or its running mean.

    Args:
        net: the network.
        loose: its tensors.

    Attributes:
        layouts: from the name of each layer and recorded product to its layout.
        computing: the names of the layers that compute another weight from their stored weight in
            every call.
        multiples: from the place of a weight to the multiple of it that was used last, and the
            weight.
    """

    def __init__(self, net: nn.Module, loose: LooseTensors) -> None:
        self.loose = loose
        self.layouts: dict[str, Layout] = {}
        self.computing: set[str] = set()
        self.multiples: dict[Place, tuple[Tensor, Tensor]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._by_tensor: dict[int, str] = {}
        self._products: dict[Place, str] = {}
        self._ambiguous: set[Place] = set()
        for name, module in net.named_modules():
            tensors: tuple[Tensor | None, ...] = ()
            if isinstance(module, Select):
                tensors = (module.index,)
            elif is_recurrent(module):
                tensors = (first_weight(module),)
                self.layouts[hidden_of(name)] = Layout(name, "reader", tensor=HIDDEN)
            elif is_matrix(module) or is_channelwise(module):
                # Only stored tensors: a computed weight is a new tensor in every call.
                tensors = (
                    module._parameters.get("weight"),
                    module._buffers.get("weight"),
                    module._buffers.get("running_mean"),
                )
            if any(tensor is not None for tensor in tensors):
                self._modules[name], self.layouts[name] = module, _layout(name, module)
                for tensor in tensors:
                    if tensor is not None:
                        self._by_tensor.setdefault(id(tensor), name)

    def module(self, name: str) -> nn.Module | None:
        """The layer with a name, or None for a product."""
        return self._modules.get(name)

    def of(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], record: bool
    ) -> Use | None:
        """Find the layer or product that a function call computes.

        Args:
            func, args, kwargs: the call.
            record: whether to record new products.

        Returns:
            The use, or None if the call computes neither.
        """
        call = call_of(func, args)
        if call is not None:
            name = self._by_tensor.get(id(call.weights[0]))
            if name is None:
                return None
            states = tuple((hidden_of(name), state, state.ndim - 1) for state in call.state)
            return Use(name, ((name, call.x, call.x.ndim - 1), *states), True, -1)
        for value in (*args, *kwargs.values()):
            name = self._by_tensor.get(id(value))
            if name is not None and serves(func, self._modules[name]):
                return self._of_layer(name, func, args, kwargs)
        name = self._of_multiple(func, args, kwargs)
        if name is not None:
            return self._of_layer(name, func, args, kwargs)
        for product in products(func, args, kwargs):
            own = self._of_own_product(product)
            if own is not None:
                return own
            self.computing.update(
                layer
                for layer, leaf in self.loose.sources(product.weight) or ()
                if leaf == "weight" and serves(func, self._modules.get(layer, _NO_LAYER))
            )
            use = self._of_product(product, record)
            if use is not None:
                return use
        return None

    def _of_layer(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Use:
        layer = self._modules[name]
        sees: tuple[tuple[str, Tensor, int], ...] = ()
        if not isinstance(layer, nn.Embedding):
            x: Tensor = argument(operands(func)[0], args, kwargs)
            sees = ((name, x, channel_dim(layer, x)),)
        weight = argument(operands(func)[1], args, kwargs)
        weight = weight if self._is_loose(weight) else None
        bias = argument(_BIAS, args, kwargs) if func in _WITH_BIAS else None
        bias = bias if is_matrix(layer) and self._is_loose(bias) else None
        if weight is None and bias is None:
            return Use(name, sees, is_matrix(layer))
        if not is_matrix(layer):
            return Use(name, sees, False, weight=weight)
        out_dim = channel_dim(layer, weight_of(layer)) - weight_of(layer).ndim
        row_dim = row_dimension(layer)
        return Use(name, sees, True, out_dim, bias, weight, (row_dim, 1 - row_dim))

    def _of_multiple(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The layer of whose weight a call uses a multiple, such as ``weight * scale``, or None."""
        weight = argument(operands(func)[1], args, kwargs)
        if not isinstance(weight, Tensor):
            return None
        found = [
            layer
            for layer, leaf in self.loose.sources(weight) or ()
            if leaf == "weight" and serves(func, self._modules.get(layer, _NO_LAYER))
        ]
        if len(found) != 1 or weight.shape != weight_of(self._modules[found[0]]).shape:
            return None
        dims = self.loose.dimensions(weight, (found[0], "weight"))
        straight = dims is not None and all(d in (-1, place) for place, d in enumerate(dims))
        if not straight:
            return None
        self._note((found[0], "weight"), weight, weight_of(self._modules[found[0]]))
        return found[0]

    def _note(self, place: Place, used: Tensor, weight: Tensor) -> None:
        """Record the tensor that is used in place of a stored weight, if it is not a view of it."""
        if used.data_ptr() != weight.data_ptr():
            self.multiples[place] = used, weight

    def _is_loose(self, tensor: Any) -> bool:
        """Whether a tensor is, or is computed from, a tensor that belongs to no known layer."""
        if not isinstance(tensor, Tensor):
            return False
        return not self.loose.places.keys().isdisjoint(self.loose.sources(tensor) or ())

    def _of_own_product(self, product: Product) -> Use | None:
        """The use of a dense layer that computes its output as a product with its weight."""
        sources = self.loose.sources(product.weight) or frozenset()
        for layer, leaf in sorted(sources):
            module = self._modules.get(layer, _NO_LAYER)
            if leaf != "weight" or not multiplies(module) or self.loose.sources(product.x):
                continue
            dims = self.loose.dimensions(product.weight, (layer, leaf))
            if dims is not None and tuple(dims[dim] for dim in product.dims) == (0, 1):
                seen = (layer, product.x, product.x.ndim + product.x_dim)
                weight = product.weight if len(sources) > 1 else None
                self._note((layer, leaf), product.weight, weight_of(module))
                return Use(
                    layer, (seen,), True, product.out_dim, weight=weight, weight_dims=product.dims
                )
        return None

    def _of_product(self, product: Product, record: bool) -> Use | None:
        """The use of a product with a weight that belongs to no known layer, or None."""
        sources = self.loose.sources(product.weight)
        if not sources or self.loose.sources(product.x) is not None:
            return None
        for place in sorted(sources & self.loose.places.keys(), key=self.loose.rank):
            dims = self.loose.dimensions(product.weight, place)
            if dims is None or place in self._ambiguous:
                continue
            rows, columns = (dims[dim] for dim in product.dims)
            if min(rows, columns) < 0:
                continue
            if record and place not in self._products:
                self._record(place, rows, columns)
            name = self._products.get(place)
            if name is None:
                continue
            if self.layouts[name].dims != (rows, columns):
                self.forget(name)
                self._ambiguous.add(place)
                continue
            seen = (name, product.x, product.x.ndim + product.x_dim)
            weight = product.weight if len(sources) > 1 else None
            self._note(place, product.weight, self.loose.places[place])
            return Use(name, (seen,), True, product.out_dim, product.bias, weight, product.dims)
        return None

    def _record(self, place: Place, rows: int, columns: int) -> None:
        layer, leaf = place
        name = f"{layer}.{leaf}" if layer else leaf
        size = self.loose.places[place].shape[rows]
        self._products[place] = name
        self.layouts[name] = Layout(layer, "reader", tensor=leaf, dims=(rows, columns), size=size)

    def forget(self, name: str) -> None:
        """Forget a product, so that it is not recognised any more."""
        self._products = {place: n for place, n in self._products.items() if n != name}
        del self.layouts[name]

    def shorten(self) -> dict[str, str]:
        """Rename each product after its module, if it is the only product of the module.

        Returns:
            From old name to new name.
        """
        layers = [layer for layer, _ in self._products]
        short = {
            name: place[0]
            for place, name in self._products.items()
            if layers.count(place[0]) == 1 and place[0] and place[0] not in self.layouts
        }
        self._products = {p: short.get(name, name) for p, name in self._products.items()}
        self.layouts = {short.get(name, name): of for name, of in self.layouts.items()}
        return short

    @property
    def products(self) -> dict[str, Place]:
        """From the name of each product to the place of its weight."""
        return {name: place for place, name in self._products.items()}


def _layout(name: str, module: nn.Module) -> Layout:
    if isinstance(module, Select):
        return Layout(name, "select")
    if is_channelwise(module):
        return Layout(name, "channelwise")
    role: Literal["reader", "other"] = "reader" if is_reader(module) else "other"
    return Layout(name, role, groups_of(module), size=num_rows(module))
