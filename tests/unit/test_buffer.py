"""The buffer: admission, refusal of late results, staleness at shipping, retries of lost work."""

import asyncio

import pytest

from agents.advantages import AdvantageConfig
from agents.curriculum import Uniform
from agents.types import Task, Verdict, Version
from cluster.buffer import Buffer, BufferConfig, OutOfOrder
from tests.builders import a_group

TASKS = [Task(f"t{i}", "question?", ("x",)) for i in range(5)]


def a_buffer(max_staleness: int = 1, groups: int = 1, size: int = 2, steps: int = 100, state=None) -> Buffer:
    config = BufferConfig(max_staleness=max_staleness, groups_per_batch=groups, group_size=size)
    return Buffer(config, AdvantageConfig(), Uniform(TASKS, seed=0), steps=steps, state=state)


async def deliver(buffer: Buffer, step: int, rewards=(1.0, 0.0)):
    lease = await buffer.lease("w", 0.1)
    assert lease is not None
    group = a_group(rewards, task=lease.task.id, group=lease.id, version=Version(0, step))
    assert await buffer.put(lease.id, [group])
    return lease


async def test_a_batch_trains_every_member_once():
    buffer = a_buffer()
    await deliver(buffer, 0)
    batch = await buffer.next_batch(0)
    assert batch is not None and not batch.last
    assert sorted(round(float(s.advantages.max() or s.advantages.min()), 3) for s in batch.shards[0]) == [-0.707, 0.707]
    assert batch.stats["success"] == 0.5
    await buffer.settle(0, {"loss": 0.0})
    await buffer.published(1, {})
    counts = await buffer.counts()
    assert counts.trained == 2 and counts.balanced
    rows = await buffer.rows()
    assert [r["kind"] for r in rows] == ["train", "publish"]


async def test_staleness_zero_holds_admission_until_the_weights_are_out():
    buffer = a_buffer(max_staleness=0)
    await deliver(buffer, 0)
    assert await buffer.lease("w", 0.05) is None
    await buffer.next_batch(0)
    await buffer.settle(0, {})
    assert await buffer.lease("w", 0.05) is None
    waiting = asyncio.create_task(buffer.lease("w", 5.0))
    await asyncio.sleep(0.01)
    await buffer.published(1, {})
    assert await waiting is not None


async def test_a_late_result_of_a_dead_worker_is_refused_and_its_task_comes_again():
    buffer = a_buffer()
    lease = await buffer.lease("dead", 0.1)
    assert await buffer.worker_lost("dead") == 1
    assert not await buffer.put(lease.id, [a_group(task=lease.task.id, group=lease.id)])
    again = await buffer.lease("alive", 0.1)
    assert again.task.id == lease.task.id and again.id != lease.id
    assert (await buffer.counts()).dropped == {"worker_lost": 2}


async def test_a_dead_worker_gets_no_lease_though_its_call_is_still_waiting():
    buffer = a_buffer(max_staleness=0, groups=1)
    assert await buffer.lease("dead", 0.1) is not None
    waiting = asyncio.create_task(buffer.lease("dead", 5.0))
    await asyncio.sleep(0.01)
    await buffer.worker_lost("dead")
    assert await waiting is None
    assert await buffer.lease("alive", 0.1) is not None


async def test_infrastructure_that_fails_every_time_ends_the_run_by_name():
    buffer = a_buffer()
    for _ in range(50):
        lease = await buffer.lease("w", 0.1)
        await buffer.event("lease failed: KeyError: 'reward'")
        await buffer.fail(lease.id, "rollout_failed")
    with pytest.raises(OutOfOrder, match=r"rollout_failed.*KeyError"):
        await buffer.rows()


async def test_a_new_incarnation_takes_the_ledger_back_and_refuses_earlier_results():
    buffer = a_buffer()
    assert await buffer.enter(None) == 0
    await deliver(buffer, 0)
    await buffer.next_batch(0)
    await buffer.settle(0, {})
    await buffer.published(1, {})
    saved = await buffer.state()
    await deliver(buffer, 1)
    await buffer.next_batch(1)
    await buffer.settle(1, {})
    await buffer.published(2, {})
    running = await buffer.lease("w", 0.1)
    assert await buffer.enter(saved) == 1
    assert not await buffer.put(running.id, [a_group(task=running.task.id, group=running.id)]), (
        "of the lost incarnation"
    )
    assert await buffer.lease("w", 0.05) is None, "not before the restored weights are out"
    await buffer.published(1, {})
    assert (await buffer.lease("w", 0.1)).task.id == running.task.id
    counts = await buffer.counts()
    assert counts.trained == 2 and counts.dropped == {"lineage": 4}, "one batch trained since, one lease under way"


async def test_over_age_groups_are_dropped_when_the_batch_ships():
    buffer = a_buffer(max_staleness=1)
    for step in range(2):
        await deliver(buffer, step)
        await buffer.next_batch(step)
        await buffer.settle(step, {})
        await buffer.published(step + 1, {})
    await deliver(buffer, 0)
    assert await buffer.next_batch(2, timeout_s=0.05) is None, "sampled two optimiser batches ago"
    assert (await buffer.counts()).dropped == {"stale": 2}


async def test_a_group_nobody_could_judge_is_dropped_by_cause_and_comes_again():
    buffer = a_buffer()
    lease = await buffer.lease("w", 0.1)
    group = a_group(task=lease.task.id, group=lease.id)
    dead = group.with_verdicts([Verdict.unavailable("outcome", "judge_timeout")] * 2)
    assert await buffer.put(lease.id, [dead])
    assert (await buffer.counts()).dropped == {"judge_timeout": 2}
    assert (await buffer.lease("w", 0.1)).task.id == lease.task.id


async def test_one_masked_member_leaves_the_baseline_but_not_its_siblings():
    buffer = a_buffer(size=3)
    lease = await buffer.lease("w", 0.1)
    group = a_group((1.0, 0.0, 0.0), task=lease.task.id, group=lease.id)
    verdicts = [*group.verdicts[:2], Verdict.unavailable("outcome", "judge_timeout")]
    await buffer.put(lease.id, [group.with_verdicts(verdicts)])
    batch = await buffer.next_batch(0)
    assert len(batch.shards[0]) == 2
    assert batch.stats["masked/judge_timeout"] == 1


async def test_the_last_batch_says_so_and_shards_are_even():
    buffer = a_buffer(groups=2, steps=1)
    await deliver(buffer, 0)
    await deliver(buffer, 0)
    batch = await buffer.next_batch(0, world_size=2)
    assert batch.last
    assert [len(s) for s in batch.shards] == [2, 2]
    with pytest.raises(ValueError, match="asks for batch 3"):
        await buffer.next_batch(3)


async def test_state_goes_back_together():
    buffer = a_buffer()
    await deliver(buffer, 0)
    await buffer.next_batch(0)
    await buffer.settle(0, {})
    await buffer.published(1, {})
    back = a_buffer(state=await buffer.state())
    counts = await back.counts()
    assert counts.trained == 2 and counts.running == counts.ready == 0
    assert (await back.lease("w", 0.1)).task.id == (await buffer.lease("w", 0.1)).task.id
