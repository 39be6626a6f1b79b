"""Judge traffic on file: recorded beside any judge, and replayed in its place (tests, and rewards computed again).

A line per judgement: prompt with version and hash, fields, schema, reply. A replay answers by content; a request that was asked
several times gets the recorded replies in their order, the last one from then on. Invariant: a replay never guesses; a request the
file lacks is an error, and so is one whose prompt has changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from agents.types import JudgeReply, JudgeRequest, Status
from rewards.judges.base import JudgeError, RunningJudge
from rewards.judges.templates import PromptError, load_prompt


def question(request: JudgeRequest) -> tuple[str, dict[str, Any]]:
    """(hash of what is asked, what is asked as plain values). The oracle is no part of it."""
    try:
        version = load_prompt(request.prompt).label
    except PromptError:
        version = ""  # a rule judge needs no prompt
    asked = {
        "prompt": request.prompt, "version": version, "fields": dict(request.fields), "schema": dict(request.schema),
    }  # fmt: skip
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), asked


class Recorded:
    """A judge whose every request and reply is appended to a file. Several processes may share the file."""

    def __init__(self, judge: RunningJudge, path: str) -> None:
        self._judge, self._path = judge, Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("ab").close()
        except OSError as error:
            raise JudgeError(f"judge.record {path} cannot be written ({error.strerror}); give another file") from None

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        reply = await self._judge.ask(request)
        key, asked = question(request)
        row = {"key": key, **asked, "reply": {**vars(reply), "status": str(reply.status)}}
        line = (json.dumps(row) + "\n").encode()
        with self._path.open("ab", buffering=0) as file:  # one write, so that lines of several processes do not mix
            file.write(line)
        return reply

    async def check(self) -> None:
        await self._judge.check()

    def stats(self) -> dict[str, float]:
        return self._judge.stats()

    async def close(self) -> None:
        await self._judge.close()


class Replayed:
    """The judge of a recording."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._replies: defaultdict[str, list[JudgeReply]] = defaultdict(list)
        self._asked: Counter[str] = Counter()
        number = 0
        try:
            for text in Path(path).read_text(encoding="utf-8").splitlines():
                number += 1
                row = json.loads(text)
                reply = {**row["reply"], "status": Status(row["reply"]["status"])}
                self._replies[row["key"]].append(JudgeReply(**reply))
        except OSError as error:
            raise JudgeError(
                f"judge.replay {path} cannot be read ({error.strerror}); give a file that judge.record wrote"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise JudgeError(f"judge.replay {path}, line {number}: no recorded judgement; record it again") from None

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """The recorded reply. Raises JudgeError for a request that was not recorded."""
        key, _ = question(request)
        if key not in self._replies:
            raise JudgeError(
                f"judge.replay {self._path} has no reply to this {request.prompt!r} request; record again with judge.record"
            )
        nth = self._asked[key]
        self._asked[key] += 1
        return self._replies[key][min(nth, len(self._replies[key]) - 1)]

    async def check(self) -> None:
        """A recording is always there."""

    def stats(self) -> dict[str, float]:
        return {"asked": float(self._asked.total())}

    async def close(self) -> None:
        """Nothing is held."""
