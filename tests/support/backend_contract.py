"""What every retrieval backend must do, as tests that a class per backend inherits.

    class TestMine(BackendContract):
        @pytest.fixture
        def build(self): return ...     # a function: documents -> Backend

Backends are built by words (BM25) or by an encoder for which a text without words is no text; both find `corpus()`'s documents by the
words they hold. What a backend may decide for itself (how it stems, what a score is) is not asked.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import pytest

from agents.interfaces import Backend
from agents.types import Document, Hit, Query
from retrieval.errors import BadQuery, Closed

Build = Callable[[Iterable[Document]], Backend]
Make = Callable[..., Backend]

SPECIAL = Document(
    "https://example.org/a?b=c&d=1#e é", "Émile's Straße", 'Café "naïve" 東京 tower \U0001f680 x<y>&z \\ / \x7f tab\there',
    {"url": "https://example.org", "tags": ["a", 1, None, {"deep": True}], "é": 0.5},
)  # fmt: skip


def corpus(n: int = 60, seed: int = 0) -> list[Document]:
    """Documents of invented words; the ten called `tie..` are alike, and not in order."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choice("bdfgklmn") + rng.choice("aeiou") for _ in range(3)) for _ in range(150)]
    many = [Document(f"d{i}", rng.choice(vocabulary), " ".join(rng.choices(vocabulary, k=20))) for i in range(n - 11)]
    ties = [
        Document(f"tie{i}", "Zupero", "zupero wolaka the same in all of them") for i in (7, 3, 10, 1, 9, 2, 4, 8, 6, 5)
    ]
    return [*many[::2], *ties, SPECIAL, *many[1::2]]


