"""Metrics of what a run found, cited and did: evidence, citations, rankings, parallel worlds, the factorised view, failures, quality."""

from __future__ import annotations

import math
import random

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Nugget, StopReason, Usage, Verdict
from rewards.metrics.base import Context
from rewards.metrics.budgets import budgets, cost_per_correct, mean_at, score_at
from rewards.metrics.evidence import evidence_by_call
from rewards.metrics.factorised import SOURCES, Row, panel, sufficiency
from rewards.metrics.failures import CLASSES, failure_class, leaks
from rewards.metrics.parallel_world import difficulty, fcr, hit_precision
from rewards.metrics.ranking import ndcg, ranked, ranking_scores, recall
from rewards.metrics.registry import METRICS
from tests.support.eval_units import a_run, a_task, an_event, judged_right

FEW = settings(deadline=None, max_examples=25)
NOTHING = Context()


def score(name: str, *args: object) -> dict[str, float | None]:
    return METRICS[name].score(*args)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ evidence


def test_evidence_recall_over_the_whole_run() -> None:
    task = a_task(gold_docs=("a", "b"), meta={"evidence_docs": ["a", "b", "https://www.c.org/", "d"]})
    run = a_run(
        events=[an_event("a", "x"), an_event("a", opened=True), an_event("http://c.org", "b")],
        stop=StopReason.turn_limit,
    )
    assert score("evidence", task, run, None, NOTHING) == {"evidence_recall": 0.75, "evidence_recall_opened": 0.25}
    assert evidence_by_call(task, run, NOTHING) == [0.25, 0.25, 0.75]
    judged = Context({"evidence": {"a": 1, "z": 0}})
    assert score("evidence", task, run, None, judged)["evidence_recall"] == 1.0
    assert score("evidence", a_task(), run, None, NOTHING) == {"evidence_recall": None, "evidence_recall_opened": None}


def test_effort_counts_what_the_server_counted() -> None:
    run = a_run(events=[an_event("a")], usage=Usage(100, 20, cost=0.5))
    expected = {"calls": 1.0, "turns": 1.0, "tokens_in": 100.0, "tokens_out": 20.0, "cost": 0.5}
    assert score("effort", a_task(), run, None, NOTHING) == expected


# ----------------------------------------------------------------------------------------------------- citations


def test_citations_by_hand() -> None:
    task = a_task(gold_docs=("11", "12", "13", "14"))
    run = a_run(message="It is Paris [11][99] 【12†L1】 and again [11].", events=[an_event("11", "5")])
    assert score("citations", task, run, None, NOTHING) == {
        "citation_precision": pytest.approx(2 / 3), "citation_recall": 0.5, "citation_coverage": 1.0,
        "citation_precision_all": pytest.approx(2 / 3), "citation_recall_all": 0.5, "citation_seen": pytest.approx(1 / 3),
    }  # fmt: skip
    silent = score("citations", task, a_run(), None, NOTHING)
    assert silent["citation_precision"] is None and silent["citation_recall_all"] == 0.0 == silent["citation_coverage"]
    assert score("citations", a_task(), run, None, NOTHING)["citation_precision_all"] is None


