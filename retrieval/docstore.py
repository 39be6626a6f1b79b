"""The documents of a corpus in one SQLite file, fetched by id.

Invariants: a store is built beside its place and moved there whole, so a half-built one is never seen; afterwards it is
read only, so any number of processes share it (and the page cache) without copies; a store pickles as its path.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agents.types import Document
from retrieval.corpus import CorpusReport
from retrieval.errors import StoreError

FORMAT = 1
_MMAP_BYTES = 1 << 36
_CHUNK = 500
"""Ids per statement; SQLite allows 999 parameters on its oldest versions."""


class DocStore:
    """An open store. Thread-safe."""

    def __init__(self, path: str | Path) -> None:
        """Opens a store. Raises StoreError when it is missing, broken or of another format."""
        self.path = Path(path).resolve()
        self._lock = threading.Lock()
        if not self.path.is_file():
            raise StoreError(f"document store {self.path} does not exist; build it from its corpus")
        try:
            self._db = sqlite3.connect(
                f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False, isolation_level=None
            )
            self._db.execute(f"PRAGMA mmap_size={_MMAP_BYTES}")
            info = dict(self._db.execute("SELECT key, value FROM info"))
            self.fingerprint = str(info["corpus"])
            self._len = int(info["documents"])
            stored = int(info["format"])
        except (sqlite3.Error, KeyError, ValueError) as error:
            raise StoreError(
                f"{self.path} is not a readable document store ({error}); delete it and build it again"
            ) from None
        if stored != FORMAT:
            raise StoreError(f"{self.path} has store format {stored}, this version reads {FORMAT}; build it again")

    @classmethod
    def build(cls, path: str | Path, documents: Iterable[Document]) -> DocStore:
        """Writes the documents and opens the store. An existing store is replaced only when all is written.

        Raises StoreError for a repeated id, OSError for a full disk; what `documents` raises passes through.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        report = CorpusReport()
        db = sqlite3.connect(partial, isolation_level=None)
        try:
            # no journal: a crash loses only the partial file, which nobody reads
            db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
            db.execute("CREATE TABLE info (key TEXT PRIMARY KEY, value TEXT)")
            db.execute("CREATE TABLE documents (id TEXT PRIMARY KEY, title TEXT, text TEXT, meta TEXT)")
            db.execute("BEGIN")
            db.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", _rows(documents, report))
            info = {"format": FORMAT, "corpus": report.fingerprint, "documents": report.documents}
            db.executemany("INSERT INTO info VALUES (?, ?)", [(k, str(v)) for k, v in info.items()])
            db.execute("COMMIT")
            db.close()
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except sqlite3.IntegrityError:
            raise StoreError(f"two documents of {path.name} share an id (after {report.documents} documents)") from None
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise StoreError(f"document store {path} cannot be written: {error}") from None
        finally:
            db.close()
            partial.unlink(missing_ok=True)
        return cls(path)

    def get(self, ids: Sequence[str]) -> list[Document | None]:
        """Documents in the order asked, None where an id is unknown."""
        wanted = [i for i in dict.fromkeys(ids) if _can_be_asked(i)]
        found: dict[str, Document] = {}
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            marks = ",".join("?" * len(chunk))
            for row in self._all(f"SELECT id, title, text, meta FROM documents WHERE id IN ({marks})", chunk):
                found[row[0]] = _document(row)
        return [found.get(i) for i in ids]

    def ids(self) -> list[str]:
        """All ids, sorted by code point."""
        return [row[0] for row in self._all("SELECT id FROM documents ORDER BY id")]

    def __len__(self) -> int:
        return self._len

    def __contains__(self, id_: object) -> bool:
        return (
            isinstance(id_, str)
            and _can_be_asked(id_)
            and bool(self._all("SELECT 1 FROM documents WHERE id = ?", [id_]))
        )

    def __iter__(self) -> Iterator[Document]:
        """All documents, by id."""
        return self.run("")

    def run(self, first: str) -> Iterator[Document]:
        """The documents from an id on, by id."""
        sign = ">="
        while rows := self._all(
            f"SELECT id, title, text, meta FROM documents WHERE id {sign} ? ORDER BY id LIMIT 1000", [first]
        ):
            yield from map(_document, rows)
            first, sign = rows[-1][0], ">"

    def close(self) -> None:
        self._db.close()

    def __reduce__(self) -> tuple[type[DocStore], tuple[str]]:
        return DocStore, (str(self.path),)

    def _all(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"document store {self.path} cannot be read: {error}") from None


def _can_be_asked(id_: str) -> bool:
    """Half of a surrogate pair is in no store, and SQLite refuses to look for it."""
    return id_.isprintable() or id_.encode("utf-8", "ignore").decode() == id_


def _rows(documents: Iterable[Document], report: CorpusReport) -> Iterator[tuple[str, str, str, str]]:
    for d in documents:
        report.add(d)
        yield d.id, d.title, d.text, json.dumps(dict(d.meta), ensure_ascii=False) if d.meta else ""


def _document(row: tuple[str, str, str, str]) -> Document:
    return Document(row[0], row[1], row[2], json.loads(row[3]) if row[3] else {})
