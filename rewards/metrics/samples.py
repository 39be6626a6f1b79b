"""Several samples of one question: pass@k, pass^k, maj@k.

Best-of-N is pass@N by another name, and a mean over runs is no best run: a number says which of these it is.

Invariants: pass^k <= mean <= pass@k; pass@1 = pass^1 = mean (avg@n); pass@k never falls and pass^k never rises with k.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

RIGHT = "right"
"""The class of all answers that were judged right, however they are written."""


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k samples drawn from n is right, when `right` of them are: 1 - C(n - right, k) / C(n, k), unbiased."""
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {right} right among {n} runs is undefined")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pass_hat_k(n: int, right: int, k: int) -> float:
    """pass^k: chance that all of k samples drawn from n are right: C(right, k) / C(n, k), unbiased (reliability)."""
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass^{k} of {right} right among {n} runs is undefined")
    return math.comb(right, k) / math.comb(n, k)


def maj_at_k(classes: Sequence[str | None]) -> float:
    """Chance that a vote among the samples of a question ends right, ties drawn by lot.

    `classes`: each sample's class of equivalent answers (`RIGHT` for those judged right); None did not answer and does not vote. 0 when nobody
    votes.
    """
    votes = Counter(name for name in classes if name is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [name for name, count in votes.items() if count == most]
    return 1.0 / len(leaders) if RIGHT in leaders else 0.0