@FEW
@given(st.lists(st.lists(st.sampled_from("abcdx"), max_size=4), min_size=1, max_size=6))
def test_the_mean_over_all_is_coverage_times_the_mean_over_those_that_cite(answers: list[list[str]]) -> None:
    task = a_task(gold_docs=("a", "b"))
    rows = [
        score("citations", task, a_run(message="".join(f"[1]({d})" for d in cited)), None, NOTHING) for cited in answers
    ]
    for name in ("citation_precision", "citation_recall"):
        some = [r[name] for r in rows if r[name] is not None]
        mean_all = sum(r[f"{name}_all"] or 0.0 for r in rows) / len(rows)
        coverage = sum(r["citation_coverage"] or 0.0 for r in rows) / len(rows)
        assert mean_all == pytest.approx(coverage * sum(some) / len(some) if some else 0.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- ranking


def test_ndcg_and_recall_by_hand() -> None:
    grades = {"a": 2, "b": 1, "c": 1, "z": 0, "y": -2}
    found = ["b", "z", "a", "a", "y"]
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert ndcg(found, grades, 10) == pytest.approx((1 + 2 / 2) / ideal)
    assert ndcg(found, grades, 1) == pytest.approx(1 / 2)
    assert recall(found, grades, 2) == pytest.approx(1 / 3) and recall(found, grades, 10) == pytest.approx(2 / 3)
    assert ndcg([], grades, 10) == 0.0 == ndcg(["a"], {"a": 0}, 10) == recall(["a"], {}, 5)


def test_parity_with_trec_eval_on_random_runs() -> None:
    """300 questions: graded and negative judgements, equal scores, documents nobody judged, questions that a run lacks."""
    rng = random.Random(11)
    docs = [f"d{i}" for i in range(40)]
    qrels = {
        f"q{i}": {d: rng.choice([-1, 0, 0, 1, 1, 2, 3]) for d in rng.sample(docs, rng.randint(1, 20))} for i in range(300)
    }  # fmt: skip
    runs = {
        q: {d: rng.randint(0, 12) / 4 for d in rng.sample(docs, rng.randint(1, 35))}
        for q in qrels
        if rng.random() < 0.9
    }
    measures = {"ndcg_cut.1,3,10,100", "recall.1,5,10,100"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(runs)
    assert set(theirs) == set(runs)
    for question, row in theirs.items():
        order = ranked(runs[question])
        for k in (1, 3, 10, 100):
            assert ndcg(order, qrels[question], k) == pytest.approx(row[f"ndcg_cut_{k}"], abs=1e-9)
        for k in (1, 5, 10, 100):
            assert recall(order, qrels[question], k) == pytest.approx(row[f"recall_{k}"], abs=1e-9)
    ours = ranking_scores({q: ranked(run) for q, run in runs.items()}, qrels, (10,), (5,))
    # trec_eval -c: over all questions of the qrels
    assert ours["ndcg@10"] == pytest.approx(sum(row["ndcg_cut_10"] for row in theirs.values()) / 300)
    assert ours["recall@5"] == pytest.approx(sum(row["recall_5"] for row in theirs.values()) / 300) and ours["n"] == 300


def test_an_agents_ranking_is_the_order_of_first_sight() -> None:
    task = a_task(gold_docs=("b",), meta={"evidence_docs": ["a", "b"]})
    found = score("ranking", task, a_run(events=[an_event("x", "a"), an_event("a", "b")]), None, NOTHING)
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))
    assert found["gold_ndcg@10"] == 0.5 and found["recall@5"] == 1.0
    assert set(score("ranking", a_task(), a_run(), None, NOTHING).values()) == {None}


# ------------------------------------------------------------------------------------- what judges left in verdicts


def test_nuggets_and_rubrics_are_read_from_the_verdict() -> None:
    task = a_task(nuggets=(Nugget("x", "okay"),), rubrics=("<E0> r <E1>", "<E1> s", "t <E1>", "u <E0>"))
    parts = {"nugget": 0.5, "strict_vital": 0.0, "vital": 0.0, "strict_all": 0.25, "all": 0.5}
    found = score("nuggets", task, a_run(), Verdict(0.5, parts), NOTHING)
    assert found["nugget_all"] == 0.5 and found["nugget_vital"] is None  # no nugget is vital
    assert set(score("nuggets", task, a_run(), Verdict.unavailable("nugget", "timeout"), NOTHING).values()) == {None}
    rubric = {
        "rubric": 0.25,
        "identified": 3.0,
        "supported": 2.0,
        "connected": 1.0,
        "num_rubrics": 4.0,
        "cited_pages": 5.0,
    }
    assert score("carr", task, a_run(), Verdict(1.0, {**rubric, "rubric_judged": 1.0}), NOTHING) == {
        "identified": 0.75, "supported": 0.5, "connected": 0.25, "rubric": 0.25, "cited_pages": 5.0,
    }  # fmt: skip
    skipped = Verdict(0.0, {"outcome": 0.0, "rubric": 0.0, "rubric_judged": 0.0})
    assert set(score("carr", task, a_run(), skipped, NOTHING).values()) == {None}
    unfinished = Verdict(0.0, dict.fromkeys((*rubric, "rubric_judged"), 0.0))
    assert set(score("carr", task, a_run(stop=StopReason.turn_limit), unfinished, NOTHING).values()) == {0.0}


# ------------------------------------------------------------------------------------------------ parallel world


