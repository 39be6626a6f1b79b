"""The replay in the buffer's place: the recording's order, passes, cursor, fences, and refusals before anything starts."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.advantages import AdvantageConfig
from agents.types import Group, RecordError, StopReason, Verdict, Version
from cluster.batch import make_batch
from cluster.buffer import BufferConfig, BufferSetup, OutOfOrder
from cluster.config import ROOT, load_config
from cluster.errors import Fenced, UserError
from cluster.replay import Replay, check
from cluster.replayplan import check_memory, plan
from cluster.schema import RunConfig
from cluster.speech import make_speech
from tests.builders import a_group, a_stepped_group
from tests.unit.test_record import GROUPS, record, spoken, trained, write_ledger


def a_replay(run_dir: Path, *, groups: int = 2, steps: int = 3, advantage: str = "grpo", **more: Any) -> Replay:
    buffer = BufferConfig(groups_per_batch=groups, group_size=2)
    return Replay(BufferSetup(buffer, AdvantageConfig(name=advantage, **more), steps), str(run_dir))


async def batch_of(replay: Replay, incarnation: int, step: int) -> Any:
    batch = await replay.next_batch(incarnation, step)
    assert batch is not None and batch.step == step
    counts = await replay.counts()
    assert counts.balanced and counts.in_batch
    return batch


def leases(batch: Any) -> list[str]:
    return list(dict.fromkeys(s.group_id for shard in batch.shards for s in shard))


async def test_batches_are_the_recording_in_order_pass_after_pass(tmp_path: Path) -> None:
    replay = a_replay(record(tmp_path), groups=4, steps=4)
    assert await replay.enter(None) == 0
    seen: list[str] = []
    for step in range(4):
        batch = await batch_of(replay, 0, step)
        assert batch.last == (step == 3) and batch.stats["episodes"] == 8
        seen += leases(batch)
        await replay.settle(0, step, {"loss": 0.5})
        await replay.settle(0, step, {"loss": 0.5})  # asked again: the answer was lost
    ids = [g.id for g in GROUPS]
    assert seen == (ids * 3)[:16]
    counts = await replay.counts()
    assert counts.balanced and counts.trained == counts.admitted == 32
    rows = await replay.rows()
    train = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4] and train[1]["loss"] == 0.5
    assert [round(r["replay/passes"], 2) for r in train] == [0.67, 1.33, 2.0, 2.67]
    assert train[-1]["ledger/trained"] == 32 and "ledger/dropped" in train[0]
    assert sum("begins again" in r["message"] for r in rows if r["kind"] == "event") == 2
    assert {(r["actor"], r["phase"]) for r in rows if r["kind"] == "span"} == {
        ("learner", "wait"),
        ("learner", "train"),
    }
    assert (await replay.rows()) == []


async def test_the_algorithm_is_the_config_s_and_nothing_else_changes(tmp_path: Path) -> None:
    record(tmp_path)
    found = {}
    for name in ("grpo", "dr_grpo"):
        replay = a_replay(tmp_path, advantage=name)
        await replay.enter(None)
        found[name] = (await batch_of(replay, 0, 0)).shards[0]
    for one, other in zip(found["grpo"], found["dr_grpo"], strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.logprobs, other.logprobs)
        assert not np.array_equal(one.advantages, other.advantages)


async def test_ranks_share_a_batch_without_losing_a_sample(tmp_path: Path) -> None:
    replay = a_replay(record(tmp_path), groups=3)
    await replay.enter(None)
    first, second = [await replay.next_batch(0, 0, 2) for _ in range(2)]
    assert first is second and first is not None
    assert sorted(s.rollout_id for shard in first.shards for s in shard) == sorted(
        f"{g.task.id}/{g.id}/{i}" for g in GROUPS[:3] for i in range(2)
    )


async def test_a_learner_that_goes_back_goes_on_at_the_same_group(tmp_path: Path) -> None:
    record(tmp_path)
    replay = a_replay(tmp_path, steps=6)
    await replay.enter(None)
    await batch_of(replay, 0, 0)
    await replay.settle(0, 0, {})
    saved = json.loads(json.dumps(await replay.state()))  # plain values
    expected = leases(await batch_of(replay, 0, 1))
    await replay.settle(0, 1, {})
    assert await replay.enter(saved) == 1
    with pytest.raises(Fenced):
        await replay.next_batch(0, 1)
    with pytest.raises(Fenced):
        await replay.settle(0, 1, {})
    assert leases(await batch_of(replay, 1, 1)) == expected
    assert (await replay.counts()).trained == 4

    resumed = a_replay(tmp_path, steps=6)  # another driver, later
    assert await resumed.enter(saved) == 1
    assert leases(await batch_of(resumed, 1, 1)) == expected
    assert (await resumed.counts()).balanced


async def test_a_recording_that_grew_is_gone_on_with_and_another_one_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "live")
    replay = a_replay(tmp_path / "live", groups=4, steps=6)
    await replay.enter(None)
    await batch_of(replay, 0, 0)
    await replay.settle(0, 0, {})
    saved = json.loads(json.dumps(await replay.state()))
    expected = leases(await batch_of(replay, 0, 1))

    record(tmp_path / "live", [a_group(task=f"n{i}", group=f"n{i}/{i}", seed=9) for i in range(3)])
    (tmp_path / "live").rename(tmp_path / "moved")
    grown = a_replay(tmp_path / "moved", groups=4, steps=6)
    assert await grown.enter(saved) == 1
    assert leases(await batch_of(grown, 1, 1)) == expected and expected[2:] == [g.id for g in GROUPS[:2]]
    assert any("goes on with its first 6 groups" in r.get("message", "") for r in await grown.rows())
    assert (await grown.state())["recording"]["hash"] == saved["recording"]["hash"]

    record(tmp_path / "other", [a_group(task=f"t{i}", group=f"t{i}/{i}", seed=i, tokens=9) for i in range(6)])
    record(tmp_path / "short", GROUPS[:4])
    for name in ("other", "short"):  # the same ids with other rollouts, and fewer of them
        with pytest.raises(RecordError, match="does not begin with the 6 groups") as error:
            await a_replay(tmp_path / name, groups=4).enter(saved)
        assert "\n" not in str(error.value)


async def test_a_checkpoint_of_a_live_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="of a live run"):
        await a_replay(record(tmp_path)).enter({"ledger": {"version": 3, "trained": 24}, "curriculum": {}})


async def test_learners_that_end_one_after_the_other_end_the_run(tmp_path: Path) -> None:
    replay = a_replay(record(tmp_path))
    for _ in range(6):
        await replay.enter(None)
    with pytest.raises(OutOfOrder, match="5 learners ended"):
        await replay.rows()


async def test_recorded_staleness_is_logged_and_old_groups_are_trained(tmp_path: Path) -> None:
    old = [a_group(task=f"t{i}", group=f"t{i}/{i}", version=Version(0, i // 2), seed=i) for i in range(6)]
    record(tmp_path, old)
    write_ledger(tmp_path, *trained(7, *(g.id for g in old[:2])), *trained(9, *(g.id for g in old[4:])))
    replay = a_replay(tmp_path, steps=2)
    await replay.enter(None)
    assert (await batch_of(replay, 0, 0)).stats["staleness/max"] == 7
    await replay.settle(0, 0, {"staleness/max": 0.0})  # as the learner counts it, by steps of its own
    assert next(r for r in await replay.rows() if r["kind"] == "train")["staleness/max"] == 7
    batch = await batch_of(replay, 0, 1)
    assert batch.stats["staleness/mean"] == 7 and leases(batch) == [g.id for g in old[4:]]


@pytest.mark.parametrize(("recorded_batch", "withheld"), [(2, 3), (4, 0)])
async def test_what_the_recorded_run_withheld_for_its_age_is_withheld_again(
    tmp_path: Path, recorded_batch: int, withheld: int
) -> None:
    new, old = (a_group(task="t0", group="t0/0", version=Version(0, v), seed=0) for v in (6, 4))
    mixed = replace(new, members=(old.members[0], new.members[1]))
    record(tmp_path, [mixed, GROUPS[1]])
    write_ledger(tmp_path, *trained(7, mixed.id, GROUPS[1].id))
    live = make_batch(7, [mixed, GROUPS[1]], AdvantageConfig(), max_staleness=2)
    (tmp_path / "config.yaml").write_text(f"buffer: {{max_staleness: 2, groups_per_batch: {recorded_batch}}}\n")
    assert live.stats["masked/stale"] == 3  # a member of the first group, and all of the second, which is 7 steps old
    replay = a_replay(tmp_path)
    await replay.enter(None)
    batch = await batch_of(replay, 0, 0)
    assert batch.stats["masked/stale"] == withheld
    if withheld:  # the same samples, with the same baseline
        assert [s.rollout_id for s in batch.shards[0]] == [s.rollout_id for s in live.shards[0]] == ["t0/t0/0/1"]
        assert np.array_equal(batch.shards[0][0].advantages, live.shards[0][0].advantages)
        assert batch.stats["staleness/max"] == live.stats["staleness/max"] == 1
    else:  # other batches than the recorded run's: off-policy by nature
        assert len(batch.shards[0]) == 4 and batch.stats["staleness/max"] == 7


async def test_groups_that_nobody_could_judge_are_passed_over_and_counted(tmp_path: Path) -> None:
    dead = GROUPS[1].with_verdicts([Verdict.unavailable("reward", "timeout")] * 2)
    half = GROUPS[2].with_verdicts([Verdict.unavailable("reward", "timeout"), Verdict(1.0, {"outcome": 1.0})])
    replay = a_replay(record(tmp_path, [GROUPS[0], dead, half, GROUPS[3]]), groups=3, steps=1)
    await replay.enter(None)
    batch = await batch_of(replay, 0, 0)
    assert leases(batch) == [GROUPS[0].id, half.id, GROUPS[3].id] and batch.stats["masked/timeout"] == 1
    counts = await replay.counts()
    assert (counts.admitted, counts.in_batch, dict(counts.dropped)) == (8, 6, {"masked": 2})
    await replay.settle(0, 0, {})
    counts = await replay.counts()
    assert counts.balanced and (counts.trained, dict(counts.dropped)) == (6, {"masked": 2})


async def test_judged_steps_of_episodes_that_failed_are_trained_again(tmp_path: Path) -> None:
    down = Verdict.unavailable("query", "judge_timeout")
    failed = a_stepped_group(group="t/0", stop=StopReason.env_failed)
    unjudged = a_stepped_group(group="t/1", verdicts=[[down] * 2] * 2)
    replay = a_replay(record(tmp_path, [unjudged, failed]), groups=1, steps=1)
    await replay.enter(None)
    batch = await batch_of(replay, 0, 0)
    assert leases(batch) == ["t/0/0.0", "t/0/0.1"] and dict((await replay.counts()).dropped) == {"masked": 1}


async def test_the_next_batch_is_made_while_the_learner_trains(tmp_path: Path) -> None:
    replay = a_replay(record(tmp_path), steps=3)
    await replay.enter(None)
    await batch_of(replay, 0, 0)
    assert replay._ahead is not None and replay._ahead[0] == (2, 1, 1, False)
    made = await replay._ahead[1]
    await replay.settle(0, 0, {})
    assert await replay.next_batch(0, 1, timeout_s=0.0) is made.batch, "it was ready, and is not made again"


def without_rubrics(group: Group) -> Group:
    return group.with_verdicts([Verdict(v.reward, {"outcome": v.reward}) for v in group.verdicts])


def lazily_judged(group: Group) -> Group:
    return group.with_verdicts([Verdict(v.reward, {**v.parts, "rubric_judged": v.reward}) for v in group.verdicts])


@pytest.mark.parametrize(
    ("groups", "options", "says"),
    [
        (GROUPS, {"groups": 7}, "holds 6 groups, which is less than one batch; set buffer.groups_per_batch=6"),
        (
            [without_rubrics(g) for g in GROUPS],
            {"advantage": "c_grpo"},
            "c_grpo needs the verdict parts outcome and rubric",
        ),
        ([lazily_judged(g) for g in GROUPS], {"advantage": "c_grpo", "correct_only": False}, "lazy rubrics"),
        ([g.with_verdicts([Verdict.unavailable("r", "x")] * 2) for g in GROUPS], {}, "no group .* was judged"),
    ],
)
def test_a_recording_that_cannot_be_trained_so_is_refused_at_once(
    tmp_path: Path, groups: list[Group], options: dict[str, Any], says: str
) -> None:
    record(tmp_path, groups)
    with pytest.raises(RecordError, match=says) as error:
        a_replay(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def demo() -> RunConfig:
    return load_config("configs/demo.yaml", ["ray.address=local"], RunConfig)


def by_demo(demo: RunConfig, groups: list[Group] = GROUPS, **changes: str) -> list[Group]:
    """Groups as the demo's policy would have played them."""
    speech = make_speech(demo.model.path, demo.protocol)
    own = {"protocol": speech.name, "tokenizer": speech.tokenizer_fingerprint, "template": speech.template_fingerprint}
    return [spoken(group, **{**own, **changes}) for group in groups]


