"""Storage: a folder that every node sees, or an object store behind a URI; and the proof that a folder is what it should be.

`file://` and plain paths are folders. Any other URI (`s3://`, `gs://`, `hdfs://`, or what fsspec knows) is an object store, reached by
`pyarrow.fs`: nothing is appended to there, files are copied whole. Invariants: a file that marks others as whole is copied last; one that is
replaced stays what it was until the new one is whole; what cannot be reached is one line that names the URI.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cluster.errors import UserError, one_line
from cluster.nodes import Answer, Node, on_each

CHUNK_BYTES = 8 << 20
MOVABLE_BYTES = 5 << 30
"""S3 moves a file by copying it, and copies no larger ones in one request."""
_PART = ".part-"
"""Before the name of a file that is being written."""
_PROBE = ".gumshoe-probe-"
TOKEN = ".gumshoe-token"
"""File of a run's folder by which a process on any node knows that it sees that folder, and not one of its own by the same name."""
_PROBE_S = 5.0
"""A network file system may show a new file some seconds late."""


def is_object_store(path: str) -> bool:
    """Whether `path` names something that is no folder to this machine."""
    return "://" in path and urlsplit(path).scheme != "file"


def folder_path(path: str) -> Path:
    """A plain path or a `file://` URI as a path."""
    return Path(unquote(urlsplit(path).path)) if path.startswith("file://") else Path(path).expanduser()


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


class ObjectStore:
    """Files below a URI."""

    def __init__(self, uri: str) -> None:
        """Raises UserError for a URI that nothing here can open; nothing is asked of the store yet."""
        self.uri = uri.rstrip("/")
        self.filesystem, self.path = _opened(self.uri)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file below, by its name relative to `below`, without what somebody is writing; empty when there is nothing."""
        from pyarrow import fs

        base = self._at(below)
        with self._trouble("list"):
            found = self.filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
        files = (i for i in found if i.type == fs.FileType.File and not i.base_name.startswith(_PART))
        return {i.path[len(base) :].lstrip("/"): int(i.size or 0) for i in files}

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        with self._trouble("read"):
            try:
                with self.filesystem.open_input_stream(self._at(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        self._copy_in(name, iter([content]), beside=True)

    def upload(
        self, folder: Path, below: str, names: Iterable[str], *, last: str = "", replacing: bool = False
    ) -> None:
        """Copies files of a folder; the one named `last` when all others are there.

        `replacing`: nothing marks them as whole, so each is, or is what it was before; else only `last` is. Of files that are larger than
        `MOVABLE_BYTES` this is not promised. Raises FileNotFoundError for a name that is not in the folder.
        """
        ordered = sorted(names, key=lambda n: (n == last, n))
        for name in ordered:
            with open(folder / name, "rb") as file:
                beside = (replacing or name == last) and os.fstat(file.fileno()).st_size <= MOVABLE_BYTES
                self._copy_in(f"{below}/{name}", iter(lambda: file.read(CHUNK_BYTES), b""), beside=beside)

    def download(self, below: str, folder: Path, names: Iterable[str]) -> None:
        """Copies files into a folder, each of them whole or not at all."""
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{_PART}{target.name}")
            with (
                self._trouble("read"),
                self.filesystem.open_input_stream(self._at(f"{below}/{name}")) as source,
                open(part, "wb") as file,
            ):
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
            part.replace(target)

    def delete(self, below: str) -> None:
        """Removes all files below; what is not there need not be removed."""
        with self._trouble("delete from"), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self._at(below))

    def check(self) -> None:
        """Whether a file can be written, read and removed. Raises UserError."""
        name, token = f"{_PROBE}{secrets.token_hex(8)}", secrets.token_bytes(8)
        self.write(name, token)
        found = self.read(name)
        with self._trouble("delete from"):
            self.filesystem.delete_file(self._at(name))
        if found != token:
            raise UserError(f"{self.uri} does not give back what was written to it; choose another storage_path")

    def _copy_in(self, name: str, chunks: Iterator[bytes], *, beside: bool = False) -> None:
        """`beside`: under another name first, since a stream that breaks off leaves what it had by then, or nothing: pyarrow cannot abort it."""
        target = self._at(name)
        folder, _, last = target.rpartition("/")
        written = f"{folder}/{_PART}{last}" if beside else target
        with self._trouble("write"):
            self.filesystem.create_dir(folder, recursive=True)  # an object store has none, and says nothing
            try:
                with self.filesystem.open_output_stream(written) as stream:
                    for chunk in chunks:
                        stream.write(chunk)
                if beside:
                    self._move(written, target)
            except BaseException:
                if beside:
                    with contextlib.suppress(Exception):
                        self.filesystem.delete_file(written)
                raise

    def _move(self, source: str, target: str) -> None:
        try:
            self.filesystem.move(source, target)
        except NotImplementedError:  # Azure without a hierarchical namespace
            self.filesystem.copy_file(source, target)
            self.filesystem.delete_file(source)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/") if name else self.path

    @contextlib.contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot {what} {self.uri}: {reason}; correct storage_path, or give this machine the right to it"
            ) from error


def _opened(uri: str) -> tuple[Any, str]:
    """Filesystem of pyarrow, and the path in it."""
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, str(path)
    except Exception as first:
        try:
            import fsspec

            known, path = fsspec.core.url_to_fs(uri)
        except Exception as error:
            raise UserError(
                f"storage_path {uri} cannot be opened ({one_line(first)[:120]}; fsspec: {one_line(error)[:120]}); correct it, or install what "
                "its scheme needs"
            ) from None
        return fs.PyFileSystem(fs.FSSpecHandler(known)), str(path)


def prove_shared(folder: Path, nodes: Sequence[Node], ask: Callable[..., list[Answer]] = on_each) -> None:
    """Raises UserError unless every node reads what this process writes into the folder. `nodes`: all, that of this process first."""
    if len(nodes) < 2:
        return
    token = secrets.token_hex(16)
    probe = folder / f"{_PROBE}{token[:8]}"
    probe.write_text(token, encoding="utf-8")
    try:
        answers = ask(nodes[1:], read_probe, str(probe))
    finally:
        probe.unlink(missing_ok=True)
    blind = [a for a in answers if a.value != token]
    if blind:
        why = blind[0].problem or "there is no such file"
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise UserError(
            f"storage_path {folder} is not shared: node {blind[0].node.name} ({blind[0].node.id[:8]}){more} of {len(nodes)} does not see what the "
            f"driver writes there ({why}); give a folder that all nodes mount, or a URI such as s3://bucket/runs"
        )


def leave_token(folder: Path) -> str:
    """A new token in a folder, for `sees_token` on nodes that join later."""
    token = secrets.token_hex(16)
    part = folder / f"{_PART}{TOKEN}"
    part.write_text(token, encoding="utf-8")
    part.replace(folder / TOKEN)
    return token


def sees_token(folder: str, token: str, patience_s: float = _PROBE_S) -> bool:
    """Whether this node sees the folder in which that token was left."""
    deadline = time.monotonic() + patience_s
    while (found := read_probe(f"{folder}/{TOKEN}", 0.0)) != token and time.monotonic() < deadline:
        time.sleep(0.2)
    return found == token


def read_probe(path: str, patience_s: float = _PROBE_S) -> str:
    """The content of a file that may be visible only soon; empty when it is not. Runs on other nodes."""
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            return Path(path).read_text(encoding="utf-8")
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.2)
