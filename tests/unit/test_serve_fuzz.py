"""The HTTP server against its own OpenAPI document, and against bytes of any kind: typed answers, no crash."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from envs.serve.app import make_app
from envs.serve.config import ServeConfig
from tests.support.serving import Words, served

ROUTES = ("/retrieve", "/access", "/", "/healthz", "/metrics", "/openapi.json")
CHECKS = [
    schemathesis.checks.not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance,
]  # fmt: skip
QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(make_app(Words(), ServeConfig(requests_per_s=0))) as url:
        yield url


@pytest.fixture(scope="module")
def document(server: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{server}/openapi.json").json())


def test_the_document_names_every_route(server: str) -> None:
    paths = httpx.get(f"{server}/openapi.json").json()["paths"]
    assert paths.keys() == {*ROUTES, "/mcp"}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_document_says(
    server: str, document: schemathesis.BaseSchema, route: str, mode: GenerationMode
) -> None:
    (operation,) = document[route].values()
    if mode is GenerationMode.NEGATIVE and operation.method == "get":
        return  # there is nothing to get wrong
    positive = mode is GenerationMode.POSITIVE
    checks = [*CHECKS, positive_data_acceptance if positive else negative_data_rejection]

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: schemathesis.Case) -> None:
        response = case.call(base_url=server)
        case.validate_response(response, checks=checks)

    holds()


def typed(response: httpx.Response) -> None:
    """Good, or a typed error that is the client's fault."""
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["type"] and error["message"] and "\n" not in error["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "\x00", "https://a.example/cats"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
CALLS = st.fixed_dictionaries(
    {"session_id": st.sampled_from(["a", "b", 1]), "name": st.sampled_from(["start_session", "close_session", "browser.search", "browser.open", "browser.find"])},
    optional={
        "arguments": st.dictionaries(st.sampled_from(["query", "num", "id", "pattern", "k", "page"]), JSON, max_size=3),
        "remote_env_info": st.fixed_dictionaries({}, optional={"search_forbidden_strs": st.lists(st.text(), max_size=3) | JSON}),
    },
)  # fmt: skip


@QUICK
@given(
    body=st.binary(max_size=300),
    route=st.sampled_from([*ROUTES[:3], "/mcp"]),
    kind=st.sampled_from(["application/json", "text/plain", ""]),
)
def test_bytes_of_any_kind_break_nothing(server: str, client: httpx.Client, body: bytes, route: str, kind: str) -> None:
    response = client.post(
        server + route, content=body, headers={"content-type": kind, "accept": "application/json, text/event-stream"}
    )
    assert response.status_code < 500
    if route != "/mcp":
        typed(response)


@QUICK
@given(
    body=st.one_of(
        CALLS,
        st.fixed_dictionaries({"queries": st.lists(JSON, max_size=3)}, optional={"topk": JSON, "return_scores": JSON}),
    )
)
def test_odd_values_break_nothing(server: str, client: httpx.Client, body: dict[str, object]) -> None:
    content = json.dumps(body).encode()  # NaN, Infinity and lone surrogates too
    route = "/" if "name" in body else "/retrieve"
    typed(client.post(server + route, content=content, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("head", ["GET / HTTP/9.9\r\n\r\n", "POST /retrieve HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -1\r\n\r\n", "\x00\xff\r\n\r\n"])  # fmt: skip
def test_broken_http_breaks_nothing(server: str, head: str) -> None:
    import socket

    place = httpx.URL(server)
    with socket.create_connection((place.host, place.port), timeout=30) as connection:
        connection.sendall(head.encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert httpx.get(f"{server}/healthz").status_code == 200
