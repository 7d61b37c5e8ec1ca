"""Fold theta into the weights of the readers of gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate, check_theta
from pyro_sbp.gates.layers import (
    column_factor,
    weight_of,
)
from pyro_sbp.gates.recurrent import (
    HIDDEN,
    column_factors,
    is_recurrent,
)

__all__ = ["Scaled", "factors", "fold", "scaled_readers"]


@dataclass(frozen=True)
class Scaled:
    """A reader and the factor of its columns.

    Attributes:
        layer: the name of the module.
        tensor, dim: as for `Span`.
        scale: the product of theta of all gates that the reader reads, ``[columns]`` or
            ``[batch, columns]``.
    """

    layer: str
    tensor: str
    dim: int
    scale: Tensor

    @property
    def name(self) -> str:
        """The name of the reader in messages."""
        return ".".join(part for part in (self.layer, self.tensor) if part)


def scaled_readers(gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> list[Scaled]:
    """The readers of the gates that theta names, and the factors of their columns.

    Args:
        gates: the gates.
        theta: from gate name to a tensor ``[units]`` or ``[batch, units]``.
    """
    found: dict[str, Scaled] = {}
    for gate in gates:
        if gate.name not in theta:
            continue
        for span in gate.readers:
            scale = span.expand(theta[gate.name])
            if span.key in found:
                scale = found[span.key].scale * scale
            found[span.key] = Scaled(span.layer, span.tensor, span.dim, scale)
    return list(found.values())


def fold(net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold noise into the weights of the readers.

    Args:
        net: the network.
        gates: its gates, from `find_gates`.
        theta: from gate name to a tensor ``[units]``. The noise of gates that are not named is 1.

    Returns:
        From the name of a weight to the folded weight, with the same shape and dtype. Pass it to
        `torch.func.functional_call`. The network itself is not changed.

    Raises:
        ValueError: theta names an unknown gate, has a wrong number of units, or has a value for
            every example.
    """
    return {name: weight * factor for name, weight, factor in factors(net, gates, theta)}


def factors(
    net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors by which `fold` multiplies weights.

    Args:
        net, gates, theta: as for `fold`.

    Yields:
        The name of a weight, the weight, and its factor, which broadcasts to the weight.

    Raises:
        ValueError: as for `fold`.
    """
    check_theta(gates, theta)
    for reader in scaled_readers(gates, theta):
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
