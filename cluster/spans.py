"""Writing spans.jsonl: who did what from when to when (the rows and their reading: `agents.report.spans`).

Invariants: a row is flushed whole before the call returns; a line that a killed writer left open is ended first; the file
stays below MAX_BYTES, for its older half goes when it would grow past that; logging never ends a run (a full disk costs
spans, and one warning).
"""

from __future__ import annotations

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
        mend_tail(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows with `actor`, `phase`, `began`, `ended`, `step` and perhaps `seconds`; other keys are left out."""
        lines = [json.dumps(_plain(row), separators=(",", ":")).encode() + b"\n" for row in rows]
        if not lines:
            return
        with self._lock:
            try:
                if self._file.tell() + sum(map(len, lines)) > self._max_bytes:
                    self._halve()
                self._file.write(b"".join(lines))
                self._file.flush()
            except OSError as error:
                _LOG.warning("%d spans were not written: %s", len(lines), error)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> SpanLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _halve(self) -> None:
        """Keeps the newer half, by one rename."""
        self._file.close()
        kept = self.path.read_bytes()[-self._max_bytes // 2 :]
        part = self.path.with_name(FILE + ".part")
        part.write_bytes(kept[kept.find(b"\n") + 1 :])
        os.replace(part, self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    made = {
        "actor": str(row["actor"]), "phase": str(row["phase"]), "began": round(float(row["began"]), 4),
        "ended": round(float(row["ended"]), 4), "step": int(row["step"]),
    }  # fmt: skip
    if row.get("seconds"):
        made["seconds"] = {str(k): round(float(v), 4) for k, v in row["seconds"].items()}
    return made
