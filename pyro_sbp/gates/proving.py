"""Prove that units can be removed: cut them, and compare the result with the masked network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.errors import first_line
from pyro_sbp.gates.copies import copy_network, fresh, to_precision
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.folding import Gate, GatedNetwork, call
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.locating import Trail, failing_code, suspects
from pyro_sbp.gates.nested import convert
from pyro_sbp.gates.state import State
from pyro_sbp.gates.steady import repeatable
from pyro_sbp.gates.surgery import EXACT, relative_difference, shrink_in_place
from pyro_sbp.gates.variants import (
    Kind,
    Variant,
    apply_variant,
    kind_of,
    variants,
    with_likely_sizes,
)

__all__ = ["Proof", "copy_for_measurement", "enliven"]

#: After this many gates of a kind without a variant that works, no more variants are tried.
_FAILURES = 2


def _a_third(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")[: -(-size // 3)]


def _first_half(size: int, generator: torch.Generator) -> Tensor:
    return torch.arange(size // 2, device="cpu")


def _all_but_one(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator, device="cpu")[1:]


_Pattern = Callable[[int, torch.Generator], Tensor]
_PATTERNS: tuple[_Pattern, ...] = (_a_third, _first_half, _all_but_one)


def _first(gate: Gate) -> tuple[bool, str]:
    """A key that identifies a gate, independent of its units."""
    return bool(gate.writers), (gate.writers or gate.readers)[0].layer


class Proof:
    """Shrink a network by random theta, and compare it with the masked network in float64.

    Whether the proof detects code that depends on a width can depend on which units are removed. So
    there are three patterns: a random third of the units, the first half, and all but one.

    Args:
        net: the network, which is not changed.
        x: its input.
        training_paths: as for `copy_for_measurement`.
    """

    def __init__(self, net: nn.Module, x: Any, training_paths: bool) -> None:
        self.net = net
        self.x = convert(x, torch.float64)
        # With gradients: DistributedDataParallel cannot be copied without them.
        self._exact = copy_for_measurement(net, torch.float64, training_paths, frozen=False)
        enliven(self._exact, torch.Generator().manual_seed(0))
        self._state = State(self._exact)
        self._where: str | None = None  # the module in which the last cut failed
        self._learned: dict[Kind, Variant] = {}  # the variant that works for gates of a kind
        self._failed: Counter[Kind] = Counter()

    def problem(
        self, gates: Sequence[Gate], patterns: Sequence[_Pattern] = _PATTERNS
    ) -> str | None:
        """The reason why the shrunk network differs from the masked one, or None if it is equal."""
        problems = (self._try(gates, gone) for gone in patterns)
        return next((problem for problem in problems if problem is not None), None)

    def _try(self, gates: Sequence[Gate], gone: _Pattern) -> str | None:
        generator = torch.Generator().manual_seed(0)
        theta = {}
        for gate in gates:
            values = 0.5 + torch.rand(
                gate.size, generator=generator, dtype=torch.float64, device="cpu"
            )
            values[gone(gate.size, generator)] = 0
            theta[gate.name] = values
        each = {name: value[None] for name, value in theta.items()}
        decisions = Decisions()
        trails = Trail(), Trail()
        try:
            with torch.no_grad():
                with self._measured(trails[0], self._exact), decisions.recorded():
                    masked = GatedNetwork(self._exact, gates)(fresh(self.x), each)
                net = copy_network(self._exact).requires_grad_(False)
                shrink_in_place(net, gates, theta)
                with self._measured(trails[1], net), decisions.repeated():
                    small = call(net, fresh(self.x))
            difference = relative_difference(masked, small)
        except Exception as error:  # a network's own code may raise anything
            self._where = trails[0].first_difference(trails[1])
            return f"cutting it fails: {first_line(error)}{failing_code(error)}"
        if not difference <= EXACT:
            self._where = trails[0].first_difference(trails[1])
            return f"cutting it changes the output by {difference:.1e}"
        return None

    @contextmanager
    def _measured(self, trail: Trail, net: nn.Module) -> Iterator[None]:
        try:
            with trail.followed(net), repeatable(torch.float64):
                yield
        finally:
            self._state.restore()

    def keep(
        self, candidates: Sequence[Candidate], proven: list[Gate], not_prunable: dict[str, str]
    ) -> None:
        """Add the gates that can be cut together to `proven`, in the order of the candidates.

        If a gate cannot be cut as it was measured, variants are tried: with sizes that modules
        store in attributes, and with larger units. A variant that works is tried first for later
        gates of the same kind. A gate without a variant that works is not prunable.

        Args:
            candidates: the candidates.
            proven: the list to which gates are added.
            not_prunable: the mapping to which reasons are added, by gate name.
        """
        found: list[Gate] = []
        failed: dict[str, str] = {}
        # A single pattern of units detects most problems.
        self._keep(candidates, found, failed, _PATTERNS[:1])
        if found and self.problem(found, _PATTERNS[1:]) is not None:
            found, failed = [], {}
            self._learned.clear()
            self._failed.clear()
            self._keep(candidates, found, failed, _PATTERNS)
        # A variant can have another name than the measured gate, but has the same first writer.
        place = {_first(candidate.gate): i for i, candidate in enumerate(candidates)}
        proven += sorted(found, key=lambda gate: place[_first(gate)])
        not_prunable |= failed

    def _keep(
        self,
        candidates: Sequence[Candidate],
        proven: list[Gate],
        not_prunable: dict[str, str],
        patterns: Sequence[_Pattern],
    ) -> None:
        gates = [self._as_learned(candidate) for candidate in candidates]
        problem = self.problem([*proven, *gates], patterns)
        if problem is None:
            proven += gates
        elif len(gates) == 1:
            other = self._variant(candidates[0], gates[0], proven)
            if other is None:
                not_prunable[gates[0].name] = problem
            else:
                proven.append(other)
        else:
            for part in self._parts(candidates, gates):
                self._keep(part, proven, not_prunable, patterns)

    def _parts(
        self, candidates: Sequence[Candidate], gates: Sequence[Gate]
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]]:
        """Divide candidates into those that can probably be cut together, and the others.

        The others are those of the module in which the cut failed, or half of the candidates.
        """
        wrong = set(suspects(gates, self._where)) if self._where is not None else set()
        if 0 < len(wrong) < len(gates):
            right = [c for c, gate in zip(candidates, gates, strict=True) if gate.name not in wrong]
            rest = [c for c, gate in zip(candidates, gates, strict=True) if gate.name in wrong]
            return right, rest
        half = len(gates) // 2
        return candidates[:half], candidates[half:]

    def _as_learned(self, candidate: Candidate) -> Gate:
        variant = self._learned.get(kind_of(self.net, candidate.gate))
        gate = None if variant is None else apply_variant(self.net, candidate, variant)
        return with_likely_sizes(self.net, candidate.gate) if gate is None else gate

    def _variant(self, candidate: Candidate, tried: Gate, proven: Sequence[Gate]) -> Gate | None:
        """A variant of a gate that can be cut, or None."""
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
    net: nn.Module, dtype: torch.dtype, training_paths: bool = False, frozen: bool = True
) -> nn.Module:
    """Copy a network for measurements, on the CPU and in evaluation mode.

    Args:
        net: the network.
        dtype: the dtype of the copy.
        training_paths: whether modules that contain other modules are in training mode. Some
            networks call auxiliary heads only in training mode.
        frozen: whether the parameters of the copy require no gradients.
    """
    net = to_precision(copy_network(net).to("cpu"), dtype).eval()
    if frozen:
        net.requires_grad_(False)
    for module in net.modules():
        module.training = training_paths and any(True for _ in module.children())
    return net


def enliven(net: nn.Module, generator: torch.Generator) -> None:
    """Replace parameters that are zero, or nearly zero, by random numbers.

    A head or a layer scale of zeros would hide all differences before it.
    """
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if float(parameter.abs().max()) < 1e-3:
                noise = torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
                )
                parameter.add_(noise, alpha=0.1)
