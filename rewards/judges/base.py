"""What all judges share: configuration, construction, and the check that a reply has the form that was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from agents.types import JudgeReply, JudgeRequest

KINDS = ("rule", "chat", "vllm")


class JudgeError(RuntimeError):
    """A judge cannot be used as configured. One line: what, where, how to mend."""


@dataclass
class JudgeConfig:
    """Who judges. Limits, cache and counters of `chat` and `vllm` hold per reward actor (vllm: per engine)."""

    kind: str = "rule"
    """`rule` (exact, in closed worlds only), `chat` (any OpenAI-compatible chat endpoint) or `vllm` (engines that the run hosts)."""
    base_url: str = ""
    """chat: address up to and with the version, such as `http://127.0.0.1:8000/v1`."""
    model: str = ""
    """chat: model name as the endpoint knows it; vllm: folder or name of a checkpoint."""
    api_key_env: str = ""
    """chat: name of the environment variable that holds the key; empty: none is sent."""
    timeout_s: float = 60.0
    """One HTTP request, from connecting to the last byte."""
    deadline_s: float = 300.0
    """One judgement with all waiting, retries and repairs; then it is unavailable. At least four `timeout_s`: three tries that time
    out, and the control requests that tell whether it is the text."""
    max_retries: int = 4
    """Further tries after a transport failure, 429 or 5xx; with fewer than 2 no text is to blame for timeouts and 5xx."""
    backoff_s: float = 0.5
    """First pause before a retry; it doubles, with jitter. Retry-After is honoured when it is longer."""
    max_backoff_s: float = 30.0
    """Longest pause of our own choosing."""
    concurrency: int = 16
    """Most HTTP requests in flight; control requests are counted apart, as many again at most."""
    requests_per_minute: int = 0
    """Most HTTP requests that begin within a minute; 0: no limit."""
    tokens_per_minute: int = 0
    """Most tokens within a minute, in and out: estimated when a request begins, corrected by its reply; 0: no limit."""
    breaker_failures: int = 8
    """Transport failures in a row after which, if a control request fails too, nobody is asked for a while."""
    breaker_share: float = 0.5
    """The same for the share of failures among the last 40 requests."""
    breaker_s: float = 10.0
    """How long nobody is asked then; doubles, up to eightfold, while control requests keep failing."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    max_tokens: int = 4096
    """Most tokens of one reply."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further keys of the request's body, such as `{chat_template_kwargs: {enable_thinking: false}}`. They win over `temperature` and
    `max_tokens`, and null leaves a key out: `{max_tokens: null, max_completion_tokens: 4096}`."""
    structured: bool = True
    """Ask the server to enforce the reply's schema; one that refuses it (400) for a control request too is asked without for a while."""
    cache_size: int = 20_000
    """Replies kept in memory, by content; 0: none."""
    cache_dir: str = ""
    """Folder of replies kept on disk, by content; processes and runs may share it. Empty: none."""
    cache_entries: int = 1_000_000
    """Most replies in that folder; those read longest ago go first."""
    price_in: float = 0.0
    """Price of a million tokens sent, in any currency; `judge/cost` is in the same."""
    price_out: float = 0.0
    """Price of a million tokens received."""
    record: str = ""
    """File to which every request and reply is appended (JSONL); empty: none."""
    replay: str = ""
    """File of such records that answers in place of the judge; a request it lacks is an error. Empty: off."""
    engines: int = 1
    """vllm: engines to host, each an actor."""
    num_gpus: float = 1.0
    """vllm: GPUs of one engine; 0: it runs on the CPU, with 1 GiB for keys and values unless `engine_args` (`--kv-cache-memory-bytes`,
    `--gpu-memory-utilization`) or VLLM_CPU_KVCACHE_SPACE say otherwise."""
    engine_args: list[str] = field(default_factory=list)
    """vllm: further arguments of `vllm serve`, such as `[--max-model-len, "16384"]`."""
    start_s: float = 900.0
    """vllm: how long an engine may take to come up."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.kind not in KINDS:
            raise ValueError(f"judge.kind {self.kind!r} is unknown; one of {', '.join(KINDS)}")
        if self.kind == "chat" and (problem := address_problem(self.base_url)):
            raise ValueError(f"judge.base_url {problem}")
        if self.kind != "rule" and not self.model:
            given = (
                "model name that the endpoint at judge.base_url serves"
                if self.kind == "chat"
                else "checkpoint to serve"
            )
            raise ValueError(f"judge.model is empty; give the {given}")
        for name in (
            "timeout_s", "deadline_s", "concurrency", "max_tokens", "max_backoff_s", "breaker_failures", "breaker_s", "cache_entries",
            "engines", "start_s",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"judge.{name} {getattr(self, name)} is not positive and finite")
        for name in (
            "max_retries", "backoff_s", "temperature", "cache_size", "requests_per_minute", "tokens_per_minute", "price_in", "price_out",
            "num_gpus",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"judge.{name} {getattr(self, name)} is negative or not finite")
        if self.deadline_s < 4 * self.timeout_s:
            raise ValueError(
                f"judge.deadline_s {self.deadline_s:g} does not hold three tries and a control request of judge.timeout_s"
                f" {self.timeout_s:g}; give at least {4 * self.timeout_s:g}, or a timeout_s of at most {self.deadline_s / 4:g}"
            )
        ours = sorted({"messages", "model", "stream", "n", "response_format"} & set(self.extra_body))
        if ours:
            raise ValueError(f"judge.extra_body sets {', '.join(ours)}, which the judge sets itself; take it out")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"judge.extra_body cannot be sent as JSON ({error}); give plain values") from None
        if not 0 < self.breaker_share <= 1:
            raise ValueError(f"judge.breaker_share {self.breaker_share} is outside (0, 1]")
        if self.record and self.replay:
            raise ValueError(
                "judge.record and judge.replay are both set; a replay has nothing new to record, so clear one"
            )


def address_problem(url: str) -> str:
    """Why `url` cannot be an endpoint's address, and what to give instead; empty when it can. A password in it is not repeated."""
    mend = "give one such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if "@" in url.partition("://")[2].partition("/")[0]:
        return "holds a user or a password, which would be written with the config; give the key by api_key_env"
    return "" if whole else f"{url!r} is not an http(s) address; {mend}"


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


