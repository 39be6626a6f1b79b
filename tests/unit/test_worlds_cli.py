"""`gumshoe world`: from a command to a folder that a run reads; what cannot work is one line and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.types import Document
from cluster.cli import main
from cluster.world import WorldSource, open_world
from envs.jsonl import JsonlWorldConfig, load_tasks
from retrieval.backend import BackendConfig
from retrieval.corpus import read_documents

CITIES = (
    "Arvendal",
    "Bronmoor",
    "Celtwick",
    "Dunharra",
    "Elmstead",
    "Farwyck",
    "Gorlinge",
    "Hexworth",
    "Ironby",
    "Jarlsund",
)


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """A corpus and triples as a user would bring them."""
    rows, pages = [], []
    for i, city in enumerate(CITIES):
        rivals = [CITIES[(i + 3) % 10], CITIES[(i * i + 1) % 10]]
        facts = [("rival", r) for r in rivals if r != city] + [("patron saint", ("Bo", "Ola", "Ulf")[i % 3])]
        facts += [("river", ("Wend", "Tharne")[i % 2]), ("anthem", f"Song no {i}")]
        rows += [{"subject": city, "relation": r, "object": o} for r, o in facts]
        pages.append({"id": f"page-{i}", "title": city, "text": f"{city}. " + " ".join(f"{r}: {o}." for r, o in facts)})
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pages))
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--corpus", str(tmp_path / "corpus.jsonl"), "--triples", str(tmp_path / "facts.jsonl")]


def read(folder: Path) -> tuple[list[Document], JsonlWorldConfig]:
    files = JsonlWorldConfig(tasks=str(folder / "tasks.jsonl"), eval_tasks=str(folder / "eval_tasks.jsonl"))
    return list(read_documents(folder / "corpus.jsonl.gz")), files


def test_own_triples_become_a_world(tmp_path: Path, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "worlds" / "cities"
    wanted = ["--tasks", "12", "--held-out", "0", "--max-share", "0.4", "--hops", "1", "2"]
    assert main(["world", "triples", *own, "--out", str(out), *wanted]) == 0
    documents, files = read(out)
    assert {d.title for d in documents} == set(CITIES)
    tasks = load_tasks(JsonlWorldConfig(tasks=files.tasks), known_ids={d.id for d in documents}).train
    assert tasks and str(out) in capsys.readouterr().out
    for task in tasks:
        assert (
            not any(c in task.question for c in CITIES)
            or task.oracle is None
            or not any(c in task.question for c in task.oracle["entities"].values())
        )


def test_invented_people_become_a_world(tmp_path: Path) -> None:
    out = tmp_path / "people"
    command = ["world", "synthetic", "--out", str(out), "--entities", "200", "--tasks", "20", "--held-out", "5"]
    assert main(command) == 0
    documents, files = read(out)
    files.corpus = [str(out / "corpus.jsonl.gz")]
    opened = open_world(WorldSource("jsonl", jsonl=files), BackendConfig(kind="bm25"), tmp_path / "run", tmp_path)
    assert len(opened.train_tasks) == 20 and len(opened.eval_tasks) == 5
    assert {doc for t in opened.train_tasks for doc in t.gold_docs} <= {d.id for d in documents}


def test_a_package_list_becomes_a_world(tmp_path: Path) -> None:
    names = [f"{a}{b}" for a in ("alder", "birch", "cedar", "rowan") for b in ("tool", "game", "text", "page")]
    listing = "".join(
        f"Package: {n}\nSection: {('games', 'text', 'web')[i % 3]}\nMaintainer: Keeper {i % 5} <k@example.org>\n"
        f"Depends: {names[(i * 5 + 3) % 16]}, {names[(i * 3 + 1) % 16]}\nRecommends: {names[(i * 7 + 2) % 16]}\n"
        f"Homepage: https://{n}.example.org/\nDescription: {('quick', 'small', 'clever')[i % 3]} helper {('forever', 'today')[i % 2]}\n\n"
        for i, n in enumerate(names)
    )
    (tmp_path / "Packages").write_text(listing)
    command = [
        "world",
        "debian",
        "--packages",
        str(tmp_path / "Packages"),
        "--out",
        str(tmp_path / "w"),
        "--tasks",
        "5",
    ]
    assert main([*command, "--held-out", "0", "--max-share", "0.5"]) == 0
    assert len(read(tmp_path / "w")[0]) == 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--triples": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"--corpus": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"--phrases": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"--hops": "12"}, "must be between 1 and 8"),
        ({"--tasks": "0"}, "ask for at least 1"),
    ],
)
def test_what_cannot_work_is_one_line(
    tmp_path: Path, own: list[str], capsys: pytest.CaptureFixture[str], change: dict[str, str], says: str
) -> None:
    given = dict(zip(own[::2], own[1::2], strict=True)) | change
    out = tmp_path / "out"
    assert main(["world", "triples", "--out", str(out), *[a for pair in given.items() for a in pair]]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_in_use_is_left_alone(tmp_path: Path, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["world", "triples", *own, "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "precious"


def test_a_graph_without_questions_says_what_was_refused(
    tmp_path: Path, own: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.jsonl").write_text('{"subject": "Arvendal", "relation": "river", "object": "Wend"}\n')
    assert main(["world", "triples", *own, "--out", str(tmp_path / "w"), "--tasks", "2"]) == 2
    assert "no question could be made of 1 triples" in capsys.readouterr().err
