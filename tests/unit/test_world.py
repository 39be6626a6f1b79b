"""The synthetic world: exact chains, disjoint names, honest traces, and a tokenizer that spells it without loss."""

import json
import random
import re
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.plain import from_plain
from agents.text import citations, exact_answer, exact_match, is_refusal, validate_rubrics
from agents.types import Document, Task
from envs.config import SandboxConfig
from envs.sandbox import Session
from envs.world import WorldConfig, build_world
from envs.world.names import FIRST_HALVES, NUM_HALVES, SECOND_HALVES, draw_names, near_name, split_of
from envs.world.policy import make_tokenizer, model_config, pieces, write_base
from envs.world.traces import MixConfig, ScriptConfig, open_event, scripts, search_event, write_script
from envs.world.world import Entity, make_task, validate

SMALL = WorldConfig(num_entities=30, num_tasks=40)


def test_a_two_step_question_has_the_answer_rubrics_and_oracle_that_its_facts_imply():
    entities = {
        "Badokiru": Entity("Badokiru", "painter", (("rival", "Lomitave"), ("cook", "Gupezota"))),
        "Lomitave": Entity("Lomitave", "baker", (("mentor", "Gupezota"),)),
        "Gupezota": Entity("Gupezota", "sailor", ()),
    }
    task = make_task("t", entities, "Badokiru", ("rival", "mentor"))
    assert task.question == "Start at Badokiru. Step 1: rival. Step 2: mentor. Who is at the end?"
    assert task.answers == ("Gupezota",) and task.gold_docs == ("Badokiru", "Lomitave")
    assert task.rubrics == ("<E1> is the rival of Badokiru.", "<E0> is the mentor of <E1>.")
    assert [n.text for n in task.nuggets] == ["Badokiru's rival is Lomitave.", "Lomitave's mentor is Gupezota."]
    assert task.oracle == {
        "entities": {"E1": "Lomitave", "E0": "Gupezota"},
        "statements": [
            {"subject": "Badokiru", "object": "<E1>", "sentence": "{subject}'s rival is {object}."},
            {"subject": "<E1>", "object": "<E0>", "sentence": "{subject}'s mentor is {object}."},
        ],
    }
    assert entities["Badokiru"].document.text == (
        "Badokiru is a painter.\nBadokiru's rival is Lomitave. Badokiru's cook is Gupezota."
    )
    missing = make_task("m", entities, "Badokiru", ("rival", "tutor"))
    assert not missing.answerable and missing.rubrics == () and missing.gold_docs == ("Badokiru", "Lomitave")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_every_world_is_consistent(seed, hops, shortcut, unanswerable):
    config = replace(SMALL, seed=seed, hops={hops: 1.0}, shortcut=shortcut, unanswerable=unanswerable)
    world = build_world(config)
    assert validate(world) == [] and world.tasks
    for task in world.tasks:
        assert task.meta["hops"] == hops
        assert not task.answerable or validate_rubrics(task.rubrics, task.answers) == []
        assert not any(answer in task.question for answer in task.answers)


def test_same_config_same_world_and_other_seed_other_names():
    one, again, other = build_world(SMALL), build_world(SMALL), build_world(replace(SMALL, seed=1))
    assert one.documents == again.documents and one.tasks == again.tasks
    assert {d.id for d in one.documents} != {d.id for d in other.documents}


def test_worlds_of_different_splits_share_no_name_but_all_halves_are_trained():
    def names(split: str) -> set[str]:
        return {
            d.id
            for seed in range(12)
            for d in build_world(replace(SMALL, seed=seed, split=split, num_tasks=1)).documents
        }

    assert not names("train") & names("heldout")
    for half in range(NUM_HALVES):
        assert any(split_of(half, i) == "train" for i in range(NUM_HALVES))
        assert any(split_of(i, half) == "train" for i in range(NUM_HALVES))
    held_out = sum(split_of(a, b) == "heldout" for a in range(NUM_HALVES) for b in range(NUM_HALVES))
    assert 0.11 < held_out / NUM_HALVES**2 < 0.14


def test_shortcut_knob_is_how_often_see_also_gives_the_answer():
    def share(shortcut: float) -> float:
        world = build_world(WorldConfig(num_entities=200, num_tasks=200, hops={2: 1.0}, shortcut=shortcut))
        firsts = {t.meta["start"]: t for t in reversed(world.tasks)}  # the first task of a start decides
        return sum(world.entities[s].see_also == t.answers[0] for s, t in firsts.items()) / len(firsts)

    assert share(0.0) == 0.0 and 0.3 < share(0.5) < 0.7 and share(1.0) == 1.0


def test_distractors_are_near_names_that_no_task_needs():
    world = build_world(WorldConfig(num_entities=40, distractors=0.5, num_tasks=60))
    needed = {doc for task in world.tasks for doc in task.gold_docs} | {a for t in world.tasks for a in t.answers}
    spare = list(world.entities)[40:]
    assert len(world.documents) == 60 and not needed & set(spare)
    assert all(any(name[4:] == other[4:] for other in list(world.entities)[:40]) for name in spare)


def test_names_are_unique_and_first_halves_point_to_one_name_in_a_small_world():
    names = draw_names(random.Random(0), "train", 300)
    assert len(set(names)) == 300 == len({name[:4] for name in names})
    near = near_name(random.Random(0), names[0], "train", set(names))
    assert near[4:] == names[0][4:] and near not in names
    assert len(set(FIRST_HALVES)) == len(set(SECOND_HALVES)) == NUM_HALVES


