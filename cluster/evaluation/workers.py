"""Playing units: one question, one sample, one trajectory, with whatever its agent needs around it.

Invariants:
- An agent that ends badly is played (`done`); infrastructure that failed is `failed`, with what is known of why. Nothing else is raised.
- A worker holds no state that matters; a unit that died with its worker is played again from its beginning.
- What is hidden from a question (`without_gold`, the probes) is hidden below the sandbox, so rankings close up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agents.chat.base import BudgetSpent, ChatAgent, ChatAgentConfig
from agents.chat.registry import AGENTS
from agents.interfaces import Backend, Chat, ChatFailed, Policy, Sandbox, Speech
from agents.sampling.config import SamplingConfig
from agents.sampling.full import Rollout, finish, session_of
from agents.text import words
from agents.types import (
    BackendInfo,
    Document,
    Ending,
    Episode,
    Hit,
    Identity,
    Query,
    Role,
    Sampling,
    StopReason,
    Task,
    ToolCall,
    ToolEvent,
    Turn,
    Uid,
    Usage,
)
from cluster.errors import one_line
from cluster.evaluation.budget import BudgetedChat, BudgetedPolicy, BudgetedSandbox, Purse
from cluster.evaluation.config import BudgetConfig, ChatConfig
from cluster.evaluation.records import Played, State, Unit
from cluster.rollout import PolicyFailed, RemotePolicy, RolloutConfig
from cluster.watchdog import Pulse, Waits, pulse_of
from envs.config import SandboxConfig
from envs.journal import digest
from envs.parallel_world import ParallelWorld, facts_of
from envs.session import Sessions


@dataclass(frozen=True)
class Kit:
    """Everything a worker needs, in one value that crosses processes."""

    run_id: str
    agent: str
    settings: ChatAgentConfig
    temperature: float
    seed: int
    budget: BudgetConfig
    deadline_s: float
    sandbox: SandboxConfig
    rollout: RolloutConfig
    sampling: SamplingConfig
    chat: ChatConfig
    speech: Callable[[], Speech] | None = None
    """Of the agent `policy`: built once per worker, since tokenizers do not travel well."""
    parallel: bool = False
    """Search the facts of each question by Mind-ParaWorld's engine."""
    without_gold: bool = False
    clients: int = 1
    """How many workers share the endpoint."""
    start_s: float = 900.0
    """How long engines may take to come up, the first time or again."""


