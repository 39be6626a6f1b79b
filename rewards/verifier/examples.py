"""Examples a verifier learns from: passages labelled by any teacher judge, then many batches of their nuggets in many orders.

Augmentation, as published (arXiv 2510.14660, data/augmentation.py): for every size, every split of it over the labels that a passage allows and
each of the six orders of labels, a sample of its nuggets; then large batches with mostly not_support lose some of it; a tenth is kept. The
published code shuffles before it drops duplicates, and leaves the cut nuggets' kin at the end; here sets are compared and then shuffled.

Invariants: same passages, same settings, same examples; a passage's examples hold every set of its nuggets at most once; a label stays
with its nugget; nothing of a passage that the teacher could not label is used, nor what it said of another text, nuggets or oracle.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agents.interfaces import Judge
from agents.types import JudgeReply, JudgeRequest, Status, Task
from rewards.judges.base import schema_problem
from rewards.nugget import CONTRADICTION, NOT, assign_request, read_labels
from rewards.nuggets.journal import Journal
from rewards.schemas import keyed_schema
from rewards.verifier.config import ExamplesConfig
from rewards.verifier.reply import LABELS, question_text, reply_text

MAX_PER_CALL = 10
WITH_REASONS = "nugget_assign_reasons"
"""The prompt that asks a teacher for `{"reason", "label"}` per key."""


class PassageError(ValueError):
    """A row is no passage; one line that names the field."""


@dataclass(frozen=True)
class Passage:
    """A text and the nuggets to look for in it. Without labels a teacher gives them."""

    id: str
    """Of this text."""
    question_id: str
    question: str
    text: str
    nuggets: tuple[str, ...]
    labels: tuple[str, ...] = ()
    oracle: Mapping[str, Any] | None = None
    """For the rule judge."""
    reasons: tuple[str, ...] = ()
    """Why, per nugget; empty when the teacher's words cannot be told apart by nugget."""

    @property
    def key(self) -> str:
        """A digest of all that a label depends on."""
        parts = [self.question, self.text, self.nuggets, self.oracle]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Example:
    """A call of the verifier with its gold labels."""

    id: str
    passage: Passage
    """With the nuggets, labels and reasons of this call only."""
    form: str
    augmented: bool = False

    def question(self, prompt: str) -> str:
        p = self.passage
        return question_text(p.question, p.text, p.nuggets, self.form, prompt)

    def reply(self) -> str:
        return reply_text(self.passage.labels, self.form, self.passage.reasons)

    def task(self, prompt: str) -> Task:
        """As an environment of one turn. Gold labels stand in the oracle; the question does not hold them."""
        p, text = self.passage, reply_text(self.passage.labels, self.form)
        meta = {"question_id": p.question_id, "passage_id": p.id, "num_nuggets": len(p.nuggets)}
        oracle = {"labels": list(p.labels), "form": self.form}
        return Task(self.id, self.question(prompt), (text,), oracle=oracle, source="verifier", meta=meta)


def parse_passage(row: Mapping[str, Any]) -> Passage:
    """A row `{"id", "question_id"?, "question", "text", "nuggets": [text or {"text", "label"}], "oracle"?}`, or a published one
    (`qid`, `query`, `block_text`, `nuggets_list` of `text` and `match`). Raises PassageError."""
    published = "block_text" in row
    names = ("qid", "query", "block_text", "nuggets_list") if published else ("id", "question", "text", "nuggets")
    id_, question, text, nuggets = (row.get(name) for name in names)
    for name, value in zip(names[1:3], (question, text), strict=True):
        if not isinstance(value, str) or not value.strip():
            raise PassageError(f"field {name!r} is missing or not a text")
    if not isinstance(nuggets, list) or not nuggets:
        raise PassageError(f"field {names[3]!r} is missing or not a list of nuggets")
    items = [{"text": n} if isinstance(n, str) else n for n in nuggets]
    if not all(isinstance(n, Mapping) and isinstance(n.get("text"), str) and n["text"].strip() for n in items):
        raise PassageError(f"field {names[3]!r} holds what is neither a text nor an object with 'text'")
    texts = tuple(str(n["text"]) for n in items)
    if len(set(texts)) != len(texts):
        raise PassageError(f"field {names[3]!r} holds a nugget twice")
    labels = tuple(n.get("match" if published else "label") for n in items)
    if any(labels) and not all(label in LABELS for label in labels):
        raise PassageError(f"field {names[3]!r}: each label has to be one of {', '.join(LABELS)}, or none be given")
    oracle = row.get("oracle")
    if oracle is not None and not isinstance(oracle, Mapping):
        raise PassageError("field 'oracle' is no object")
    if not isinstance(id_, str | int) or isinstance(id_, bool):
        raise PassageError(f"field {names[0]!r} is missing")
    name = f"{id_}-{hashlib.sha256(str(text).encode()).hexdigest()[:8]}" if published else str(id_)
    given = tuple(str(label) for label in labels) if any(labels) else ()
    return Passage(name, str(row.get("question_id") or id_), str(question), str(text), texts, given, oracle)


