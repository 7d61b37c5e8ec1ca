"""The reasons why layers and parameters are not prunable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.layers import groups_of, is_channelwise, known_tensors
from pyro_sbp.gates.loose import Place
from pyro_sbp.gates.probe import Probe
from pyro_sbp.gates.reaching import Reach

__all__ = ["companions", "others", "shares"]


def companions(candidates: Iterable[Candidate], not_prunable: Mapping[str, str]) -> dict[str, str]:
    """The reasons for the other writers of gates that could not be proven.

    Args:
        candidates: the candidates for gates.
        not_prunable: the reasons that are known, by name.

    Returns:
        From the name of a writer to a reason that names the gate. The gate has its own reason.
    """
    return {
        reach.writer: f"has the units of {candidate.gate.name!r}, which is not prunable"
        for candidate in candidates
        if candidate.gate.name in not_prunable
        for reach in candidate.reaches
        if reach.writer != candidate.gate.name
    }


def others(
    probe: Probe,
    gates: Sequence[Gate],
    not_prunable: Mapping[str, str],
    reaches: Sequence[Reach],
) -> dict[str, str]:
    """The reasons for layers and parameters that belong to no gate and have no reason yet.

    Args:
        probe: the probe of the network, after the measurement.
        gates: the gates that were proven.
        not_prunable: the reasons that are already known, by name.
        reaches: the measurement of all writers.

    Returns:
        From name to reason. If all parameters of a layer have the same reason, the name is that of
        the layer, and otherwise that of the parameter.
    """
    net = probe.net
    covered = _tensors_of_gates(net, gates)
    for name in not_prunable:
        covered.update(map(id, _own(probe, name)))
    found: dict[str, str] = {}
    for layer, module in net.named_modules():
        rest = {
            leaf: parameter
            for leaf, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in covered and parameter.numel()
        }
        covered.update(map(id, rest.values()))
        why = {
            leaf: _why(probe, (layer, leaf), module, parameter, not_prunable, reaches)
            for leaf, parameter in rest.items()
        }
        whole = layer and len(rest) == sum(p is not None for p in module._parameters.values())
        if whole and len(set(why.values())) == 1:
            found[layer] = next(iter(why.values()))
        else:
            found |= {f"{layer}.{leaf}" if layer else leaf: words for leaf, words in why.items()}
    return found


def _tensors_of_gates(net: nn.Module, gates: Sequence[Gate]) -> set[int]:
    """The ids of the tensors that are cut with the gates."""
    found: set[int] = set()
    for gate in gates:
        for span in (*gate.writers, *gate.readers, *gate.channelwise, *gate.selects):
            module = net.get_submodule(span.layer)
            leaves = known_tensors(module) or (span.tensor,)
            if span.tensor:
                leaves = (*leaves, span.tensor)
            found.update(id(getattr(module, leaf, None)) for leaf in leaves)
    return found


def _own(probe: Probe, name: str) -> list[Tensor]:
    """The tensors of a layer, a product or a gate that `not_prunable` names.

    A gate on input features has none.
    """
    net, place = probe.net, probe.uses.products.get(name)
    if place is not None:
        return [probe.loose.places[place]]
    modules = dict(net.named_modules())
    if name not in modules:  # a gate on input features
        return []
    module = modules[name]
    known = [getattr(module, leaf, None) for leaf in known_tensors(module)]
    own = [tensor for tensor in known if isinstance(tensor, Tensor)]
    return [*own, *_of_parametrizations(module)] or list(module.parameters(recurse=False))


def _of_parametrizations(module: nn.Module) -> list[Tensor]:
    """The parameters from which the weights of a module are computed."""
    if not hasattr(module, "parametrizations"):
        return []
    return list(module.get_submodule("parametrizations").parameters())


def _why(
    probe: Probe,
    place: Place,
    module: nn.Module,
    parameter: Tensor,
    not_prunable: Mapping[str, str],
    reaches: Sequence[Reach],
) -> str:
    layer, _ = place
    if isinstance(module, nn.MultiheadAttention):
        return "belongs to an nn.MultiheadAttention, see separate_attention"
    if getattr(module, "proj_size", 0):
        return "has a proj_size, so that its outputs are not its hidden units"
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if transposed and groups_of(module) > 1 and not is_channelwise(module):
        return "is a transposed convolution with groups"
    if id(parameter) not in probe.used:
        return "is not used on the example"
    meeting = [reach for reach in reaches if layer in reach.seen or place in reach.met]
    for reach in meeting:
        if reach.writer in not_prunable:
            return f"meets the units of {reach.writer!r}, which is not prunable"
    if meeting:
        return f"has no separate part for each unit of {meeting[0].writer!r}"
    return "meets no units of a layer"


def shares(net: nn.Module, names: Iterable[str], places: Mapping[str, Place]) -> dict[str, float]:
    """The shares of layers and parameters in the number of parameters of a network.

    Args:
        net: the network.
        names: the names of the layers and parameters.
        places: from the name of a product to the place of its weight.

    Returns:
        From name to the share, between 0 and 1. A parameter with several names counts only for the
        first one.
    """
    total = sum(parameter.numel() for parameter in net.parameters())
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    seen: set[int] = set()
    found = {}
    for name in names:
        if name in places:
            own = [getattr(modules[places[name][0]], places[name][1])]
        elif name in modules:
            module = modules[name]
            own = [*module.parameters(recurse=False), *_of_parametrizations(module)]
        else:
            own = [parameters[name]] if name in parameters else []
        new = [tensor for tensor in own if id(tensor) not in seen]
        seen.update(map(id, new))
        found[name] = sum(tensor.numel() for tensor in new) / max(total, 1)
    return found
