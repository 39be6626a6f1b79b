"""One vLLM engine as the sampler uses it: token ids in, token ids with log-probabilities out.

Plain asyncio; an actor wraps it. vLLM is imported by `start`, so importing this file is cheap and the calm
environment is set before vLLM reads it.

Invariants:
- Nothing is tokenised here. Sampled ids come back exactly as sampled, the stop token included.
- Log-probabilities are those of the distribution that was sampled from: after temperature, never truncated.
- Every sampled token carries the label of the weights that sampled it (vLLM reports it per step).
- With `kv_after_update="recompute"` no key or value computed by older weights is ever read again: a pause clears
  the prefix cache and the running requests recompute theirs when the engine resumes.
- The engine's processes die with the process that started it (`worker.py` watches), and every failure is one
  `EngineError` of one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from cluster.vllm.adapters import ADAPTER, load_adapter, use_request, verify_adapter
from cluster.vllm.buckets import from_wire
from cluster.vllm.expected import expected_layout, optional_names
from cluster.vllm.ideal import IdealCache
from cluster.vllm.launch import (
    build,
    child_environment,
    environment,
    hush,
    on_cpu,
    one_line,
    output_to,
    prepare_calm,
    root_cause,
)
from cluster.vllm.options import EngineConfig
from cluster.vllm.preflight import EngineError, check_memory, check_model
from cluster.vllm.residence import Residence, Stay, TurnError
from cluster.vllm.results import Checksums, EngineStats, Generation
from cluster.vllm.segment import Manifest, SegmentError, SegmentReader, check_layout, dtype_name

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["Checksums", "EngineConfig", "EngineError", "EngineStats", "Generation", "PolicyEngine"]

T = TypeVar("T")

_DEAD_POLL_S = 0.1
_SHUTDOWN_GRACE_S = 5.0


class PolicyEngine:
    """A running engine. Create, `await start()`, use from one event loop, `await shutdown()`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.version = config.version
        self.pids: tuple[int, ...] = ()
        self._llm: AsyncLLM | None = None
        self._vocab_size = 0
        self._max_model_len = config.max_model_len
        self._log: Path | None = None
        self._said: IO[str] | None = None
        """What the engine's processes write, from its start on; the file itself is gone."""
        self._cause = ""
        self._tokenizer: Any = None
        self._init_info: dict[str, Any] | None = None
        self._coming: Manifest | None = None
        self._adapter: Manifest | None = None
        """Of the adapter that is sampled by; None: the checkpoint alone."""
        self._paused = False
        self._residence = Residence()
        self._in_flight = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._cacheable_tokens = 0
        self._sampled_tokens = 0
        self._ideal = IdealCache(config.block_size or 1)

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the engine up. Blocks the event loop for some seconds: environment and output are redirected
        for the processes being spawned, which must not touch anything that runs meanwhile."""
        prepare_calm(self.config)
        cpu = on_cpu()
        hf_config = check_model(self.config.model, self.config.max_model_len)
        kv_bytes = check_memory(self.config, hf_config, on_cpu=cpu)
        self._vocab_size = hf_config.get_text_config().vocab_size
        self._log = self._open_log()
        try:
            with environment(child_environment(self.config, cpu)), output_to(self._log):
                self._llm = build(self.config, cpu, kv_bytes)
        except Exception as error:
            cause = root_cause(self._log) or one_line(error)
            self._remove_log()
            kind = "memory" if "memory" in cause.lower() else "start"
            raise EngineError(kind, f"engine for {self.config.model} did not start: {cause}") from error
        hush(self.config)
        # A temporary log serves to find the cause of a death; an owner that is killed must not leave it.
        if self._log is not None:
            self._said = self._log.open(errors="replace")
            self._said.seek(0, os.SEEK_END)
        self._remove_log()
        try:
            # The first call into the running engine; it also starts vLLM's output loop on this event loop.
            await self.set_version(self.config.version)
            self._ideal = IdealCache(self._llm.vllm_config.cache_config.block_size)
            self.pids = tuple(sorted({pid for pids in await self._rpc("gumshoe_pids") for pid in pids}))
            await self._warm_up()
        except EngineError:
            await self.shutdown()
            raise

    async def shutdown(self) -> None:
        """End the engine's processes. Safe to call twice, and on an engine that died."""
        llm, self._llm = self._llm, None
        if self._said is not None:
            self._cause = self._cause or root_cause(self._said) or ""
            self._said.close()
        if llm is not None:
            with contextlib.suppress(Exception):
                llm.shutdown()
            await asyncio.to_thread(_await_end, self.pids)

    @property
    def dead(self) -> bool:
        """Whether the engine was started and its processes are gone."""
        return self._llm is not None and self._llm.errored

    # -- sampling --------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        request_id: str,
        max_tokens: int,
        temperature: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generation:
        """Sample until a stop token, a text or a limit. Cancelling this call aborts the request.

        With `stop_strings` sampling ends soon after one of them stands in the text: some tokens behind it may have been sampled too,
        and are returned.

        The end-of-sequence token stops only if it is among `stop_token_ids`. Temperature 0 is greedy, and then
        log-probabilities are those at temperature 1.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_prompt(prompt_ids, room=1)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if stop_strings else RequestOutputKind.FINAL_ONLY,
        )
        text = _Tail(self._text(), stop_strings) if stop_strings else None
        token_ids: list[int] = []
        logprobs: list[Any] = []

        def more(output: Any) -> bool:
            token_ids.extend(output.token_ids)
            logprobs.extend(output.logprobs or ())
            return text is not None and text.ended(token_ids)

        possible = self._ideal.begin(request_id, prompt_ids)
        try:
            final = await self._finish(prompt_ids, params, request_id, more)
        finally:
            self._ideal.end(request_id, token_ids)
        output = final.outputs[0]
        if len(logprobs) != len(token_ids):
            raise EngineError("request", f"{len(token_ids)} tokens came with {len(logprobs)} log-probabilities")
        self._sampled_tokens += len(token_ids)
        self._prompt_tokens += len(prompt_ids)
        self._cached_tokens += final.num_cached_tokens or 0
        # A request that had to wait may find more than was there as it came.
        self._cacheable_tokens += max(possible, final.num_cached_tokens or 0)
        return Generation(
            token_ids=tuple(token_ids),
            logprobs=tuple(entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True)),
            version_spans=_spans(output.weight_versions, len(token_ids)),
            finish_reason="stop" if text is not None and text.found else output.finish_reason or "abort",
            num_cached_tokens=final.num_cached_tokens or 0,
        )

    async def score(self, token_ids: Sequence[int], *, request_id: str) -> tuple[float, ...]:
        """Log-probability of each token but the first given its prefix, at temperature 1.

        The prefix cache is not read, so the whole sequence is computed by the weights of now.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_prompt(token_ids, room=1)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._finish(token_ids, params, request_id)
        entries = final.prompt_logprobs or ()
        if len(entries) != len(token_ids):
            raise EngineError("request", f"{len(token_ids)} tokens came with {len(entries)} prompt log-probabilities")
        pairs = list(zip(token_ids, entries, strict=True))[1:]
        return tuple(float(entry[token].logprob) for token, entry in pairs)

    # -- publishing: the methods of `transfer.EngineClient` ---------------------------------------------------

    async def pause(self) -> None:
        """Hold all requests where they are; new ones queue. Returns when the device is idle."""
        if not self._residence.awake:
            return  # it holds them already
        clear = self.config.kv_after_update == "recompute"
        self._paused = True
        # Not `pause_generation`: it adds a sleep of 20 ms to every pause for callers who watch the stream of outputs.
        await self._guard(self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=clear))
        if clear:
            self._ideal.forget()

    async def resume(self) -> None:
        """Go on with held and queued requests; after a sleep, once `wake` says that it is the samplers' turn."""
        if not self._may_resume():
            return
        await self._guard(self._engine.resume_generation())
        self._paused = False

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Meet the trainer's transport. Does nothing if that was done with the same information, nor for adapters, which are files."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = dict(init_info)
        if self._init_info == info or self.config.lora_rank:
            return
        self._init_info = None
        await self._guard(self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))
        self._init_info = info

    async def stage_weights(self, update_info: Mapping[str, Any]) -> None:
        """Check what is about to be loaded while the engine still generates, in this process."""
        if "manifest" in update_info:
            await asyncio.to_thread(_verify, Manifest.from_dict(update_info["manifest"]), bool(self.config.lora_rank))
        if "layout" in update_info:
            self._check_layout(update_info["layout"])

    async def start_weight_update(self) -> None:
        if self.config.lora_rank:
            return
        if self._residence.stay is Stay.ASLEEP:
            await self._guard(self._engine.wake_up(["weights"]))
            self._residence.mapped()
        await self._guard(self._engine.start_weight_update())

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self.config.lora_rank:
            self._coming = Manifest.from_dict(update_info["manifest"])
            return
        await self._guard(self._engine.update_weights(WeightTransferUpdateRequest(update_info=dict(update_info))))

    async def finish_weight_update(self) -> None:
        if self.config.lora_rank:
            await self._take_adapter()
            return
        await self._guard(self._engine.finish_weight_update())
        self._residence.loaded()

    async def abort_weight_update(self) -> None:
        """Forget a started update whose weights were not applied."""
        if self.config.lora_rank:
            self._coming = None
            return
        await self._rpc("gumshoe_abort_update")

    async def set_version(self, label: str) -> None:
        """Label all tokens sampled from now on. Call it only while paused or idle."""
        await self._guard(self._engine.update_weight_version(label))
        self.version = label

    async def facts(self) -> dict[str, Any]:
        """What a collective must know of this engine: its workers' GPUs (none on CPU), their number, and the type of its
        weights."""
        devices = await self._rpc("gumshoe_device")
        dtype = dtype_name(self._engine.model_config.dtype)
        return {"devices": [d for d in devices if d], "num_workers": len(devices), "dtype": dtype}

    # -- turns on a shared device (`residence`) ----------------------------------------------------------------

    async def sleep(self) -> None:
        """Give the device's memory back, weights and cache. Requests are held and new ones queue until `wake`; those that ran
        recompute their cache then, whatever `kv_after_update` says."""
        if self._residence.stay is Stay.ASLEEP:
            return
        self._paused = True
        await self._guard(self._engine.sleep(level=2, mode="keep"))
        self._residence.slept()
        self._ideal.forget()

    async def wake(self) -> None:
        """Take the memory for the cache, and go on with all requests. Refused unless weights were loaded since the sleep."""
        if self._may_resume():
            return  # it never slept
        # vLLM resumes by itself once all memory is there.
        if not await self._guard(self._engine.wake_up(["kv_cache"])):
            raise EngineError("memory", "the engine woke up without all of its memory")
        self._residence.woke()
        self._paused = False

    def _may_resume(self) -> bool:
        try:
            return self._residence.check_resume()
        except TurnError as error:
            raise EngineError("weights", str(error)) from error

    # -- inspection ------------------------------------------------------------------------------------------

    async def checksums(self) -> Checksums:
        """What this engine runs on, in three statements of different strength.

        `received` equals the trainer's `Manifest.checksum` exactly if the last segment that was completely loaded is
        the one the trainer wrote; its bytes were hashed when it was staged. Of adapters it is that of the adapter. After a collective it is the `StreamDigest`
        of what was loaded, which the trainer computes too. `live` hashes the parameters vLLM
        still holds as tensors. On CPU the linear layers are packed into a kernel's own format and have no tensor
        any more, so `live` then covers embeddings and norms only (`live_bytes` says how much). It can be compared
        with another engine of the same kind and after a republish of the same weights, never with the trainer's
        digest. That every layer computes with the new weights is shown by `score` against the trainer's forward.
        """
        if self._residence.stay is Stay.ASLEEP:
            raise EngineError("weights", "the engine sleeps and holds no weights")
        per_worker = await self._rpc("gumshoe_checksums")
        received = {entry["received"] for entry in per_worker}
        if len(received) > 1:
            raise EngineError("weights", f"workers of one engine hold different weights: {sorted(map(str, received))}")
        return Checksums(
            version=self.version,
            received=self._adapter.checksum if self._adapter is not None else received.pop(),
            live="+".join(entry["live"] for entry in per_worker),
            live_bytes=sum(entry["live_bytes"] for entry in per_worker),
        )

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if running requests still hold blocks, and then nothing was cleared."""
        cleared = bool(await self._guard(self._engine.reset_prefix_cache()))
        if cleared:
            self._ideal.forget()
        return cleared

    async def stats(self) -> EngineStats:
        return EngineStats(
            in_flight=self._in_flight,
            waiting=max(0, self._in_flight - self.config.max_num_seqs),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            cacheable_tokens=self._cacheable_tokens,
            sampled_tokens=self._sampled_tokens,
            paused=self._paused,
        )

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _engine(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineError("dead", "the engine is not running")
        return self._llm

    async def _warm_up(self) -> None:
        """Let kernels and lazy imports settle (seconds, on a cold machine), so that no request pays for it."""
        await self.score((0, 0), request_id="warm-up-score")
        await self.generate((0,), request_id="warm-up", max_tokens=2)
        await self.reset_prefix_cache()
        self._prompt_tokens = self._cached_tokens = self._cacheable_tokens = self._sampled_tokens = 0

    async def _take_adapter(self) -> None:
        """The adapter that was staged, in place of the one before; vLLM has read it whole before it lets go of that one."""
        coming, self._coming = self._coming, None
        if coming is None:
            raise EngineError("weights", "no adapter was received")
        await self._guard(load_adapter(self._engine, coming))
        self._adapter = coming

    def _text(self) -> Any:
        """The model's tokenizer, loaded when a protocol that ends on text first asks."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.config.model)
        return self._tokenizer

    async def _finish(
        self, prompt_ids: Sequence[int], params: Any, request_id: str, more: Callable[[Any], bool] = lambda _: False
    ) -> Any:
        """The last output. `more` is shown every output, and ends the request by returning True."""
        self._in_flight += 1
        try:
            final, ended = None, False
            outputs: AsyncIterator[Any] = self._engine.generate(
                {"prompt_token_ids": list(prompt_ids)}, params, request_id,
                lora_request=None if self._adapter is None else use_request(self._adapter),
            )  # fmt: skip
            async for output in outputs:
                final = output
                if more(output.outputs[0]) and not ended and not output.finished:
                    ended = True
                    await self._engine.abort(request_id)  # one more output comes, with what was sampled by then
        except Exception as error:
            raise self._translate(error, "request") from error
        finally:
            self._in_flight -= 1
        if final is None:
            raise EngineError("request", f"request {request_id} ended without output")
        return final

    def _check_prompt(self, token_ids: Sequence[int], room: int) -> None:
        if not token_ids:
            raise EngineError("request", "an empty prompt cannot be sampled from")
        if len(token_ids) + room > self._max_model_len:
            raise EngineError(
                "request", f"{len(token_ids)} prompt tokens leave no room in max_model_len={self._max_model_len}"
            )
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise EngineError("request", f"a token id lies outside the vocabulary of {self._vocab_size}")

    def _check_layout(self, fields: Mapping[str, Any]) -> None:
        model = self._engine.model_config
        try:
            wanted = expected_layout(model.model, model.dtype)
            check_layout(from_wire(fields), wanted, optional=optional_names(model.hf_config))
        except SegmentError as error:
            raise EngineError("weights", str(error)) from error

    async def _rpc(self, method: str) -> list[Any]:
        return list(await self._guard(self._engine.collective_rpc(method)))

    async def _guard(self, call: Awaitable[T]) -> T:
        """Await a call into the engine, but not longer than the engine lives: vLLM leaves some calls pending
        for ever when its process was killed."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_DEAD_POLL_S))[0]:
                if self.dead:
                    raise self._death()
            return task.result()
        except EngineError:
            raise
        except Exception as error:
            raise self._translate(error, "weights") from error
        finally:
            task.cancel()

    def _translate(self, error: Exception, kind: str) -> EngineError:
        if isinstance(error, EngineError):
            return error
        if self.dead or type(error).__name__ == "EngineDeadError":
            return self._death()
        return EngineError(kind, one_line(error))

    def _death(self) -> EngineError:
        """With the exception that the engine wrote before it died; one that was killed wrote none."""
        if self._said is not None and not self._cause:
            self._cause = root_cause(self._said) or ""
        return EngineError("dead", "the engine's process has died" + (f": {self._cause}" if self._cause else ""))

    def _open_log(self) -> Path | None:
        if self.config.verbose:
            return None
        if self.config.log_path is not None:
            path = Path(self.config.log_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            return path
        handle, name = tempfile.mkstemp(prefix="gumshoe-engine-", suffix=".log")
        os.close(handle)
        return Path(name)

    def _remove_log(self) -> None:
        if self._log is not None and self.config.log_path is None:
            self._log.unlink(missing_ok=True)
        self._log = None


def _await_end(pids: Sequence[int]) -> None:
    """vLLM's shutdown may return before its processes did; whoever is left after a grace is killed."""
    import psutil

    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    for process in psutil.wait_procs(processes, timeout=_SHUTDOWN_GRACE_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _verify(manifest: Manifest, adapters: bool) -> None:
    """`adapters`: whether the engine was started for adapters alone."""
    try:
        if adapters != (manifest.kind == ADAPTER):
            raise SegmentError(
                f"{manifest.kind} was published to an engine that takes {ADAPTER if adapters else 'weights'}"
            )
        if adapters:
            verify_adapter(manifest)
            return
        reader = SegmentReader(manifest)
        try:
            reader.verify_checksum()
        finally:
            reader.close()
    except SegmentError as error:
        raise EngineError("weights", str(error)) from error


class _Tail:
    """Whether one of some texts stands in what was sampled. Only the end is decoded anew."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._reach = max(len(text.encode()) for text in texts) + 8
        """Tokens that surely hold the longest text, however it is cut: one per byte, and some that hold its ends."""
        self._seen = 0
        self.found = False

    def ended(self, token_ids: Sequence[int]) -> bool:
        tail = list(token_ids[max(0, self._seen - self._reach) :])
        self._seen = len(token_ids)
        decoded = self._tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.found = self.found or any(text in decoded for text in self._texts)
        return self.found


def _spans(spans: Any, num_tokens: int) -> tuple[tuple[int, int, str], ...]:
    found = tuple((span.start, span.end, span.version) for span in spans or () if span.end > span.start)
    covered = sum(end - start for start, end, _ in found)
    if covered != num_tokens:
        raise EngineError("request", f"version spans cover {covered} of {num_tokens} sampled tokens")
    return found
