"""A user's own world, with no code written: a JSONL corpus and JSONL tasks.

A task row: `{"id", "question", "answers": [...] | "answer": "...", "rubrics"?, "nuggets"?, "gold_docs"?, "oracle"?,
"source"?, "meta"?, "split"?}`. `answers: []` says that the question cannot be answered and a refusal is right. Rows of CaRR's
published file (`input_messages`, `label`, `metadata.remote_env_info`) are read as they are; their id is a digest of the question.

Invariants: each mistake is one line with `file:line` and the field; ids are unique within a world, nuggets within a task; a field nobody knows
is refused with the nearest known name, so that a misspelt `answers` never makes a question unanswerable.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agents.plain import to_plain
from agents.text import folded, validate_rubrics
from agents.types import Nugget, Task

FIELDS = (
    "id", "question", "answers", "answer", "rubrics", "nuggets", "gold_docs", "oracle", "source", "meta", "split",
)  # fmt: skip
SPLITS = ("train", "eval")
IMPORTANCES = ("vital", "okay")


class TaskError(ValueError):
    """A task file is missing or broken; the message names file, line and field."""


@dataclass
class JsonlWorldConfig:
    """Where a user's world lies."""

    corpus: list[str] = field(default_factory=list)
    """The corpus: `.jsonl` or `.jsonl.gz` files, or folders of them (see `retrieval.corpus`)."""
    tasks: str = ""
    """Task file. With `eval_tasks` all of it is for training; otherwise its rows may say `split`: `train` or `eval` (in a
    field of that name, or in `meta`); rows that say nothing are for training."""
    eval_tasks: str = ""
    """A separate file of held-out tasks."""
    malformed: str = "error"
    """Corpus lines that do not fit: `error`, or `skip` and count."""


@dataclass(frozen=True)
class TaskSplits:
    """The tasks of a world."""

    train: tuple[Task, ...]
    eval: tuple[Task, ...]


def load_tasks(config: JsonlWorldConfig, *, known_ids: Collection[str] | None = None) -> TaskSplits:
    """Both sides of a world's tasks. With `known_ids` (the corpus), gold documents are checked to be among them.

    Raises TaskError; ids must differ between the sides, or a held-out task would be trained on.
    """
    if not config.tasks:
        raise TaskError("no task file was given; set 'tasks' to a .jsonl file")
    if config.eval_tasks:
        train, held_out = (
            read_tasks(config.tasks, known_ids=known_ids),
            read_tasks(config.eval_tasks, known_ids=known_ids),
        )
    else:
        found = read_tasks(config.tasks, known_ids=known_ids)
        for task in found:
            if split_of(task) not in ("", *SPLITS):
                raise TaskError(
                    f"{config.tasks}: task {task.id!r} has split {split_of(task)!r}; "
                    f"expected {' or '.join(map(repr, SPLITS))}"
                )
        train = [t for t in found if split_of(t) != "eval"]
        held_out = [t for t in found if split_of(t) == "eval"]
    shared = sorted({t.id for t in train} & {t.id for t in held_out})
    if shared:
        raise TaskError(f"{len(shared)} task ids are both in training and held out, such as {shared[0]!r}")
    return TaskSplits(tuple(train), tuple(held_out))


def read_tasks(path: str | Path, *, known_ids: Collection[str] | None = None) -> list[Task]:
    """The tasks of a `.jsonl` or `.jsonl.gz` file, in order. Raises TaskError."""
    path = Path(path)
    tasks: list[Task] = []
    first_seen: dict[str, int] = {}
    for number, row in read_rows(path):
        try:
            task = parse_task(row, source=path.stem)
            if task.id in first_seen:
                raise _field("id", f"{task.id!r} is already used in line {first_seen[task.id]}")
            if known_ids is not None:
                for doc_id in (*task.gold_docs, *(d for n in task.nuggets for d in n.doc_ids)):
                    if doc_id not in known_ids:
                        raise _field("gold_docs", f"document {doc_id!r} is not in the corpus")
        except TaskError as error:
            raise TaskError(f"{path}:{number}: {error}") from None
        first_seen[task.id] = number
        tasks.append(task)
    if not tasks:
        raise TaskError(f"{path} holds no tasks; write one JSON object per line")
    return tasks


