"""Ranks, epochs and the choice of a transport, without anybody to talk to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Version
from cluster.errors import UserError
from cluster.fleet_config import FleetConfig
from cluster.learner import CALL_S, _ask, call_s, patient
from cluster.membership import EpochGuard, Member, Membership, Place, StaleEpoch, choose
from cluster.publishing import Facts, Peer, Publishing, deadlines
from cluster.vllm.engine import EngineConfig
from cluster.vllm.segment import Manifest, SegmentError
from cluster.vllm.transfer import Deadlines, Phase
from cluster.watchdog import WatchConfig

A, B, C = Member("a", 1), Member("b", 2), Member("c", 4)


def test_an_engine_begins_after_all_workers_of_those_before_it_whatever_their_sizes() -> None:
    epoch = Membership().agree("learner", [A, B, C, Member("d", 1)])
    assert [epoch.rank_offset(i) for i in range(4)] == [1, 2, 4, 8]
    assert epoch.world_size == 9


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 8), max_size=6))
def test_every_worker_has_a_rank_of_its_own_and_none_is_left_out(sizes: list[int]) -> None:
    epoch = Membership().agree("learner", [Member(str(i), n) for i, n in enumerate(sizes)])
    ranks = [0] + [epoch.rank_offset(i) + worker for i, n in enumerate(sizes) for worker in range(n)]
    assert ranks == list(range(epoch.world_size))


def test_an_epoch_lasts_until_somebody_comes_or_goes_or_it_breaks() -> None:
    membership = Membership()
    first = membership.agree("learner", [A, B])
    assert membership.agree("learner", [A, B]) is first
    left = membership.agree("learner", [A])
    joined = membership.agree("learner", [A, C])
    restarted = membership.agree("learner again", [A, C])
    membership.disband()
    anew = membership.agree("learner again", [A, C])
    numbers = [epoch.number for epoch in (first, left, joined, restarted, anew)]
    assert numbers == sorted(set(numbers)), "a number stood for two groups"
    assert left.world_size == 2 and joined.rank_offset(1) == 2


def test_an_engine_that_changed_its_size_is_another_member() -> None:
    membership = Membership()
    assert membership.agree("s", [Member("a", 1)]).number != membership.agree("s", [Member("a", 2)]).number


def test_a_number_goes_on_where_an_earlier_fleet_ended() -> None:
    assert Membership(41).agree("learner", [A]).number == 42


def test_a_stale_epoch_is_refused_on_both_sides() -> None:
    membership = Membership()
    old = membership.agree("learner", [A, B])
    new = membership.agree("learner", [A])
    assert membership.current(new.number) is new
    with pytest.raises(StaleEpoch, match=f"epoch {old.number} is over"):
        membership.current(old.number)
    membership.disband()
    with pytest.raises(StaleEpoch):
        membership.current(new.number)

    guard = EpochGuard()
    guard.enter(old.number)
    guard.check(old.number)
    guard.enter(new.number)
    guard.enter(new.number)  # the same group, told twice
    with pytest.raises(StaleEpoch, match=f"which epoch {new.number} has replaced"):
        guard.enter(old.number)
    with pytest.raises(StaleEpoch, match=f"this engine is in epoch {new.number}"):
        guard.check(old.number)


HERE, THERE = Place("n1"), Place("n2")
GPU0, GPU1, OTHER = Place("n1", ("gpu-0",)), Place("n1", ("gpu-1",)), Place("n2", ("gpu-7", "gpu-8"))


@pytest.mark.parametrize(
    ("asked", "learner", "engines", "kind"),
    [
        ("auto", HERE, [HERE, HERE], "shm"),
        ("auto", HERE, [], "shm"),
        ("auto", HERE, [HERE, THERE], "relay"),
        ("auto", HERE, [Place()], "shm"),  # an engine that tells nothing
        ("auto", HERE, [GPU0], "shm"),  # a learner on CPU has nothing to broadcast from
        ("auto", GPU0, [GPU0], "ipc"),
        ("auto", GPU0, [GPU1, OTHER], "nccl"),
        ("auto", GPU0, [HERE], "shm"),
        ("gloo", HERE, [HERE, THERE], "gloo"),
        ("relay", HERE, [HERE], "relay"),
        ("nccl", GPU0, [OTHER], "nccl"),
    ],
)
def test_the_transport_follows_from_where_everybody_sits(
    asked: str, learner: Place, engines: list[Place], kind: str
) -> None:
    assert choose(asked, learner, {f"sampler-{i}": place for i, place in enumerate(engines)}) == kind


@pytest.mark.parametrize(
    ("asked", "learner", "engines", "says"),
    [
        ("shm", HERE, [HERE, THERE], "set fleet.transport=relay or auto"),
        ("nccl", HERE, [HERE], "the learner has no GPU"),
        ("nccl", GPU0, [GPU1, HERE], "sampler-1 has no GPU"),
        ("nccl", GPU0, [GPU0], "takes a GPU once; set fleet.transport=ipc"),
        ("ipc", GPU0, [GPU0, OTHER], "sampler-1 sits on a GPU that no learner rank uses"),
        ("auto", GPU0, [GPU0, GPU1], "sampler-1 does not sit as the other engines do"),
    ],
)
def test_a_transport_that_cannot_serve_everybody_is_refused_in_one_line(
    asked: str, learner: Place, engines: list[Place], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        choose(asked, learner, {f"sampler-{i}": place for i, place in enumerate(engines)})
    assert "\n" not in str(caught.value)


async def test_a_fleet_that_comes_back_knows_that_an_engine_cannot_see_the_segment(tmp_path: Path) -> None:
    """Its references to the bytes are gone; an engine elsewhere must not look for the learner's file in its own memory."""
    state, landed = tmp_path / "published.json", []

    async def land(manifest: dict[str, Any], parcel: Sequence[Any]) -> dict[str, Any]:
        landed.append(list(parcel))
        if not parcel:
            raise SegmentError("nothing came")
        return manifest

    class Engine:
        def __getattr__(self, method: str) -> Any:
            async def call(*_: Any) -> None:
                return None

            return call

    def peers() -> dict[str, Peer]:
        return {"far": Peer(Engine(), Facts(Place("b")), land)}  # type: ignore[arg-type]

    manifest, limits = Manifest("/dev/shm/weights", 1, "0", 1), Deadlines()
    first = Publishing("auto", 1, limits, Version(0, 0).label, state)
    assert first.meet("learner", Place("a"), peers()).kind == "relay"
    assert (await first.segment(manifest, Version(0, 1).label, ("bytes",), peers())).ok
    again = Publishing("auto", 1, limits, Version(0, 0).label, state)
    assert again.restore()
    result = await again.bring("far", peers()["far"])
    assert (
        result is not None
        and (result.failed_phase, result.serving) == (Phase.STAGE, "old")
        and landed == [["bytes"], []]
    )


