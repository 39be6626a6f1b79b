"""Tool calls on disk, and a backend that answers from them.

A journal file has one line per tool call: whose it was, what was asked and what the agent read (with hashes), what the guard
masked, which faults were made, and `asked`: every request to the retrieval backend with its outcome. A document is written
once per file, in the first line that needs it.

A replay runs a session on these outcomes, so budgets, guard, faults and texts are made anew by the config of the replay; with
that of the recording the journal is the same (`journal.same`). Outcomes are looked up by tool, normalised query, k and
filters (or document id): first those of the same trajectory, in their order; then any of the same task; then any at all.

Invariants: a line is whole or left out (a killed writer, a full disk); journals of two backends are never mixed; a request that no journal
holds, or only a damaged line, is a ReplayMiss or asks the backend, as told, and never an empty answer; nothing is evaluated or unpickled.
"""

from __future__ import annotations

import difflib
import json
import os
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from agents.interfaces import Backend
from agents.plain import from_plain, to_plain
from agents.types import BackendInfo, Document, Hit, Identity, Query, ToolEvent, Uid
from envs.journal import Entry, ReplayMiss, digest
from retrieval.errors import BadQuery, RetrievalError
from retrieval.snippets import one_line

T = TypeVar("T")
FORMAT = 1
_FIELDS = {"uid", "session", "started_s", "fingerprint", "faults", "asked", "documents"}
"""What reading a line needs of it."""


class JournalFile:
    """One file of a folder, which one process appends to."""

    def __init__(self, folder: str | Path, name: str) -> None:
        self.path = Path(folder) / f"{name}-{os.getpid()}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._torn = False
        """Whether the file ends within a line: what was left half-written stays a line of its own."""
        if size := self._file.seek(0, os.SEEK_END):
            self._file.seek(size - 1)
            self._torn = self._file.read(1) != b"\n"
        self.documents: set[str] = set()
        """Digests of those that this file has."""

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line. A full disk raises OSError."""
        line = json.dumps(row, ensure_ascii=True, separators=(",", ":"), default=str).encode() + b"\n"
        left = b"\n" + line if self._torn else line
        self._torn = True
        while left:
            left = left[self._file.write(left) :]
        self._torn = False

    def close(self) -> None:
        self._file.close()


class RecordingBackend:
    """A `Backend` that notes all that was asked of another one, for one session; `note` writes it as the call ends."""

    def __init__(self, backend: Backend, file: JournalFile, identity: Identity, config: str) -> None:
        """`config`: digest of the settings that change what a session shows."""
        self._backend = backend
        self._file = file
        self._identity = identity
        self._head = {"session": os.urandom(8).hex(), "config": config, "started_s": time.time()}
        self._asked: list[dict[str, Any]] = []
        self._documents: dict[str, Any] = {}

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        try:
            found = await self._backend.search(queries)
        except BaseException as error:
            self._asked += [{"key": _search_key(q), "failed": _failure(error)} for q in queries]
            raise
        self._asked += [{"key": _search_key(q), "hits": to_plain(hits)} for q, hits in zip(queries, found, strict=True)]
        return found

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        try:
            found = await self._backend.get(ids)
        except BaseException as error:
            self._asked += [{"key": ["get", i], "failed": _failure(error)} for i in ids]
            raise
        for id_, document in zip(ids, found, strict=True):
            mark = None
            if document is not None:
                plain = to_plain(document)
                mark = digest(plain)
                if mark not in self._file.documents:
                    self._documents[mark] = plain
            self._asked.append({"key": ["get", id_], "document": mark})
        return found

    def info(self) -> BackendInfo:
        return self._backend.info()

    async def close(self) -> None:
        """The backend is shared and stays open."""

    def note(self, entry: Entry, event: ToolEvent) -> None:
        """The sink of a session's journal: writes a finished call."""
        uid = self._identity.uid
        row = {
            "format": FORMAT, "run": self._identity.run_id, "uid": list(uid), **self._head, "call_id": event.call.id,
            **asdict(entry), "arguments_hash": digest([entry.name, entry.arguments]), "text": event.text,
            "seen": to_plain(event.seen), "asked": self._asked, "documents": self._documents,
        }  # fmt: skip
        self._file.write(row)
        self._file.documents.update(self._documents)
        self._asked, self._documents = [], {}


