"""What all judges share: configuration, construction, and the check that a reply has the form that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from agents.types import JudgeReply, JudgeRequest


class JudgeError(RuntimeError):
    """A judge cannot be used as configured. One line: what, where, how to mend."""


@dataclass
class JudgeConfig:
    """Who judges."""

    kind: str = "rule"
    """`rule` (exact, in closed worlds only) or `chat` (any OpenAI-compatible chat endpoint)."""
    base_url: str = ""
    """chat: address up to and with the version, such as `http://127.0.0.1:8000/v1`."""
    model: str = ""
    """chat: model name as the endpoint knows it."""
    api_key_env: str = ""
    """chat: name of the environment variable that holds the key; empty: none is sent."""
    timeout_s: float = 60.0
    """chat: one HTTP request, from connecting to the last byte."""
    deadline_s: float = 300.0
    """chat: one judgement with all waiting, retries and repairs; then it is unavailable."""
    max_retries: int = 4
    """chat: further tries after a transport failure, 429 or 5xx."""
    backoff_s: float = 0.5
    """chat: first pause before a retry; it doubles, with jitter. Retry-After is honoured instead when the server sends it."""
    max_backoff_s: float = 30.0
    """chat: longest pause of our own choosing."""
    concurrency: int = 16
    """chat: most HTTP requests in flight, per reward actor."""
    temperature: float = 0.0
    """chat: sampling temperature of the judge."""
    max_tokens: int = 4096
    """chat: most tokens of one reply."""
    structured: bool = True
    """chat: ask the server to enforce the reply's schema; a server that refuses (400) is asked without from then on."""
    cache_size: int = 20_000
    """chat: replies kept in memory, by content; 0: none."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.kind not in ("rule", "chat"):
            raise ValueError(f"judge.kind {self.kind!r} is unknown; one of rule, chat")
        if self.kind == "chat":
            if not self.base_url.startswith(("http://", "https://")):
                raise ValueError(
                    f"judge.base_url {self.base_url!r} is not an http(s) address; give one such as http://127.0.0.1:8000/v1"
                )
            if not self.model:
                raise ValueError("judge.model is empty; give the model name that the endpoint at judge.base_url serves")
        for name in ("timeout_s", "deadline_s", "concurrency", "max_tokens", "max_backoff_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"judge.{name} {getattr(self, name)} is not positive")
        for name in ("max_retries", "backoff_s", "temperature", "cache_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"judge.{name} {getattr(self, name)} is negative")


class RunningJudge(Protocol):
    """A judge, and what its host needs beside `ask`."""

    async def ask(self, request: JudgeRequest) -> JudgeReply: ...

    async def check(self) -> None:
        """Raises JudgeError when the judge cannot answer now. Called once before a run."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters since the start, flat."""
        ...

    async def close(self) -> None: ...


def make_judge(config: JudgeConfig) -> RunningJudge:
    """The configured judge. Raises ValueError or JudgeError, one line, for a config that does not fit; asks nobody yet."""
    config.check()
    if config.kind == "rule":
        from rewards.judges.rule import RuleJudge

        return RuleJudge()
    from rewards.judges.chat import ChatJudge

    return ChatJudge(config)


def schema_problem(value: Any, schema: Mapping[str, Any]) -> str:
    """Why a value does not satisfy a JSON schema, in a sentence; empty when it does."""
    error = best_match(Draft202012Validator(dict(schema)).iter_errors(value))
    if error is None:
        return ""
    where = "/".join(str(part) for part in error.absolute_path)
    return f"{where or 'the reply'}: {error.message[:300]}"
