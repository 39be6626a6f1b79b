"""The buffer: admission, refusal of late results, staleness at shipping, retries of lost work."""

import asyncio
import json
from dataclasses import replace

import pytest

from agents.advantages import AdvantageConfig
from agents.curriculum import Uniform
from agents.types import Group, RecordError, StopReason, Task, Verdict, Version
from cluster.buffer import Buffer, BufferConfig, BufferSetup, Fenced, OutOfOrder
from cluster.errors import UserError
from cluster.journal import close_books
from cluster.ledger import audit
from rewards.judges.health import MaskConfig
from rewards.registry import make_shaper
from rewards.seeds.shaping import ShaperConfig
from tests.builders import a_group, a_stepped_group

TASKS = [Task(f"t{i}", "question?", ("x",)) for i in range(5)]


def a_setup(
    max_staleness: int = 1, groups: int = 1, size: int = 2, steps: int = 100, journal="", **more
) -> BufferSetup:
    config = BufferConfig(max_staleness=max_staleness, groups_per_batch=groups, group_size=size)
    return BufferSetup(config, AdvantageConfig(), steps, journal=str(journal), **more)


async def a_buffer(**more) -> Buffer:
    """One whose first learner has begun and published."""
    buffer = Buffer(a_setup(**more), Uniform(TASKS, seed=0))
    assert await buffer.enter(None) == 0
    await buffer.published(0, 0, {})
    return buffer


async def train(buffer: Buffer, step: int, incarnation: int = 0) -> None:
    assert await buffer.next_batch(incarnation, step) is not None
    await buffer.settle(incarnation, step, {})
    await buffer.published(incarnation, step + 1, {})


async def deliver(buffer: Buffer, step: int, rewards=(1.0, 0.0)):
    lease = await buffer.lease("w", 0.1)
    assert lease is not None
    group = a_group(rewards, task=lease.task.id, group=lease.id, version=Version(0, step))
    assert await buffer.put(lease.id, [group])
    return lease


async def test_a_batch_trains_every_member_once():
    buffer = await a_buffer()
    await deliver(buffer, 0)
    batch = await buffer.next_batch(0, 0)
    assert batch is not None and not batch.last
    assert sorted(round(float(s.advantages.max() or s.advantages.min()), 3) for s in batch.shards[0]) == [-0.707, 0.707]
    assert batch.stats["success"] == 0.5
    await buffer.settle(0, 0, {"loss": 0.0})
    await buffer.published(0, 1, {})
    counts = await buffer.counts()
    assert counts.trained == 2 and counts.balanced
    rows = await buffer.rows()
    assert [r["kind"] for r in rows if r["kind"] in ("train", "publish")] == ["publish", "train", "publish"]


async def test_groups_of_the_last_batch_that_were_sampled_step_by_step_are_kept_for_the_report():
    buffer = await a_buffer()
    await deliver(buffer, 0)
    await buffer.next_batch(0, 0)
    assert await buffer.stepped() == []
    await buffer.settle(0, 0, {})
    await buffer.published(0, 1, {})
    lease = await buffer.lease("w", 0.1)
    group = a_group(task=lease.task.id, group=lease.id, version=Version(0, 1))
    group = replace(group, steps=(replace(group, id=f"{lease.id}/0.0"),))
    assert await buffer.put(lease.id, [group])
    await train(buffer, 1)
    assert await buffer.stepped() == [group]


async def test_staleness_zero_holds_admission_until_the_weights_are_out():
    buffer = await a_buffer(max_staleness=0)
    await deliver(buffer, 0)
    assert await buffer.lease("w", 0.05) is None
    await buffer.next_batch(0, 0)
    await buffer.settle(0, 0, {})
    assert await buffer.lease("w", 0.05) is None
    waiting = asyncio.create_task(buffer.lease("w", 5.0))
    await asyncio.sleep(0.01)
    await buffer.published(0, 1, {})
    assert await waiting is not None


async def test_a_late_result_of_a_dead_worker_is_refused_and_its_task_comes_again():
    buffer = await a_buffer()
    lease = await buffer.lease("dead", 0.1)
    assert await buffer.worker_lost("dead") == 1
    assert not await buffer.put(lease.id, [a_group(task=lease.task.id, group=lease.id)])
    again = await buffer.lease("alive", 0.1)
    assert again.task.id == lease.task.id and again.id != lease.id
    assert (await buffer.counts()).dropped == {"worker_lost": 2}


