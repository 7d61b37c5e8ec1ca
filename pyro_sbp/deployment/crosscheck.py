"""Count the multiply-accumulates (MACs) of a network a second time, with ptflops."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from ptflops import get_model_complexity_info
from ptflops.aten_ops import ATEN_OPS_MAPPING
from torch import nn

from pyro_sbp.errors import first_line
from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.copies import fresh
from pyro_sbp.gates.state import undone
from pyro_sbp.pruning.macs import by_module, costs_by_layer, original_name, unfused

__all__ = ["CrossCheck", "cross_check"]

#: Two counts agree if they differ by at most this share.
TOLERANCE = 0.05
#: The largest number of layers that an explanation names.
NAMED = 3


@dataclass(frozen=True)
class CrossCheck:
    """The MACs of one call of a network, by `count_macs` and by ptflops.

    ptflops also counts the biases of dense layers and convolutions, which matters in small
    networks, and it knows fewer operations.

    Attributes:
        macs: the count of `count_macs`.
        ptflops: the count of ptflops; None if it cannot run the network.
        layers: the layers in which the two counts differ by more than 5 %, with the largest
            difference first: from the name of a layer, or "" for operations outside of layers, to
            (count of `costs_by_layer`, count of ptflops).
        failure: why ptflops cannot run the network, in one line.
    """

    macs: int
    ptflops: int | None
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether there are two counts, and they differ by at most 5 % of the count of
        `count_macs`."""
        return self.ptflops is not None and _agree(self.macs, self.ptflops)

    def explanation(self, name: str) -> str | None:
        """One line that says where the counts differ, or why there is no second count; None if they
        agree.

        Args:
            name: the name of the network in the message, such as "dense".
        """
        if self.ptflops is None:
            return f"ptflops cannot count the MACs of the {name} network: {self.failure}"
        if self.agrees:
            return None
        if self.macs:
            share = abs(self.ptflops / self.macs - 1)
            more = f"{share:.0%} {'more' if self.ptflops > self.macs else 'fewer'} MACs"
        else:
            more = f"{self.ptflops:,} MACs instead of none"
        layers = [
            f"{repr(layer) if layer else 'outside of layers'} ({theirs:,} instead of {ours:,})"
            for layer, (ours, theirs) in self.layers.items()
        ]
        rest = f" and {len(layers) - NAMED} more layers" if len(layers) > NAMED else ""
        where = f": {', '.join(layers[:NAMED])}{rest}" if layers else ""
        why = "it includes biases" if self.ptflops > self.macs else "it knows fewer operations"
        return f"ptflops counts {more} in the {name} network{where}; {why}"


def cross_check(net: nn.Module, example_input: Any) -> CrossCheck:
    """Count the MACs of a network in one call with `costs_by_layer` and with ptflops.

    Args:
        net: the network. It is called in evaluation mode. Its mode and its hooks do not change.
        example_input: an input, as for `call`. The counts are proportional to its batch size.
    """
    ours = {name: macs for name, (macs, _) in costs_by_layer(net, example_input).items()}
    total, theirs, failure = _by_ptflops(net, example_input)
    if total is None:
        return CrossCheck(sum(ours.values()), None, failure=failure)
    layers = {name: (ours.get(name, 0), theirs.get(name, 0)) for name in {**ours, **theirs}}
    differing = [name for name, (a, b) in layers.items() if not _agree(a, b)]
    differing.sort(key=lambda name: -abs(layers[name][0] - layers[name][1]))
    return CrossCheck(sum(ours.values()), total, {name: layers[name] for name in differing})


def _agree(ours: int, theirs: int) -> bool:
    return abs(theirs - ours) <= TOLERANCE * ours


class _Calling(nn.Module):
    """A module that calls a network without having it as a child.

    ptflops registers hooks on children and sets their modes, and undoes neither.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function
        self.error: Exception | None = None

    def forward(self, _: Any) -> None:
        try:
            self.function()
        except Exception as error:  # ptflops prints the error and continues
            self.error = error
            raise


def _by_ptflops(
    net: nn.Module, example_input: Any
) -> tuple[int | None, dict[str, int], str | None]:
    """The total count of ptflops, its count of each layer, and the reason if there is no count."""
    spent = 0

    def recording(formula: Callable[..., int]) -> Callable[..., int]:
        def count(inputs: Any, outputs: Any) -> int:
            nonlocal spent
            macs = formula(inputs, outputs)
            spent += macs
            return macs

        return count

    calling = _Calling(lambda: call(net, fresh(example_input)))
    printed = io.StringIO()
    with (
        torch.no_grad(),
        undone(net),
        evaluating(net),
        unfused(),
        by_module(net, lambda: spent) as found,
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        total, _ = get_model_complexity_info(
            calling,
            (1,),
            print_per_layer_stat=False,
            as_strings=False,
            input_constructor=lambda _: torch.zeros(1, device="cpu"),
            ost=printed,
            custom_modules_hooks={op: recording(f) for op, f in ATEN_OPS_MAPPING.items()},
            backend="aten",
        )
    if total is None:
        failure = first_line(calling.error) if calling.error else "it reports no reason"
        return None, {}, failure
    layers: dict[str, int] = {}
    for name, macs in found.items():
        own = name and any(True for _ in net.get_submodule(name).parameters(False))
        name = original_name(net, name) if own else ""
        layers[name] = layers.get(name, 0) + macs
    return int(total), layers, None
