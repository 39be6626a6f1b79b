"""A synthetic world: entities, facts, pages that state them, and questions whose every step is known.

An entity has one page (its name is title and id), an occupation, a few facts (relation -> other entity) and a pointer `See also`. A
question follows 1 to 4 relations from a start. Because the world is closed, answers, rubrics, nuggets, gold documents
and what rule judges need are exact.

Invariants, checked by `validate`:
- every fact of a task stands, word for word, on the page of its subject; gold documents are exactly those pages;
- every rubric holds a placeholder, the rubrics' graph reaches `<E0>`, and the question names only the start;
- a trail visits no entity and follows no relation twice; an unanswerable question has no answers and no rubrics;
- same config, same world; worlds of different splits share no name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.plain import to_plain
from agents.types import Document, Nugget, Task
from envs.world import language
from envs.world.names import draw_names, near_name


@dataclass
class WorldConfig:
    """How a world is made. Difficulty grows with hops, distractors and shortcut."""

    seed: int = 0
    """Names, facts and tasks follow from it."""
    split: str = "train"
    """`train` or `heldout`: worlds of different splits share no name."""
    num_entities: int = 240
    facts_per_page: int = 3
    distractors: float = 0.25
    """Pages of near-names (same second half), as a share of the entities; no task needs them."""
    shortcut: float = 0.2
    """How often the start page's `See also` names the answer of the first question about that start (a page has one), so
    that it can be guessed without evidence."""
    hops: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0})
    """Number of steps -> how often, as weights."""
    unanswerable: float = 0.0
    """Share of tasks that need a fact which the page does not state; a refusal is right."""
    num_tasks: int = 200
    """Different questions; fewer are made when the world has no more."""


@dataclass(frozen=True)
class Entity:
    """One entity as the world knows it."""

    name: str
    occupation: str
    facts: tuple[tuple[str, str], ...]
    """(relation, name of the object), in the order of the page"""
    see_also: str = ""

    def follow(self, relation: str) -> str:
        """Object of the fact, or an empty string when the page does not state it."""
        return dict(self.facts).get(relation, "")

    @property
    def document(self) -> Document:
        text = language.page(self.name, self.occupation, self.facts, self.see_also)
        return Document(self.name, self.name, text)


@dataclass(frozen=True)
class World:
    """Documents and tasks; `entities` by name for makers of traces."""

    documents: list[Document]
    tasks: list[Task]
    entities: Mapping[str, Entity]

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `corpus.jsonl` and `tasks.jsonl`, the files a user's own world consists of. Returns both paths."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        corpus, tasks = target / "corpus.jsonl", target / "tasks.jsonl"
        corpus.write_text("".join(_line(document) for document in self.documents), encoding="utf-8")
        tasks.write_text("".join(_line(task) for task in self.tasks), encoding="utf-8")
        return corpus, tasks


def build_world(config: WorldConfig) -> World:
    """The world of a config. Raises ValueError, in one line, for a config no world can satisfy."""
    _check(config)
    rng = random.Random(f"world {config.split} {config.seed}")
    entities = _draw_entities(rng, config)
    tasks, pointers = _draw_tasks(rng, config, entities)
    everyone = list(entities)
    for name, entity in entities.items():
        others = [pointers[name]] if name in pointers else rng.sample(everyone, 2)
        see_also = next(other for other in others if other != name)
        entities[name] = Entity(name, entity.occupation, entity.facts, see_also)
    documents = sorted((entity.document for entity in entities.values()), key=lambda document: document.id)
    world = World(documents, tasks, entities)
    problems = validate(world)
    if problems:
        raise ValueError(f"the world of {config} is inconsistent: {problems[0]}")
    return world


def make_task(
    task_id: str,
    entities: Mapping[str, Entity],
    start: str,
    relations: Sequence[str],
    ending: str = language.QUESTION_ENDS[0],
) -> Task:
    """The task of a trail, answerable or not. The last entity is `<E0>`, those between are `<E1>`, `<E2>`, ..."""
    trail, docs = [start], []
    for relation in relations:
        docs.append(trail[-1])
        found = entities[trail[-1]].follow(relation)
        if not found:
            break
        trail.append(found)
    text = language.question(start, relations, ending)
    meta = {"hops": len(relations), "start": start, "relations": list(relations)}
    if len(trail) <= len(relations):
        oracle: dict[str, Any] = {"entities": {}, "statements": []}
        return Task(
            task_id, text, gold_docs=tuple(docs), oracle=oracle, source="world", meta=meta | {"missing": len(trail)}
        )
    labels = [f"E{i}" for i in range(1, len(relations))] + ["E0"]
    subjects = [start] + [f"<{label}>" for label in labels[:-1]]
    statements = [
        {"subject": subject, "object": f"<{label}>", "sentence": language.fact_template(relation)}
        for subject, label, relation in zip(subjects, labels, relations, strict=True)
    ]
    facts = [language.fact(a, relation, b) for a, relation, b in zip(trail, relations, trail[1:], strict=False)]
    return Task(
        id=task_id,
        question=text,
        answers=(trail[-1],),
        rubrics=tuple(language.rubric(s, r, label) for s, r, label in zip(subjects, relations, labels, strict=True)),
        nuggets=tuple(Nugget(text, "vital", (doc,)) for text, doc in zip(facts, docs, strict=True)),
        gold_docs=tuple(docs),
        oracle={"entities": dict(zip(labels, trail[1:], strict=True)), "statements": statements},
        source="world",
        meta=meta,
    )


def validate(world: World) -> list[str]:
    """What is wrong with a world's tasks, one line each; empty when all is well."""
    problems: list[str] = []
    by_id = {document.id: document for document in world.documents}
    if len(by_id) != len(world.documents):
        problems.append("two documents share an id")
    if len({task.id for task in world.tasks}) != len(world.tasks):
        problems.append("two tasks share an id")
    for task in world.tasks:
        problems += [f"task {task.id}: {problem}" for problem in _task_problems(task, by_id)]
    return problems


