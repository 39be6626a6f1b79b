"""The Elasticsearch backend against doubles that only record and answer: headers, errors, push-back. The real server is in tests/es."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from agents.types import Document, Query
from retrieval import elastic_index as form
from retrieval import elastic_load
from retrieval.chunks import ChunkConfig
from retrieval.elastic import ElasticBackend, open_backend
from retrieval.elastic_index import ElasticConfig
from retrieval.elastic_load import load
from retrieval.errors import BadQuery, IndexMismatch, Overloaded, RetrievalError
from tests.support import elasticsearch_server

PRODUCT = {"X-Elastic-Product": "Elasticsearch"}
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Asked:
    """One request that a double saw."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Double:
    """An HTTP server that records what it is asked and answers by a function."""

    answer: Callable[[Asked], Answer]
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Double]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                double.asked.append(asked)
                status, content, headers = double.answer(asked)
                payload = b"" if self.command == "HEAD" else json.dumps(content).encode()
                self.send_response(status)
                sent = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **headers}
                for name, value in sent.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = any

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def answering(status: int, content: Any, headers: dict[str, str] | None = None) -> Iterator[Double]:
    with Double(lambda _: (status, content, PRODUCT if headers is None else headers)).running() as double:
        yield double


def config(double: Double, **settings: Any) -> ElasticConfig:
    return ElasticConfig(urls=[double.url], **{"retries": 0, "analyzer": "standard", "bulk_workers": 1, **settings})


def refused(kind: str, reason: str, status: int) -> dict[str, Any]:
    error = {"type": kind, "reason": reason}
    return {"error": {**error, "root_cause": [error]}, "status": status}


async def test_credentials_come_from_the_environment_and_go_into_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "c2VjcmV0OmtleQ==")
    monkeypatch.setenv("MY_USER", "ann")
    monkeypatch.setenv("MY_PASSWORD", "pässwörd")
    with answering(200, {}) as double:
        with pytest.raises(IndexMismatch, match="stands for 0 indexes"):
            open_backend(config(double, api_key_env="MY_KEY"))
        with pytest.raises(IndexMismatch):
            open_backend(config(double, user_env="MY_USER", password_env="MY_PASSWORD"))
        with pytest.raises(IndexMismatch):
            open_backend(config(double))
        layout = form.layout(
            config(double), corpus="c", documents=1, title_weight=2, chunk=ChunkConfig(), encoder=None, dims=None
        )
        backend = ElasticBackend(config(double, api_key_env="MY_KEY"), "index", layout)
        with pytest.raises(KeyError):  # the double knows no documents
            await backend.get(["a"])
        await backend.close()
    key, basic, nothing, asynchronous = (a.headers.get("authorization") for a in double.asked)
    assert key == asynchronous == "ApiKey c2VjcmV0OmtleQ=="
    assert basic == "Basic YW5uOnDDpHNzd8O2cmQ=" and nothing is None
    assert {a.headers["accept"] for a in double.asked} == {"application/vnd.elasticsearch+json; compatible-with=8"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key_env": "NO_SUCH"}, r"api_key_env names \$NO_SUCH, which is not set; export it"),
        ({"user_env": "HOME"}, "wants either api_key_env, or user_env and password_env"),
        ({"urls": ["localhost:9200"]}, "write scheme, host and port, such as https://es1:9200"),
        ({"urls": ["http://ann:secret@es:9200"]}, "keep credentials in the environment"),
        ({"urls": ["http://es"]}, "write scheme, host and port"),
        ({"urls": []}, "urls is empty; write scheme"),
        ({"urls": ["https://es:9200"], "ca_certs": "/no/such.pem"}, "ca_certs names /no/such.pem, which is not a file"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_sent(settings: Any, message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as caught:
        open_backend(ElasticConfig(**settings))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "magic"}, "mode is 'magic'; it must be one of bm25, dense, hybrid"),
        ({"index_options": "lossy"}, "index_options is 'lossy'; it must be one of hnsw, flat"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"oversample": 0.5}, "oversample is 0.5; it must be 0, or 1 and more"),
    ],
)
def test_values_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticConfig(**settings)


