"""The journal: what an entry says, and which calls were charged."""

from __future__ import annotations

import json

from agents.types import Seen, SeenKind, ToolCall, ToolEvent
from envs.config import GuardConfig, SandboxConfig
from envs.guard import guard_of
from envs.journal import Entry, Journal, digest, result_hash, same
from envs.sandbox import Session
from tests.support.sandbox_play import backend, play, world

FACTS = {"cached": False, "fingerprint": "f", "attempts": 1}


def test_a_result_is_hashed_over_all_the_agent_could_learn() -> None:
    event = ToolEvent(ToolCall("open", {"doc_id": "a"}), "text", (Seen("a", "text", SeenKind.page, "T", "2020"),))
    others = [
        ToolEvent(event.call, "text."),
        ToolEvent(event.call, "text", event.seen, "budget"),
        ToolEvent(event.call, "text", (Seen("a", "text", SeenKind.page, "T", "2021"),)),
    ]
    assert len({result_hash(e) for e in (event, *others)}) == 4
    assert result_hash(event) == result_hash(ToolEvent(ToolCall("x"), "text", event.seen, latency_s=9))
    assert len(digest("\ud800")) == 32, "half a surrogate is a text too"


def test_entries_reach_the_sink_as_they_are_made() -> None:
    told: list[tuple[Entry, ToolEvent]] = []
    journal = Journal(lambda entry, event: told.append((entry, event)))
    first = ToolEvent(ToolCall("open", {"doc_id": "a"}), "text")
    journal.add(first, **FACTS)
    journal.add(ToolEvent(ToolCall("find", ["no", "mapping"]), "Error"), **FACTS)  # type: ignore[arg-type]
    assert [entry.index for entry, _ in told] == [0, 1] and told[0][1] is first
    assert journal.entries[1].arguments == {"": ["no", "mapping"]}
    assert json.loads(json.dumps(journal.rows()))[0]["arguments"] == {"doc_id": "a"}


def test_a_journal_that_keeps_nothing_counts_and_tells_its_sink() -> None:
    told: list[int] = []
    for journal in (Journal(keep=False), Journal(lambda entry, event: told.append(entry.index), keep=False)):
        for _ in range(3):
            journal.add(ToolEvent(ToolCall("open"), "text"), **FACTS)
        assert journal.count == 3 and journal.entries == []
    assert told == [0, 1, 2]


def test_masks_and_faults_tell_journals_apart_but_time_does_not() -> None:
    def journal(**facts: object) -> Journal:
        made = Journal()
        made.add(ToolEvent(ToolCall("open"), "text", latency_s=float(str(facts.pop("s", 0)))), **{**FACTS, **facts})
        return made

    assert same(journal(), journal(s=5, attempts=3))
    assert not same(journal(), journal(faults=("stale",))) and not same(journal(), journal(charged=True))


def test_charged_and_free_calls_are_counted() -> None:
    doc = world().documents[0].id
    session = Session(backend(), SandboxConfig(max_opens=2, max_finds=5, max_observation_tokens=10_000))
    calls = [
        ("open", {"doc_id": doc}),
        ("open", {"doc_id": doc}),
        ("open", {"doc_id": doc}),
        ("find", {}),
        ("nothing", {}),
    ]
    events = play(session, calls)
    assert [e.charged for e in session.journal.entries] == [True, True, False, False, False]
    assert [e.cached for e in session.journal.entries] == [False, True, False, False, False]
    used = session.usage()
    assert (used["open"], used["cached"], used["uncharged"], used["calls"]) == (2, 1, 3, 5)
    tokens = 10_000 - used["tokens"]
    assert events[2].text == (
        "Error: all 2 opens are used up; answer with what you have or use another tool. "
        f"Left: opens 0, finds 5, calls 97, tokens {tokens}."
    )


def test_the_audit_sums_over_calls() -> None:
    task = next(t for t in world().tasks if t.answers)
    config = SandboxConfig(guard=GuardConfig(answer="drop"))
    session = Session(backend(), config, guard=guard_of(config, task))
    play(session, [("open", {"doc_id": task.answers[0]}), ("open", {"doc_id": task.answers[0]})])
    assert session.journal.masked() == {("answer_drop", task.answers[0]): 2}
