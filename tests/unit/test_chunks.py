"""Cutting texts: passages cover the text, overlap as asked, end where people end."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.chunks import ChunkConfig, passages

TEXTS = st.text(st.sampled_from("ab.!?。 \n\t\"')é\U0001f600"), max_size=300)


@st.composite
def configs(draw: st.DrawFn) -> ChunkConfig:
    size = draw(st.integers(1, 40))
    return ChunkConfig(draw(st.sampled_from(["words", "characters"])), size, draw(st.integers(0, size // 2)))


def count(text: str, unit: str) -> int:
    return len(text) if unit == "characters" else len(re.findall(r"\S+", text))


@given(TEXTS, configs())
def test_passages_cover_the_text_and_overlap_as_asked(text: str, config: ChunkConfig) -> None:
    found = passages(text, config)
    assert found[0][0] == 0 and found[-1][1] == len(text)
    assert all(start < end for start, end in found) or not text
    for (_, end), (start, next_end) in pairwise(found):
        assert start <= end < next_end
        assert count(text[start:end], config.unit) == config.overlap
    assert all(count(text[start:end], config.unit) <= config.size for start, end in found)
    if not config.overlap:
        assert "".join(text[start:end] for start, end in found) == text


def cut(text: str, unit: str, size: int, overlap: int = 0) -> list[str]:
    return [text[start:end] for start, end in passages(text, ChunkConfig(unit, size, overlap))]


def test_by_hand() -> None:
    assert cut("one two three four five", "words", 2) == ["one two ", "three four ", "five"]
    assert cut("one two three four five", "words", 3, 1) == ["one two three ", "three four five"]
    assert cut("abcdef", "characters", 4, 1) == ["abcd", "def"]
    assert (
        cut("short", "words", 10) == ["short"]
        and cut("", "words", 10) == [""]
        and cut("as it is", "none", 1) == ["as it is"]
    )


def test_a_cut_goes_to_the_end_of_a_paragraph_then_sentence_then_word_when_one_is_near() -> None:
    text = "a b c d e f g h. i\n\nj k l m n o p q r s t"
    assert cut(text, "words", 10)[0] == "a b c d e f g h. i\n\n"
    assert cut(text.replace("\n\n", " "), "words", 10)[0] == "a b c d e f g h. "
    assert cut(text.replace("\n\n", " ").replace(".", ""), "words", 10)[0] == "a b c d e f g h i j "
    # a sentence that ends in the first half of a passage is not near its end
    assert cut("a. b c d e f g h i j k l", "words", 10)[0] == "a. b c d e f g h i j "
    assert cut("The first one. The second", "characters", 16)[0] == "The first one. "
    assert cut("wordwordword another", "characters", 14)[0] == "wordwordword "
    assert cut("東京は首都です。大阪は都市です。", "characters", 9)[0] == "東京は首都です。"


def test_settings_that_cannot_work_are_refused() -> None:
    for settings, says in (
        (("pages", 10, 0), "one of none, words, characters"),
        (("words", 0, 0), "at least 1"),
        (("words", 10, 6), "0 to 5"),
    ):
        with pytest.raises(ValueError, match=says):
            ChunkConfig(*settings)