async def test_once_a_broadcast_was_begun_nobody_samples_from_the_checkpoint_it_was_started_with(
    tmp_path: Path,
) -> None:
    """Of a run that goes on that is a policy of long ago. A fleet that comes back knows it too."""

    class Engine:
        def __getattr__(self, method: str) -> Any:
            async def call(*_: Any) -> None:
                raise RuntimeError("it has died")

            return call

    async def land(*_: Any) -> dict[str, Any]:
        raise SegmentError("nothing came")

    peers = {"a": Peer(Engine(), Facts(Place("a")), land)}  # type: ignore[arg-type]
    state = tmp_path / "published.json"
    first, again = (Publishing("gloo", 1, Deadlines(), Version(1, 7).label, state) for _ in range(2))
    assert await first.bring("a", peers["a"]) is None and not again.restore(), (
        "there is nothing else before a learner came"
    )
    met = first.meet("learner", Place("a"), peers)
    assert not (await first.broadcast("t", met.epoch, Version(1, 7).label, {}, {}, peers)).ok
    for one in (first, again):
        assert one is first or one.restore()
        result = await one.bring("b", peers["a"])
        assert result is not None and (result.ok, result.serving, result.failed_phase) == (False, "old", Phase.INIT)


@pytest.mark.parametrize("limit_s", [120.0, 300.0, 900.0])
def test_nobody_gives_a_publish_up_that_is_within_its_deadlines(
    limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = FleetConfig(publish_deadline_s=limit_s)
    whole_s = sum(deadlines(fleet).of(phase) for phase in Phase)
    asked_s = call_s(fleet, EngineConfig(model=""))
    assert whole_s > 4 * limit_s and asked_s > 2 * whole_s > CALL_S, "another engine may be brought the weights before"
    watched = patient(WatchConfig(), fleet)
    assert watched.learner_s > whole_s and watched.learner_s >= WatchConfig().learner_s
    assert patient(WatchConfig(learner_s=1e6), fleet).learner_s == 1e6
    turn_s = 3600.0 + limit_s  # a learner's turn waits until engines are up, and then asleep
    assert call_s(fleet, EngineConfig(model="", start_timeout_s=3600.0)) > turn_s
    seen: list[float] = []
    monkeypatch.setattr("ray.get", lambda _, timeout: seen.append(timeout))
    _ask("a publish", asked_s), _ask("a word")
    assert seen == [asked_s, CALL_S]
