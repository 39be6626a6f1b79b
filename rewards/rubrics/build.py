"""Rubrics for questions: written by a judge endpoint, checked, sent back with their faults, and kept in a journal; or written by hand and
checked alone.

The writer sees the question and its own faulty drafts; gold answers and entities are used to check, never to write.

Invariants: the journal is appended to, one line per question, and a line that a killed process left torn is no harm; a question whose
line fits (same question, answers, entities, given rubrics, options, prompts, model) is not asked about again, unless nobody could be
reached then; rubrics given by hand are never altered. Plain asyncio.

Source: CaRR, section "rubric initialisation" (spec 2.4). The published prompt, writer and filters are not in its repository: prompts, checks
and repair are ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agents.interfaces import Judge
from agents.types import JudgeRequest, Status, Task
from rewards.judges.templates import load_prompt
from rewards.outcome import gold_entities
from rewards.rubrics.validate import ESTIMATES, Problem, validate

WRITE, MEND = "rubrics_write", "rubrics_mend"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "rubrics": {
            "type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 600}, "minItems": 1, "maxItems": 40,
        }
    },
    "required": ["rubrics"],
    "additionalProperties": False,
}  # fmt: skip
ACCEPTED = ("given", "made", "mended")


@dataclass(frozen=True)
class Options:
    """How rubrics are made."""

    rounds: int = 2
    """How often a faulty draft is sent back, at most."""
    lenient: bool = False
    """Accept drafts whose only faults are estimates (`validate.ESTIMATES`) once the rounds are used up."""
    at_once: int = 16
    """Questions under way at a time."""
    writer: str = ""
    """Who writes (`rewards.judges.identity`); another makes everything anew."""


@dataclass(frozen=True)
class Item:
    """A question, and the rubrics somebody wrote for it by hand (none: they are to be made)."""

    task: Task
    given: tuple[str, ...] = ()

    def key(self, options: Options) -> str:
        """Hash of all that what is made depends on."""
        made = () if self.given else (options.rounds, options.writer, load_prompt(WRITE).label, load_prompt(MEND).label)
        known = [self.task.question, self.task.answers, gold_entities(self.task), self.given, options.lenient, made]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """What became of one question: a line of the journal."""

    id: str
    key: str
    status: str
    """`given`, `made` (the first draft was right), `mended`; `refused` (faults stayed, or no usable reply); `unavailable`."""
    rubrics: tuple[str, ...] = ()
    """The accepted ones, or the last draft."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with `rubrics`; of accepted ones estimates at most."""
    drafts: tuple[tuple[str, ...], ...] = ()
    """Kinds of fault of each draft, in order."""
    cause: str = ""
    """Why there is no draft."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    num_tokens: int = 0


async def make(item: Item, judge: Judge | None, options: Options) -> Entry:
    """The rubrics of one question: given ones checked, others written and mended. Without a judge nothing is written."""
    key, task = item.key(options), item.task
    if item.given or judge is None:
        found = _check(task, item.given)
        status = "given" if _passes(found, options) else "refused"
        return Entry(task.id, key, status, item.given, found, (_kinds(found),))
    rubrics: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    drafts: list[tuple[str, ...]] = []
    prompts: dict[str, str] = {}
    fit: tuple[tuple[str, ...], tuple[Problem, ...]] | None = None
    tokens, cause, came = 0, "", Status.ok
    while len(drafts) <= options.rounds:
        fields: dict[str, Any] = {"question": task.question}
        if drafts:
            fields |= {"rubrics": list(rubrics), "problems": [p.text for p in problems]}
        name = MEND if drafts else WRITE
        reply = await judge.ask(JudgeRequest(name, fields, SCHEMA))
        tokens += reply.num_tokens
        prompts |= {name: reply.prompt_hash} if reply.prompt_hash else {}
        came, cause = reply.status, reply.cause
        if came is not Status.ok:
            break
        rubrics = tuple(" ".join(text.split()) for text in reply.value["rubrics"])
        problems = _check(task, rubrics)
        drafts.append(_kinds(problems))
        fit = (rubrics, problems) if _passes(problems, options) else fit
        if not problems:
            break
    if fit:
        rubrics, problems = fit
    done = "made" if len(drafts) == 1 else "mended"
    failed = "unavailable" if came is Status.unavailable else "refused"
    return Entry(task.id, key, done if fit else failed, rubrics, problems, tuple(drafts), cause, prompts, tokens)


def _check(task: Task, rubrics: Sequence[str]) -> tuple[Problem, ...]:
    return tuple(validate(rubrics, task.question, task.answers, gold_entities(task)))


def _kinds(problems: Sequence[Problem]) -> tuple[str, ...]:
    return tuple(p.kind for p in problems)


def _passes(problems: Sequence[Problem], options: Options) -> bool:
    return not problems or (options.lenient and all(p.kind in ESTIMATES for p in problems))


async def build(
    items: Sequence[Item],
    judge: Judge | None,
    journal: Path | None,
    options: Options,
    tell: Callable[[int, Entry], None] | None = None,
) -> list[Entry]:
    """One entry per item, in order: from the journal where its line fits, else made now. `tell(done, entry)` after each made one."""
    lines = read_journal(journal) if journal else ()
    known = {(e.id, e.key): e for e in lines if e.status != "unavailable"}
    found: dict[str, Entry] = {i.task.id: e for i in items if (e := known.get((i.task.id, i.key(options))))}
    left = iter([i for i in items if i.task.id not in found])

    async def work() -> None:
        for item in left:
            entry = found[item.task.id] = await make(item, judge, options)
            if journal:
                _append(journal, entry)
            if tell:
                tell(len(found), entry)

    await asyncio.gather(*(work() for _ in range(options.at_once)))
    return [found[i.task.id] for i in items]


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries of a journal, oldest first; none when there is no journal. Torn or foreign lines are passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                problems = tuple(Problem(**p) for p in row.pop("problems"))
                drafts = tuple(tuple(kinds) for kinds in row.pop("drafts"))
                yield Entry(**{**row, "rubrics": tuple(row["rubrics"]), "problems": problems, "drafts": drafts})
            except (ValueError, TypeError, KeyError, AttributeError):
                continue


def _append(path: Path, entry: Entry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")  # the end of a torn line
        file.write(json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """What was made, as a report: counts by status, faults by kind before and after mending, sizes, tokens, who was refused and why."""
    good = [e for e in entries if e.status in ACCEPTED]
    bad = [e for e in entries if e.status not in ACCEPTED]
    first = Counter(kind for e in entries for kind in dict.fromkeys(e.drafts[0] if e.drafts else ()))
    left = Counter(p.kind for e in entries for p in {q.kind: q for q in e.problems}.values())
    sizes = [len(e.rubrics) for e in good]
    return {
        "questions": len(entries),
        **{status: sum(e.status == status for e in entries) for status in (*ACCEPTED, "refused", "unavailable")},
        "faulty_first_drafts": dict(first.most_common()),
        "faults_left": dict(left.most_common()),
        "drafts": sum(len(e.drafts) for e in entries),
        "rubrics_per_question": round(statistics.mean(sizes), 2) if sizes else None,
        "most_rubrics": max(sizes, default=0),
        "tokens": sum(e.num_tokens for e in entries),
        "prompts": {name: label for e in entries for name, label in e.prompts.items()},
        "left_out": {e.id: [p.text for p in e.problems] or [e.cause or e.status] for e in bad},
    }
