"""Faults made on purpose, so that recovering from them can be trained and measured.

What a call suffers is drawn from (seed, trajectory, index of the call) alone: other trajectories, real trouble and timing
change nothing, so same seed and same actions meet the same faults. Two kinds:

- of transport (`timeout`, `error`, `latency`): drawn for each attempt. The sandbox retries; a call all of whose attempts fail is
  infrastructure trouble, which masks the rollout. The agent never learns of them but by waiting.
- of content (`empty`, `truncated`, `shuffled`, `distractors`, `stale`): at most one per call. The agent reads what came, may
  notice, and may recover.

Invariant: a fault is noted in `injected` only when it changed something.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from agents.interfaces import Backend
from agents.types import BackendInfo, Document, Hit, Query, Uid
from envs.config import FaultConfig

OF_SEARCH = ("empty", "truncated", "shuffled", "distractors")
OF_PAGE = ("truncated", "stale")
_DEPTH = 4
"""Distractors rank below k, down to this many times k."""
_Z99 = 2.326
_SENTENCE = re.compile(r"(?<=[.!?\n])\s+|(?<=[。！？])\s*")


class FaultyBackend:
    """A `Backend` that fails as told, over one that works; for one trajectory.

    A session over it says when a tool call begins (`begin`), and has the page of an `open` spoilt once its guard has seen the
    whole (`spoilt`). Without `begin`, each request counts as a call.
    """

    def __init__(self, backend: Backend, config: FaultConfig, trajectory: str = "") -> None:
        self.injected: list[str] = []
        self._backend = backend
        self._config = config
        self._stream = f"{config.seed}/{trajectory}"
        self._in_call = False
        self._requests = 0

    def begin(self, index: int) -> None:
        """A tool call of a session begins; forgets what was injected before."""
        self._in_call = True
        self._start(index)

    def _start(self, index: int) -> None:
        self.injected = []
        self._arrived = False
        # Two streams, and one draw of the kind: how often a call was tried must not change what comes back in the end.
        self._transport = random.Random(f"{self._stream}/{index}/transport")
        self._content = random.Random(f"{self._stream}/{index}/content")
        self._chance = self._content.random()

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        await self._travel()
        kind = self._drawn(OF_SEARCH)
        if kind == "distractors":
            found = await self._backend.search([replace(q, k=q.k * _DEPTH) for q in queries])
        else:
            found = await self._backend.search(queries)
        return [self._hits(hits, query.k, kind) for hits, query in zip(found, queries, strict=True)]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        await self._travel()
        return await self._backend.get(ids)

    def info(self) -> BackendInfo:
        return self._backend.info()

    async def close(self) -> None:
        await self._backend.close()

    async def _travel(self) -> None:
        """Delays or fails a request as drawn; what came through once in a call always does."""
        if not self._in_call:
            self._start(self._requests)
            self._requests += 1
        if self._arrived:
            return
        c, draw = self._config, self._transport
        late, failed, delay = draw.random() < c.latency, draw.random(), draw.gauss(0.0, 1.0)
        if late:
            self.injected.append("latency")
            await asyncio.sleep(c.latency_p50_ms / 1000 * (c.latency_p99_ms / c.latency_p50_ms) ** (delay / _Z99))
        if failed < c.timeout:
            self.injected.append("timeout")
            raise TimeoutError("no answer in time (injected)")
        if failed < c.timeout + c.error:
            self.injected.append("error")
            raise ConnectionError("503 service unavailable (injected)")
        self._arrived = (
            True  # only now: a delay beyond the call's time limit ends above, and the next attempt draws anew
        )

    def _drawn(self, kinds: Sequence[str]) -> str:
        left = self._chance
        for kind in kinds:
            left -= getattr(self._config, kind)
            if left < 0:
                return kind
        return ""

    def _hits(self, hits: list[Hit], k: int, kind: str) -> list[Hit]:
        kept = hits[:k]
        if kind == "empty":
            spoilt: list[Hit] = []
        elif kind == "truncated":
            spoilt = kept[: math.ceil(len(kept) / 2)]
        elif kind == "shuffled":
            spoilt = self._content.sample(kept, len(kept))
        elif kind == "distractors":
            others, places = hits[k:], range(len(kept))
            count = min(len(others), math.ceil(len(kept) / 2))
            swapped = dict(zip(self._content.sample(places, count), self._content.sample(others, count), strict=True))
            spoilt = [swapped.get(i, hit) for i, hit in enumerate(kept)]
        else:
            return kept
        # Scores stay with the places, so that a list is sorted as every list is.
        spoilt = [replace(hit, score=kept[i].score) for i, hit in enumerate(spoilt)]
        if spoilt != kept:
            self.injected.append(kind)
        return spoilt

    def spoilt(self, document: Document) -> Document:
        """The page as the `open` of this call gets it; the same object when it suffers nothing."""
        text, kind = document.text, self._drawn(OF_PAGE)
        if kind == "truncated":
            text = text[: math.ceil(len(text) / 2)]
        elif kind == "stale":
            older = document.meta.get("older")
            if isinstance(older, str):
                text = older
            elif parts := [part for part in _SENTENCE.split(text) if part]:
                missing = set(self._content.sample(range(len(parts)), len(parts) // 2))
                text = " ".join(part for i, part in enumerate(parts) if i not in missing) if missing else text
        if text == document.text:
            return document
        self.injected.append(kind)
        return replace(document, text=text)


@dataclass(frozen=True)
class Recovery:
    """What became of the trajectories that met a fault."""

    fault: str
    """`none`: those that met no fault at all, to compare with."""
    met: int
    """Trajectories that met it and were judged."""
    recovered: int
    """Of these, with a right answer in the end."""
    masked: int
    """Trajectories that met it and have no verdict: infrastructure ended them, or no judge could be reached."""
    rate: float
    low: float
    high: float


def recovery(
    met: Mapping[Uid, Collection[str]],
    right: Mapping[Uid, bool | None],
    interval: Callable[[int, int], tuple[float, float, float]],
) -> list[Recovery]:
    """Recovery per fault. A trajectory that met several kinds counts for each.

    `met`: faults of each trajectory (`replay.faults_met` reads them from journals). `right`: whether it ended with a right
    answer; None, or missing, when nobody could say. `interval`: (successes, n) -> (rate, low, high), such as
    `rewards.metrics.intervals.wilson`.
    """
    rows = []
    for fault in ["none", *sorted({fault for faults in met.values() for fault in faults})]:
        verdicts = [right.get(uid) for uid, faults in met.items() if (fault in faults if faults else fault == "none")]
        judged = [verdict for verdict in verdicts if verdict is not None]
        if verdicts:
            rate, low, high = interval(sum(judged), len(judged))
            rows.append(Recovery(fault, len(judged), sum(judged), len(verdicts) - len(judged), rate, low, high))
    return rows