def read_rows(path: str | Path, what: str = "task file") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a `.jsonl` or `.jsonl.gz` file, blank lines left out. A line ends at a line feed alone: texts may hold U+2028.

    Raises TaskError with file and line; `what` is the file's name in it.
    """
    path = Path(path)
    for number, line in _lines(path, what):
        try:
            row = _object(line)
        except TaskError as error:
            raise TaskError(f"{path}:{number}: {error}") from None
        yield number, row


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> int:
    """Writes tasks so that `read_tasks` gives equal ones (an empty source becomes the file's name); returns the count."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for task in tasks:
            row = {k: v for k, v in to_plain(task).items() if k == "answers" or v not in (None, [], {}, "")}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def split_of(task: Task) -> str:
    """The split a task names, or an empty string."""
    return str(task.meta.get("split", ""))


def parse_task(row: Mapping[str, Any], *, source: str = "") -> Task:
    """A row as a Task. Raises TaskError that names the field."""
    if "input_messages" in row:
        row = _from_carr(row)
    for name in row:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "put what is your own under 'meta'"
            raise _field(str(name), f"is not known; {hint}")
    id_ = row.get("id")
    if isinstance(id_, bool) or not isinstance(id_, (str, int)) or not str(id_).strip():
        raise _field("id", "is missing" if id_ is None else f"is {id_!r}, expected a text or an integer")
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise _field("question", "is missing" if question is None else "is empty or not a text")
    meta = _mapping(row, "meta") or {}
    if row.get("split") is not None:
        if not isinstance(row["split"], str):
            raise _field("split", f"is {type(row['split']).__name__}, expected a text")
        meta = {**meta, "split": row["split"]}
    own_source = row.get("source") or source
    if not isinstance(own_source, str):
        raise _field("source", f"is {type(own_source).__name__}, expected a text")
    rubrics = _texts(row, "rubrics")
    answers = _answers(row)
    problems = validate_rubrics(rubrics, answers) if rubrics else []
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise _field("rubrics", f"cannot be used: {problems[0]}{more}; <E0> is the answer, <E1>, <E2>, ... lead to it")
    return Task(
        id=str(id_).strip(),
        question=question,
        answers=answers,
        rubrics=rubrics,
        nuggets=_nuggets(row),
        gold_docs=_texts(row, "gold_docs"),
        oracle=_mapping(row, "oracle"),
        source=own_source,
        meta=meta,
    )


def _from_carr(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of CaRR's file as ours. The question is the one that searches must not leak; messages repeat it with a request."""
    meta = row.get("metadata")
    info = meta.get("remote_env_info") if isinstance(meta, dict) else None
    if not isinstance(info, dict):
        raise _field("metadata.remote_env_info", "is missing, which a row with 'input_messages' needs")
    questions = info.get("search_forbidden_strs")
    if not isinstance(questions, list) or not questions or not isinstance(questions[0], str):
        raise _field("metadata.remote_env_info.search_forbidden_strs", "does not begin with the question")
    return {
        "id": hashlib.blake2b(questions[0].encode(), digest_size=8).hexdigest(),
        "question": questions[0],
        "answer": row.get("label"),
        "rubrics": info.get("rubrics"),
        "source": row.get("source"),
    }


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    if ("answers" in row) == ("answer" in row):
        both = "answers" in row
        raise _field(
            "answers", "and 'answer' are both given; keep one" if both else "is missing; [] means unanswerable"
        )
    if "answers" in row:
        found = _texts(row, "answers")
    else:
        if not isinstance(row["answer"], str):
            raise _field("answer", f"is {type(row['answer']).__name__}, expected a text (a list is 'answers')")
        found = (row["answer"],)
    if not all(a.strip() for a in found):
        raise _field("answers", "holds an empty answer; [] means unanswerable")
    return found


def _nuggets(row: Mapping[str, Any]) -> tuple[Nugget, ...]:
    found = tuple(_nugget(n, i) for i, n in enumerate(_list(row, "nuggets")))
    first: dict[str, int] = {}
    for index, nugget in enumerate(found):
        # Signs within a text may be all that tells two facts apart (C and C++, 5 and -5); a full stop at its end never is.
        said = " ".join(folded(nugget.text).rstrip(".。!").split())
        if said in first:
            raise _field(
                f"nuggets[{index}].text", f"says what nuggets[{first[said]}] says, and would count twice; keep one"
            )
        first[said] = index
    return found


def _nugget(value: Any, index: int) -> Nugget:
    name = f"nuggets[{index}]"
    if isinstance(value, str) and value.strip():
        return Nugget(value)
    if not isinstance(value, dict):
        raise _field(name, "is neither a text nor an object with 'text'")
    unknown = sorted(value.keys() - {"text", "importance", "doc_ids"})
    if unknown:
        raise _field(f"{name}.{unknown[0]}", "is not known; a nugget has text, importance, doc_ids")
    if not isinstance(value.get("text"), str) or not value["text"].strip():
        raise _field(f"{name}.text", "is missing or not a text")
    importance = value.get("importance", "vital")
    if importance not in IMPORTANCES:
        raise _field(f"{name}.importance", f"is {importance!r}, expected {' or '.join(IMPORTANCES)}")
    return Nugget(value["text"], importance, _texts(value, "doc_ids"))


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _field(name, f"is {type(value).__name__}, expected a list")
    return value


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _list(row, name)
    for value in values:
        if not isinstance(value, str):
            raise _field(name, f"holds {value!r}, expected texts")
    return tuple(values)


def _mapping(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = row.get(name)
    if value is not None and not isinstance(value, dict):
        raise _field(name, f"is {type(value).__name__}, expected an object")
    return value


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TaskError("not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"not a JSON object ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise TaskError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _lines(path: Path, what: str) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise TaskError(f"{what} {path} does not exist; give the path of a .jsonl file")
    opener = cast("Callable[[Path, str], Any]", gzip.open if path.suffix == ".gz" else open)
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{what} {path} cannot be read to its end: {error}") from None


def _field(name: str, problem: str) -> TaskError:
    return TaskError(f"field {name!r} {problem}")