def make_judge(config: JudgeConfig, hosted: RunningJudge | None = None) -> RunningJudge:
    """The configured judge; asks nobody yet. `hosted`: for `vllm`, whoever reaches the engines.

    Raises ValueError or JudgeError, one line, for a config that does not fit.
    """
    config.check()
    if config.replay:
        from rewards.judges.traffic import Replayed

        return Replayed(config.replay)
    judge = hosted or _make(config)
    if config.record:
        from rewards.judges.traffic import Recorded

        return Recorded(judge, config.record)
    return judge


def _make(config: JudgeConfig) -> RunningJudge:
    if config.kind == "rule":
        from rewards.judges.rule import RuleJudge

        return RuleJudge()
    if config.kind == "vllm":
        raise JudgeError("judge.kind vllm needs engines, which a training run hosts; elsewhere set judge.kind=chat")
    from rewards.judges.chat import ChatJudge

    return ChatJudge(config)


def schema_problem(value: Any, schema: Mapping[str, Any]) -> str:
    """Where and what of a JSON schema a value does not satisfy; empty when it does.

    In the schema's words alone: a judge may have quoted what it read, and this goes into the next prompt.
    """
    error = best_match(Draft202012Validator(dict(schema)).iter_errors(value))
    if error is None:
        return ""
    path = [str(part) for part in error.absolute_schema_path]
    where = "/".join(name for name, before in zip(path[1:], path, strict=False) if before == "properties")
    return f"{where or 'the reply'} does not satisfy {error.validator}: {json.dumps(error.validator_value)[:300]}"
