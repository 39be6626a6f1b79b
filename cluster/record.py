"""Recorded rollouts: every scored group of a run on disk, in a form that a replay can train from.

    groups/manifest.json          what all groups here share: schema, protocol, tokenizer, template, run
    groups/part-00000.msgpack.z   groups in the order they came, one frame each; every start writes a part of its own

Invariants: a group is on disk whole or not at all, at whatever moment its writer dies, and a new writer never touches
an older part; groups of another protocol, tokenizer or template are refused, when writing and when reading; reading
holds one group at a time, and of a whole recording only where each group lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from agents.interfaces import Speech
from agents.plain import MIGRATIONS
from agents.recordfile import Frame, RecordReader, RecordWriter, index
from agents.types import SCHEMA, Group, Identity, RecordError
from cluster.config import ConfigError, load_saved

KIND = "gumshoe groups"
MANIFEST = "manifest.json"
FOLDER = "groups"
LEDGER, CONFIG = "ledger.jsonl", "config.yaml"
"""Of the run, beside the folder."""
_PARTS = "part-*.msgpack.z"
_SHARED = ("schema", "protocol", "tokenizer", "template")


class Recorder:
    """Appends scored groups to `folder`. `about`: what more the manifest shall say; it must be the same at each start.

    Raises RecordError for a folder that holds something else. What cannot be written (a full disk) is an OSError, and
    leaves what was written before as it was.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._about = dict(about or {})
        self._writer: RecordWriter | None = None
        self._lock = threading.Lock()
        self._manifest: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if any(p.name != f"{MANIFEST}.part" for p in folder.iterdir()):
            self._manifest = read_manifest(folder)
            self._refuse_other(self._about)

    def write(self, group: Group) -> None:
        """Appends one group; any thread may. Raises RecordError when it speaks otherwise than the groups before it."""
        with self._lock:
            for member in group.members:
                self._refuse_other(_shared(member.trajectory.identity))
            if self._writer is None:
                self._writer = self._open(group.members[0].trajectory.identity)
            self._writer.write(group)

    def close(self) -> None:
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _open(self, identity: Identity) -> RecordWriter:
        """A part of its own, so that nothing has to be read or mended first."""
        if not self._manifest:
            self._manifest = {"kind": KIND, "run": identity.run_id, **_shared(identity), **self._about}
            part = self.folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(self._manifest, indent=2) + "\n", encoding="utf-8")
            os.replace(part, self.folder / MANIFEST)
        last = max((int(p.name.split("-")[1].split(".")[0]) for p in self.folder.glob(_PARTS)), default=-1)
        return RecordWriter(self.folder / f"part-{last + 1:05d}.msgpack.z")

    def _refuse_other(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            held = self._manifest.get(name, value)
            if held != value:
                raise RecordError(
                    f"{self.folder} holds groups with {name} {held!r}, which cannot be mixed with {value!r}; "
                    "give the run another name="
                )


def groups_dir(source: str | Path) -> Path:
    """The folder of the groups, from it or from its run's folder. Raises RecordError when there are none."""
    source = Path(source)
    if not source.is_dir():
        raise RecordError(f"there is no recording {source}; give the folder of a run that was recorded with --record")
    folder = source / FOLDER if (source / FOLDER).is_dir() else source
    if not (folder / MANIFEST).is_file():
        raise RecordError(
            f"{source} holds no recorded groups; give the folder of a run that was recorded with --record"
        )
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the groups in `folder` share. Raises RecordError for anything but a manifest this version can read."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{folder} has no {MANIFEST}, so it holds no recorded groups; give another folder") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: damaged manifest: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise RecordError(f"{path} is no manifest of recorded groups (its kind is not {KIND!r}); give another folder")
    schema = found.get("schema")
    if schema != SCHEMA and schema not in list(MIGRATIONS):
        raise RecordError(f"{path}: record schema {schema} is not supported; this version reads schema {SCHEMA}")
    return found


def recorded(source: str | Path) -> Iterator[Group]:
    """All groups in the order they were recorded, one at a time; a last one that is torn is left out of its part."""
    folder = groups_dir(source)
    read_manifest(folder)
    for part in sorted(folder.glob(_PARTS)):
        yield from RecordReader(part, Group)


class Entry(NamedTuple):
    """A recorded group: where it lies, and the optimiser step it was trained in (-1: not known)."""

    id: str
    frame: Frame
    step: int


