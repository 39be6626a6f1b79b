"""Reads corpora: files of documents in the forms of `retrieval.sources`.

A record (a JSON line, a Parquet row) is one of
- `{"id": ..., "title": ..., "text": ...}`; other fields (`url`, `date`, ...) become `Document.meta`;
- Search-R1's `{"id": ..., "contents": "title\\ntext"}`: the first line is the title, kept with its quote marks;
  a single line is text without a title.
`columns` says under which names a corpus has them, such as `{"text": "body"}`. A folder stands for the files of records in it and
below it; when it holds none, for its pages of text, Markdown and HTML.

Invariants: documents stream, so a corpus need not fit in memory; ids are unique (8 bytes are kept of each); an item that does not fit is one
error with `file:line` and how to mend it, or is skipped and counted, as asked; the fingerprint depends on the documents but
not on their order or on the files they came in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agents.types import Document
from retrieval.errors import CorpusError
from retrieval.sources import FORMS, RECORDS, Misfit, Source, form_of, read_items

MALFORMED = ("error", "skip")
Paths = str | Path | Sequence[str | Path]
_FIELDS = ("id", "title", "text", "contents", "meta")
_MAX_PROBLEMS = 20
_NEWEST = 1 << 20
"""Ids that are kept as a set, at ten times the bytes, before they are sorted in."""


@dataclass
class CorpusReport:
    """What reading a corpus found; filled while the documents stream."""

    files: int = 0
    """Files read."""
    documents: int = 0
    """Documents handed out."""
    skipped: int = 0
    """Items skipped because they did not fit."""
    problems: list[str] = field(default_factory=list)
    """The first of them, each with file:line."""
    digest: int = 0
    """Sum of the documents' hashes: order does not matter, and parts of a corpus can be added up."""
    bytes_read: int = 0
    """Of the files, as they lie on disk."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits; equal for equal sets of documents."""
        return hashlib.blake2b(f"{self.documents}:{self.digest:x}".encode(), digest_size=16).hexdigest()

    def add(self, document: Document) -> None:
        """Counts a document."""
        self.documents += 1
        self.digest = (self.digest + _hash(document)) % (1 << 256)


@dataclass(frozen=True)
class Corpus:
    """Files of documents, and how to read them."""

    paths: Sequence[str | Path]
    malformed: str = "error"
    """Items that do not fit: `error`, or `skip` and count."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names under which records have `id`, `title`, `text`, `contents`."""

    def read(self, report: CorpusReport) -> Iterator[Document]:
        return read_documents(self.paths, malformed=self.malformed, columns=self.columns, report=report)


def read_documents(
    source: Paths,
    *,
    malformed: str = "error",
    columns: Mapping[str, str] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[Document]:
    """Streams the documents of a file, a folder or several of them.

    `malformed`: `error` raises CorpusError at the first item that does not fit; `skip` skips and counts it in `report`.
    Raises CorpusError for a missing or unreadable file, an unknown suffix, and a corpus without documents.
    """
    if malformed not in MALFORMED:
        raise ValueError(f"malformed={malformed!r} is not one of {', '.join(MALFORMED)}")
    unknown = sorted(set(columns or ()) - set(_FIELDS))
    if unknown:
        raise CorpusError(f"columns names {unknown[0]!r}; a document has {', '.join(_FIELDS)}")
    report = CorpusReport() if report is None else report
    seen = _SeenIds()
    for file in _sources(source):
        report.files += 1
        before = report.bytes_read
        for item in read_items(file):
            report.bytes_read = before + item.done
            made = _document(item.row, columns or {})
            if isinstance(made, Document) and not seen.add(made.id):
                made = Misfit(f"document id {made.id!r} is already used by an earlier document; give each its own id")
            if isinstance(made, Document):
                report.add(made)
                yield made
                continue
            problem = f"{file.path}:{item.number}: {made.why}" if item.number else f"{file.path}: {made.why}"
            if malformed == "error":
                raise CorpusError(f"{problem} (or skip what does not fit: malformed=skip)")
            report.skipped += 1
            if len(report.problems) < _MAX_PROBLEMS:
                report.problems.append(problem)
    if not report.documents:
        reason = f": all {report.skipped} items were skipped, first {report.problems[0]}" if report.skipped else ""
        raise CorpusError(f"corpus {_name(source)} holds no documents{reason}")


def fingerprint(documents: Iterable[Document]) -> str:
    """The fingerprint that reading these documents from a corpus would report."""
    report = CorpusReport()
    for document in documents:
        report.add(document)
    return report.fingerprint


def corpus_files(source: Paths) -> list[Path]:
    """The files a corpus consists of. Raises CorpusError when one is missing or of an unknown form."""
    return [file.path for file in _sources(source)]


def _sources(source: Paths) -> list[Source]:
    found: list[Source] = []
    for item in [source] if isinstance(source, (str, Path)) else source:
        path = Path(item)
        if path.is_dir():
            found += _folder(path)
        elif not path.exists():
            raise CorpusError(f"corpus {path} does not exist; give a file ({', '.join(FORMS)}) or a folder of them")
        elif not form_of(path):
            raise CorpusError(f"corpus {path} is not of a known form; known: {', '.join(FORMS)}")
        else:
            found.append(Source(path, path.name))
    if not found:
        raise CorpusError("no corpus file was given")
    return found


def _folder(folder: Path) -> list[Source]:
    """Files in order of their names; of records where there are any, so that a README beside them is no document."""
    found = []

    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"corpus folder {error.filename} cannot be read: {error.strerror}; mend its permissions or leave it out"
        )

    for place, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [Source(p, p.relative_to(folder).as_posix()) for p in paths if form_of(p)]
    records = [f for f in found if form_of(f.path) in RECORDS]
    if not found:
        raise CorpusError(f"corpus folder {folder} holds no file of a known form; known: {', '.join(FORMS)}")
    return sorted(records or found, key=lambda f: f.name)


