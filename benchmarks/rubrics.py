"""How well faults in rubrics are found, and what is left of them after mending: precision and recall per kind, in closed worlds.

`python benchmarks/rubrics.py [--tasks 400]` takes seconds, asks no model, prints a table and writes `benchmarks/results/rubrics.json`.

- *found*: the worlds' own rubrics are right; a scripted writer puts in faults of known kinds at a known rate. Per kind, over questions: is
  it reported where it is (recall), and is it where it is reported (precision)? With gold entities known, and without (then a leak of
  one should show as `foreign`).
- *mended*: the whole loop with a scripted mender that mends each fault it is told of with a known chance: what is accepted, how much of that
  still has a fault, what is refused without one.
- *wording*: the two estimates (`compound`, `foreign`) on sentences written by hand in the manner of search questions, some meant to mislead.
  The rules were written with the first lists in sight; the later list came after.

A scripted writer's faults are plainer than a language model's: these figures say what the checks can do, not what a model does.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.types import JudgeReply, JudgeRequest, Status, Task  # noqa: E402
from benchmarks.results_file import RESULTS, write_result  # noqa: E402
from envs.graphs.builder import Settings  # noqa: E402
from envs.graphs.builder import build as build_graph  # noqa: E402
from envs.graphs.synthetic import synthetic_source  # noqa: E402
from envs.world import WorldConfig, build_world  # noqa: E402
from rewards.metrics.intervals import wilson  # noqa: E402
from rewards.outcome import gold_entities  # noqa: E402
from rewards.rubrics.build import ACCEPTED, Item, Options, build, summary  # noqa: E402
from rewards.rubrics.validate import is_compound, validate  # noqa: E402

RATE, MEND_RATE = 0.12, 0.7


# ---------------------------------------------------------------------------------------------------- the faults


def _on(rubrics: list[str], rng: random.Random, change: Callable[[str], str], holds: str = "<E") -> list[str]:
    """One rubric that holds a text, changed."""
    index = rng.choice([i for i, r in enumerate(rubrics) if holds in r])
    return [*rubrics[:index], change(rubrics[index]), *rubrics[index + 1 :]]


def _hidden(task: Task) -> dict[str, str]:
    found = (task.oracle or {}).get("entities") or {}
    return {label: name for label, name in found.items() if label != "E0" and name not in task.answers}


def _tail(text: str) -> Callable[[str], str]:
    return lambda rubric: rubric.rstrip(".") + text + "."


def _leak(rubrics: list[str], task: Task, rng: random.Random) -> list[str]:
    label = rng.choice([k for k in _hidden(task) if any(f"<{k}>" in r for r in rubrics)])
    return _on(rubrics, rng, lambda r: r.replace(f"<{label}>", f"<{label}> ({_hidden(task)[label]})", 1), f"<{label}>")


def _joined(rubrics: list[str], rng: random.Random) -> list[str]:
    first, second = rubrics[0].rstrip("."), rubrics[1]
    return [rng.choice([f"{first} and {second}", f"{first}; {second}", f"{first}. {second}"]), *rubrics[2:]]


FAULTS: dict[str, Callable[[list[str], Task, random.Random], list[str]]] = {
    "compound": lambda rubrics, task, rng: _joined(rubrics, rng),
    "no_placeholder": lambda rubrics, task, rng: [*rubrics, rng.choice(["The question is about people.", "There is a chain of facts."])],
    "malformed": lambda rubrics, task, rng: _on(rubrics, rng, _tail(rng.choice([" with <e9>", " with <answer>", " with <E09>", " with E9"]))),
    "unlinked": lambda rubrics, task, rng: [*rubrics, "<E8> is a person."],
    "answer_leak": lambda rubrics, task, rng: _on(rubrics, rng, lambda r: r.replace("<E0>", f"<E0> ({task.answers[0]})", 1), "<E0>"),
    "entity_leak": _leak,
    "foreign": lambda rubrics, task, rng: _on(rubrics, rng, _tail(rng.choice([" since 1921", " in Hesse", " for Queen Maud"]))),
    "repeated": lambda rubrics, task, rng: [*rubrics, "  " + rng.choice(rubrics)],
    "no_answer": lambda rubrics, task, rng: [r.replace("<E0>", "<E7>") for r in rubrics],
}  # fmt: skip
"""Kind of fault -> how it is put in. In this order, so that none undoes another."""


def draw(task: Task, rng: random.Random, rate: float) -> set[str]:
    """Which faults a draft gets, each at that rate, as far as the task allows."""
    able = {"compound": len(task.rubrics) > 1, "entity_leak": bool(_hidden(task))}
    return {kind for kind in FAULTS if rng.random() < rate and able.get(kind, True)}


def corrupt(task: Task, faults: set[str], seed: str) -> list[str]:
    """The task's rubrics with these faults; the same for the same seed."""
    rubrics = list(task.rubrics)
    for kind, put_in in FAULTS.items():
        if kind in faults:
            rubrics = put_in(rubrics, task, random.Random(f"{seed}/{kind}"))
    return rubrics