# ---------------------------------------------------------------------------------------------------- the teacher


async def label_all(
    passages: Sequence[Passage], judge: Judge, journal: Journal, concurrency: int = 16, prompt: str = "nugget_assign"
) -> tuple[list[Passage], dict[str, str]]:
    """(passages with labels, cause by id of those the teacher could not label). What the journal holds is not asked again.

    `prompt`: WITH_REASONS for a teacher that can say why.
    """
    failed: dict[str, str] = {}
    gate = asyncio.Semaphore(concurrency)

    async def one(passage: Passage) -> Passage | None:
        if passage.labels:
            return passage
        if passage.key not in journal.done:
            async with gate:
                found = await _label(passage, judge, prompt)
            if isinstance(found, str):
                failed[passage.id] = found
                return None
            journal.finish(passage.key, found)
        done = journal.done[passage.key]
        return replace(passage, labels=tuple(done["labels"]), reasons=tuple(done["reasons"]))

    labelled = await asyncio.gather(*(one(p) for p in passages))
    return [p for p in labelled if p is not None], failed


async def _label(passage: Passage, judge: Judge, prompt: str) -> dict[str, list[str]] | str:
    """Labels and reasons, or why there are none."""
    labels: list[str] = []
    reasons: list[str] = []
    task = Task(passage.id, passage.question, oracle=passage.oracle)
    for start in range(0, len(passage.nuggets), MAX_PER_CALL):
        request = assign_request(task, passage.text, passage.nuggets[start : start + MAX_PER_CALL], prompt=prompt)
        if prompt == WITH_REASONS:
            request = _asks_why(request)
        reply = await judge.ask(request)
        found = _said(reply, request)
        if found is None:
            return reply.cause or ("bad_reply" if reply.status is Status.ok else str(reply.status))
        labels += [NOT if label == CONTRADICTION else label for label in found[0]]
        reasons += found[1]
    return {"labels": labels, "reasons": reasons if len(reasons) == len(labels) else []}


def _asks_why(request: JudgeRequest) -> JudgeRequest:
    """The request with a reason before each label."""
    keys = request.schema["required"]
    both = {"reason": {"type": "string"}, "label": request.schema["properties"][keys[0]]}
    entry = {"type": "object", "properties": both, "required": list(both), "additionalProperties": False}
    return replace(request, schema=keyed_schema(keys, entry))


def _said(reply: JudgeReply, request: JudgeRequest) -> tuple[list[str], list[str]] | None:
    """(labels, reasons or none) in the order of the request's nuggets, or None for a reply that failed or does not fit."""
    if request.prompt != WITH_REASONS:
        labels = read_labels(reply, request)
        return None if labels is None else (labels, reasons_by_key(reply.text, len(labels)))
    if reply.status is not Status.ok or schema_problem(reply.value, request.schema):
        return None
    rows = [reply.value[key] for key in request.schema["required"]]
    return [row["label"] for row in rows], _alone([row["reason"] for row in rows])


def reasons_by_key(text: str, count: int) -> list[str]:
    """What a teacher said of N1, N2, ..., in their order, as `N1: ...; N2: ...` or on lines; keys may be bold or follow a bullet.

    Empty unless it spoke of each once.
    """
    pieces = re.split(r"(?:^|(?<=[\s;]))(?:[-*\u2022]\s+)?\**N(\d{1,2})(?:\*+:|:\**)\s*", text.strip())
    keys, said = pieces[1::2], [piece.strip(" ;\n") for piece in pieces[2::2]]
    return _alone(said) if not pieces[0].strip() and keys == [str(i) for i in range(1, count + 1)] else []