class Recording:
    """The groups of a recording, found once and read when they are asked for.

    They come in the order they were trained in, if the run's ledger is there to tell: a step that was trained again after
    a restore counts once, as it was trained last, and groups that never were trained are left out. Else as recorded.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = groups_dir(source)
        self.manifest = read_manifest(self.folder)
        # A group that was played twice under one id (its first life was lost with its learner) counts as played last.
        found = {str(i): frame for part in sorted(self.folder.glob(_PARTS)) for frame, i in index(part)}
        ledger = self.folder.parent / LEDGER
        trained = trained_leases(ledger) if ledger.is_file() else {}
        places = [(i, step) for step in sorted(trained) for i in trained[step]] or [(i, -1) for i in found]
        self.entries = [Entry(i, found[i], step) for i, step in places if i in found]
        self.missing = len(places) - len(self.entries)
        """Groups that were trained, but not recorded: the run was resumed with --record."""
        if not self.entries:
            raise RecordError(f"{self.folder} is empty: no group of this run was recorded; give another run")

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def mark(self) -> dict[str, Any]:
        """What tells these groups from those of any other recording: plain values, for a checkpoint."""
        told = "".join(f"{e.id} {e.step} {e.frame.length}\n" for e in self.entries)
        return {"folder": str(self.folder), "groups": len(self), "hash": hashlib.sha256(told.encode()).hexdigest()[:16]}

    def keep(self, mark: Mapping[str, Any]) -> None:
        """Leaves the groups of `mark`, if these are the first ones here. Raises RecordError for another recording."""
        everything, self.entries = self.entries, self.entries[: int(mark["groups"])]
        if self.mark["hash"] != mark["hash"]:
            self.entries = everything
            raise RecordError(
                f"{self.folder} does not begin with the {mark['groups']} groups that this replay was started with "
                f"(from {mark['folder']}); give that recording, or start a run of its own with name="
            )

    def max_staleness(self, groups_per_batch: int) -> int | None:
        """The recorded run's `buffer.max_staleness`, where batches of so many groups are its own batches; else None."""
        try:
            buffer = load_saved(self.folder.parent / CONFIG)["buffer"]
            same = self.entries[0].step >= 0 and int(buffer["groups_per_batch"]) == groups_per_batch
            return int(buffer["max_staleness"]) if same else None
        except (ConfigError, KeyError, TypeError, ValueError):
            return None


def recorded_batches(source: str | Path) -> Iterator[tuple[int, list[Group]]]:
    """Optimiser step and groups of each batch that a run trained, in order; without its ledger, one batch of step -1."""
    for step, entries in groupby(Recording(source).entries, key=lambda entry: entry.step):
        yield step, [entry.frame.read(Group) for entry in entries]


def trained_leases(ledger: Path) -> dict[int, list[str]]:
    """Leases by the optimiser step that trained them, as a run's `ledger.jsonl` has it."""
    shipped: list[str] = []
    trained: dict[int, list[str]] = {}
    for move in _moves(ledger):
        if move["op"] == "ship":
            shipped = list(move["leases"])
        elif move["op"] == "settle":
            trained[int(move["step"])] = shipped
        elif move["op"] in ("enter", "restore"):  # the learner went back
            step = int(move["step"] if move["op"] == "enter" else move["state"]["version"])
            trained = {s: leases for s, leases in trained.items() if s < step}
    return trained


def check_speech(manifest: Mapping[str, Any], speech: Speech, source: str | Path) -> None:
    """Raises RecordError when a policy that speaks `speech` cannot be trained on these groups."""
    spoken = {
        "protocol": speech.name, "tokenizer": speech.tokenizer_fingerprint, "template": speech.template_fingerprint,
    }  # fmt: skip
    for name, value in spoken.items():
        if manifest.get(name) != value:
            raise RecordError(
                f"{source} was recorded with {name} {manifest.get(name)!r}, and this config has {value!r}; "
                "replay with the protocol and the tokenizer of the recorded run (its config.yaml)"
            )


def _shared(identity: Identity) -> dict[str, Any]:
    return {name: getattr(identity, name) for name in _SHARED}


def _moves(ledger: Path) -> Iterator[dict[str, Any]]:
    with open(ledger, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise RecordError(f"{ledger}:{number}: damaged line of the ledger") from None