class Player:
    """Plays units in one event loop. Knows no processes: `policy`, `chat` and `backend` may be anything of their Protocols."""

    def __init__(
        self,
        kit: Kit,
        backend: Backend | None,
        *,
        policy: Policy | None = None,
        chat_of: Callable[[str, int], Chat] | None = None,
        name: str = "worker",
    ) -> None:
        """`backend`: None where nothing can be searched. `chat_of(session, seed)`: the endpoint of one question."""
        self._kit, self._backend, self._policy, self._chat_of = kit, backend, policy, chat_of
        self._speech = kit.speech() if kit.speech else None
        self._sessions = Sessions(kit.sandbox, name=name)

    async def play(self, task: Task, unit: Unit, probe: str = "") -> Played:
        """The unit, played once. Never raises but for cancellation."""
        began = time.monotonic()
        trajectory, error, seconds = None, "", dict[str, float]()
        limit = asyncio.timeout(self._kit.deadline_s)
        try:
            async with limit:
                episode = await self._episode(task, unit, probe)
            trajectory = next(episode.trajectories())
            seconds = dict(episode.seconds)
            if trajectory.stop.infrastructure:
                error = trajectory.error or str(trajectory.stop)
        except (ChatFailed, PolicyFailed) as failure:
            error = str(failure)
        except TimeoutError:
            error = ""  # told below, or a bug
            if not limit.expired():
                error = "TimeoutError"
        except Exception as failure:
            error = f"{type(failure).__name__}: {one_line(failure)[:300]}"
        if limit.expired():
            error = f"no end within deadline_s={self._kit.deadline_s:g}"
        seconds["unit"] = time.monotonic() - began
        return Played(unit, State.failed if error else State.done, trajectory, error, seconds, probe=probe)

    def close(self) -> None:
        self._sessions.close()

    # ---------------------------------------------------------------------------------------------------- inside

    async def _episode(self, task: Task, unit: Unit, probe: str) -> Episode:
        kit, speech = self._kit, self._speech
        seed = seed_of(kit.seed, unit, probe)
        most = kit.sampling.max_turn_tokens if speech else kit.settings.max_reply_tokens or kit.chat.max_tokens
        sampling = Sampling(temperature=kit.temperature, max_tokens=most, seed=seed)
        uid = Uid(task.id, probe or "eval", unit.sample)
        purse = Purse(kit.budget)
        backend = await self._corpus_of(task, probe)
        if speech is not None:
            if self._policy is None:
                raise ValueError("the agent `policy` needs an engine")
            identity = Identity(
                kit.run_id, uid, speech.name, speech.tokenizer_fingerprint, speech.template_fingerprint, sampling
            )
        else:
            identity = Identity(kit.run_id, uid, f"chat:{kit.agent}", "", "", sampling)
        session = session_of(identity)
        counted = (kit.sandbox.max_observation_tokens or kit.sandbox.snippet_tokens) and speech
        sandbox: Sandbox = BudgetedSandbox(
            self._sessions.session_for(task, identity, backend, speech.count_tokens if speech and counted else None)
            if backend is not None
            else NoTools(),
            purse,
        )
        try:
            if speech is not None and self._policy is not None:
                policy = BudgetedPolicy(self._policy, purse)
                return told(await self._by_tokens(task, identity, policy, sandbox, speech), policy.usages, speech)
            if self._chat_of is None:
                raise ValueError(f"the agent {kit.agent!r} needs a chat endpoint")
            chat = BudgetedChat(
                self._chat_of(session, seed), purse, kit.chat.max_tokens, kit.chat.context_window, kit.chat.timeout_s
            )
            return await agent_of(kit.agent, probe)(task, identity, chat, sandbox, self._settings())
        finally:
            await sandbox.close()
            if isinstance(self._policy, RemotePolicy):
                await self._policy.release(session)

    async def _by_tokens(
        self, task: Task, identity: Identity, policy: Policy, sandbox: Sandbox, speech: Speech
    ) -> Episode:
        config, limit = self._kit.sampling, self._kit.budget.context_tokens
        if limit:
            config = replace(config, max_context=min(config.max_context, limit))
        rollout, began = Rollout(task, identity, policy, sandbox, speech, config), time.monotonic()
        try:
            return await finish(rollout)
        except BudgetSpent as spent:
            ending = Ending(rollout.leaf, StopReason.budget, str(spent))
            seconds = {**rollout.seconds, "total": time.monotonic() - began}
            return Episode(identity, tuple(rollout.turns), (ending,), tuple(rollout.events), seconds)

    def _settings(self) -> ChatAgentConfig:
        limits = (self._kit.settings.max_context, self._kit.budget.context_tokens, self._kit.chat.context_window)
        return replace(self._kit.settings, max_context=min(n for n in limits if n))

    async def _corpus_of(self, task: Task, probe: str) -> Backend | None:
        """The backend as this question may see it."""
        whole: Backend | None = ParallelWorld(facts_of(task)) if self._kit.parallel else self._backend
        if whole is None or probe == "closed_book":
            return None
        if probe == "oracle":
            ids = evidence_of(task)
            found = await whole.get(ids) if ids else []
            return Given([document for document in found if document is not None], whole.info())
        hidden = {*evidence_of(task), *task.gold_docs} if self._kit.without_gold else set()
        return Without(whole, hidden) if hidden else whole


def agent_of(name: str, probe: str) -> ChatAgent:
    """The agent that plays a question: a probe has its own where there is one, which asks for no tools it does not have."""
    return AGENTS[probe] if probe in AGENTS else AGENTS[name]


def evidence_of(task: Task) -> tuple[str, ...]:
    """Documents that hold the evidence of a question."""
    found = task.meta.get("evidence_docs")
    return tuple(map(str, found)) if found else task.gold_docs


def seed_of(seed: int, unit: Unit, probe: str) -> int:
    """A question's own seed: the same whenever it is played, another for every sample."""
    return int(digest([seed, unit.task, unit.sample, probe])[:7], 16)


def told(episode: Episode, usages: Sequence[Usage], speech: Speech) -> Episode:
    """A token episode with each turn's text beside its tokens, and of policy turns what they took."""
    left = iter(usages)
    turns: list[Turn] = []
    for turn in episode.turns:
        usage = next(left, None) if turn.role is Role.policy else None
        turns.append(replace(turn, text=speech.decode(turn.token_ids.tolist()), usage=usage))
    return replace(episode, turns=tuple(turns))


