"""Pyro distributions of multiplicative noise and of weights."""

from pyro_sbp.distributions import kl as _kl  # registers the KL divergences
from pyro_sbp.distributions.additive_normal import AdditiveNormal
from pyro_sbp.distributions.improper_log_uniform import ImproperLogUniform
from pyro_sbp.distributions.truncated_log_normal import TruncatedLogNormal
from pyro_sbp.distributions.truncated_log_uniform import TruncatedLogUniform
from pyro_sbp.distributions.truncated_normal import TruncatedNormal

__all__ = [
    "AdditiveNormal",
    "ImproperLogUniform",
    "TruncatedLogNormal",
    "TruncatedLogUniform",
    "TruncatedNormal",
]

del _kl