@pytest.mark.parametrize(
    "change, word",
    [
        ({"split": "test"}, "split"),
        ({"hops": {5: 1.0}}, "hops"),
        ({"hops": {}}, "hops"),
        ({"facts_per_page": 0}, "facts_per_page"),
        ({"num_entities": 4}, "num_entities"),
        ({"shortcut": 1.5}, "shortcut"),
    ],
)
def test_impossible_configs_are_refused_in_one_line(change, word):
    with pytest.raises(ValueError, match=word) as caught:
        build_world(replace(SMALL, **change))
    assert "\n" not in str(caught.value)


def test_save_writes_the_files_of_a_users_own_world(tmp_path):
    world = build_world(SMALL)
    corpus, tasks = world.save(tmp_path / "w")
    read = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert [from_plain(Document, line) for line in read] == world.documents
    assert [from_plain(Task, json.loads(line)) for line in tasks.read_text().splitlines()] == world.tasks


# ---------------------------------------------------------------------------------------------------- scripts


def final(steps):
    return steps[-1].split("</think>")[-1].strip()


def test_an_expert_follows_the_trail_and_cites_every_page():
    config = ScriptConfig(world=replace(SMALL, unanswerable=0.2))
    for script in islice(scripts(config, 0), 60):
        task, message = script.task, final(script.steps)
        events = [event for step in script.steps if not isinstance(step, str) for event in step]
        opened = [e.call.arguments["doc_id"] for e in events if e.call.name == "open"]
        assert script.kind == "expert" and tuple(opened) == task.gold_docs
        assert [c.target for c in citations(message)] == list(task.gold_docs)
        answer = exact_answer(message)
        assert exact_match(answer, task.answers) if task.answerable else is_refusal(answer)
        shown = task.question
        for step in script.steps:
            if isinstance(step, str):
                assert all(name in shown for name in re.findall(r"\b[A-Z][a-z]{7}\b", step) if name in name_set(script))
            else:
                shown += step[0].text


def name_set(script):
    return {script.task.meta["start"], *script.task.gold_docs, *script.task.answers}


def test_flawed_scripts_err_as_their_kind_says():
    kinds = ("early", "see_also", "seen", "wrong_fact", "uncited", "malformed")
    world = build_world(WorldConfig(num_entities=40, num_tasks=40, hops={2: 1.0, 3: 1.0}, shortcut=0.0))
    for kind in kinds:
        config = ScriptConfig(mix=MixConfig(**{kind: 1.0}))
        for seed, task in enumerate(world.tasks):
            script = write_script(random.Random(seed), world, task, config)
            message = final(script.steps)
            assert script.kind == kind
            if kind == "malformed":
                assert script.steps[-1].endswith("</think>\n\n")
            elif kind == "uncited":
                assert citations(message) == [] and exact_answer(message) == task.answers[0]
            else:
                assert exact_answer(message) != task.answers[0] or kind in (
                    "wrong_fact",
                    "see_also",
                )  # these may be lucky
                assert len(citations(message)) == message.split("## Exact")[0].count("'s ")
            if kind in ("early", "see_also"):
                assert len(citations(message)) < task.meta["hops"]
    mixed = islice(scripts(ScriptConfig(world=SMALL, mix=MixConfig(early=0.5)), 0), 400)
    share = sum(s.kind in ("early", "seen") for s in mixed) / 400
    assert 0.4 < share < 0.6


def test_scripts_repeat_with_their_seed():
    def first(seed: int) -> list[tuple]:
        return [script.steps for script in islice(scripts(ScriptConfig(world=SMALL), seed), 30)]

    assert first(1) == first(1) != first(2)


async def test_observations_read_as_the_sandbox_writes_them():
    world = build_world(SMALL)

    class Corpus:
        """A backend that returns fixed hits, so that only the sandbox's wording is tested."""

        async def search(self, queries):
            from agents.types import Hit

            return [[Hit(d.id, 1.0) for d in world.documents[:2]] for _ in queries]

        async def get(self, ids):
            return [world.entities[i].document if i in world.entities else None for i in ids]

        def info(self):
            from agents.types import BackendInfo

            return BackendInfo("fixed", len(world.documents), "x")

        async def close(self):
            pass

    session = Session(Corpus(), SandboxConfig(default_k=2, snippet_mode="lead", snippet_chars=36))
    found = [world.entities[d.id] for d in world.documents[:2]]
    for ours in (search_event("rival of someone", found), open_event(found[0])):
        theirs = await session.call(ours.call)
        assert (theirs.text, theirs.seen, theirs.error) == (ours.text, ours.seen, "")


# --------------------------------------------------------------------------------------------------- tokenizer


TOKENIZER = make_tokenizer()


def test_tokenizer_spells_the_world_without_loss_and_in_few_pieces():
    tokenizer = TOKENIZER
    world = build_world(replace(SMALL, unanswerable=0.2))
    for text in [d.text for d in world.documents] + [t.question for t in world.tasks]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    document = world.documents[0]
    assert tokenizer.encode(document.id).tokens == [document.id[:4], document.id[4:]]
    for script in islice(scripts(ScriptConfig(world=replace(SMALL, hops={2: 1.0})), 0), 5):
        written = sum(len(tokenizer.encode(step).ids) + 1 for step in script.steps if isinstance(step, str))
        assert written < 90


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_any_ascii_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_base_folder_loads_like_any_other(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    write_base(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert len(tokenizer) == len(pieces()) <= config.vocab_size == model_config()["vocab_size"]
    assert config.eos_token_id == tokenizer.eos_token_id and config.pad_token_id == tokenizer.pad_token_id
