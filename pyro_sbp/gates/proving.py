"""Prove that units can be removed: cut them, and compare the result with the masked network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.errors import first_line
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network, fresh, to_precision
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.folding import factors
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.grouping import Candidate
from pyro_sbp.gates.locating import Trail, failing_code, failing_module, suspects
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


def _theta(gates: Sequence[Gate], gone: _Pattern) -> dict[str, Tensor]:
    """Random theta between 0.5 and 1.5, with zeros for a pattern of the units of each gate."""
    generator = torch.Generator().manual_seed(0)
    theta = {}
    for gate in gates:
        values = 0.5 + torch.rand(gate.size, generator=generator, dtype=torch.float64, device="cpu")
        values[gone(gate.size, generator)] = 0
        theta[gate.name] = values
    return theta


@dataclass(frozen=True)
class _Reference:
    """The output of the masked network, and its discrete choices."""

    gates: list[Gate]
    output: Any
    decisions: Decisions


@dataclass(frozen=True)
class _Failure:
    """How a proof fails.

    Attributes:
        gone: the pattern of removed units for which it fails.
        reason: the reason.
        module: the module that raised an error, or None.
    """

    gone: _Pattern
    reason: str
    module: str | None = None


class Proof:
    """Shrink a network by random theta, and compare it with the masked network in float64.

    Whether the proof detects code that depends on a width can depend on which units are removed. So
    there are three patterns: a random third of the units, the first half, and all but one.

    Args:
        net: the network, which is not changed.
        x: its input.
        training_paths: as for `copy_for_measurement`.

    Attributes:
        exact: the copy of the network, in float64, that is cut and called.
    """

    def __init__(self, net: nn.Module, x: Any, training_paths: bool) -> None:
        self.net = net
        self.x = convert(x, torch.float64)
        self.exact = copy_for_measurement(net, torch.float64, training_paths)
        enliven(self.exact, torch.Generator().manual_seed(0))
        self._state = State(self.exact)
        self._originals = _unchanged_parameters(net, self.exact)
        self._references: dict[_Pattern, _Reference] = {}  # the last one of each pattern
        self._learned: dict[Kind, Variant] = {}  # the variant that works for gates of a kind
        self._failed: Counter[Kind] = Counter()
        self._makes_choices = True  # until a call shows that it does not

    def _failure(self, gates: Sequence[Gate], patterns: Sequence[_Pattern]) -> _Failure | None:
        """How the shrunk network differs from the masked one, or None if it is equal."""
        problems = (self._try(gates, gone) for gone in patterns)
        return next((problem for problem in problems if problem is not None), None)

    def _try(self, gates: Sequence[Gate], gone: _Pattern) -> _Failure | None:
        theta = _theta(gates, gone)
        names: dict[int, str] = {}
        try:
            # Most cuts that fail raise an error, and then the masked network is not needed. It is
            # called first only if the network makes choices, which the cut network must repeat.
            masked = self._reference(gates, gone, theta) if self._makes_choices else None
            small = self._small(gates, theta, masked, names)
            if masked is None:
                masked = self._reference(gates, gone, theta)
                if masked.decisions.taken:
                    small = self._small(gates, theta, masked, names)
            difference = relative_difference(masked.output, small)
        except Exception as error:  # a network's own code may raise anything
            reason = f"cutting it fails: {first_line(error)}{failing_code(error)}"
            return _Failure(gone, reason, failing_module(error, names))
        if not difference <= EXACT:
            return _Failure(gone, f"cutting it changes the output by {difference:.1e}")
        return None

    def _small(
        self,
        gates: Sequence[Gate],
        theta: Mapping[str, Tensor],
        masked: _Reference | None,
        names: dict[int, str],
    ) -> Any:
        """The output of the cut network, which repeats the choices of the masked one.

        If this raises an error, `names` has the names of the modules of the cut network.
        """
        choices = nullcontext() if masked is None else masked.decisions.repeated()
        with self.cut(gates, theta), choices:
            names.update((id(module), name) for name, module in self.exact.named_modules())
            small = call(self.exact, fresh(self.x))
        names.clear()
        return small

    def _reference(
        self, gates: Sequence[Gate], gone: _Pattern, theta: Mapping[str, Tensor]
    ) -> _Reference:
        """The output of the masked network. It depends only on the readers of the gates, so that it
        is computed once for all variants with the same readers."""
        masked = [Gate(gate.name, gate.size, gate.readers) for gate in gates]
        known = self._references.get(gone)
        if known is None or known.gates != masked:
            decisions = Decisions()
            output = self._masked(gates, theta, decisions)
            known = self._references[gone] = _Reference(masked, output, decisions)
            self._makes_choices = bool(decisions.taken)
        return known

    def _masked(
        self, gates: Sequence[Gate], theta: Mapping[str, Tensor], decisions: Decisions
    ) -> Any:
        each = {name: value[None] for name, value in theta.items()}
        with self._measured(), decisions.recorded():
            return GatedNetwork(self.exact, gates)(fresh(self.x), each)

    @contextmanager
    def cut(self, gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which the copy of the network is smaller, and may be called.

        Afterwards, the copy has its parameters, with their values, and its state again.
        """
        weights = {name: weight for name, weight, _ in factors(self.exact, gates, theta)}
        with self._measured():  # it restores the layers, but not the values of their parameters
            # The network has the values of most of them. Clones of large networks need much memory.
            values = {
                name: self._originals[name] if name in self._originals else weight.clone()
                for name, weight in weights.items()
            }
            try:
                shrink_in_place(self.exact, gates, theta)
                yield
            finally:
                for name, weight in weights.items():
                    weight.copy_(values[name])

    @contextmanager
    def _measured(self) -> Iterator[None]:
        try:
            with torch.no_grad(), repeatable(torch.float64):
                yield
        finally:
            self._state.restore()

    def _where(self, gates: Sequence[Gate], gone: _Pattern) -> str | None:
        """The first module that fails, or whose output differs, when gates are cut."""
        theta = _theta(gates, gone)
        trails = Trail(), Trail()
        decisions = Decisions()
        with suppress(Exception), trails[0].followed(self.exact):
            self._masked(gates, theta, decisions)
        # The cut comes first, because it replaces modules.
        with (
            suppress(Exception),
            self.cut(gates, theta),
            trails[1].followed(self.exact),
            decisions.repeated(),
        ):
            call(self.exact, fresh(self.x))
        return trails[0].first_difference(trails[1])

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
        if found and self._failure(found, _PATTERNS[1:]) is not None:
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
        failure = self._failure([*proven, *gates], patterns)
        if failure is None:
            proven += gates
        elif len(gates) == 1:
            other = self._variant(candidates[0], gates[0], proven)
            if other is None:
                not_prunable[gates[0].name] = failure.reason
            else:
                proven.append(other)
        else:
            for part in self._parts(candidates, gates, proven, failure):
                self._keep(part, proven, not_prunable, patterns)

    def _parts(
        self,
        candidates: Sequence[Candidate],
        gates: Sequence[Gate],
        proven: Sequence[Gate],
        failure: _Failure,
    ) -> list[Sequence[Candidate]]:
        """Divide candidates that cannot be cut together.

        Candidates of a kind that has failed before are tried one by one, after the others.
        Otherwise the candidates are divided into those of the module in which the cut failed, and
        the others. The former come first, because a variant that works for them is used for all
        gates of their kind. If nothing is known about the module, the parts are the two halves.
        """
        failed = [
            self._failed[kind_of(self.net, candidate.gate)] >= _FAILURES for candidate in candidates
        ]
        if any(failed):
            others = [c for c, alone in zip(candidates, failed, strict=True) if not alone]
            single = [[c] for c, alone in zip(candidates, failed, strict=True) if alone]
            return [others, *single] if others else [*single]
        where = failure.module or self._where([*proven, *gates], failure.gone)
        wrong = set(suspects(gates, where)) if where is not None else set()
        if 0 < len(wrong) < len(gates):
            pairs = list(zip(candidates, gates, strict=True))
            return [
                [candidate for candidate, gate in pairs if gate.name in wrong],
                [candidate for candidate, gate in pairs if gate.name not in wrong],
            ]
        half = len(gates) // 2
        return [candidates[:half], candidates[half:]]

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
            if (
                gate is None
                or gate == tried
                or self._failure([*proven, gate], _PATTERNS) is not None
            ):
                continue
            whole = with_likely_sizes(self.net, gate)
            if whole != gate and self._failure([*proven, whole], _PATTERNS) is None:
                gate = whole
            self._learned[kind] = Variant.of(self.net, variant.parts, gate.sizes)
            return gate
        self._failed[kind] += 1
        return None


def _unchanged_parameters(net: nn.Module, copy: nn.Module) -> dict[str, Tensor]:
    """The parameters of a network that have the same values in a copy of another precision."""
    others = dict(copy.named_parameters(remove_duplicate=False))
    return {
        name: parameter.detach()
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if name in others and torch.equal(parameter.detach().to(others[name]), others[name])
    }


def copy_for_measurement(
    net: nn.Module, dtype: torch.dtype, training_paths: bool = False
) -> nn.Module:
    """Copy a network for measurements, on the CPU and in evaluation mode.

    Args:
        net: the network.
        dtype: the dtype of the copy.
        training_paths: whether modules that contain other modules are in training mode. Some
            networks call auxiliary heads only in training mode.
    """
    net = to_precision(copy_network(net).to("cpu"), dtype).eval().requires_grad_(False)
    for module in net.modules():
        module.training = training_paths and any(True for _ in module.children())
    return net


def enliven(net: nn.Module, generator: torch.Generator) -> None:
    """Add random numbers to parameters whose elements are all zero, or nearly zero, in place.

    A head or a layer scale of zeros would hide all differences that arise before it.
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
