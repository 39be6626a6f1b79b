"""The configuration of an evaluation: the sections of a run (`cluster.schema`) under the same names, and what only an evaluation has.

Invariant: `identity` names every setting that the answer to a question hangs on, and no other: two evaluations of the same identity may share
a folder, whoever judged them and however fast they were played.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from agents.chat.config import ChatAgentConfig
from agents.sampling.config import SamplingConfig
from cluster.fleet import FleetConfig
from cluster.model import ModelConfig
from cluster.rollout import RolloutConfig
from cluster.runtime import RayConfig
from cluster.schema import ProtocolConfig
from cluster.vllm.options import EngineConfig
from cluster.watchdog import WatchConfig
from envs.benchmarks.base import BenchmarkConfig
from envs.config import SandboxConfig
from envs.journal import digest
from envs.world import WorldConfig
from retrieval.backend import BackendConfig
from retrieval.service import ServiceConfig
from rewards.config import RewardConfig
from rewards.judges.base import JudgeConfig, address_problem

POLICIES = ("checkpoint", "chat", "recorded")
SOURCES = ("benchmark", "files", "index", "server", "parallel_world", "none")
PROBES = ("closed_book", "oracle")
TOKEN_AGENT = "policy"
"""The agent that speaks the protocol its policy was trained in, token by token."""


@dataclass
class ChatConfig:
    """A policy behind an OpenAI-compatible chat endpoint. Limits hold for all workers together."""

    base_url: str = ""
    """Address up to and with the version, such as `http://127.0.0.1:8000/v1`."""
    model: str = ""
    """Name of the model as the endpoint knows it."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty: none is sent."""
    max_tokens: int = 4096
    """Most tokens of one reply, reasoning included, where the agent asks for no other number."""
    context_window: int = 0
    """Tokens of the model's context, where it is known; 0: the endpoint says so by refusing."""
    seeded: bool = False
    """Send a `seed` with every request, another for each sample; some endpoints refuse the key."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further keys of the request's body. They win over ours, and null leaves a key out, as in `judge.extra_body`."""
    timeout_s: float = 600.0
    """One HTTP request, from connecting to the last byte."""
    retries: int = 4
    """Further tries of a request after a transport failure, timeout, 429 or 5xx."""
    backoff_s: float = 0.5
    """First pause before a retry; it doubles, with jitter. Retry-After is honoured when it is longer."""
    max_backoff_s: float = 30.0
    """Longest pause of our own choosing."""
    concurrency: int = 32
    """Most requests in flight."""
    requests_per_minute: int = 0
    """Most requests that begin within a minute; 0: no limit."""
    tokens_per_minute: int = 0
    """Most tokens within a minute, in and out; 0: no limit."""
    price_in: float = 0.0
    """Price of a million tokens sent, in any currency."""
    price_cached: float = -1.0
    """Price of a million tokens that the server held already; -1: that of others."""
    price_out: float = 0.0
    """Price of a million tokens received."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("timeout_s", "max_tokens", "max_backoff_s", "concurrency"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"policy.chat.{name} {getattr(self, name)} is not positive and finite")
        for name in ("retries", "backoff_s", "requests_per_minute", "tokens_per_minute", "price_in", "price_out", "context_window"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"policy.chat.{name} {getattr(self, name)} is negative or not finite")
        ours = sorted({"messages", "model", "stream", "n", "tools", "seed"} & set(self.extra_body))
        if ours:
            raise ValueError(
                f"policy.chat.extra_body sets {', '.join(ours)}, which the evaluation sets itself; take it out"
            )


@dataclass
class PolicyConfig:
    """Who answers."""

    kind: str = "checkpoint"
    """`checkpoint` (section `model`), `chat` (an endpoint), or `recorded` (what was played before)."""
    temperature: float = 0.0
    """Sampling temperature, of checkpoints and of endpoints."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """For `kind: chat`; of a checkpoint with a chat agent its limits, prices and `max_tokens`."""
    recorded: str = ""
    """For `kind: recorded`: folder of an evaluation, or of a training run (its evaluation after training)."""
    engine_args: list[str] = field(default_factory=lambda: ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"])  # fmt: skip
    """Of a checkpoint with a chat agent: further arguments of `vllm serve`; sizes come from the section `engine`."""
    start_s: float = 900.0
    """How long such an engine may take to come up."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.kind not in POLICIES:
            raise ValueError(f"policy.kind {self.kind!r} is unknown; one of {', '.join(POLICIES)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"policy.temperature {self.temperature} is negative or not finite")
        self.chat.check()
        if self.kind == "chat":
            if problem := address_problem(self.chat.base_url):
                raise ValueError(f"policy.chat.base_url {problem}")
            if not self.chat.model:
                raise ValueError("policy.chat.model is empty; give the name of the model that the endpoint serves")
        if self.kind == "recorded" and not self.recorded:
            raise ValueError("policy.recorded is empty; give the folder of an evaluation or of a run")


@dataclass
class AgentConfig:
    """How the policy is made to work."""

    name: str = TOKEN_AGENT
    """`policy`: the protocol a checkpoint was trained in, token by token; else a name in `agents.chat.registry.AGENTS`."""
    settings: ChatAgentConfig = field(default_factory=ChatAgentConfig)
    """Of chat agents."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        from agents.chat.registry import AGENTS

        if self.name != TOKEN_AGENT and self.name not in AGENTS:
            near = difflib.get_close_matches(self.name, [TOKEN_AGENT, *AGENTS], n=1)
            mend = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"agent.name {self.name!r} is unknown; {mend}There are {', '.join((TOKEN_AGENT, *AGENTS))}"
            )
        try:
            self.settings.check()
        except ValueError as error:
            raise ValueError(f"agent.settings: {error}") from None


@dataclass
class CorpusConfig:
    """What is searched."""

    source: str = "benchmark"
    """`benchmark` (the documents that come with the set), `files`, `index`, `server` (retrieval.kind remote or live), `parallel_world` (the
    engine of Mind-ParaWorld over each question's own facts), or `none` (closed book)."""
    files: list[str] = field(default_factory=list)
    """For `files`: corpus files, or folders of them (see `retrieval.corpus`)."""
    malformed: str = "error"
    """For `files`: lines that do not fit, `error`, or `skip` and count."""
    columns: dict[str, str] = field(default_factory=dict)
    """For `files`: names under which records have `id`, `title`, `text`, `contents`."""
    index: str = ""
    """For `index`: a folder that `gumshoe index` has built; `retrieval.kind: auto` takes its settings."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.source not in SOURCES:
            raise ValueError(f"corpus.source {self.source!r} is unknown; one of {', '.join(SOURCES)}")
        for source, given in (("files", self.files), ("index", self.index)):
            if (self.source == source) != bool(given):
                mend = f"set corpus.source={source}" if given else f"give corpus.{source}, or another corpus.source"
                raise ValueError(f"corpus.source is {self.source!r} and corpus.{source} is {given!r}; {mend}")


@dataclass
class BudgetConfig:
    """What one question may take; 0: no limit. Whoever passes a limit before an answer came ends as `budget` and is scored."""

    tokens: int = 0
    """Tokens in and out over all requests to the policy. No request begins without some left, so the last may pass the limit."""
    calls: int = 0
    """Tool calls that are executed."""
    seconds: float = 0.0
    """Seconds since the question began, waiting for policy and tools included. Waits of the evaluation's own making (for room within limits,
    before another try, for an engine) and tries that came to nothing are not."""
    money: float = 0.0
    """Cost of all requests, by the prices of `policy.chat`."""
    context_tokens: int = 0
    """Tokens of one request and its reply: a policy of a smaller context than the model's own."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for each in fields(self):
            if not 0 <= getattr(self, each.name) < math.inf:
                raise ValueError(f"budget.{each.name} {getattr(self, each.name)} is negative or not finite")


@dataclass
class EvalConfig:
    """Everything `gumshoe eval` can be told about a benchmark."""

    name: str = "evaluation"
    """Its folder below storage_path."""
    seed: int = 0
    """Seeds the policy's sampling; each question and sample draws its own from it."""
    storage_path: str = "runs"
    """Where evaluations and indexes lie. Absolute, or relative to the folder the command is started in."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    """Which questions."""
    world: WorldConfig = field(default_factory=lambda: WorldConfig(split="heldout"))
    """Of `benchmark.kind: world`: a closed world that is made on the spot, documents and all."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What is searched."""
    without_gold: bool = False
    """Play in the same corpus without the evidence: a question's gold and evidence documents are gone from every ranking and cannot be
    opened. A refusal is then the honest answer."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Who answers."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """How it works."""
    samples: int = 1
    """Attempts at each question."""
    probes: list[str] = field(default_factory=list)
    """Played once per question beside the samples: `closed_book` (nothing can be found), `oracle` (the evidence is all that is found)."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What one question may take."""
    metrics: list[str] = field(default_factory=list)
    """Names in `rewards.metrics.registry.METRICS`; empty: those of the benchmark."""
    tries: int = 3
    """How often a question is begun when infrastructure fails, before it counts as failed. A worker that dies costs a try only the question
    that it played alone; those that shared it are played again in smaller company."""
    deadline_s: float = 3600.0
    """A question that takes longer with all its waiting is ended as a failure of infrastructure."""
    patience: int = 20
    """So many failed questions in a row end the evaluation; what was played stays, and the same command goes on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Of `policy.kind: checkpoint`."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """How it speaks, for `agent.name: policy`."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(model=""))
    """One engine of a checkpoint."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """How many engines."""
    retrieval: BackendConfig = field(default_factory=BackendConfig)
    """The index, or the server."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """How searches are batched and cached."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What an episode may do."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Limits of an episode of `agent.name: policy`; its temperature is `policy.temperature`."""
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(name="outcome"))
    """What is judged."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How many workers, and how many questions each plays at a time (`groups_in_flight`)."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Which Ray."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When an actor counts as stuck."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range, or sections that do not go together."""
        for section in (
            self.policy,
            self.agent,
            self.corpus,
            self.budget,
            self.fleet,
            self.rollout,
            self.watch,
            self.judge,
            self.reward,
        ):
            section.check()
        for name in ("samples", "tries", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.deadline_s > self.budget.seconds:
            raise ValueError(
                f"deadline_s={self.deadline_s:g} ends a question before budget.seconds={self.budget.seconds:g} does; raise it"
            )
        if self.budget.money and self.hosted:
            raise ValueError(
                "budget.money: a checkpoint that speaks token by token costs nothing that is counted; limit budget.tokens instead"
            )
        if self.budget.money and not (self.policy.chat.price_in or self.policy.chat.price_out):
            raise ValueError(
                "budget.money is never spent without prices; give policy.chat.price_in and policy.chat.price_out"
            )
        for probe in self.probes:
            if probe not in PROBES:
                raise ValueError(f"probes: {probe!r} is unknown; one of {', '.join(PROBES)}")
        if self.policy.kind == "chat" and self.agent.name == TOKEN_AGENT:
            raise ValueError(
                "agent.name=policy speaks token by token, which no chat endpoint does; name a chat agent, such as agent.name=react"
            )
        served = self.retrieval.kind in ("remote", "live")
        if self.corpus.source == "server" and not served:
            raise ValueError("corpus.source is server, which needs retrieval.kind=remote or live")
        if self.corpus.source in ("benchmark", "files", "index") and served:
            raise ValueError(
                f"retrieval.kind={self.retrieval.kind} brings a corpus of its own; set corpus.source=server"
            )
        if self.corpus.source == "none" and (self.without_gold or "oracle" in self.probes):
            raise ValueError("corpus.source is none: without_gold and the probe oracle need documents")
        if self.hosted and self.sampling.max_context > self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_context={self.sampling.max_context} is more than the engines take; "
                f"set engine.max_model_len to {self.sampling.max_context} or more"
            )

    @property
    def hosted(self) -> bool:
        """Whether a sampler fleet plays, token by token."""
        return self.policy.kind == "checkpoint" and self.agent.name == TOKEN_AGENT


# ------------------------------------------------------------------------------------------------------ identity

_ALWAYS = ("seed", "without_gold", "benchmark.kind", "benchmark.path", "benchmark.split", "benchmark.corpus", "benchmark.options", "corpus", "policy.kind", "policy.temperature", "agent", "budget", "retrieval", "sandbox")  # fmt: skip
_BY_POLICY = {
    "checkpoint": ("model", "policy.chat.max_tokens", "policy.chat.context_window", "policy.chat.extra_body", "policy.engine_args", "engine.dtype", "engine.max_model_len"),
    "chat": ("policy.chat.base_url", "policy.chat.model", "policy.chat.max_tokens", "policy.chat.context_window", "policy.chat.seeded", "policy.chat.extra_body"),
    "recorded": ("policy.recorded",),
}  # fmt: skip
_BY_TOKENS = ("protocol", "sampling")
_PRICES = ("policy.chat.price_in", "policy.chat.price_cached", "policy.chat.price_out")
_NEVER = ("retrieval.threads", "sandbox.journal", "sandbox.call_timeout_s", "sandbox.retries", "sandbox.retry_wait_s", "sampling.temperature", "model.shape")  # fmt: skip
_OPEN = ("benchmark.options", "corpus.columns", "policy.chat.extra_body", "world.hops")
"""Mappings whose names a user chooses."""
_CONTENTS = {
    "model.weights": "the weights in model.path",
    "model.config": "config.json in model.path",
    "model.tokenizer_files": "the files of the tokenizer",
    "model.chat_template": "the chat template",
}
"""Hashes of files (`cluster.evaluation.plan.contents`), in words."""


def identity(config: EvalConfig) -> dict[str, Any]:
    """Dotted key -> value of all that an answer hangs on, as plain JSON values."""
    from cluster.config import config_dict
    from cluster.rundir import flat

    kept: dict[str, Any] = flat(json.loads(json.dumps(config_dict(config), default=str)))
    kind, agent = str(kept["policy.kind"]), kept["agent.name"]
    wanted = [*_ALWAYS, *_BY_POLICY[kind], *(["world"] if kept["benchmark.kind"] == "world" else [])]
    wanted += _PRICES if kept["budget.money"] else ()
    if kind == "checkpoint":
        wanted += _BY_TOKENS if agent == TOKEN_AGENT else ()
        wanted = [w for w in wanted if not (agent == TOKEN_AGENT and w.startswith(("policy.chat", "policy.engine")))]
    never = (*_NEVER, "agent.settings") if agent == TOKEN_AGENT else _NEVER
    return {k: v for k, v in sorted(kept.items()) if _below(k, wanted) and not _below(k, never)}


def identity_hash(settings: Mapping[str, Any]) -> str:
    """12 hex digits over an identity."""
    return digest(dict(settings))[:12]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two identities, in words.

    A setting that only one of them knows came or went with its version's defaults, save below keys where a user may add any name.
    """
    for key in sorted(before.keys() | now.keys()):
        was, found = before.get(key), now.get(key)
        known = key in before and key in now
        named = _below(key, _OPEN) and {} not in (was, found)  # an empty mapping says no more than none
        if (known or named) and was != found:
            yield f"{key} is {found!r} (was {was!r})" + (f": {_CONTENTS[key]} changed" if key in _CONTENTS else "")


def _below(key: str, names: Any) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
