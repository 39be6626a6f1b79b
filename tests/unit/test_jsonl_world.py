"""A user's own tasks: every field, every mistake, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.types import Nugget, Task
from envs.jsonl import JsonlWorldConfig, TaskError, load_tasks, read_tasks, write_tasks
from retrieval.backend import BackendConfig

ROW: dict[str, Any] = {"id": "t1", "question": "Who?", "answers": ["Ann", "Anna"]}


def put(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def test_nuggets_that_differ_in_a_sign_are_two(tmp_path: Path) -> None:
    texts = ["It is 5 °C.", "It is -5 °C.", "It is written in C.", "It is written in C++.", "A is B.", "B is A."]
    (task,) = read_tasks(put(tmp_path / "t.jsonl", {**ROW, "nuggets": texts}))
    assert [n.text for n in task.nuggets] == texts


def test_every_field_is_read(tmp_path: Path) -> None:
    full = {
        "id": 5, "question": "Who?", "answer": "Ann", "rubrics": ["<E0> leads <E1>."], "gold_docs": ["d1"], "source": "mine",
        "nuggets": ["short", {"text": "long", "importance": "okay", "doc_ids": ["d1"]}], "oracle": {"entities": {"E0": "Ann"}},
        "meta": {"hops": 2}, "split": "eval",
    }  # fmt: skip
    tasks = read_tasks(
        put(tmp_path / "t.jsonl", full, "", {"id": "u", "question": "x?", "answers": []}), known_ids={"d1"}
    )
    assert tasks == [
        Task(
            "5", "Who?", ("Ann",), ("<E0> leads <E1>.",), (Nugget("short"), Nugget("long", "okay", ("d1",))), ("d1",),
            {"entities": {"E0": "Ann"}}, "mine", {"hops": 2, "split": "eval"},
        ),
        Task("u", "x?", (), source="t"),
    ]  # fmt: skip
    assert not tasks[1].answerable
    write_tasks(tmp_path / "t.jsonl", tasks)
    assert read_tasks(tmp_path / "t.jsonl") == tasks


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{oops", "not a JSON object"),
        ("[]", "got list"),
        ({**ROW, "anwsers": []}, "field 'anwsers' is not known; did you mean 'answers'?"),
        ({**ROW, "zzz": 1}, "put what is your own under 'meta'"),
        ({"question": "Who?", "answers": []}, "field 'id' is missing"),
        ({**ROW, "id": "t0"}, "field 'id' 't0' is already used in line 1"),
        ({**ROW, "question": "  "}, "field 'question' is empty"),
        ({"id": "t1", "question": "Who?"}, "field 'answers' is missing; [] means unanswerable"),
        ({**ROW, "answer": "Ann"}, "keep one"),
        ({**ROW, "answers": "Ann"}, "field 'answers' is str, expected a list"),
        ({**ROW, "answers": [3]}, "field 'answers' holds 3"),
        ({**ROW, "answers": [""]}, "empty answer"),
        ({**ROW, "rubrics": ["Ann leads."]}, "has no placeholder"),
        ({**ROW, "rubrics": ["<E1> leads <E2>."]}, "no rubric names <E0>"),
        ({**ROW, "rubrics": ["<E0> is Ann."]}, "gives away the answer 'Ann'"),
        ({**ROW, "rubrics": ["<E0> is big.", "<E1> is far."]}, "rubric 1 ('<E1> is far.') is not linked to <E0>"),
        ({**ROW, "nuggets": [{"txt": "x"}]}, "field 'nuggets[0].txt' is not known"),
        ({**ROW, "nuggets": [{"text": "x", "importance": "big"}]}, "expected vital or okay"),
        (
            {**ROW, "nuggets": ["A is B", "C is D", {"text": " a  is b. "}]},
            "field 'nuggets[2].text' says what nuggets[0] says, and would count twice; keep one",
        ),
        ({**ROW, "gold_docs": ["d9"]}, "document 'd9' is not in the corpus"),
        ({**ROW, "oracle": []}, "field 'oracle' is list"),
        ({**ROW, "split": 1}, "field 'split' is int"),
    ],
)
def test_each_mistake_is_one_line_with_file_and_field(tmp_path: Path, row: Any, says: str) -> None:
    path = put(tmp_path / "t.jsonl", {**ROW, "id": "t0"}, row)
    with pytest.raises(TaskError) as caught:
        read_tasks(path, known_ids={"d1"})
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="does not exist"):
        read_tasks(tmp_path / "no.jsonl")
    with pytest.raises(TaskError, match="holds no tasks"):
        read_tasks(put(tmp_path / "e.jsonl", ""))
    with pytest.raises(TaskError, match="no task file"):
        load_tasks(JsonlWorldConfig())


def test_a_run_refuses_a_task_that_is_trained_on_and_held_out(tmp_path: Path) -> None:
    from cluster.world import WorldSource, open_world

    corpus = put(tmp_path / "corpus.jsonl", {"id": "d", "title": "T", "text": "Ann leads."})
    tasks = str(put(tmp_path / "t.jsonl", ROW, {**ROW, "id": "e", "split": "eval"}))
    config = JsonlWorldConfig(corpus=[str(corpus)], tasks=tasks)
    world = open_world(WorldSource("jsonl", jsonl=config), BackendConfig(kind="bm25"), tmp_path / "run", tmp_path)
    assert [t.id for t in world.train_tasks] == ["t1"] and [t.id for t in world.eval_tasks] == ["e"]
    config.eval_tasks = tasks
    with pytest.raises(TaskError, match="both in training and held out"):
        open_world(WorldSource("jsonl", jsonl=config), BackendConfig(kind="bm25"), tmp_path / "run", tmp_path)


def test_splits_by_field_or_by_file(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b", "split": "eval"}, {**ROW, "id": "c", "meta": {"split": "train"}}]
    both = str(put(tmp_path / "both.jsonl", *rows))
    found = load_tasks(JsonlWorldConfig(tasks=both))
    assert [t.id for t in found.train] == ["a", "c"] and [t.id for t in found.eval] == ["b"]
    other = str(put(tmp_path / "other.jsonl", {**ROW, "id": "z"}))
    found = load_tasks(JsonlWorldConfig(tasks=both, eval_tasks=other))
    assert len(found.train) == 3 and [t.id for t in found.eval] == ["z"]
    with pytest.raises(TaskError, match="both in training and held out, such as 'a'"):
        load_tasks(JsonlWorldConfig(tasks=both, eval_tasks=both))
    put(tmp_path / "both.jsonl", {**ROW, "split": "dev"})
    with pytest.raises(TaskError, match="split 'dev'; expected 'train' or 'eval'"):
        load_tasks(JsonlWorldConfig(tasks=both))


def test_carrs_published_rows_are_read_as_they_are(tmp_path: Path) -> None:
    info = {"search_forbidden_strs": ["Who was it?"], "rubrics": ["<E0> was there."]}
    row = {"source": "s", "input_messages": [{"role": "user", "content": "Who was it? Answer so."}], "label": "Ann", "tools": [{}],
           "metadata": {"remote_env_info": info}}  # fmt: skip
    (task,) = read_tasks(put(tmp_path / "rl.jsonl", row))
    assert (task.question, task.answers, task.rubrics, task.source) == (
        "Who was it?",
        ("Ann",),
        ("<E0> was there.",),
        "s",
    )
    with pytest.raises(TaskError, match=r"search_forbidden_strs"):
        read_tasks(put(tmp_path / "bad.jsonl", {**row, "metadata": {"remote_env_info": {}}}))
