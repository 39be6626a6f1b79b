"""Recording and replay of tool calls: equal sessions, loud misses, whole files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import BackendInfo, Document, Hit, Query, ToolCall, Uid
from envs.config import FaultConfig, GuardConfig, JournalConfig, SandboxConfig
from envs.journal import ReplayMiss, same
from envs.replay import JournalFile, Recording, ReplayBackend, ReplayError, faults_met, rows
from envs.sandbox import Session
from envs.session import Sessions
from tests.support.sandbox_play import Broken, actions, backend, identity, play, world

TASK = next(t for t in world().tasks if len(t.gold_docs) == 3)
FAULTS = FaultConfig(timeout=0.2, error=0.1, empty=0.1, truncated=0.2, shuffled=0.2, distractors=0.2, stale=0.4)
GUARDS = [GuardConfig(), GuardConfig(answer="redact"), GuardConfig(answer="chain")]


def config(**more: Any) -> SandboxConfig:
    return SandboxConfig(**{"retry_wait_s": 0, "retries": 1, **more})


def record(folder: Path, calls: list[Any], source: Any = None, attempt: int = 0, **more: Any) -> Session:
    sessions = Sessions(config(journal=JournalConfig(record=True), **more), folder, "worker")
    session = sessions.session_for(TASK, identity(TASK.id, attempt), source or backend())
    play(session, calls)
    sessions.close()
    return session


def replay(
    folder: Path, calls: list[Any], source: Any = None, misses: str = "error", attempt: int = 0, **more: Any
) -> Session:
    sessions = Sessions(config(journal=JournalConfig(replay=str(folder), misses=misses), **more))
    session = sessions.session_for(TASK, identity(TASK.id, attempt), source or Broken())
    play(session, calls)
    return session


@settings(max_examples=50, deadline=None)
@given(actions(TASK), st.sampled_from(GUARDS), st.booleans())
def test_replay_of_any_session_equals_it(
    tmp_path_factory: pytest.TempPathFactory, calls: list[Any], guard: GuardConfig, faulty: bool
) -> None:
    folder, more = tmp_path_factory.mktemp("j"), {"guard": guard, "faults": FAULTS if faulty else FaultConfig()}
    recorded = record(folder, calls, **more)
    if calls:
        again = replay(folder, calls, **more)
        assert same(recorded.journal, again.journal)


def test_a_line_has_the_call_its_result_and_what_was_asked(tmp_path: Path) -> None:
    doc = TASK.gold_docs[0]
    session = record(tmp_path, [("search", {"query": doc}), ("open", {"doc_id": 0}), ("find", {"pattern": "zzz"})])
    lines = [row for _, row in rows(tmp_path)]
    assert [row["name"] for row in lines] == ["search", "open", "find"]
    first = lines[0]
    assert first["uid"] == [TASK.id, "g", 0] and first["run"] == "run" and first["format"] == 1
    assert first["result"] == session.journal.entries[0].result and first["text"].startswith("[0] Title")
    assert first["fingerprint"] == backend().info().fingerprint and first["latency_s"] > 0
    assert first["asked"][0]["key"] == ["search", doc, 5, {}] and len(first["asked"][0]["hits"]) == len(
        first["documents"]
    )
    assert lines[1]["asked"] == [] and lines[1]["cached"], "the search had fetched the page"
    again = record(tmp_path, [("open", {"doc_id": doc})], attempt=1)
    assert again.journal.entries[0].error == "" and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_a_document_is_written_once_per_file(tmp_path: Path) -> None:
    calls = [("search", {"query": TASK.gold_docs[0]})] * 3
    sessions = Sessions(config(journal=JournalConfig(record=True)), tmp_path, "worker")
    for attempt in range(3):
        play(sessions.session_for(TASK, identity(TASK.id, attempt), backend()), calls)
    sessions.close()
    assert [bool(row["documents"]) for _, row in rows(tmp_path)] == [True] + [False] * 8


def test_another_agent_may_use_the_recording_in_its_own_order_and_with_other_limits(tmp_path: Path) -> None:
    a, b, _ = TASK.gold_docs
    record(tmp_path, [("search", {"query": a}), ("open", {"doc_id": a}), ("search", {"query": b})])
    session = replay(
        tmp_path, [("search", {"query": f"  {b}\n"}), ("open", {"doc_id": a})], snippet_chars=20, attempt=7
    )
    assert [e.error for e in session.journal.entries] == ["", ""]


def test_a_miss_is_loud_and_names_the_nearest(tmp_path: Path) -> None:
    record(tmp_path, [("search", {"query": "who is the mentor"}), ("search", {"query": "rain"})])
    with pytest.raises(ReplayMiss) as miss:
        replay(tmp_path, [("search", {"query": "who is a mentor"})])
    said = str(miss.value)
    assert said.startswith(f'task {TASK.id!r} asks search("who is a mentor", 5, {{}}), which no journal in {tmp_path}')
    assert 'nearest: search("who is the mentor", 5, {})' in said and "misses=ask" in said
    with pytest.raises(ReplayMiss, match=r'get\("never"\)'):
        replay(tmp_path, [("open", {"doc_id": "never"})])
    with pytest.raises(ReplayMiss, match="6"):
        replay(tmp_path, [("search", {"query": "rain", "k": 6})])


def test_a_miss_asks_the_backend_when_told_to_if_it_is_the_same(tmp_path: Path) -> None:
    record(tmp_path, [("search", {"query": "mentor"})])
    calls = [("search", {"query": "mentor"}), ("search", {"query": "rival"}), ("open", {"doc_id": TASK.gold_docs[2]})]
    session = replay(tmp_path, calls, backend(), misses="ask")
    assert [e.error for e in session.journal.entries] == ["", "", ""]
    source = ReplayBackend(Recording(tmp_path), Uid("t", "g", 0), backend())
    asyncio.run(source.search([Query("mentor", 5), Query("rival", 5)]))
    assert source.missed == 1

    class Other(Broken):
        def info(self) -> BackendInfo:
            return BackendInfo("other", 1, "another-fingerprint")

        async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
            return [[] for _ in queries]

    with pytest.raises(ReplayMiss, match="another-fingerprint"):
        replay(tmp_path, calls, Other(), misses="ask")
    record(tmp_path / "sub", calls[:1], Relabelled("another-fingerprint"))
    next((tmp_path / "sub").iterdir()).rename(tmp_path / "other-1.jsonl")
    with pytest.raises(ReplayError, match="journals of two backends"):
        Recording(tmp_path)


class Relabelled:
    """The backend under another fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def __getattr__(self, name: str) -> Any:
        return getattr(backend(), name)

    def info(self) -> BackendInfo:
        return BackendInfo("x", 1, self._fingerprint)