async def test_a_dead_worker_gets_no_lease_though_its_call_is_still_waiting():
    buffer = await a_buffer(max_staleness=0, groups=1)
    assert await buffer.lease("dead", 0.1) is not None
    waiting = asyncio.create_task(buffer.lease("dead", 5.0))
    await asyncio.sleep(0.01)
    await buffer.worker_lost("dead")
    assert await waiting is None
    assert await buffer.lease("alive", 0.1) is not None


async def test_infrastructure_that_fails_every_time_ends_the_run_by_name():
    buffer = await a_buffer()
    for _ in range(50):
        lease = await buffer.lease("w", 0.1)
        await buffer.event("lease failed: KeyError: 'reward'")
        await buffer.fail(lease.id, "rollout_failed")
    with pytest.raises(OutOfOrder, match=r"rollout_failed.*KeyError"):
        await buffer.rows()


async def test_a_new_incarnation_takes_the_ledger_back_and_refuses_earlier_results():
    buffer = await a_buffer()
    await deliver(buffer, 0)
    await train(buffer, 0)
    saved = await buffer.state()
    await buffer.checkpointed(0, 1)
    await deliver(buffer, 1)
    await deliver(buffer, 2)
    await train(buffer, 1)
    running = await buffer.lease("w", 0.1)
    assert await buffer.enter(saved) == 1
    assert not await buffer.put(running.id, [a_group(task=running.task.id, group=running.id)]), (
        "of the lost incarnation"
    )
    assert await buffer.lease("w", 0.05) is None, "not before the restored weights are out"
    with pytest.raises(Fenced, match="replaced by learner 1"):
        await buffer.settle(0, 2, {})
    await buffer.published(1, 1, {})
    counts = await buffer.counts()
    assert counts.trained == 2 and counts.ready == 2, (
        "the batch trained since was sampled by an ancestor: it comes again"
    )
    assert counts.dropped == {"lineage": 4}, "one group of weights that are lost, one lease under way"
    batch = await buffer.next_batch(1, 1)
    assert batch.stats["staleness/max"] == 0


async def test_the_order_of_tasks_goes_back_too():
    """Drawn: t1 trained, t2 trained after the checkpoint (kept), t3 running at it. After: t3 again, then the order goes on."""
    buffer = await a_buffer(max_staleness=2)
    order = [t.id for t in Uniform(TASKS, seed=0).sample(5)]
    first = await deliver(buffer, 0)
    second = await deliver(buffer, 0)
    third = await buffer.lease("w", 0.1)
    assert [x.task.id for x in (first, second, third)] == order[:3]
    await train(buffer, 0)
    saved = await buffer.state()
    await buffer.checkpointed(0, 1)
    await train(buffer, 1)
    assert (await buffer.lease("w", 0.1)).task.id == order[3]
    await buffer.enter(saved)
    await buffer.published(1, 1, {})
    assert (await buffer.counts()).ready == 2, "the second one returned to ready"
    assert [(await buffer.lease("w", 0.1)).task.id for _ in range(2)] == order[2:4]


async def test_a_buffer_that_dies_comes_back_from_its_journal(tmp_path):
    journal = tmp_path / "ledger.jsonl"
    setup = a_setup(max_staleness=2, journal=journal)
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    order = [t.id for t in Uniform(TASKS, seed=0).sample(5)]
    await deliver(buffer, 0)
    await train(buffer, 0)
    await deliver(buffer, 1)
    running = await buffer.lease("w", 0.1)
    with open(journal, "a") as file:
        file.write('{"op": "adm')  # killed in the middle of a line
    back = Buffer(setup, Uniform(TASKS, seed=0))
    assert not await back.put(running.id, [a_group(task=running.task.id, group=running.id)])
    counts = await back.counts()
    assert counts.trained == 2 and counts.dropped == {"buffer_lost": 4} and counts.admitted == 6
    rows = await back.rows()
    assert [r["kind"] for r in rows] == ["fence", "event", "train"]
    assert "came back" in rows[1]["message"] and rows[2]["again"] and rows[2]["step"] == 1
    assert [(await back.lease("w", 0.1)).task.id for _ in range(2)] == order[1:3], "what it held is leased again"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert audit(lines)["trained"] == 1