def test_a_replay_is_checked_before_anything_is_written(demo: RunConfig, tmp_path: Path) -> None:
    record(tmp_path / "live", by_demo(demo))
    for given in (str(tmp_path / "live" / "groups"), "live"):
        config = replace(
            demo, storage_path=str(tmp_path), name="again", replay=given, buffer=BufferConfig(groups_per_batch=4)
        )
        assert check(config) == tmp_path / "live" / "groups"
    lines = plan(config).text
    assert lines[0].endswith("6 groups, as they were recorded") and lines[-2:] == [
        "missing     nothing",
        "Nothing was started.",
    ]
    assert any(line.startswith("memory ") for line in lines) and any(line.startswith("disk ") for line in lines)
    broken = replace(config, replay="lvie", model=replace(demo.model, path="nowhere", shape=""))
    assert [line.split(" ")[0] for line in plan(broken).missing] == ["there", "model"]  # all of it, not the first alone

    def refused(says: str, **changes: Any) -> None:
        with pytest.raises((RecordError, UserError), match=says) as error:
            check(replace(config, **changes))
        assert "\n" not in str(error.value)

    refused("there is no recording", replay="lvie")
    refused("holds no recorded groups", replay=str(tmp_path))
    refused("6 groups, which is less than one batch", buffer=BufferConfig(groups_per_batch=8))
    refused("give it another name=", name="live")
    refused("max_sampled_tokens counts what is sampled", train=replace(demo.train, max_sampled_tokens=9))
    refused("recorded with protocol 'tools', and this config has 'tags'", protocol=replace(demo.protocol, name="tags"))
    for name in ("tokenizer", "template"):
        record(tmp_path / name, by_demo(demo, **{name: "other"}))
        refused(f"recorded with {name} 'other', and this config has", replay=name)
    record(tmp_path / "plain", by_demo(demo, [without_rubrics(g) for g in GROUPS]))
    refused("c_grpo needs the verdict parts", replay="plain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live", "plain", "template", "tokenizer"]