class Recording:
    """The outcomes in a folder of journals (or one file), in memory. Raises ReplayError for a folder that cannot serve."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.documents: dict[str, Document] = {}
        self.damaged: list[str] = []
        """Lines that are not whole, as file:line; they were left out."""
        self._own: dict[Uid, tuple[str, float, dict[str, list[Any]]]] = {}
        """Outcomes of the last session of each trajectory."""
        self._task: dict[tuple[str, str], Any] = {}
        self._any: dict[str, Any] = {}
        fingerprints: dict[str, str] = {}
        where = ""
        for where, row in rows(self.path, self.damaged):
            if row["fingerprint"]:  # a call without an answer has none: a remote backend is known by its answers
                fingerprints.setdefault(row["fingerprint"], where)
            if len(fingerprints) > 1:
                (a, first), (b, second) = fingerprints.items()
                raise ReplayError(
                    f"{self.path} holds journals of two backends: {a!r} ({first}) and {b!r} ({second}); replay one of them"
                )
            try:
                self._add(row)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ReplayError(f"{where} is damaged ({one_line(str(error))}); leave the line out") from None
        if not where:
            raise ReplayError(f"{self.path} holds no tool calls; record some with sandbox.journal.record=true")
        self.fingerprint = next(iter(fingerprints), "")

    def _add(self, row: dict[str, Any]) -> None:
        uid = Uid(*row["uid"])
        self.documents.update((mark, from_plain(Document, d)) for mark, d in row["documents"].items())
        kept = self._own.get(uid)
        if kept is None or (kept[0] != row["session"] and kept[1] < row["started_s"]):
            kept = self._own[uid] = row["session"], row["started_s"], {}
        for asked in row["asked"]:
            key = _text(asked["key"])
            if kept[0] == row["session"]:
                kept[2].setdefault(key, []).append(asked)
            if "failed" not in asked:
                self._task.setdefault((uid.task, key), asked)
                self._any.setdefault(key, asked)

    def outcome(self, uid: Uid, key: list[Any], turn: int) -> Any | None:
        """What came of a request; `turn` counts how often this trajectory has made it before. None: not recorded, or the line
        that held its document is lost."""
        name = _text(key)
        own = self._own[uid][2].get(name) if uid in self._own else None
        found = own[min(turn, len(own) - 1)] if own else self._task.get((uid.task, name)) or self._any.get(name)
        lost = found and found.get("document") and found["document"] not in self.documents
        return None if lost else found

    def nearest(self, uid: Uid, key: list[Any]) -> str:
        """The recorded request that is most like this one, of the same task where there is any."""
        said = [name for task, name in self._task if task == uid.task] or list(self._any)[:10_000]
        near = difflib.get_close_matches(_text(key), said, n=1, cutoff=0.0)
        return near[0] if near else "none"


class ReplayBackend:
    """A `Backend` that answers one trajectory from a recording. What is not in there asks `live`, or is a ReplayMiss."""

    def __init__(self, recording: Recording, uid: Uid, live: Backend | None = None) -> None:
        self.missed = 0
        self._recording, self._uid, self._live = recording, uid, live
        self._turns: dict[str, int] = {}

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        outcomes = self._outcomes([_search_key(query) for query in queries])
        found: list[list[Hit]] = []
        for query, outcome in zip(queries, outcomes, strict=True):
            if outcome is None and self._live is not None:
                found += self._checked(self._live, await self._live.search([query]))
            else:
                found.append([from_plain(Hit, hit) for hit in outcome["hits"]])
        return found

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        outcomes = self._outcomes([["get", id_] for id_ in ids])
        found: list[Document | None] = []
        for id_, outcome in zip(ids, outcomes, strict=True):
            if outcome is None and self._live is not None:
                found += self._checked(self._live, await self._live.get([id_]))
            else:
                found.append(outcome["document"] and self._recording.documents[outcome["document"]])
        return found

    def info(self) -> BackendInfo:
        return BackendInfo("replay", len(self._recording.documents), self._recording.fingerprint, ("filters",))

    async def close(self) -> None:
        """Nothing is open."""

    def _outcomes(self, keys: Sequence[list[Any]]) -> list[Any]:
        """What came of each part of a request, None for what `live` must answer. A request failed as a whole, so every part
        has its turn before the failure is raised."""
        outcomes = []
        for key in keys:
            name = _text(key)
            turn = self._turns[name] = self._turns.get(name, -1) + 1
            outcomes.append(self._recording.outcome(self._uid, key, turn))
            if outcomes[-1] is None:
                self._miss(key)
        for outcome in outcomes:
            if outcome and "failed" in outcome:
                raise _again(*outcome["failed"])
        return outcomes

    def _miss(self, key: list[Any]) -> None:
        self.missed += 1
        if self._live is None:
            damaged = self._recording.damaged
            lost = f" ({len(damaged)} damaged lines were left out, the first is {damaged[0]})" if damaged else ""
            raise ReplayMiss(
                f"task {self._uid.task!r} asks {_text(key)}, which no journal in {self._recording.path} holds{lost}; nearest: "
                f"{self._recording.nearest(self._uid, key)}; set sandbox.journal.misses=ask to ask the backend"
            )

    def _checked(self, live: Backend, answer: T) -> T:
        """An answer of the live backend, if that is the one of the recording: a remote one is known by its answers."""
        recorded, now = self._recording.fingerprint, live.info().fingerprint
        if recorded not in ("", now):
            raise ReplayMiss(
                f"{self._recording.path} was recorded on backend {recorded!r}, misses ask {now!r}; "
                "set sandbox.journal.misses=error or use the same index"
            )
        return answer


class ReplayError(RetrievalError):
    """A recording that cannot be used; the message says why."""


def rows(path: str | Path, damaged: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, values) of every call in a folder of journals or one file. A torn line is left out, and noted in `damaged`."""
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not path.exists():
        raise ReplayError(f"{path} does not exist; give a folder of journals, such as RUN/journals")
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue  # where a failed write has left nothing
                try:
                    row = json.loads(line)
                except ValueError:  # its writer was killed, or its disk full; the call was never answered
                    if damaged is not None:
                        damaged.append(f"{file}:{number}")
                    continue
                if not isinstance(row, dict) or row.get("format") != FORMAT or not row.keys() >= _FIELDS:
                    raise ReplayError(f"{file}:{number} is not a line of a journal of format {FORMAT}")
                yield f"{file}:{number}", row


