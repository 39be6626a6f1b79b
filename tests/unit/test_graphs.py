"""Worlds from documents and triples: answers are unique, questions do not tell, evidence stands where it is said to."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.text import validate_rubrics, words
from agents.types import Document, JudgeRequest, Status, Task
from envs.graphs.builder import Built, Settings, Source, build, write
from envs.graphs.questions import Leaks
from envs.graphs.triples import (
    Graph,
    Phrases,
    Relation,
    Triple,
    TripleReport,
    WorldError,
    evidence_pattern,
    read_phrases,
    read_triples,
    value,
)
from envs.graphs.walks import Fact, Limits, OverBudget, Walk, draw_walk, pin_down, solutions
from envs.jsonl import JsonlWorldConfig, load_tasks
from retrieval.corpus import read_documents
from rewards.judges.rule import RuleJudge

NAMES = ("Abelone", "Bikuru", "Cendrix", "Dovami", "Ekpoto", "Fulgani", "Gwystra", "Hamuzi", "Ivorelle")
LOOSE = Limits(max_share=1.0, min_matches=1, max_open=50)


def tells(relation: str) -> str:
    return f"{{subject}} {relation} {{object}}."


PHRASES = Phrases(
    "person",
    "people",
    {
        r: Relation(tells(r), f"Whom does {{subject}} {r}?", f"Who {r} {{object}}?", tells(r))
        for r in ("admires", "paints", "wears")
    },
)


def source(facts: set[tuple[str, str, str]], names: tuple[str, ...] = NAMES) -> Source:
    """Facts by name; an object that is no name is a value."""
    listed = sorted(facts)
    text = {n: "\n\n".join(f"{s} {r} {o}." for s, r, o in listed if s == n) or "Nothing is known." for n in names}
    triples = [Triple(s, r, o if o in names else value(o), s) for s, r, o in listed]
    return Source("town", [Document(n, n, text[n]) for n in names], triples, PHRASES)


def town(seed: int = 0, people: int = 60) -> Source:
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = tuple(sorted({"".join(rng.sample(syllables, 4)).capitalize() for _ in range(people)}))
    facts = {(n, r, rng.choice(names)) for n in names for r in ("admires", "paints")}
    facts |= {(n, "wears", rng.choice(["red", "blue", "green", "grey"])) for n in names}
    return source({f for f in facts if f[0] != f[2]}, names)


def solve(task: Task, facts: set[tuple[str, str, str]]) -> set[tuple[str, ...]]:
    """Every assignment of names and values to the rubrics' placeholders, by trying all of them."""
    assert task.oracle is not None
    everything = sorted({s for s, _, _ in facts} | {o for _, _, o in facts})
    labels = sorted(task.oracle["entities"])
    wanted = [(s["subject"], s["sentence"].split()[1], s["object"]) for s in task.oracle["statements"]]
    found = set()
    for chosen in itertools.product(everything, repeat=len(labels)):
        filled = dict(zip((f"<{label}>" for label in labels), chosen, strict=True))
        if all((filled.get(s, s), r, filled.get(o, o)) in facts for s, r, o in wanted):
            found.add(chosen)
    return found


fact_sets = st.sets(
    st.tuples(
        st.sampled_from(NAMES[:6]), st.sampled_from(["admires", "paints"]), st.sampled_from([*NAMES[:6], "red", "blue"])
    ),
    min_size=4,
    max_size=16,
).map(lambda facts: {f for f in facts if f[0] != f[2]})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(fact_sets, st.integers(0, 3), st.sampled_from([(1,), (2,), (2, 3)]))
def test_brute_force_finds_the_recorded_answer_and_no_other(
    facts: set[tuple[str, str, str]], seed: int, hops: tuple[int, ...]
) -> None:
    wanted = Settings(tasks=4, held_out=0, hops=hops, seed=seed, attempts_per_task=20, limits=LOOSE)
    try:
        built = build(source(facts, NAMES[:6]), wanted)
    except WorldError:
        return
    for task in built.train:
        assert task.oracle is not None
        names = task.oracle["entities"]
        assert solve(task, facts) == {tuple(names[label] for label in sorted(names))}
        assert task.answers == (names["E0"],)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(fact_sets, st.data())
