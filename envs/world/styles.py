"""Question sets of held-out synthetic worlds, in the styles of three benchmarks: made on the spot, no file needed.

- `world_bcp`, as BrowseComp-Plus: a corpus with near-names as hard negatives, and judgements: `evidence` (every page of the trail) and
  `gold` (the page that states the answer).
- `world_webdetective`, as WebDetective (arXiv 2510.05137): the question names its start alone, and the trail is a chain of pages; with
  `sandbox.guard.answer: chain` each page comes to light, and each name is unmasked, when the page before was opened.
- `world_parallel`, as Mind-ParaWorld (arXiv 2603.04751): no corpus but `envs.parallel_world`'s engine over the facts of the trails.

Options: `seed`, `tasks`, `hops` (`3`, `2-4`, `1,3`), `entities`, `unanswerable` (a share; not for world_parallel), and of world_parallel `setting`
(A, B or C). Questions are worded by `envs.world.language`, so the shipped policy can answer the first two sets.

Invariants: names are held-out ones; same options, same set; the ids of other options are others; a question without an answer has no evidence in `world_bcp`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from agents.types import Task
from envs.benchmarks.base import Benchmark, BenchmarkConfig, BenchmarkError, Family
from envs.parallel_world import SETTINGS, Fact, posed
from envs.world import language
from envs.world.world import World, WorldConfig, build_world, draw_trail, make_task

OPTIONS = ("seed", "tasks", "hops", "entities")
NOT_OF_A_QUESTION = ("ids", "sha256", "setting")
"""Options that make no other questions; a setting tells the same question's agent more."""
LONG_HOPS = 12
"""Most facts of a parallel world's question: relations are followed once, and there are 16."""


def load_bcp(config: BenchmarkConfig, path: Path) -> Benchmark:
    """BrowseComp-Plus's style. `path` is not read."""
    world = _world(config, "bcp", "1-4", distractors=0.5)
    tasks = []
    evidence: dict[str, dict[str, int]] = {}
    gold: dict[str, dict[str, int]] = {}
    for task in world.tasks:
        if not task.answerable:  # not judged, so its pages are no evidence: what asks for qrels leaves the question out
            tasks.append(replace(task, source="world_bcp", gold_docs=()))
            continue
        meta = {**task.meta, "evidence_docs": list(task.gold_docs)}
        tasks.append(replace(task, source="world_bcp", gold_docs=task.gold_docs[-1:], meta=meta))
        evidence[task.id], gold[task.id] = dict.fromkeys(task.gold_docs, 1), {task.gold_docs[-1]: 1}
    metrics = ("accuracy", "evidence", "effort", "citations", "ranking", "calibration", "factorised")
    return Benchmark(
        "world_bcp", tuple(tasks), metrics, qrels={"evidence": evidence, "gold": gold}, documents=lambda: world.documents, notes=_notes(world, config)
    )  # fmt: skip


def load_webdetective(config: BenchmarkConfig, path: Path) -> Benchmark:
    """WebDetective's style. `path` is not read."""
    world = _world(config, "webdetective", "2-4")
    tasks = [replace(t, source="world_webdetective", meta={**t.meta, "chain": list(t.gold_docs)}) for t in world.tasks]
    metrics = ("accuracy", "factorised", "evidence", "effort", "citations", "calibration")
    return Benchmark(
        "world_webdetective", tuple(tasks), metrics, documents=lambda: world.documents, notes=_notes(world, config)
    )


