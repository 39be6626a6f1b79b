"""Loads that are cut short: the server killed in the middle of one, or the loader. Nothing acknowledged is lost, the load resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agents.types import Document, Query
from retrieval.elastic import calls, open_backend
from retrieval.elastic_index import ElasticConfig
from retrieval.elastic_load import Loaded, load
from retrieval.errors import RetrievalError
from tests.es.conftest import elastic
from tests.support.elasticsearch_server import Access, Server

ROOT = Path(__file__).parents[2]


def documents(n: int, marker: str = "x") -> list[Document]:
    return [Document(f"doc{i:05}", f"Title {i}", f"word{i} and word{i // 2} of {marker} " * 8) for i in range(n)]


def own(server: Server, index: str, **settings: object) -> ElasticConfig:
    return elastic(Access(server.url, prefix="bulk-"), index, **settings)


def acknowledged_are_there(config: ElasticConfig, index: str, ids: list[str]) -> bool:
    with calls(config) as client:
        return all(entry["found"] for entry in client.mget(index=index, ids=ids, source=False)["docs"])


async def test_a_killed_server_loses_nothing_acknowledged_and_the_load_resumes(own_server: Server) -> None:
    old = load(own(own_server, "a"), lambda: documents(30, "old"))
    config = own(own_server, "a", bulk_documents=20, bulk_retries=1)
    acknowledged, enough = [0], threading.Event()

    def progress(done: int, _: int) -> None:
        acknowledged[0] = done
        if done >= 400:
            enough.set()

    outcome: list[Exception | Loaded] = []

    def loading() -> None:
        try:
            outcome.append(load(config, lambda: documents(4000), progress=progress))
        except RetrievalError as error:
            outcome.append(error)

    thread = threading.Thread(target=loading)
    thread.start()
    assert enough.wait(120)
    own_server.kill()
    thread.join(120)
    assert isinstance(outcome[0], RetrievalError), outcome
    assert "start the same load again" in str(outcome[0]) or "no Elasticsearch answers" in str(outcome[0])
    assert 400 <= acknowledged[0] < 4000

    own_server.start()
    serving = open_backend(own(own_server, "a"))
    assert serving.info().num_docs == 30  # the alias never moved
    await serving.close()
    with calls(config) as client:
        (index,) = set(client.indices.get(index=f"{config.index}-*")) - {old.index}
    assert acknowledged_are_there(config, index, [d.id for d in documents(acknowledged[0])])

    done = load(config, lambda: documents(4000))
    assert done.index == index and done.passages == 4000 and done.resumed >= acknowledged[0]
    backend = open_backend(config)
    (hits,) = await backend.search([Query("word3999", k=1)])
    assert backend.info().num_docs == 4000 and hits[0].doc_id == "doc03999"
    await backend.close()


def test_a_server_that_comes_back_in_time_is_waited_for(own_server: Server) -> None:
    config = own(own_server, "b", bulk_documents=20, bulk_retries=60)
    begun = threading.Event()
    outcome: list[Loaded] = []
    thread = threading.Thread(
        target=lambda: outcome.append(
            load(config, lambda: documents(3000), progress=lambda done, _: begun.set() if done >= 200 else None)
        )
    )
    thread.start()
    assert begun.wait(120)
    own_server.kill()
    own_server.start()
    thread.join(240)
    assert outcome and outcome[0].passages == 3000


async def test_a_killed_loader_resumes_where_it_was(access: Access, tmp_path: Path) -> None:
    config = elastic(access, "killed", bulk_documents=20)
    script = (
        "import sys; from tests.es.test_bulk import *\n"
        f"config = ElasticConfig(**{ {**vars(config)}!r})\n"
        "load(config, lambda: documents(4000), progress=lambda done, _: print(done, flush=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = 0
    for line in child.stdout:
        acknowledged = int(line)
        if acknowledged >= 300:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait(30)
    child.stdout.close()
    assert 300 <= acknowledged < 4000
    with pytest.raises(RetrievalError, match="has no index"):
        open_backend(config)
    seen: list[float] = []
    done = load(config, lambda: documents(4000), progress=lambda *_: seen.append(time.monotonic()))
    assert acknowledged <= done.resumed < 4000 and done.passages == 4000 and len(seen) == 200
    backend = open_backend(config)
    pages = await backend.get([d.id for d in documents(4000)[::500]])
    assert pages == documents(4000)[::500]
    await backend.close()
    with calls(config) as client:
        (settings,) = client.indices.get_settings(index=done.index).values()
        assert "refresh_interval" not in settings["settings"]["index"]
        assert settings["settings"]["index"]["number_of_replicas"] == "0"
