"""Rollout workers: they lease tasks, play episodes against sampler and sandbox, have them scored, and deliver groups.

Invariants:
- A worker holds no state that matters: if it dies, its leases are leased again.
- Every wait on another actor has a deadline, and `pulse` names the longest one under way.
- A dead or fenced sampler costs a retry on another engine, never the episode: the token ids so far are the state.
- Infrastructure trouble ends a lease with a reason; it never becomes a reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from agents.interfaces import Speech
from agents.sampling import full, steps
from agents.sampling.config import SamplingConfig
from agents.sampling.full import session_of
from agents.types import (
    BackendInfo,
    Ending,
    Episode,
    Generation,
    Group,
    Identity,
    Member,
    Role,
    Sampling,
    StopReason,
    Task,
    Turn,
    Uid,
    Verdict,
)
from cluster.buffer import Lease
from cluster.errors import one_line
from cluster.replicas import RouterClient
from cluster.stopwatch import shown_s, standing, turn_back
from cluster.vllm.preflight import EngineError
from cluster.watchdog import Pulse, Waits, pulse_of
from envs.config import SandboxConfig
from envs.journal import ReplayMiss
from envs.session import Sessions


@dataclass
class RolloutConfig:
    """How episodes are played."""

    workers: int = 1
    """Rollout worker actors."""
    groups_in_flight: int = 16
    """Most leases one worker works on at a time."""
    generate_retries: int = 3
    """How often a policy turn is asked again after its engine failed."""
    generate_timeout_s: float = 600.0
    """Deadline of one policy turn; what engines sleep meanwhile, while a learner has their GPU, is added."""
    score_timeout_s: float = 2000.0
    """Deadline of scoring one group. It holds all judgements that wait for one another (CaRR: up to 6), each of `judge.deadline_s`."""
    search_timeout_s: float = 120.0
    """Deadline of one call to the retrieval actor, its restart included."""
    max_restarts: int = 20
    """Replacements of dead rollout workers within an hour before the run stops."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("workers", "groups_in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}; it must be at least 1")


class PolicyFailed(RuntimeError):
    """No engine gave a policy turn, after all retries."""


class RemotePolicy:
    """`interfaces.Policy` over the sampler fleet."""

    takes_stop_strings = True

    def __init__(self, fleet: Any, config: RolloutConfig, worker: str, waits: Waits | None = None) -> None:
        self._fleet = fleet
        self._config = config
        self._worker = worker
        self._waits = waits or Waits()
        self._routes: dict[str, tuple[str, Any]] = {}
        self._serial = 0

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        session: str,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
    ) -> Generation:
        """One policy turn, on the session's engine or, if that failed, on the next."""
        error: BaseException | None = None
        for _ in range(self._config.generate_retries + 1):
            begun_s = shown_s()
            with standing():
                name, handle = await self._route(session)
            self._serial += 1
            request = f"{session}#{os.getpid()}-{self._serial}"
            asked = handle.generate.remote(
                list(prompt_ids), request, sampling, list(stop_token_ids), list(stop_strings)
            )
            try:
                with self._waits(f"a policy turn of {session} from {name}"):
                    return await self._answer(asked)
            except asyncio.CancelledError:
                ray.cancel(asked)  # nobody wants it any more: the engine need not finish it
                raise
            except TimeoutError:
                ray.cancel(asked)
                # Slow is not dead: the fleet's own health check judges the engine.
                raise PolicyFailed(f"no policy turn within {self._config.generate_timeout_s:g} s") from None
            except ray.exceptions.RayError as failure:
                error = getattr(failure, "cause", None) or failure
                if isinstance(error, EngineError) and error.kind == "request":
                    break  # the engine is well; it cannot do this request, and no other could
                self._routes.pop(session, None)
                await self._fleet.report.remote(name, one_line(error))
                turn_back(begun_s)
        raise PolicyFailed(f"a policy turn of {session} failed: {one_line(error) if error else 'no engine'}")

    async def _answer(self, asked: Any) -> Generation:
        """A turn within `generate_timeout_s`, of which the time that engines slept for a learner does not count. Raises TimeoutError."""
        limit_s, began = self._config.generate_timeout_s, time.time()
        answer, left_s = asyncio.ensure_future(asked), limit_s
        try:
            while not (await asyncio.wait({answer}, timeout=left_s))[0]:
                slept_s = 0.0
                with contextlib.suppress(ray.exceptions.RayError):
                    slept_s = await self._fleet.slept_s.remote(began)
                left_s = limit_s + slept_s - (time.time() - began)
                if left_s <= 0:
                    raise TimeoutError
            return answer.result()
        finally:
            answer.cancel()

    async def _route(self, session: str) -> tuple[str, Any]:
        if session not in self._routes:
            try:
                with self._waits("the fleet, for an engine"):
                    async with asyncio.timeout(self._config.generate_timeout_s):
                        self._routes[session] = await self._fleet.route.remote(
                            session, self._worker, self._config.generate_timeout_s
                        )
            except TimeoutError:
                raise PolicyFailed(f"no engine within {self._config.generate_timeout_s:g} s") from None
            except ray.exceptions.RayError as failure:
                raise PolicyFailed(one_line(failure)) from failure
        return self._routes[session]

    async def release(self, session: str) -> None:
        """The session is over. A fleet that does not listen within the deadline forgets it by itself when the worker ends."""
        self._routes.pop(session, None)
        with contextlib.suppress(TimeoutError), self._waits("the fleet, to release an engine"):
            async with asyncio.timeout(self._config.generate_timeout_s):
                await self._fleet.release.remote(session)


