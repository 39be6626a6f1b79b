"""A chat endpoint that judges closed worlds exactly, so that a run can be judged over HTTP without a language model, and lose its judge.

It reads nothing but what a judge is sent: the data blocks of the prompt. How facts are worded it knows from the worlds' tasks, by their question.

Invariants: a reply is what the rule judge would say of the same text; while `down`, nobody gets a reply: every other request is told 503,
the others lose their connection.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from agents.types import Task
from rewards.judges.rule import RULES
from tests.support.chat_double import DROP, Answer, failure, serve, verdict

_BLOCK = re.compile(r'<data field="(\w+)" id="(\w+)">\n(.*?)\n</data id="\2">', re.DOTALL)
_FACT = re.compile(r"^(\w+) is the (\w+) of (\w+)$")
"""A filled rubric; pages say `Y's keeper is X`."""
_PAGE = re.compile(r"\[Page (\d+)\] ")


def read_fields(prompt: str) -> dict[str, str]:
    """The data blocks of a judge's prompt."""
    return {name: text for name, _, text in _BLOCK.findall(prompt)}


def listed(text: str) -> list[str]:
    """A numbered list as it was."""
    return [line.split(". ", 1)[1] for line in text.splitlines() if ". " in line]


def judge(prompt: str, tasks: Mapping[str, Task]) -> Any:
    """The verdict on one prompt. Raises KeyError for a question of another world, or a prompt it has no rule for."""
    fields = read_fields(prompt)
    if "second" in fields:
        return {"same": True}
    if "statements" in fields:
        return support(fields)
    oracle = tasks[fields["question"]].oracle or {}
    if "labels" in fields:
        return RULES["carr_identify"]({"message": fields["message"], "labels": listed(fields["labels"])}, oracle)[0]
    return RULES["outcome"]({**fields, "answers": listed(fields["answers"])}, oracle)[0]


def support(fields: Mapping[str, str]) -> dict[str, bool]:
    """Statements that a piece of a page makes, in the synthetic world's words for them."""
    pages = [re.split(r"\n[ \t]*\n", page) for page in _PAGE.split(fields["pages"])[2::2]]
    pieces = [f" {' '.join(piece.split())}" for page in pages for piece in page]
    statements = (line.split(": ", 1) for line in fields["statements"].splitlines())
    found = {}
    for key, text in statements:
        told = _FACT.sub(r"\3's \2 is \1", " ".join(text.split()).rstrip("."))
        whole = re.compile(rf"(?<!\w){re.escape(told)}(?!\w)")
        found[key] = any(whole.search(piece) for piece in pieces)
    return found


class RuleEndpoint:
    """Serves in a thread of its own until the block ends; `down` may be set at any time."""

    def __init__(self, tasks: Iterable[Task], port: int = 0) -> None:
        self._port = port
        self._tasks = {task.question: task for task in tasks}
        self._end = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.down = False
        self.url = ""
        self.answered = self.refused = 0
        self.puzzled: list[str] = []
        """Prompts nobody should have sent."""

    def __enter__(self) -> RuleEndpoint:
        self._thread.start()
        if not self._up.wait(30):
            raise RuntimeError(f"the endpoint did not come up; is port {self._port} taken?")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with serve(self._answer, port=self._port) as endpoint:
            self._endpoint, self.url = endpoint, endpoint.url
            self._up.set()
            await self._end.wait()

    def _answer(self, body: dict[str, Any], number: int) -> Answer | str:
        for kept in (self._endpoint.requests, self._endpoint.headers, self._endpoint.texts):
            del kept[:-1]  # the double keeps everything, which is too much for a whole run
        if self.down:
            self.refused += 1
            return failure(503) if self.refused % 2 else DROP
        prompt = body["messages"][1]["content"]
        try:
            reply = judge(prompt, self._tasks)
        except KeyError as error:
            self.puzzled.append(repr(error))
            return failure(500)
        self.answered += 1
        return verdict(reply)
