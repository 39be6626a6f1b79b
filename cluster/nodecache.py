"""Folders that every node needs, on nodes that do not all see the same disks: read where they are, or unpacked once per node.

A place is a plain path, which every node sees, or a URI with what a node must know to have it: a folder that it perhaps sees, and storage,
where the node that the folder came from puts it as soon as another asks. What a place names never changes. A copy lies in the node's cache
(`GUMSHOE_CACHE`, else `~/.cache/gumshoe/nodes`). Invariants: processes of a node share one copy, and wait for it no longer than a deadline;
a copy appears whole or not at all, and a try that ended goes on with the files it had; a copy in use is never removed, and of the others
the newest `KEPT` stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import parse_qsl, urlencode

from cluster.errors import UserError
from cluster.nodes import Answer, Node, on_each
from cluster.storage import CHUNK_BYTES, ObjectStore, folder_path, is_object_store, join

KEPT = 4
SHIPPED = "shipped"
"""Folder of storage for what was shipped."""
UNPACK_S = 7200.0
"""How long a node may take to have a folder; the next try goes on where one that took longer was."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Ends of names of the files that only engines and learners read of a model."""
_WHOLE = ".gumshoe-whole"
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16
_SPARE_BYTES = 256 << 20
"""Left free on a node's disk."""
_ABANDONED_S = 86400.0
_LOOK_S = 0.2
_held: dict[str, IO[str]] = {}
"""Locks of the copies that this process uses, until it ends."""


@dataclass(frozen=True)
class Place:
    """A folder, for any node."""

    uri: str
    """In storage, once it was put there."""
    key: str
    """Name of a copy; its last 16 digits are of the fingerprint."""
    folder: str = ""
    """Where it came from, and what a node with the same there need not fetch."""
    node: str = ""
    """Ray's id of the node that surely has `folder`."""
    copy: bool = False
    """Whether a node that sees `folder` is to have a copy nevertheless."""

    def __str__(self) -> str:
        facts = {"key": self.key, "folder": self.folder, "node": self.node, "copy": "1" if self.copy else ""}
        return f"{self.uri}#{urlencode({k: v for k, v in facts.items() if v})}"

    @classmethod
    def parse(cls, text: str) -> Place:
        uri, _, facts = text.partition("#")
        found = dict(parse_qsl(facts))
        return cls(uri, found["key"], found.get("folder", ""), found.get("node", ""), bool(found.get("copy")))

    @property
    def seen(self) -> bool:
        """Whether this node has the same where it came from."""
        return bool(self.folder) and fingerprint(self.folder)[:16] == self.key[-16:]


def cache_root() -> Path:
    """Where this node keeps copies."""
    given = os.environ.get("GUMSHOE_CACHE", "")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "gumshoe" / "nodes"


def is_place(text: str) -> bool:
    """Whether a folder is one that nodes may have to unpack."""
    return "://" in text


def at_hand(text: str, *, weights: bool = True) -> str:
    """A place as a folder of this node, unpacked first where it must be, and kept while this process lives.

    `weights`: with the files of a model's weights, which only engines and learners need. Raises UserError when it cannot be had.
    """
    if not is_place(text):
        return text
    place, root = Place.parse(text), cache_root()
    name = _name(place, weights)
    while name not in _held:
        if found := unpack(text, weights=weights):
            return found
        lock = open(root / f".{name}.lock", "a")  # noqa: SIM115 - held as long as this process uses the copy
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_whole(root / name):
            os.utime(lock.name)
            _held[name] = lock
            _prune(root, KEPT)
        else:  # removed meanwhile
            lock.close()
    return str(root / name)


def unpack(text: str, *, weights: bool = True, wait_s: float = UNPACK_S) -> str:
    """Sees to it that this node has a place; returns the folder where it came from if that can be read here, else nothing.

    What takes long is done here, by one process of a node; the others wait. Raises UserError, also when that takes longer than `wait_s`.
    """
    if not is_place(text):
        return text
    place, root, deadline = Place.parse(text), cache_root(), time.monotonic() + wait_s
    name = _name(place, weights)
    if not place.copy and place.seen:
        return place.folder
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.unpack", "a") as lock:
        while not _is_whole(root / name):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process of this node has been unpacking {place.key} for more than {wait_s:g} s; see what it waits for"
                    ) from None
                time.sleep(_LOOK_S)
                continue
            if not _is_whole(root / name):
                _unpack(place, root, name, weights, deadline)
                (root / f".{name}.lock").touch()
    return ""


def furnish(text: str, nodes: Sequence[Node], *, ask: Callable[..., list[Answer]] = on_each) -> None:
    """Unpacks a place on these nodes, side by side, before anybody there needs it by a deadline of its own. Raises UserError."""
    if not is_place(text):
        return
    for answer in ask(nodes, unpack, text, timeout_s=UNPACK_S):
        if answer.problem:
            raise UserError(
                f"node {answer.node.name} ({answer.node.id[:8]}) cannot have {Place.parse(text).key}: {answer.problem}"
            )


def ship(
    folder: str, nodes: Sequence[Node], storage: str, *, copy: bool = False, joined: bool = False,
    ask: Callable[..., list[Answer]] = on_each,
) -> str:  # fmt: skip
    """The place of a folder of this node for actors on any of `nodes`, and, on a cluster that was `joined`, on those that come later.

    `copy`: of several nodes those that see the folder are to have a copy nevertheless. It is put into `storage` (a folder that all see, or a URI) at once
    where one of the nodes does not see it, else when one asks for it.
    """
    if (len(nodes) < 2 and not joined) or not folder or is_place(folder):
        return folder
    mine = fingerprint(folder)
    everywhere = all(a.value == mine for a in ask(nodes[1:], fingerprint, folder))
    key = f"{Path(folder).name}-{mine[:16]}"
    below = join(storage if is_object_store(storage) else folder_path(storage).absolute().as_uri(), SHIPPED, key)
    place = Place(below, key, str(Path(folder).absolute()), nodes[0].id, copy and len(nodes) > 1)
    if not everywhere:
        put(place)
    return str(place)


