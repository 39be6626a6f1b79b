"""`gumshoe serve` as a process: it starts, answers, stops when told to, and says in one line why it will not start."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agents.types import Query
from cluster import serve as serve_command
from cluster.cli import main
from cluster.errors import UserError
from cluster.serve import load_run
from gumshoe import ROOT, child_env
from retrieval.backend import build_backend
from retrieval.config import BackendConfig
from retrieval.remote import RemoteBackend, RemoteConfig
from retrieval.service import SearchService
from tests.support.serving import DOCUMENTS, Words


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "index"
    build_backend(BackendConfig(kind="bm25"), DOCUMENTS, folder)
    return folder


def start(*arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, **child_env()}
    env.pop("GUMSHOE_SERVE_TOKEN", None)
    command = [sys.executable, "-m", "cluster.cli", "serve", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def server(index: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start(str(index), "--port", "0", "serve.topk=2")
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"serving 3 documents \(bm25\) at (http://127\.0\.0\.1:\d+) \(this machine only\)", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.wait(60)
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_and_stops_when_told_to(
    server: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    process, url = server
    assert httpx.get(f"{url}/healthz", timeout=60).json()["documents"] == 3
    backend = RemoteBackend(RemoteConfig(url=url))
    assert (await backend.search([Query("who barks at night", 1)]))[0][0].doc_id == "https://a.example/dogs"
    await backend.close()
    process.send_signal(number)
    assert process.wait(60) == 0
    assert process.stderr is not None and process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_it_says_in_one_line_why_it_will_not_start(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said, said
        return said

    monkeypatch.delenv("GUMSHOE_SERVE_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in refused(str(index), "--port", port)
    assert "needs a token: set GUMSHOE_SERVE_TOKEN" in refused(str(index), "--host", "0.0.0.0")
    monkeypatch.setenv("GUMSHOE_SERVE_TOKEN", "secret")
    assert "too weak" in refused(str(index), "--host", "0.0.0.0")
    monkeypatch.delenv("GUMSHOE_SERVE_TOKEN")
    (tmp_path / "remote.yaml").write_text(
        "retrieval: {kind: remote, remote: {url: 'http://127.0.0.1:9', http: {retries: 0}}}"
    )
    assert "http://127.0.0.1:9/retrieve cannot be reached" in refused(str(tmp_path / "remote.yaml"), "--port", "0")


async def test_of_two_that_start_on_one_port_one_serves(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    run = load_run(str(index), ["serve.port=0"])
    with serve_command._bound(run.serve) as first:
        run.serve.port = first.getsockname()[1]

        async def opened(_: object) -> SearchService:
            first.listen()  # the other one was quicker
            return service

        service = SearchService(Words())
        monkeypatch.setattr(serve_command, "_open", opened)
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {run.serve.port}"):
            await serve_command._http(run)
    assert service._closed


def test_what_to_serve_is_checked_first(index: Path, tmp_path: Path) -> None:
    run = load_run(str(index), ["serve.port=9", "service.max_batch=7"])
    assert (run.retrieval.kind, run.index, run.serve.port, run.service.max_batch) == ("auto", str(index), 9, 7)
    with pytest.raises(UserError, match="holds no index"):
        load_run(str(tmp_path), [])
    with pytest.raises(UserError, match=r"serve\.prt.*serve\.port"):
        load_run(str(index), ["serve.prt=9"])
    with pytest.raises(UserError, match=r"service\.topology is for runs with Ray"):
        load_run(str(index), ["service.topology.shard_replicas=2"])
    with pytest.raises(UserError, match="70000"):
        load_run(str(index), ["serve.port=70000"])
    (tmp_path / "c.yaml").write_text("retrieval: {kind: bm25}")
    with pytest.raises(UserError, match="give index=DIR"):
        load_run(str(tmp_path / "c.yaml"), [])
    assert load_run(str(tmp_path / "c.yaml"), [f"index={index}"]).index == str(index)