@pytest.mark.parametrize(
    ("status", "content", "headers", "kind", "message"),
    [
        (200, {}, {}, RetrievalError, "is not Elasticsearch 7.14 or newer (OpenSearch is not supported); use 8.x or 9.x"),
        (406, {"error": "Content-Type header [...] is not supported"}, {}, RetrievalError, "does not speak with an 8.x client (406"),
        (400, refused("media_type_header_exception", "Accept version must be 7", 400), PRODUCT, RetrievalError, "use 8.x or 9.x"),
        (401, refused("security_exception", "unable to authenticate", 401), PRODUCT, RetrievalError,
         "wants valid credentials (401 security_exception: unable to authenticate); name the variables"),
        (403, refused("security_exception", "action [x] is unauthorized", 403), PRODUCT, RetrievalError,
         "forbids this to the user of no credentials (403 security_exception: action [x] is unauthorized); grant it there"),
        (404, refused("index_not_found_exception", "no such index", 404), PRODUCT, RetrievalError, "has no index 'gumshoe'"),
        (429, refused("circuit_breaking_exception", "Data too large", 429), PRODUCT, Overloaded, "try again later"),
        (503, refused("no_shard_available_action_exception", "", 503), PRODUCT, RetrievalError, "see GET /_cluster/health there"),
        (502, "<html>bad gateway</html>", {}, RetrievalError, "cannot serve index 'gumshoe' now (502"),
        (500, refused("null_pointer_exception", "oops", 500), PRODUCT, RetrievalError, "refused a request (500 null_pointer"),
    ],
)  # fmt: skip
def test_each_trouble_is_one_line_that_says_where_and_what_to_do(
    status: int, content: Any, headers: dict[str, str], kind: type[Exception], message: str
) -> None:
    with answering(status, content, headers) as double, pytest.raises(kind) as caught:
        open_backend(config(double))
    assert message in str(caught.value) and double.url in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RetrievalError, match=rf"no Elasticsearch answers at {url} \(.*start it, or mend"):
            open_backend(ElasticConfig(urls=[url], retries=0))


def test_https_where_no_tls_is_spoken_says_so() -> None:
    with (
        answering(200, {}) as double,
        pytest.raises(RetrievalError, match=r"no secure connection .* write http:// if it speaks no TLS"),
    ):
        open_backend(replace(config(double), urls=[double.url.replace("http:", "https:")]))


@pytest.mark.parametrize(
    ("encoder", "similarity", "scores", "products"),
    [
        ({"normalize": True}, "dot_product", (1.0, 0.5), (1.0, 0.0)),
        ({"kind": "hashing"}, "dot_product", (0.9, 0.0), (0.8, -1.0)),
        ({"normalize": False}, "max_inner_product", (38.5, 1.0, 0.2), (37.5, 0.0, -4.0)),
    ],
)
def test_scores_of_vectors_are_inner_products_whatever_their_length(
    encoder: Any, similarity: str, scores: Any, products: Any
) -> None:
    layout = form.layout(
        ElasticConfig(mode="dense"),
        corpus="c",
        documents=9,
        title_weight=2,
        chunk=ChunkConfig(),
        encoder=encoder,
        dims=8,
    )
    assert form.creation(layout)["mappings"]["properties"]["vector"]["similarity"] == similarity
    reply = {"hits": {"hits": [{"sort": [score, f"d{i}", 0, 1]} for i, score in enumerate(scores)]}}
    assert [h.score for h in form.hits(reply, layout, vectors=True)] == pytest.approx(products)


