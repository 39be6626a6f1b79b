"""The makers of real-text inputs: packages become documents, questions that do not tell, and a large tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.protocols.tools import Tools, ToolsConfig, parse_text
from agents.text import validate_rubrics
from agents.types import ActionKind, Task
from envs.jsonl import read_tasks
from retrieval.corpus import read_documents
from tests.support.real_text import (
    STATUS_FILE,
    InputsError,
    choose,
    leaks,
    make_inputs,
    parse_packages,
    questions,
    split,
    text,
)

LISTING = """\
Package: fishtank
Section: games
Maintainer: "Aquarium Team" <fish@example.org>
Depends: libglass2 (>= 2.1), python3:any
Pre-Depends: waterlib [amd64]
Homepage: https://fish.example.org/
Description: calm aquarium for the desktop screen
 Fish swim across
 the screen.
 .
 It offers:
  - guppies
  - carps

Package: libglass2
Section: libs
Maintainer: Glass Makers <glass@example.org>
Description: shared library that draws transparent panes

Package: waterlib
Section: devel
Maintainer: Wet Coders <wet@example.org>
Depends: libglass2
Description: tools for simulating liquids in programs

Package: python3
Section: python
Maintainer: Snake Keepers <s@example.org>
Depends: libglass2 | libpane1
Description: interactive high level language for python3 users

Package: nothing
Section: misc
"""


def test_packages_are_read_as_dpkg_lists_them() -> None:
    packages = {p.name: p for p in parse_packages(LISTING)}
    assert set(packages) == {"fishtank", "libglass2", "waterlib", "python3"}  # the last one has no description
    fish = packages["fishtank"]
    assert fish.maintainer == "Aquarium Team"
    assert fish.depends == (("waterlib",), ("libglass2",), ("python3",))
    assert fish.details == "Fish swim across the screen.\n\nIt offers:\n- guppies\n- carps"
    assert packages["python3"].depends == (("libglass2", "libpane1"),) and packages["python3"].needed == ()
    assert "fishtank depends on waterlib, libglass2, python3." in text(fish)
    assert "python3 depends on libglass2 or libpane1." in text(packages["python3"])


def test_a_small_corpus_holds_what_its_packages_depend_on() -> None:
    chosen = choose(list(parse_packages(LISTING)), limit=3)
    assert [p.name for p in chosen] == ["fishtank", "libglass2", "waterlib"]


def test_questions_have_one_answer_and_do_not_tell_it() -> None:
    packages = list(parse_packages(LISTING))
    tasks = {t["id"]: t for t in questions(packages, packages)}
    assert tasks["waterlib/section-of-needed"]["answers"] == ["libs"]
    assert tasks["waterlib/section-of-needed"]["gold_docs"] == ["waterlib", "libglass2"]
    assert tasks["fishtank/needed-in-devel"]["answers"] == ["waterlib"]
    assert "python3/name" not in tasks  # its summary names it
    assert not any(t.startswith("python3/maintainer-of") for t in tasks)  # an alternative: no single answer
    assert not any(leaks(t) for t in tasks.values())
    for task in tasks.values():
        assert validate_rubrics(task["rubrics"], task["answers"]) == []
    train, held_out = split(list(tasks.values()), 100, 100)
    assert train and held_out
    assert not {t["meta"]["about"] for t in train} & {t["meta"]["about"] for t in held_out}


def test_a_leak_is_seen_as_words_not_as_letters() -> None:
    task = {"answers": ["net"], "gold_docs": ["ifupdown"], "question": "Which section holds the network tools?"}
    assert not leaks(task)
    assert leaks(task | {"question": "Which section holds the Net tools?"})


def test_inputs_fit_the_readers_and_are_made_once(tmp_path: Path) -> None:
    packages = list(parse_packages(LISTING))
    inputs = make_inputs(tmp_path, packages=packages)
    documents = {d.id: d for d in read_documents(inputs.corpus)}
    known = set(documents)
    assert known == {"fishtank", "libglass2", "waterlib", "python3"}
    tasks = read_tasks(inputs.tasks, known_ids=known) + read_tasks(inputs.eval_tasks, known_ids=known)
    for task in tasks:  # the gold documents together hold the answer
        assert any(task.answers[0] in documents[d].text for d in task.gold_docs), task.id
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert make_inputs(tmp_path, packages=packages).figures == inputs.figures
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    make_inputs(tmp_path, packages=packages, tasks=1)
    assert len(inputs.tasks.read_text().splitlines()) == 1


def test_the_tokenizer_is_large_and_speaks_the_tools_protocol(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    inputs = make_inputs(tmp_path, packages=list(parse_packages(LISTING)))
    tokenizer = AutoTokenizer.from_pretrained(inputs.model, local_files_only=True)
    shape = AutoConfig.from_pretrained(inputs.model)
    assert len(tokenizer) == shape.vocab_size >= 100_000
    assert not list(inputs.model.glob("*.safetensors"))
    said = "naïve 雪 libglass2\n\n## Exact Answer\nlibs"
    assert tokenizer.decode(tokenizer.encode(said, add_special_tokens=False)) == said
    assert all(i < tokenizer.vocab_size for i in tokenizer.encode(said))
    speech = Tools(tokenizer, ToolsConfig())
    prompt = speech.decode(speech.prompt(Task(id="t", question="Which one?")))
    assert "<tools>" in prompt and '"name": "search"' in prompt and prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in speech.stop_token_ids


def test_a_bare_answer_counts_where_the_config_says_so() -> None:
    bare = ToolsConfig(bare_answer=True)
    assert parse_text("It is libs.").kind is ActionKind.malformed
    said = parse_text("It is libs.", bare)
    assert said.kind is ActionKind.answer and said.message == said.answer == "It is libs."
    assert parse_text("Because.\n\n## Exact Answer\nlibs", bare).answer == "libs"
    assert parse_text("", bare).kind is ActionKind.malformed
    assert parse_text('<tool_call>\n{"name": "search"', bare).kind is ActionKind.malformed


def test_too_few_packages_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputsError) as refused:
        make_inputs(tmp_path / "inputs", packages=list(parse_packages(LISTING))[1:2])
    assert "\n" not in str(refused.value) and not (tmp_path / "inputs").exists()


def test_this_machine_gives_questions() -> None:
    """The installed packages alone give enough of both kinds; on a machine without dpkg there is nothing to read."""
    if not STATUS_FILE.is_file():
        pytest.skip("needs a Debian machine's list of packages")
    packages = choose(list(parse_packages(STATUS_FILE.read_text(encoding="utf-8", errors="replace"))), 300)
    train, held_out = split(questions(packages, packages), 200, 20)
    assert len(train) >= 10 and held_out
    assert {t["meta"]["hops"] for t in train} == {1, 2}
    assert not any(leaks(t) for t in [*train, *held_out])
