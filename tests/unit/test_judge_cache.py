"""Replies kept by content, and judge traffic on file."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from agents.types import JudgeReply, JudgeRequest, Status, Task
from rewards.judges.base import JudgeConfig, JudgeError, make_judge
from rewards.judges.cache import ReplyCache
from rewards.judges.chat import ChatJudge
from rewards.judges.identity import fingerprint
from rewards.outcome import OUTCOME_SCHEMA, outcome_request
from tests.support.chat_double import Answer, failure, instead_of_http, is_control, serve, verdict
from tests.support.reward_cases import rollout

RIGHT, WRONG = {"extracted_answer": "Paris", "correct": True}, {"extracted_answer": "Paris", "correct": False}
KEY = "ab" * 32


def request(question: str = "Capital of France?") -> JudgeRequest:
    return outcome_request(Task("t", question, ("Paris",)), rollout("## Exact Answer\nParis"))


def reply(value: Any = RIGHT) -> JudgeReply:
    return JudgeReply(Status.ok, value, text="because", prompt_hash="2-x@m", num_tokens=7)


async def put(cache: ReplyCache, key: str, value: JudgeReply) -> None:
    cache.put(key, value)
    await cache.flush()


async def test_replies_survive_on_disk(tmp_path: Path) -> None:
    await put(ReplyCache(10, str(tmp_path)), KEY, reply())
    assert await ReplyCache(10, str(tmp_path)).get(KEY, OUTCOME_SCHEMA) == reply()
    assert await ReplyCache(0, str(tmp_path)).get("cd" * 32, OUTCOME_SCHEMA) is None
    await put(ReplyCache(10, str(tmp_path)), "ef" * 32, JudgeReply(Status.unavailable, cause="x"))
    assert len(list(tmp_path.rglob("*.json"))) == 1, "failures are not kept"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"value": {"correct": true}}',
        b'{"value": 1, "text": "", "prompt": "", "num_tokens": 1}',
    ],
)
async def test_a_damaged_file_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    cache = ReplyCache(0, str(tmp_path))
    await put(cache, KEY, reply())
    (tmp_path / "ab" / f"{KEY}.json").write_bytes(damage)
    assert await cache.get(KEY, OUTCOME_SCHEMA) is None
    await put(cache, KEY, reply())
    assert await cache.get(KEY, OUTCOME_SCHEMA) == reply()


async def test_a_folder_that_cannot_be_written_costs_no_judgement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ReplyCache(10, str(tmp_path / "file"))
    await put(cache, KEY, reply())
    assert cache.num_errors == 1 and await cache.get(KEY, OUTCOME_SCHEMA) == reply()


async def test_the_folder_is_bounded_and_keeps_what_was_read_last(tmp_path: Path) -> None:
    cache = ReplyCache(0, str(tmp_path), entries=256 * 20)
    for i in range(200):
        key = f"ab{i:062x}"
        await put(cache, key, reply())
        os.utime(tmp_path / "ab" / f"{key}.json", (i, i))
        await cache.get(f"ab{0:062x}", OUTCOME_SCHEMA)
    torn = tmp_path / "ab" / "x.1-1.part"
    torn.write_text("")
    os.utime(torn, (1, 1))
    cache._tidy(tmp_path / "ab")
    kept = {path.stem for path in (tmp_path / "ab").iterdir()}
    assert kept == {f"ab{i:062x}" for i in [0, *range(181, 200)]}


def _work(folder: str, number: int) -> int:
    import asyncio

    async def work() -> int:
        cache, wrong = ReplyCache(0, folder, entries=256 * 4), 0
        for i in range(300):
            key = f"{i % 8:064x}"
            found = await cache.get(key, OUTCOME_SCHEMA)
            wrong += found is not None and found.text != f"reply {i % 8}"
            await put(cache, key, JudgeReply(Status.ok, RIGHT, text=f"reply {i % 8}"))
        return wrong + cache.num_errors

    return asyncio.run(work())


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    """They write, read and tidy the same keys at once: nobody reads half a reply or another's."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_work, [(str(tmp_path), n) for n in range(3)]) == [0, 0, 0]
    assert not list(tmp_path.rglob("*.part"))