async def test_half_an_answer_is_no_answer() -> None:
    good = {"hits": {"hits": []}, "timed_out": False, "_shards": {"failed": 0}}
    layout = form.layout(
        ElasticConfig(), corpus="c", documents=9, title_weight=2, chunk=ChunkConfig(), encoder=None, dims=None
    )
    for bad, kind, message in (
        ({**good, "_shards": {"failed": 1}}, RetrievalError, "a shard gave no answer"),
        ({**good, "timed_out": True}, RetrievalError, "a shard gave no answer"),
        (refused("query_shard_exception", "maxClauseCount is set to 1024", 400), BadQuery, "shorten it"),
        (refused("es_rejected_execution_exception", "queue full", 429), Overloaded, "pushes back"),
    ):
        with answering(200, {"responses": [good, bad]}) as double:
            backend = ElasticBackend(config(double), "index", layout)
            with pytest.raises(kind, match=message):
                await backend.search([Query("a"), Query("b")])
            await backend.close()
    header = json.loads(double.asked[0].body.splitlines()[0])
    assert header["allow_partial_search_results"] is False


class Loading:
    """Answers a load as a server would; `bulk` decides what becomes of a bulk request."""

    def __init__(self, bulk: Callable[[int, list[str]], Answer | None]) -> None:
        self.held: list[str] = []
        self.sizes: list[int] = []
        self._bulk = bulk

    def __call__(self, asked: Asked) -> Answer:
        if asked.method == "HEAD":
            return 404, {}, PRODUCT
        if "/_bulk" in asked.path:
            ids = [json.loads(line)["create"]["_id"] for line in asked.body.splitlines()[::2]]
            self.sizes.append(len(ids))
            answer = self._bulk(len(self.sizes), ids)
            if answer is None:
                answer = 200, {"items": [{"create": {"status": 409 if i in self.held else 201}} for i in ids]}, PRODUCT
            statuses = [item["create"]["status"] for item in answer[1].get("items", [])]
            self.held += [i for i, status in zip(ids, statuses, strict=False) if status == 201]
            return answer
        return 200, {"acknowledged": True, "count": len(self.held)}, PRODUCT


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(elastic_load.time, "sleep", taken.append)
    return taken


DOCUMENTS = [Document(f"d{i:02}", "title", "words " * 10) for i in range(40)]


def test_push_back_makes_requests_smaller_and_slower_until_all_is_taken(naps: list[float]) -> None:
    def bulk(number: int, ids: list[str]) -> Answer | None:
        if number <= 2:
            return 429, refused("es_rejected_execution_exception", "busy", 429), PRODUCT
        if number == 3:  # some of a request are taken
            items = [{"create": {"status": 201 if n % 2 else 429, "error": {"type": "busy"}}} for n in range(len(ids))]
            return 200, {"items": items}, PRODUCT
        return None

    loading = Loading(bulk)
    with Double(loading).running() as double:
        done = load(config(double, bulk_documents=16), lambda: DOCUMENTS)
    assert sorted(loading.held) == [d.id for d in DOCUMENTS] and done.passages == 40
    assert loading.sizes[:4] == [16, 8, 4, 2] and max(loading.sizes[4:]) > 2
    assert naps == [0.2, 0.4, 0.8]


def test_a_load_gives_up_with_what_to_do_and_lost_answers_do_no_harm(naps: list[float]) -> None:
    loading = Loading(lambda number, ids: (503, refused("unavailable_shards_exception", "no primary", 503), PRODUCT))
    with (
        Double(loading).running() as double,
        pytest.raises(Overloaded, match=r"took no more .* 4 tries .*no primary.*start the same load"),
    ):
        load(config(double, bulk_retries=3), lambda: DOCUMENTS)
    loading = Loading(lambda number, ids: loading.held.extend(ids) or (504, {}, PRODUCT) if number == 1 else None)  # type: ignore[func-returns-value]
    with Double(loading).running() as double:
        assert load(config(double), lambda: DOCUMENTS).passages == len(loading.held) == 40


def test_requests_that_are_too_large_are_cut_and_a_document_that_is_is_named(naps: list[float]) -> None:
    loading = Loading(lambda number, ids: (413, {}, {}) if len(ids) > 5 else None)
    with Double(loading).running() as double:
        load(config(double), lambda: DOCUMENTS)
    assert len(loading.held) == 40 and loading.sizes[:4] == [40, 20, 10, 5] and not naps
    loading = Loading(lambda number, ids: (413, {}, {}) if "d07" in ids else None)
    with (
        Double(loading).running() as double,
        pytest.raises(RetrievalError, match=r"finds document 'd07' too large \(\d+ bytes, 413\)"),
    ):
        load(config(double), lambda: DOCUMENTS)
    loading = Loading(lambda number, ids: None)
    with Double(loading).running() as double:
        load(config(double, bulk_mb=0.0005), lambda: DOCUMENTS)
    assert max(loading.sizes) < 5 and len(loading.held) == 40  # documents of 230 bytes, requests that end beyond 500


