"""Truncated distributions to train through, as Pyro distributions."""

from pyro_sbp.distributions import kl as _kl  # registers the divergences
from pyro_sbp.distributions.truncated_log_normal import TruncatedLogNormal
from pyro_sbp.distributions.truncated_log_uniform import TruncatedLogUniform
from pyro_sbp.distributions.truncated_normal import TruncatedNormal

__all__ = ["TruncatedLogNormal", "TruncatedLogUniform", "TruncatedNormal"]

del _kl
