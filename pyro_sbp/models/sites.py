"""What Pyro models of networks share: names, plates, weights of sample sites."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_sbp.gates.folding import tensors_of

__all__ = [
    "CopiedUnderOwnName",
    "categorical",
    "check_num_data",
    "observe",
    "scales_of",
    "unique_name",
    "weighted",
]


def categorical(logits: Tensor) -> dist.Categorical:
    """The likelihood of class labels ``[batch]`` under logits ``[batch, classes]``."""
    # The log of a sum loses too much in bfloat16.
    return dist.Categorical(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)))


_numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def unique_name(kind: str) -> str:
    """A name for a root `PyroModule` that no other one has.

    Pyro's parameter store keeps parameters by name: a second module of the same name would silently
    take over the values of the first, and leave an optimizer with tensors that nobody uses.
    """
    number = next(_numbers[kind])
    return f"{kind}_{number}" if number else kind


class CopiedUnderOwnName:
    """A root `PyroModule` whose copies, by `copy` or from a file, have a name of their own.

    The parameter store would otherwise take the parameters of the copy for those of the original.
    """

    def __getstate__(self) -> dict[str, Any]:
        # Not that of `AutoGuide`, which empties the object that is copied.
        module: Any = self
        for parameter in module.parameters():
            # A weak reference that Pyro's parameter store sets at every access; it has no copy.
            vars(parameter).pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        module: Any = self
        module._pyro_context.used = False  # a module that was called cannot be renamed
        module._pyro_set_supermodule(unique_name(type(self).__name__), module._pyro_context)


def check_num_data(num_data: int) -> None:
    """Raise ValueError unless this can be the size of a data set."""
    if num_data < 1:
        raise ValueError(f"num_data is {num_data}; expected the size of the data set")


@contextmanager
def weighted(weight: float) -> Iterator[None]:
    """Weigh the sites inside; a weight of 0, which `poutine.scale` refuses, masks them out."""
    with poutine.mask(mask=False) if weight == 0 else poutine.scale(scale=weight):
        yield


def observe(likelihood: Any, num_data: int, x: Any, y: Any, draws: Sequence[int] = ()) -> Any:
    """Sample or observe the labels of a minibatch `x`, which count for all of the data.

    Args:
        likelihood: the distribution of the labels, of batch shape ``[*draws, batch]``.
        num_data: the size of the data set.
        x: the minibatch, with the batch in dimension 0.
        y: its labels, or None to sample them.
        draws: the shape of the draws of theta, if there are several.

    Raises:
        ValueError: likelihood or labels have further dimensions, which would be broadcast to a
            likelihood of every label under every example.
    """
    size = len(next(tensors_of(x)))
    batch, event = list(likelihood.batch_shape), len(likelihood.event_shape)
    if len(batch) > 1 + len(draws):
        raise ValueError(
            f"the likelihood has batch shape {batch}; expected {[*draws, size]}, one for each "
            "example: call to_event on it, or flatten the network's output"
        )
    if isinstance(y, Tensor) and y.ndim - event > 1:
        expected = [size, *likelihood.event_shape]
        raise ValueError(f"the labels have shape {list(y.shape)}; expected {expected}")
    # Not `subsample_size`, which would draw a permutation of all data at every step.
    with poutine.scale(scale=num_data / size), pyro.plate("data", size, dim=-1):
        return pyro.sample("obs", likelihood, obs=y)


def scales_of(
    names: Sequence[str], kl_scale: float | Mapping[str, float], kind: str = "gate"
) -> dict[str, float]:
    """The weight of the KL of every site.

    Raises:
        ValueError: one is negative or not finite, or `kl_scale` names no site.
    """
    given = kl_scale if isinstance(kl_scale, Mapping) else dict.fromkeys(names, kl_scale)
    for name, value in given.items():
        if name not in names:
            raise ValueError(
                f"kl_scale names the {kind} {name!r}; the {kind}s are {', '.join(names)}"
            )
        if not 0 <= value < float("inf"):
            raise ValueError(f"kl_scale of {kind} {name!r} is {value}; expected a number >= 0")
    return {name: float(given.get(name, 1.0)) for name in names}