async def test_what_the_key_covers(tmp_path: Path) -> None:
    """Another model, temperature, question or schema is another request; the same one is not asked again, in any process."""
    async with serve(lambda body, n: verdict(RIGHT)) as endpoint:

        async def asked(question: str = "Q?", schema: Any = OUTCOME_SCHEMA, **options: Any) -> int:
            before = len(endpoint.requests)
            config = JudgeConfig(
                kind="chat", base_url=endpoint.url, cache_dir=str(tmp_path), **({"model": "judge"} | options)
            )
            judge = make_judge(config)
            made = request(question)
            assert (await judge.ask(JudgeRequest(made.prompt, made.fields, schema))).status is Status.ok
            await judge.close()
            return len(endpoint.requests) - before

        assert [await asked(), await asked(), await asked(cache_size=0)] == [1, 0, 0]
        others: list[dict[str, Any]] = [
            {"question": "R?"},
            {"model": "b"},
            {"temperature": 0.5},
            {"max_tokens": 9},
            {"extra_body": {"top_p": 0.5}},
            {"schema": OUTCOME_SCHEMA | {"title": "t"}},
        ]
        for other in others:
            assert await asked(**other) == 1 and await asked(**other) == 0
        with mock.patch("rewards.judges.chat.FORM", "Reply with JSON: {schema}"):
            assert await asked() == 1, "every word that is sent"


async def test_new_weights_in_the_same_folder_are_another_judge(tmp_path: Path) -> None:
    weights, answers = tmp_path / "model" / "model.safetensors", [RIGHT, WRONG]
    weights.parent.mkdir()
    with instead_of_http(lambda body, n: verdict(answers[n])):
        for size, answer in ((8, RIGHT), (8, RIGHT), (9, WRONG)):
            weights.write_bytes(bytes(size))
            os.utime(weights, (1, size))
            judge = ChatJudge(JudgeConfig(kind="vllm", model=str(weights.parent), cache_dir=str(tmp_path / "cache")))
            assert (await judge.ask(request())).value == answer
            await judge.close()


async def test_a_disk_that_hangs_costs_no_judgement(tmp_path: Path) -> None:
    """One read is waited for, briefly; then the disk is left alone."""
    let_go, reads = threading.Event(), []

    def hang(*path: Any) -> None:
        reads.append(path)
        let_go.wait(10)

    config = JudgeConfig(kind="chat", base_url="http://judge", model="judge", cache_dir=str(tmp_path), deadline_s=4.0)
    with instead_of_http(lambda body, n: verdict(RIGHT)), mock.patch.object(ReplyCache, "_read", hang):
        judge, began = ChatJudge(config), time.monotonic()
        for i in range(4):
            assert (await judge.ask(request(f"{i}?"))).status is Status.ok
        assert len(reads) == 1 and judge.stats()["cache_errors"] == 1 and time.monotonic() - began < 8
        await judge.close()
        let_go.set()


# ----------------------------------------------------------------------------------------------------------- traffic


async def test_recorded_traffic_is_replayed_without_a_judge(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "traffic.jsonl")

    def handler(body: dict[str, Any], n: int) -> Answer:
        return (
            verdict({"same": True})
            if is_control(body)
            else failure(500)
            if n == 0
            else verdict(WRONG if "Other" in str(body) else RIGHT)
        )

    async with serve(handler) as endpoint:
        judge = make_judge(JudgeConfig(kind="chat", base_url=endpoint.url, model="judge", record=path, max_retries=0))
        first = [await judge.ask(request()) for _ in range(2)] + [await judge.ask(request("Other?"))]
        await judge.close()
    assert [r.status for r in first] == [Status.unavailable, Status.ok, Status.ok]
    again = make_judge(JudgeConfig(kind="chat", base_url="http://127.0.0.1:1/v1", model="judge", replay=path))
    await again.check()
    replayed = [await again.ask(request()) for _ in range(2)] + [await again.ask(request("Other?"))]
    assert replayed == first and await again.ask(request()) == first[1]
    assert again.stats() == {"asked": 4.0}
    row = json.loads(Path(path).read_text().splitlines()[0])
    assert (
        row["prompt"] == "outcome"
        and row["reply"]["cause"] == "judge_http_500"
        and row["reply"]["prompt_hash"].endswith("@judge")
    )
    with pytest.raises(JudgeError, match=r"has no reply to this 'outcome' request; record again with judge.record"):
        await again.ask(request("Never asked?"))


