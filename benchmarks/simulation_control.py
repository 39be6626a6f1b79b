"""What the central actors' own code costs per lease, group and batch: measured on the buffer itself, without Ray.

These are the parts of a run that no number of GPUs makes faster, so a prediction for many GPUs takes them from here and not from a
guess. Sizes are those of long episodes (20,000 tokens), made of random ids. What Ray adds to a call is not in it.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from agents.advantages import AdvantageConfig
from agents.curriculum import Uniform
from agents.sharding import shard
from agents.types import (
    Action,
    ActionKind,
    Ending,
    Episode,
    Generation,
    Group,
    Identity,
    Member,
    Role,
    Sampling,
    Span,
    StopReason,
    Task,
    Turn,
    Uid,
    Verdict,
    Version,
)  # fmt: skip
from cluster.buffer import Buffer, BufferConfig, BufferSetup

RANKS = 32
GROUP, TURNS, NEW, SAID = 8, 20, 600, 400
"""Episodes of a group; an episode's policy turns, tokens it is shown before each and tokens it says in each."""


def a_group(group: str, seed: int) -> Group:
    """One of such sizes."""
    rng = np.random.default_rng(seed)
    members = []
    for attempt in range(GROUP):
        turns = []
        for n in range(TURNS):
            turns.append(
                Turn.given(
                    2 * n, 2 * n - 1, Role.observation if n else Role.prompt, rng.integers(0, 9999, NEW).tolist()
                )
            )
            said = Generation(
                tuple(rng.integers(0, 9999, SAID).tolist()), tuple((-rng.random(SAID)).tolist()), (Span(0, SAID, Version(0, 0)),), "stop"
            )  # fmt: skip
            turns.append(Turn.sampled(2 * n + 1, 2 * n, said, Action(ActionKind.call)))
        identity = Identity("run", Uid("t", group, attempt), "tools", "tok", "template", Sampling())
        (path,) = Episode(identity, tuple(turns), (Ending(2 * TURNS - 1, StopReason.answered),)).trajectories()
        members.append(Member(path))
    made = Group(group, Task("t", "question?", ("x",)), tuple(members))
    return made.with_verdicts([Verdict(float(i % 2), {"outcome": float(i % 2)}) for i in range(GROUP)])


def measure_control(groups: int = 4) -> dict[str, float]:
    """Seconds: `lease_s`, `put_s` per group, `ship_s` per episode, `batch_bytes` per episode and `pickle_s` to send it once,
    `prompt_s` to send a prompt of 10,000 tokens as a list and read it again, `shard_s` per episode and learner rank to cut a batch
    for 32 ranks. All by one thread of this machine, the second of two rounds.
    """
    asyncio.run(_measure(groups))
    return asyncio.run(_measure(groups))


async def _measure(groups: int) -> dict[str, float]:
    config = BufferConfig(max_staleness=1, groups_per_batch=groups, group_size=GROUP)
    buffer = Buffer(BufferSetup(config, AdvantageConfig(), 10), Uniform([Task("t", "question?", ("x",))], seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    began = time.process_time()
    leases = [await buffer.lease("w") for _ in range(groups)]
    lease_s = (time.process_time() - began) / groups
    sent = [pickle.dumps([a_group(lease.id, n)], 5) for n, lease in enumerate(leases) if lease is not None]
    began = time.process_time()
    for lease, data in zip(leases, sent, strict=True):
        assert lease is not None and await buffer.put(lease.id, pickle.loads(data))
    put_s = (time.process_time() - began) / groups
    began = time.process_time()
    batch = await buffer.next_batch(0, 0)
    ship_s = (time.process_time() - began) / (groups * GROUP)
    pickle_s, data = _timed(lambda: pickle.dumps(batch, 5))
    assert batch is not None
    samples = batch.shards[0]
    shard_s, _ = _timed(lambda: [shard(samples, rank, RANKS) for rank in range(RANKS)])
    prompt: list[int] = np.random.default_rng(0).integers(0, 9999, 10_000).tolist()
    prompt_s, _ = _timed(lambda: pickle.loads(pickle.dumps(prompt, 5)))
    episodes = groups * GROUP
    return {
        "lease_s": lease_s, "put_s": put_s, "ship_s": ship_s, "batch_bytes": len(data) / episodes, "pickle_s": pickle_s / episodes,
        "prompt_s": prompt_s, "shard_s": shard_s / episodes / RANKS,
    }  # fmt: skip


def _timed(do: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Least seconds, and the last result."""
    seconds, made = [], None
    for _ in range(repeats):
        began = time.process_time()
        made = do()
        seconds.append(time.process_time() - began)
    return min(seconds), made
