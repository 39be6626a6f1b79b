"""Canaries and blocked hosts: what is hidden, however it is written, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from agents.types import Document, Hit, Query, Task
from envs.config import GuardConfig, SandboxConfig
from envs.guard import BENCHMARK_HOSTS, Hosts, guard_of
from envs.sandbox import Session
from retrieval.backend import BackendConfig, build_backend
from tests.support.sandbox_play import Broken, play

GUID = "b7a3c1d9-0000-4a4a-9f9f-1234567890ab"


def session(config: SandboxConfig, task: Task, *documents: Document) -> Session:
    return Session(build_backend(BackendConfig(kind="bm25"), list(documents)), config, guard=guard_of(config, task))


@pytest.mark.parametrize("where", ["config", "task", "task list"])
def test_a_page_with_a_canary_is_hidden_and_counted(where: str) -> None:
    config = SandboxConfig(guard=GuardConfig(canaries=[f"canary GUID {GUID}"] if where == "config" else []))
    task = Task("t", "Who?", ("x",), meta={"canary": {"task": GUID, "task list": [GUID]}.get(where, ())})
    marked = Document("m", "Data", f"Gupezo. Never train on this: CANARY\nguid {GUID.upper().replace('-', ' ')}.")
    shown = session(config, task, marked, Document("d", "Other", "Gupezo is a town."))
    search, opened = play(shown, [("search", {"query": "Gupezo"}), ("open", {"doc_id": "m"})])
    assert [s.doc_id for s in search.seen] == ["d"] and opened.error == "leak_guard" and GUID not in opened.text
    assert shown.journal.masked() == {("canary", "m"): 2}
    assert [e.masks for e in shown.journal.entries] == [(("canary", "m", 1),), (("canary", "m", 1),)]


def test_short_canaries_hide_nothing() -> None:
    assert guard_of(SandboxConfig(), Task("t", "Who?", meta={"canary": "x-1"})) is None
    with pytest.raises(ValueError, match="under 8 letters"):
        GuardConfig(canaries=["abc"])


@pytest.mark.parametrize(
    ("doc_id", "blocked"),
    [
        ("https://evil.org/a", True),
        ("evil.org", True),
        ("HTTP://EVIL.ORG.:8080", True),
        ("http://user:pw@sub.evil.org/x?y#z", True),
        ("//cdn.evil.org\\x", True),
        ("https://ｅｖｉｌ。ｏｒｇ/", True),
        ("https://ev%69l.org", True),
        ("view-source:https://r.jina.ai/http://evil.org/a", True),
        ("https://r.jina.ai/evil.org/a", True),
        ("https://web.archive.org/web/2020/https%253A%252F%252Fevil.org%252Fa", True),
        ("https://xn--bcher-kva.example/1", True),
        ("https://bücher.example/1", True),
        ("https://BÜCHER.example", True),
        ("https://code.org/owner/repo", True),
        ("https://code.org//Owner/repo/blob/x", True),
        ("https://code.org/owner/repository", False),
        ("https://code.org/", False),
        ("https://notevil.org/a", False),
        ("https://evil.org.uk", False),
        ("https://example/evil.orgy", False),
        ("https://evil-org.translate.goog/a?_x_tr_sl=en", True),
        ("https://not--evil-org.translate.goog/a", False),
        ("https://proxy.example/get,evil.org/x", True),
        ("https://proxy.example/?" + "a=b&" * 3000 + "u=https://evil.org", True),
        ("https://ev\u00adil.org/", True),
        ("https://example.org/evil.org.html", False),
        ("https://my-evil.org/", False),
        ("gupezo", False),
        ("", False),
        ("https://", False),
        ("12", False),
    ],
)
def test_blocked_hosts_by_hand(doc_id: str, blocked: bool) -> None:
    assert Hosts(["https://evil.org/", "*.bücher.example", "code.org/owner/repo"]).blocks(doc_id) is blocked


def test_benchmark_hosts_are_known_by_name() -> None:
    hosts = Hosts(["benchmarks"])
    assert hosts.blocks("https://datasets-server.huggingface.co/rows?dataset=x")
    assert hosts.blocks("https://raw.githubusercontent.com/openai/simple-evals/main/data.csv")
    assert hosts.blocks("https://api.github.com/repos/openai/simple-evals/contents")
    assert hosts.blocks("https://cdn.jsdelivr.net/gh/openai/simple-evals@main/README.md")
    assert hosts.blocks("https://thudm.github.io/carr/") and hosts.blocks("https://xbench-ai.github.io")
    assert hosts.blocks("https://huggingface-co.translate.goog/datasets/x?_x_tr_sl=en")
    assert not hosts.blocks("https://github.com/openai/openai-python")
    assert not hosts.blocks("https://cdn.jsdelivr.net/gh/openai/simple-evals-2")
    assert not hosts.blocks("https://openai.github.io/openai-python")
    assert all(hosts.blocks(f"https://{place}/x") for place in BENCHMARK_HOSTS)
    with pytest.raises(ValueError, match="empty entry"):
        GuardConfig(hosts=["evil.org", " "])
    with pytest.raises(ValueError, match="without its host"):
        GuardConfig(hosts=["/data"])


def test_blocked_pages_are_neither_found_nor_asked_for() -> None:
    config = SandboxConfig(guard=GuardConfig(hosts=["evil.org"]))
    task = Task("t", "Who?")
    pages = [
        Document("https://www.evil.org/1", "A", "Gupezo one"),
        Document("p2", "B", "Gupezo two", {"url": "http://evil.org/2"}),
        Document("p3", "C", "Gupezo three", {"url": "http://good.org/3"}),
    ]
    shown = session(config, task, *pages)
    search, second = play(shown, [("search", {"query": "Gupezo"}), ("open", {"doc_id": "p2"})])
    assert [s.doc_id for s in search.seen] == ["p3"] and second.error == "leak_guard"
    unasked = Session(Broken(), config, guard=guard_of(config, task))  # a live reader must not even fetch it
    event = play(unasked, [("open", {"doc_id": "[https://evil.org:443/x]"})])[0]
    assert event.error == "leak_guard" and "may not be read" in event.text
    assert unasked.journal.entries[0].masks[0].rule == "host"


def test_what_a_search_finds_on_blocked_hosts_is_not_fetched() -> None:
    class Live(Broken):
        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            return [[Hit("https://evil.org/1", 1.0), Hit("https://good.org/2", 0.5)] for _ in queries]

        async def get(self, ids: Sequence[str]) -> list[Document | None]:
            assert list(ids) == ["https://good.org/2"]
            return [Document(i, "T", "Gupezo") for i in ids]

    config = SandboxConfig(guard=GuardConfig(hosts=["evil.org"]))
    shown = Session(Live(), config, guard=guard_of(config, Task("t", "Who?")))
    assert [s.doc_id for s in play(shown, [("search", {"query": "x"})])[0].seen] == ["https://good.org/2"]
    assert shown.journal.masked() == {("host", "https://evil.org/1"): 1}


def test_a_question_escaped_in_an_id_is_a_leak() -> None:
    config = SandboxConfig(leak_guard="question")
    page = Document("https://x.org/?q=who%20was%20the%20mentor", "T", "Text.")
    assert play(session(config, Task("t", "Who was the mentor?"), page), [("open", {"doc_id": page.id})])[0].error


def test_rules_compose_in_order() -> None:
    question = "Which composer of Gupezo wrote the opera?"
    config = SandboxConfig(leak_guard="question", guard=GuardConfig(hosts=["evil.org"], answer="redact"))
    guard = guard_of(config, Task("t", question, ("Lomitave",), meta={"canary": GUID}))
    assert guard is not None and [r.name for r in guard.rules] == ["host", "question", "canary", "answer_redact"]