async def test_the_learner_goes_on_over_the_death_of_the_buffer(tmp_path):
    """It held batch 0 when the buffer died: its settle counts. Asked twice (the answer was lost), it counts once."""
    setup = a_setup(journal=tmp_path / "ledger.jsonl")
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    await deliver(buffer, 0)
    assert await buffer.next_batch(0, 0)
    back = Buffer(setup, Uniform(TASKS, seed=0))
    await back.settle(0, 0, {})
    await back.settle(0, 0, {})
    await back.published(0, 1, {})
    assert (await back.counts()).trained == 2
    await deliver(back, 1)
    assert await back.next_batch(0, 1)
    again = Buffer(setup, Uniform(TASKS, seed=0))
    await deliver(again, 1)
    assert (await again.next_batch(0, 1)).step == 1, "it never got that batch: another one is made"
    assert (await again.counts()).dropped == {"buffer_lost": 2}


async def test_several_ranks_begin_again_when_a_batch_was_lost_half_handed_out(tmp_path):
    setup = a_setup(journal=tmp_path / "ledger.jsonl")
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    await deliver(buffer, 0)
    assert await buffer.next_batch(0, 0, 2)
    back = Buffer(setup, Uniform(TASKS, seed=0))
    with pytest.raises(Fenced, match="lost with the buffer"):
        await back.next_batch(0, 0, 2)


