"""Writing spans.jsonl: who did what from when to when (the rows and their reading: `agents.report.spans`).

Invariants: rows are in the file whole before the call returns, or not at all; a line that a killed writer left open is
ended first; the file stays below MAX_BYTES, for its older half goes when it would grow past that; logging never ends a run
(a full disk costs spans, and one warning).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agents.report.spans import FILE, MAX_BYTES, Span, read_spans, seconds_by, uses
from cluster.runlog import mend_tail

__all__ = ["Span", "SpanLog", "read_spans", "seconds_by", "uses"]
_LOG = logging.getLogger(__name__)


class SpanLog:
    """Appends spans to a run's folder. Close it at the end; it may be opened again to go on with the same run."""

    def __init__(self, run_dir: str | Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(run_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._warned = False
        mend_tail(self.path)
        self._file = self._opened()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows with `actor`, `phase`, `began`, `ended`, `step` and perhaps `seconds`; other keys are left out."""
        with self._lock:
            try:
                data = b"".join(json.dumps(_plain(row), separators=(",", ":")).encode() + b"\n" for row in rows)
                if data and self._file.seek(0, os.SEEK_END) + len(data) > self._max_bytes:
                    self._halve()
                self._append(data)
            except (OSError, ValueError) as error:  # ValueError: it is closed, or a row holds no numbers
                if not self._warned:
                    _LOG.warning("spans are not written to %s (this is said once): %s", self.path, error)
                self._warned = True

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.close()

    def __enter__(self) -> SpanLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> io.FileIO:
        # Unbuffered: what a failed write left in a buffer would come out later, in the middle of the file.
        return open(self.path, "ab", buffering=0)

    def _append(self, data: bytes) -> None:
        start, rest = self._file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise

    def _halve(self) -> None:
        """Keeps the newer half, by one rename; until that is done the file is as it was, and open."""
        kept = self.path.read_bytes()[-self._max_bytes // 2 :]
        part = self.path.with_name(FILE + ".part")
        try:
            part.write_bytes(kept[kept.find(b"\n") + 1 :])
            os.replace(part, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        old, self._file = self._file, self._opened()
        old.close()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    made = {
        "actor": str(row["actor"]), "phase": str(row["phase"]), "began": round(float(row["began"]), 4),
        "ended": round(float(row["ended"]), 4), "step": int(row["step"]),
    }  # fmt: skip
    if row.get("seconds"):
        made["seconds"] = {str(k): round(float(v), 4) for k, v in row["seconds"].items()}
    return made
