"""A second look at the first hits: the order, the passages, the models, the servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from agents.types import BackendInfo, Document, Hit, Query
from retrieval.deadline import time_limit
from retrieval.errors import BadQuery, Closed, DeadlineExceeded, RetrievalError
from retrieval.hybrid import HybridBackend, HybridConfig
from retrieval.rerank import CrossEncoder, EndpointScorer, RerankConfig, RerankedBackend, make_scorer
from retrieval.service import SearchService


class Pages:
    """A backend that finds its documents in order of id."""

    def __init__(self, texts: dict[str, str], span: tuple[int, int] | None = None) -> None:
        self.texts, self.span = texts, span
        self.asked: list[int] = []
        self.closed = False

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.asked += [q.k for q in queries]
        hits = [Hit(i, 1.0, self.span) for i in sorted(self.texts)]
        return [hits[: q.k] if q.text else [] for q in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        return [Document(i, f"t{i}", self.texts[i]) if self.texts[i] != "lost" else None for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo("pages", len(self.texts), "print", ("exact",))

    async def close(self) -> None:
        self.closed = True


class CountsAs:
    """Scores a passage by how often it holds the query."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.closed = False

    async def score(self, query: str, passages: Sequence[str]) -> list[float]:
        self.read += passages
        return [float(p.count(query)) for p in passages]

    async def close(self) -> None:
        self.closed = True

    def spec(self) -> dict[str, Any]:
        return {"kind": "counts"}


async def test_the_first_hits_come_by_score_and_ties_by_id() -> None:
    inner, scorer = (
        Pages({"a": "x", "b": "cat cat", "c": "cat", "d": "cat cat", "e": "lost", "f": "cat cat cat"}),
        CountsAs(),
    )
    backend = RerankedBackend(inner, RerankConfig("m", depth=5), scorer)
    found, none, more = await backend.search([Query("cat", k=3), Query("", k=3), Query("cat", k=6)])
    # f lies below the depth of the first query, and e has no page to read
    assert [(h.doc_id, h.score) for h in found] == [("b", 2.0), ("d", 2.0), ("c", 1.0)]
    assert none == [] and [h.doc_id for h in more] == ["f", "b", "d", "c", "a"]
    assert inner.asked == [5, 5, 6]
    with pytest.raises(BadQuery, match="k is 0"):
        await backend.search([Query("cat", k=0)])
    assert await backend.search([]) == [] and (await backend.get(["a"]))[0] == Document("a", "ta", "x")
    await backend.close()
    assert inner.closed and scorer.closed


async def test_the_passage_that_was_found_is_what_is_read() -> None:
    long = "start. " + "filler " * 3000 + "the cat sat. " + "filler " * 3000
    scorer = CountsAs()
    await RerankedBackend(Pages({"a": long}), RerankConfig("m", max_length=100), scorer).search([Query("cat")])
    assert "cat" in scorer.read[0] and scorer.read[0].startswith("ta\n") and len(scorer.read[0]) <= 403
    await RerankedBackend(Pages({"a": long}, (0, 6)), RerankConfig("m"), scorer).search([Query("cat")])
    assert scorer.read[1] == "ta\nstart."


async def test_long_pages_are_read_beside_the_event_loop_and_no_longer_than_wanted() -> None:
    pages = Pages({f"p{i}": " ".join(f"word{j % 700} cat{j % 13}." for j in range(6000)) for i in range(30)})
    scorer = CountsAs()
    backend = RerankedBackend(pages, RerankConfig("m"), scorer)
    asked = asyncio.create_task(backend.search([Query("word3 cat5")]))
    turns = 0
    while not asked.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 3 and len(scorer.read) == 30
    with time_limit(0.05), pytest.raises(DeadlineExceeded):
        await backend.search([Query(f"word{i} cat5") for i in range(20)])
    await backend.close()
    assert len(scorer.read) == 30


