"""Nuggets for a question, from a corpus: search, read, collect, merge, rate; then search again until nothing new comes.

    queries = {q}
    repeat:  passages = search(queries); relevant = those a judge finds so
             nuggets  = merge(nuggets, extract(q, relevant)): each supported by a passage, none twice, none against another
             queries  = rewrite(q, nuggets)
    until    two rounds add nothing, or no query, round, call or room is left
    importance = vital or okay, vital ones first

Source: the pipeline of nugget-as-rubric (arXiv 2510.14660), whose prompts, stop rule and code are not published; the loop is reconstructed
(inferred), windows, caps and labels follow TREC RAG's nuggetizer.

Invariants: a nugget names the documents it was taken from; what a judge adds to a list is merged here, so no reply can drop or rewrite
what others found; same replies, same result, however the calls overlap; a judge that cannot be reached ends the question, unfinished.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from agents.interfaces import Services
from agents.plain import to_plain
from agents.text import num_words, words
from agents.types import JudgeRequest, Nugget, Query, Status, Task
from rewards.judges.base import schema_problem
from rewards.judges.traffic import question
from rewards.nugget import SUPPORT, assign_request
from rewards.nuggets.config import BuildConfig
from rewards.nuggets.journal import Journal, Said
from rewards.schemas import keyed_schema

T = TypeVar("T")
PROMPTS = ("nugget_relevant", "nugget_extract", "nugget_assign", "nugget_pairs", "nugget_queries", "nugget_importance")
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z\"'(])")
_ABBREVIATED = re.compile(r"(?:\b[A-Z]|\b(?:Dr|Mr|Mrs|Ms|St|No|vs|etc|Jr|Sr|Inc|Co|Ltd|Prof|approx))\.$")


class Unfinished(RuntimeError):
    """A question could not be carried to its end; the message says why. What was asked so far stands in the journal."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document."""

    doc_id: str
    title: str
    text: str


@dataclass
class Draft:
    """A nugget under construction."""

    text: str
    docs: list[str]
    hint: int = -1
    """Index of the nugget that the judge believes it repeats, or -1."""


@dataclass
class Work:
    """What a question took, for the report."""

    stop: str = ""
    """`converged`, `no_queries`, `full`, `rounds` or `budget`."""
    rounds: int = 0
    queries: list[str] = field(default_factory=list)
    passages: int = 0
    relevant: int = 0
    cut: int = 0
    """Passages longer than `passage_chars`."""
    extracted: int = 0
    merged: int = 0
    """Facts found again: documents were added to a nugget."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By kind: no_source, too_long, not_atomic, restates, unsupported, unverified (a call that might have supported it had no room in
    the budget, or no usable reply), conflict, full, off_topic, beyond_keep."""
    conflicts: list[list[str]] = field(default_factory=list)
    """Pairs that contradict each other: what was kept, what was dropped."""
    calls: int = 0
    tokens: int = 0
    refused: int = 0
    """Calls to which the judge gave no usable reply."""


async def build_nuggets(
    task: Task, services: Services, config: BuildConfig, journal: Journal
) -> tuple[tuple[Nugget, ...], Work]:
    """The nuggets of one question, vital ones first, and what they took. Raises Unfinished, and what the backend raises."""
    return await _Build(task, services, config, journal).run()


