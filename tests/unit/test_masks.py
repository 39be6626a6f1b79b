"""Masks of the answer: what no action of an agent may bring to light."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Document, Nugget, Task, ToolEvent
from envs.config import FaultConfig, GuardConfig, SandboxConfig
from envs.faults import FaultyBackend
from envs.guard import guard_of
from envs.masks import Names, Sight, folded, redacted
from envs.sandbox import Session
from retrieval.backend import BackendConfig, build_backend
from tests.support.sandbox_play import actions, backend, play, world

MASK = "[___]"


def guarded(
    how: str, task: Task, documents: list[Document] | None = None, faults: bool = False, **limits: Any
) -> Session:
    config = SandboxConfig(guard=GuardConfig(answer=how), **limits)
    shared = build_backend(BackendConfig(kind="bm25"), documents) if documents else backend()
    if faults:
        shared = FaultyBackend(shared, FaultConfig(stale=0.5, distractors=0.5, shuffled=0.3), task.id)
    return Session(shared, config, guard=guard_of(config, task))


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("Lomitave", "LOMITAVE's house", f"{MASK}'s house"),
        ("J. R. R. Tolkien", "by JRR TOLKIEN.", f"by {MASK}."),
        ("São Paulo", "SAO\u00a0PAULO, Sa\u0303o-Paulo!", f"{MASK}, {MASK}!"),
        ("Straße", "STRASSE 5", f"{MASK} 5"),
        ("New York", "in new\n  york", f"in {MASK}"),
        ("Ｐａｒｉｓ", "Parisian", f"{MASK}ian"),
        ("Li", "Li lives in Lima; li", f"{MASK} lives in Lima; {MASK}"),
        ("66", "66 tons in 1966", f"{MASK} tons in 1966"),
        ("1,234", "it has 1234.", f"it has {MASK}."),
        ("김소월", "김소월은 시인", f"{MASK}은 시인"),
        ("李白", "诗人李白生于", f"诗人{MASK}生于"),
        ("बिल", "बल और बिल", f"बल और {MASK}"),
        ("Lomi\u00adtave", "Lomi\u200btave", MASK),
        ("?!", "nothing?!", "nothing?!"),
        ("Lech Wałęsa", "Lech Walesa, LECH WAŁĘSA", f"{MASK}, {MASK}"),
        ("Søren", "Soren, Sǿren", f"{MASK}, {MASK}"),
        ("Aesir", "the Æsir", f"the {MASK}"),
        ("Lech Wałęsa", "see /wiki/Lech_Wa%C5%82%c4%99sa.", f"see /wiki/{MASK}."),
        ("Wałęsa", "/Wa%25C5%2582%25C4%2599sa", f"/{MASK}"),
        ("Beyoncé", "/Beyonc%E9", f"/{MASK}"),
        ("Li", "/%20Li%20x %4c%69", f"/%20{MASK}%20x {MASK}"),
        ("abacus", "100%abacus and 5% of ABACUS", f"100%{MASK} and 5% of {MASK}"),
    ],
)
def test_redaction_by_hand(name: str, text: str, shown: str) -> None:
    assert Names([name]).masked(text, MASK)[0] == shown


def test_a_name_that_closes_around_a_mask_is_masked_again() -> None:
    text, _, count = Names(["gupezo"]).masked("gupgupezoezo", MASK)
    assert (text, count) == (MASK, 2)


LETTERS = st.text(st.sampled_from("aAbÁß李 .-\u0301ｂ9"), max_size=30)


@given(LETTERS, LETTERS, st.integers(0, 30), st.integers(0, 30))
def test_masked_text_holds_no_name_and_spans_keep_their_passage(name: str, text: str, a: int, b: int) -> None:
    start, end = sorted((min(a, len(text)), min(b, len(text))))
    names = Names([name])
    masked, span, count = names.masked(text, MASK, (start, end))
    assert not names.spans(masked) and (count > 0) == bool(names.spans(text))
    plain = folded(name)[0]
    if len(plain) >= 4 and not plain.isdigit():
        assert plain not in folded(masked)[0]
    assert span is not None and 0 <= span[0] <= span[1] <= len(masked)
    outside = [i for i, c in enumerate(text) if not any(s <= i < e for s, e in names.spans(text))]
    if count == len(names.spans(text)):  # one round: every character that stays keeps its side of the span
        assert "".join(text[i] for i in outside if start <= i < end) == masked[slice(*span)].replace(MASK, "")


def test_the_span_of_a_hit_is_moved_with_the_text() -> None:
    text = "Lomitave sang. The mentor of Badokiru is Lomitave, they say."
    start = text.index("The")
    sight, count = redacted(Sight(Document("d", "Of Lomitave", text), (start, len(text))), Names(["lomitave"]), MASK)
    assert sight is not None and count == 3 and sight.document.title == f"Of {MASK}"
    assert sight.span and sight.document.text[slice(*sight.span)] == f"The mentor of Badokiru is {MASK}, they say."


def test_redact_paints_over_titles_dates_snippets_pages_and_finds() -> None:
    documents = [
        Document("a", "Life of LOMITAVE", "Gupezo: the mentor is Lómitave. " * 3, {"date": "Lomitave 3"}),
        Document("lomitave", "Gupezo", "Gupezo, too."),
        Document("b", "Gupezo", "Innocent Gupezo."),
    ]
    session = guarded("redact", Task("t", "Who?", ("Lomitave",)), documents)
    found, opened, match, own, unknown = play(
        session,
        [
            ("search", {"query": "Gupezo mentor"}),
            ("open", {"doc_id": "a"}),
            ("find", {"pattern": "mentor is"}),
            ("open", {"doc_id": "lomitave"}),
            ("open", {"doc_id": "gupezota"}),
        ],
    )
    assert {s.doc_id for s in found.seen} == {"a", "b"}
    assert opened.seen[0].title == f"Life of {MASK}" and opened.seen[0].date == f"{MASK} 3"
    assert opened.seen[0].text.count(MASK) == 3 and match.text.count(f"mentor is {MASK}") == 9
    assert own.error == unknown.error == "not_found", "that the answer's own page exists would confirm a guess"
    assert own.text.replace("lomitave", "*") == unknown.text.replace("gupezota", "*")
    assert session.journal.masked() == {("answer_redact", "a"): 10, ("answer_redact", "lomitave"): 2}


def texts(event: ToolEvent) -> list[str]:
    return [event.text, *(t for s in event.seen for t in (s.doc_id, s.title, s.text, s.date))]


TASK = next(t for t in world().tasks if len(t.gold_docs) == 3)


@settings(max_examples=60, deadline=None)
@given(actions(TASK), st.booleans())
def test_no_shown_text_holds_a_redacted_answer(calls: list[tuple[str, dict[str, Any]]], faults: bool) -> None:
    secret = Names(TASK.answers)
    for event in play(guarded("redact", TASK, faults=faults, snippet_chars=80), calls):
        if not event.error:  # a sentence about a mistake repeats what the agent itself wrote
            assert not any(secret.spans(text) for text in texts(event))


@settings(max_examples=60, deadline=None)
@given(actions(TASK))
def test_drop_never_shows_a_document_with_the_answer(calls: list[tuple[str, dict[str, Any]]]) -> None:
    holding = {d.id for d in world().documents if TASK.answers[0] in d.text + d.title}
    assert TASK.gold_docs[-1] in holding
    for event in play(guarded("drop", TASK), calls):
        assert not {s.doc_id for s in event.seen} & holding
        assert event.error or TASK.answers[0] not in event.text


ORACLE = dict((TASK.oracle or {})["entities"])
REVEALED = [ORACLE["E1"], ORACLE["E2"], ORACLE["E0"]]
"""By page of the chain: the name that it gives away. A name is also the id of the page about it."""


@settings(max_examples=60, deadline=None)
@given(actions(TASK, max_size=10), st.booleans())
def test_a_chain_never_shows_a_step_before_the_page_before_it_was_opened(
    calls: list[tuple[str, dict[str, Any]]], faults: bool
) -> None:
    done = 0
    for event in play(guarded("chain", TASK, faults=faults), calls):
        if event.call.name == "open" and not event.error and event.seen[0].doc_id in TASK.gold_docs:
            assert TASK.gold_docs.index(event.seen[0].doc_id) <= done
            done += event.seen[0].doc_id == TASK.gold_docs[min(done, 2)] and done < 3
        if not event.error:
            for name in REVEALED[done:]:
                assert not any(name in text for text in texts(event))


def test_a_chain_can_be_walked_to_its_end() -> None:
    session = guarded("chain", TASK)
    early = play(session, [("open", {"doc_id": TASK.gold_docs[2]})])[0]
    assert early.error == "not_found"
    for doc_id, name in zip(TASK.gold_docs, REVEALED, strict=True):
        hit, page = play(session, [("search", {"query": doc_id, "k": 5}), ("open", {"doc_id": doc_id})])
        assert doc_id in {s.doc_id for s in hit.seen} and name not in hit.text and name in page.text
    assert {rule for rule, _ in session.journal.masked()} == {"chain"}


def test_a_chain_whose_pages_are_the_hidden_entities_can_be_walked() -> None:
    documents = [
        Document("libfoo-dev", "libfoo-dev", "Depends on barlib."),
        Document("barlib", "barlib", "Kept by Lomitave. Depends on libfoo."),
        Document("other", "other", "barlib and libfoo were made by Lomitave."),
    ]
    oracle = {"entities": {"E1": "libfoo-dev", "E2": "barlib", "E0": "libfoo"}}
    task = Task("t", "Which package?", ("libfoo",), gold_docs=("libfoo-dev", "barlib"), oracle=oracle)
    session = guarded("chain", task, documents)
    calls = [("search", {"query": "depends made"}), ("open", {"doc_id": "libfoo-dev"}), ("open", {"doc_id": "other"})]
    found, first, other = play(session, calls)
    assert {s.doc_id: s.text for s in found.seen} == {
        "libfoo-dev": f"Depends on {MASK}.",
        "other": f"{MASK} and {MASK} were made by Lomitave.",
    }
    assert first.seen[0].text == "Depends on barlib." and other.seen[0].text.startswith(f"barlib and {MASK}")
    assert play(session, [("open", {"doc_id": "barlib"})])[0].seen[0].text.endswith("libfoo.")


@pytest.mark.parametrize("how", ["redact", "drop"])
@pytest.mark.parametrize(
    "doc_id", ["https://x.org/Wa%C5%82%C4%99sa", "https://x.org/?q=https%3A%2F%2Fy.org%2FWa%25C5%2582esa"]
)
def test_an_escaped_name_in_an_id_hides_the_page(how: str, doc_id: str) -> None:
    session = guarded(how, Task("t", "Who?", ("Wałęsa",)), [Document(doc_id, "Page", "He led the strike.")])
    found, opened = play(session, [("search", {"query": "strike"}), ("open", {"doc_id": doc_id})])
    assert not found.seen and opened.error == "not_found"


def test_a_chain_of_pages_without_names_for_ids_is_masked_by_its_statements() -> None:
    documents = [
        Document("https://x.org/1", "Alphaton", "Alphaton lies on the Betaburg road."),
        Document("https://x.org/2", "Betaburg", "Betaburg is twinned with Gammaville."),
        Document("x", "Side page", "Alphaton, Betaburg and Gammaville lie on one road."),
    ]
    stated = [{"subject": "<E1>", "object": "<E2>"}, {"subject": "<E2>", "object": "<E0>"}]
    oracle = {"entities": {"E1": "Alphaton", "E2": "Betaburg", "E0": "Gammaville"}, "statements": stated}
    pages = ("https://x.org/1", "https://x.org/2")
    nuggets = tuple(Nugget("said", doc_ids=(page,)) for page in pages)
    task = Task("t", "Which road?", ("Gammaville",), gold_docs=pages, oracle=oracle, nuggets=nuggets)
    side = ("open", {"doc_id": "x"})
    calls = [
        ("search", {"query": "road"}),
        side,
        ("open", {"doc_id": pages[0]}),
        side,
        ("open", {"doc_id": pages[1]}),
        side,
    ]
    found, *events = play(guarded("chain", task, documents), calls)
    assert {s.doc_id for s in found.seen} == {"x", pages[0]} and not any(
        n in found.text for n in ("Alpha", "Beta", "Gamma")
    )
    assert [e.seen[0].text for e in events] == [
        f"{MASK}, {MASK} and {MASK} lie on one road.",
        documents[0].text,
        f"Alphaton, Betaburg and {MASK} lie on one road.",
        documents[1].text,
        documents[2].text,
    ]
    unplaced = replace(task, nuggets=(), oracle={**oracle, "statements": []})
    first = play(guarded("chain", unplaced, documents), [("open", {"doc_id": pages[0]}), side])[1]
    assert first.seen[0].text == f"{MASK}, {MASK} and {MASK} lie on one road.", (
        "a name without a place waits for the end"
    )


def test_a_chain_without_an_oracle_masks_the_answer_until_the_last_page() -> None:
    documents = [
        Document("1", "One", "See two."),
        Document("2", "Two", "It is Lomitave."),
        Document("3", "X", "Lomitave"),
    ]
    session = guarded("chain", Task("t", "Who?", ("Lomitave",), gold_docs=("1", "2")), documents)
    events = play(session, [("open", {"doc_id": i}) for i in ("3", "2", "1", "2", "3")])
    assert [e.error for e in events] == ["", "not_found", "", "", ""]
    assert events[0].seen[0].text == MASK and "Lomitave" in events[3].text and "Lomitave" in events[4].text


def test_masks_must_not_spell_anything() -> None:
    for mask in ("", "[masked]", "█"):
        with pytest.raises(ValueError, match="mask"):
            GuardConfig(mask=mask)
    assert guard_of(SandboxConfig(guard=GuardConfig(answer="drop")), Task("t", "Unanswerable?")) is None