async def test_what_a_degraded_hybrid_found_is_not_kept_below_a_reranker_either() -> None:
    class Down(Pages):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            if self.texts["b"] == "down":
                raise RetrievalError("down")
            return await super().search(queries)

    legs = {"x": Pages({"a": "cat"}), "y": Down({"b": "down"})}
    hybrid = HybridBackend(legs, HybridConfig(legs=["x", "y"], degrade=True), Pages({"a": "cat", "b": "cat"}))
    service = SearchService(RerankedBackend(hybrid, RerankConfig("m"), CountsAs()))
    assert [h.doc_id for h in (await service.search([Query("cat")]))[0]] == ["a"]
    legs["y"].texts["b"] = "cat"
    assert [h.doc_id for h in (await service.search([Query("cat")]))[0]] == ["a", "b"]
    assert service.stats()["degraded"] == 1
    await service.close()


def test_the_fingerprint_covers_backend_and_scorer() -> None:
    def of(config: RerankConfig, texts: str = "ab") -> str:
        return RerankedBackend(Pages(dict.fromkeys(texts, "")), config, CountsAs()).info().fingerprint

    assert of(RerankConfig("m")) == of(RerankConfig("m", batch_size=1)) != of(RerankConfig("m", depth=3))
    info = RerankedBackend(Pages({"a": ""}), RerankConfig("m"), CountsAs()).info()
    assert (info.name, info.num_docs, info.capabilities) == ("pages+rerank", 1, ())


# ------------------------------------------------------------------------------------------------------ models


