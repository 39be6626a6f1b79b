"""Segments for engines on other nodes: the bytes travel through Ray's object store, once per node, and land as a file.

The engine maps what landed exactly as it maps a segment that the learner wrote beside it. Invariants: a landed segment
appears complete and with the checksum of its manifest, or not at all; a node keeps as many as a writer does; what is in
memory at a time is one piece, not the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.vllm.segment import KEEP, Manifest, SegmentError


def pieces(manifest: Manifest, piece_bytes: int) -> Iterator[np.ndarray]:
    """A segment's bytes, [<= piece_bytes] uint8 each, mapped and not copied."""
    mapped = np.memmap(manifest.path, dtype=np.uint8, mode="r")
    for begin in range(0, len(mapped), piece_bytes):
        yield mapped[begin : begin + piece_bytes]


def load(manifest: Manifest, piece_bytes: int) -> list[Any]:
    """References to the segment's bytes in Ray's object store. It lives as long as they do, and no longer than this process."""
    import ray

    return [ray.put(piece) for piece in pieces(manifest, piece_bytes)]


def unload(parcel: Sequence[Any], limit_s: float) -> Iterator[np.ndarray]:
    """The bytes behind the references, fetched one after the other. Raises SegmentError when one is gone or late."""
    import ray

    for reference in parcel:
        try:
            yield ray.get(reference, timeout=limit_s)
        except ray.exceptions.RayError as error:
            raise SegmentError(
                f"weights of another node did not come ({type(error).__name__}): their learner is gone, or the network is slow"
            ) from error


class Landing:
    """Where one node's segments land. Use it from one thread at a time."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._landed: dict[str, Manifest] = {}

    def land(self, manifest: Manifest, parts: Iterable[np.ndarray]) -> Manifest:
        """Writes the segment that `manifest` describes. Returns it with this node's path. Raises SegmentError."""
        if manifest.checksum in self._landed:
            return self._landed[manifest.checksum]
        path = self._folder / Path(manifest.path).name
        aside = path.with_suffix(".partial")
        digest, nbytes = hashlib.sha256(), 0
        try:
            with aside.open("wb") as file:
                for part in parts:
                    raw = memoryview(part)  # type: ignore[arg-type]
                    digest.update(raw)
                    nbytes += file.write(raw)
            if (nbytes, digest.hexdigest()) != (manifest.nbytes, manifest.checksum):
                raise SegmentError(f"{nbytes} bytes of {manifest.nbytes} landed at {path}, or others than were sent")
            aside.rename(path)
        except OSError as error:
            raise SegmentError(f"cannot write weights to {path}: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        self._landed[manifest.checksum] = replace(manifest, path=str(path))
        while len(self._landed) > KEEP:
            oldest = self._landed.pop(next(iter(self._landed)))
            Path(oldest.path).unlink(missing_ok=True)
        return self._landed[manifest.checksum]
