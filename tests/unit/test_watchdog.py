"""The watchdog tells apart who died, who is silent and who waits, and never waits itself."""

import time
from types import SimpleNamespace

import pytest
import ray

from cluster.watchdog import Poll, Tally, Waits, WatchConfig, Watchdog


class FakeActor:
    """An actor whose answers a test decides: a value, an error, or None for silence."""

    def __init__(self):
        self.answer = ("", 0.0, 1)
        self.asked = 0
        self.pulse = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._ask), remote=self._ask)

    def _ask(self):
        self.asked += 1
        return self


@pytest.fixture
def dog(monkeypatch):
    killed = []
    monkeypatch.setattr(ray, "wait", lambda refs, timeout=0: ([r for r in refs if r.answer is not None], []))

    def get(reference, **_):
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda handle, no_restart=True: killed.append((handle, no_restart)))
    made = Watchdog(WatchConfig(silent_s=0.05, replace_s=0.15, waiting_s=10.0))
    made.killed = killed
    return made


def test_a_silent_actor_is_named_with_what_it_waited_for_then_killed(dog):
    actor = FakeActor()
    dog.watch("retrieval", actor)
    actor.answer = ("the disk", time.time() - 3, 1)
    assert dog.look() == dog.look() == []
    actor.answer = None
    dog.look()
    time.sleep(0.06)
    (line,) = dog.look()
    assert "retrieval has not answered for" in line and "the disk" in line
    assert dog.look() == [], "told once"
    time.sleep(0.11)
    (line,) = dog.look()
    assert "retrieval was killed, to start again" in line and dog.killed == [(actor, False)]
    actor.answer = ("", 0.0, 1)
    dog.look()
    assert dog.look() == ["retrieval answers again"]


def test_a_dead_actor_without_a_successor_of_its_own_is_replaced(dog):
    actor = FakeActor()
    dog.watch("rollout-0", actor, lambda reason: f"rollout-0 replaced: {reason}")
    actor.answer = ray.exceptions.RayActorError()
    dog.look()
    (line,) = dog.look()
    assert line.startswith("rollout-0 replaced")
    assert dog.look() == [], "nobody looks after it any more"


def test_one_that_died_and_came_back_between_two_looks_is_told(dog):
    actor = FakeActor()
    dog.watch("reward", actor)
    dog.look()
    assert dog.look() == []
    actor.answer = ("", 0.0, 2)
    lines = [line for _ in range(4) for line in dog.look()]
    assert lines == ["reward died and was started again; it answers again"]


def test_one_that_died_and_came_back_slowly_is_told_too(dog):
    """Ray kept the question for its successor."""
    actor = FakeActor()
    dog.watch("reward", actor)
    dog.look()
    dog.look()
    actor.answer = None
    dog.look()
    time.sleep(0.06)
    assert "has not answered" in dog.look()[0]
    actor.answer = ("", 0.0, 2)
    assert dog.look() == ["reward died and was started again; it answers again after 0 s"]


def test_one_that_answers_but_waits_too_long_says_for_what(dog):
    actor = FakeActor()
    dog.watch("rollout-0", actor)
    since = time.time() - 60
    actor.answer = ("a policy turn from sampler-0", since, 1)
    lines = [line for _ in range(6) for line in dog.look()]
    assert len(lines) == 1 and "has waited 60 s for a policy turn from sampler-0" in lines[0]
    assert "rollout-0 has waited 60 s" in dog.waiting_for()[0]


def test_a_poll_asks_again_after_a_death_and_raises_what_the_call_raised(dog):
    actor = FakeActor()
    poll = Poll(actor.pulse.remote)
    actor.answer = None
    assert poll.take() is None and poll.take() is None and actor.asked == 1
    actor.answer = ray.exceptions.RayActorError()
    assert poll.take() is None
    actor.answer = "rows"
    assert poll.take() == "rows" and actor.asked == 2
    actor.answer = ValueError("no")
    with pytest.raises(ValueError):
        poll.take()


def test_waits_name_the_oldest_and_forget_what_is_over():
    waits = Waits()
    with waits("first"):
        with waits("second"):
            assert waits.oldest()[0] == "first"
        assert waits.oldest()[0] == "first"
    assert waits.oldest() == ("", 0.0)


def test_trouble_counts_within_the_hour_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tally = Tally(2)
    assert not tally.exceeded() and not tally.exceeded()
    now[0] = 3000.0
    assert tally.exceeded()
    now[0] = 7000.0
    assert not tally.exceeded()


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="silent_s"):
        WatchConfig(silent_s=100, replace_s=50).check()