@dataclass(frozen=True)
class Play:
    """Everything a worker needs to play an episode, in one value that crosses processes."""

    run_id: str
    speech: Any
    """() -> Speech: built once per worker, since tokenizers do not travel well."""
    sampling: SamplingConfig
    sandbox: SandboxConfig
    rollout: RolloutConfig
    seed: int = 0
    """Of the choices of the sampler `steps`."""


class RolloutWorker:
    """Plays leases until it is told to stop."""

    def __init__(self, name: str, play: Play, fleet: Any, retrieval: Any, info: BackendInfo, reward: Any) -> None:
        self._name = name
        self._play = play
        self._speech: Speech = play.speech()
        self._waits = Waits()
        self._policy = RemotePolicy(fleet, play.rollout, name, self._waits)
        self._backend = RouterClient(retrieval, info, play.rollout.search_timeout_s, self._waits)
        self._reward = reward
        self._sessions = Sessions(play.sandbox, name=name)
        self._buffer: Any = None
        self._stop = False
        self._broken = ""
        self._jobs: dict[asyncio.Task[None], Lease] = {}

    async def ready(self) -> int:
        """Its pid, once it can work."""
        return os.getpid()

    async def pulse(self) -> Pulse:
        """For the watchdog: what it has waited for the longest, and since when."""
        if self._broken:
            raise RuntimeError(f"its loop ended: {self._broken}")
        return pulse_of(*self._waits.oldest())

    async def run(self, buffer: Any) -> None:
        """Leases from `buffer` and plays until `stop`. One coroutine per lease, at most `groups_in_flight` of them."""
        try:
            await self._work(buffer)
        except Exception as error:
            self._broken = one_line(error) or type(error).__name__  # told by the next pulse
            raise

    async def _work(self, buffer: Any) -> None:
        self._buffer = buffer
        room = asyncio.Semaphore(self._play.rollout.groups_in_flight)
        while not self._stop:
            await room.acquire()
            with self._waits("the buffer, for a lease"):
                lease = await self._buffer.lease.remote(self._name, 2.0)
            if lease is None:
                room.release()
                continue
            job = asyncio.create_task(self._serve(lease))
            self._jobs[job] = lease
            job.add_done_callback(functools.partial(self._done, room))
        await self._end(list(self._jobs))

    async def fence(self, incarnation: int) -> int:
        """A learner of that incarnation has begun: work for earlier ones is worth nothing and ends. Returns how much."""
        old = [job for job, lease in self._jobs.items() if lease.incarnation < incarnation]
        await self._end(old)
        return len(old)

    def _done(self, room: asyncio.Semaphore, job: asyncio.Task[None]) -> None:
        self._jobs.pop(job, None)
        room.release()

    async def _end(self, jobs: Sequence[asyncio.Task[None]]) -> None:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    async def stop(self) -> None:
        self._stop = True

    async def evaluate(
        self, tasks: Sequence[Task], attempts: int, temperature: float, group: str, sampler: str = "full"
    ) -> list[Group]:
        """Plays tasks outside the ledger, scored like training. Order of `tasks` is kept."""
        room = asyncio.Semaphore(self._play.rollout.groups_in_flight * 4)

        async def one(task: Task) -> Group:
            async with room:
                return await self._group(task, group, attempts, temperature, sampler)

        return list(await asyncio.gather(*(one(task) for task in tasks)))

    # ------------------------------------------------------------------------------------------------- inside

    async def _serve(self, lease: Lease) -> None:
        try:
            group = await self._group(lease.task, lease.id, lease.episodes, None, self._play.sampling.sampler)
            with self._waits(f"the buffer, to take {lease.id}"):
                await self._buffer.put.remote(lease.id, [group])
        except asyncio.CancelledError:
            raise
        except ReplayMiss as error:
            await self._buffer.stop.remote(one_line(error))  # a run from a journal that lacks an answer is not that run
        except Exception as error:
            await self._buffer.event.remote(f"lease {lease.id} failed: {one_line(error)}")
            await self._buffer.fail.remote(lease.id, "rollout_failed")

    async def _group(self, task: Task, group_id: str, episodes: int, temperature: float | None, sampler: str) -> Group:
        """All episodes of a lease, scored: as a whole, and before that step by step where the sampler is `steps`."""
        began = time.perf_counter()
        played = await asyncio.gather(
            *(self._episode(task, group_id, i, temperature, sampler) for i in range(episodes))
        )
        members = tuple(Member(t) for episode, _ in played for t in episode.trajectories())
        known = sorted({k for e, _ in played for k in e.seconds})
        seconds = {k: sum(e.seconds.get(k, 0.0) for e, _ in played) for k in known}
        judged_s = seconds.pop("judge", 0.0) / max(1, episodes)  # episodes run side by side
        stepped = tuple(group for _, groups in played for group in groups)
        group = Group(group_id, task, members, {**seconds, "rollout": time.perf_counter() - began - judged_s}, stepped)
        began = time.perf_counter()
        verdicts = await self._score(replace(group, steps=()))
        group = group.with_verdicts([steps.lost(m, v, stepped) for m, v in zip(members, verdicts, strict=True)])
        return replace(group, seconds={**group.seconds, "judge": judged_s + time.perf_counter() - began})

    async def _episode(
        self, task: Task, group_id: str, attempt: int, temperature: float | None, sampler: str
    ) -> tuple[Episode, tuple[Group, ...]]:
        play, speech = self._play, self._speech
        warmth = play.sampling.temperature if temperature is None else temperature
        identity = Identity(
            play.run_id,
            Uid(task.id, group_id, attempt),
            speech.name,
            speech.tokenizer_fingerprint,
            speech.template_fingerprint,
            Sampling(temperature=warmth, max_tokens=play.sampling.max_turn_tokens),
        )
        counted = play.sandbox.max_observation_tokens or play.sandbox.snippet_tokens
        count = speech.count_tokens if counted else None
        sandbox = self._sessions.session_for(task, identity, self._backend, count)
        try:
            if sampler == "steps":
                return await steps.collect(
                    task, identity, self._policy, sandbox, speech, play.sampling, self._score, play.seed
                )
            return await full.collect(task, identity, self._policy, sandbox, speech, play.sampling), ()
        except PolicyFailed as error:
            opening = Turn.given(0, -1, Role.prompt, speech.prompt(task))
            # What it had, judged steps included, is lost with it.
            return Episode(identity, (opening,), (Ending(0, StopReason.env_failed, str(error)),)), ()
        finally:
            await sandbox.close()
            await self._policy.release(session_of(identity))

    async def _score(self, group: Group) -> list[Verdict]:
        """A reward that is gone or silent masks the group; an error inside it is a bug and fails the lease by name."""
        scoring = self._reward.score.remote(group)
        try:
            with self._waits(f"the reward, about group {group.id}"):
                async with asyncio.timeout(self._play.rollout.score_timeout_s):
                    return await scoring
        except asyncio.CancelledError:
            ray.cancel(scoring)  # nobody wants it any more: no further judgement need begin
            raise
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                ray.cancel(scoring)
            return [Verdict.unavailable("reward", f"reward_actor:{type(error).__name__}")] * len(group.members)
