"""Functions of the normal distribution truncated to an interval, accurate in the far tails.

Every function takes ``(loc, scale, low, high)``: the mean and the standard deviation of the normal
distribution before it is truncated, and the bounds. Each bound may be infinite. The parameters are
tensors of any floating dtype and broadcast against each other. All functions compute in float64,
and return float64.

Range: ``loc`` may lie up to 1e5 ``scale`` outside a bound, and ``scale`` may be up to 1e4 times the
width of the interval. For loc in [-25, 5], log scale in [-10, 5] and bounds (-20, 0), the relative
errors against mpmath stay below 1e-12 (``python -m pyro_sbp.experiments.distributions_table``).
For float32 parameters, moments are computed with fewer quadrature nodes, to a relative error of
1e-7.

The gradients with respect to the parameters, the bounds and the value (if there is one) are
analytic, in reverse mode and in forward mode. Only ``log_density`` has second derivatives. The
other functions raise RuntimeError when a second derivative is requested.

References:

- [1] K. Neklyudov, D. Molchanov, A. Ashukha, D. Vetrov. Structured Bayesian Pruning via Log-Normal
  Multiplicative Noise. NIPS 2017, arXiv:1705.07283.
- [2] M. Figurnov, S. Mohamed, A. Mnih. Implicit Reparameterization Gradients. NeurIPS 2018,
  arXiv:1805.08498.
- [3] J. P. Mills. Table of the ratio: area to bounding ordinate. Biometrika 18, 1926.
"""

from pyro_sbp.special.derivatives import attach
from pyro_sbp.special.frame import mean_excess, mills_ratio
from pyro_sbp.special.integrals import (
    entropy,
    exp_mean,
    exp_snr,
    exp_variance,
    kl_to_truncated_normal,
    kl_to_uniform,
    log_density,
    log_normalizer,
    mean,
    variance,
)
from pyro_sbp.special.quantiles import cdf, icdf

__all__ = [
    "attach",
    "cdf",
    "entropy",
    "exp_mean",
    "exp_snr",
    "exp_variance",
    "icdf",
    "kl_to_truncated_normal",
    "kl_to_uniform",
    "log_density",
    "log_normalizer",
    "mean",
    "mean_excess",
    "mills_ratio",
    "variance",
]
