"""Traces for warm-up: what an expert does in a world, and the flawed behaviours that reinforcement learning has to sort out.

A script is a task and its steps: texts of the policy, and the tool events they lead to, in turn. It holds no tokens; the protocol
encodes it (`agents.learning.warmup`). The world's own lookup stands in for retrieval: the page that a query names comes first,
another page beside it.

Invariants:
- Every name, relation and citation an expert writes was shown to it before; its trail is the gold trail.
- A flawed script errs by choice and not by skill: having chosen a wrong fact or an early end it goes on correctly.
- Observations read as the sandbox writes them (a test compares the two).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from agents.types import Seen, SeenKind, Task, ToolCall, ToolEvent
from envs.world import language
from envs.world.names import FIRST_HALVES, SECOND_HALVES
from envs.world.world import Entity, World, WorldConfig, build_world

Step = str | tuple[ToolEvent, ...]


@dataclass
class MixConfig:
    """Share of scripts that err on purpose, by kind; the rest is expert work. Fixed before reinforcement learning starts."""

    early: float = 0.0
    """Answers with the name found after an earlier step."""
    see_also: float = 0.0
    """Opens the first page, reads one fact, and answers with the name under `See also`."""
    seen: float = 0.0
    """Answers with some other name of the page last read."""
    wrong_fact: float = 0.0
    """Reads one wrong fact of a page and follows it to the end."""
    uncited: float = 0.0
    """Expert work, cited nowhere."""
    malformed: float = 0.0
    """Ends a turn with neither a call nor an answer."""


@dataclass
class ScriptConfig:
    """Which worlds and behaviours scripts are drawn from."""

    world: WorldConfig = field(default_factory=lambda: WorldConfig(num_entities=24, num_tasks=16))
    """A fresh one of these per `world.num_tasks` scripts; its seed is drawn anew each time."""
    mix: MixConfig = field(default_factory=MixConfig)
    second_place: float = 0.1
    """How often the page that was asked for is the second search result, not the first."""
    num_results: int = 2
    recite: int = 0
    """Above 0 a script is a drill instead: repeat up to this many facts in another order. It teaches copying by key, which every
    other skill rests on, at ten times the density of a search."""


@dataclass(frozen=True)
class Script:
    """A task and what is done about it: texts of the policy and the events that follow them, in turn."""

    task: Task
    steps: tuple[Step, ...]
    kind: str


def scripts(config: ScriptConfig, seed: int) -> Iterator[Script]:
    """An endless stream, every few from a fresh world. Same config and seed, same stream."""
    rng = random.Random(f"scripts {seed}")
    base = vars(config.world)
    while True:
        world = build_world(WorldConfig(**{**base, "seed": rng.randrange(1 << 40)}))
        for task in world.tasks:
            yield (
                write_drill(rng, world, task.id, rng.randint(1, config.recite))
                if config.recite
                else write_script(rng, world, task, config)
            )


def write_script(rng: random.Random, world: World, task: Task, config: ScriptConfig) -> Script:
    """One script for `task`; its kind is drawn from the mix (a kind that does not fit the task becomes the expert's)."""
    kinds = vars(config.mix)
    kind = rng.choices(["expert", *kinds], [max(0.0, 1.0 - sum(kinds.values())), *kinds.values()])[0]
    if kind not in ("uncited", "malformed") and not task.answerable:
        kind = "expert"
    if kind == "early" and task.meta["hops"] == 1:
        kind = "seen"
    if kind in ("seen", "wrong_fact") and any(len(world.entities[doc].facts) < 2 for doc in task.gold_docs):
        kind = "expert"
    return Script(task, tuple(_Writer(rng, world, task, config, kind).write()), kind)


def write_drill(rng: random.Random, world: World, task_id: str, num_facts: int) -> Script:
    """Facts to be repeated in another order, half of the time all about one entity. Relation, object and the second half of
    every name each have one key in the text."""
    names = rng.sample(list(world.entities), num_facts + 1)
    relations = rng.sample(language.RELATIONS, num_facts)
    alone = rng.random() < 0.5
    facts = [
        language.fact(names[num_facts] if alone else names[i - 1], relations[i], names[i]) for i in range(num_facts)
    ]
    task = Task(task_id, " ".join(facts), source="world")
    return Script(task, (" ".join(rng.sample(facts, num_facts)),), "recite")


class _Writer:
    """Writes one script. State: the facts read so far and the tool events."""

    def __init__(self, rng: random.Random, world: World, task: Task, config: ScriptConfig, kind: str) -> None:
        self.rng, self.world, self.task, self.config, self.kind = rng, world, task, config, kind
        self.relations: list[str] = task.meta["relations"]
        self.read: list[tuple[str, str, str]] = []
        self.names = list(world.entities)

    def write(self) -> Iterator[Step]:
        last = len(self.relations)
        if self.kind in ("early", "see_also", "seen"):
            last = {"early": self.rng.randint(1, max(1, last - 1)), "see_also": 1}.get(
                self.kind, self.rng.randint(1, last)
            )
        wrong = self.rng.randrange(last) if self.kind == "wrong_fact" else -1
        silent = self.rng.randint(0, last) if self.kind == "malformed" else -1
        entity, thought = self.world.entities[self.task.meta["start"]], ""
        for step, relation in enumerate(self.relations[:last]):
            query = f"{relation} of {entity.name}"
            thought += f"Step {step + 1}: {query}."
            if step == silent:
                yield f"<think>\n{thought}\n</think>\n\n"
                return
            yield f"<think>\n{thought}\n</think>\n\n{_call('search', 'query', query)}"
            yield (self._search(query, entity),)
            yield _call("open", "doc_id", entity.name)
            yield (open_event(entity),)
            stated, found = relation, entity.follow(relation)
            if step == wrong:
                stated, found = self.rng.choice([f for f in entity.facts if f[0] != relation])
            self.read.append((entity.name, stated, found or language.UNKNOWN))
            thought = language.fact(*self.read[-1])
            if not found:
                break
            if step + 1 < last:
                thought += " "
                entity = self.world.entities[found]
        thinking = f"<think>\n{thought}\n</think>\n\n"
        yield thinking if silent == last else thinking + self._final(entity)

    def _final(self, entity: Entity) -> str:
        """The final message: every fact read, with its citation, and the exact answer."""
        answer = self.read[-1][2]
        if self.kind == "see_also":
            answer = self.world.entities[self.read[0][0]].see_also
        elif self.kind == "seen":
            answer = self.rng.choice([object for _, object in entity.facts if object != answer])
        cite = self.kind != "uncited"
        sentences = []
        for number, (subject, relation, object) in enumerate(self.read, start=1):
            sentence = language.fact(subject, relation, object)
            sentences.append(f"{sentence[:-1]} [[{number}]({subject})]." if cite else sentence)
        return f"## Explanation with Citations\n{' '.join(sentences)}\n\n## Exact Answer\n{answer}"

    def _search(self, query: str, entity: Entity) -> ToolEvent:
        others = [name for name in self.rng.sample(self.names, self.config.num_results) if name != entity.name]
        found = [entity.name, *others][: self.config.num_results]
        if self.rng.random() < self.config.second_place:
            found[:2] = reversed(found[:2])
        return search_event(query, [self.world.entities[name] for name in found])


def search_event(query: str, found: list[Entity]) -> ToolEvent:
    """A search and its results, worded as the sandbox words them with lead snippets."""
    blocks = []
    for i, entity in enumerate(found):
        snippet = language.lead(entity.name, entity.occupation)
        blocks.append(f"[{i}] Title: {entity.name}\n[{i}] URL Source: {entity.name}\n[{i}] Description: {snippet}")
    seen = tuple(Seen(e.name, language.lead(e.name, e.occupation), SeenKind.snippet, e.name) for e in found)
    return ToolEvent(ToolCall("search", {"query": query}), "\n\n".join(blocks) or "No results found.", seen)


def open_event(entity: Entity) -> ToolEvent:
    """Opening an entity's page, worded as the sandbox words it."""
    text = entity.document.text
    seen = (Seen(entity.name, text, SeenKind.page, entity.name),)
    return ToolEvent(
        ToolCall("open", {"doc_id": entity.name}), f"Title: {entity.name}\nURL Source: {entity.name}\n\n{text}", seen
    )


def _call(name: str, argument: str, value: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"{argument}": "{value}"}}}}\n</tool_call>'


def role_table(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """Token id -> which skill writes it: `relation`, `first`, `second` (halves of a name), `stop` (go on or end), else `syntax`."""
    table = dict.fromkeys(vocabulary.values(), "syntax")
    for role, texts in (
        ("relation", [*language.RELATIONS, *(f"'s {relation} is " for relation in language.RELATIONS)]),
        ("first", FIRST_HALVES),
        ("second", SECOND_HALVES),
        ("stop", [".", ". ", language.UNKNOWN]),
    ):
        table.update({vocabulary[text]: role for text in texts if text in vocabulary})
    return table
