"""CaRR: citation-aware rubric reward. R_r = rubrics that are named, supported and linked to the answer / all rubrics.

Three steps (paper section 3, spec 3.1-3.3): *identify* which hidden entities the final message names; *support*: which of the
rubrics, filled with those names, do the cited pages that the rollout saw support; *connect*: which of these hang together
with `<E0>`. A rollout's own entities are used, never the gold ones.

Invariants:
- R_r is in [0, 1], never falls when more rubrics are supported, does not depend on how entities are called, and is 0 when `<E0>` is
  not named (with identification and connectivity on, as in the paper).
- A judge that cannot be reached masks the rollout; a reply that cannot be used scores R_r = 0, whatever other calls said.
- Evidence beyond `evidence_tokens` is judged in chunks, and every chunk is read: a rubric is supported when some chunk supports it, or
  when the parts of all chunks that bear on it do so together.
- `parts` holds outcome and rubric; C-GRPO's reward is computed from them over the group (`agents.advantages`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agents.interfaces import Judge, Reward, Services
from agents.text import connected, cut_references, fill, placeholders
from agents.types import Group, JudgeReply, JudgeRequest, Status, Task, Trajectory, Verdict
from rewards.config import RewardConfig
from rewards.evidence import Evidence, Page, bearing, chunks, gather, num_tokens, size_of
from rewards.outcome import Part, credit_entities, judge_outcome, to_verdict, void_verdict
from rewards.schemas import keyed_schema

PARTS = (
    "outcome",
    "rubric",
    "f1",
    "identified",
    "supported",
    "connected",
    "num_rubrics",
    "cited_pages",
    "rubric_judged",
)
"""Parts of a verdict: two scores, and counts for the log. `rubric_judged` is 0 where lazy judging skipped the rubrics."""

SUPPORT_ROUNDS = 4
"""Support is judged over all chunks at once, then over the parts of several chunks; each time what was too large is asked about in halves."""

NOBODY = frozenset({"", "null", "none", "unknown", "n/a"})
"""Identities that name nobody (spec 3.1), case and a full stop aside. A judge should say null; these never count as names."""
MAX_NAME = 500
"""Characters of an identity. What is longer is no name."""


def carr(config: RewardConfig) -> Reward:
    """The reward `carr`. Verdict.reward is the outcome, or the mix (see RewardConfig.reward)."""

    async def score(group: Group, services: Services) -> list[Verdict]:
        judge = services.judge
        if judge is None:
            raise ValueError("reward 'carr' needs a judge: set judge.kind to 'rule' or 'chat'")
        members = group.trajectories
        voids = [void_verdict(t, PARTS) for t in members]
        live = [i for i, void in enumerate(voids) if void is None]
        tasks = (judge_outcome(group.task, members[i], judge, config.outcome) for i in live)
        outcomes = dict(zip(live, await asyncio.gather(*tasks), strict=True))
        if config.lazy and not any(part.value > 0 for part in outcomes.values()):
            rubrics = {i: Part(0.0, metrics={"rubric_judged": 0.0}) for i in live}
        else:
            judged = [i for i in live if outcomes[i].status is not Status.unavailable]
            parts = await asyncio.gather(*(judge_rubrics(group.task, members[i], judge, config) for i in judged))
            rubrics = dict(zip(judged, parts, strict=True))
        verdicts = [
            void if void is not None else _verdict(outcomes[i], rubrics.get(i), config) for i, void in enumerate(voids)
        ]
        return credit_entities(group, verdicts, config)

    return score


def _verdict(outcome: Part, rubric: Part | None, config: RewardConfig) -> Verdict:
    if rubric is None:  # the outcome is unavailable, so the rollout is masked whatever its rubrics say
        return to_verdict(0.0, {"outcome": outcome}, {})
    ratio = config.rubric_ratio
    mixed = (1 - ratio) * outcome.value + ratio * rubric.value
    reward = mixed if config.reward == "mix" else outcome.value
    return to_verdict(reward, {"outcome": outcome, "rubric": rubric}, {**outcome.metrics, **rubric.metrics})


async def judge_rubrics(task: Task, trajectory: Trajectory, judge: Judge, config: RewardConfig) -> Part:
    """R_r of one finished rollout, with evidence: one entry per `rubric`, then the checks `citations`, `identify`, `support`."""
    message = cut_references(trajectory.message)
    evidence = gather(message, trajectory.events, config.max_cited_pages, config.citations == "strict")
    state = _State(task, evidence, config)
    if not task.rubrics:
        state.note("rubrics", "the task has no rubrics")
        return state.part()
    if state.labels and config.identification:
        reply = await judge.ask(identify_request(task, message))
        if not state.take_identities(reply):
            return state.part()
    state.identify()
    if not any(page.text for page in evidence.pages):
        state.note("support", "the message cites no page that the rollout saw")
    elif state.identified:
        await _judge_support(state, judge, config.evidence_tokens)
    return state.part()


async def _judge_support(state: _State, judge: Judge, budget: int) -> None:
    """Step 2 over all chunks of the evidence; then, for each statement that none supports, over the parts that bear on it."""
    statements, pages = state.statements(), state.evidence.pages
    room = max(budget - num_tokens("".join(statements.values())), budget // 2)
    dealt = chunks(pages, room)
    read = await _ask_support(state, judge, [(list(statements), chunk) for chunk in dealt])
    if state.status is not Status.ok or len(read) == 1:
        return
    left = [i for i in statements if i not in state.supported]
    spread = ((i, bearing(statements[i], pages, room if len(read) == len(dealt) else room // 2)) for i in left)
    asked = [([i], on) for i, on in spread if on and not any(_within(on, chunk) for chunk in read)]
    await _ask_support(state, judge, asked)


async def _ask_support(
    state: _State, judge: Judge, asked: Sequence[tuple[list[int], Sequence[Page]]], halve: bool = True
) -> list[Sequence[Page]]:
    """Asks which of the statements the pages beside them support. Pages that a call cannot hold are asked about in halves, once.

    Returns the pages of each call that was answered for.
    """
    statements = state.statements()
    state.num_calls += len(asked)
    requests = [support_request(state.task, {i: statements[i] for i in which}, state.values, on) for which, on in asked]
    replies = await asyncio.gather(*(judge.ask(request) for request in requests))
    told, read, halves = [], [], []
    for (which, on), reply in zip(asked, replies, strict=True):
        if halve and _too_large(reply):
            halves += [(which, half) for half in chunks(on, -(-size_of(on) // 2))]
        else:
            told.append((which, reply))
            read.append(on)
    state.take_support(told)
    if halves and state.status is Status.ok:
        read += await _ask_support(state, judge, halves, halve=False)
    return read


def _too_large(reply: JudgeReply) -> bool:
    """Whether the endpoint refused a request for its length. 400 is also what it says of other faults."""
    spoken = reply.cause == "judge_http_400" and re.search(r"context|too long", reply.text, re.IGNORECASE)
    return reply.cause == "judge_http_413" or bool(spoken)


def _within(parts: Sequence[Page], chunk: Sequence[Page]) -> bool:
    return all(any(p.number == whole.number and p.text in whole.text for whole in chunk) for p in parts)


class _State:
    """What is known about one rollout's rubrics so far."""

    def __init__(self, task: Task, evidence: Evidence, config: RewardConfig) -> None:
        self.task, self.evidence, self.config = task, evidence, config
        self.entities = [placeholders(rubric) for rubric in task.rubrics]
        self.labels = label_list(task.rubrics)
        self.values: dict[str, str | None] = dict.fromkeys(self.labels)
        self.identified: list[int] = []
        self.supported: set[int] = set()
        self.num_calls = 0
        self.status, self.cause = Status.ok, ""
        self.notes: list[dict[str, Any]] = []
        self.prompts: dict[str, str] = {}

    def note(self, step: str, text: str) -> None:
        if text:
            self.notes.append({"check": step, "text": text})

    def _accept(self, step: str, reply: JudgeReply, value: Any) -> bool:
        """Books a reply; `value` is None when its content fails the step's validation."""
        if reply.prompt_hash:
            self.prompts[f"carr_{step}"] = reply.prompt_hash
        self.status, self.cause = reply.status, reply.cause
        if reply.status is Status.ok and value is None:
            self.status, self.cause = Status.unjudgeable, "bad_reply"
        self.note(step, reply.text or self.cause)
        return self.status is Status.ok

    def take_identities(self, reply: JudgeReply) -> bool:
        value = read_identities(reply.value, self.labels) if reply.status is Status.ok else None
        if self._accept("identify", reply, value) and value is not None:
            self.values = value
            return True
        return False

    def identify(self) -> None:
        named = {label for label, value in self.values.items() if value is not None}
        everyone = not self.config.identification
        self.identified = [i for i, found in enumerate(self.entities) if everyone or named.issuperset(found)]

    def statements(self) -> dict[int, str]:
        """Rubric index -> filled statement, of the identified rubrics."""
        return {i: fill(self.task.rubrics[i], self.values) for i in self.identified}

    def take_support(self, replies: Sequence[tuple[list[int], JudgeReply]]) -> None:
        """Adds what some reply supports. One reply that cannot be used spoils all; else one that nobody gave masks."""
        failed: dict[Status, str] = {}
        for which, reply in replies:
            value = read_support(reply.value, len(which)) if reply.status is Status.ok else None
            if self._accept("support", reply, value) and value is not None:
                self.supported.update(i for i, holds in zip(which, value, strict=True) if holds)
            else:
                failed.setdefault(self.status, self.cause)
        worst = next((s for s in (Status.unjudgeable, Status.unavailable) if s in failed), Status.ok)
        self.status, self.cause = worst, failed.get(worst, "")

    def part(self) -> Part:
        counted = self.supported
        if self.config.connectivity:
            counted = connected(self.entities, self.supported)
        rows = [self._row(i, i in counted) for i in range(len(self.task.rubrics))]
        return Part(
            rubric_reward(self.entities, self.supported, self.config.connectivity) if self.status is Status.ok else 0.0,
            self.status,
            self.cause,
            (*rows, self._citations(), *self.notes),
            self.prompts,
            {
                "identified": float(len(self.identified)),
                "supported": float(len(self.supported)),
                "connected": float(len(connected(self.entities, self.supported))),
                "num_rubrics": float(len(rows)),
                "cited_pages": float(len(self.evidence.pages)),
                "rubric_judged": 1.0,
            },
        )

    def _row(self, index: int, counted: bool) -> dict[str, Any]:
        names = {label: self.values.get(label) for label in self.entities[index]}
        supported = index in self.supported
        mentioned = [p.doc_id for p in self.evidence.pages if _mentions(p, list(names.values()))] if supported else []
        return {
            "index": index,
            "rubric": self.task.rubrics[index],
            "filled": fill(self.task.rubrics[index], self.values),
            "entities": names,
            "identified": index in self.identified,
            "supported": supported,
            "connected": index in connected(self.entities, self.supported),
            "counted": counted,
            "pages": mentioned,
        }

    def _citations(self) -> dict[str, Any]:
        return {
            "check": "citations",
            "pages": [{"number": p.number, "doc_id": p.doc_id, "title": p.title} for p in self.evidence.pages],
            "unseen": list(self.evidence.unseen),
            "over_cap": list(self.evidence.over_cap),
            "support_calls": self.num_calls,
        }