class Moody:
    """A live source: fails now and then, and never gives the same page twice."""

    def __init__(self) -> None:
        self.count = 0

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.count += 1
        if self.count % 3 == 0:
            raise ConnectionError("busy\nnow")
        if self.count % 7 == 0:
            await asyncio.sleep(60)
        return [[Hit(f"p{self.count}", 1.0, (2, 6))] for _ in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        self.count += 1
        return [Document(i, "T", f"Page {self.count} \ud800 of {i}") for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo("live", 0, "live-1")

    async def close(self) -> None: ...


@pytest.mark.parametrize("retries", [0, 2])
def test_what_a_live_source_gave_and_how_it_failed_comes_again(tmp_path: Path, retries: int) -> None:
    calls = [("search", {"query": "same"}), ("open", {"doc_id": "p1"})] * 8
    more = {"retries": retries, "call_timeout_s": 0.2}
    recorded = record(tmp_path, calls, Moody(), **more)
    errors = [e.error for e in recorded.journal.entries]
    assert ("backend" in errors) == (retries == 0)
    assert same(recorded.journal, replay(tmp_path, calls, **more).journal)


class Named(Moody):
    """A remote source: its pages fail at first, and its fingerprint is known once it has answered."""

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        self.count += 1
        if self.count == 1:
            raise ConnectionError("busy")
        return [[Hit(f"p{i}", 1.0) for i in range(q.k)] for q in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        self.count += 1
        if self.count == 3:
            raise ConnectionError("busy")
        return [Document(i, "T", f"Page {i}") for i in ids]

    def info(self) -> BackendInfo:
        return BackendInfo("remote", 0, "learned" if self.count > 1 else "unknown")


def test_one_failure_of_a_search_or_of_its_pages_is_one_failure_again(tmp_path: Path) -> None:
    calls = [("find", {"pattern": "x"}), ("search", {"query": "alpha", "k": 4}), ("open", {"doc_id": 1})]
    recorded = record(tmp_path, calls, Named(), retries=1)
    assert [e.error for e in recorded.journal.entries] == ["no_page", "", ""]
    assert [e.fingerprint for e in recorded.journal.entries] == ["", "learned", ""]
    again = replay(tmp_path, calls, retries=1)
    assert same(recorded.journal, again.journal) and again.journal.entries[1].attempts == 4
    asked = replay(tmp_path, [("search", {"query": "beta"})], Named(), misses="ask", retries=2)
    assert not asked.journal.entries[0].error, "the backend's fingerprint is compared when it has answered"


def test_a_full_disk_costs_one_line(tmp_path: Path) -> None:
    file = JournalFile(tmp_path, "worker")
    whole, file._file = file._file, FullDisk(file._file)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        file.write({"a": 1})
    file._file = whole
    file.write({"b": 2})
    file.write({"c": 3})
    file.close()
    assert file.path.read_bytes().splitlines() == [b'{"a"', b'{"b":2}', b'{"c":3}']


class FullDisk:
    """Takes four octets and no more."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, 4

    def write(self, octets: bytes) -> int:
        if not self._left:
            raise OSError(28, "No space left on device")
        self._left = 0
        return int(self._file.write(octets[:4]))


def test_a_lost_document_is_a_miss_that_tells_of_the_damage(tmp_path: Path) -> None:
    a = TASK.gold_docs[0]
    record(tmp_path, [("open", {"doc_id": a})])
    file = next(tmp_path.glob("*.jsonl"))
    line = file.read_bytes()
    file.write_bytes(line[:60] + b"\n" + line.replace(b'"documents":{', b'"documents":{},"x":{'))
    with pytest.raises(ReplayMiss, match=r"1 damaged lines were left out, the first is .*jsonl:1\)"):
        replay(tmp_path, [("open", {"doc_id": a})])
    assert not replay(tmp_path, [("open", {"doc_id": a})], backend(), misses="ask").journal.entries[0].error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"uid": None}, "is damaged"),
        ({"documents": {"x": {"id": 3}}}, "is damaged"),
        ({"asked": ["x"]}, "is damaged"),
        ({"format": 2}, "not a line of a journal of format 1"),
    ],
)
def test_lines_that_are_no_calls_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    record(tmp_path, [("search", {"query": "mentor"})])
    file = next(tmp_path.glob("*.jsonl"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ReplayError, match=rf"jsonl:1 .*{says}"):
        Recording(tmp_path)
    file.write_text('{"format":1}')
    with pytest.raises(ReplayError, match="not a line of a journal"):
        Recording(tmp_path)


def test_a_killed_writer_costs_at_most_its_last_line_and_other_files_are_refused(tmp_path: Path) -> None:
    record(tmp_path, [("search", {"query": "mentor"})])
    file = next(tmp_path.glob("*.jsonl"))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    assert len(list(rows(tmp_path))) == 1
    record(tmp_path, [("search", {"query": "rival"})], attempt=1)
    assert [row["arguments"]["query"] for _, row in rows(tmp_path)] == ["mentor", "rival"]
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "a", "text": "a corpus"}) + "\n")
    with pytest.raises(ReplayError, match=r"other\.jsonl:1 is not a line of a journal"):
        Recording(tmp_path)
    for path, says in ((tmp_path / "nothing", "does not exist"), (tmp_path / "empty", "no tool calls")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ReplayError, match=says):
            Recording(path)


def test_of_a_trajectory_played_twice_the_last_counts(tmp_path: Path) -> None:
    record(tmp_path / "a", [("search", {"query": "same"})], Moody())
    late = Moody()
    late.count = 3
    later = record(tmp_path / "b", [("search", {"query": "same"})], late)
    file = next((tmp_path / "b").iterdir())
    file.rename(tmp_path / "a" / "0-sorted-first.jsonl")
    assert same(replay(tmp_path / "a", [("search", {"query": "same"})]).journal, later.journal)


def test_faults_met_are_read_from_a_folder(tmp_path: Path) -> None:
    for attempt in range(4):
        calm = FaultConfig() if attempt else FaultConfig(empty=1)
        record(tmp_path, [("search", {"query": "mentor"})] * 2, attempt=attempt, faults=calm)
    met = faults_met(tmp_path)
    assert met == {Uid(TASK.id, "g", 0): {"empty"}, **{Uid(TASK.id, "g", i): set() for i in (1, 2, 3)}}


def test_sessions_of_one_process_share_a_file_and_interleave(tmp_path: Path) -> None:
    sessions = Sessions(config(journal=JournalConfig(record=True)), tmp_path, "worker")
    opened = [sessions.session_for(TASK, identity(TASK.id, i), backend()) for i in range(4)]

    async def together() -> None:
        for query in ("mentor", "rival", "cook"):
            await asyncio.gather(*(s.call(ToolCall("search", {"query": query})) for s in opened))

    asyncio.run(together())
    sessions.close()
    assert len(list(rows(tmp_path))) == 12
    calls = [("search", {"query": q}) for q in ("mentor", "rival", "cook")]
    assert same(opened[0].journal, replay(tmp_path, calls).journal)


def test_faults_of_trajectories_whose_names_run_together_differ() -> None:
    sessions = Sessions(config(faults=FAULTS))
    met = []
    for uid in (Uid("a/b", "c", 0), Uid("a", "b/c", 0)):
        session = sessions.session_for(TASK, replace(identity(), uid=uid), backend())
        play(session, [("search", {"query": "mentor"})] * 20)
        met.append([e.faults for e in session.journal.entries])
    assert met[0] != met[1]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="misses"):
        JournalConfig(misses="shrug")
    with pytest.raises(ValueError, match="needs a folder"):
        Sessions(config(journal=JournalConfig(record=True)))
