"""A `PolicyEngine` without vLLM: the policy itself, a token at a time, with log-probabilities as exact as the learner's.

One request at a time, so that a pause waits for the one under way and each is of one version.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.vllm.options import EngineConfig
from cluster.vllm.preflight import EngineError
from cluster.vllm.results import Checksums, EngineStats, Generation
from cluster.vllm.segment import Manifest, SegmentError, SegmentReader


class TinyEngine:
    """See `cluster.vllm.engine.PolicyEngine`, of which this has what a sampler calls."""

    dead = False

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.version, self.pids = config, config.version, ()
        self._one = asyncio.Lock()
        self._received: str | None = None
        self._coming: Manifest | None = None
        self._sampled = self._prompted = self._in_flight = 0

    async def start(self) -> None:
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(self.config.seed)
        self._model = AutoModelForCausalLM.from_pretrained(self.config.model, dtype=torch.float32).eval()

    async def generate(
        self, prompt_ids: Sequence[int], *, request_id: str, max_tokens: int, temperature: float = 1.0,
        stop_token_ids: Sequence[int] = (), stop_strings: Sequence[str] = (), seed: int | None = None,
    ) -> Generation:  # fmt: skip
        over = threading.Event()
        self._in_flight += 1
        try:
            async with self._one:
                most = min(max_tokens, self.config.max_model_len - len(prompt_ids))
                tokens, logprobs = await asyncio.to_thread(
                    self._sample, list(prompt_ids), most, temperature, set(stop_token_ids), over
                )
        finally:
            over.set()
            self._in_flight -= 1
        self._sampled += len(tokens)
        self._prompted += len(prompt_ids)
        reason = "stop" if tokens[-1] in stop_token_ids else "length"
        return Generation(tuple(tokens), tuple(logprobs), ((0, len(tokens), self.version),), reason, 0)

    def _sample(
        self, prompt: list[int], most: int, temperature: float, stop: set[int], over: threading.Event
    ) -> tuple[list[int], list[float]]:
        import torch

        tokens, logprobs, cache = list[int](), list[float](), None
        with torch.inference_mode():
            while len(tokens) < most and not over.is_set() and not (tokens and tokens[-1] in stop):
                out = self._model(
                    torch.tensor([[tokens[-1]] if tokens else prompt]), past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                chances_V = torch.log_softmax(out.logits[0, -1] / (temperature or 1.0), dim=-1)
                token = int(torch.multinomial(chances_V.exp(), 1)) if temperature else int(chances_V.argmax())
                tokens.append(token)
                logprobs.append(float(chances_V[token]))
        return tokens, logprobs

    async def pause(self) -> None:
        await self._one.acquire()

    async def resume(self) -> None:
        if self._one.locked():
            self._one.release()

    async def stage_weights(self, info: Mapping[str, Any]) -> None:
        try:
            reader = SegmentReader(Manifest.from_dict(info["manifest"]))
            await asyncio.to_thread(reader.verify_checksum)
        except SegmentError as error:
            raise EngineError("weights", str(error)) from error
        reader.close()

    async def update_weights(self, info: Mapping[str, Any]) -> None:
        self._coming = Manifest.from_dict(info["manifest"])

    async def finish_weight_update(self) -> None:
        assert self._coming is not None
        await asyncio.to_thread(self._take, self._coming)
        self._received = self._coming.checksum

    def _take(self, manifest: Manifest) -> None:
        import torch

        reader, named = SegmentReader(manifest), dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in reader.tensors():
                if name in named:  # of tied ones there is only the first
                    named[name].copy_(tensor)
        reader.close()

    async def set_version(self, label: str) -> None:
        self.version = label

    async def checksums(self) -> Checksums:
        return Checksums(self.version, self._received, "", 0)

    async def facts(self) -> dict[str, Any]:
        return {"devices": [], "num_workers": 1, "dtype": "F32"}

    async def stats(self) -> EngineStats:
        return EngineStats(self._in_flight, 0, self._prompted, 0, 0, self._sampled, False)

    async def _nothing(self, *_: Any) -> None:
        pass

    init_weight_transfer = start_weight_update = abort_weight_update = wake = shutdown = _nothing
