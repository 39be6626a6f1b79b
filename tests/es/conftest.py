"""Servers of the group: the user's own where one is named, else one that the session starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from retrieval.elastic import calls
from retrieval.elastic_index import ElasticConfig
from tests.support.elasticsearch_server import Access, Distribution, Missing, Server, given


@pytest.fixture(scope="session")
def distribution() -> Iterator[Distribution]:
    try:
        found = Distribution()
    except Missing as missing:
        pytest.skip(str(missing))
    try:
        yield found
    finally:
        found.remove()


@pytest.fixture(scope="session")
def own_server(distribution: Distribution) -> Iterator[Server]:
    """A server that a test may kill; it must be up again when the test ends."""
    with distribution.server() as server:
        yield server


@pytest.fixture(scope="session")
def access(request: pytest.FixtureRequest) -> Iterator[Access]:
    """A server to use as it is."""
    found = given()
    if found is None:
        yield Access(request.getfixturevalue("own_server").url)
        return
    yield found
    with contextlib.suppress(Exception), calls(elastic(found)) as client:
        for name in client.indices.get(index=f"{found.prefix}*"):
            client.indices.delete(index=name)


def elastic(access: Access, index: str = "index", **settings: object) -> ElasticConfig:
    """A configuration for a server, for an index of the tests' own."""
    settings = {"analyzer": "standard", "replicas": 0, "timeout_s": 120.0, **settings}
    return ElasticConfig(
        urls=[access.url], index=access.prefix + index, api_key_env=access.api_key_env, user_env=access.user_env,
        password_env=access.password_env, ca_certs=access.ca_certs, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