def faults_met(path: str | Path) -> dict[Uid, set[str]]:
    """Faults of each recorded trajectory, in its last session; for `faults.recovery`."""
    last: dict[Uid, tuple[float, set[str]]] = {}
    for _, row in rows(path):
        uid, started_s = Uid(*row["uid"]), row["started_s"]
        if uid not in last or last[uid][0] < started_s:
            last[uid] = started_s, set()
        if last[uid][0] == started_s:
            last[uid][1].update(row["faults"])
    return {uid: faults for uid, (_, faults) in last.items()}


def _search_key(query: Query) -> list[Any]:
    text = " ".join(unicodedata.normalize("NFC", query.text).split())
    return ["search", text, query.k, to_plain(query.filters)]


def _text(key: list[Any]) -> str:
    """A key as people read it, and as it is looked up."""
    return f"{key[0]}({', '.join(json.dumps(part, ensure_ascii=False, sort_keys=True) for part in key[1:])})"


def _failure(error: BaseException) -> list[str]:
    """Name and message of an error. A cancelled request is one that the sandbox's time limit ended."""
    cancelled = type(error).__name__ == "CancelledError"
    return ["TimeoutError", ""] if cancelled else [type(error).__name__, str(error)]


def _again(name: str, message: str) -> Exception:
    """A recorded error, which reads as it did."""
    return BadQuery(message) if name == "BadQuery" else type(str(name), (RetrievalError,), {})(message)