def _task_problems(task: Task, by_id: Mapping[str, Document]) -> list[str]:
    oracle: Mapping[str, Any] = task.oracle or {}
    labels: Mapping[str, str] = oracle.get("entities", {})
    problems = [f"gold document {doc!r} is missing" for doc in task.gold_docs if doc not in by_id]
    if not task.answerable:
        last, relation = task.gold_docs[-1], task.meta["relations"][len(task.gold_docs) - 1]
        if f"{last}'s {relation} is " in by_id[last].text:
            problems.append("an unanswerable question can be answered")
        return problems + (["an unanswerable task has rubrics"] if task.rubrics else [])
    for name in labels.values():
        if name in task.question:
            problems.append(f"the question names {name!r}")
    reached = {task.meta["start"]}
    names = {f"<{label}>": name for label, name in labels.items()}
    statements = oracle["statements"]
    for rubric, doc, statement in zip(task.rubrics, task.gold_docs, statements, strict=True):
        subject = names.get(statement["subject"], statement["subject"])
        found = names[statement["object"]]
        if statement["object"] not in rubric:
            problems.append(f"rubric {rubric!r} lacks {statement['object']}")
        if statement["sentence"].format(subject=subject, object=found) not in by_id[doc].text:
            problems.append(f"page {doc!r} does not state {rubric!r}")
        if subject not in reached:
            problems.append(f"rubric {rubric!r} hangs on nothing")
        reached.add(found)
    if labels.get("E0") not in task.answers or task.answers[0] not in reached:
        problems.append("the rubrics do not reach the answer")
    if len(reached) != len(task.rubrics) + 1:
        problems.append("the trail visits an entity twice")
    return problems


