"""An evaluation's folder, read leniently: a stage may still be going, have crashed, or not have run.

Invariants: nothing here fails because a file is missing, torn or odd: each such thing is one line in `notes`; the last line of a
unit counts; units of other settings are left out and counted; trajectories are read one at a time, when asked for. What is sealed
(`{"sealed": ...}`) is opened by the callable that was given, and is unknown without one. No text of a sealed line is kept in a note. A set
counts as secret until something says that it is open: its questions, all of which are there and none with a canary, or the summary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.plain import from_plain
from agents.report.evaluation_secret import canaries_of
from agents.report.load import number
from agents.types import RecordError, Task, Trajectory, Verdict

Unseal = Callable[[str], str]
"""The text that was sealed. Raises ValueError when it has no key for it."""
UnitKey = tuple[str, int]
"""(task, sample)"""
FILES = ("units.jsonl", "scores.jsonl")
"""A folder that has one of these is an evaluation's."""


@dataclass(frozen=True)
class Line:
    """Where a record stands, to be read when it is needed."""

    path: Path
    offset: int
    length: int

    def read(self) -> dict[str, Any]:
        """Raises ValueError when it is no JSON object."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return _object(file.read(self.length))


@dataclass
class Sample:
    """One unit: how it was played, judged and scored, as far as that is known."""

    task: str
    index: int
    played: Line | None = None
    judged: Line | None = None
    probes: dict[str, Line] = field(default_factory=dict)
    """Probe of the factorised view -> how it was played."""
    scores: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Played:
    """A unit's trajectory, with what stands beside it."""

    state: str = ""
    trajectory: Trajectory | None = None
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    tries: int = 1
    sealed: bool = False


