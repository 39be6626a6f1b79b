"""The files a corpus may lie in: what each form yields, item by item.

| suffix | an item |
|---|---|
| `.jsonl`, `.jsonl.gz`, `.jsonl.zst` | a line: one JSON object |
| `.parquet` | a row: its columns of text, numbers and truth values |
| `.txt`, `.md`, `.html`, `.htm` | the file: its id is its path in the corpus folder, its title the first heading (`<title>`), else its name |

Invariants: files stream and no item is longer than `MAX_ITEM` bytes, so memory stays bounded; an item that cannot be understood is a
`Misfit` in its place and the next one follows; a file that cannot be read to its end is one CorpusError.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from retrieval.errors import CorpusError

MAX_ITEM = 64 << 20
"""Bytes of the longest line, or of the longest file that is one document."""
_BOM = b"\xef\xbb\xbf"
_READ = 1 << 20
_READ_ZST = 1 << 8
"""Compressed bytes at a time: each 4 may become a block of 128 KiB, so these may become 8 MiB."""


@dataclass(frozen=True)
class Misfit:
    """Why an item is not a document."""

    why: str


@dataclass(frozen=True)
class Item:
    """One entry of a file."""

    number: int
    """Line or row, from 1; 0 when the file is the item."""
    done: int
    """Bytes of the file that have been read."""
    row: Mapping[str, Any] | Misfit


@dataclass(frozen=True)
class Source:
    """A file of a corpus."""

    path: Path
    name: str
    """Its path relative to the corpus folder, with `/`; its bare name when it was given by itself."""


def read_items(source: Source) -> Iterator[Item]:
    """The items of a file. Raises CorpusError when it cannot be read to its end."""
    try:
        yield from FORMS[form_of(source.path)](source)
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"corpus {source.path} cannot be read to its end: {reason}") from None


def form_of(path: Path) -> str:
    """The suffix that says what a file holds; empty when it is of no known form."""
    name = path.name.lower()
    return next((suffix for suffix in FORMS if name.endswith(suffix)), "")


# ---------------------------------------------------------------------------------------------------- JSON lines


def _jsonl(source: Source) -> Iterator[Item]:
    with source.path.open("rb") as raw:
        name = source.path.name.lower()
        chunks = _gzip(raw) if name.endswith(".gz") else _zstd(raw) if name.endswith(".zst") else _plain(raw)
        for number, line in _lines(chunks):
            yield Item(number, raw.tell(), line if isinstance(line, Misfit) else _object(line))


def _plain(raw: BinaryIO) -> Iterator[bytes]:
    while chunk := raw.read(_READ):
        yield chunk


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        while chunk := file.read(_READ):
            yield chunk


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CorpusError("reading .zst needs the package zstandard; install it, or unpack the file") from None
    frame: Any = None
    try:
        while data := raw.read(_READ_ZST):
            while data:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame is None else frame
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")


def _lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | Misfit]]:
    """Numbered lines that are not blank, as bytes: a line of broken UTF-8 must not end the file."""
    number, dropped = 1, False

    def ended(line: bytes) -> Iterator[tuple[int, bytes | Misfit]]:
        if dropped or len(line) > MAX_ITEM:
            yield number, Misfit(f"longer than {MAX_ITEM >> 20} MiB; cut the document into several")
        elif (line.removeprefix(_BOM) if number == 1 else line).strip():
            yield number, line.removeprefix(_BOM) if number == 1 else line

    pieces: list[bytes] = []
    held = 0
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        pieces.append(first)
        held += len(first)
        for piece in more:
            yield from ended(b"".join(pieces))
            pieces, held, dropped = [piece], len(piece), False
            number += 1
        if held > MAX_ITEM:
            pieces, held, dropped = [], 0, True
    if pieces or dropped:
        yield from ended(b"".join(pieces))


def _object(line: bytes) -> Mapping[str, Any] | Misfit:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        return Misfit("not UTF-8; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return Misfit(f"not a JSON object ({error}); write one object per line")
    if not isinstance(row, dict):
        return Misfit(f"expected a JSON object, got {type(row).__name__}; write one object per line")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# ------------------------------------------------------------------------------------------------------- Parquet


def _parquet(source: Source) -> Iterator[Item]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise CorpusError("reading .parquet needs the package pyarrow; install it") from None
    size = source.path.stat().st_size
    try:
        with parquet.ParquetFile(source.path) as file:
            kinds = (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_integer,
                pa.types.is_floating,
                pa.types.is_boolean,
            )
            # vectors, images and the like beside the text would fill the store
            types = {f.name: f.type for f in file.schema_arrow}
            types |= {n: t.value_type for n, t in types.items() if pa.types.is_dictionary(t)}
            names = [name for name, kind in types.items() if any(is_kind(kind) for is_kind in kinds)]
            number, total = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=names, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield Item(number, size * number // total, {k: v for k, v in row.items() if v is not None})
    except (pa.ArrowException, UnicodeDecodeError, KeyError) as error:
        raise EOFError(str(error)) from None


# --------------------------------------------------------------------------------------------------- single pages


def _page(source: Source) -> Iterator[Item]:
    size = source.path.stat().st_size
    yield Item(0, size, _read_page(source, size))


def _read_page(source: Source, size: int) -> Mapping[str, Any] | Misfit:
    if size > MAX_ITEM:
        return Misfit(f"longer than {MAX_ITEM >> 20} MiB; cut the document into several")
    data = source.path.read_bytes().removeprefix(_BOM)
    if b"\0" in data:
        return Misfit("holds NUL bytes; it is not a text in UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Misfit("not UTF-8; convert the file to UTF-8")
    text, title = PAGES[source.path.suffix.lower()](text.replace("\r\n", "\n"))
    return {"id": source.name, "title": title or source.path.stem, "text": text}


def _txt(text: str) -> tuple[str, str]:
    return text, ""


def _markdown(text: str) -> tuple[str, str]:
    fenced = False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and (heading := re.match(r" {0,3}#{1,6}[ \t]+(.*)", line)):
            title = heading[1].rstrip().rstrip("#").rstrip()
            if title:
                return text, title
    return text, ""


_TAG = re.compile(r"""<(?:(!--)|(/?)([a-zA-Z][^\s/<>]*)(?:(?:[^<>"']|"[^"<]*"|'[^'<]*')*+>|[^<>]*>)|[!?/][^<>]*>)""")
"""A comment's beginning, a tag, or a declaration. Nothing reaches past the next `<`, so the time is linear whatever a page holds: the
standard library's parser takes seconds for some pages of 40 kB."""
_LONGEST_TITLE = 2000
_HIDDEN = re.compile("script|style|template|noscript|svg")
_HEADING = re.compile("h[1-6]")
_BREAKS = (
    (re.compile(
        "address|article|aside|blockquote|body|d[dlt]|details|div|fieldset|fig(ure|caption)|footer|form|h[1-6r]|header|main|nav|[ou]l|p|"
        "pre|section|summary|table"
    ), "\n\n"),
    (re.compile("br|li|tr|option"), "\n"), (re.compile("t[dh]"), " "),
)  # fmt: skip


def _html(text: str) -> tuple[str, str]:
    """Text and title of a page, without what no reader sees. Blocks become paragraphs."""
    parts: list[str] = []
    titles = {"title": "", "heading": ""}
    into, pre = "", False
    for data, sign, tag in _pieces(text):
        if data:
            lines = unescape(data).split("\n") if pre else [unescape(data)]
            plain = "\n".join(re.sub(r"\s+", " ", line) for line in lines)
            if into and len(titles[into]) < _LONGEST_TITLE:  # a title that nothing closes holds the whole page
                titles[into] += plain[:_LONGEST_TITLE]
            if into != "title":
                parts.append(plain)
        if tag == "title" or _HEADING.fullmatch(tag):
            kind = "title" if tag == "title" else "heading"
            into = kind if not sign and not titles[kind].strip() else ""
        pre = not sign if tag == "pre" else pre
        parts += [space for names, space in _BREAKS if names.fullmatch(tag)]
    body = re.sub(" ?\n ?", "\n", re.sub(" {2,}", " ", "".join(parts)))
    title = titles["title"].strip() or titles["heading"].strip()
    return re.sub("\n{3,}", "\n\n", body).strip(), " ".join(title.split())


def _pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """(text, "", "") and ("", "" or "/", name of a tag), in order."""
    place = 0
    while match := _TAG.search(text, place):
        yield text[place : match.start()], "", ""
        place, tag = match.end(), (match[3] or "").lower()
        end = re.compile("-->") if match[1] else None
        if _HIDDEN.fullmatch(tag) and not match[2] and text[place - 2] != "/":
            end = re.compile(f"</{tag}", re.IGNORECASE)
        if end is not None:
            close = end.search(text, place)
            place = close.end() if close and match[1] else close.start() if close else len(text)
        elif tag:
            yield "", match[2], tag
    yield text[place:], "", ""


PAGES: dict[str, Callable[[str], tuple[str, str]]] = {".txt": _txt, ".md": _markdown, ".html": _html, ".htm": _html}
"""Text and title of a file that is one document."""

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FORMS: dict[str, Callable[[Source], Iterator[Item]]] = {
    ".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".jsonl.zst": _jsonl, ".parquet": _parquet, **dict.fromkeys(PAGES, _page),
}  # fmt: skip