def _alone(reasons: Sequence[str]) -> list[str]:
    """Reasons, each on one line, if all can stand alone under another key: none is empty, names a key or holds a tag of ours; else none."""
    told = [" ".join(reason.split()) for reason in reasons]
    return told if all(told) and not any(re.search(r"\bN\d|</?reasoning>", reason) for reason in told) else []


# --------------------------------------------------------------------------------------------------- augmentation


def make_examples(passages: Sequence[Passage], config: ExamplesConfig) -> list[Example]:
    """The passages as they were labelled, in calls of `per_call`, and the share of their augmentation that is kept, shuffled."""
    config.check()
    own, more = [], []
    for passage in passages:
        rng = random.Random(f"{config.seed} {passage.id}")
        calls = own_calls(len(passage.nuggets), config.per_call)
        own += [_example(passage, c, f"{passage.id}/{n}", rng, config) for n, c in enumerate(calls)]
        if config.keep:
            for number, chosen in enumerate(augment(passage.labels, config, rng)):
                made = _example(passage, chosen, f"{passage.id}/a{number}", rng, config)
                more.append(replace(made, augmented=True))
    rng = random.Random(f"{config.seed} keep")
    found = own + rng.sample(more, int(len(more) * config.keep))
    rng.shuffle(found)
    return found


def own_calls(num_nuggets: int, size: int) -> list[range]:
    """A passage's nuggets as they come, in calls of at most `size`."""
    return [range(i, min(i + size, num_nuggets)) for i in range(0, num_nuggets, size)]


def augment(labels: Sequence[str], config: ExamplesConfig, rng: random.Random) -> list[list[int]]:
    """Batches of nuggets, as indices into `labels`: shuffled, large ones thinned, each set once, none that of an own call."""
    by_label = [[i for i, label in enumerate(labels) if label == wanted] for wanted in LABELS]
    sets: set[tuple[int, ...]] = set()
    for size in range(1, min(config.per_call, len(labels)) + 1):
        for split in _splits(size, [len(group) for group in by_label]):
            # The six orders of labels are six draws: the order itself is lost in the shuffle.
            for _ in itertools.permutations(LABELS):
                drawn = itertools.chain(*(rng.sample(g, n) for g, n in zip(by_label, split, strict=True)))
                sets.add(tuple(sorted(drawn)))
    batches = []
    for chosen in sorted(sets):
        kept = thin(chosen, labels, config, rng)
        batches.append(rng.sample(kept, len(kept)))
    own = {tuple(call) for call in own_calls(len(labels), config.per_call)}
    once = {tuple(sorted(batch)): batch for batch in batches}
    return [batch for key, batch in once.items() if key not in own]


def thin(chosen: Sequence[int], labels: Sequence[str], config: ExamplesConfig, rng: random.Random) -> list[int]:
    """A batch of mostly not_support without some of it: more than 5 nuggets, over half of them, a fifth of those rounded down."""
    absent = [i for i in chosen if labels[i] == NOT]
    if len(chosen) <= config.thin_above or len(absent) <= config.thin_share * len(chosen):
        return list(chosen)
    # 0.2 * 5 is 1, whatever binary fractions make of it.
    cut = set(rng.sample(absent, int(len(absent) * config.thin_cut + 1e-9)))
    return [i for i in chosen if i not in cut]


def _splits(size: int, room: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for split in itertools.product(*(range(min(size, most) + 1) for most in room)):
        if sum(split) == size:
            yield split


def _example(passage: Passage, chosen: Sequence[int], id_: str, rng: random.Random, config: ExamplesConfig) -> Example:
    reasons = tuple(passage.reasons[i] for i in chosen) if passage.reasons and config.reasons else ()
    part = replace(
        passage,
        nuggets=tuple(passage.nuggets[i] for i in chosen),
        labels=tuple(passage.labels[i] for i in chosen),
        reasons=reasons,
    )
    return Example(id_, part, rng.choice(config.forms))


def counts(examples: Sequence[Example]) -> dict[str, Any]:
    """What there is, for a report; `with_reasons` is a share."""
    labels = Counter(label for e in examples for label in e.passage.labels)
    return {
        "examples": len(examples),
        "augmented": sum(e.augmented for e in examples),
        "with_reasons": sum(bool(e.passage.reasons) for e in examples) / max(1, len(examples)),
        "labels": dict(labels),
        "sizes": dict(sorted(Counter(len(e.passage.labels) for e in examples).items())),
        "forms": dict(Counter(e.form for e in examples)),
    }
