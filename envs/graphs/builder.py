"""Builds a world: draws walks, pins their questions down, refuses what leaks or can be guessed, splits, and writes the files.

`corpus.jsonl.gz`, `tasks.jsonl`, `eval_tasks.jsonl` and `manifest.json` are what `world.kind: jsonl` reads (docs/worlds.md).

Invariants: equal sources and settings give byte-equal files; every node belongs to one side, so that no answer and no hidden
entity of a held-out task is either in a training task; each attempt that gives no task is counted under one reason; the folder
appears whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.plain import to_plain
from agents.text import ngrams, validate_rubrics, words
from agents.types import Document, Task
from envs.graphs.questions import MAX_HOPS, Leaks, compose, make_task
from envs.graphs.triples import Graph, Phrases, Triple, WorldError, is_value
from envs.graphs.walks import Limits, draw_walk, pin_down
from envs.guard import RUN_WORDS
from envs.jsonl import write_tasks
from retrieval.corpus import fingerprint

VERSION = 2
"""Grows when equal sources and settings would give other files."""
REASONS = ("dead_end", "guessable", "evidence", "not_unique", "leak", "rubrics", "repeated", "overlap")


@dataclass(frozen=True)
class Settings:
    """What a world is to hold."""

    tasks: int = 500
    held_out: int = 100
    hops: tuple[int, ...] = (2, 3)
    seed: int = 0
    attempts_per_task: int = 200
    """Walks drawn for each task wanted, before the graph is taken to have no more."""
    tasks_per_answer: int = 3
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Source:
    """Documents, what is known of them, and how it is said."""

    name: str
    documents: Sequence[Document]
    triples: Iterable[Triple]
    phrases: Phrases
    notes: tuple[str, ...] = ()
    """What reading it found, for the user."""


@dataclass(frozen=True)
class Built:
    """A world before it is written."""

    documents: Sequence[Document]
    train: tuple[Task, ...]
    held_out: tuple[Task, ...]
    manifest: dict[str, Any]


class _Refused(Exception):
    """Why an attempt gave no task."""


def build(source: Source, settings: Settings, progress: Callable[[str], None] = lambda line: None) -> Built:
    """The tasks of a source. Fewer than wanted are made when the graph has no more. Raises WorldError when there are none."""
    if not settings.hops or any(not 1 <= h <= MAX_HOPS for h in settings.hops):
        raise WorldError(f"hops {list(settings.hops)} must be between 1 and {MAX_HOPS}")
    if settings.tasks < 1 or settings.held_out < 0:
        raise WorldError(
            f"{settings.tasks} tasks and {settings.held_out} held out cannot be made; ask for at least 1 and 0"
        )
    graph = Graph(source.documents, source.triples)
    if len(graph.documents) != len(source.documents):
        raise WorldError("two documents share an id; give each its own")
    progress(f"{len(graph.documents)} documents, {sum(graph.counts.values())} triples")
    maker = _Maker(source, settings, graph, Leaks(graph))
    wanted = {"train": settings.tasks, "eval": settings.held_out}
    made = {side: maker.draw(side, number, progress) for side, number in wanted.items()}
    overlapping = _overlaps([t for tasks in made.values() for t in tasks], source.documents)
    made = {side: [t for t in tasks if t.id not in overlapping] for side, tasks in made.items()}
    maker.refused["overlap"] = len(overlapping)
    if not made["train"]:
        raise WorldError(
            f"no question could be made of {sum(graph.counts.values())} triples in {maker.attempts} attempts; refused: "
            + ", ".join(f"{r} {n}" for r, n in maker.refused.items() if n)
        )
    return Built(source.documents, tuple(made["train"]), tuple(made["eval"]), _manifest(source, settings, maker, made))


def write(built: Built, folder: str | Path) -> Path:
    """Writes a world's files. Raises WorldError when the folder holds something already."""
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WorldError(f"{target} is there already; choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # Neither a time nor a name in the header, or equal worlds would differ in their bytes.
        with (beside / "corpus.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for document in built.documents:
                file.write((json.dumps(to_plain(document), ensure_ascii=False) + "\n").encode())
        write_tasks(beside / "tasks.jsonl", built.train)
        write_tasks(beside / "eval_tasks.jsonl", built.held_out)
        text = json.dumps(built.manifest, indent=2, ensure_ascii=False) + "\n"
        (beside / "manifest.json").write_text(text, encoding="utf-8")
        beside.chmod(0o755)
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


class _Maker:
    """Draws tasks and keeps count."""

    def __init__(self, source: Source, settings: Settings, graph: Graph, leaks: Leaks) -> None:
        self.source, self.settings, self.graph, self.leaks = source, settings, graph, leaks
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.dropped: Counter[str] = Counter(leak=0, evidence=0)
        """Constraints that were not even considered."""
        self.attempts = 0
        self._asked: set[str] = set()
        self._answers: Counter[str] = Counter()
        total = settings.tasks + settings.held_out
        share = settings.held_out / total
        self._held_share = min(0.5, max(0.2, share)) if settings.held_out else 0.0

    def side(self, node: str) -> str:
        """`train` or `eval`, for good: who is hidden on one side is never hidden on the other."""
        digest = hashlib.blake2b(f"{self.settings.seed}\0{node}".encode(), digest_size=8).digest()
        return "eval" if int.from_bytes(digest, "big") < self._held_share * 2**64 else "train"

    def draw(self, side: str, number: int, progress: Callable[[str], None]) -> list[Task]:
        """At most `number` tasks of a side."""
        rng = random.Random(f"world {self.settings.seed} {side}")
        starts = [
            d for d in self.graph.documents if self.side(d) == side and (d in self.graph.out or d in self.graph.into)
        ]
        tasks: list[Task] = []
        for _ in range(number * self.settings.attempts_per_task if starts else 0):
            if len(tasks) == number:
                break
            self.attempts += 1
            hops = rng.choice(self.settings.hops)
            try:
                tasks.append(self._attempt(rng, side, rng.choice(starts), hops, len(tasks)))
            except _Refused as refused:
                self.refused[str(refused)] += 1
                continue
            if len(tasks) % 100 == 0:
                progress(f"{side}: {len(tasks)} of {number} tasks, {self.attempts} attempts")
        return tasks

    def _attempt(self, rng: random.Random, side: str, start: str, hops: int, number: int) -> Task:
        graph, phrases, limits = self.graph, self.source.phrases, self.settings.limits
        walk = draw_walk(rng, graph, start, hops, phrases, limits, lambda node: self.side(node) == side)
        if walk is None:
            raise _Refused("dead_end")
        answer, last = walk.nodes[-1], walk.edges[-1]
        if is_value(answer) and graph.share(last.relation, answer) > limits.max_share:
            raise _Refused("guessable")
        if self._answers[answer] >= self.settings.tasks_per_answer:
            raise _Refused("repeated")
        if not all(graph.told(edge, phrases.of(edge.relation)) for edge in walk.edges):
            raise _Refused("evidence")
        constraints = pin_down(rng, graph, walk, self._candidates(walk.nodes), limits)
        if constraints is None:
            raise _Refused("not_unique")
        question = compose(graph, walk, constraints, phrases)
        if self.leaks.names(question, walk.nodes) or self.leaks.alike(walk.nodes):
            raise _Refused("leak")
        task = make_task(
            graph, walk, constraints, phrases, question, f"{self.source.name}-{side}-{number}", self.source.name
        )
        if validate_rubrics(task.rubrics, task.answers):
            raise _Refused("rubrics")
        key = " ".join(sorted(task.rubrics))
        if question in self._asked or key in self._asked:
            raise _Refused("repeated")
        self._asked |= {question, key}
        self._answers[answer] += 1
        return replace(task, meta={**task.meta, "split": side})

    def _candidates(self, nodes: Sequence[str]) -> list[tuple[float, Triple]]:
        """Facts that may describe the walk's entities: told by their documents, fit by others too, and telling no hidden name."""
        found, limits = [], self.settings.limits
        for node in nodes:
            for name, triples in self.graph.out.get(node, {}).items():
                relation = self.source.phrases.of(name)
                if "describe" not in relation.uses:
                    continue
                for object_, triple in triples.items():
                    matches = len(self.graph.subjects(name, object_))
                    if object_ in nodes or not limits.min_matches <= matches <= limits.max_matches:
                        continue
                    if self.leaks.parts(self.graph.name(object_), nodes):
                        self.dropped["leak"] += 1
                    elif not self.graph.told(triple, relation):
                        self.dropped["evidence"] += 1
                    else:
                        found.append((relation.weight, triple))
        return found


def _overlaps(tasks: Sequence[Task], documents: Iterable[Document]) -> set[str]:
    """Ids of tasks whose question shares 13 words in a row with a document: the leak guard would hide that one."""
    runs: dict[tuple[str, ...], set[str]] = {}
    for task in tasks:
        said = words(task.question)
        for run in ngrams(said, min(RUN_WORDS, len(said))):
            runs.setdefault(run, set()).add(task.id)
    lengths = {len(run) for run in runs}
    found: set[str] = set()
    for document in documents:
        said = words(f"{document.title} {document.id} {document.text}")
        for length in lengths:
            for run in ngrams(said, length) & runs.keys():
                found |= runs[run]
    return found


def _manifest(source: Source, settings: Settings, maker: _Maker, made: dict[str, list[Task]]) -> dict[str, Any]:
    tasks = [t for found in made.values() for t in found]
    shares = [t.meta["answer_share"] for t in tasks if t.meta["answer_is"] == "value"]
    return {
        "version": VERSION,
        "source": source.name,
        "settings": asdict(settings),
        "documents": len(source.documents),
        "corpus": fingerprint(source.documents),
        "triples": dict(sorted(maker.graph.counts.items())),
        "notes": list(source.notes),
        "tasks": {
            side: dict(sorted(Counter(f"{t.meta['hops']} hops" for t in found).items())) for side, found in made.items()
        },
        "attempts": maker.attempts,
        "refused": dict(maker.refused),
        "dropped_constraints": dict(maker.dropped),
        "answers": dict(Counter(t.meta["answer_is"] for t in tasks)),
        "always_guessing_the_commonest": {
            "median": round(statistics.median(shares), 5) if shares else 0.0,
            "most": max(shares, default=0.0),
        },
    }