def _draw_entities(rng: random.Random, config: WorldConfig) -> dict[str, Entity]:
    names = draw_names(rng, config.split, config.num_entities)
    taken = set(names)
    distractors: list[str] = []
    for _ in range(round(config.distractors * config.num_entities)):
        found = near_name(rng, rng.choice(names), config.split, taken)
        taken.add(found)
        distractors.append(found)
    entities: dict[str, Entity] = {}
    for name in names + distractors:
        # Facts point to real entities only, so distractors can be found but never lie on a trail.
        objects = [other for other in rng.sample(names, config.facts_per_page + 1) if other != name]
        relations = rng.sample(language.RELATIONS, config.facts_per_page)
        facts = tuple(zip(relations, objects, strict=False))
        entities[name] = Entity(name, rng.choice(language.OCCUPATIONS), facts)
    return entities


def _draw_tasks(
    rng: random.Random, config: WorldConfig, entities: Mapping[str, Entity]
) -> tuple[list[Task], dict[str, str]]:
    """Tasks, and for the starts of shortcut tasks the name their `See also` must give."""
    starts = list(entities)[: config.num_entities]
    tasks: list[Task] = []
    asked: set[tuple[str, tuple[str, ...]]] = set()
    pointers: dict[str, str] = {}
    weights = list(config.hops.values())
    for _ in range(20 * config.num_tasks):
        if len(tasks) == config.num_tasks:
            break
        num_hops = int(rng.choices(list(config.hops), weights)[0])
        start = rng.choice(starts)
        missing = rng.randrange(num_hops) if rng.random() < config.unanswerable else -1
        relations = draw_trail(rng, entities, start, num_hops, missing)
        if relations is None or (start, relations) in asked:
            continue
        asked.add((start, relations))
        name = f"{config.split}-{config.seed}-{len(tasks)}"
        task = make_task(name, entities, start, relations, rng.choice(language.QUESTION_ENDS))
        tasks.append(task)
        if start not in pointers and task.answerable:
            guessable = rng.random() < config.shortcut
            others = [o for o in starts if o not in (start, task.answers[0])]
            pointers[start] = task.answers[0] if guessable else rng.choice(others)
    return tasks, pointers


def draw_trail(
    rng: random.Random, entities: Mapping[str, Entity], start: str, num_hops: int, missing: int = -1
) -> tuple[str, ...] | None:
    """Relations of a random trail without repeats; at step `missing` (from 0) one the page lacks. None: no such trail."""
    relations: list[str] = []
    visited = [start]
    for step in range(num_hops):
        if missing >= 0 and step >= missing:
            stated = {relation for relation, _ in entities[visited[-1]].facts} if step == missing else set()
            free = [r for r in language.RELATIONS if r not in stated and r not in relations]
            relations.append(rng.choice(free))
            continue
        facts = [f for f in entities[visited[-1]].facts if f[0] not in relations and f[1] not in visited]
        if not facts:
            return None
        relation, found = rng.choice(facts)
        relations.append(relation)
        visited.append(found)
    return tuple(relations)


def _check(config: WorldConfig) -> None:
    limit = len(language.RELATIONS) - language.MAX_HOPS
    if not 1 <= config.facts_per_page <= limit:
        raise ValueError(f"facts_per_page {config.facts_per_page} is outside 1 to {limit}")
    if config.num_entities < config.facts_per_page + language.MAX_HOPS + 2:
        raise ValueError(f"num_entities {config.num_entities} is too few for {config.facts_per_page} facts per page")
    if (
        not config.hops
        or any(not 1 <= int(h) <= language.MAX_HOPS for h in config.hops)
        or sum(config.hops.values()) <= 0
    ):
        raise ValueError(f"hops {config.hops} must give positive weights to 1 to {language.MAX_HOPS} steps")
    for name in ("shortcut", "unanswerable", "distractors"):
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} {value} is outside 0 to 1")


def _line(record: Document | Task) -> str:
    return json.dumps(to_plain(record), ensure_ascii=False) + "\n"
