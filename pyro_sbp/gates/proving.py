"""Prove that units can be removed from a network: cut them, and compare with the masked network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.errors import first_line
from pyro_sbp.gates.copies import copy_network, to_precision
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.folding import Gate, GatedNetwork, call, repeatable
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.surgery import relative_difference, shrink_in_place
from pyro_sbp.gates.variants import (
    Kind,
    Variant,
    apply_variant,
    kind_of,
    variants,
    with_likely_sizes,
)

__all__ = ["Proof", "copy_for_measurement", "enliven"]

#: The largest `relative_difference` of the shrunk from the masked network in a proof, in float64.
TOLERANCE = 1e-10
#: After this many gates of a kind without a variant that works, none is tried for the others.
_FAILURES = 2


def _a_third(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")[: -(-size // 3)]


def _first_half(size: int, generator: torch.Generator) -> Tensor:
    return torch.arange(size // 2, device="cpu")


def _all_but_one(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")[1:]


class Proof:
    """Shrinks a network by random theta and compares it with the masked one, in float64.

    Which units go decides whether code that counts on the width of something is found out: some
    here and there, those that come first, all but one.
    """

    def __init__(self, net: nn.Module, x: Any, training_paths: bool) -> None:
        self.net, self.x, self.training_paths = net, x, training_paths
        self._learned: dict[Kind, Variant] = {}  # what the gates of a kind need
        self._failed: Counter[Kind] = Counter()

    def problem(self, gates: Sequence[Gate]) -> str | None:
        """Why the shrunk network differs from the masked one; None if it does not."""
        problems = (self._try(gates, gone) for gone in (_a_third, _first_half, _all_but_one))
        return next((problem for problem in problems if problem is not None), None)

    def _try(
        self, gates: Sequence[Gate], gone: Callable[[int, torch.Generator], Tensor]
    ) -> str | None:
        generator = torch.Generator().manual_seed(0)
        theta = {}
        for gate in gates:
            values = 0.5 + torch.rand(
                gate.size, generator=generator, dtype=torch.float64, device="cpu"
            )
            values[gone(gate.size, generator)] = 0
            theta[gate.name] = values
        net = copy_for_measurement(self.net, torch.float64, self.training_paths)
        enliven(net, generator)
        each = {name: value[None] for name, value in theta.items()}
        decisions = Decisions(relative_difference, TOLERANCE)
        try:
            with torch.no_grad():
                with undone(net), repeatable(torch.float64), decisions.recorded():
                    masked = GatedNetwork(net, gates)(convert(self.x, torch.float64), each)
                shrink_in_place(net, gates, theta)
                with undone(net), repeatable(torch.float64), decisions.repeated():
                    small = call(net, convert(self.x, torch.float64))
            difference = relative_difference(masked, small)
        except Exception as error:  # a network's own code may raise anything
            return f"cutting it fails: {first_line(error)}"
        if not difference <= TOLERANCE:
            return f"cutting it changes the output by {difference:.1e}"
        return None

    def keep(
        self, candidates: Sequence[Candidate], proven: list[Gate], left_alone: dict[str, str]
    ) -> None:
        """Add the gates that can be cut together to `proven`, found by halving.

        For a gate that cannot be cut as it was measured, variants are tried: with sizes that are
        written into modules, and with larger units. A variant that works is tried first for later
        gates of the same kind. A gate without a variant that works is not prunable.
        """
        gates = [self._as_learned(candidate) for candidate in candidates]
        problem = self.problem([*proven, *gates])
        if problem is None:
            proven += gates
        elif len(gates) == 1:
            other = self._variant(candidates[0], gates[0], proven)
            if other is None:
                left_alone[gates[0].name] = problem
            else:
                proven.append(other)
        else:
            half = len(gates) // 2
            self.keep(candidates[:half], proven, left_alone)
            self.keep(candidates[half:], proven, left_alone)

    def _as_learned(self, candidate: Candidate) -> Gate:
        variant = self._learned.get(kind_of(self.net, candidate.gate))
        gate = None if variant is None else apply_variant(self.net, candidate, variant)
        return with_likely_sizes(self.net, candidate.gate) if gate is None else gate

    def _variant(self, candidate: Candidate, tried: Gate, proven: Sequence[Gate]) -> Gate | None:
        """A variant of a gate that can be cut."""
        kind = kind_of(self.net, candidate.gate)
        if self._failed[kind] >= _FAILURES:
            return None
        for variant in variants(self.net, candidate):
            gate = apply_variant(self.net, candidate, variant)
            if gate is None or gate == tried or self.problem([*proven, gate]) is not None:
                continue
            whole = with_likely_sizes(self.net, gate)
            if whole != gate and self.problem([*proven, whole]) is None:
                gate = whole
            self._learned[kind] = Variant.of(self.net, variant.parts, gate.sizes)
            return gate
        self._failed[kind] += 1
        return None


def copy_for_measurement(
    net: nn.Module, dtype: torch.dtype, training_paths: bool = False
) -> nn.Module:
    """A copy for measurements: on the CPU, as in evaluation, without gradients.

    With `training_paths`, modules that hold others are in training mode: some call heads of
    theirs only there.
    """
    net = to_precision(copy_network(net).to("cpu"), dtype).eval().requires_grad_(False)
    for module in net.modules():
        module.training = training_paths and any(True for _ in module.children())
    return net


def enliven(net: nn.Module, generator: torch.Generator) -> None:
    """Give parameters that are (nearly) zero an ordinary size: behind a head or a layer scale of
    zeros every difference would vanish."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if float(parameter.abs().max()) < 1e-3:
                noise = torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
                )
                parameter.add_(noise, alpha=0.1)