class _Build:
    def __init__(self, task: Task, services: Services, config: BuildConfig, journal: Journal) -> None:
        if services.judge is None or services.retrieval is None:
            raise ValueError("building nuggets needs a judge and a retrieval backend")
        self.task, self.config, self.journal = task, config, journal
        self.judge, self.backend = services.judge, services.retrieval
        self.nuggets: list[Draft] = []
        self.work = Work()
        self.spent, self.lost = False, ""
        self._read: dict[tuple[str, Any], int] = {}
        """Passages -> how many nuggets were known when they were found irrelevant; -1: they were relevant."""

    async def run(self) -> tuple[tuple[Nugget, ...], Work]:
        work, idle, queries = self.work, 0, [self.task.question]
        while not work.stop:
            work.rounds += 1
            work.queries += queries
            before = len(self.nuggets)
            for window in _windows(await self._relevant(await self._search(queries)), self.config.window):
                await self._collect(window)
            idle = 0 if len(self.nuggets) > before else idle + 1
            work.stop = self._stop(idle)
            if not work.stop:
                queries = await self._rewrite()
                work.stop = "" if queries else "budget" if self.spent else "no_queries"
        return await self._rate(), work

    def _stop(self, idle: int) -> str:
        reasons = {
            "budget": self.spent,
            "full": len(self.nuggets) >= self.config.max_nuggets,
            "converged": idle >= self.config.patience,
            "rounds": self.work.rounds >= self.config.max_rounds,
        }
        return next((name for name, holds in reasons.items() if holds), "")

    # ----------------------------------------------------------------------------------------------------- steps

    async def _search(self, queries: Sequence[str]) -> list[tuple[Any, Passage]]:
        """Passages that were not read before, or were found irrelevant when less was known."""
        found = await self.backend.search([Query(q, self.config.k) for q in queries])
        known = len(self.nuggets)
        hits = {(hit.doc_id, hit.span): hit for hits in found for hit in hits}
        fresh = [key for key in hits if key not in self._read or 0 <= self._read[key] < known]
        documents = await self.backend.get([doc_id for doc_id, _ in fresh]) if fresh else []
        passages = []
        for key, document in zip(fresh, documents, strict=True):
            if document is not None:
                text = document.text[slice(*key[1])] if key[1] else document.text
                self.work.passages += key not in self._read
                self.work.cut += key not in self._read and len(text) > self.config.passage_chars
                passages.append((key, Passage(document.id, document.title, text[: self.config.passage_chars])))
        return passages

    async def _relevant(self, found: Sequence[tuple[Any, Passage]]) -> list[Passage]:
        passages = [passage for _, passage in found]
        taken = await self._each("nugget_relevant", "P", passages, self._reading, {"type": "boolean"})
        self._read |= {key: -1 if yes else len(self.nuggets) for (key, _), yes in zip(found, taken, strict=True)}
        relevant = [passage for passage, yes in zip(passages, taken, strict=True) if yes]
        self.work.relevant += len(relevant)
        return relevant

    async def _collect(self, window: Sequence[Passage]) -> None:
        """Extracts from up to ten passages, and merges what holds into the list."""
        if self.config.verify:  # each passage that facts come from is shown to the judge once more
            room = max(0, self.config.max_calls - self.work.calls - 1)
            self.spent |= len(window) > room
            window = window[:room]
        if not window:
            return
        passages, known = _keys("P", window), _keys("N", self.nuggets)
        item = {
            "text": {"type": "string"},
            "passages": {"type": "array", "items": {"type": "string", "enum": passages}},
            "same_as": {"type": ["string", "null"], "enum": [*known, None]},
        }
        one = {"type": "object", "properties": item, "required": list(item), "additionalProperties": False}
        schema = keyed_schema(["nuggets"], {"type": "array", "items": one})
        limits = {"most facts": self.config.max_nuggets, "most words of a fact": self.config.max_words}
        (reply,) = await self._ask(
            [JudgeRequest("nugget_extract", {**self._reading(window), "limits": limits}, schema)]
        )
        drafts, sources = [], []
        for row in reply["nuggets"] if reply else ():
            self.work.extracted += 1
            text = " ".join(row["text"].split())
            problem = "" if row["passages"] else "no_source"
            problem = problem or text_problem(text, self.task.question, self.config.max_words)
            if problem:
                self.work.rejected[problem] += 1
                continue
            from_ = [window[passages.index(key)] for key in dict.fromkeys(row["passages"])]
            hint = known.index(row["same_as"]) if row["same_as"] else -1
            drafts.append(Draft(text, [p.doc_id for p in from_], hint))
            sources.append(from_)
        if self.config.verify:
            drafts = await self._verified(drafts, sources)
        self._merge(drafts, await self._compared(drafts))

    async def _verified(self, drafts: Sequence[Draft], sources: Sequence[Sequence[Passage]]) -> list[Draft]:
        """The drafts that a passage of theirs supports, with the documents of those that do."""
        by_passage: dict[Passage, list[int]] = {}
        for index, found in enumerate(sources):
            for passage in found:
                by_passage.setdefault(passage, []).append(index)
        calls = [(p, chunk) for p, of in by_passage.items() for chunk in _windows(of, 10)]
        requests = [assign_request(self.task, p.text, [drafts[i].text for i in chunk]) for p, chunk in calls]
        supported: dict[int, list[str]] = {}
        unread: set[int] = set()
        for (passage, chunk), reply in zip(calls, await self._ask(requests), strict=True):
            for key, index in zip(_keys("N", chunk), chunk, strict=True):
                if reply is None:
                    unread.add(index)
                elif reply[key] == SUPPORT:
                    supported.setdefault(index, []).append(passage.doc_id)
        for index in range(len(drafts)):
            if index not in supported:
                self.work.rejected["unverified" if index in unread else "unsupported"] += 1
        return [Draft(d.text, supported[i], d.hint) for i, d in enumerate(drafts) if i in supported]

    async def _compared(self, drafts: Sequence[Draft]) -> dict[tuple[int, int], str]:
        """(index of a draft, index of a nugget or, behind these, of an earlier draft) -> same, contradicts, or whatever else."""
        known, first = [*self.nuggets, *drafts], len(self.nuggets)
        found: dict[tuple[int, int], str] = {}
        pairs = []
        for new, other in itertools.product(range(first, len(known)), range(len(known))):
            if other < new:
                like = likeness(known[new].text, known[other].text)
                hinted = known[new].hint == other
                if like == 1.0 or (hinted and not self.config.compare):
                    found[new, other] = "same"
                elif self.config.compare and (hinted or like >= self.config.near):
                    pairs.append((new, other))
        labels = {"type": "string", "enum": ["same", "contradicts", "different"]}
        texts = [f"{known[new].text} | {known[other].text}" for new, other in pairs]
        said = await self._each("nugget_pairs", "A", texts, lambda w: {"pairs": _keyed("A", w)}, labels)
        return found | dict(zip(pairs, said, strict=True))

    def _merge(self, drafts: Sequence[Draft], found: Mapping[tuple[int, int], str]) -> None:
        at = dict(enumerate(self.nuggets))  # index in the comparison -> the nugget that stands for it now
        rejected = self.work.rejected
        for new, draft in enumerate(drafts, start=len(self.nuggets)):
            twins = [nugget for other, nugget in at.items() if found.get((new, other)) == "same"]
            foes = [nugget for other, nugget in at.items() if found.get((new, other)) == "contradicts"]
            stronger = [foe for foe in foes if len(foe.docs) >= len(draft.docs)]
            if twins:
                twins[0].docs = list(dict.fromkeys([*twins[0].docs, *draft.docs]))
                at[new] = twins[0]
                self.work.merged += 1
            elif stronger:
                rejected["conflict"] += 1
                self.work.conflicts.append([stronger[0].text, draft.text])
            elif len(self.nuggets) - len(foes) >= self.config.max_nuggets:
                rejected["full"] += 1
            else:
                rejected["conflict"] += len({id(foe) for foe in foes})
                self.work.conflicts += [[draft.text, foe.text] for foe in foes]
                at = {other: nugget for other, nugget in at.items() if not any(nugget is foe for foe in foes)}
                self.nuggets = [*(n for n in self.nuggets if not any(n is foe for foe in foes)), draft]
                at[new] = draft

    async def _rewrite(self) -> list[str]:
        """New queries, none of which was tried."""
        limits = {"most queries": self.config.queries}
        fields = {"question": self.task.question, "known": self._known(), "tried": self.work.queries, "limits": limits}
        schema = keyed_schema(["queries"], {"type": "array", "items": {"type": "string"}})
        (reply,) = await self._ask([JudgeRequest("nugget_queries", fields, schema)])
        tried = {tuple(words(q)) for q in self.work.queries} | {()}
        fresh = {tuple(words(q)): " ".join(q.split())[:300] for q in (reply or {"queries": []})["queries"]}
        return [q for key, q in fresh.items() if key not in tried][: self.config.queries]

    async def _rate(self) -> tuple[Nugget, ...]:
        """Vital or okay; a nugget that the judge did not rate is okay, as in TREC. These calls are outside the budget."""
        texts, labels = [d.text for d in self.nuggets], {"type": "string", "enum": ["vital", "okay", "drop"]}
        said = await self._each(
            "nugget_importance", "N", texts, lambda w: {"nuggets": _keyed("N", w)}, labels, free=True
        )
        rated = [
            Nugget(d.text, how or "okay", tuple(d.docs))
            for d, how in zip(self.nuggets, said, strict=True)
            if how != "drop"
        ]
        self.work.rejected["off_topic"] += said.count("drop")
        rated.sort(key=lambda n: n.importance != "vital")
        self.work.rejected["beyond_keep"] += max(0, len(rated) - self.config.keep)
        return tuple(rated[: self.config.keep])

    # ---------------------------------------------------------------------------------------------------- judges

    def _known(self) -> dict[str, str]:
        return _keyed("N", [d.text for d in self.nuggets])

    def _reading(self, passages: Sequence[Passage]) -> dict[str, Any]:
        pages = _keyed("P", passages).items()
        shown = [{"number": key, "url": p.doc_id, "title": p.title, "text": p.text} for key, p in pages]
        return {"question": self.task.question, "known": self._known(), "passages": shown}

    async def _each(
        self,
        prompt: str,
        letter: str,
        items: Sequence[T],
        shown: Callable[[Sequence[T]], dict[str, Any]],
        of: dict[str, Any],
        free: bool = False,
    ) -> list[Any]:
        """A value for every item, asked in windows; None where the judge could not say."""
        windows = _windows(items, self.config.window)
        fields = [{"question": self.task.question, **shown(window)} for window in windows]
        schemas = [keyed_schema(_keys(letter, window), of) for window in windows]
        replies = await self._ask([JudgeRequest(prompt, f, s) for f, s in zip(fields, schemas, strict=True)], free)
        return [
            reply[key] if reply else None
            for window, reply in zip(windows, replies, strict=True)
            for key in _keys(letter, window)
        ]

    async def _ask(self, requests: Sequence[JudgeRequest], free: bool = False) -> list[Any]:
        """Values of the replies; None where the judge could not say, and for calls that the budget has no room for."""
        room = len(requests) if free else max(0, self.config.max_calls - self.work.calls)
        self.spent |= len(requests) > room
        asked = requests[:room]
        self.work.calls += len(asked)
        said = await asyncio.gather(*(self._say(request) for request in asked))
        if None in said:
            raise Unfinished(f"the judge could not be reached ({self.lost})")
        found = [s for s in said if s is not None]
        self.work.tokens += sum(s.tokens for s in found)
        self.work.refused += sum(s.value is None for s in found)
        return [s.value for s in found] + [None] * (len(requests) - len(asked))

    async def _say(self, request: JudgeRequest) -> Said | None:
        """What the judge says, or said before a stop; None when it cannot be reached."""
        key = question(request)[0]
        said = self.journal.said(self.task.id, key)
        if said is None:
            reply = await self.judge.ask(request)
            if reply.status is Status.unavailable:
                self.lost = reply.cause
                return None
            usable = reply.status is Status.ok and not schema_problem(reply.value, request.schema)
            said = Said(reply.value if usable else None, reply.num_tokens)
            self.journal.say(self.task.id, key, said)
        return said