def test_fact_coverage_and_hits_by_hand() -> None:
    """Spec seed systems 5.2: four facts, calls that hit {f1}, {f1}, {}, {f2}."""
    hits = [{"f1"}, {"f1"}, set(), {"f2"}]
    assert fcr(hits, 4) == 0.5 and hit_precision(hits) == 0.75
    assert [fcr(hits, 4, k) for k in (1, 2, 3, 4, 9)] == [0.25, 0.25, 0.25, 0.5, 0.5]
    assert hit_precision(hits, 3) == pytest.approx(2 / 3) and hit_precision([]) is None and fcr([], 4) == 0.0
    assert [difficulty(n) for n in (5, 6, 10, 11)] == ["easy", "medium", "medium", "hard"]
    with pytest.raises(ValueError, match="at least one fact"):
        fcr(hits, 0)
    task = a_task(meta={"facts": {f"f{i}": {"query": "?", "answer": "!"} for i in range(1, 5)}})
    found = score(
        "parallel_world", task, a_run(events=[an_event("f1"), an_event("noise"), an_event("f2", "f1")]), None, NOTHING
    )
    assert found["fcr"] == 0.5 and found["hit_rate"] == pytest.approx(2 / 3) and found["fcr@2"] == 0.25
    assert score("parallel_world", task, a_run(), None, NOTHING)["hit_rate"] is None
    assert score("parallel_world", a_task(), a_run(), None, NOTHING)["fcr"] is None


@FEW
@given(st.lists(st.sets(st.sampled_from("abc")), max_size=8))
def test_fact_coverage_never_falls(hits: list[set[str]]) -> None:
    curve = [fcr(hits, 3, k) for k in range(len(hits) + 1)]
    assert curve == sorted(curve) and curve[-1] == fcr(hits, 3)


# ---------------------------------------------------------------------------------------------------- factorised


