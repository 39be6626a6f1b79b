"""Reads corpora: files of documents, one JSON object a line.

Forms (each `.jsonl` or `.jsonl.gz`; a folder stands for all such files in it, by name):
- `{"id": ..., "title": ..., "text": ...}`; other fields (`url`, `date`, ...) become `Document.meta`;
- Search-R1's `{"id": ..., "contents": "title\\ntext"}`: the first line is the title, kept with its quote marks;
  a single line is text without a title.

Invariants: documents stream, so a corpus need not fit in memory; ids are unique; a line that does not fit is one error
with `file:line` and how to mend it, or is skipped and counted, as asked; the fingerprint depends on the documents but
not on their order or on the files they came in.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from agents.types import Document
from retrieval.errors import CorpusError

SUFFIXES = (".jsonl", ".jsonl.gz")
MALFORMED = ("error", "skip")
_KNOWN = {"id", "title", "text", "contents", "meta"}
_MAX_PROBLEMS = 20


@dataclass
class CorpusReport:
    """What reading a corpus found; filled while the documents stream."""

    files: list[str] = field(default_factory=list)
    """Files read, in order."""
    documents: int = 0
    """Documents handed out."""
    skipped: int = 0
    """Lines skipped because they did not fit."""
    problems: list[str] = field(default_factory=list)
    """The first of them, each with file:line."""
    digest: int = 0
    """Sum of the documents' hashes: order does not matter, and parts of a corpus can be added up."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits; equal for equal sets of documents."""
        return hashlib.blake2b(f"{self.documents}:{self.digest:x}".encode(), digest_size=16).hexdigest()

    def add(self, document: Document) -> None:
        """Counts a document."""
        self.documents += 1
        self.digest = (self.digest + _hash(document)) % (1 << 256)


def read_documents(
    source: str | Path | Sequence[str | Path], *, malformed: str = "error", report: CorpusReport | None = None
) -> Iterator[Document]:
    """Streams the documents of a file, a folder or several of them.

    `malformed`: `error` raises CorpusError at the first line that does not fit; `skip` skips and counts it in `report`.
    Raises CorpusError for a missing or unreadable file, an unknown suffix, and a corpus without documents.
    """
    if malformed not in MALFORMED:
        raise ValueError(f"malformed={malformed!r} is not one of {', '.join(MALFORMED)}")
    report = CorpusReport() if report is None else report
    first_seen: dict[str, str] = {}
    for path in corpus_files(source):
        report.files.append(str(path))
        for number, line in _lines(path):
            where = f"{path}:{number}"
            try:
                document = _document(line)
                if document.id in first_seen:
                    raise _Misfit(
                        f"document id {document.id!r} is already used at {first_seen[document.id]}; give each its own id"
                    )
            except _Misfit as misfit:
                if malformed == "error":
                    raise CorpusError(f"{where}: {misfit} (or skip such lines: malformed=skip)") from None
                report.skipped += 1
                if len(report.problems) < _MAX_PROBLEMS:
                    report.problems.append(f"{where}: {misfit}")
                continue
            first_seen[document.id] = where
            report.add(document)
            yield document
    if not report.documents:
        reason = f": all {report.skipped} lines were skipped, first {report.problems[0]}" if report.skipped else ""
        raise CorpusError(f"corpus {_name(source)} holds no documents{reason}")


def fingerprint(documents: Iterable[Document]) -> str:
    """The fingerprint that reading these documents from a corpus would report."""
    report = CorpusReport()
    for document in documents:
        report.add(document)
    return report.fingerprint


def corpus_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files a source stands for. Raises CorpusError when one is missing or of an unknown form."""
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    files: list[Path] = []
    for item in sources:
        path = Path(item)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            if not found:
                raise CorpusError(f"corpus folder {path} holds no {' or '.join(SUFFIXES)} file")
            files += found
        elif not path.exists():
            raise CorpusError(f"corpus {path} does not exist; give the path of a .jsonl or .jsonl.gz file")
        elif not path.name.endswith(SUFFIXES):
            raise CorpusError(f"corpus {path} is not of a known form; known: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise CorpusError("no corpus file was given")
    return files


class _Misfit(Exception):
    """Why a line is not a document."""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, as bytes: a line of broken UTF-8 must not end the file."""
    try:
        opened: IO[bytes] = (
            cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
        )
        with opened as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"corpus {path} cannot be read to its end: {error or type(error).__name__}") from None


def _document(line: bytes) -> Document:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Misfit("not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _Misfit(f"not a JSON object ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise _Misfit(f"expected a JSON object, got {type(row).__name__}; write one object per line")
    if "id" not in row:
        raise _Misfit("field 'id' is missing; give each document an id")
    id_ = row["id"]
    if isinstance(id_, bool) or not isinstance(id_, (str, int)):
        raise _Misfit(f"field 'id' is {type(id_).__name__}, expected a string or an integer")
    id_ = str(id_).strip()
    if not id_ or not id_.isprintable():
        raise _Misfit(f"field 'id' is {id_!r}; an id is printable and not empty")
    if "text" in row:
        title, text = _string(row, "title", default=""), _string(row, "text")
    elif "contents" in row:
        title, newline, text = _string(row, "contents").partition("\n")
        if not newline:
            title, text = "", title
    else:
        raise _Misfit("field 'text' (or 'contents') is missing")
    if not (title.strip() or text.strip()):
        raise _Misfit("the document is empty")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise _Misfit(f"field 'meta' is {type(meta).__name__}, expected an object")
    meta = {**{k: v for k, v in row.items() if k not in _KNOWN}, **meta}
    try:
        json.dumps([id_, title, text, meta], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Misfit("a string holds half of a surrogate pair and cannot be stored; re-encode it") from None
    return Document(id_, title, text, meta)


def _string(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise _Misfit(f"field {name!r} is {type(value).__name__}, expected a string")
    return value


def _hash(document: Document) -> int:
    row = json.dumps(
        [document.id, document.title, document.text, dict(document.meta)], ensure_ascii=False, sort_keys=True
    )
    return int.from_bytes(hashlib.blake2b(row.encode("utf-8", "surrogatepass"), digest_size=32).digest(), "big")


def _name(source: str | Path | Sequence[str | Path]) -> str:
    return str(source) if isinstance(source, (str, Path)) else ", ".join(str(s) for s in source)
