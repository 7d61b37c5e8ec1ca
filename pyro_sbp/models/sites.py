"""Functions that the Pyro models of networks share: names, plates and weights of sample sites."""

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

from pyro_sbp.gates.nested import tensors_of

__all__ = [
    "CopiedUnderOwnName",
    "batch_size",
    "categorical",
    "check_num_data",
    "check_observed",
    "observe",
    "scales_of",
    "unique_name",
    "weighted",
]


def categorical(logits: Tensor) -> dist.Categorical:
    """The likelihood of class labels ``[batch]`` for logits ``[batch, classes]``."""
    # logsumexp in bfloat16 is not accurate enough.
    return dist.Categorical(logits=logits.to(torch.promote_types(logits.dtype, torch.float32)))


_numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def unique_name(kind: str) -> str:
    """A unique name for a root `PyroModule`.

    The parameter store of Pyro stores parameters by name. A second module with the same name would
    silently take the values of the first one, and its optimizer would update unused tensors.
    """
    number = next(_numbers[kind])
    return f"{kind}_{number}" if number else kind


class CopiedUnderOwnName:
    """A root `PyroModule` whose copies, made by `copy` or loaded from a file, have unique names.

    With the same name, the parameter store would confuse the parameters of copy and original.
    """

    def __getstate__(self) -> dict[str, Any]:
        # The method of `AutoGuide` is not used, because it clears the object that is copied.
        module: Any = self
        for parameter in module.parameters():
            # It is a weak reference, which cannot be copied. Pyro sets it again at every access.
            vars(parameter).pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        module: Any = self
        module._pyro_context.used = False  # a module that was called cannot be renamed
        module._pyro_set_supermodule(unique_name(type(self).__name__), module._pyro_context)


def check_num_data(num_data: int) -> None:
    """Raise ValueError if `num_data` is less than 1."""
    if num_data < 1:
        raise ValueError(f"num_data is {num_data}; expected the size of the data set")


@contextmanager
def weighted(weight: float) -> Iterator[None]:
    """A context that weights sites. A weight of 0, which `poutine.scale` refuses, masks them."""
    with poutine.mask(mask=False) if weight == 0 else poutine.scale(scale=weight):
        yield


def observe(likelihood: Any, num_data: int, x: Any, y: Any, draws: Sequence[int] = ()) -> Any:
    """Sample or observe the labels of a minibatch, scaled to the whole data set.

    Args:
        likelihood: the distribution of the labels, of batch shape ``[*draws, batch]``.
        num_data: the size of the data set.
        x: the input of the minibatch, with the batch in dimension 0.
        y: its labels, or None to sample them.
        draws: the shape of the draws of theta, if there are several.

    Returns:
        The labels.

    Raises:
        ValueError: the minibatch is empty, or as for `check_observed`.
    """
    size = batch_size(x)
    check_observed(likelihood, size, y, draws)
    # Not `subsample_size`, because it would draw a permutation of all data at every step.
    with poutine.scale(scale=num_data / size), pyro.plate("data", size, dim=-1):
        return pyro.sample("obs", likelihood, obs=y)


def batch_size(x: Any) -> int:
    """The number of examples of an input of a network.

    Raises:
        ValueError: there is none, so that the sum over them cannot be scaled to the whole data set;
            or the input has no tensor with a dimension for them.
    """
    first = next(tensors_of(x), None)
    if first is None or not first.ndim:
        raise ValueError("the input has no tensor with the batch in dimension 0")
    if not len(first):
        raise ValueError("the minibatch is empty; expected at least one example")
    return len(first)


def check_observed(likelihood: Any, size: int, y: Any, draws: Sequence[int] = ()) -> None:
    """Check the shapes of the likelihood and of the labels of a minibatch.

    Args:
        likelihood, y, draws: as for `observe`.
        size: the number of examples.

    Raises:
        ValueError: the likelihood does not have one value for every example (and draw), or the
            labels do not have one for every example. Broadcasting would pair labels with other
            examples.
    """
    batch, expected = list(likelihood.batch_shape), [*draws, size]
    # A likelihood of batch shape [] does not depend on the example.
    if batch not in ([], expected, [*itertools.dropwhile(lambda n: n == 1, draws), size]):
        hint = ""
        if len(batch) > len(expected):
            hint = ": call to_event on it, or flatten the network's output"
        elif draws:
            hint = ": the draws are the first dimensions of the output; select with output[..., 0]"
        raise ValueError(
            f"the likelihood has batch shape {batch}; expected {expected}, one for each example"
            + hint
        )
    event = list(likelihood.event_shape)
    if not isinstance(y, Tensor) or (y.ndim == 1 + len(event) and len(y) == size):
        return
    raise ValueError(f"the labels have shape {list(y.shape)}; expected {[size, *event]}")


def scales_of(
    names: Sequence[str], kl_scale: float | Mapping[str, float], kind: str = "gate"
) -> dict[str, float]:
    """From site name to the weight of the KL divergence of the site.

    Args:
        names: the names of the sites.
        kl_scale: a weight for all sites, or a mapping from names to weights.
        kind: what a site is, for messages.

    Raises:
        ValueError: a weight is negative or not finite, or `kl_scale` names an unknown site.
    """
    given = kl_scale if isinstance(kl_scale, Mapping) else dict.fromkeys(names, kl_scale)
    for name, value in given.items():
        if name not in names:
            raise ValueError(
                f"kl_scale names an unknown {kind} {name!r}; the {kind}s are {', '.join(names)}"
            )
        if not 0 <= value < float("inf"):
            raise ValueError(f"kl_scale of {kind} {name!r} is {value}; expected a number >= 0")
    return {name: float(given.get(name, 1.0)) for name in names}