def text_problem(text: str, question: str, max_words: int) -> str:
    """What is wrong with a nugget by itself: too_long, not_atomic, or restates (it is empty, or the question itself); or nothing.

    One that only has words of the question may be its answer ("Is A older than B?"); whether it adds anything is for the judge to rate.
    """
    if num_words(text) > 2 * max_words:
        return "too_long"
    ends = [m for m in _SENTENCE_END.finditer(text) if not _ABBREVIATED.search(text[: m.start() + 1])]
    if ends or ";" in text or "|" in text:
        return "not_atomic"
    return "restates" if words(text) in ([], words(question)) else ""


def likeness(one: str, other: str) -> float:
    """Jaccard index of the words of two nuggets; 1.0 only when they have the same words in the same order."""
    first, second = words(one), words(other)
    if first == second:
        return 1.0
    return min(0.99, len({*first} & {*second}) / max(1, len({*first} | {*second})))


async def build_all(
    tasks: Sequence[Task],
    services: Services,
    config: BuildConfig,
    journal: Journal,
    expected: tuple[type[Exception], ...] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Builds what the journal does not hold yet, several questions at a time; results stand in `journal.done`.

    Returns task id -> why it is unfinished. `expected`: what the backend raises when a search fails.
    """
    failed: dict[str, str] = {}
    caught: tuple[type[Exception], ...] = (Unfinished, *expected)
    room = asyncio.Semaphore(config.concurrency)

    async def one(task: Task) -> None:
        async with room:
            try:
                nuggets, work = await build_nuggets(task, services, config, journal)
            except caught as error:
                failed[task.id] = str(error)
                return
        journal.finish(task.id, {"question": task.question, "nuggets": to_plain(nuggets), "work": to_plain(work)})
        tell(f"{task.id}: {len(nuggets)} nuggets in {work.rounds} rounds, {work.calls} calls ({work.stop})")

    todo = [t for t in tasks if t.id not in journal.done or journal.done[t.id]["question"] != t.question]
    for task in todo:
        journal.done.pop(task.id, None)  # of another question
    await asyncio.gather(*(one(task) for task in todo))
    return failed


def _keys(letter: str, items: Sequence[Any]) -> list[str]:
    return [f"{letter}{i}" for i in range(1, len(items) + 1)]


def _keyed(letter: str, items: Sequence[T]) -> dict[str, T]:
    return dict(zip(_keys(letter, items), items, strict=True))


def _windows(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
