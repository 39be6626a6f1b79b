"""Full-trajectory sampling: token fidelity, every ending, limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.plain import from_plain, to_plain
from agents.sampling.config import SamplingConfig
from agents.sampling.full import collect, keep
from agents.types import (
    Action,
    ActionKind,
    Episode,
    Generation,
    Identity,
    Role,
    Sampling,
    Span,
    StopReason,
    Task,
    ToolCall,
    ToolEvent,
    Turn,
    Uid,
    Version,
)

STOP, CALL, ANSWER, REFUSE, BAD, TWO = 0, 1, 2, 3, 4, 5
TASK = Task("t", "Who?")


class Words:
    """A protocol over bare ids: the first token of a turn is what it does, STOP ends it."""

    name = "words"
    stop_token_ids = (STOP,)
    tokenizer_fingerprint = template_fingerprint = "w"

    def prompt(self, task: Task) -> list[int]:
        return [90, 91, 92]

    def parse(self, token_ids: Sequence[int]) -> Action:
        if not token_ids or token_ids[-1] != STOP:
            return Action(ActionKind.malformed, error="cut off")
        calls = (ToolCall("search", {"query": "a"}), ToolCall("open", {"doc_id": "b"}))
        return {
            CALL: Action(ActionKind.call, calls[:1]),
            TWO: Action(ActionKind.call, calls),
            ANSWER: Action(ActionKind.answer, message="Ann", answer="Ann"),
            REFUSE: Action(ActionKind.answer, message="unknown", answer="unknown", refused=True),
        }.get(token_ids[0], Action(ActionKind.malformed, error="what?"))

    def observe(self, events: Sequence[ToolEvent], *, after: Sequence[int]) -> list[int]:
        return [80 + len(e.text) % 10 for e in events] + [89]

    def complain(self, error: str, *, after: Sequence[int]) -> list[int]:
        return [70, 71]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


class Texty(Words):
    """Ends turns on token 9, wherever it stands, and drops what follows."""

    stop_strings = ("</x>",)

    def truncate(self, token_ids: Sequence[int]) -> int:
        return list(token_ids).index(9) + 1 if 9 in token_ids else len(token_ids)

    def parse(self, token_ids: Sequence[int]) -> Action:
        done = len(token_ids) > 1 and token_ids[-1] == 9
        return super().parse([*token_ids[:-1], STOP]) if done else Action(ActionKind.malformed, error="open")


@dataclass
class Script:
    """A policy that says what it is told, cut to the tokens it may sample."""

    turns: list[list[int]]
    asked: list[tuple[tuple[int, ...], Sampling, str]] = field(default_factory=list)
    said: list[tuple[int, ...]] = field(default_factory=list)
    finish: str = ""
    wait_s: float = 0.0
    extra: list[dict[str, Any]] = field(default_factory=list)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        session: str,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        **extra: Any,
    ) -> Generation:
        turn = self.turns[len(self.asked)]
        self.asked.append((tuple(prompt_ids), sampling, session))
        self.extra.append(extra)
        await asyncio.sleep(self.wait_s)
        said = tuple(turn[: sampling.max_tokens])
        self.said.append(said)
        finish = self.finish or ("stop" if said and said[-1] in stop_token_ids else "length")
        spans = (Span(0, 1, Version(0, 4)), Span(1, len(said), Version(0, 5))) if len(said) > 1 else ()
        spans = spans or ((Span(0, len(said), Version(0, 5)),) if said else ())
        return Generation(said, tuple(-0.5 - i / 100 for i in range(len(said))), spans, finish, latency_s=0.1)


@dataclass
class Box:
    """A sandbox that answers everything, or fails as told."""

    error: str = ""
    hang: bool = False
    calls: list[str] = field(default_factory=list)

    async def call(self, call: ToolCall) -> ToolEvent:
        self.calls.append(call.name)
        if self.hang:
            await asyncio.sleep(60)
        return ToolEvent(call, f"result of {call.name}", error=self.error, latency_s=0.2)

    async def close(self) -> None: ...


def play(
    policy: Script, *, speech: Any = None, box: Box | None = None, sampling: Sampling | None = None, **limits: Any
) -> Episode:
    identity = Identity("run", Uid("t", "g", 0), "words", "w", "w", sampling or Sampling(max_tokens=50))
    config = SamplingConfig(**limits)
    episode = asyncio.run(collect(TASK, identity, policy, box or Box(), speech or Words(), config))
    assert from_plain(Episode, to_plain(episode)) == episode
    assert len(episode.endings) == 1 and episode.endings[0].turn_id == episode.turns[-1].id
    return episode


def ending(episode: Episode) -> StopReason:
    return episode.endings[0].stop


def test_search_then_answer() -> None:
    policy, box = Script([[CALL, 50, STOP], [ANSWER, 51, 52, STOP]]), Box()
    episode = play(policy, box=box)
    assert ending(episode) is StopReason.answered
    assert [t.role for t in episode.turns] == [Role.prompt, Role.policy, Role.observation, Role.policy]
    trajectory = next(episode.trajectories())
    assert trajectory.token_ids.tolist() == [90, 91, 92, CALL, 50, STOP, 86, 89, ANSWER, 51, 52, STOP]
    assert trajectory.mask.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert trajectory.versions_T.tolist() == [-1, -1, -1, 4, 5, 5, -1, -1, 4, 5, 5, 5]
    assert np.allclose(trajectory.logprobs[3:6], [-0.5, -0.51, -0.52])
    assert policy.asked[1][0] == (90, 91, 92, CALL, 50, STOP, 86, 89)
    assert {session for _, _, session in policy.asked} == {"run/t/g/0"}
    assert [e.turn_id for e in trajectory.events] == [1] and trajectory.answer == "Ann"
    assert set(episode.seconds) == {"generate", "tools", "total"}


def test_refusal_and_several_calls_in_order() -> None:
    box = Box()
    episode = play(Script([[TWO, STOP], [REFUSE, STOP]]), box=box)
    assert ending(episode) is StopReason.refused
    assert box.calls == ["search", "open"] and [e.turn_id for e in episode.events] == [1, 1]


def test_fate_of_malformed_turns() -> None:
    turns = [[BAD, STOP], [ANSWER, STOP]]
    stopped = play(Script(turns))
    assert (ending(stopped), stopped.endings[0].error) == (StopReason.malformed, "what?")
    retried = play(Script(turns), malformed="retry")
    assert ending(retried) is StopReason.answered
    assert retried.turns[2].token_ids.tolist() == [70, 71]
    assert ending(play(Script([[BAD, STOP]] * 9), malformed="retry", max_malformed=3)) is StopReason.malformed
    mixed = [[BAD, STOP], [CALL, STOP]] * 3 + [[ANSWER, STOP]]
    assert ending(play(Script(mixed), malformed="retry", max_malformed=2)) is StopReason.answered
    assert ending(play(Script([[]], finish="stop"))) is StopReason.malformed


def test_too_long_a_turn_is_malformed_and_too_full_a_context_is_not() -> None:
    long = [CALL] + [50] * 40
    turn = play(Script([long]), sampling=Sampling(max_tokens=10))
    assert ending(turn) is StopReason.malformed and len(turn.turns[1].token_ids) == 10
    full = play(Script([long]), max_context=20)
    assert ending(full) is StopReason.context_full and next(full.trajectories()).token_ids.size == 20
    both = play(Script([long]), max_context=13, sampling=Sampling(max_tokens=10))
    assert ending(both) is StopReason.context_full
    # an answer that is cut off is no answer
    assert ending(play(Script([[ANSWER] * 30]), max_context=20)) is StopReason.context_full
    # the engine's own context was smaller than ours
    assert ending(play(Script([[CALL, 50]]))) is StopReason.context_full


def test_a_turn_at_its_token_limit_may_count_as_final() -> None:
    sampling = Sampling(max_tokens=4)
    final = play(Script([[ANSWER, 7, 8, 9, 6]]), sampling=sampling, on_length="final")
    assert ending(final) is StopReason.answered and final.turns[-1].token_ids.tolist() == [ANSWER, 7, 8, 9]
    assert ending(play(Script([[CALL, 7, 8, 9, 6]]), sampling=sampling, on_length="final")) is StopReason.malformed
    assert ending(play(Script([[ANSWER, 7, 8, 9, 6]]), sampling=sampling)) is StopReason.malformed
    with pytest.raises(ValueError, match="on_length 'maybe'"):
        SamplingConfig(on_length="maybe")


def test_an_observation_that_does_not_fit_ends_the_episode() -> None:
    # 3 + 2 tokens, then an observation of 2: one token must be left to speak
    turns = [[CALL, STOP], [ANSWER, STOP]]
    episode = play(Script(turns), max_context=7)
    assert ending(episode) is StopReason.context_full and len(episode.turns) == 2 and len(episode.events) == 1
    policy = Script(turns)
    assert ending(play(policy, max_context=8)) is StopReason.context_full
    assert policy.asked[1][1].max_tokens == 1
    assert ending(play(Script(turns), max_context=9)) is StopReason.answered
    empty = play(Script([]), max_context=3)
    assert ending(empty) is StopReason.context_full and len(empty.turns) == 1


def test_turn_limit_does_not_run_calls_nobody_reads() -> None:
    box = Box()
    episode = play(Script([[CALL, STOP]] * 5), box=box, max_turns=3)
    assert ending(episode) is StopReason.turn_limit and len(box.calls) == 2
    assert ending(play(Script([[CALL, STOP], [ANSWER, STOP]]), max_turns=2)) is StopReason.answered


def test_infrastructure_masks_and_stops_at_once_while_mistakes_go_on() -> None:
    box = Box(error="backend")
    episode = play(Script([[TWO, STOP]]), box=box)
    assert (
        ending(episode) is StopReason.env_failed and box.calls == ["search"] and "result of" in episode.endings[0].error
    )
    assert ending(play(Script([[CALL, STOP], [ANSWER, STOP]]), box=Box(error="not_found"))) is StopReason.answered


def test_engine_aborts_keep_what_was_sampled() -> None:
    episode = play(Script([[CALL, 50]], finish="abort"))
    assert ending(episode) is StopReason.aborted and episode.turns[1].token_ids.tolist() == [CALL, 50]
    assert len(play(Script([[]], finish="abort")).turns) == 1


@pytest.mark.parametrize("during", ["generate", "tools"])
async def test_cancellation_returns_the_work_so_far(during: str) -> None:
    policy = Script([[CALL, STOP]], wait_s=60 if during == "generate" else 0)
    identity = Identity("run", Uid("t", "g", 0), "words", "w", "w")
    work = asyncio.create_task(
        collect(TASK, identity, policy, Box(hang=during == "tools"), Words(), SamplingConfig())
    )  # fmt: skip
    await asyncio.sleep(0.02)
    work.cancel()
    episode = await work
    assert ending(episode) is StopReason.aborted and len(episode.turns) == (1 if during == "generate" else 2)
    assert not work.cancelled()


def test_turns_that_end_on_text_are_cut_there() -> None:
    policy = Script([[CALL, 9, 55, STOP], [ANSWER, 7, 9]])
    episode = play(policy, speech=Texty(), sampling=Sampling(max_tokens=4))
    assert ending(episode) is StopReason.answered
    assert episode.turns[1].token_ids.tolist() == [CALL, 9] and episode.turns[1].version_spans[-1].end == 2
    assert policy.asked[1][0][:5] == (90, 91, 92, CALL, 9), "dropped tokens are not part of the context"
    # the closing text may be the very last token that was allowed
    last = play(Script([[ANSWER, 7, 9]]), speech=Texty(), sampling=Sampling(max_tokens=3))
    assert ending(last) is StopReason.answered
    assert policy.extra == [{}, {}]
    policy = Script([[ANSWER, 9]])
    policy.takes_stop_strings = True  # type: ignore[attr-defined]
    play(policy, speech=Texty())
    assert policy.extra == [{"stop_strings": ("</x>",)}]


def test_each_turn_has_its_own_seed() -> None:
    policy = Script([[CALL, STOP], [ANSWER, STOP]])
    play(policy, sampling=Sampling(seed=10, max_tokens=7))
    assert [s.seed for _, s, _ in policy.asked] == [10, 11] and policy.asked[0][1].max_tokens == 7


def test_keep_cuts_spans() -> None:
    whole = Generation((1, 2, 3), (-1.0, -2.0, -3.0), (Span(0, 2, Version(0, 1)), Span(2, 3, Version(0, 2))), "length")
    assert keep(whole, 3) is whole
    cut = keep(whole, 1)
    assert (cut.token_ids, cut.logprobs, cut.version_spans) == ((1,), (-1.0,), (Span(0, 1, Version(0, 1)),))
    assert cut.finish_reason == "stop"


turns = st.lists(st.lists(st.integers(0, 12), max_size=8).map(lambda t: [*t, STOP]), min_size=12, max_size=12)


@given(
    turns, st.sampled_from([Words, Texty]), st.integers(1, 60), st.integers(1, 10), st.integers(1, 12),
    st.sampled_from(["stop", "retry"]),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_the_turns_are_exactly_what_the_policy_saw_and_said(
    said: list[list[int]], speech: Callable[[], Any], max_context: int, max_turns: int, max_tokens: int, malformed: str
) -> None:
    policy = Script(said)
    episode = play(
        policy, speech=speech(), sampling=Sampling(max_tokens=max_tokens), max_context=max_context, max_turns=max_turns,
        malformed=malformed,
    )  # fmt: skip
    trajectory = next(episode.trajectories())
    spoken = [i for i, t in enumerate(episode.turns) if t.role is Role.policy]
    assert len(spoken) == len(policy.asked) <= max_turns
    for index, (prompt, _, _), sampled in zip(spoken, policy.asked, policy.said, strict=True):
        before = [i for t in episode.turns[:index] for i in t.token_ids.tolist()]
        assert tuple(before) == prompt, "the policy is handed the turns so far, id for id"
        turn: Turn = episode.turns[index]
        assert tuple(turn.token_ids.tolist()) == sampled[: len(turn.token_ids)], "sampled ids are kept as they are"
        assert turn.mask.all()
    for turn in episode.turns:
        if turn.role is not Role.policy:
            assert not turn.mask.any() and not turn.logprobs.any()
    if policy.asked:
        assert len(trajectory.token_ids) <= max_context
    assert len(trajectory.token_ids) == sum(len(t.token_ids) for t in episode.turns)
