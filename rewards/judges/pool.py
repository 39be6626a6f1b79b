"""Several equal judges as one: the least busy is asked, and another when it is unavailable.

Invariant: a reply of any other status is final, so a text that one judge could not judge is not carried from one to the next.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from agents.types import JudgeReply, JudgeRequest, Status
from rewards.judges.base import RunningJudge


class JudgePool:
    """Equal judges, such as the engines of `judge.kind vllm`."""

    def __init__(self, judges: Sequence[RunningJudge]) -> None:
        self._judges = list(judges)
        self._busy = [0] * len(self._judges)
        self._asked = [0] * len(self._judges)

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        left = set(range(len(self._judges)))
        reply = JudgeReply(Status.unavailable, cause="judge_unreachable")
        while left and reply.status is Status.unavailable:
            i = min(left, key=lambda j: (self._busy[j], self._asked[j]))
            left.discard(i)
            self._busy[i] += 1
            self._asked[i] += 1
            try:
                reply = await self._judges[i].ask(request)
            finally:
                self._busy[i] -= 1
        return reply

    async def check(self) -> None:
        """Raises JudgeError when one of them cannot answer."""
        await asyncio.gather(*(judge.check() for judge in self._judges))

    def stats(self) -> dict[str, float]:
        """Sums over all."""
        total: Counter[str] = Counter()
        for judge in self._judges:
            total.update(judge.stats())
        return dict(total)

    async def close(self) -> None:
        await asyncio.gather(*(judge.close() for judge in self._judges))