def test_solutions_are_those_of_brute_force(facts: set[tuple[str, str, str]], data: st.DataObject) -> None:
    made = source(facts, NAMES[:6])
    graph = Graph(made.documents, made.triples)
    ends = st.one_of(st.integers(0, 2), st.sampled_from(NAMES[:6]))
    query = data.draw(
        st.lists(st.builds(Fact, ends, st.sampled_from(["admires", "paints"]), ends), min_size=1, max_size=4)
    )
    variables = sorted({t for f in query for t in (f.subject, f.object) if isinstance(t, int)})
    nodes = {t.subject for t in made.triples} | {t.object for t in made.triples}
    triples = {(t.subject, t.relation, t.object) for t in made.triples}
    expected = set()
    for chosen in itertools.product(sorted(nodes), repeat=len(variables)):
        bound: dict[Any, str] = dict(zip(variables, chosen, strict=True))
        if all((bound.get(f.subject, f.subject), f.relation, bound.get(f.object, f.object)) in triples for f in query):
            expected.add(chosen)
    found = solutions(graph, query, limit=10**6, budget=10**6)
    assert sorted(tuple(s[v] for v in variables) for s in found) == sorted(expected)


def test_a_search_beyond_its_budget_says_so() -> None:
    made = town()
    with pytest.raises(OverBudget):
        solutions(
            Graph(made.documents, made.triples), [Fact(0, "admires", 1), Fact(1, "paints", 2)], limit=999, budget=10
        )


@pytest.fixture(scope="module")
def built() -> Built:
    return build(town(), Settings(tasks=30, held_out=10, seed=3, limits=LOOSE))


def test_every_task_is_whole(built: Built) -> None:
    texts = {d.id: d.text for d in built.documents}
    assert len(built.train) == 30 and built.held_out
    for task in (*built.train, *built.held_out):
        assert task.oracle is not None
        hidden = task.oracle["entities"].values()
        assert not {w for name in hidden for w in words(name)} & set(words(task.question))
        assert validate_rubrics(task.rubrics, task.answers) == []
        assert len(task.rubrics) == len(task.nuggets) == len(task.oracle["statements"])
        assert set(task.gold_docs) == {d for n in task.nuggets for d in n.doc_ids}
        for nugget in task.nuggets:
            assert nugget.text in texts[nugget.doc_ids[0]]
        assert [n.importance for n in task.nuggets].count("vital") == task.meta["hops"]


def test_held_out_answers_and_hidden_entities_are_never_trained_on(built: Built) -> None:
    def hidden(tasks: tuple[Task, ...]) -> set[str]:
        return {name for t in tasks for name in (t.oracle or {})["entities"].values()}

    assert not hidden(built.train) & hidden(built.held_out)