class NoTools:
    """`agents.interfaces.Sandbox` of a closed book."""

    async def call(self, call: ToolCall) -> ToolEvent:
        return ToolEvent(
            call, "Error: there is nothing to search or read; answer from what you know.", error="not_found"
        )

    async def close(self) -> None:
        """Nothing is open."""


class Without:
    """A backend in which some documents do not exist. What ranks below them moves up."""

    def __init__(self, backend: Backend, hidden: Collection[str]) -> None:
        self._backend, self._hidden = backend, frozenset(hidden)

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        more = [replace(query, k=query.k + len(self._hidden)) for query in queries]
        found = await self._backend.search(more)
        return [
            [hit for hit in hits if hit.doc_id not in self._hidden][: query.k]
            for query, hits in zip(queries, found, strict=True)
        ]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        found = await self._backend.get([i for i in ids if i not in self._hidden])
        left = iter(found)
        return [None if i in self._hidden else next(left) for i in ids]

    def info(self) -> BackendInfo:
        return self._backend.info()

    async def close(self) -> None:
        """The backend is shared and stays open."""


class Given:
    """A backend of a few documents, all of which every search finds: those with most of its words first."""

    def __init__(self, documents: Sequence[Document], info: BackendInfo) -> None:
        self._documents = {document.id: document for document in documents}
        self._words = {d.id: set(words(f"{d.title} {d.text}")) for d in documents}
        self._info = replace(info, name=f"evidence of {info.name}", num_docs=len(documents))

    async def search(self, queries: Sequence[Query]) -> list[list[Hit]]:
        return [self._ranked(query) for query in queries]

    async def get(self, ids: Sequence[str]) -> list[Document | None]:
        return [self._documents.get(i) for i in ids]

    def info(self) -> BackendInfo:
        return self._info

    async def close(self) -> None:
        """Nothing is open."""

    def _ranked(self, query: Query) -> list[Hit]:
        wanted = set(words(query.text))
        hits = [Hit(i, float(len(wanted & found))) for i, found in self._words.items()]
        return sorted(hits, key=lambda hit: (-hit.score, hit.doc_id))[: query.k]


class EvalWorker:
    """A player as a Ray actor."""

    def __init__(
        self,
        name: str,
        kit: Kit,
        fleet: Any,
        engines: Sequence[Any],
        retrieval: Any,
        info: BackendInfo | None,
        turns: Any = None,
    ) -> None:
        """`fleet`: of samplers, for the agent `policy`; `engines`: of hosted chat endpoints, with `turns` where several workers share them;
        `retrieval`: None for a closed book."""
        from cluster.evaluation.engines import Shared, limits_of
        from cluster.replicas import RouterClient

        self._waits, self._kit = Waits(), kit
        backend = RouterClient(retrieval, info, kit.rollout.search_timeout_s, self._waits) if info is not None else None
        policy = RemotePolicy(fleet, kit.rollout, name, self._waits) if fleet is not None else None
        self._endpoint: Any = None
        self._engines, self._shared = engines, None
        if engines:
            limits = limits_of(kit.chat, len(engines), kit.clients)
            self._shared = Shared(limits, kit.start_s, kit.chat.retries, name, turns)
        self._player = Player(kit, backend, policy=policy, chat_of=self._chat_of, name=name)

    async def ready(self) -> int:
        """Its pid, once it can work."""
        return os.getpid()

    async def pulse(self) -> Pulse:
        """For the watchdog: what it has waited for the longest, and since when."""
        return pulse_of(*self._waits.oldest())

    async def play(self, task: Task, unit: Unit, probe: str) -> Played:
        return await self._player.play(task, unit, probe)

    async def stats(self) -> dict[str, float]:
        """Counters of the endpoint."""
        return self._endpoint.stats() if self._endpoint is not None else {}

    def _chat_of(self, session: str, seed: int) -> Chat:
        from cluster.evaluation.chat import ChatEndpoint
        from cluster.evaluation.engines import EngineChat

        if self._shared is not None:
            return EngineChat(self._engines, session, seed, self._waits, self._shared)
        if self._endpoint is None:
            self._endpoint = ChatEndpoint(self._kit.chat, self._kit.temperature, self._kit.clients)
        return SeededChat(self._endpoint, seed, self._waits, session)


class SeededChat:
    """An endpoint's chat of one question."""

    def __init__(self, endpoint: Any, seed: int, waits: Waits, session: str) -> None:
        self._endpoint, self._seed, self._waits, self._session = endpoint, seed, waits, session

    async def reply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        with self._waits(f"the endpoint, about {self._session}"):
            return await self._endpoint.reply(messages, **options, seed=self._seed)