def test_memory_is_what_learners_take() -> None:
    check_memory(3.0, free_bytes=4 << 30)
    with pytest.raises(UserError, match=r"takes about 5\.0 GiB, 4\.0 GiB are free"):
        check_memory(5.0, free_bytes=4 << 30)


async def test_damage_further_on_ends_the_run_with_its_place(tmp_path: Path) -> None:
    record(tmp_path)
    part = tmp_path / "groups" / "part-00000.msgpack.z"
    replay = a_replay(tmp_path)
    frame = replay._recording.entries[2].frame
    data = bytearray(part.read_bytes())
    data[frame.offset + frame.length // 2] ^= 16
    part.write_bytes(data)
    await replay.enter(None)
    await batch_of(replay, 0, 0)
    await replay.settle(0, 0, {})
    with pytest.raises(RecordError, match=r"part-00000\.msgpack\.z:3: damaged record"):
        await replay.next_batch(0, 1)


async def grown(folder: Path) -> dict[str, int]:
    """How many objects more of each type there are after 79 steps of a replay."""
    replay = a_replay(record(folder), steps=120)
    await replay.enter(None)
    held = []
    for step in range(120):
        await batch_of(replay, 0, step)
        await replay.settle(0, step, {"loss": 0.0})
        await replay.rows()
        if step in (39, 118):
            await replay._ahead[1]  # the next batch is made by another thread: count when it lies there
            gc.collect()
            held.append(Counter(type(thing).__name__ for thing in gc.get_objects()))
    return held[1] - held[0]


def test_memory_is_flat_however_long_the_replay_goes_on(tmp_path: Path) -> None:
    """In a process of its own: this one holds what other tests have left, and lets go of it when it likes."""
    counts = "import asyncio, json, pathlib, sys; from tests.unit.test_replay import grown; print(json.dumps(asyncio.run(grown(pathlib.Path(sys.argv[1])))))"
    done = subprocess.run(
        [sys.executable, "-c", counts, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [name for name, count in found.items() if count >= 79] == [], "what a step leaves behind is there 79 times"
    # Abstract classes cache whom they were asked about, each by a weak reference with a callback: the interpreter's, not ours.
    caches = {"ReferenceType", "builtin_function_or_method"}
    assert sum(count for name, count in found.items() if name not in caches) < 50, found