def load_parallel(config: BenchmarkConfig, path: Path) -> Benchmark:
    """Mind-ParaWorld's style. `path` is not read; there is no corpus, but `ParallelWorld.of_tasks`."""
    setting = config.options.get("setting", "C").upper()
    if setting not in SETTINGS:
        raise BenchmarkError(f"options.setting {setting!r} is not one of {', '.join(SETTINGS)}")
    hops = _hops(config.options.get("hops", "2-4"), LONG_HOPS)
    seed, wanted = _whole(config, "seed", 1, 0), _whole(config, "tasks", 100, 1)
    facts_per_page = 3 if max(hops) <= language.MAX_HOPS else 8
    entities = _whole(config, "entities", 240, 20)
    world = _built(WorldConfig(seed, "heldout", entities, facts_per_page, distractors=0.0, hops={1: 1.0}, num_tasks=1))
    rng = random.Random(f"parallel {seed}")
    prefix = _prefix(config, "parallel", seed)
    starts, tasks, asked = list(world.entities), list[Task](), set[tuple[str, tuple[str, ...]]]()
    for _ in range(20 * wanted):
        if len(tasks) == wanted:
            break
        start = rng.choice(starts)
        relations = draw_trail(rng, world.entities, start, rng.choice(hops))
        if relations is None or (start, relations) in asked:
            continue
        asked.add((start, relations))
        task = make_task(f"{prefix}-{len(tasks)}", world.entities, start, relations)
        trail = [*task.gold_docs, task.answers[0]]
        facts = [
            Fact(f"{relation} of {a}", b, language.fact(a, relation, b), (a,))
            for a, relation, b in zip(trail, relations, trail[1:], strict=False)
        ]
        guide = [
            f"the {relation} of {'whoever step ' + str(i) + ' found' if i else start}"
            for i, relation in enumerate(relations)
        ]
        nuggets = tuple(replace(n, doc_ids=(fact.id,)) for n, fact in zip(task.nuggets, facts, strict=True))
        tasks.append(posed(replace(task, source="world_parallel", nuggets=nuggets), facts, setting, guide))
    metrics = ("accuracy", "parallel_world", "effort", "calibration")
    notes = (*_short(len(tasks), wanted), "searched by the engine of corpus.source: parallel_world, not as a corpus")
    return Benchmark("world_parallel", tuple(tasks), metrics, notes=notes)


def _family(load: Callable[[BenchmarkConfig, Path], Benchmark], style: str, *more: str) -> Family:
    return Family(
        load, f"no file: a held-out world in the style of {style} is made of its options", "nothing to obtain", options=(*OPTIONS, *more), made=True
    )  # fmt: skip


FAMILIES: Mapping[str, Family] = {
    "world_bcp": _family(load_bcp, "BrowseComp-Plus", "unanswerable"),
    "world_webdetective": _family(load_webdetective, "WebDetective", "unanswerable"),
    "world_parallel": _family(load_parallel, "Mind-ParaWorld", "setting"),
}
"""For `envs.benchmarks.registry`."""


def _world(config: BenchmarkConfig, style: str, hops: str, distractors: float = 0.25) -> World:
    share = config.options.get("unanswerable", "0")
    try:
        unanswerable = float(share)
    except ValueError:
        raise BenchmarkError(f"options.unanswerable {share!r} is not a number") from None
    seed = _whole(config, "seed", 1, 0)
    world = _built(
        WorldConfig(
            seed=seed,
            split="heldout",
            num_entities=_whole(config, "entities", 240, 20),
            num_tasks=_whole(config, "tasks", 100, 1),
            hops=dict.fromkeys(_hops(config.options.get("hops", hops), language.MAX_HOPS), 1.0),
            distractors=distractors,
            shortcut=0.0,
            unanswerable=unanswerable,
        )
    )
    prefix = _prefix(config, style, seed)
    tasks = [replace(task, id=f"{prefix}-{number}") for number, task in enumerate(world.tasks)]
    return replace(world, tasks=tasks)


def _prefix(config: BenchmarkConfig, style: str, seed: int) -> str:
    """Of the ids of a set's questions: sets of other options have other ids, so that no two questions share one."""
    options = json.dumps(sorted((k, v.strip()) for k, v in config.options.items() if k not in NOT_OF_A_QUESTION))
    return f"{style}-{seed}-{hashlib.sha256(options.encode()).hexdigest()[:6]}"


def _built(config: WorldConfig) -> World:
    try:
        return build_world(config)
    except ValueError as error:
        raise BenchmarkError(f"no such world can be made: {error}") from None


def _whole(config: BenchmarkConfig, name: str, default: int, least: int) -> int:
    text = config.options.get(name, str(default)).strip()
    if not text.isdecimal() or int(text) < least:
        raise BenchmarkError(f"options.{name} {text!r} is not a whole number of at least {least}")
    return int(text)


def _hops(text: str, most: int) -> list[int]:
    """`3`, `2-4` or `1,3` as a list."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            raise BenchmarkError(f"options.hops {text!r} is not of the form 3, 2-4 or 1,3")
        found += range(int(low), int(high or low) + 1)
    if not found or min(found) < 1 or max(found) > most:
        raise BenchmarkError(f"options.hops {text!r} must lie within 1 and {most}")
    return sorted(set(found))


def _notes(world: World, config: BenchmarkConfig) -> tuple[str, ...]:
    return _short(len(world.tasks), _whole(config, "tasks", 100, 1))


def _short(made: int, wanted: int) -> tuple[str, ...]:
    return (f"only {made} of {wanted} questions: a world of this size has no more",) if made < wanted else ()
