"""Intervals for shares."""

from __future__ import annotations

import math


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """Share of successes with Wilson's score interval: (mean, low, high), all in [0, 1].

    `z` is the normal quantile (1.96: 95 %). Nothing observed gives (0, 0, 1). Raises ValueError for impossible counts.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} are impossible")
    if n == 0:
        return 0.0, 0.0, 1.0
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends touch 0 and 1 exactly there; rounding must not leave a trace.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return share, low, high