async def test_any_judge_can_be_recorded(tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    judge = make_judge(JudgeConfig(record=path))
    wanted = await judge.ask(request())
    assert await make_judge(JudgeConfig(replay=path)).ask(request()) == wanted
    assert wanted.status is Status.ok


@pytest.mark.parametrize(
    ("content", "line"), [(None, "cannot be read"), ("{}\n", "line 1: no recorded judgement"), ("nonsense", "line 1")]
)
def test_a_bad_recording_is_one_line(tmp_path: Path, content: str | None, line: str) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(JudgeError, match=line):
        make_judge(JudgeConfig(replay=str(path)))


# ---------------------------------------------------------------------------------------------------------- identity

HOSTED = {"kind": "vllm", "model": "m", "engine_args": ["--quantization", "fp8"]}
CHAT = {"kind": "chat", "model": "m", "base_url": "http://a/v1"}


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (HOSTED, {"engine_args": ["--revision", "abc"]}), (HOSTED, {"engine_args": []}), (HOSTED, {"temperature": 0.5}), (CHAT, {"model": "n"}),
        (CHAT, {"base_url": "http://b/v1"}), (CHAT, {"extra_body": {"top_p": 0.5}}), (CHAT, {"max_tokens": 9}), (CHAT, {"structured": False}),
        (CHAT, HOSTED), (CHAT, {"kind": "rule"}),
    ],
)  # fmt: skip
def test_another_judge_has_another_fingerprint(options: dict[str, Any], change: dict[str, Any]) -> None:
    assert fingerprint(JudgeConfig(**options)) != fingerprint(JudgeConfig(**(options | change)))


@pytest.mark.parametrize(
    ("options", "change"),
    [(HOSTED, {"base_url": "http://127.0.0.1:4321/v1"}), (CHAT, {"timeout_s": 9.0, "cache_dir": "x"}), (CHAT, {"base_url": "http://a/v1/"})],
)  # fmt: skip
def test_what_changes_no_verdict_leaves_the_fingerprint(options: dict[str, Any], change: dict[str, Any]) -> None:
    assert fingerprint(JudgeConfig(**options)) == fingerprint(JudgeConfig(**(options | change)))


def test_new_rules_and_a_new_chat_template_are_new_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(JudgeConfig())
    monkeypatch.setattr("rewards.judges.identity.VERSION", "rule-99")
    assert fingerprint(JudgeConfig()) == "rule rule-99" != before
    template = tmp_path / "t.jinja"
    seen = []
    for text in ("a", "b"):
        template.write_text(text)
        seen.append(fingerprint(JudgeConfig(kind="vllm", model="m", engine_args=[f"--chat-template={template}"])))
    assert seen[0] != seen[1]


async def test_replies_of_other_engine_arguments_are_not_used(tmp_path: Path) -> None:
    said = iter([RIGHT, WRONG])
    found = []
    with instead_of_http(lambda body, n: verdict(next(said))):
        for args in (["--quantization", "fp8"], ["--quantization", "fp8"], ["--quantization", "awq"]):
            judge = ChatJudge(JudgeConfig(kind="vllm", base_url="http://j/v1", model="m", cache_dir=str(tmp_path), engine_args=args))  # fmt: skip
            found.append((await judge.ask(request())).value)
            await judge.close()
    assert found == [RIGHT, RIGHT, WRONG]