# ---------------------------------------------------------------------------------------------------- the core


def rubric_reward(entities: Sequence[Sequence[str]], supported: set[int], connectivity: bool = True) -> float:
    """R_r: |connected to E0| / |all rubrics|, or |supported| / |all| without connectivity. 0 when there are none."""
    if not entities:
        return 0.0
    return len(connected(entities, supported) if connectivity else supported) / len(entities)


def label_list(rubrics: Sequence[str]) -> list[str]:
    """Every placeholder label of the rubrics, in order of their number."""
    return sorted({label for rubric in rubrics for label in placeholders(rubric)}, key=lambda label: int(label[1:]))


def read_identities(value: Any, labels: Sequence[str]) -> dict[str, str | None] | None:
    """A judge's identities, or None when the reply is unusable: keys other than the labels, values not string or null.

    Strings that name nobody (empty, `unknown`, `N/A`, `null`, `none`, a placeholder, a whole paragraph) count as null.
    """
    if not isinstance(value, Mapping) or set(value) != set(labels):
        return None
    if not all(found is None or isinstance(found, str) for found in value.values()):
        return None
    return {label: _name(value[label]) for label in labels}


def _name(found: str | None) -> str | None:
    name = " ".join((found or "").split())
    nobody = len(name) > MAX_NAME or placeholders(name) or name.strip(" .").lower() in NOBODY
    return None if nobody else name