async def test_a_resumed_run_drops_what_was_under_way_and_goes_on(tmp_path):
    journal = tmp_path / "ledger.jsonl"
    buffer = Buffer(a_setup(journal=journal), Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    await deliver(buffer, 0)
    await train(buffer, 0)
    saved = await buffer.state()
    await deliver(buffer, 1)
    await train(buffer, 1)
    await buffer.lease("w", 0.1)
    close_books(journal)
    resumed = Buffer(a_setup(journal=journal), Uniform(TASKS, seed=0))
    assert await resumed.enter(saved) == 1
    counts = await resumed.counts()
    assert counts.trained == 2 and counts.balanced
    assert counts.dropped == {"run_ended": 2, "lineage": 2}
    journal.unlink()
    without = Buffer(a_setup(journal=journal), Uniform(TASKS, seed=0))
    assert await without.enter(saved) == 1, "a checkpoint alone is enough"
    assert (await without.counts()).trained == 2


async def test_a_learner_that_dies_just_after_its_checkpoint_was_written_goes_on(tmp_path):
    """On disk: step 2; the buffer was told of step 1 only. Nothing trained before step 2 may be taken back."""
    setup = a_setup(max_staleness=2, journal=tmp_path / "ledger.jsonl")
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    for _ in range(3):
        await deliver(buffer, 0)
    await train(buffer, 0)
    await buffer.checkpointed(0, 1)
    await train(buffer, 1)
    saved = await buffer.state()
    assert await buffer.enter(saved) == 1
    counts = await buffer.counts()
    assert counts.trained == 4 and counts.ready == 2 and counts.balanced
    assert Buffer(setup, Uniform(TASKS, seed=0)), "its journal can be followed"


async def test_after_a_restore_a_buffer_that_dies_tells_no_row_of_the_lost_lineage(tmp_path):
    setup = a_setup(max_staleness=3, journal=tmp_path / "ledger.jsonl")
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    await deliver(buffer, 0)
    await train(buffer, 0)
    saved = await buffer.state()
    for step in (1, 2):
        await deliver(buffer, step)
        await train(buffer, step)
    await buffer.enter(saved)
    await buffer.published(1, 1, {})
    lease = await buffer.lease("w", 0.1)
    group = a_group((1.0, 0.0), task=lease.task.id, group=lease.id, version=Version(1, 1))
    assert await buffer.put(lease.id, [group])
    await train(buffer, 1, incarnation=1)
    rows = await Buffer(setup, Uniform(TASKS, seed=0)).rows()
    assert [(r["step"], r["incarnation"]) for r in rows if r["kind"] == "train"] == [(2, 1.0)]
    assert next(r for r in rows if r["kind"] == "fence")["step"] == 1


async def test_a_journal_behind_its_checkpoint_or_damaged_gives_balanced_books(tmp_path):
    """A machine that lost its power may have kept the checkpoint and lost the end of the journal."""
    journal = tmp_path / "ledger.jsonl"
    buffer = Buffer(a_setup(max_staleness=2, journal=journal), Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    short = journal.read_text()
    await deliver(buffer, 0)
    await train(buffer, 0)
    saved = await buffer.state()
    for text in (short, "no journal\n" * 3):
        journal.write_text(text)
        back = Buffer(a_setup(max_staleness=2, journal=journal), Uniform(TASKS, seed=0))
        await back.enter(saved)
        await back.published((await back.state())["ledger"]["incarnation"], 1, {})
        assert await back.lease("w", 0.1)
        counts = await back.counts()
        assert counts.trained == 2 and counts.running == 2 and counts.balanced
    assert list(tmp_path.glob("damaged-*-ledger.jsonl")), "set aside, not deleted"


async def test_a_resumed_run_admits_nothing_before_its_learner_has_published(tmp_path):
    journal = tmp_path / "ledger.jsonl"
    buffer = Buffer(a_setup(journal=journal), Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    close_books(journal)
    assert await Buffer(a_setup(journal=journal), Uniform(TASKS, seed=0)).lease("w", 0.05) is None


async def test_dead_workers_are_not_infrastructure_that_fails_every_time():
    buffer = await a_buffer(max_staleness=60)
    for number in range(60):
        await buffer.lease(f"w{number}", 0.1)
        await buffer.worker_lost(f"w{number}")
    await buffer.rows()


async def test_the_task_of_a_batch_that_was_lost_comes_again(tmp_path):
    setup = a_setup(journal=tmp_path / "ledger.jsonl")
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    lost = await deliver(buffer, 0)
    assert await buffer.next_batch(0, 0)
    back = Buffer(setup, Uniform(TASKS, seed=0))
    other = await deliver(back, 0)
    assert other.task.id != lost.task.id
    assert await back.next_batch(0, 0)
    assert (await back.lease("w", 0.1)).task.id == lost.task.id


async def test_a_lease_whose_answer_got_lost_is_given_up_in_time():
    config = BufferConfig(max_staleness=0, groups_per_batch=1, group_size=2, lease_timeout_s=0.01)
    buffer = Buffer(BufferSetup(config, AdvantageConfig(), 9), Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    first = await buffer.lease("w", 0.1)
    await asyncio.sleep(0.02)
    assert await buffer.next_batch(0, 0, timeout_s=0.01) is None
    assert (await buffer.counts()).dropped == {"lease_lost": 2}
    assert (await buffer.lease("w", 0.1)).task.id == first.task.id


async def test_a_live_run_refuses_the_checkpoint_of_a_replay():
    buffer = await a_buffer()
    with pytest.raises(RecordError, match="of a replay"):
        await buffer.enter({"cursor": 3})


async def test_learners_that_never_make_a_step_end_the_run():
    buffer = await a_buffer()
    for _ in range(5):
        await buffer.enter(None)
    with pytest.raises(OutOfOrder, match="5 learners ended"):
        await buffer.rows()


async def test_a_disk_that_takes_no_more_ends_the_run_by_name(tmp_path, monkeypatch):
    buffer = Buffer(a_setup(journal=tmp_path / "ledger.jsonl"), Uniform(TASKS, seed=0))

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(buffer._journal, "write", full)
    with pytest.raises(OSError):
        await buffer.enter(None)
    with pytest.raises(OutOfOrder, match=r"ledger.jsonl cannot be written: No space left.*resume="):
        await buffer.rows()


async def test_over_age_groups_are_dropped_when_the_batch_ships():
    buffer = await a_buffer(max_staleness=1)
    for step in range(2):
        await deliver(buffer, step)
        await buffer.next_batch(0, step)
        await buffer.settle(0, step, {})
        await buffer.published(0, step + 1, {})
    await deliver(buffer, 0)
    assert await buffer.next_batch(0, 2, timeout_s=0.05) is None, "sampled two optimiser batches ago"
    assert (await buffer.counts()).dropped == {"stale": 2}


async def test_a_group_nobody_could_judge_is_dropped_by_cause_and_comes_again():
    buffer = await a_buffer()
    lease = await buffer.lease("w", 0.1)
    group = a_group(task=lease.task.id, group=lease.id)
    dead = group.with_verdicts([Verdict.unavailable("outcome", "judge_timeout")] * 2)
    assert await buffer.put(lease.id, [dead])
    assert (await buffer.counts()).dropped == {"judge_timeout": 2}
    assert (await buffer.lease("w", 0.1)).task.id == lease.task.id


async def test_one_masked_member_leaves_the_baseline_but_not_its_siblings():
    buffer = await a_buffer(size=3)
    lease = await buffer.lease("w", 0.1)
    group = a_group((1.0, 0.0, 0.0), task=lease.task.id, group=lease.id)
    verdicts = [*group.verdicts[:2], Verdict.unavailable("outcome", "judge_timeout")]
    await buffer.put(lease.id, [group.with_verdicts(verdicts)])
    batch = await buffer.next_batch(0, 0)
    assert len(batch.shards[0]) == 2
    assert batch.stats["masked/judge_timeout"] == 1


async def test_the_last_batch_says_so_and_shards_are_even():
    buffer = await a_buffer(groups=2, steps=1)
    await deliver(buffer, 0)
    await deliver(buffer, 0)
    batch = await buffer.next_batch(0, 0, world_size=2)
    assert batch.last
    assert [len(s) for s in batch.shards] == [2, 2]
    own = await buffer.next_batch(0, 0, world_size=2, ranks=(1, 1))
    assert own.shards == ((), batch.shards[1]) and own.stats == batch.stats, "a rank is sent its own part"
    with pytest.raises(ValueError, match="asks for batch 3"):
        await buffer.next_batch(0, 3)


async def test_rollouts_masked_by_one_cause_pause_the_run_until_a_probe_comes_back_well():
    buffer = await a_buffer(groups=40, mask=MaskConfig(window=40, min_rollouts=8, probe_s=0.3))
    leases = [await buffer.lease("w", 0.1) for _ in range(6)]
    for lease in leases[:3]:
        dead = [Verdict.unavailable("outcome", "judge_timeout")] * 2
        await buffer.put(lease.id, [a_group(task=lease.task.id, group=lease.id).with_verdicts(dead)])
    said = [r["message"] for r in await buffer.rows() if r["kind"] == "event"]
    assert any("the run pauses" in line and "judge_timeout" in line for line in said)
    assert "judge_timeout" in (await buffer.pulse())[0]
    assert await buffer.lease("w", 0.05) is None, "nothing new begins"
    await asyncio.sleep(0.35)
    probe = await buffer.lease("w", 0.1)
    assert probe is not None and await buffer.lease("w", 0.05) is None, "one lease tries whether it is over"
    unjudged = a_group(task=probe.task.id, group=probe.id)
    await buffer.put(probe.id, [unjudged])
    probe = await buffer.lease("w", 0.1)
    assert probe is not None and await buffer.lease("w", 0.05) is None, "nobody has asked the judge yet"
    judged = [replace(v, prompts={"outcome": "1-abc"}) for v in unjudged.verdicts]
    await buffer.put(probe.id, [a_group(task=probe.task.id, group=probe.id).with_verdicts(judged)])
    assert await buffer.lease("w", 0.1) is not None
    assert any("the run goes on" in r["message"] for r in await buffer.rows() if r["kind"] == "event")
    assert (await buffer.counts()).balanced


DOWN = Verdict.unavailable("query", "judge_timeout")
UP = Verdict(1.0, prompts={"slate_query": "1-abc"})


async def put_steps(buffer: Buffer, **more) -> Group:
    lease = await buffer.lease("w", 0.1)
    group = a_stepped_group(task=lease.task.id, group=lease.id, **more)
    assert await buffer.put(lease.id, [group])
    return group


async def test_a_judge_that_fails_candidates_pauses_the_run_and_one_that_answers_them_ends_it():
    buffer = await a_buffer(groups=40, size=1, mask=MaskConfig(window=40, min_rollouts=20))
    now = [0.0]
    buffer._masks._clock = lambda: now[0]
    await put_steps(buffer, verdicts=[[UP, DOWN], [UP, UP]])
    assert await buffer.lease("w", 0.05) is not None, "one candidate of twenty"
    await put_steps(buffer, verdicts=[[UP, DOWN], [UP, UP]])
    assert "judge_timeout" in (await buffer.pulse())[0], "half of the steps, though no episode is masked"
    now[0] = 31.0
    await put_steps(buffer, verdicts=[[UP, UP], [UP, UP]])
    assert "judge_timeout" not in (await buffer.pulse())[0], "no whole episode asks the judge: its steps do"


async def test_judged_steps_are_trained_though_their_episode_failed_later():
    buffer = await a_buffer(size=1)
    await put_steps(buffer, stop=StopReason.env_failed)
    batch = await buffer.next_batch(0, 0)
    assert len(batch.shards[0]) == 4 and batch.stats["masked/env_failed"] == 2, "a step that it did not get to"
    assert batch.stats["masked/share"] == pytest.approx(2 / 6)
    await buffer.settle(0, 0, {})
    await put_steps(buffer, verdicts=[[DOWN, DOWN]] * 2, whole=Verdict.unavailable("steps", "judge_timeout"))
    assert (await buffer.counts()).dropped == {"judge_timeout": 1}


async def test_discarded_candidates_are_of_the_weights_lineage_too():
    buffer = await a_buffer(max_staleness=5, size=1)
    await put_steps(buffer, discarded=Version(7, 3))
    assert (await buffer.counts()).dropped == {"lineage": 1}
    await put_steps(buffer)
    saved = await buffer.state()
    await train(buffer, 0)
    await put_steps(buffer, discarded=Version(0, 1))
    await buffer.enter(saved)
    assert (await buffer.counts()).ready == 1, "one was sampled in part by weights that are lost"


async def test_the_age_of_a_step_is_that_of_its_own_tokens():
    buffer = await a_buffer(max_staleness=1, size=1)
    old = await buffer.lease("w", 0.1)
    for step in range(2):
        await put_steps(buffer, version=Version(0, step))
        await train(buffer, step)
    await buffer.put(old.id, [a_stepped_group(task=old.task.id, group=old.id, later=Version(0, 2))])
    batch = await buffer.next_batch(0, 2, timeout_s=0.05)
    assert len(batch.shards[0]) == 2 and batch.stats["masked/stale"] == 2, "the prefix of the others is too old"


async def test_the_limit_of_tokens_outlives_the_buffers_process(tmp_path):
    setup = a_setup(journal=tmp_path / "ledger.jsonl", size=1, max_sampled_tokens=36)  # 12 a batch
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    for step in range(2):
        await put_steps(buffer, version=Version(0, step))
        await train(buffer, step)
    back = Buffer(setup, Uniform(TASKS, seed=0))
    await put_steps(back, version=Version(0, 2))
    assert (await back.next_batch(0, 2)).last


async def test_a_pause_and_its_totals_outlive_the_buffers_process(tmp_path):
    setup = a_setup(journal=tmp_path / "ledger.jsonl", size=8)
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    lease = await buffer.lease("w", 0.1)
    group = a_group([0.0] * 8, task=lease.task.id, group=lease.id)
    await buffer.put(lease.id, [group.with_verdicts([Verdict.unavailable("outcome", "judge_unreachable")] * 8)])
    back = Buffer(setup, Uniform(TASKS, seed=0))
    assert back._masks.row()["masked_total/judge_unreachable"] == 8 and "judge_unreachable" in (await back.pulse())[0]
    assert await back.lease("w", 0.1) is not None and await back.lease("w", 0.05) is None, "one lease tries"
    assert audit(json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines())


async def test_a_shaper_changes_what_ships_and_its_memory_goes_into_the_checkpoint():
    buffer = await a_buffer(shaper=ShaperConfig(name="hapo"))
    assert (await buffer.state())["shaper"] == make_shaper(ShaperConfig(name="hapo")).state()
    lease = await deliver(buffer, 0)
    assert await buffer.next_batch(0, 0) is not None
    await buffer.settle(0, 0, {})
    state = await buffer.state()
    assert lease.task.id in json.dumps(state["shaper"]), "the length of the right answer is remembered"
    other = Buffer(a_setup(shaper=ShaperConfig(name="hapo")), Uniform(TASKS, seed=0))
    await other.enter(state)
    assert (await other.state())["shaper"] == state["shaper"]


async def test_a_learner_that_does_not_find_the_checkpoint_is_refused():
    """On a node without the run's storage training would begin anew, and nobody would notice."""
    buffer = await a_buffer()
    await deliver(buffer, 0)
    await train(buffer, 0)
    await buffer.checkpointed(0, 1)
    with pytest.raises(UserError, match="there was one of step 1: its node does not see"):
        await buffer.enter(None)


async def test_nor_is_it_let_in_by_a_buffer_that_came_back(tmp_path):
    setup = a_setup(journal=str(tmp_path / "ledger.jsonl"))
    buffer = Buffer(setup, Uniform(TASKS, seed=0))
    await buffer.enter(None)
    await buffer.published(0, 0, {})
    await deliver(buffer, 0)
    await train(buffer, 0)
    await Buffer(setup, Uniform(TASKS, seed=0)).enter(None)  # nothing was saved yet: it begins anew
    await buffer.checkpointed(0, 1)
    with pytest.raises(UserError, match="there was one of step 1"):
        await Buffer(setup, Uniform(TASKS, seed=0)).enter(None)
