"""Folders that every node needs, on nodes that do not all see the same disks: read where they are, or unpacked once per node.

A place is a plain path, which every node sees, or `URI#KEY`: what lies at the URI never changes, and a node that needs it copies it into
its cache (`GUMSHOE_CACHE`, else `~/.cache/gumshoe/nodes`), under a lock, whole or not at all. Invariants: processes of a node share one
copy; a copy in use is never removed, and of the others the newest `KEPT` stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from cluster.errors import UserError
from cluster.nodes import Answer, Node, on_each
from cluster.storage import ObjectStore, folder_path, is_object_store, join

KEPT = 4
SHIPPED = "shipped"
"""Folder of storage for what was shipped."""
_WHOLE = ".gumshoe-whole"
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16
_held: dict[str, IO[str]] = {}
"""Locks of the copies that this process uses, until it ends."""


def cache_root() -> Path:
    """Where this node keeps copies."""
    given = os.environ.get("GUMSHOE_CACHE", "")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "gumshoe" / "nodes"


def at_hand(place: str) -> str:
    """A place as a folder of this node, unpacked first where it must be. Raises UserError when it cannot be had."""
    if "://" not in place:
        return place
    uri, _, key = place.partition("#")
    root = cache_root()
    target = root / key
    if key in _held:
        return str(target)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        lock = open(root / f".{key}.lock", "a")  # noqa: SIM115 - held as long as this process uses the copy
        fcntl.flock(lock, fcntl.LOCK_SH)
        if (target / _WHOLE).is_file():
            os.utime(lock.name)
            _held[key] = lock
            _prune(root)
            return str(target)
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody has it: whoever comes first unpacks, the others wait here
        with lock:
            if not (target / _WHOLE).is_file():
                _unpack(uri, root / f".part-{key}", target)


def ship(
    folder: str, nodes: Sequence[Node], storage: str, *, copy: bool = False, ask: Callable[..., list[Answer]] = on_each
) -> str:
    """The place of a folder of this node for actors on any of `nodes`.

    The folder itself where all of them see the same in it, unless each is to have a `copy`; else it is copied to `storage` (a folder that
    all see, or a URI), once.
    """
    if len(nodes) < 2 or not folder or "://" in folder:
        return folder
    mine = fingerprint(folder)
    everywhere = all(a.value == mine for a in ask(nodes[1:], fingerprint, folder))
    if everywhere and not copy:
        return folder
    key = f"{Path(folder).name}-{mine[:16]}"
    if everywhere:
        return f"{Path(folder).absolute().as_uri()}#{key}"
    return f"{_put(Path(folder), storage, key)}#{key}"


def fingerprint(folder: str) -> str:
    """32 hex digits that tell folders apart: names, sizes, small files and samples of large ones; empty where there is none."""
    digest = hashlib.blake2b(digest_size=16)
    base = Path(folder)
    if not base.is_dir():
        return ""
    for name, size in _files(base).items():
        digest.update(f"{name}\0{size}\0".encode())
        with open(base / name, "rb") as file:
            for start in sorted({i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _put(folder: Path, storage: str, key: str) -> str:
    """Copies a folder to storage, unless it is there; returns its URI."""
    names = _files(folder)
    if is_object_store(storage):
        store = ObjectStore(storage)
        if store.read(f"{SHIPPED}/{key}/{_WHOLE}") is None:
            store.upload(folder, f"{SHIPPED}/{key}", names)
            store.write(f"{SHIPPED}/{key}/{_WHOLE}", b"")
        return join(storage, SHIPPED, key)
    target = folder_path(storage) / SHIPPED / key
    if not (target / _WHOLE).is_file():
        part = target.with_name(f".part-{os.getpid()}-{key}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part)
        (part / _WHOLE).touch()
        with contextlib.suppress(OSError):  # another run may have been quicker
            part.rename(target)
        shutil.rmtree(part, ignore_errors=True)
    return target.absolute().as_uri()


def _unpack(uri: str, part: Path, target: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    part.mkdir()
    try:
        if is_object_store(uri):
            parent, _, name = uri.rpartition("/")
            store = ObjectStore(parent)
            store.download(name, part, store.sizes(name))
        else:
            source = folder_path(uri)
            if not source.is_dir():
                raise UserError(
                    f"this node does not see {source}, which it needs; mount it, or give storage_path as a URI"
                )
            shutil.copytree(source, part, dirs_exist_ok=True)
        (part / _WHOLE).touch()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _prune(root: Path) -> None:
    """Removes copies that nobody uses, but for the newest."""
    locks = sorted(root.glob(".*.lock"), key=lambda p: -p.stat().st_mtime)
    for path in locks[KEPT:]:
        copy = root / path.name[1 : -len(".lock")]
        with _alone(path) as alone:  # the lock itself stays: somebody may be about to take it
            if alone and copy.is_dir():
                shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock, which is held meanwhile if so."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(path))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


@contextlib.contextmanager
def once(folder: str) -> Iterator[None]:
    """One process of this node at a time, for work on a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _files(base: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative name; without our own mark."""
    found = {p.relative_to(base).as_posix(): p.stat().st_size for p in sorted(base.rglob("*")) if p.is_file()}
    return {name: size for name, size in found.items() if name != _WHOLE}
