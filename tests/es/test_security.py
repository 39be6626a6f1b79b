"""A server with users and TLS: who may do what, and what each refusal says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.types import Query
from retrieval.elastic import open_backend
from retrieval.elastic_index import ElasticConfig
from retrieval.elastic_load import load
from retrieval.errors import RetrievalError
from tests.support.backend_contract import corpus
from tests.support.elasticsearch_server import Distribution, certificate

ROLES = """\
reader:
  indices:
    - names: ["corpus*"]
      privileges: ["read", "view_index_metadata"]
blind:
  indices:
    - names: ["other*"]
      privileges: ["read"]
"""
USERS = {
    "admin": ("admin-pässword", "superuser"),
    "reader": ("reader-password", "reader"),
    "blind": ("blind-password", "blind"),
}


@pytest.fixture(scope="module")
def secured(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticConfig]:
    """A corpus on a server that wants credentials and speaks TLS only; the configuration of its administrator."""
    key, pem, authority = certificate(tmp_path_factory.mktemp("tls"))
    with pytest.MonkeyPatch.context() as environment:
        for name, (password, _) in USERS.items():
            environment.setenv(f"ES_TEST_{name.upper()}", name)
            environment.setenv(f"ES_TEST_{name.upper()}_PASSWORD", password)
        environment.setenv("ES_TEST_WRONG", "not the password")
        with distribution.server(users=USERS, roles=ROLES, certificate=(key, pem)) as server:
            config = ElasticConfig(
                urls=[server.url], index="corpus", analyzer="standard", replicas=0, timeout_s=120.0, ca_certs=str(authority),
                user_env="ES_TEST_ADMIN", password_env="ES_TEST_ADMIN_PASSWORD",
            )  # fmt: skip
            load(config, lambda: corpus(20))
            yield config


def as_user(config: ElasticConfig, name: str, password: str = "") -> ElasticConfig:
    return replace(config, user_env=f"ES_TEST_{name}", password_env=password or f"ES_TEST_{name}_PASSWORD")


async def test_a_reader_reads_over_tls_and_may_not_write(secured: ElasticConfig) -> None:
    backend = open_backend(as_user(secured, "READER"))
    (hits,) = await backend.search([Query("zupero", k=3)])
    assert [h.doc_id for h in hits] == ["tie1", "tie10", "tie2"]
    assert await backend.get(["tie1"]) == [d for d in corpus(20) if d.id == "tie1"]
    await backend.close()
    with pytest.raises(RetrievalError, match=r"forbids this to the user of \$ES_TEST_READER .*\(403 .*grant it there"):
        load(as_user(secured, "READER"), lambda: corpus(21))


async def test_whoever_may_not_read_is_told(secured: ElasticConfig) -> None:
    with pytest.raises(RetrievalError, match=r"forbids this to the user of \$ES_TEST_BLIND .*403"):
        open_backend(as_user(secured, "BLIND"))
    backend = open_backend(secured)
    backend._config = as_user(secured, "BLIND")  # rights may go while a backend is open
    with pytest.raises(RetrievalError, match=r"forbids this .*403"):
        await backend.search([Query("zupero")])
    await backend.close()


def test_credentials_that_lack_or_are_wrong_are_told_apart(secured: ElasticConfig) -> None:
    with pytest.raises(
        RetrievalError, match=r"wants valid credentials \(401 .*name the variables that hold them: api_key_env"
    ):
        open_backend(replace(secured, user_env="", password_env=""))
    with pytest.raises(RetrievalError, match=r"\(401 .*check \$ES_TEST_READER and \$ES_TEST_WRONG"):
        open_backend(as_user(secured, "READER", password="ES_TEST_WRONG"))
    with pytest.raises(RetrievalError, match=r"\(401 .*check \$ES_TEST_WRONG"):
        open_backend(replace(secured, user_env="", password_env="", api_key_env="ES_TEST_WRONG"))


def test_a_certificate_nobody_vouches_for_is_refused(secured: ElasticConfig, tmp_path: Path) -> None:
    refusal = r"no secure connection to Elasticsearch at https://.*CERTIFICATE_VERIFY_FAILED.*retrieval\.elasticsearch\.ca_certs"
    with pytest.raises(RetrievalError, match=refusal):
        open_backend(replace(secured, ca_certs=""))
    _, _, other = certificate(tmp_path)
    with pytest.raises(RetrievalError, match=refusal):
        open_backend(replace(secured, ca_certs=str(other)))
    with pytest.raises(RetrievalError, match=r"no Elasticsearch answers at http://.*https:// if it speaks TLS"):
        open_backend(replace(secured, urls=[secured.urls[0].replace("https", "http")], retries=0))
    assert open_backend(replace(secured, ca_certs="", verify=False)).info().num_docs == 20


async def test_a_running_search_meets_tls_the_same_way(secured: ElasticConfig) -> None:
    backend = open_backend(secured)
    backend._config = replace(secured, ca_certs="")
    with pytest.raises(RetrievalError, match="no secure connection"):
        await backend.search([Query("zupero")])
    await backend.close()
