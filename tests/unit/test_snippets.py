"""Snippets: the best passage, and never more than the limits allow."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import passages
from retrieval import snippets
from retrieval.analysis import stems
from retrieval.snippets import MODES, lead, one_line, snippet, window

TEXT = (
    "Filler words come first. " * 30
    + "The rival of Badokiru is Gupezo. It rains there. "
    + "More filler follows here. " * 30
)


def count(text: str) -> int:
    """A tokenizer that cuts words into pieces of three letters."""
    return sum(-(-len(w) // 3) for w in text.split())


def test_the_window_is_where_the_rare_words_of_the_query_are() -> None:
    assert "The rival of Badokiru is Gupezo." in snippet(TEXT, "who is the rival of Badokiru, filler?", 60)
    assert snippet(TEXT, "Badokiru", 60, mode="lead") == "Filler words come first. Filler words come first."
    assert snippet(TEXT, "unrelated", 60) == snippet(TEXT, "", 60, mode="lead")


@given(
    st.lists(st.sampled_from(["ab", "cd.", "e", "x" * 9, "ab!", "cd"]), max_size=60).map(" ".join),
    st.sampled_from(["ab", "ab cd", "ab cd e", "x" * 9 + " cd"]),
    st.integers(1, 60),
)
def test_the_window_holds_the_most_telling_words(text: str, query: str, limit: int) -> None:
    hits = [hit for hit in stems(text) if hit[2] in query.split()]
    weight = {term: 1.0 / sum(t == term for _, _, t in hits) for _, _, term in hits}

    def score(begin: int) -> float:
        return sum(weight[t] for t in sorted({t for s, e, t in hits if begin <= s and e <= begin + limit}))

    begins = [0, *(m.end() for m in re.finditer(r"[.!?] +", text))]
    starts = [max((b for b in begins if b <= s), default=0) for s, _, _ in hits]
    passages = [b if s - b <= limit // 2 else s for b, (s, _, _) in zip(starts, hits, strict=True)]
    best = max(passages, key=score, default=0)
    assert window(text, query, limit) == (lead(text[best:], limit) if len(text) > limit else text)


def test_the_passage_that_the_index_found_is_what_is_shown() -> None:
    start = TEXT.index("It rains")
    assert snippet(TEXT, "Badokiru", 300, span=(start, start + 16)) == "It rains there."
    assert snippet(TEXT, "rains", 8, span=(start, start + 16)) == "It rains"
    for empty in ((5, 5), (9, 2), (10**6, 10**6 + 5), (-9, -1), None):
        assert snippet(TEXT, "Badokiru", 60, span=empty) == snippet(TEXT, "Badokiru", 60)


def test_a_token_budget_moves_the_window_rather_than_cutting_its_end() -> None:
    shown = snippet(TEXT, "rival Badokiru", 200, max_tokens=14, count_tokens=count)
    assert shown == "The rival of Badokiru is Gupezo."
    assert count(shown) <= 14 < count(snippet(TEXT, "rival Badokiru", 200))
    assert snippet(TEXT, "rival", 200, max_tokens=1, count_tokens=lambda text: 5) == ""
    assert snippet(TEXT, "rival", 0) == ""


@given(
    st.text(st.sampled_from("ab cd.e!\n。東'"), max_size=300) | st.just(TEXT),
    st.text(st.sampled_from("ab cd東"), max_size=10),
    st.integers(1, 120),
    st.integers(0, 40),
    st.none() | st.tuples(st.integers(0, 300), st.integers(0, 300)),
    st.sampled_from(MODES),
)
def test_snippets_keep_their_limits_are_of_the_text_and_stay_as_they_are(
    text: str, query: str, max_chars: int, max_tokens: int, span: tuple[int, int] | None, mode: str
) -> None:
    limits = {"mode": mode, "max_tokens": max_tokens, "count_tokens": count}
    shown = snippet(text, query, max_chars, span=span, **limits)  # type: ignore[arg-type]
    assert len(shown) <= max_chars
    assert not max_tokens or count(shown) <= max_tokens
    assert shown in one_line(text)
    assert snippet(shown, query, max_chars, **limits) == shown  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lead", "one_line", "window"])
def test_the_sandbox_uses_the_same_functions(name: str) -> None:
    assert getattr(passages, name) is getattr(snippets, name)