def read_support(value: Any, num_statements: int) -> list[bool] | None:
    """A judge's verdicts on S1..Sm in order, or None when keys or types do not fit."""
    keys = [f"S{i}" for i in range(1, num_statements + 1)]
    if not isinstance(value, Mapping) or set(value) != set(keys):
        return None
    return [value[k] for k in keys] if all(isinstance(value[k], bool) for k in keys) else None


def _mentions(page: Page, names: Sequence[str | None]) -> bool:
    text = page.text.lower()
    return all(name is not None and name.lower() in text for name in names)


# ---------------------------------------------------------------------------------------------------- requests


def identify_request(task: Task, message: str) -> JudgeRequest:
    """Step 1: which labels does the message name? Reply: label -> string or null."""
    labels = label_list(task.rubrics)
    fields = {"question": task.question, "rubrics": list(task.rubrics), "labels": labels, "message": message}
    return JudgeRequest("carr_identify", fields, keyed_schema(labels, {"type": ["string", "null"]}), task.oracle)


def support_request(
    task: Task, statements: Mapping[int, str], values: Mapping[str, str | None], pages: Sequence[Page]
) -> JudgeRequest:
    """Step 2: which statements do the pages support? Reply: S1..Sm -> boolean, numbered in the order of `statements`.

    Pages whose text was given under an earlier page are left out. `rubric_indices` and `values` are for rule judges.
    """
    keys = [f"S{i}" for i in range(1, len(statements) + 1)]
    shown = [asdict(p) | {"url": p.doc_id} for p in pages if p.text]
    fields = {
        "statements": dict(zip(keys, statements.values(), strict=True)),
        "rubric_indices": dict(zip(keys, statements, strict=True)),
        "values": dict(values),
        "pages": [{k: p[k] for k in ("number", "url", "title", "date", "text")} for p in shown],
    }
    return JudgeRequest("carr_support", fields, keyed_schema(keys, {"type": "boolean"}), task.oracle)
