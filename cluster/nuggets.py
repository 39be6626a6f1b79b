"""`gumshoe nuggets`: builds nuggets for questions from an index, with a judge, and says how good they are.

Writes `tasks.jsonl` (the questions with their nuggets, as `world.jsonl.tasks` reads them), `report.json`, and `journal.jsonl`.

Invariants: nothing is written before config, questions and index were read; the same command goes on where one was stopped and gives
what one run would have given; a question that a judge or a search could not finish is left out of `tasks.jsonl`, counted, and tried again; one
without an answer for which no nugget was found is left out and counted too, for such a task would count as unanswerable.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.interfaces import Backend, Services
from agents.types import Nugget, Task
from cluster.config import load_config
from cluster.errors import UserError
from envs.jsonl import TaskError, parse_task, read_rows, write_tasks
from retrieval.backend import open_backend
from retrieval.config import BackendConfig
from retrieval.errors import RetrievalError
from retrieval.service import SearchService, ServiceConfig
from rewards.judges.base import JudgeConfig, JudgeError, RunningJudge, make_judge
from rewards.judges.identity import fingerprint as judge_fingerprint
from rewards.judges.templates import load_prompt
from rewards.nuggets.build import PROMPTS, build_all
from rewards.nuggets.config import BuildConfig
from rewards.nuggets.journal import Journal, JournalError
from rewards.nuggets.report import lines, quality


@dataclass
class NuggetsRun:
    """What `gumshoe nuggets` can be told."""

    questions: str = ""
    """Questions: `.txt` (one a line), or `.jsonl` rows as tasks have them; `answers` may be absent, for questions in long form."""
    index: str = ""
    """Folder of an index that `gumshoe index` made; none for `retrieval.kind` remote and live."""
    out: str = "nuggets"
    """Folder for the results."""
    limit: int = 0
    """Only the first questions; 0: all."""
    retrieval: BackendConfig = field(default_factory=lambda: BackendConfig(kind="auto"))
    """The backend; `auto`: as the index says."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """Batching, caches and limits of searches."""
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(kind="chat"))
    """The model that reads, extracts, compares and rates; `kind: chat`."""
    build: BuildConfig = field(default_factory=BuildConfig)
    """Rounds, limits and checks."""


def make_nuggets(config: str, overrides: Sequence[str] = (), tell: Callable[[str], None] = print) -> int:
    """Runs the command; returns its exit status: 1 when questions are left out. Raises UserError and RetrievalError."""
    run = load_config(config, overrides, NuggetsRun)
    try:
        run.build.check()
        tasks = read_questions(run.questions)[: run.limit or None]
        judge = make_judge(run.judge)
        backend = open_backend(run.retrieval, Path(run.index).expanduser() if run.index else None)
    except (ValueError, JudgeError) as error:
        raise UserError(str(error)) from error
    try:
        return asyncio.run(_make(run, tasks, judge, backend, tell))
    except (JournalError, JudgeError) as error:
        raise UserError(str(error)) from error


async def _make(
    run: NuggetsRun, tasks: Sequence[Task], judge: RunningJudge, backend: Backend, tell: Callable[[str], None]
) -> int:
    service = SearchService(backend, run.service)
    out = Path(run.out).expanduser()
    try:
        await judge.check()
        settings = {"judge": judge_fingerprint(run.judge), "index": service.info().fingerprint}
        settings |= {f"build.{k}": v for k, v in asdict(run.build).items() if k != "concurrency"}
        settings |= {f"prompt {name}": load_prompt(name).label for name in PROMPTS}
        with closing(Journal(out / "journal.jsonl", settings)) as journal:
            failed = await build_all(tasks, Services(judge, service), run.build, journal, (RetrievalError,), tell)
            done = dict(journal.done)
    finally:
        await service.close()
        await judge.close()
    built = [replace(t, nuggets=tuple(_nugget(n) for n in done[t.id]["nuggets"])) for t in tasks if t.id in done]
    usable = [t for t in built if t.nuggets or t.answers]
    report = quality(tasks, done, failed, run.build.near) | {"settings": settings, "judge": judge.stats()}
    for path, write in (
        (out / "tasks.jsonl", lambda part: write_tasks(part, usable)),
        (out / "report.json", lambda part: part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")),
    ):
        part = path.with_name(path.name + ".part")
        write(part)
        part.replace(path)
    for line in [*lines(report), f"{out / 'tasks.jsonl'}, {out / 'report.json'}"]:
        tell(line)
    return 0 if len(usable) == len(tasks) else 1


def read_questions(path: str) -> list[Task]:
    """The questions of a file as tasks. Raises TaskError with file and line."""
    if not path:
        raise TaskError("no questions were given; set questions=FILE (.txt or .jsonl)")
    file = Path(path).expanduser()
    tasks: dict[str, Task] = {}
    for number, row in read_rows(file, "questions") if file.suffix in (".jsonl", ".gz") else _text_rows(file):
        given = {"answers", "answer", "input_messages"} & row.keys()
        try:
            task = parse_task({"id": f"q{number}", **row} | ({} if given else {"answers": []}), source=file.stem)
            if task.id in tasks:
                raise TaskError(f"field 'id' {task.id!r} is used before")
        except TaskError as error:
            raise TaskError(f"{file}:{number}: {error}") from None
        tasks[task.id] = task
    if not tasks:
        raise TaskError(f"{file} holds no questions; write one a line")
    return list(tasks.values())


def _text_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a text file with a question a line."""
    try:
        with file.open("rb") as lines_:
            for number, line in enumerate(lines_, start=1):
                if question := line.decode("utf-8-sig").strip():
                    yield number, {"question": question}
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"questions {file} cannot be read ({error}); give a .txt or .jsonl file in UTF-8") from None


def _nugget(row: dict[str, Any]) -> Nugget:
    return Nugget(row["text"], row["importance"], tuple(row["doc_ids"]))