class _SeenIds:
    """Which ids came before: the newest as a set of hashes, the others as one sorted array of them."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._old_N = np.empty(0, dtype=np.uint64)

    def add(self, id_: str) -> bool:
        """False for an id that came before."""
        key = int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "big")
        place = int(np.searchsorted(self._old_N, np.uint64(key))) if len(self._old_N) else 0
        if key in self._new or (place < len(self._old_N) and int(self._old_N[place]) == key):
            return False
        self._new.add(key)
        if len(self._new) > max(_NEWEST, len(self._old_N) // 8):
            self._old_N = np.sort(np.concatenate([self._old_N, np.fromiter(self._new, np.uint64, len(self._new))]))
            self._new.clear()
        return True


def _document(row: Mapping[str, Any] | Misfit, columns: Mapping[str, str]) -> Document | Misfit:
    if isinstance(row, Misfit):
        return row
    try:
        return _checked({**{k: v for k, v in row.items() if k not in columns.values()}, **_mapped(row, columns)})
    except _Unfit as error:
        return Misfit(str(error))


class _Unfit(Exception):
    """Why a record is not a document."""


def _mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name, theirs in columns.items():
        if theirs not in row and name != "title":
            raise _Unfit(f"field {theirs!r} (for {name!r}) is missing; there are {', '.join(sorted(row)) or 'none'}")
    return {name: row.get(theirs) for name, theirs in columns.items()}


def _checked(row: Mapping[str, Any]) -> Document:
    if "id" not in row:
        raise _Unfit("field 'id' is missing; give each document an id")
    id_ = row["id"]
    if isinstance(id_, bool) or not isinstance(id_, (str, int)):
        raise _Unfit(f"field 'id' is {type(id_).__name__}, expected a string or an integer")
    try:
        id_ = str(id_).strip()
    except ValueError:
        raise _Unfit("field 'id' is a number of thousands of digits") from None
    if not id_ or not id_.isprintable():
        raise _Unfit(f"field 'id' is {id_!r}; an id is printable and not empty")
    if "text" in row:
        title, text = _string(row, "title", default=""), _string(row, "text")
    elif "contents" in row:
        title, newline, text = _string(row, "contents").partition("\n")
        if not newline:
            title, text = "", title
    else:
        raise _Unfit("field 'text' (or 'contents') is missing; say which field it is by columns, such as text=body")
    if not (title.strip() or text.strip()):
        raise _Unfit("the document is empty")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise _Unfit(f"field 'meta' is {type(meta).__name__}, expected an object")
    document = Document(id_, title, text, {**{k: v for k, v in row.items() if k not in _FIELDS}, **meta})
    try:
        json.dumps([id_, title, text, document.meta], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise _Unfit("a string holds half of a surrogate pair and cannot be stored; re-encode it") from None
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"a field cannot be stored as JSON ({error})") from None
    return document


def _string(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise _Unfit(f"field {name!r} is {type(value).__name__}, expected a string")
    return value


def _hash(document: Document) -> int:
    row = json.dumps(
        [document.id, document.title, document.text, dict(document.meta)], ensure_ascii=False, sort_keys=True
    )
    return int.from_bytes(hashlib.blake2b(row.encode("utf-8", "surrogatepass"), digest_size=32).digest(), "big")


def _name(source: Paths) -> str:
    return str(source) if isinstance(source, (str, Path)) else ", ".join(str(s) for s in source)
