"""Building nuggets without a language model: a scripted generator of known error rates, in closed worlds where every fact is known.

    python benchmarks/nuggets.py

Measures what the pipeline (`rewards/nuggets`) makes of a generator that misses facts, invents some, says some twice, names wrong
duplicates and finds wrong passages irrelevant: recall against the known facts, precision, duplicates left, facts lost to wrong merges and
checks. It says nothing about how often a real model makes such errors.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.interfaces import Backend, Services  # noqa: E402
from agents.types import JudgeReply, JudgeRequest, Status, Task  # noqa: E402
from benchmarks.results_file import RESULTS, write_result  # noqa: E402
from envs.world import WorldConfig  # noqa: E402
from envs.world.language import RELATIONS, fact  # noqa: E402
from envs.world.world import World, build_world  # noqa: E402
from retrieval.backend import build_backend  # noqa: E402
from retrieval.config import BackendConfig  # noqa: E402
from rewards.metrics.intervals import wilson  # noqa: E402
from rewards.nuggets.build import build_all  # noqa: E402
from rewards.nuggets.config import BuildConfig  # noqa: E402
from rewards.nuggets.journal import Journal  # noqa: E402

Fact = tuple[str, str, str]
"""Subject, relation, object."""
_PLAIN = re.compile(r"(\w+)'s (\w+) is (\w+)\.")
_REWORDED = re.compile(r"(\w+) is the (\w+) of (\w+)\.")


@dataclass(frozen=True)
class Rates:
    """How often the generator errs, per decision."""

    miss: float = 0.0
    """A fact of a passage is not extracted."""
    invent: float = 0.0
    """Per passage, a fact that nobody states is extracted."""
    stray: float = 0.0
    """A true fact that does not belong to the question is extracted."""
    repeat: float = 0.0
    """A fact is extracted a second time, in other words."""
    no_hint: float = 0.0
    """A fact that is known already is not recognised."""
    wrong_hint: float = 0.0
    """A new fact is said to be one that is known already."""
    irrelevant: float = 0.0
    """A passage that is needed is found irrelevant."""
    relevant: float = 0.0
    """A passage that is not needed is found relevant."""
    unverified: float = 0.0
    """A fact that its passage states is found unsupported."""
    verified: float = 0.0
    """A fact that its passage does not state is found supported."""
    pairs: float = 0.0
    """A pair of facts gets a wrong label."""
    query: float = 0.0
    """A query leads nowhere."""


def read_fact(text: str) -> Fact | None:
    """The fact that a nugget states, in either wording."""
    if found := _PLAIN.fullmatch(text):
        return found[1], found[2], found[3]
    if found := _REWORDED.fullmatch(text):
        return found[3], found[2], found[1]
    return None


def reword(known: Fact) -> str:
    return f"{known[2]} is the {known[1]} of {known[0]}."


class Generator:
    """Answers the pipeline's prompts from what the world knows, with errors. The same request gets the same reply."""

    def __init__(self, world: World, rates: Rates, seed: int = 0, dies_after: int = 0) -> None:
        self._rates, self._seed, self._dies_after = rates, seed, dies_after
        self._tasks = {task.question: task for task in world.tasks}
        self.names = sorted(world.entities)
        self.extracted: dict[str, set[Fact]] = {}
        """Known facts that were extracted, by task."""
        self.num_asked = 0

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.num_asked += 1
        if self._dies_after and self.num_asked > self._dies_after:
            return JudgeReply(Status.unavailable, cause="judge_unreachable")
        task = self._tasks[request.fields["question"]]
        value = getattr(self, request.prompt)(task, request.fields)
        return JudgeReply(Status.ok, value, prompt_hash="scripted", num_tokens=1)

    def _errs(self, rate: str, *about: object) -> bool:
        return random.Random(f"{self._seed} {rate} {about}").random() < getattr(self._rates, rate)

    def nugget_relevant(self, task: Task, given: Mapping[str, Any]) -> dict[str, bool]:
        reached = {name for known in map(read_fact, given["known"].values()) if known for name in known[::2]}
        reply = {}
        for page in given["passages"]:
            doc = page["url"]
            needed = doc in task.gold_docs and (doc in reached or doc == task.gold_docs[0])
            reply[page["number"]] = needed != self._errs("irrelevant" if needed else "relevant", task.id, doc)
        return reply

    def nugget_extract(self, task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
        gold = gold_facts(task)
        known = {read_fact(text): key for key, text in given["known"].items()}
        rows: list[dict[str, Any]] = []

        def say(text: str, page: str) -> None:
            told = read_fact(text)
            same = known.get(told) if not self._errs("no_hint", task.id, text) else None
            if told not in known and known and self._errs("wrong_hint", task.id, text):
                same = next(iter(known.values()))
            rows.append({"text": text, "passages": [page], "same_as": same})
            if told in gold:
                self.extracted.setdefault(task.id, set()).add(told)

        for page in given["passages"]:
            for told in facts_on(page["text"]):
                wanted = told in gold
                if (wanted and not self._errs("miss", task.id, told)) or (
                    not wanted and self._errs("stray", task.id, told)
                ):
                    say(fact(*told), page["number"])
                    if self._errs("repeat", task.id, told):
                        say(reword(told), page["number"])
            if self._errs("invent", task.id, page["url"]):
                rng = random.Random(f"{self._seed} {task.id} {page['url']}")
                say(fact(page["url"], rng.choice(RELATIONS), rng.choice(self.names)), page["number"])
        return {"nuggets": rows}

    def nugget_assign(self, task: Task, given: Mapping[str, Any]) -> dict[str, str]:
        stated = set(facts_on(given["passage"]))
        held = {key: read_fact(text) in stated for key, text in given["nuggets"].items()}
        return {
            key: "support"
            if holds != self._errs("unverified" if holds else "verified", task.id, given["nuggets"][key])
            else "not_support"
            for key, holds in held.items()
        }

    def nugget_pairs(self, task: Task, given: Mapping[str, Any]) -> dict[str, str]:
        reply = {}
        for key, text in given["pairs"].items():
            one, other = (read_fact(side) for side in text.split(" | "))
            label = "same" if one == other else "contradicts" if one and other and one[:2] == other[:2] else "different"
            if self._errs("pairs", task.id, text):
                label = "different" if label == "same" else "same"
            reply[key] = label
        return reply

    def nugget_importance(self, task: Task, given: Mapping[str, Any]) -> dict[str, str]:
        gold = gold_facts(task)
        return {key: "vital" if read_fact(text) in gold else "okay" for key, text in given["nuggets"].items()}

    def nugget_queries(self, task: Task, given: Mapping[str, Any]) -> dict[str, list[str]]:
        known = [told for told in map(read_fact, given["known"].values()) if told]
        told_of = {subject for subject, _, _ in known}
        found = dict.fromkeys(told[2] for told in known if told[2] not in told_of)
        names = [f"nothing about {n[:2]}" if self._errs("query", task.id, n) else n for n in found]
        fresh = [name for name in names if name not in given["tried"]]
        return {"queries": fresh or [f"{task.gold_docs[0]} {len(given['tried'])}"]}


def gold_facts(task: Task) -> set[Fact]:
    return {told for told in (read_fact(n.text) for n in task.nuggets) if told}


def facts_on(text: str) -> list[Fact]:
    return [(m[1], m[2], m[3]) for m in _PLAIN.finditer(text)]


@contextmanager
def searchable(world: World) -> Iterator[Backend]:
    """The world's pages behind BM25."""
    backend = build_backend(BackendConfig(kind="bm25"), world.documents)
    try:
        yield backend
    finally:
        asyncio.run(backend.close())


async def build_with(
    world: World, backend: Backend, generator: Generator, config: BuildConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """(finished questions, unfinished ones) of all tasks of a world."""
    with closing(Journal(folder / "journal.jsonl", {})) as journal:
        failed = await build_all(world.tasks, Services(generator, backend), config, journal)
        return dict(journal.done), failed


def measure(world: World, done: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
    """Counts and shares over all questions."""
    count: Counter[str] = Counter()
    stated = {told for document in world.documents for told in facts_on(document.text)}
    for task in world.tasks:
        gold, built = gold_facts(task), [read_fact(n["text"]) for n in done[task.id]["nuggets"]]
        said = generator.extracted.get(task.id, set())
        count.update(
            gold=len(gold), hits=len(gold & {*built}), built=len(built), true=sum(told in stated for told in built),
            asked_for=sum(told in gold for told in built), repeats=len(built) - len({*built}), said=len(said), lost=len(said - {*built}),
            calls=done[task.id]["work"]["calls"],
        )  # fmt: skip
    return {
        "recall": _share(count["hits"], count["gold"]), "true": _share(count["true"], count["built"]),
        "asked_for": _share(count["asked_for"], count["built"]), "repeated": _share(count["repeats"], count["built"]),
        "extracted_then_lost": _share(count["lost"], count["said"]), "calls_per_question": round(count["calls"] / len(world.tasks), 1),
        "counts": dict(count),
    }  # fmt: skip


def _share(part: int, whole: int) -> list[float]:
    """Share with its 95 % Wilson interval."""
    return [round(x, 4) for x in wilson(part, whole)]


CONDITIONS: Mapping[str, tuple[Rates, dict[str, Any]]] = {
    "no errors": (Rates(), {}),
    "misses 10 %": (Rates(miss=0.1), {}),
    "misses 30 %": (Rates(miss=0.3), {}),
    "invents 30 %": (Rates(invent=0.3), {}),
    "invents 30 %, not verified": (Rates(invent=0.3), {"verify": False}),
    "invents 30 %, verifier errs 10 %": (Rates(invent=0.3, verified=0.1, unverified=0.1), {}),
    "repeats 50 %": (Rates(repeat=0.5, no_hint=1.0), {}),
    "repeats 50 %, not compared": (Rates(repeat=0.5, no_hint=1.0), {"compare": False}),
    "repeats 50 %, comparison errs 10 %": (Rates(repeat=0.5, no_hint=1.0, pairs=0.1), {}),
    "wrong hints 30 %": (Rates(wrong_hint=0.3), {}),
    "wrong hints 30 %, not compared": (Rates(wrong_hint=0.3), {"compare": False}),
    "passages misjudged 20 %": (Rates(irrelevant=0.2, relevant=0.2), {}),
    "queries fail 20 %": (Rates(query=0.2), {}),
    "strays 30 %": (Rates(stray=0.3), {}),
    "all at 10 %": (Rates(**{f.name: 0.1 for f in fields(Rates)}), {}),
}


def run(num_tasks: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Every condition, over worlds of several seeds."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONDITIONS}
    for seed in seeds:
        world = build_world(WorldConfig(seed=seed, num_entities=160, num_tasks=num_tasks))
        with searchable(world) as backend:
            for name, (rates, options) in CONDITIONS.items():
                generator = Generator(world, rates, seed)
                with tempfile.TemporaryDirectory() as folder:
                    config = replace(BuildConfig(), **options)
                    done, failed = asyncio.run(build_with(world, backend, generator, config, Path(folder)))
                assert not failed, failed
                results[name].append(measure(world, done, generator))
    return {name: pool(found) for name, found in results.items()}


def pool(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares over the worlds together."""
    c: Counter[str] = sum((Counter(f["counts"]) for f in found), Counter())
    shares = {
        "recall": ("hits", "gold"), "true": ("true", "built"), "asked_for": ("asked_for", "built"), "repeated": ("repeats", "built"),
        "extracted_then_lost": ("lost", "said"),
    }  # fmt: skip
    calls = sum(f["calls_per_question"] for f in found) / len(found)
    return {k: _share(c[a], c[b]) for k, (a, b) in shares.items()} | {
        "calls_per_question": round(calls, 1),
        "counts": dict(c),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=60, help="questions per world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="worlds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    began = time.monotonic()
    found = run(args.tasks, args.seeds)
    for name, row in found.items():
        shares = "  ".join(f"{k} {v[0]:.3f}" for k, v in row.items() if isinstance(v, list))
        print(f"{name:36} {shares}  calls {row['calls_per_question']}")
    figures = {
        "tasks_per_world": args.tasks,
        "seeds": args.seeds,
        "seconds": round(time.monotonic() - began, 1),
        "conditions": found,
    }
    write_result("nuggets", figures, args.results)


if __name__ == "__main__":
    main()
