"""A run whose storage is an object store: its folder is on this machine, and is copied to the store as it grows.

An object store knows no appending, so files are copied whole when they have changed; every `EVERY_S`, and at the end. Checkpoints go up
by themselves, each as soon as it is whole (`push_checkpoint`), from the node of the learner that wrote it. Invariants: what is in the store
is at most `EVERY_S` behind, and any state of it can be gone on from, since a ledger and a checkpoint need not be of the same moment, and a
file there stays what it was until the next is whole; a copy on this machine that is not what was copied last is replaced by the store's, since
the run went on elsewhere; a store that fails never hides why a run ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import UserError, one_line
from cluster.storage import ObjectStore

EVERY_S = 30.0
MARK = "mirror.json"
"""Names the copy that was made last, here and in the store."""
CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
"""A checkpoint that has one is whole (`agents.learning.checkpoint`)."""
_NOT_COPIED = (f"{CHECKPOINTS}/", "index/", "ray_train/", MARK)
"""Checkpoints go by themselves, an index is built anew or shipped, and Ray Train writes to the store."""


@contextlib.contextmanager
def mirrored(folder: Path, uri: str, *, every_s: float = EVERY_S) -> Iterator[None]:
    """Copies a run's folder to `uri` while the block runs, and once more at its end. Raises UserError if that one fails, unless the block did:
    then it is a line beside the block's own error."""
    mirror = Mirror(folder, uri)
    mirror.push()
    over = threading.Event()

    def follow() -> None:
        while not over.wait(every_s):
            try:
                mirror.push()
            except (UserError, OSError) as error:  # the next time may do; the end of the run tells if not
                print(f"gumshoe: {one_line(error)}; it is tried again", file=sys.stderr, flush=True)

    thread = threading.Thread(target=follow, name="gumshoe-mirror", daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        over.set()
        thread.join()
        try:
            mirror.push()
        except Exception as error:
            if not failed:
                raise
            print(
                f"gumshoe: {one_line(error)}; the copy at {uri} lacks the end of this run", file=sys.stderr, flush=True
            )


class Mirror:
    """The way of a folder to the store."""

    def __init__(self, folder: Path, uri: str) -> None:
        self._folder = folder
        self._parent, _, self._name = uri.rstrip("/").rpartition("/")
        self._store = ObjectStore(self._parent)
        self._copied: dict[str, tuple[int, int]] = {}

    def push(self) -> int:
        """Copies what has changed since the last time; returns how many files. Raises UserError when the store does not take them. What
        vanishes meanwhile was a draft."""
        found = self._files()
        changed = [n for n, s in found.items() if self._copied.get(n) != s]
        if not changed:
            return 0
        mark = json.dumps({"copy": secrets.token_hex(8)}).encode()
        sent: dict[str, tuple[int, int]] = {}
        for name in changed:
            with contextlib.suppress(FileNotFoundError):
                self._store.upload(self._folder, self._name, [name], replacing=True)
                sent[name] = found[name]
        self._store.write(f"{self._name}/{MARK}", mark)
        (self._folder / MARK).write_bytes(mark)
        self._copied |= sent
        return len(sent)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of what is to be copied, by name."""
        found: dict[str, tuple[int, int]] = {}
        for part in sorted(self._folder.iterdir()):
            if f"{part.name}/".startswith(_NOT_COPIED):
                continue  # nor is it looked into: checkpoints go while somebody looks
            paths = [Path(at, n) for at, _, names in os.walk(part) for n in names] if part.is_dir() else [part]
            for path in sorted(paths):
                if path.name.startswith(".part-"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    if stat.S_ISREG(about.st_mode):
                        found[path.relative_to(self._folder).as_posix()] = (about.st_size, about.st_mtime_ns)
        return found


def holds(uri: str, file: str) -> bool:
    """Whether the store has that file of a run."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return ObjectStore(parent).read(f"{name}/{file}") is not None


def fetch(uri: str, folder: Path) -> bool:
    """Brings a run's folder here to go on with it, without checkpoints; returns whether the store's copy replaced the one here."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    store = ObjectStore(parent)
    mark = store.read(f"{name}/{MARK}")
    if mark is None or ((folder / MARK).is_file() and (folder / MARK).read_bytes() == mark):
        return False
    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    store.download(name, part, [n for n in store.sizes(name) if not n.startswith(_NOT_COPIED)])
    (part / MARK).write_bytes(mark)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return True


def push_checkpoint(folder: Path, uri: str, keep: int) -> None:
    """Copies a checkpoint that is whole below `uri`, and removes all but the newest `keep` there."""
    store = ObjectStore(uri)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    store.upload(folder, folder.name, names, last=_MANIFEST)
    for old in _whole(store)[:-keep]:
        store.delete(old)


def pull_checkpoint(uri: str, folder: Path, name: str) -> None:
    """Brings the checkpoint `name` below `uri` into `folder`, unless it is there; empty: none. Later ones in the folder never came into
    the store: a run that went on elsewhere knows nothing of them, so they step aside."""
    for later in sorted(folder.glob("step-*")):
        if later.name > name:
            aside = later.with_name(f"unsent-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    if not name:
        return
    store, here = ObjectStore(uri), folder / name / _MANIFEST
    if here.is_file() and here.read_bytes() == store.read(f"{name}/{_MANIFEST}"):
        return
    part = folder / f".part-{name}"
    shutil.rmtree(part, ignore_errors=True)
    store.download(name, part, store.sizes(name))
    shutil.rmtree(folder / name, ignore_errors=True)
    part.rename(folder / name)


def newest_name(uri: str) -> str:
    """Name of the newest whole checkpoint below `uri`; empty when there is none."""
    return next(reversed(_whole(ObjectStore(uri))), "")


def newest_checkpoint(uri: str) -> str:
    """URI of the newest whole checkpoint below `uri`; empty when there is none."""
    name = newest_name(uri)
    return f"{uri}/{name}" if name else ""


def _whole(store: ObjectStore) -> list[str]:
    """Names of the checkpoints that are whole, the oldest first."""
    return sorted(
        n.removesuffix(f"/{_MANIFEST}") for n in store.sizes() if n.count("/") == 1 and n.endswith(f"/{_MANIFEST}")
    )
