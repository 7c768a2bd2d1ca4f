"""Confidence intervals of a share."""

from __future__ import annotations

import math

from scipy.stats import beta

from vpt.errors import ConfigError

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, "Probable inference", JASA 22, 1927).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 and 1.

    Args:
        hits: Images classified rightly.
        n: Images, at least 1.

    Returns:
        Lower and upper bound.

    Raises:
        ConfigError: There are no images, or more hits than images.
    """
    _check(hits, n)
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, wider than `wilson` (Clopper & Pearson, Biometrika 26, 1934).

    It contains the true share in at least 95 % of samples, whatever the share.

    Args:
        hits: Images classified rightly.
        n: Images, at least 1.

    Returns:
        Lower and upper bound.

    Raises:
        ConfigError: There are no images, or more hits than images.
    """
    _check(hits, n)
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def _check(hits: int, n: int) -> None:
    if not 0 <= hits <= n or n < 1:
        raise ConfigError(f"An interval needs at least one image and no more hits than images, got {hits} of {n}.")
