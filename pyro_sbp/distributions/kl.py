"""Closed-form Kullback-Leibler divergences, registered with torch, so that Pyro uses them.

As in torch, ``kl_divergence(p, q)`` is the KL divergence from p to q, the expectation of
log p - log q under p. No functions are registered for `TruncatedLogNormal` and
`TruncatedLogUniform`: they are the exponentials of `TruncatedNormal` and `Uniform`, and torch
computes the divergence of transformed distributions with equal transforms from their base
distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Exponential, HalfNormal, Normal, Uniform, register_kl

from pyro_sbp import special
from pyro_sbp.distributions.additive_normal import AdditiveNormal
from pyro_sbp.distributions.improper_log_uniform import ImproperLogUniform
from pyro_sbp.distributions.log_uniform_kl import kl_of_normal
from pyro_sbp.distributions.truncated_normal import TruncatedNormal
from pyro_sbp.special.derivatives import is_tracked, may_look, without_copies


def _shape(p: Distribution, q: Distribution) -> torch.Size:
    if p.batch_shape == q.batch_shape:
        return p.batch_shape
    return torch.broadcast_shapes(p.batch_shape, q.batch_shape)


@register_kl(TruncatedNormal, Uniform)
def _kl_truncated_normal_uniform(p: TruncatedNormal, q: Uniform) -> Tensor:
    shape = _shape(p, q)
    low, high = (without_copies(bound) for bound in p._parameters[2:])
    low_q, high_q = without_copies(q.low), without_copies(q.high)
    kl = p._compute(special.kl_to_uniform)
    if not (_are_same(low, low_q) and _are_same(high, high_q)):
        wider = (high_q.double() - low_q.double()) / (high.double() - low.double())
        contained = (low >= low_q) & (high <= high_q)
        kl = kl + torch.where(contained, wider.log(), torch.inf)
    return kl.to(p._dtype).expand(shape)


def _are_same(x: Tensor, y: Tensor) -> bool:
    """Whether two bounds are constant and known to be equal."""
    if x.numel() != 1 or y.numel() != 1 or is_tracked(x) or is_tracked(y):
        return False
    return may_look(x) and may_look(y) and float(x) == float(y)


@register_kl(TruncatedNormal, TruncatedNormal)
def _kl_truncated_normal_truncated_normal(p: TruncatedNormal, q: TruncatedNormal) -> Tensor:
    shape = _shape(p, q)
    # A prior is often the same for all elements.
    of_q = (without_copies(x) for x in q._parameters)
    kl = special.kl_to_truncated_normal(*p._parameters, *of_q)
    return kl.to(p._dtype).expand(shape)


@register_kl(TruncatedNormal, Normal)
def _kl_truncated_normal_normal(p: TruncatedNormal, q: Normal) -> Tensor:
    whole = TruncatedNormal(q.loc, q.scale, -torch.inf, torch.inf, validate_args=False)
    return _kl_truncated_normal_truncated_normal(p, whole)


@register_kl(TruncatedNormal, HalfNormal)
def _kl_truncated_normal_half_normal(p: TruncatedNormal, q: HalfNormal) -> Tensor:
    half = TruncatedNormal(0.0, q.scale, 0.0, torch.inf, validate_args=False)
    return _kl_truncated_normal_truncated_normal(p, half)


@register_kl(TruncatedNormal, Exponential)
def _kl_truncated_normal_exponential(p: TruncatedNormal, q: Exponential) -> Tensor:
    shape = _shape(p, q)
    rate = q.rate.double()
    kl = rate * p._compute(special.mean) - rate.log() - p._compute(special.entropy)
    kl = torch.where(p._parameters[2] >= 0, kl, torch.inf)
    return kl.to(p._dtype).expand(shape)


@register_kl(Uniform, TruncatedNormal)
def _kl_uniform_truncated_normal(p: Uniform, q: TruncatedNormal) -> Tensor:
    shape = _shape(p, q)
    loc, scale, low_q, high_q = q._parameters
    low, high = p.low.double(), p.high.double()
    width = high - low
    # The log density of q is a parabola. Its mean under p is its value at the middle of the
    # interval, minus half the curvature times the variance of p, width^2 / 12.
    at_middle = special.log_density(0.5 * (low + high), loc, scale, low_q, high_q)
    kl = (width / scale.double()).square() / 24 - width.log() - at_middle
    kl = torch.where((p.low >= low_q) & (p.high <= high_q), kl, torch.inf)
    return kl.to(p.low.dtype).expand(shape)


@register_kl(AdditiveNormal, ImproperLogUniform)
def _kl_additive_normal_improper_log_uniform(p: AdditiveNormal, q: ImproperLogUniform) -> Tensor:
    shape = _shape(p, q)
    return kl_of_normal(p.loc, p.log_variance, q.exact).expand(shape)


@register_kl(Normal, ImproperLogUniform)
def _kl_normal_improper_log_uniform(p: Normal, q: ImproperLogUniform) -> Tensor:
    shape = _shape(p, q)
    return kl_of_normal(p.loc, 2 * p.scale.log(), q.exact).expand(shape)
