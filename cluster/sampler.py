"""One sampler: an actor around a vLLM engine, and its handle as publishing sees it.

Invariants: an actor hosts one engine for its whole life; what an engine's node needs (the policy's folder, another node's weights) is brought
there by its own actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray

from agents.types import Generation, Sampling, Span, Version
from cluster.nodecache import at_hand
from cluster.vllm.engine import EngineConfig, PolicyEngine
from cluster.vllm.relay import Landing, unload
from cluster.vllm.segment import Manifest

_PIECE_S = 60.0
"""How long one piece of a segment may take from another node."""


class Sampler:
    """Hosts one engine. An actor of this class is what a rollout worker samples from."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = PolicyEngine(replace(config, model=at_hand(config.model)))
        self._stack = contextlib.ExitStack()
        self._landing: Landing | None = None

    async def start(self) -> list[int]:
        """Brings the engine up; returns the pids of this actor and of the engine's processes."""
        await self._engine.start()
        return [os.getpid(), *self._engine.pids]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        request_id: str,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
    ) -> Generation:
        """One policy turn. Raises EngineError."""
        began = time.perf_counter()
        made = await self._engine.generate(
            prompt_ids, request_id=request_id, max_tokens=sampling.max_tokens, temperature=sampling.temperature,
            stop_token_ids=stop_token_ids, stop_strings=stop_strings, seed=sampling.seed,
        )  # fmt: skip
        spans = tuple(Span(start, end, Version.parse(label)) for start, end, label in made.version_spans)
        latency_s = time.perf_counter() - began
        return Generation(made.token_ids, made.logprobs, spans, made.finish_reason, made.num_cached_tokens, latency_s)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probability of each token but the first, at temperature 1."""
        return await self._engine.score(token_ids, request_id=f"score-{time.monotonic_ns()}")

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine, and the label of its weights."""
        return {**asdict(await self._engine.stats()), "version": self._engine.version, "dead": self._engine.dead}

    async def gpus(self) -> tuple[str, list[str]]:
        """The node it is on, and the ids of the GPUs that Ray gave it."""
        context = ray.get_runtime_context()
        return context.get_node_id(), list(context.get_accelerator_ids().get("GPU", ()))

    async def checksums(self) -> dict[str, Any]:
        return asdict(await self._engine.checksums())

    async def facts(self) -> dict[str, Any]:
        """What publishing must know of this engine: `publishing.Facts` as a dict, with the node beside the devices."""
        return {"node": ray.get_runtime_context().get_node_id(), **await self._engine.facts()}

    async def land(self, manifest: dict[str, Any], parcel: Sequence[Any]) -> dict[str, Any]:
        """Writes another node's segment to this one's memory, from Ray's object store. Returns its manifest here."""
        return await asyncio.to_thread(self._land, Manifest.from_dict(manifest), parcel)

    def _land(self, manifest: Manifest, parcel: Sequence[Any]) -> dict[str, Any]:
        from cluster.rundir import segment_dir

        if self._landing is None:
            self._landing = Landing(self._stack.enter_context(segment_dir()))
        return self._landing.land(manifest, unload(parcel, _PIECE_S)).to_dict()

    async def call(self, method: str, *args: Any) -> None:
        """The publishing methods of `transfer.EngineClient`."""
        await getattr(self._engine, method)(*args)

    async def shutdown(self) -> None:
        self._stack.close()
        await self._engine.shutdown()


class Client:
    """`transfer.EngineClient` around a sampler actor's handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Any:
        async def forward(*args: Any) -> None:
            await self._handle.call.remote(method, *args)

        return forward
