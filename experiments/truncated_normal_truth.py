"""The truncated normal and log-normal distributions in 110 digits, with the textbook formulas.

The cancellation in these formulas loses up to 60 digits here, so enough digits remain. A `Truth` is
one setting of the parameters. All values are `mpmath.mpf`, and are computed for the exact binary
values of the parameters.
"""

from __future__ import annotations

from functools import cached_property

from mpmath import mp, mpf

__all__ = ["DIGITS", "Truth"]

DIGITS = 110


class Truth:
    """x from Normal(loc, scale) on [low, high], and theta = exp(x). Sets the precision of mpmath.

    Derivatives are with respect to loc and log scale. `z` is (x - loc) / scale.
    """

    def __init__(self, loc: float, scale: float, low: float, high: float) -> None:
        mp.dps = DIGITS
        self.loc, self.scale, self.low, self.high = (mpf(x) for x in (loc, scale, low, high))
        self.alpha = (self.low - self.loc) / self.scale
        self.beta = (self.high - self.loc) / self.scale

    @staticmethod
    def _mass(a: mpf, b: mpf) -> mpf:
        if a + b < 0:
            a, b = -b, -a
        return (mp.erfc(a / mp.sqrt(2)) - mp.erfc(b / mp.sqrt(2))) / 2

    @staticmethod
    def _density(z: mpf, power: int = 0) -> mpf:
        """``z^power phi(z)``, with the limit 0 at infinity."""
        if mp.isinf(z):
            return mpf(0)
        return z**power * mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)

    @cached_property
    def mass(self) -> mpf:
        return self._mass(self.alpha, self.beta)

    def _moments(self, tilt: int, order: int) -> tuple[mpf, list[mpf]]:
        """E[theta^tilt], and the moments of z under the density times theta^tilt."""
        shift = tilt * self.scale
        a, b = self.alpha - shift, self.beta - shift
        mass = self._mass(a, b)
        m = [mpf(1)]
        for j in range(1, order + 1):
            ends = (self._density(a, j - 1) - self._density(b, j - 1)) / mass
            m.append(ends + ((j - 1) * m[j - 2] if j > 1 else 0))
        total = mp.exp(tilt * self.loc + shift * shift / 2) * mass / self.mass
        return total, [
            sum(mp.binomial(j, i) * shift ** (j - i) * m[i] for i in range(j + 1))
            for j in range(order + 1)
        ]

    @cached_property
    def _z(self) -> list[mpf]:
        return self._moments(0, 4)[1]

    @cached_property
    def _theta(self) -> tuple[mpf, list[mpf]]:
        return self._moments(1, 2)

    @cached_property
    def log_normalizer(self) -> mpf:
        return mp.log(self.mass)

    @cached_property
    def entropy(self) -> mpf:
        return (mp.log(2 * mp.pi) + self._z[2]) / 2 + mp.log(self.scale) + self.log_normalizer

    @cached_property
    def kl(self) -> mpf:
        return mp.log(self.high - self.low) - self.entropy

    @cached_property
    def kl_d_loc(self) -> mpf:
        return -(self._z[3] - self._z[1] * self._z[2]) / (2 * self.scale)

    @cached_property
    def kl_d_log_scale(self) -> mpf:
        return -(self._z[4] - self._z[2] ** 2) / 2

    @cached_property
    def mean(self) -> mpf:
        return self.loc + self.scale * self._z[1]

    @cached_property
    def variance(self) -> mpf:
        return self.scale**2 * (self._z[2] - self._z[1] ** 2)

    @cached_property
    def mean_d_loc(self) -> mpf:
        return self._z[2] - self._z[1] ** 2

    @cached_property
    def exp_mean(self) -> mpf:
        return self._theta[0]

    @cached_property
    def exp_variance(self) -> mpf:
        return self._moments(2, 0)[0] - self.exp_mean**2

    @cached_property
    def exp_snr(self) -> mpf:
        return self.exp_mean / mp.sqrt(self.exp_variance)

    @cached_property
    def exp_mean_d_loc(self) -> mpf:
        return self.exp_mean * (self._theta[1][1] - self._z[1]) / self.scale

    @cached_property
    def exp_mean_d_log_scale(self) -> mpf:
        return self.exp_mean * (self._theta[1][2] - self._z[2])

    @cached_property
    def exp_mean_d_log_scale_size(self) -> mpf:
        """sd[theta] sd[z^2], which bounds the derivative above."""
        return mp.sqrt(self.exp_variance * (self._z[4] - self._z[2] ** 2))

    def log_density(self, x: float | mpf) -> mpf:
        z = (mpf(x) - self.loc) / self.scale
        return -z * z / 2 - mp.log(2 * mp.pi) / 2 - mp.log(self.scale) - self.log_normalizer

    def cdf(self, x: float | mpf) -> mpf:
        return self._mass(self.alpha, (mpf(x) - self.loc) / self.scale) / self.mass

    def icdf(self, u: float, start: float) -> mpf:
        """Quantile at `u`, by Newton's method from `start`; NaN if it does not converge."""
        if not mp.isfinite(mpf(start)):
            return mp.nan
        x, u = mpf(start), mpf(u)
        for _ in range(60):
            step = (self.cdf(x) - u) / mp.exp(self.log_density(x))
            x = min(max(x - step, self.low), self.high)
            if abs(step) < mpf(10) ** -40 * self.scale:
                return x
        return mp.nan

    def sample_d_loc(self, u: float, x: mpf) -> mpf:
        """Derivative of the quantile `x` of `u` with respect to loc."""
        z = (x - self.loc) / self.scale
        phi_a, phi_b, phi_z = (self._density(t) for t in (self.alpha, self.beta, z))
        return ((phi_z - phi_a) - mpf(u) * (phi_b - phi_a)) / phi_z

    def sample_d_log_scale(self, u: float, x: mpf) -> mpf:
        """Derivative of the quantile `x` of `u` with respect to log scale."""
        z = (x - self.loc) / self.scale
        slope_a, slope_b, slope_z = (self._density(t, 1) for t in (self.alpha, self.beta, z))
        rise = (slope_z - slope_a) - mpf(u) * (slope_b - slope_a)
        return self.scale * rise / self._density(z)