def put(place: Place) -> None:
    """Copies what a place names to storage, unless it is there. Runs on the node that it came from. Raises UserError."""
    if not place.seen:
        raise UserError(
            f"{place.folder} is gone, or was changed since the run began; give each run a folder that stays"
        )
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{place.key}.put", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_put(place):
            _put(place)


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


@contextlib.contextmanager
def once(folder: str) -> Iterator[None]:
    """One process of this node at a time, for work on a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------------------------------- inside


def _name(place: Place, weights: bool) -> str:
    return place.key if weights else f"{place.key}-small"


def _is_whole(copy: Path) -> bool:
    return (copy / _WHOLE).is_file()


def _is_put(place: Place) -> bool:
    if is_object_store(place.uri):
        parent, _, name = place.uri.rpartition("/")
        return ObjectStore(parent).read(f"{name}/{_WHOLE}") is not None
    return _is_whole(folder_path(place.uri))


def _put(place: Place) -> None:
    folder = Path(place.folder)
    if is_object_store(place.uri):
        parent, _, name = place.uri.rpartition("/")
        store = ObjectStore(parent)
        store.upload(folder, name, _files(folder))
        store.write(f"{name}/{_WHOLE}", b"")
        return
    target = folder_path(place.uri)
    part = target.with_name(f".part-{os.getpid()}-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    (part / _WHOLE).touch()
    with contextlib.suppress(OSError):  # another run may have been quicker
        part.rename(target)
    shutil.rmtree(part, ignore_errors=True)


def _unpack(place: Place, root: Path, name: str, weights: bool, deadline: float) -> None:
    """From where it came from, or from storage. The caller holds the lock of the copy's name."""
    part, target = root / f".part-{name}", root / name
    shutil.rmtree(target, ignore_errors=True)
    part.mkdir(exist_ok=True)
    seen = place.seen
    if not seen and not _is_put(place):
        _ask_for(place, deadline)
    parent, _, below = place.uri.rpartition("/")
    store = None if seen or not is_object_store(place.uri) else ObjectStore(parent)
    source = Path(place.folder) if seen else folder_path(place.uri)
    wanted = _files(source) if store is None else store.sizes(below)
    wanted = {n: size for n, size in wanted.items() if n != _WHOLE and (weights or not n.endswith(WEIGHTS))}
    have = _files(part)
    left = [n for n, size in wanted.items() if have.get(n) != size]
    _make_room(root, name, sum(wanted[n] for n in left))
    if store is None:
        _copy(source, part, left)
    else:
        store.download(below, part, left)
    (part / _WHOLE).touch()
    part.rename(target)


def _ask_for(place: Place, deadline: float) -> None:
    """Has the node that has it put it into storage. Raises UserError where this node cannot have it."""
    import ray

    problem = "nobody can be asked for it"
    if place.node and ray.is_initialized():
        origin = Node(place.node, "", {}, {})
        problem = on_each([origin], put, place, timeout_s=max(1.0, deadline - time.monotonic()))[0].problem
    if problem or not _is_put(place):
        raise UserError(
            f"this node sees neither {place.folder or place.key} nor {place.uri}, and needs it ({problem or 'it was put there'}); mount one of them, "
            "or give storage_path as a URI"
        )


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Files of a folder, each whole or not at all."""
    for name in names:
        goal = target / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        part = goal.with_name(f".part-{goal.name}")
        with open(source / name, "rb") as read, open(part, "wb") as written:
            shutil.copyfileobj(read, written, CHUNK_BYTES)
        part.replace(goal)


def _make_room(root: Path, name: str, nbytes: int) -> None:
    """Raises UserError where the disk has no room for so much, also without the copies that nobody uses."""
    if shutil.disk_usage(root).free - _SPARE_BYTES >= nbytes:
        return
    _prune(root, 0, besides=name)
    if (free := shutil.disk_usage(root).free) - _SPARE_BYTES < nbytes:
        raise UserError(
            f"no room for {name} in {root}: it needs {nbytes / (1 << 30):.1f} GiB, and {free / (1 << 30):.1f} GiB are free; make room, or set "
            "GUMSHOE_CACHE to a larger disk on this node"
        )


def _prune(root: Path, kept: int, besides: str = "") -> None:
    """Removes copies that nobody uses, but for the newest; and what was begun long ago, or, to keep none, now."""
    locks = sorted(root.glob(".*.lock"), key=lambda p: -p.stat().st_mtime)
    for path in locks[kept:]:
        copy = root / path.name[1 : -len(".lock")]
        with _alone(path) as alone:  # the lock itself stays: somebody may be about to take it
            if alone and copy.is_dir():
                shutil.rmtree(copy, ignore_errors=True)
    for part in root.glob(".part-*"):
        name = part.name.removeprefix(".part-")
        with _alone(root / f".{name}.unpack") as alone:
            if alone and name != besides and (not kept or time.time() - part.stat().st_mtime > _ABANDONED_S):
                shutil.rmtree(part, ignore_errors=True)


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


def _files(base: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative name; without our own mark."""
    found = {p.relative_to(base).as_posix(): p.stat().st_size for p in sorted(base.rglob("*")) if p.is_file()}
    return {name: size for name, size in found.items() if name != _WHOLE}