def test_progress_counts_documents() -> None:
    seen: list[tuple[int, int]] = []
    with Double(Loading(lambda *_: None)).running() as double:
        load(
            config(double, bulk_documents=15, bulk_workers=3),
            lambda: DOCUMENTS,
            progress=lambda *done: seen.append(done),
        )
    assert seen == [(15, 40), (30, 40), (40, 40)]


def test_rows_carry_pages_once_and_offsets_always() -> None:
    chunk = ChunkConfig("words", 2)
    layout = form.layout(ElasticConfig(), corpus="c", documents=1, title_weight=1, chunk=chunk, encoder=None, dims=None)
    document = Document("a", "T", "one two three four five", {"url": "u"})
    found = list(form.rows(document, layout))
    assert [r.id for r in found] == ["a", "a\x1f1", "a\x1f2"] and [r.text for r in found] == [
        "T\none two ",
        "T\nthree four ",
        "T\nfive",
    ]
    assert ["page" in r.source for r in found] == [True, False, False]
    assert [document.text[r.source["start"] : r.source["end"]] for r in found] == ["one two ", "three four ", "five"]
    action, source = map(json.loads, found[0].operation(layout, np.zeros(4, dtype=np.float32)).splitlines())
    assert action == {"create": {"_id": "a"}} and "vector" not in source
    reply = {"found": True, "_source": {"page": source["page"]}}
    assert form.page("a", reply) == document and form.page("a", {"found": False}) is None


def test_ids_fit_whatever_their_length() -> None:
    assert form.row_id("https://x/é") == "https://x/é"
    long = [form.row_id("x" * 600), form.row_id("x" * 601), form.row_id("é" * 250, 3)]
    assert len(set(long)) == 3 and all(len(i.encode()) <= 512 for i in long)


def test_the_name_of_an_index_says_all_that_its_content_depends_on() -> None:
    def name(corpus: str = "c", title_weight: int = 2, chunk: ChunkConfig | None = None, **settings: Any) -> str:
        config = ElasticConfig(**settings)
        return form.layout(
            config,
            corpus=corpus,
            documents=1,
            title_weight=title_weight,
            chunk=chunk or ChunkConfig(),
            encoder={"kind": "x"},
            dims=8,
        ).name("alias")

    names = [
        name(), name("d"), name(title_weight=3), name(chunk=ChunkConfig("words")), name(k1=2.0), name(analyzer="standard"),
        name(mode="dense"), name(mode="dense", index_options="flat"),
    ]  # fmt: skip
    assert len(set(names)) == len(names) and all(n.startswith("alias-") for n in names)
    assert name(num_candidates=7, depth=3, timeout_s=1.0, mode="dense") == name(mode="hybrid")


def test_a_server_that_is_not_to_be_had_is_a_need_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticsearch_server, "_java_home", lambda: "/")
    monkeypatch.setattr(elasticsearch_server.shutil, "which", lambda _: None)
    for value, message in (
        ("", "needs an Elasticsearch server: set GUMSHOE_ES_URL"),
        ("/no.zip", "needs .*/no.zip is not a file"),
    ):
        monkeypatch.setenv("GUMSHOE_ES_ZIP", value)
        with pytest.raises(elasticsearch_server.Missing, match=f"^{message}"):
            elasticsearch_server.Distribution()
    monkeypatch.setenv("GUMSHOE_ES_URL", "http://es:9200")
    monkeypatch.setenv("GUMSHOE_ES_API_KEY", "secret")
    given = elasticsearch_server.given()
    assert given is not None and (given.url, given.api_key_env, given.user_env) == (
        "http://es:9200",
        "GUMSHOE_ES_API_KEY",
        "",
    )