class BackendContract:
    @pytest.fixture
    def build(self) -> Build:
        raise NotImplementedError

    @pytest.fixture
    async def make(self, build: Build) -> AsyncIterator[Make]:
        made: list[Backend] = []

        def make(documents: Iterable[Document] | None = None) -> Backend:
            made.append(build(corpus() if documents is None else documents))
            return made[-1]

        yield make
        for backend in made:
            await backend.close()

    async def test_hits_are_sorted_and_name_documents(self, make: Make) -> None:
        backend, documents = make(), corpus()
        ids = {d.id for d in documents}
        queries = [Query(d.title + " " + d.text[:40], k=1 + n % 9) for n, d in enumerate(documents)]
        results = await backend.search(queries)
        assert len(results) == len(queries)
        for query, hits in zip(queries, results, strict=True):
            assert 1 <= len(hits) <= query.k
            assert hits == ordered(hits)
            assert {h.doc_id for h in hits} <= ids and len({h.doc_id for h in hits}) == len(hits)
        assert backend.info().num_docs == len(documents)

    async def test_a_document_is_found_by_its_own_words(self, make: Make) -> None:
        backend = make()
        documents = [d for d in corpus() if d.id.startswith("d")][:20]
        results = await backend.search([Query(f"{d.title} {d.text}", k=3) for d in documents])
        assert sum(r[0].doc_id == d.id for r, d in zip(results, documents, strict=True)) >= 18
        (found,) = await backend.search([Query("東京 tower", k=1)])
        assert found[0].doc_id == SPECIAL.id

    async def test_equal_scores_are_ordered_by_id_also_at_the_edge(self, make: Make) -> None:
        backend = make()
        for k in (1, 4, 9, 10):
            (hits,) = await backend.search([Query("zupero wolaka", k=k)])
            assert [h.doc_id for h in hits] == sorted(f"tie{i}" for i in range(1, 11))[:k]

    async def test_k_beyond_the_corpus_gives_what_there_is(self, make: Make) -> None:
        backend = make()
        (hits,) = await backend.search([Query("zupero wolaka", k=10**9)])
        assert 10 <= len(hits) <= len(corpus()) and hits == ordered(hits)

    async def test_a_batch_gives_what_single_queries_give(self, make: Make) -> None:
        backend = make()
        queries = [Query(d.text, k=k) for k, d in enumerate(corpus()[:8], start=1)]
        queries += [queries[0], queries[0], Query("zupero", k=3)]
        results = await backend.search(queries)
        assert results == [(await backend.search([q]))[0] for q in queries]
        assert results[0] == results[8] == results[9]
        assert await backend.search([]) == []

    async def test_concurrent_calls_do_not_disturb_each_other(self, make: Make) -> None:
        backend = make()
        queries = [Query(d.title, k=4) for d in corpus()[:16]]
        alone = await backend.search(queries)
        calls = [backend.search([q]) for q in queries for _ in range(2)]
        pages = [backend.get([d.id]) for d in corpus()[:8]]
        *found, got = await asyncio.gather(*calls, asyncio.gather(*pages))
        assert [f[0] for f in found] == [hits for hits in alone for _ in range(2)]
        assert [page for (page,) in got] == corpus()[:8]

    @pytest.mark.parametrize("text", ["", " \n\t ", "?!", "*", "\u200b"])
    async def test_nothing_to_search_for_finds_nothing(self, make: Make, text: str) -> None:
        assert await make().search([Query(text), Query("zupero", k=1)]) == [
            [],
            [Hit("tie1", pytest.approx(0, abs=99), ANY)],
        ]

    async def test_any_characters_are_just_text(self, make: Make) -> None:
        backend = make()
        (plain,) = await backend.search([Query("zupero wolaka", k=10)])
        for text in (
            "+zupero -wolaka", '"zupero" "wolaka"', "(zupero) [wolaka}", "zupero && !wolaka", "zupero^9 ~ wolaka".replace("9", ""),
            "/zupero/ \\wolaka\\", "{{zupero}} <wolaka>", "zupero\x00 wolaka",
        ):  # fmt: skip
            assert (await backend.search([Query(text, k=10)]))[0] == plain, text
        odd = [
            "*:*",
            "_id:tie1 OR *",
            "\ud800 zupero",
            "\U0001f680" * 50,
            "a" * 5000,
            '{"query": {}}',
            "'; DROP TABLE",
            "\u202eabc",
        ]
        for hits in await backend.search([Query(text) for text in odd]):
            assert hits == ordered(hits)

    async def test_very_long_queries_are_answered(self, make: Make) -> None:
        words = [f"wolaka{i}" for i in range(2999)]
        (hits,) = await make().search([Query("zupero " + " ".join(words), k=10)])
        assert "tie1" in {h.doc_id for h in hits}

    async def test_pages_come_as_they_went_in(self, make: Make) -> None:
        backend, documents = make(), corpus()
        ids = [
            "nobody",
            documents[3].id,
            SPECIAL.id,
            "",
            documents[0].id,
            "x" * 3000,
            documents[3].id,
            "tie1 ",
            "a\x1f1",
            "\ud800",
        ]
        pages = await backend.get(ids)
        by_id = {d.id: d for d in documents}
        assert pages == [by_id.get(i) for i in ids]
        assert await backend.get([]) == []
        assert await backend.get([d.id for d in documents]) == documents

    async def test_what_cannot_be_served_is_refused(self, make: Make) -> None:
        backend = make()
        for k in (0, -1):
            with pytest.raises(BadQuery, match=f"k is {k}"):
                await backend.search([Query("zupero", k=k)])
        if "filters" not in backend.info().capabilities:
            with pytest.raises(BadQuery, match="no filters, got lang"):
                await backend.search([Query("zupero"), Query("zupero", filters={"lang": "en"})])

    async def test_fingerprint_changes_with_the_corpus_and_nothing_else(self, make: Make) -> None:
        first = make().info()
        assert make(reversed(corpus())).info() == first
        changed = [Document("d0", "other", "text") if d.id == "d0" else d for d in corpus()]
        assert make(changed).info().fingerprint != first.fingerprint

    async def test_close_is_final_and_may_be_repeated(self, make: Make) -> None:
        backend = make()
        await backend.search([Query("zupero")])
        await backend.close()
        await backend.close()
        with pytest.raises(Closed):
            await backend.search([Query("zupero")])
        with pytest.raises(Closed):
            await backend.get(["tie1"])


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY = _Any()


def ordered(hits: Sequence[Hit]) -> list[Hit]:
    """As hits must come: by score, best first, then by id."""
    return sorted(hits, key=lambda h: (-h.score, h.doc_id))
