"""`gumshoe rubrics TASKS --out FILE`: rubrics for the questions of a task file, made by a judge endpoint or checked as given.

Beside FILE stand `FILE.journal` (what was done; a run that was stopped goes on from it) and `FILE.report.json`.

Invariants: TASKS is never changed; FILE appears whole, with the tasks whose rubrics were accepted and those that need none
(unanswerable); hand-written rubrics are taken or refused as they are; nothing is asked before tasks, config and endpoint were checked.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from cluster.config import build_config, load_config, parse_overrides
from cluster.errors import UserError
from rewards.judges.base import JudgeConfig, JudgeError, make_judge
from rewards.judges.identity import fingerprint
from rewards.rubrics.build import ACCEPTED, Entry, Item, Options, build, summary


@dataclass
class RubricsConfig:
    """The part of a run's configuration that rubrics need."""

    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind="chat"))
    """Who writes them."""


def rubrics(
    tasks: str,
    overrides: Sequence[str] = (),
    *,
    out: str = "",
    config: str = "",
    rounds: int = 2,
    lenient: bool = False,
    check: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Runs the command. Status 0; 1 when some questions could not be asked about; 2 when `check` found faults. Raises UserError."""
    stream = stream or sys.stdout
    items, untouched = read_items(Path(tasks))
    if check:
        return _check(items, Options(lenient=lenient), stream)
    if rounds < 0:
        raise UserError(f"--rounds {rounds} is negative; 0 sends nothing back")
    target = Path(out)
    if target.suffix != ".jsonl" or (target.exists() and target.samefile(tasks)):
        raise UserError(
            f"--out {out!r} has to be another .jsonl file than TASKS; give one, such as --out tasks.rubrics.jsonl"
        )
    judge = _judge_config(config, overrides) if any(not item.given for item in items) else None
    options = Options(rounds, lenient, judge.concurrency if judge else 1, fingerprint(judge) if judge else "")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be written ({error.strerror}); choose another folder") from None
    entries = asyncio.run(_build(items, judge, target.with_name(target.name + ".journal"), options, stream))
    _write(target, items, untouched, entries)
    report = summary(entries)
    report_path = target.with_name(target.name + ".report.json")
    report_path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _tell(report, stream)
    print(f"{target}; report: {report_path}", file=stream)
    if report["unavailable"]:
        print(
            f"{report['unavailable']} questions could not be asked about: give the command again, it goes on",
            file=stream,
        )
    return 1 if report["unavailable"] else 0


def read_items(path: Path) -> tuple[list[Item], list[Any]]:
    """(questions with the rubrics given for them, tasks that need none) of a task file. Raises UserError with file and line."""
    from envs.jsonl import TaskError, parse_task, read_rows

    try:
        rows = list(read_rows(path))
    except TaskError as error:
        raise UserError(str(error)) from None
    items: dict[str, Item] = {}
    untouched = []
    for number, row in rows:
        try:
            given = _take_rubrics(row)
            task = parse_task(row, source=path.stem)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if task.id in items:
            raise UserError(f"{path}:{number}: id {task.id!r} is used before; ids have to differ")
        if task.answers or given:
            items[task.id] = Item(task, given)
        else:
            untouched.append(task)
    if not items:
        raise UserError(f"{path} holds no question with an answer; write one JSON object per line")
    return list(items.values()), untouched


def _take_rubrics(row: dict[str, Any]) -> tuple[str, ...]:
    """Takes the rubrics out of a row, for the readers of task files refuse faulty ones whole."""
    holder: Any = row
    for key in ("metadata", "remote_env_info") if "input_messages" in row else ():
        holder = holder.get(key) if isinstance(holder, dict) else None
    found = (holder.pop("rubrics", None) if isinstance(holder, dict) else None) or []
    if not isinstance(found, list) or not all(isinstance(r, str) for r in found):
        raise ValueError("field 'rubrics' is no list of texts")
    return tuple(found)


def _judge_config(config: str, overrides: Sequence[str]) -> JudgeConfig:
    if config:
        from cluster.schema import RunConfig

        judge = load_config(config, overrides, RunConfig).judge
    else:
        judge = build_config([parse_overrides(overrides)], RubricsConfig).judge
    if judge.kind != "chat":
        raise UserError(
            f"judge.kind {judge.kind!r} writes no rubrics; set judge.kind=chat, judge.base_url and judge.model"
        )
    return judge


async def _build(
    items: list[Item], config: JudgeConfig | None, journal: Path, options: Options, stream: TextIO
) -> list[Entry]:
    def tell(done: int, entry: Entry) -> None:
        if done % 100 == 0 or done == len(items):
            print(f"{done} of {len(items)} questions", file=stream, flush=True)

    if config is None:
        return await build(items, None, journal, options, tell)
    try:
        judge = make_judge(config)
    except (JudgeError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        await judge.check()
        return await build(items, judge, journal, options, tell)
    except JudgeError as error:
        raise UserError(str(error)) from error
    finally:
        await judge.close()


def _check(items: list[Item], options: Options, stream: TextIO) -> int:
    entries = asyncio.run(build(items, None, None, options))
    for entry in entries:
        for problem in entry.problems:
            print(f"{entry.id}: {problem.kind}: {problem.text}", file=stream)
    _tell(summary(entries), stream)
    return 0 if all(e.status in ACCEPTED for e in entries) else 2


def _write(out: Path, items: list[Item], untouched: list[Any], entries: list[Entry]) -> None:
    from envs.jsonl import write_tasks

    tasks = [
        replace(item.task, rubrics=entry.rubrics)
        for item, entry in zip(items, entries, strict=True)
        if entry.status in ACCEPTED
    ]
    part = out.with_name(out.name + ".part")
    write_tasks(part, [*tasks, *untouched])
    part.replace(out)


def _tell(report: dict[str, Any], stream: TextIO) -> None:
    counts = (f"{report[k]} {k}" for k in (*ACCEPTED, "refused", "unavailable") if report[k])
    print(f"{report['questions']} questions: {', '.join(counts)}", file=stream)
    for title, key in (("faulty first drafts", "faulty_first_drafts"), ("faults left", "faults_left")):
        if report[key]:
            print(f"{title}: " + ", ".join(f"{kind} {n}" for kind, n in report[key].items()), file=stream)
