"""An evaluation's folder: who may write in it, and the lines of its files.

Invariants: one writer at a time (a lock); the folder belongs to one identity (`cluster.evaluation.config.identity`) and one content of the
benchmark, and whatever differs is named; lines are only ever appended, each whole before the next, and a torn last line is left out; the last
line of a unit counts, and only samples and probes that are asked for now; a line of a secret set is sealed but for the unit it is about; what
is damaged is one line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agents.plain import from_plain, to_plain
from agents.recordfile import RecordReader, RecordWriter
from agents.types import RecordError
from cluster.config import save_resolved
from cluster.errors import UserError, one_line
from cluster.evaluation.config import EvalConfig, differing, identity, identity_hash
from cluster.evaluation.records import Judged, Played, Scored, State
from cluster.evaluation.sealing import Sealer
from cluster.rundir import CONFIG, storage_dir, write_whole
from envs.benchmarks.base import Benchmark

R = TypeVar("R", Played, Judged)
Key = tuple[str, int, str]
"""Task, sample, probe."""
IDENTITY, TASKS, UNITS, VERDICTS, SCORES, SUMMARY = "identity.json", "tasks.jsonl", "units.jsonl", "verdicts.jsonl", "scores.jsonl", "summary.json"  # fmt: skip
_CLEAR = {Played: ("unit", "state", "probe"), Judged: ("unit", "judge", "probe")}
SYNC_S = 1.0
"""What was written is on the disk at most so long after."""


class Folder:
    """An opened evaluation."""

    def __init__(
        self, path: Path, config: str, benchmark: Benchmark, samples: int = 0, probes: Sequence[str] | None = None
    ) -> None:
        """`config`: hash of its identity. `samples`, `probes`: those that count; 0 and None: all."""
        self.path, self.config, self.benchmark = path, config, benchmark
        self._samples, self._probes = samples, probes
        self.sealer = Sealer(benchmark)
        self.tasks = {task.id: task for task in benchmark.tasks}

    def keys(self) -> dict[Key, State]:
        """How each unit that was played ended, of those that are asked for now."""
        found: dict[Key, State] = {}
        for line in self._lines(UNITS):
            key = self._key(line, UNITS)
            try:
                state = State(line["state"])
            except (KeyError, ValueError):
                raise _damaged(self.path / UNITS, "does not say how its unit ended") from None
            if key[0] in self.tasks and self.counts(key):
                found[key] = state
        return found

    def played(self) -> Iterator[Played]:
        """The last record of every unit whose question is in the benchmark, as asked for now, one at a time."""
        return self._latest(UNITS, Played)

    def judged(self) -> Iterator[Judged]:
        """The last verdict of every judge on every unit."""
        return self._latest(VERDICTS, Judged)

    def writer(self, name: str) -> Writer:
        return Writer(self, name)

    def save_tasks(self) -> None:
        """`tasks.jsonl`: all questions of the evaluation so far. Raises UserError for one that is not what it was."""
        path = self.path / TASKS
        rows: dict[str, dict[str, Any]] = {}
        for row in self._lines(TASKS):
            if not isinstance(row.get("id"), str):
                raise _damaged(path, "names no question")
            rows[row["id"]] = row
        for task in self.benchmark.tasks:
            plain = json.loads(json.dumps(to_plain(task)))
            before = rows.get(task.id)
            if before is not None and self._opened(before, path) != plain:
                raise UserError(
                    f"question {task.id!r} of {self.benchmark.name} is not what it was when {self.path} was begun; give this evaluation another name="
                )
            rows[task.id] = before or self.sealer.sealed(task.id, plain, ("id",))
        write_whole(path, list(rows.values()))

    def save_scores(self, scores: Sequence[Scored]) -> None:
        """`scores.jsonl`, whole."""
        write_whole(self.path / SCORES, scores)

    def line(self, record: Played | Judged) -> dict[str, Any]:
        """A record as it is written."""
        return self.sealer.sealed(record.unit.task, to_plain(record), _CLEAR[type(record)])

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        for line in RecordReader[Any](path) if path.is_file() else ():
            if not isinstance(line, dict):
                raise _damaged(path, "is no record")
            yield line

    def _opened(self, line: Mapping[str, Any], path: Path) -> dict[str, Any]:
        try:
            return self.sealer.opened(line)
        except (ValueError, AttributeError) as error:
            raise _damaged(path, f"cannot be opened ({one_line(error)[:120]})") from None

    def _key(self, line: Mapping[str, Any], name: str) -> Key:
        """What a line of units or verdicts is about."""
        unit, probe = line.get("unit"), line.get("probe", "")
        if not isinstance(unit, list) or [type(part) for part in unit] != [str, int, str] or not isinstance(probe, str):
            raise _damaged(self.path / name, "names no unit")
        return unit[0], unit[1], probe

    def counts(self, key: Key) -> bool:
        """Whether a sample or probe is asked for now."""
        if key[2]:
            return self._probes is None or key[2].partition(":")[0] in self._probes
        return not self._samples or key[1] < self._samples

    def _latest(self, name: str, cls: type[R]) -> Iterator[R]:
        last: dict[tuple[Any, ...], int] = {}
        for number, line in enumerate(self._lines(name)):
            key: Key = self._key(line, name)
            if key[0] in self.tasks and self.counts(key):
                last[(*key, str(line["unit"][2]), str(line.get("judge", "")))] = number
        numbers = set(last.values())
        for number, line in enumerate(self._lines(name)):
            if number in numbers:
                try:
                    yield from_plain(cls, self._opened(line, self.path / name))
                except (RecordError, ValueError) as error:
                    raise UserError(f"{self.path / name}: record {number + 1}: {error}; the file is damaged") from None


class Writer:
    """Appends to one file of the folder; what was written is on the disk soon after."""

    def __init__(self, folder: Folder, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._file, self._clock = folder, RecordWriter(folder.path / name), clock
        self._synced, self._open = clock(), 0

    def write(self, record: Played | Judged) -> None:
        self._file.write(self._folder.line(record))
        self._open += 1

    def sync(self, *, now: bool = False) -> None:
        """A boundary: call it often."""
        if self._open and (now or self._clock() - self._synced >= SYNC_S):
            self._file.sync()
            self._synced, self._open = self._clock(), 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.sync(now=True)
        self._file.close()


@contextlib.contextmanager
def open_folder(config: EvalConfig, benchmark: Benchmark, extra: Mapping[str, Any]) -> Iterator[Folder]:
    """The evaluation's folder, made or opened, locked for this process, with the resolved config in it.

    `extra`: what else an answer hangs on, such as the content of a checkpoint. Raises UserError when somebody else writes in it, or when it
    belongs to another identity.
    """
    storage = storage_dir(config.storage_path)
    path = storage / config.name
    storage.mkdir(parents=True, exist_ok=True)
    now = identity(config) | dict(extra)
    with open(storage / f".{config.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"evaluation {config.name!r} is going on in {storage}; wait for it, or give this one another name="
            ) from None
        begun = path.is_dir() and any(not file.name.startswith(".part-") for file in path.iterdir())
        known = _same(path, now) if begun else ""
        folder = Folder(path, known or identity_hash(now), benchmark, config.samples, config.probes)
        path.mkdir(exist_ok=True)
        if not known:
            _write(path / IDENTITY, {"hash": folder.config, "settings": now})
        folder.save_tasks()
        save_resolved(config, path / CONFIG)
        yield folder


def _same(path: Path, now: Mapping[str, Any]) -> str:
    """The hash under which the folder was begun. Raises UserError when that was with other settings."""
    try:
        found = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
        before, known = dict(found["settings"]), str(found["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} holds something else than an evaluation (no readable {IDENTITY}); give another name="
        ) from None
    changed = list(differing(before, now))
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path} holds an evaluation of other settings: {'; '.join(changed[:3])}{more}; give this one another name="
        )
    return known


def _write(path: Path, value: Any) -> None:
    part = path.with_name(f".part-{path.name}")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_summary(folder: Folder, summary: Mapping[str, Any]) -> Path:
    """`summary.json`, whole."""
    _write(folder.path / SUMMARY, summary)
    return folder.path / SUMMARY


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} holds a line that {what}; the file is damaged: take the line out, or give another name=")
