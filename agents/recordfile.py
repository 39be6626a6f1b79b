"""Records in files: one per line as JSON (`.jsonl`, `.jsonl.gz`), or length-prefixed msgpack (`.msgpack`).

A msgpack file is a sequence of frames: 4 bytes big-endian length, then that many bytes of one msgpack value.

Invariants: every record is flushed whole before `write` returns; a record that a crashed writer left half-written at
the end is skipped with a warning value (and cut off before anything is appended); damage anywhere else is a
RecordError that names file and line (frame number for msgpack). Nothing is evaluated or unpickled.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar, cast

from agents.plain import from_plain, to_plain
from agents.types import RecordError

R = TypeVar("R")

_LENGTH = struct.Struct(">I")
_MAX_FRAME = 1 << 30


class RecordWriter:
    """Appends records (or plain values) to a file. Use as a context manager, or call `close`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._form = _form_of(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path, self._form)
        raw = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        self._file: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="ab")) if self._form == "gz" else raw
        self._raw = raw

    def write(self, record: Any) -> None:
        """Append one record, whole, and flush it."""
        plain = to_plain(record)
        if self._form == "msgpack":
            import msgpack

            payload = msgpack.packb(plain, use_bin_type=True)
            self._file.write(_LENGTH.pack(len(payload)) + payload)
        else:
            self._file.write(json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n")
        self._file.flush()
        self._raw.flush()

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RecordReader(Generic[R]):
    """Iterates over the records of a file, as `cls`; without a class, as plain values.

    `warning` is empty, or says after the iteration that the last record was torn and left out.
    """

    def __init__(self, path: str | Path, cls: type[R] | None = None) -> None:
        self.path = Path(path)
        self.warning = ""
        self._cls = cls
        self._form = _form_of(self.path)
        if not self.path.is_file():
            raise RecordError(f"record file {self.path} does not exist")

    def __iter__(self) -> Iterator[R]:
        self.warning = ""
        frames = _frames(self.path) if self._form == "msgpack" else _lines(self.path, self._form)
        for number, payload, whole in frames:
            where = f"{self.path}:{number}"
            try:
                if not whole and self._form == "msgpack":
                    raise ValueError("torn")
                plain = self._decode(payload)
            except Exception as error:
                if not whole:
                    self.warning = f"{where}: the last record is incomplete (its writer was stopped); it is left out"
                    return
                raise RecordError(f"{where}: damaged record: {_first_line(error)}") from None
            try:
                yield plain if self._cls is None else from_plain(self._cls, plain)
            except RecordError as error:
                raise RecordError(f"{where}: {error}") from None

    def _decode(self, payload: bytes) -> Any:
        if self._form == "msgpack":
            import msgpack

            return msgpack.unpackb(payload, raw=False, strict_map_key=False)
        return json.loads(payload.decode("utf-8"))


def read_records(path: str | Path, cls: type[R]) -> list[R]:
    """All records of a file. Raises RecordError with file and line for damage; a torn last record is left out."""
    return list(RecordReader(path, cls))


def write_records(path: str | Path, records: Iterator[Any] | list[Any]) -> int:
    """Append records; returns how many."""
    count = 0
    with RecordWriter(path) as writer:
        for count, record in enumerate(records, start=1):  # noqa: B007 - the count is the result
            writer.write(record)
    return count


def _form_of(path: Path) -> str:
    for suffix, form in ((".jsonl", "jsonl"), (".jsonl.gz", "gz"), (".msgpack", "msgpack")):
        if path.name.endswith(suffix):
            return form
    raise RecordError(f"record file {path}: unknown kind; name it .jsonl, .jsonl.gz or .msgpack")


def _lines(path: Path, form: str) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, bytes, whether the line is whole) of every line that is not blank."""
    with open(path, "rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if form == "gz" else raw
        number, rest = 0, b""
        while True:
            try:
                # read1 hands over what is there, so that what precedes the end of a torn gzip file is not lost with it
                block = file.read1(1 << 16) if form == "gz" else file.read(1 << 20)
            except EOFError:
                block = b""
            except (OSError, zlib.error) as error:
                raise RecordError(f"{path}:{number + 1}: damaged gzip data: {error}") from None
            if not block:
                break
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield number, line, True
        if rest.strip():
            yield number + 1, rest, False


def _frames(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(frame number, bytes, whether the frame is whole)."""
    with open(path, "rb") as file:
        number = 0
        while head := file.read(_LENGTH.size):
            number += 1
            if len(head) < _LENGTH.size:
                yield number, head, False
                return
            (length,) = _LENGTH.unpack(head)
            if length > _MAX_FRAME:
                raise RecordError(f"{path}:{number}: damaged record: it claims to be {length} bytes long")
            payload = file.read(length)
            yield number, payload, len(payload) == length


def _mend_tail(path: Path, form: str) -> None:
    """Cut off what a crashed writer left half-written, so that the next record does not stick to it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if form == "jsonl":
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            start = _last_newline(file) + 1
            file.seek(start)
            try:
                json.loads(file.read())
            except ValueError:
                file.truncate(start)
            else:
                file.write(b"\n")  # a whole record whose line end is missing
        return
    if form == "msgpack":
        end = sum(_LENGTH.size + len(payload) for _, payload, whole in _frames(path) if whole)
        if end < path.stat().st_size:
            os.truncate(path, end)
        return
    try:
        with gzip.open(path, "rb") as file:
            last = b"\n"
            while block := file.read(1 << 20):
                last = block[-1:]
        torn = last != b"\n"
    except (EOFError, OSError, zlib.error):
        torn = True
    if torn:
        part = path.with_name(path.name + ".part")
        with gzip.open(part, "wb") as good:
            for _, line, whole in _lines(path, form):
                if whole:
                    good.write(line + b"\n")
        part.replace(path)


def _last_newline(file: io.BufferedRandom) -> int:
    """Offset of the last line end, or -1."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found
        end = start
    return -1


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