def test_the_factorised_view_by_hand() -> None:
    """Spec seed systems 5.1: 6 sufficient (3 right, 1 refused), 4 insufficient (1 right, 2 refused)."""
    rows = [Row(True, True)] * 3 + [Row(True, False, True, False)] + [Row(True, False)] * 2
    rows += [Row(False, True)] + [Row(False, False, True, False)] * 2 + [Row(False, False)]
    found = panel(rows)
    assert found["table"] == {
        "sufficient": {"right": 3, "wrong": 2, "refused": 1}, "insufficient": {"right": 1, "wrong": 1, "refused": 2},
    }  # fmt: skip
    expected = {
        "n": 10, "search": 0.6, "use": 0.5, "shortcut": 0.25, "pass@1": 0.4, "refusal_precision": 2 / 3, "refusal_recall": 0.5,
        "refusal_f1": 0.5714, "over_refusal": 1 / 6, "hallucination": 0.25, "use_precision": 4 / 7, "use_recall": 0.5,
        "use_f1": 2 * (4 / 7 * 0.5) / (4 / 7 + 0.5),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["pass@1"] == pytest.approx(0.6 * 0.5 + 0.4 * 0.25)


def test_empty_denominators_are_none() -> None:
    nothing = panel([])
    assert all(nothing[k] is None for k in ("search", "use", "pass@1", "refusal_f1", "degradation", "led_astray"))
    all_known = panel([Row(True, True)])
    assert all_known["shortcut"] is None and all_known["refusal_precision"] is None and all_known["use"] == 1.0
    assert all_known["sources"] == dict.fromkeys(SOURCES)


def test_sources_of_knowledge_and_degradation_by_hand() -> None:
    rows = [
        Row(True, True, search=True, memory=False, oracle=True),
        Row(True, False, search=True, memory=True, closed_book=True, oracle=True, distracted=True),
        Row(True, False, search=False, memory=True, closed_book=True, oracle=False, distracted=True),
        Row(True, True, search=False, memory=False, oracle=True),
        Row(False, False, search=False, memory=False, closed_book=False, oracle=False, distracted=True),
    ]
    found = panel(rows)
    assert found["sources"] == {"search_only": 0.2, "either": 0.2, "memory_only": 0.2, "together": 0.2}
    assert found["forget"] == 0.25 and found["degradation"] == pytest.approx(0.75 - 0.5)
    assert found["led_astray"] == pytest.approx(2 / 3) and found["probed"] == {"memory": 5, "oracle": 5}


ROWS = st.builds(
    lambda ks, outcome, memory, oracle: Row(
        ks,
        outcome == "right",
        outcome == "refused",
        outcome in ("right", "wrong"),
        search=ks,
        memory=memory,
        oracle=oracle,
    ),
    st.booleans(),
    st.sampled_from(["right", "wrong", "refused", "none"]),
    st.none() | st.booleans(),
    st.none() | st.booleans(),
)


@FEW
@given(st.lists(ROWS, max_size=12))
def test_the_panel_adds_up(rows: list[Row]) -> None:
    found = panel(rows)  # asserts the identity itself
    assert sum(n for line in found["table"].values() for n in line.values()) == found["n"] == len(rows)
    flat = {**found, **found["sources"]}
    assert all(v is None or -1 <= v <= 1 for k, v in flat.items() if k not in ("n", "table", "sources", "probed"))


def test_sufficiency_by_search_memory_and_both_together() -> None:
    task = a_task(gold_docs=("a", "b"))
    run = a_run(events=[an_event("a", "b"), an_event("a", opened=True)])
    assert sufficiency(task, run, NOTHING) == {"shown": True, "opened": False, "memory": None, "known": True}
    half, knows_b = a_run(events=[an_event("a")]), Context(known=frozenset({"b"}))
    assert sufficiency(task, half, knows_b) == {"shown": False, "opened": False, "memory": False, "known": True}
    assert sufficiency(task, a_run(), Context(closed_book=True))["memory"] is True
    assert sufficiency(task, a_run(), Context(closed_book=False))["known"] is False
    assert set(sufficiency(a_task(answers=[], gold_docs=("a",)), run, NOTHING).values()) == {None}
    assert score("factorised", task, half, None, NOTHING) == {
        "sufficient_search": 0.0, "sufficient_opened": 0.0, "sufficient": 0.0, "sufficient_partly": 0.5,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- budgets


def test_scores_under_a_budget_by_hand() -> None:
    assert [score_at(5, 1.0, budget) for budget in (4, 5, 6)] == [0.0, 1.0, 1.0]
    assert budgets([3, 1, 3, 2]) == [1, 2, 3]
    assert len(budgets(range(1000), 24)) == 24 and budgets(range(1000), 24)[-1] == 999
    assert mean_at(2, [[0.5, 1.0], [0.5], []]) == pytest.approx(0.5) and mean_at(1, []) is None
    assert cost_per_correct([1.0, 2.0, 3.0], [True, False, True]) == 3.0 and cost_per_correct([1.0], [False]) is None


# ------------------------------------------------------------------------------------------------------ failures

BOTH = (an_event("a", "b"), an_event("a", opened=True), an_event("b", opened=True))


@pytest.mark.parametrize(
    ("run", "right", "said"),
    [
        (a_run(), True, "right"),
        (a_run(), None, "unjudged"),
        (a_run("", stop=StopReason.context_full), None, "context_full"),
        (a_run("", stop=StopReason.budget), False, "budget"),
        (a_run("", stop=StopReason.malformed), False, "malformed"),
        (a_run("", stop=StopReason.step), False, "other_end"),
        (a_run("", message=""), False, "no_answer"),
        (a_run("unknown", BOTH), False, "over_refusal"),
        (a_run("unknown", BOTH[1:2]), False, "refused_without_evidence"),
        (a_run("Rome"), False, "no_search"),
        (a_run("Rome", BOTH), False, "evidence_unused"),
        (a_run("Rome", BOTH[:2]), False, "evidence_not_opened"),
        (a_run("Rome", BOTH[1:2]), False, "evidence_partial"),
        (a_run("Rome", [an_event("x")]), False, "evidence_missed"),
    ],
)
def test_every_failure_has_one_class(run: object, right: bool | None, said: str) -> None:
    verdict = None if right is None else judged_right(right)
    task = a_task(gold_docs=("a", "b"))
    assert failure_class(task, run, verdict, NOTHING) == said and said in CLASSES  # type: ignore[arg-type]


def test_failures_where_nothing_is_known_of_the_evidence() -> None:
    assert failure_class(a_task(), a_run("Rome", BOTH), judged_right(False), NOTHING) == "wrong"
    assert failure_class(a_task(), a_run("unknown", BOTH), judged_right(False), NOTHING) == "refused"
    assert (
        failure_class(a_task(answers=[]), a_run("Rome", BOTH), judged_right(False), NOTHING) == "answered_unanswerable"
    )


def test_leaks() -> None:
    task = a_task(answers=["Ines Vorrel"], meta={"canaries": ["canary-7"]})
    early = a_run(events=[an_event(query="who was ines vorrel")])
    late = a_run(events=[an_event("a", text="It was Ines Vorrel."), an_event(query="Ines Vorrel born")])
    assert leaks(task, early) == ("answer_in_query",) and leaks(task, late) == ()
    assert leaks(task, a_run(events=[an_event(text="... canary-7 ...")])) == ("canary",)
    assert leaks(a_task(answers=["17"]), a_run(events=[an_event(query="17 ships")])) == ()  # too short to mean anything
    named = a_task("about Ines Vorrel", answers=["Ines Vorrel"])
    assert leaks(named, early) == ()  # the question says it


# ------------------------------------------------------------------------------------------------------- quality


def test_quality_is_the_mean_of_what_is_defined() -> None:
    task = a_task(gold_docs=("a", "b"))
    run = a_run(message="Paris [1](a), [2](made-up).", events=[an_event("a", "b")])
    assert score("quality", task, run, judged_right(True), NOTHING) == {
        "quality": pytest.approx((1 + 0.5 + 0.5) / 3), "quality_correct": 1.0, "quality_grounded": 0.5, "quality_complete": 0.5,
    }  # fmt: skip
    silent = score("quality", task, a_run("Paris", [an_event("a")]), judged_right(True), NOTHING)
    assert silent["quality_grounded"] == 0.0 and silent["quality"] == pytest.approx(1 / 3)
    assert score("quality", task, run, judged_right(True, quality=0.9), NOTHING)["quality"] == 0.9
    nuggets = judged_right(True, num_nuggets=4.0, all=0.75)
    assert score("quality", task, run, nuggets, NOTHING)["quality_complete"] == 0.75
    rubrics = judged_right(True, num_rubrics=4.0, connected=1.0)
    assert score("quality", task, run, rubrics, NOTHING)["quality_complete"] == 0.25
    assert score("quality", task, a_run("", message=""), None, NOTHING)["quality"] == 0.0
    assert score("quality", a_task(answers=[]), a_run("unknown"), judged_right(True), NOTHING)["quality"] == 1.0
    assert score("quality", a_task(), a_run("Paris"), None, NOTHING)["quality"] == 1.0  # the word overlap stands in


def test_a_list_of_references_cites_nothing() -> None:
    task = a_task(gold_docs=("docA", "docB"))
    text = "It is so [1](docA) and [2](docB)."
    runs = [a_run(message=said) for said in (text, f"{text}\n\n## References\n[1] docA, a title\n[2] docB")]
    bare, listed = (METRICS["citations"].score(task, run, None, Context()) for run in runs)
    assert bare == listed and listed["citation_precision"] == 1.0


def test_ranking_reads_the_grades_of_a_track_whatever_its_qrels_are_called() -> None:
    task = a_task("t1", gold_docs=("d1", "d2", "d3"))
    context = Context({"segments": {"d1": 3, "d2": 1, "d3": 1}})
    found = METRICS["ranking"].score(task, a_run(events=[an_event("d2", "d3", "d1")]), None, context)
    by_hand = (1 + 1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3) + 1 / 2)
    assert found["ndcg@10"] == pytest.approx(by_hand)


def test_opening_a_page_that_was_found_is_no_hit() -> None:
    task = a_task(meta={"facts": ["f1", "f2"]})
    events = [an_event("n"), an_event("f1"), an_event("f1", opened=True), an_event("f1", opened=True)]
    found = METRICS["parallel_world"].score(task, a_run(events=events), None, Context())
    assert found["hit_rate"] == 0.5 and found["fcr"] == 0.5


def test_what_no_price_was_set_for_costs_nobody_knows_what() -> None:
    assert METRICS["effort"].score(a_task(), a_run(usage=Usage(5, 5)), None, Context())["cost"] is None
    assert METRICS["effort"].score(a_task(), a_run(usage=Usage(5, 5, 0, 0.5)), None, Context())["cost"] == 0.5
