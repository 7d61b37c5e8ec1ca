"""Find the gates of a network: measure its units, and prove that they can be removed exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, SupportsIndex, overload

import torch
from torch import nn

from pyro_sbp.deprecation import renamed_attribute, warn_renamed, with_new_names
from pyro_sbp.errors import did_you_mean, first_line
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import materialize
from pyro_sbp.gates.fan_in import powers_of_fan_in
from pyro_sbp.gates.following import follow
from pyro_sbp.gates.garbage import collecting_new_objects
from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.grouping import Candidate, candidates, groups_of_writers
from pyro_sbp.gates.hooks import without_idle_hooks
from pyro_sbp.gates.layers import num_columns
from pyro_sbp.gates.measuring import measure
from pyro_sbp.gates.nested import convert, tensors_of
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.not_prunable import companions, others, shares
from pyro_sbp.gates.probe import Probe, matrices
from pyro_sbp.gates.proving import Proof, copy_for_measurement
from pyro_sbp.gates.reaching import Reach
from pyro_sbp.reasons import MOST, reasons_by_share

__all__ = ["Gates", "find_gates"]


class Gates(list[Gate]):
    """The gates of a network: a list of `Gate`, in the order in which their layers are called.

    `find_gates` returns it. A slice or a copy has the same attributes. Sums and multiples (``+``,
    ``*``) are plain lists without these attributes, because they are not the gates of one network.

    Args:
        gates: the gates.
        not_prunable, called, shares: the values of the attributes.
        left_alone: the deprecated name of `not_prunable`.

    Attributes:
        not_prunable: from the name of each layer or parameter that is not prunable to the reason.
        shares: from each of these names to its share of the parameters of the network, between 0
            and 1.
        called: the names of the layers that can have gates on their rows (dense layers,
            convolutions, embeddings, recurrent layers) and of the modules of products with weights,
            in the order in which the network first calls them.
    """

    def __init__(
        self,
        gates: Iterable[Gate] = (),
        not_prunable: Mapping[str, str] | None = None,
        called: Sequence[str] = (),
        shares: Mapping[str, float] | None = None,
        *,
        left_alone: Mapping[str, str] | None = None,
    ):
        super().__init__(gates)
        if left_alone is not None:
            warn_renamed("the argument left_alone of Gates", "not_prunable")
            not_prunable = left_alone
        self.not_prunable = dict(not_prunable or {})
        self.shares = dict(shares or {})
        self.called = tuple(called)

    left_alone = renamed_attribute("Gates", "left_alone", "not_prunable")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(with_new_names(state, {"left_alone": "not_prunable"}))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Gate: ...

    @overload
    def __getitem__(self, index: slice) -> Gates: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Gate | Gates:
        found = super().__getitem__(index)
        return self._with(found) if isinstance(found, list) else found

    def copy(self) -> Gates:
        """A shallow copy."""
        return self._with(self)

    def _with(self, gates: Iterable[Gate]) -> Gates:
        return Gates(gates, self.not_prunable, self.called, self.shares)

    def reasons(self) -> str:
        """One line with the layers and parameters that are not prunable, and their reasons.

        Those with the largest shares of the parameters come first. At most 6 are listed.
        """
        nothing = "all layers are prunable" if self else "it has no parameters"
        shares = {name: (share,) for name, share in self.shares.items()}
        return "; ".join(reasons_by_share(self.not_prunable, shares, MOST)) or nothing


def _feature_gate(net: nn.Module, layer: str) -> Gate:
    """The gate on the input features of a dense layer.

    Raises:
        ValueError: the network has no dense layer of this name.
    """
    modules = dict(net.named_modules())
    if not isinstance(modules.get(layer), nn.Linear):
        dense = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"input_features names {layer!r}, which is not an nn.Linear of the network; "
            f"its nn.Linear layers are {', '.join(dense) or 'none'}"
        )
    size = num_columns(modules[layer])
    return Gate(f"{layer}_input", size, readers=(Span(layer, torch.arange(size, device="cpu")),))


@collecting_new_objects()
def find_gates(
    net: nn.Module,
    example_input: Any,
    input_features: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Gates:
    """Find the gates of a network, which are the sets of units that pruning can remove.

    A set of units has a gate under two conditions. First, every path from the units must end in
    input columns of readers: dense layers, convolutions, recurrent layers, or products with a
    weight, such as ``x @ self.weight``. This is measured with NaN. Second, it must be proven that
    units can be removed: with random theta that has zeros, the shrunk network must equal the masked
    network in float64, on the example. Operations that do not propagate NaN, such as comparisons,
    hide a path from the measurement. The comparison of the outputs can still detect such a path.

    Args:
        net: any network. It is not changed, except that the parameters of lazy layers are created.
        example_input: an input of the network: a tensor, a tuple of positional arguments, or a
            mapping of named arguments (see `call`). With a smaller input, the search is faster.
        input_features: names of dense layers whose input columns (pixels, flattened features) are
            the units of a further gate, with the name ``LAYER_input``.
        ignore: names of dense, recurrent, embedding or non-depthwise convolutional layers that the
            network does not call on the example and that never read units of other layers. If such
            a layer is not named, it prevents all gates, because it could read any unit.

    Returns:
        The gates, in the order in which the network calls their layers. The attribute
        `not_prunable` of the list has the reason for every layer or parameter that belongs to no
        gate.

    Raises:
        ValueError: `input_features` names a layer twice, or a layer that is not called, or
            something other than a dense layer; `ignore` names something other than a dense,
            recurrent, embedding or non-depthwise convolutional layer; the network cannot be copied,
            or cannot be called on the input; or the noise of a `Pruner` is attached to it.
    """
    check_no_noise(net, "searched for gates")
    if len(set(input_features)) < len(input_features):
        raise ValueError(f"input_features names a layer twice: {', '.join(input_features)}")
    try:
        materialize(net, example_input)
    except Exception as error:  # a network's own code may raise anything
        raise _not_callable(net, example_input, error) from error
    net = without_idle_hooks(net, example_input)
    features = [_feature_gate(net, layer) for layer in input_features]
    layers = matrices(net)
    for name in ignore:
        if name not in layers:
            raise ValueError(
                f"ignore names {name!r}, which is not a dense, recurrent, embedding or "
                f"non-depthwise convolutional layer of the network{did_you_mean(name, layers)}"
            )
    x = convert(example_input, torch.float32, torch.device("cpu"))
    probe, training_paths = _recorded(net, x)
    uncalled = [name for name in probe.uncalled if name not in ignore]
    order = list(probe.clean)
    for layer in input_features:
        if layer not in order:
            raise ValueError(f"input_features names {layer!r}, which is not called as a layer")
    not_prunable = {name: _why_unknown(net, name, probe) for name in layers if name not in order}
    if uncalled:
        # A layer that is not called on the example may be called on other inputs, and read any
        # unit.
        why = f"{uncalled[0]!r} is not called on the example and could read its units"
        not_prunable |= dict.fromkeys(order, why)
        return Gates([], not_prunable, order, shares(net, not_prunable, {}))
    with torch.no_grad():
        probe.settle()
        order = list(probe.clean)
        reaches = measure(probe, order)
    found = _candidates(net, x, probe, reaches, training_paths)
    not_prunable |= {reach.writer: reach.problem for reach in reaches if reach.problem is not None}
    probe.clean.clear()
    called = list(dict.fromkeys(probe.uses.layouts[name].layer for name in order))
    found = _in_order_of_calls(found, features, called)
    proven: list[Gate] = []
    if found:
        Proof(net, x, training_paths).keep(found, proven, not_prunable)
    not_prunable |= companions(found, not_prunable)
    not_prunable |= others(probe, proven, not_prunable, reaches)
    return Gates(proven, not_prunable, called, shares(net, not_prunable, probe.uses.products))


def _recorded(net: nn.Module, x: Any) -> tuple[Probe, bool]:
    """The probe of a network after its first pass, and the argument `training_paths` of its copy.

    It is true if the network calls more layers with it (see `copy_for_measurement`).

    Raises:
        ValueError: the network cannot be copied, or cannot be called on `x`.
    """
    probe = _record(net, x, training_paths=False)
    if probe.uncalled:
        with suppress(ValueError):
            other = _record(net, x, training_paths=True)
            if len(other.uncalled) < len(probe.uncalled):
                return other, True
    return probe, False


def _candidates(
    net: nn.Module, x: Any, probe: Probe, reaches: Sequence[Reach], training_paths: bool
) -> list[Candidate]:
    """The gates that remain to be proven, from the measurement of all writers."""
    with torch.no_grad():
        groups = groups_of_writers([reach for reach in reaches if reach.problem is None])
        followers = follow(probe, groups)
    layouts = probe.uses.layouts
    found = candidates(layouts, groups, followers)
    if not probe.uses.multiples:
        return found
    powers = powers_of_fan_in(net, x, [one.gate for one in found], training_paths)
    layouts |= {
        name: replace(layout, power=powers[layout.place])
        for name, layout in layouts.items()
        if layout.place in powers
    }
    return candidates(layouts, groups, followers) if powers else found


def _in_order_of_calls(
    found: Sequence[Candidate], features: Sequence[Gate], called: Sequence[str]
) -> list[Candidate]:
    """Candidates and gates on input features, in the order in which layers are called.

    A gate on input features comes just before the gate of the layer that reads them.
    """
    place = {name: index for index, name in enumerate(called)}

    def key(candidate: Candidate) -> tuple[int, bool]:
        gate = candidate.gate
        first = gate.writers[0] if gate.writers else gate.readers[0]
        return place[first.layer], bool(gate.writers)

    return sorted([*map(Candidate, features), *found], key=key)


def _record(net: nn.Module, x: Any, training_paths: bool) -> Probe:
    """Call a copy of the network once, and record the calls of its layers.

    Raises:
        ValueError: the network cannot be copied, or cannot be called on `x`.
    """
    copied = copy_for_measurement(net, torch.float32, training_paths)
    try:
        probe = Probe(copied, convert(x, torch.float32))
        with probe.watching():
            output = call(probe.net, probe.x)
        list(tensors_of(output))
    except Exception as error:  # a network's own code may raise anything
        raise _not_callable(net, x, error) from error
    return probe


def _not_callable(net: nn.Module, x: Any, error: Exception) -> ValueError:
    """The error of a network that cannot be called on the example input."""
    return ValueError(
        f"{type(net).__name__} cannot be called on the example input ({_shapes(x)}): "
        f"{first_line(error)}"
    )


def _shapes(x: Any) -> str:
    """The shapes of the tensors of an input, for a message."""
    try:
        return ", ".join(str(list(tensor.shape)) for tensor in tensors_of(x)) or "no tensor"
    except TypeError:
        return f"a {type(x).__name__}"


def _why_unknown(net: nn.Module, name: str, probe: Probe) -> str:
    """The reason why no call of a layer was recorded."""
    if name in probe.uncalled:
        return "is not called on the example"
    parent = net.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "belongs to an nn.MultiheadAttention, see separate_attention"
    if "weight" not in net.get_submodule(name)._parameters:
        return "computes its weight"
    if name in probe.uses.computing:
        return "computes another weight from its own in every call"
    return "has a weight that is used elsewhere"
