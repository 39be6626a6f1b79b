"""`gumshoe index`: builds the index folder of a corpus, or says what that would take.

Invariants: the folder appears whole or not at all; a build that was killed goes on when the same command is given again; with
`dry_run` nothing is written.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from cluster.config import build_config, load_config, parse_overrides
from cluster.errors import UserError
from cluster.machine import free_memory
from cluster.progress import short_time
from retrieval.backend import Corpus, prepare_folder
from retrieval.config import LEGS, BackendConfig, legs_of
from retrieval.corpus import CorpusReport
from retrieval.manifest import Manifest

_EVERY_S = 2.0


@dataclass
class IndexConfig:
    """The part of a run's configuration that an index needs."""

    retrieval: BackendConfig = field(default_factory=BackendConfig)
    """The index."""


def index(
    corpus: Corpus,
    out: str,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    kind: str = "",
    shards: int = 0,
    dry_run: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Runs the command; returns its exit status: 2 when a dry run finds that the index does not fit. Raises the rooms' errors."""
    stream = stream or sys.stdout
    backend = backend_config(config, [*overrides, *_given(kind, shards)])
    try:
        legs = legs_of(backend)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not legs:
        raise UserError(f"retrieval.kind is {backend.kind}, which has no index; take {', '.join(LEGS)}")
    target = Path(out).expanduser().absolute()
    if dry_run:
        lines, fits = estimate_lines(backend, corpus, target)
        print("\n".join(lines), file=stream)
        return 0 if fits else 2
    began, report = time.monotonic(), CorpusReport()
    built = prepare_folder(backend, corpus, target, report=report, progress=Reporter(stream))
    manifest = Manifest.read(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    took = f"built in {short_time(time.monotonic() - began)}" if built else "up to date, nothing to do"
    for problem in report.problems[:5]:
        print(f"skipped {problem}", file=stream)
    print(
        f"index {target}: {manifest.documents:,} documents, {manifest.passages:,} passages, {', '.join(manifest.legs)}, {_size(size)}; "
        f"{report.skipped:,} items skipped; {took}",
        file=stream,
    )
    return 0


def backend_config(config: str, overrides: Sequence[str]) -> BackendConfig:
    """The `retrieval` section of a configuration with values on top. Raises ConfigError."""
    if config:
        from cluster.schema import RunConfig

        return load_config(config, overrides, RunConfig).retrieval
    return build_config([parse_overrides(overrides)], IndexConfig).retrieval


def estimate_lines(backend: BackendConfig, corpus: Corpus, target: Path) -> tuple[list[str], bool]:
    """What the index needs, in lines, and whether it fits this machine."""
    from retrieval.estimate import measure

    found = measure(backend, corpus)
    disk, memory, minutes = sum(found.disk_bytes.values()), found.memory_bytes, sum(found.seconds.values()) / 60
    gpu = f", {_size(found.gpu_bytes)} of the GPUs" if found.gpu_bytes else ""
    more = f"; {_size(found.build_disk_bytes)} more while it is built" if found.build_disk_bytes else ""
    place = next(p for p in (target, *target.parents) if p.exists())
    disk_free, memory_free = shutil.disk_usage(place).free, free_memory()
    about = "" if found.whole else "about "
    lines = [
        f"corpus   {about}{found.documents:,} documents, {about}{found.passages:,} passages",
        f"disk     {_size(disk)}: " + ", ".join(f"{name} {_size(n)}" for name, n in found.disk_bytes.items()) + more,
        f"memory   {_size(memory)} to serve it fast (shared by the processes of a node){gpu}; {_size(found.build_bytes)} to build it",
        f"time     about {minutes:.1f} minutes: " + ", ".join(f"{k} {s / 60:.1f}" for k, s in found.seconds.items()),
    ]
    wrong = [
        f"{what} {_size(need)} is more than the {_size(free)} free {where}"
        for what, need, free, where in (
            ("disk", disk + found.build_disk_bytes, disk_free, f"at {place}"), ("memory", max(memory, found.build_bytes), memory_free, "here"),
        )
        if need > free
    ]  # fmt: skip
    free = f"{_size(disk_free)} free at {place}, {_size(memory_free)} of memory"
    return [*lines, f"fits     no: {'; '.join(wrong)}" if wrong else f"fits     yes: {free}"], not wrong


class Reporter:
    """Prints how a build goes on, a line every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._stage, self._first, self._began, self._next = stream, "", 0, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._began, self._next = stage, done, now, now + _EVERY_S
            if not total:
                print(stage, file=self._stream, flush=True)
        elif total and (now >= self._next or done == total):
            self._next = now + _EVERY_S
            rate = (done - self._first) / max(1e-9, now - self._began)
            left = f", {short_time((total - done) / rate)} left" if rate > 0 and done < total else ""
            print(f"{stage:14} {done:,} of {total:,}, {rate:,.0f}/s{left}", file=self._stream, flush=True)


def columns_of(text: str) -> Mapping[str, str]:
    """`id=docid,text=body` as a mapping. Raises UserError."""
    pairs = [p.partition("=") for p in text.split(",") if p.strip()]
    if not all(name.strip() and theirs.strip() for name, _, theirs in pairs):
        raise UserError(f"--columns {text!r} is not of the form id=docid,text=body")
    return {name.strip(): theirs.strip() for name, _, theirs in pairs}


def _given(kind: str, shards: int) -> list[str]:
    return [f"retrieval.{name}={value}" for name, value in (("kind", kind), ("shards", shards)) if value]


def _size(num_bytes: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes:.0f} B"