@dataclass
class EvaluationData:
    """All of a folder but the trajectories."""

    name: str
    folder: Path
    config: str
    summary: dict[str, Any]
    tasks: dict[str, Task]
    questions: dict[str, list[Sample]]
    """Task id -> its samples, in the order of the task file."""
    secret: bool
    notes: list[str]
    unseal: Unseal | None = None
    why_secret: str = ""
    """What follows "a set that": why its texts are not to be shown."""

    def played(self, line: Line | None) -> Played:
        """What a line of units.jsonl says; an empty one when it cannot be read, which becomes a note."""
        if line is None:
            return Played()
        try:
            row = line.read()
            inner = self._opened(row)
            plain = inner.get("trajectory")
            sealed = inner is not row or (isinstance(plain, dict) and "sealed" in plain)
            plain = self._opened(plain) if isinstance(plain, dict) else None
            trajectory = from_plain(Trajectory, plain) if plain and "sealed" not in plain else None
            seconds = inner.get("seconds")
            return Played(
                str(inner.get("state", "")), trajectory, str(inner.get("error") or ""),
                {str(k): v for k in seconds if (v := number(seconds, k)) is not None} if isinstance(seconds, dict) else {},
                int(number(inner, "tries") or 1), sealed or "sealed" in row,
            )  # fmt: skip
        except (ValueError, OSError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._unreadable("units.jsonl", error)
            return Played()

    def verdict(self, line: Line | None) -> tuple[Verdict | None, str]:
        """What the judges said, and the judge's hash."""
        if line is None:
            return None, ""
        try:
            row = self._opened(line.read())
            plain = row.get("verdict")
            plain = self._opened(plain) if isinstance(plain, dict) else None
            known = plain is not None and "sealed" not in plain
            return (from_plain(Verdict, plain) if known else None), str(row.get("judge", ""))
        except (ValueError, OSError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._unreadable("verdicts.jsonl", error)
            return None, ""

    def _opened(self, row: dict[str, Any]) -> dict[str, Any]:
        return opened(row, self.unseal)

    def _unreadable(self, file: str, error: Exception) -> None:
        why = type(error).__name__ if self.secret else " ".join(str(error).split())[:200]
        note = f"a record of {file} cannot be read and is left out: {why}"
        if note not in self.notes:
            self.notes.append(note)


def is_evaluation(folder: str | Path) -> bool:
    """Whether a folder holds an evaluation rather than a training run."""
    return any((Path(folder) / name).is_file() for name in FILES)


def load_evaluation(folder: str | Path, unseal: Unseal | None = None) -> EvaluationData:
    """Read all but the trajectories. Raises RecordError when the folder holds no evaluation at all."""
    folder = Path(folder)
    if not is_evaluation(folder):
        raise RecordError(
            f"{folder} holds no evaluation (no {' or '.join(FILES)}); give the folder that `gumshoe eval` wrote"
        )
    notes: list[str] = []
    summary = _summary(folder / "summary.json", notes)
    tasks, order, sealed = _tasks(folder / "tasks.jsonl", unseal, notes)
    samples: dict[UnitKey, Sample] = {}

    def sample(key: UnitKey) -> Sample:
        return samples.setdefault(key, Sample(*key))

    units = list(_units(folder / "units.jsonl", notes))
    config = units[-1][1] if units else ""
    other = {hash for _, hash, *_ in units if hash != config}
    if other:
        notes.append(f"units of other settings are left out ({', '.join(sorted(other))}; shown: {config})")
    for key, hash, probe, _, line in units:
        if hash == config:
            if probe:
                sample(key).probes[probe] = line
            else:
                sample(key).played = line
    judge = summary.get("judge_hash")
    for key, hash, probe, by, line in _units(folder / "verdicts.jsonl", notes):
        if hash == config and not probe and judge in (None, by):  # the scores are those of one judge
            sample(key).judged = line
    for row in _rows(folder / "scores.jsonl", notes):
        sealed = sealed or "sealed" in row
        row = opened(row, unseal)
        unit = _unit(row.get("unit"))
        if unit and (not config or unit[1] == config):
            found = sample(unit[0])
            scores = row.get("scores")
            facts = row.get("facts")
            if isinstance(scores, dict):
                found.scores = {str(k): number(scores, k) for k in scores}
            if isinstance(facts, dict):
                sealed = sealed or "sealed" in facts
                found.facts = opened(facts, unseal)
    text = _text(folder / "config.yaml")
    asked = re.search(r"^samples: (\d+)$", text, re.MULTILINE)
    kept = [key for key in samples if not asked or key[1] < int(asked[1])]
    if len(kept) < len(samples):
        notes.append(f"{len(samples) - len(kept)} attempts of an earlier, larger `samples` are left out")
    questions: dict[str, list[Sample]] = {task: [] for task in order}
    for task, found in sorted(((key[0], samples[key]) for key in kept), key=lambda item: item[1].index):
        questions.setdefault(task, []).append(found)
    made = EvaluationData(
        name=folder.resolve().name,
        folder=folder,
        config=text,
        summary=summary,
        tasks=tasks,
        questions={task: found for task, found in questions.items() if found},
        secret=False,
        notes=notes,
        unseal=unseal,
    )
    first = next((s.played for s in samples.values() if s.played), None)
    made.why_secret = _why_secret(made, sealed or made.played(first).sealed)
    made.secret = bool(made.why_secret)
    unplayed = sum(not found for found in questions.values())
    if unplayed:
        notes.append(f"{unplayed} of {len(questions)} questions were not played yet")
    return made


def opened(row: dict[str, Any], unseal: Unseal | None) -> dict[str, Any]:
    """A mapping with what was sealed in it beside the rest; as it is when nothing is sealed or there is no key."""
    text = row.get("sealed")
    if not isinstance(text, str) or unseal is None:
        return row
    try:
        found = json.loads(unseal(text))
    except (ValueError, RecursionError):
        return row
    return {**{k: v for k, v in row.items() if k != "sealed"}, **found} if isinstance(found, dict) else row


def _tasks(path: Path, unseal: Unseal | None, notes: list[str]) -> tuple[dict[str, Task], list[str], bool]:
    """Tasks by id, ids in the file's order, and whether any of them was sealed."""
    tasks: dict[str, Task] = {}
    order: list[str] = []
    sealed = closed = broken = 0
    for row in _rows(path, notes):
        plain = opened(row, unseal)
        if isinstance(plain.get("task"), dict):
            plain = opened(plain["task"], unseal) if "sealed" in plain["task"] else plain["task"]
        sealed += "sealed" in row or (isinstance(row.get("task"), dict) and "sealed" in row["task"])
        name = plain.get("id", row.get("id"))
        if isinstance(name, str):
            order.append(name)
        if "sealed" in plain:
            closed += 1
            continue
        try:
            tasks[plain["id"]] = from_plain(Task, plain)
        except (RecordError, KeyError, TypeError):
            broken += 1
    if closed:
        notes.append(f"{closed} questions are sealed; `--reveal` shows them where the set itself is at hand")
    if broken:
        notes.append(f"{broken} unreadable line{'s' if broken > 1 else ''} of {path.name} left out")
    return tasks, list(dict.fromkeys(order)), bool(sealed)


def _units(path: Path, notes: list[str]) -> Iterator[tuple[UnitKey, str, str, str, Line]]:
    """(task and sample, config hash, probe, judge, where it stands) of every whole line; the record itself is not kept."""
    broken = 0
    for line, data in _lines(path, notes):
        try:
            row = _object(data)
            unit = _unit(row.get("unit"))
            probe, by = str(row.get("probe") or ""), str(row.get("judge") or "")
        except (ValueError, RecursionError):
            unit = None
        if unit is None:
            broken += 1
        else:
            yield unit[0], unit[1], probe, by, line
    if broken:
        notes.append(f"{broken} unreadable line{'s' if broken > 1 else ''} of {path.name} left out")


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    broken = 0
    for _, data in _lines(path, notes):
        try:
            yield _object(data)
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        notes.append(f"{broken} unreadable line{'s' if broken > 1 else ''} of {path.name} left out")


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[Line, bytes]]:
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return
    with open(path, "rb") as file:
        offset = 0
        for data in file:
            if data.strip():
                yield Line(path, offset, len(data)), data
            offset += len(data)


def _object(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def _unit(value: Any) -> tuple[UnitKey, str] | None:
    if isinstance(value, dict):
        value = [value.get("task"), value.get("sample"), value.get("config")]
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
        return (value[0], value[1]), str(value[2])
    return None


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("summary.json is not there yet: the scoring stage makes it (`gumshoe eval`)")
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        notes.append("summary.json cannot be read; the scoring stage makes it again")
        return {}
    return found if isinstance(found, dict) else {}


def _why_secret(data: EvaluationData, sealed: bool) -> str:
    """Why a set is not to be shown; empty when it is known that it may be."""
    benchmark = data.summary.get("benchmark")
    inner = benchmark if isinstance(benchmark, dict) else {}
    if sealed or data.summary.get("secret") or inner.get("secret"):
        return "is published encrypted"
    if data.summary.get("hidden") or any(canaries_of(task) for task in data.tasks.values()):
        return "is published with a canary"
    if data.summary.get("hidden") is False or all(task in data.tasks for task in data.questions):
        return ""
    return "nothing here says may be shown (tasks.jsonl lacks questions, and summary.json has no `hidden: false`)"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
