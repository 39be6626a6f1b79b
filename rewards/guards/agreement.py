"""Do two judges agree, and do a judge's scores drift? Statistics for logs and reports.

Invariants: pure and seeded; symmetric in the two judges; empty input raises ValueError, one line.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.metrics.intervals import wilson


@dataclass(frozen=True)
class Agreement:
    """How two judges' labels of the same items agree. Intervals are 95 %."""

    n: int
    share: float
    """Items with equal labels."""
    share_low: float
    """Wilson's interval."""
    share_high: float
    kappa: float
    """Cohen's: (share - chance) / (1 - chance); 1 when both gave one and the same label throughout."""
    kappa_low: float
    """Percentile bootstrap over items."""
    kappa_high: float


def agreement(a: Sequence[Hashable], b: Sequence[Hashable], num_resamples: int = 2000, seed: int = 0) -> Agreement:
    """Agreement of two judges' labels, item by item. Raises ValueError for none or for unequal lengths."""
    if not a or len(a) != len(b):
        raise ValueError(f"agreement needs two equally long lists of labels, not {len(a)} and {len(b)}")
    labels = sorted({*a, *b}, key=repr)
    place = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)))
    for x, y in zip(a, b, strict=True):
        table[place[x], place[y]] += 1
    n = len(a)
    drawn = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=num_resamples)
    spread = _kappa(drawn.reshape(-1, *table.shape).astype(np.float64))
    low, high = np.quantile(spread, [0.025, 0.975])
    share, share_low, share_high = wilson(int(np.trace(table)), n)
    return Agreement(n, share, share_low, share_high, float(_kappa(table[None])[0]), float(low), float(high))


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Kappa of each table of counts [R, L, L]."""
    n = tables.sum(axis=(1, 2))
    same = np.trace(tables, axis1=1, axis2=2) / n
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / n**2
    varied = chance < 1 - 1e-12
    return np.where(varied, (same - chance) / np.where(varied, 1 - chance, 1.0), 1.0)


@dataclass(frozen=True)
class Drift:
    """How far current scores lie from earlier ones."""

    psi: float
    """Population stability index: below 0.1 stable, above 0.25 shifted (the usual reading)."""
    ks: float
    """Greatest gap between the two distribution functions."""
    p: float
    """Of `ks`, asymptotic; too cautious for scores with many ties."""


def drift(before: Sequence[float], now: Sequence[float], num_bins: int = 10) -> Drift:
    """Drift from one window of scores to another. Raises ValueError when one is empty.

    PSI = sum (p - q) ln(p / q) over bins at quantiles of `before` (one bin per value where there are few), with half a count added
    to each bin, so that an empty one is finite.
    """
    x, y = np.sort(np.asarray(before, dtype=np.float64)), np.sort(np.asarray(now, dtype=np.float64))
    if not len(x) or not len(y):
        raise ValueError("drift needs scores in both windows")
    values = np.unique(np.concatenate([x, y]))
    edges = values[1:] if len(values) <= num_bins else np.unique(np.quantile(x, np.arange(1, num_bins) / num_bins))
    p, q = (_shares(scores, edges) for scores in (x, y))
    psi = float(np.sum((p - q) * np.log(p / q)))
    ks = float(
        np.abs(np.searchsorted(x, values, "right") / len(x) - np.searchsorted(y, values, "right") / len(y)).max()
    )
    return Drift(psi, ks, _kolmogorov(ks, len(x), len(y)))


def _shares(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts = np.bincount(np.searchsorted(edges, scores, "right"), minlength=len(edges) + 1) + 0.5
    return counts / counts.sum()


def _kolmogorov(ks: float, n: int, m: int) -> float:
    root = math.sqrt(n * m / (n + m))
    t = (root + 0.12 + 0.11 / root) * ks  # Stephens' correction for small samples
    if t < 0.2:
        return 1.0  # the series needs many terms there, and the value is 1 to twelve places
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 101))))