def test_the_same_source_and_seed_give_the_same_bytes(tmp_path: Path, built: Built) -> None:
    first = write(built, tmp_path / "a")
    second = write(build(town(), Settings(tasks=30, held_out=10, seed=3, limits=LOOSE)), tmp_path / "b")
    for file in ("corpus.jsonl.gz", "tasks.jsonl", "eval_tasks.jsonl", "manifest.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    other = build(town(), Settings(tasks=30, held_out=10, seed=4, limits=LOOSE))
    assert [t.question for t in other.train] != [t.question for t in built.train]
    with pytest.raises(WorldError, match="there already"):
        write(built, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_was_written_is_read_as_a_world(tmp_path: Path, built: Built) -> None:
    folder = write(built, tmp_path / "world")
    known = {d.id for d in read_documents(folder / "corpus.jsonl.gz")}
    files = JsonlWorldConfig(tasks=str(folder / "tasks.jsonl"), eval_tasks=str(folder / "eval_tasks.jsonl"))
    splits = load_tasks(files, known_ids=known)
    assert splits.train == built.train and splits.eval == built.held_out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["attempts"] == 30 + len(built.held_out) + sum(manifest["refused"].values())


def test_the_rule_judge_scores_a_right_message(built: Built) -> None:
    task = built.train[0]
    assert task.oracle is not None
    said = " ".join(n.text for n in task.nuggets) + f"\n\n## Exact Answer\n{task.answers[0]}"
    fields: dict[str, Any] = {"message": said, "labels": sorted(task.oracle["entities"])}
    judge = RuleJudge()
    reply = asyncio.run(judge.ask(JudgeRequest("carr_identify", fields, {}, task.oracle)))
    assert reply.status is Status.ok and reply.value is not None
    known = {label: name for label, name in reply.value.items() if name is not None}
    assert known.items() <= task.oracle["entities"].items() and known.get("E0") == task.answers[0]
    pages = [{"number": i, "text": d.text} for i, d in enumerate(built.documents) if d.id in task.gold_docs]
    keys = {f"S{i + 1}": i for i in range(len(task.rubrics))}
    support = {"rubric_indices": keys, "values": task.oracle["entities"], "pages": pages}
    reply = asyncio.run(judge.ask(JudgeRequest("carr_support", support, {}, task.oracle)))
    assert reply.value == dict.fromkeys(keys, True)


# --------------------------------------------------------------------------------------------------- the checks


def test_a_step_never_leads_through_a_hub() -> None:
    facts = {(n, "admires", "Abelone") for n in NAMES[1:]} | {("Abelone", "admires", "Bikuru")}
    made = source(facts)
    graph = Graph(made.documents, made.triples)
    limits = Limits(max_degree=3)
    for seed in range(40):
        walk = draw_walk(random.Random(seed), graph, "Cendrix", 1, PHRASES, limits, lambda node: True)
        assert walk is None
    assert draw_walk(random.Random(0), graph, "Cendrix", 1, PHRASES, Limits(), lambda node: True) is not None


def test_facts_that_may_be_true_count_against_uniqueness_but_are_never_asked() -> None:
    sure = Triple("Abelone", "paints", value("lakes"), "Abelone")
    maybe = Triple("Bikuru", "paints", value("lakes"), "Bikuru", usable=False)
    documents = [Document(n, n, f"{n} paints lakes.") for n in NAMES[:2]]
    graph = Graph(documents, [sure, maybe])
    assert len(solutions(graph, [Fact(0, "paints", value("lakes"))], limit=9, budget=99)) == 2
    assert graph.told(sure, PHRASES.of("paints")) and not graph.told(maybe, PHRASES.of("paints"))
    again = Graph(documents, [maybe, Triple(*[getattr(maybe, f) for f in ("subject", "relation", "object", "doc")])])
    assert again.objects("Bikuru", "paints")[value("lakes")].usable  # one sure source is enough


def test_constraints_are_as_few_as_will_do() -> None:
    facts = {("Abelone", "wears", "red"), ("Bikuru", "wears", "red"), ("Abelone", "paints", "lakes")}
    facts |= {("Abelone", "admires", "Cendrix"), ("Bikuru", "admires", "Dovami")}
    made = source(facts)
    graph = Graph(made.documents, made.triples)
    walk = Walk(("Abelone", "Cendrix"), (graph.objects("Abelone", "admires")["Cendrix"],))
    about = [(1.0, t) for t in made.triples if t.subject == "Abelone" and t.relation != "admires"]
    found = pin_down(random.Random(0), graph, walk, about, LOOSE)
    assert found is not None and [t.object for t in found] == [value("lakes")]
    assert pin_down(random.Random(0), graph, walk, [c for c in about if c[1].relation == "wears"], LOOSE) is None


@pytest.mark.parametrize(
    ("quoted", "hidden", "leaks"),
    [
        ("glass", "libglass2", True),  # the word stands within the name
        ("libglass2-dev", "libglass1", True),  # another version of it
        ("aquarium", "ruby-aquariums", True),
        ("aquarium", "fishtank", False),
        ("common", "tank-common", False),  # too many names have it
        ("gcc-multilib-mips", "gcc-multilib", True),  # half alike
    ],
)
def test_parts_of_hidden_names(quoted: str, hidden: str, leaks: bool) -> None:
    crowd = [Document(f"{a}-common", "", "x") for a in ("one", "two", "three", "four", "five")]
    graph = Graph([*crowd, Document(hidden, "", "x")], [])
    assert Leaks(graph).parts(quoted, [hidden]) is leaks


def test_names_are_found_however_they_are_spelt() -> None:
    graph = Graph([Document("p1", "Marie Curie", "x"), Document("fishtank", "", "x")], [])
    leaks = Leaks(graph)
    assert leaks.names("Who taught MARIE  curie?", ["p1"]) and leaks.names("What of p1?", ["p1"])
    assert leaks.names("Is it a fish tank?", ["fishtank"]) and not leaks.names("Is it a fish?", ["fishtank"])
    assert leaks.names("Is it named Red Deer?", [value("red deer")])


def test_a_fact_whose_evidence_is_not_in_its_document_is_never_used() -> None:
    made = town()
    silent = [Document(d.id, d.title, "Nothing is known of this one.") for d in made.documents]
    with pytest.raises(WorldError, match=r"evidence [1-9]"):
        build(Source("town", silent, made.triples, PHRASES), Settings(tasks=3, held_out=0, limits=LOOSE))


def test_a_question_that_a_document_repeats_is_dropped() -> None:
    made = town()
    plan = Settings(tasks=5, held_out=0, limits=LOOSE)
    told = build(made, plan).train[0]
    first, *others = made.documents
    gossip = Document(first.id, first.title, first.text + "\n\nSomebody asked: " + told.question)
    again = build(Source("town", [gossip, *others], made.triples, PHRASES), plan)
    assert told.question not in {t.question for t in again.train} and again.manifest["refused"]["overlap"] >= 1


def test_an_answer_that_is_most_often_right_is_refused() -> None:
    plan = Settings(tasks=40, held_out=0, hops=(1, 2), limits=Limits(max_share=0.1, min_matches=1, max_open=50))
    found = build(town(), plan)
    assert found.manifest["refused"]["guessable"] > 0
    assert not {t.answers[0] for t in found.train} & {"red", "blue", "green", "grey"}  # each is worn by about a quarter
    assert found.manifest["always_guessing_the_commonest"]["most"] <= 0.1


def test_evidence_is_matched_as_whole_names() -> None:
    pattern = evidence_pattern("{subject} depends on ...{object}", "tank", "foo")
    assert pattern.search("tank depends on foo.") and pattern.search("tank depends on bar, foo, baz.")
    assert not pattern.search("fish-tank depends on foo.") and not pattern.search(
        "tank depends on libfoo, foo-dev, foo.js."
    )


# -------------------------------------------------------------------------------------------------------- files

PAGES = [
    Document("c1", "Oslo", "Oslo lies in Norway."),
    Document("c2", "Norway", "Its capital is Oslo. Norway has 5 million people."),
    Document("c3", "Twin", "One."),
    Document("c4", "Twin", "Two."),
]


def test_triples_name_documents_by_id_or_title(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    rows: list[dict[str, object]] = [
        {"subject": "Oslo", "relation": "lies_in", "object": "c2"},
        {"subject": "c2", "relation": "people", "object": "5 million"},
        {"subject": "Oslo", "relation": "twin", "object": "Twin", "doc": "Norway"},
        {"subject": "Bergen", "relation": "lies_in", "object": "Norway"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = TripleReport()
    found = list(read_triples(file, PAGES, Phrases(), report))
    assert found == [
        Triple("c1", "lies_in", "c2", "c1"),
        Triple("c2", "people", value("5 million"), "c2"),
        Triple("c1", "twin", value("Twin"), "c2"),  # two documents have that title
    ]
    assert (report.rows, report.values, report.unknown) == (4, 2, 1) and "Bergen" in report.first_unknown
    table = tmp_path / "facts.tsv"
    table.write_text("Oslo\tlies_in\tc2\nc2\tpeople\t5 million\t\n")
    assert list(read_triples(table, PAGES, Phrases())) == found[:2]
    graph = Graph(PAGES, found)
    assert graph.told(found[0], Phrases().of("lies_in")) == "{object}"
    elsewhere = Triple("c1", "capital of", "c2", "c2")  # another's page has to name both
    assert graph.told(elsewhere, Phrases().of("capital of")) == "{subject}...{object}"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"subject": "c1", "relation": "r"}', "a.jsonl:1: an empty or missing field"),
        ("a.jsonl", "[1]", "expected a JSON object, got list"),
        ("a.jsonl", '{"subject": "c1", "relation": "r", "object": "c2", "docs": "c1"}', "'docs' is not known"),
        ("a.jsonl", "\n{", "a.jsonl:2"),
        ("a.tsv", "c1\tr", "2 columns"),
        ("a.csv", "c1,r,c2", "not of a known form"),
    ],
)
def test_a_broken_triples_file_is_one_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(WorldError) as refused:
        list(read_triples(tmp_path / name, PAGES, Phrases()))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_relations_without_a_wording_get_a_plain_one() -> None:
    relation = Phrases("city", "cities").of("sister_city")
    assert relation.says == "The sister city of {subject} is {object}."
    assert relation.asks_subject == "Which city has {object} as its sister city?"


def test_phrases_are_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "phrases.yaml"
    file.write_text(
        'noun: city\nnouns: cities\nrelations:\n  in: {says: "{subject} lies in {object}.", uses: [step]}\n'
    )
    phrases = read_phrases(file)
    assert (phrases.noun, phrases.nouns) == ("city", "cities")
    assert phrases.of("in").says == "{subject} lies in {object}." and phrases.of("in").uses == ("step",)
    for broken, says in (
        ("relations: {in: {say: x}}", "did you mean 'says'?"),
        ("relations: {in: {says: '{subject} lies'}}", "says lacks {object}"),
        ("relations: {in: {uses: [walk]}}", "known: step, answer, describe"),
        ("relations: {in: {says: 3}}", "says is 3, expected a text"),
        ("relations: {in: {uses: step}}", "expected a list"),
        ("- a", "expected a mapping"),
        ("a: [", "cannot be read"),
    ):
        file.write_text(broken)
        with pytest.raises(WorldError) as refused:
            read_phrases(file)
        assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_rule_judge_tells_apart_whom_a_relation_of_many_holds_of() -> None:
    told = {"sentence": "{subject} depends on {object}.", "evidence": "{subject} depends on ...{object}"}
    oracle = {
        "entities": {"E1": "fish-tank", "E2": "libc++1", "E0": "Debian Games Team"},
        "statements": [
            {"subject": "<E1>", "object": "zlib1g", **told},
            {"subject": "<E1>", "object": "<E2>", **told},
            {
                "subject": "<E2>",
                "object": "<E0>",
                "sentence": "{subject} is kept by {object}.",
                "evidence": "kept by {object}",
            },
        ],
    }
    message = "fish-tank depends on zlib1g. fish-tank depends on libc++1. libc++1 is kept by Debian Games Team."
    judge, labels = RuleJudge(), ["E0", "E1", "E2"]
    fields: dict[str, Any] = {"message": f"{message}\n\n## Exact Answer\nDebian Games Team", "labels": labels}
    reply = asyncio.run(judge.ask(JudgeRequest("carr_identify", fields, {}, oracle)))
    assert reply.value == oracle["entities"]
    pages = [
        {"number": 1, "title": "fish-tank", "url": "u", "text": "fish-tank depends on zlib1g, libc++1-dev, libc++1."},
        {"number": 2, "title": "libc++1", "url": "v", "text": "It is kept by Debian Games Team."},
    ]
    support: dict[str, Any] = {
        "values": oracle["entities"],
        "rubric_indices": {"S1": 0, "S2": 1, "S3": 2},
        "pages": pages,
    }
    reply = asyncio.run(judge.ask(JudgeRequest("carr_support", support, {}, oracle)))
    assert reply.value == {"S1": True, "S2": True, "S3": True}
    pages[0]["text"], pages[1]["title"] = "fish-tank depends on zlib1g, libc++1-dev.", "libc++2"  # near, but not it
    reply = asyncio.run(judge.ask(JudgeRequest("carr_support", support, {}, oracle)))
    assert reply.value == {"S1": True, "S2": False, "S3": False}