def there(faults: set[str]) -> set[str]:
    """What a faultless check reports: without `<E0>` nothing can be linked to it, and that alone is said."""
    return faults - {"unlinked"} if "no_answer" in faults else faults


# ------------------------------------------------------------------------------------------------------ measures


def tasks_of(count: int, seed: int = 0) -> list[Task]:
    """Half from the world of named starts, half from questions that describe."""
    world = build_world(WorldConfig(seed=seed, num_entities=4 * count, num_tasks=count))
    graph = build_graph(
        synthetic_source(WorldConfig(seed=seed + 1, num_entities=4 * count)), Settings(count // 2, 0, seed=seed)
    )
    named = [t for t in world.tasks if t.rubrics][: count - count // 2]
    return [*named, *graph.train]


def found_faults(tasks: Sequence[Task], rate: float, entities_known: bool, rounds: int = 5) -> dict[str, Any]:
    """Precision and recall per kind, and false alarms on faultless sets."""
    hits: dict[str, list[int]] = {kind: [0, 0, 0] for kind in FAULTS}
    clean = alarms = 0
    for turn in range(rounds):
        for task in tasks:
            faults = draw(task, random.Random(f"{turn}/{task.id}"), rate)
            rubrics = corrupt(task, faults, f"{turn}/{task.id}")
            names = gold_entities(task) if entities_known else []
            said = {p.kind for p in validate(rubrics, task.question, task.answers, names)}
            truth = there(faults)
            if not entities_known and "entity_leak" in truth:
                truth = truth - {"entity_leak"} | {"foreign"}
            clean += not truth
            alarms += bool(said) and not truth
            for kind, counts in hits.items():
                counts[0] += kind in said and kind in truth
                counts[1] += kind in said and kind not in truth
                counts[2] += kind in truth and kind not in said
    table = {
        kind: {
            "faulty": right + missed, "precision": _share(right, right + wrong), "recall": _share(right, right + missed),
        }
        for kind, (right, wrong, missed) in hits.items()
    }  # fmt: skip
    return {"kinds": table, "faultless sets": clean, "false alarms": _share(alarms, clean)}


def _share(part: int, whole: int) -> list[float] | None:
    """Share with its 95 % interval, or None of nothing."""
    if not whole:
        return None
    low, high = wilson(part, whole)[-2:]
    return [round(part / whole, 4), round(low, 4), round(high, 4)]


class ScriptedWriter:
    """A judge that writes rubrics with known faults and mends each it is told of with a known chance."""

    PHRASES: Mapping[str, str] = {
        "no_placeholder": "holds no label", "malformed": "not of the form", "repeated": "repeats", "no_answer": "no statement holds <E0>",
        "unlinked": "not linked", "compound": "more than one fact", "answer_leak": "does not give", "entity_leak": "does not give",
        "foreign": "does not give",
    }  # fmt: skip

    def __init__(self, tasks: Sequence[Task], rate: float, mend_rate: float) -> None:
        self._tasks = {t.question: t for t in tasks}
        self._rate, self._mend_rate = rate, mend_rate
        self.faults: dict[str, set[str]] = {}
        self._round: dict[str, int] = {}
        self.num_asked = 0

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.num_asked += 1
        task = self._tasks[request.fields["question"]]
        if task.id not in self.faults:
            self.faults[task.id] = draw(task, random.Random(task.id), self._rate)
        else:
            self._round[task.id] = self._round.get(task.id, 0) + 1
            rng = random.Random(f"{task.id}/{self._round[task.id]}")
            told = " ".join(request.fields["problems"])
            mended = {
                k for k in sorted(self.faults[task.id]) if self.PHRASES[k] in told and rng.random() < self._mend_rate
            }
            self.faults[task.id] -= mended
        return JudgeReply(Status.ok, {"rubrics": corrupt(task, self.faults[task.id], task.id)})


async def mended_faults(tasks: Sequence[Task], rate: float, mend_rate: float, rounds: int) -> dict[str, Any]:
    """The whole loop: what is accepted, and what of it still has a fault."""
    writer = ScriptedWriter(tasks, rate, mend_rate)
    with tempfile.TemporaryDirectory() as folder:
        entries = await build([Item(t) for t in tasks], writer, Path(folder) / "journal", Options(rounds))
    good = [e for e in entries if e.status in ACCEPTED]
    bad = [e for e in entries if e.status not in ACCEPTED]
    report = summary(entries)
    return {
        "questions": len(entries), "faulty first drafts": round(sum(bool(e.drafts[0]) for e in entries) / len(entries), 4),
        "made": report["made"], "mended": report["mended"], "refused": report["refused"],
        "accepted with a fault": _share(sum(bool(writer.faults[e.id]) for e in good), len(good)),
        "refused without one": _share(sum(not writer.faults[e.id] for e in bad), len(bad)),
        "calls per question": round(writer.num_asked / len(entries), 2),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ wording

ONE_FACT = (
    "<E1> is a fishing village on the north coast of the island <E2>.",
    "<E0> is the surname of the architect who designed <E3>.",
    "The museum <E2> and the library <E3> stand on the same square.",
    "<E1> was signed and sealed in <E2>.",
    "<E3> received an honorary degree from the University of Science and Technology in <E2>.",
    "<E0> held office between 1921 and 1925.",
    "<E1> is the largest lake by surface area in <E2>.",
    "<E2> composed music for the stage play <E1>.",
    "The bridge <E4> was closed to traffic for repairs.",
    "<E1> has a population of fewer than 5,000 people.",
    "<E5> married the daughter of a wool and cotton merchant.",
    "The novel <E1> was translated into more than 30 languages.",
    "<E2> grew up in a house with no running water and little heating.",
    "<E0> is the year in which <E1> opened to the public.",
    "At its peak, the company <E3> employed about 900 people.",
    "<E4> was named after a Dutch sailor.",
    "In its second season, the team <E1> lost the cup final.",
    "<E1> is listed as a monument of national importance.",
    "<E2> shares its name with a moon of Saturn.",
    "The founder of <E1> studied law before the war.",
    "<E3>, a former mining town, lies in <E2>.",
    "<E1> wrote a thesis about moss and lichen.",
    "Black and white stripes mark the flag of <E2>.",
    "<E0> is the middle name of <E1>'s younger sister.",
    "The battle took place near the village of <E1>.",
    "<E2> was awarded the prize jointly with <E3> and <E4>.",
    "<E1> ran aground off the coast of <E2> in a storm.",
    "<E5> is buried in the same cemetery as <E1>.",
    "The album <E1> was recorded, mixed and mastered in <E2>.",
    "The recipe of <E0> calls for dried and salted cod.",
)
MORE_FACTS = (
    "<E1> was born in a fishing village and became a bishop.",
    "<E2> designed <E3>, which opened to the public in 1921.",
    "<E1> studied law, then moved to <E2>.",
    "<E3> is a museum that stands in <E2> and was founded by <E1>.",
    "<E2>, who grew up in <E1>, composed <E3>.",
    "<E1> lies in <E2> but belonged to <E3> until 1921.",
    "<E4> closed its doors in 1921. It had employed 900 people.",
    "<E0> is a river; its source lies in <E1>.",
    "<E5> wrote a thesis on moss while he worked as a teacher.",
    "<E1> won the cup in its first season and lost the final in its second.",
    "The novel <E1> appeared in 1921, when its author was 40.",
    "<E2> was a chemist, and her sister <E3> was a painter.",
    "<E1> is the capital of <E2>, where the treaty was signed.",
    "<E3> married <E4> and they had five children.",
    "<E2> founded the company <E3> and served as its head for nine years.",
    "<E1> burned down in 1921 and was rebuilt by <E2>.",
    "<E0> has two towers and lies on a hill.",
    "<E4> left the army and later opened a shop.",
    "<E1>, whose father was a baker, ran for office in <E2>.",
    "<E2> played for <E3> although he never scored.",
    "<E3> is a lake with an island on which <E2> built a chapel, and the chapel still stands.",
    "<E1> taught at <E2> and at <E3>.",
    "<E5> is both the author of <E1> and the editor of <E2>.",
    "<E0> is a red, four-storey house designed by <E1> in 1921 for <E2>.",
    "Born in <E1>, <E2> died in <E3>.",
    "<E2> sailed to <E3>, losing two ships on the way.",
    "After leaving <E1>, <E2> joined <E3>.",
    "<E4> was elected mayor; the vote was later annulled.",
    "<E1> speaks five languages and plays the organ.",
    "<E3> directed <E1> and its sequel <E2>.",
)
LATER_ONE_FACT = (
    "<E1> ended its run as the best-selling and most reviewed board game of <E2>.",
    "The dictionary <E3> took more than twenty years to finish.",
    "<E0> and <E1> share a border.",
    "<E2> was founded by refugees who had fled <E1>.",
    "The father of <E2> owned a brewery.",
    "<E3> stood trial for forging bank notes.",
    "<E1> is the only person ever to have won both <E2> and <E3>.",
    "The lighthouse on <E1> was automated in 1988.",
    "<E0> appears on the back of a coin.",
    "<E4> opposed the plan to drain the marsh.",
    "<E2> lost an eye as a child.",
    "<E1> premiered at the festival of <E2> two years after its completion.",
    "Only nine copies of <E3> are known to exist.",
    "The doctoral adviser of <E2> was himself a student of <E1>.",
    "<E5> lived for some time under a false name.",
    "<E2> was the first woman to lead <E4>.",
    "The bird <E1> nests and feeds on the cliffs of <E2>.",
    "<E3> translated <E1> from Latin.",
    "<E1> covers an area of about 40 hectares and 3 ares.",
    "<E0> is the number of rooms in <E2>.",
)
LATER_MORE_FACTS = (
    "<E1> left school at 14 and took a job at <E2>.",
    "<E3> painted <E1> in 1790 and gave it to <E2>.",
    "The lighthouse on <E1> was built in 1840 and automated in 1988.",
    "<E2> emigrated to <E1>, where she opened a bakery.",
    "<E2> is a composer from <E1> who never married.",
    "<E4> resigned; nobody replaced him.",
    "<E1> was the capital until 1905, and it is still the largest city of <E2>.",
    "Although <E2> could not swim, he joined the navy.",
    "<E3> won three medals but retired early.",
    "<E2> speaks Latin. He translated <E1>.",
    "<E1> borders <E2> and exports tin.",
    "<E5>, a nephew of <E4>, inherited the estate and sold it.",
    "The film <E1> flopped, yet critics loved it.",
    "<E2> was educated at <E1> before moving to <E3>.",
    "<E0> is a lake which freezes in winter and which feeds the river <E1>.",
    "<E3> has a long neck and eats leaves.",
    "<E1> was sunk in 1915 with 300 people aboard, and its wreck was found in 1990.",
    "<E2>'s mother sang at <E1> and his father played there.",
    "<E4> drew the maps for <E1>; <E5> engraved them.",
    "Having lost the election, <E2> went into exile.",
)
"""Written when the rules stood, and not looked at to change them."""
SCOTS = "Which lake lies near the Scottish town where the engineer of a two-mile railway, opened in 1879, met the King of Norway?"
GIVEN = (
    (SCOTS, "<E1> is a town in Scotland."), (SCOTS, "The railway <E3> is 2 miles long."), (SCOTS, "<E2> met Norway's King."),
    (SCOTS, "The railway <E3> opened in 1879."), (SCOTS, "<E2> met the Norwegian monarch in <E1>."), (SCOTS, "Engineer <E2> built <E3>."),
    (SCOTS, "There is a lake <E0> near <E1>."), (SCOTS, "In 1879, the railway <E3> opened."), (SCOTS, "<E0> is a Lake near <E1>."),
    (SCOTS, "Near <E1> lies the lake <E0>."), (SCOTS, "Railway <E3> was the work of <E2>."), (SCOTS, "King <E4> of Norway met <E2>."),
)  # fmt: skip
NOT_GIVEN = (
    (SCOTS, "<E1> is Fort William."), (SCOTS, "<E2> met King Oscar of Norway."), (SCOTS, "The railway <E3> opened in May 1879."),
    (SCOTS, "<E3> is 3 miles long."), (SCOTS, "Oscar II was met by <E2>."), (SCOTS, "<E0> is a lake in the Highlands."),
    (SCOTS, "<E2> was a British engineer."), (SCOTS, "Loch Ness is near <E1> like <E0>."), (SCOTS, "<E3> crosses the river Tay."),
    (SCOTS, "The railway <E3> opened on 1 June 1879."), (SCOTS, "<E2>, born in 1820, built <E3>."), (SCOTS, "The railway <E3> is part of the nessline."),
)  # fmt: skip


def wording() -> dict[str, Any]:
    """Precision and recall of the two estimates on sentences by hand, and what they miss or wrongly report."""
    tests: dict[str, tuple[Callable[[Any], bool], Sequence[Any], Sequence[Any]]] = {
        "compound": (is_compound, ONE_FACT, MORE_FACTS),
        "compound, later sentences": (is_compound, LATER_ONE_FACT, LATER_MORE_FACTS),
        "foreign": (lambda pair: any(p.kind == "foreign" for p in validate([pair[1]], pair[0])), GIVEN, NOT_GIVEN),
    }
    out: dict[str, Any] = {}
    for kind, (reports, right, wrong) in tests.items():
        false = [s for s in right if reports(s)]
        missed = [s for s in wrong if not reports(s)]
        hits = len(wrong) - len(missed)
        text = [s if isinstance(s, str) else s[1] for s in (*false, *missed)]
        out[kind] = {
            "sentences": len(right) + len(wrong), "precision": _share(hits, hits + len(false)), "recall": _share(hits, len(wrong)),
            "false alarms": text[: len(false)], "missed": text[len(false) :],
        }  # fmt: skip
    return out


def measure(count: int) -> dict[str, Any]:
    """Everything, over about `count` questions."""
    tasks = tasks_of(count)
    figures: dict[str, Any] = {"questions": len(tasks), "fault rate per kind": RATE, "mend rate": MEND_RATE}
    figures["found, gold entities known"] = found_faults(tasks, RATE, True)
    figures["found, question and answer known"] = found_faults(tasks, RATE, False)
    for rounds in (0, 1, 2, 4):
        figures[f"loop, {rounds} rounds"] = asyncio.run(mended_faults(tasks, RATE, MEND_RATE, rounds))
    figures["wording"] = wording()
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=400, metavar="N", help="questions (400)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where rubrics.json goes")
    args = parser.parse_args(argv)
    write_result("rubrics", measure(args.tasks), args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