def tiny_bert(folder: Path, labels: int = 1) -> Path:
    """A BERT that scores a pair by its weights: random, but for a head that is known."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "fish", "bird", "ta", "tb", "tc", "td"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": labels,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape))
    model.save_pretrained(folder)
    return folder


async def test_a_cross_encoder_orders_as_its_own_forward_pass_does(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = {"a": "cat", "b": "dog dog fish bird", "c": "fish bird", "d": "bird cat dog"}
    backend = RerankedBackend(Pages(texts), RerankConfig(str(folder), max_length=12, batch_size=3))
    found = (await backend.search([Query("dog", k=4)]))[0]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.inference_mode():  # one at a time, without padding
        expected = {
            i: float(
                model(**tokenizer("dog", f"t{i} {text}", return_tensors="pt", truncation=True, max_length=12)).logits
            )
            for i, text in texts.items()
        }
    assert [h.doc_id for h in found] == sorted(texts, key=lambda i: -expected[i])
    assert [h.score for h in found] == pytest.approx([expected[h.doc_id] for h in found], abs=1e-5)
    both = await backend.search([Query("cat", k=2), Query("dog", k=4)])
    assert both[1] == found
    assert len(backend.info().fingerprint) == 32
    await backend.close()
    with pytest.raises(Closed):
        await backend.search([Query("dog")])


async def test_a_model_with_yes_and_no_is_asked_in_words(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<pad>", "<unk>", "yes", "no", "cat", "dog", "ta", "tb", "Query", "Document", "Instruct"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), intermediate_size=16, **shape)).eval()
    model.save_pretrained(tmp_path)
    scorer = CrossEncoder(RerankConfig(str(tmp_path)))
    scores = await scorer.score("cat", ["ta cat dog", "tb"])
    from retrieval.rerank import _AFTER, _BEFORE, _INSTRUCTION

    for passage, score in zip(["ta cat dog", "tb"], scores, strict=True):
        asked = f"{_BEFORE}<Instruct>: {_INSTRUCTION}\n<Query>: cat\n<Document>: {passage}{_AFTER}"
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer.encode(asked)])).logits[0, -1]
        assert score == pytest.approx(float(logits[2] - logits[3]), abs=1e-5)
    assert scores[0] != scores[1]
    await scorer.close()


async def test_models_that_cannot_rank_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "three", labels=3)
    with pytest.raises(RetrievalError, match=r"has 3 labels; a cross-encoder that ranks has 1"):
        await CrossEncoder(RerankConfig(str(folder))).score("q", ["p"])
    (folder / "config.json").write_text("{}")
    with pytest.raises(RetrievalError, match=r"rerank\.model .* cannot be loaded") as caught:
        await CrossEncoder(RerankConfig(str(folder))).score("q", ["p"])
    assert "\n" not in str(caught.value)
    folder = folder.rename(tmp_path / "my-encoder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RetrievalError, match=r"^rerank model .*/my-encoder holds no safetensors weights"):
        CrossEncoder(RerankConfig(str(folder)))
    with pytest.raises(RetrievalError, match=r"^rerank\.model \./nowhere is not a folder"):
        make_scorer(RerankConfig("./nowhere"))


# ----------------------------------------------------------------------------------------------------- servers


def endpoint(
    answer: Callable[[dict[str, Any]], Any], status: int = 200, **settings: Any
) -> tuple[EndpointScorer, list[Any]]:
    """A scorer of a server that answers so, and the requests it got."""
    got: list[Any] = []

    def reply(request: httpx.Request) -> httpx.Response:
        got.append((str(request.url), json.loads(request.content), request.headers.get("authorization")))
        return httpx.Response(status, json=answer(got[-1][1]))

    config = RerankConfig(**{"url": "http://rank.test:1/v1/", "model": "m", **settings})
    return EndpointScorer(config, httpx.MockTransport(reply)), got


async def test_servers_are_asked_as_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_KEY", "s3cret")

    def cohere(body: dict[str, Any]) -> Any:
        return {"results": [{"index": i, "relevance_score": len(d)} for i, d in enumerate(body["documents"])][::-1]}

    scorer, got = endpoint(cohere, api_key_env="RANK_KEY", batch_size=2)
    assert await scorer.score("q", ["aaa", "b", "cc"]) == [3.0, 1.0, 2.0]
    assert sorted(body["documents"] for _, body, _ in got) == [["aaa", "b"], ["cc"]]
    assert {(url, key) for url, _, key in got} == {("http://rank.test:1/v1/rerank", "Bearer s3cret")}
    assert got[0][1]["model"] == "m" and "s3cret" not in json.dumps(scorer.spec())
    await scorer.close()

    scorer, got = endpoint(lambda body: [{"index": 1, "score": 0.5}, {"index": 0, "score": 0.1}], api="tei")
    assert await scorer.score("q", ["a", "b"]) == [0.1, 0.5]
    assert got == [("http://rank.test:1/v1/rerank", {"query": "q", "texts": ["a", "b"], "truncate": True}, None)]
    await scorer.close()


@pytest.mark.parametrize(
    ("answer", "status", "problem"),
    [
        ({"error": "no such model"}, 404, "answers 404: no such model; check rerank.model"),
        ({"results": [{"index": 0, "relevance_score": 1}]}, 200, "sent no score for each of 2 passages"),
        ({"results": "?"}, 200, "sent no score for each of 2 passages"),
        ([{"index": 0, "score": None}, {"index": 1, "score": 1}], 200, "sent no score for each of 2 passages"),
        ([{"index": 0, "score": "nan"}, {"index": 1, "score": 1}], 200, "not finite"),
        (7, 200, "sent no score"),
    ],
)
async def test_a_server_that_answers_nonsense_is_one_line(answer: Any, status: int, problem: str) -> None:
    scorer, _ = endpoint(lambda body: answer, status)
    with pytest.raises(RetrievalError, match=problem) as caught:
        await scorer.score("q", ["a", "b"])
    assert "\n" not in str(caught.value) and "http://rank.test:1/v1/rerank" in str(caught.value)
    await scorer.close()


def test_settings_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"rerank\.api is 'x'; known: cohere, tei"):
        RerankConfig(api="x")
    with pytest.raises(ValueError, match=r"rerank\.depth is 0"):
        RerankConfig(depth=0)
    with pytest.raises(RetrievalError, match="give one such as http"):
        make_scorer(RerankConfig(url="rank.test"))
    monkeypatch.delenv("RANK_KEY", raising=False)
    with pytest.raises(RetrievalError, match="RANK_KEY holds no key"):
        make_scorer(RerankConfig(url="http://rank.test", api_key_env="RANK_KEY"))
    assert not RerankConfig().active and RerankConfig(model="m").active
