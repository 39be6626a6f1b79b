"""The manifest of an index folder: what it was built from, and whether a configuration fits it.

A folder holds `manifest.json`, `documents.sqlite`, `rows/`, `encoder.npz` where an encoder has learnt something, and per leg and shard
a folder such as `faiss/000`. Invariants: the manifest is written last, so a folder that has one is whole; a setting that changes the
index and does not agree is refused with both values named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from retrieval.errors import IndexMismatch, RetrievalError

FORMAT = 2
_FILE, _KEY = "manifest.json", "sources.key"


@dataclass(frozen=True)
class Run:
    """A shard: rows that follow each other, indexed in one folder."""

    folder: str
    first_row: int
    rows: int


@dataclass(frozen=True)
class Leg:
    """One index over all rows."""

    spec: Mapping[str, Any]
    """What the engine of the first shard said of itself."""
    shards: tuple[Run, ...]


@dataclass(frozen=True)
class Manifest:
    """What a folder holds."""

    corpus: str
    """Fingerprint of the documents."""
    documents: int
    passages: int
    config: Mapping[str, Any]
    """The configuration it was built with."""
    encoder: Mapping[str, Any] | None
    """What the encoder said of itself; None without a dense leg."""
    legs: Mapping[str, Leg]
    skipped: int = 0
    """Lines of the corpus that did not fit."""

    def write(self, directory: Path) -> None:
        path = directory / _FILE
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """The manifest of a folder. Raises RetrievalError when there is none, IndexMismatch for another format."""
        path = Path(directory) / _FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            format_ = stored.pop("format")
            stored.pop("key", None)  # which folders had here before it got a file of its own
            if format_ != FORMAT:
                raise IndexMismatch(f"{path} has format {format_}, this version reads {FORMAT}; build it again")
            legs = {
                name: Leg(leg["spec"], tuple(Run(**run) for run in leg["shards"]))
                for name, leg in stored["legs"].items()
            }
            return cls(**{**stored, "legs": legs})
        except FileNotFoundError:
            raise RetrievalError(f"{directory} holds no index; build one from a corpus") from None
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise RetrievalError(f"{path} is not a readable manifest ({error}); build the index again") from None


def read_key(directory: str | Path) -> str:
    """What the builder of a folder knew its sources by; empty when that is not known."""
    try:
        return (Path(directory) / _KEY).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def write_key(directory: str | Path, key: str) -> None:
    """Beside the manifest and not in it: the same documents may come in other files, and who serves them need not care."""
    (Path(directory) / _KEY).write_text(key, encoding="utf-8")


def runtime_names(section: Any) -> set[str]:
    """The fields of a configuration's section that only concern the search."""
    return {f.name for f in fields(section) if f.metadata.get("runtime")}


def lasting(section: Any) -> dict[str, Any]:
    """The other fields of a section: those that change what is built."""
    runtime = runtime_names(section)
    return {k: v for k, v in asdict(section).items() if k not in runtime}


def differences(built: Mapping[str, Any], other: Mapping[str, Any], verb: str = "asked for") -> list[str]:
    """Every setting that two mappings do not share, with both values."""
    old, new = flat(built), flat(other)
    return [
        f"{key}: built with {old.get(key)!r}, {verb} {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name; as JSON would give them back."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def digest(value: Any) -> str:
    """32 hex digits of a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
