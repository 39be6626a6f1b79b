"""What judge engines, query encoders and index shards hold on a GPU, part by part, in GiB; or why that is not known.

Invariants: read are a `config.json`, sizes of weight files and an index's manifest, where they lie at hand, and nothing else; estimates
are rounded up; what cannot be counted says why, and nobody guesses that it fits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.memory import ENGINE_TOKENS, PROCESS_GIB
from cluster.model import ModelShape, read_json, resolve
from cluster.sizes import gib
from retrieval.errors import RetrievalError
from retrieval.faiss_config import estimate
from retrieval.manifest import Manifest

if TYPE_CHECKING:
    from cluster.schema import RunConfig

VLLM_SHARE = 0.92
"""Of a GPU that `vllm serve` takes where nothing is said: vLLM's `gpu_memory_utilization`."""
ENCODER_TOKENS = 16384
"""Of one pass of an encoder on a GPU (`retrieval.encode_hf`)."""
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
"""As vLLM reads them: small ones are decimal."""


@dataclass(frozen=True)
class Held:
    """What one tenant holds on one GPU."""

    parts: dict[str, float] = field(default_factory=dict)
    unknown: str = ""
    """Why that is not known; empty where it is."""

    @property
    def gib(self) -> float:
        return sum(self.parts.values())


def held_by(config: RunConfig, kind: str, gpu_gib: float) -> Held:
    """By a `judge`, `encoder` or `shard` on a GPU of `gpu_gib`."""
    return {"judge": judge_held, "encoder": encoder_held, "shard": shard_held}[kind](config, gpu_gib)


def judge_held(config: RunConfig, gpu_gib: float) -> Held:
    """An engine of `judge.kind: vllm`: its share of the GPU, or with `--kv-cache-memory-bytes` its weights, a step and that."""
    arguments = config.judge.engine_args
    needed, cache = judge_needs(config), option(arguments, "--kv-cache-memory-bytes")
    if cache is not None:
        if needed is None:
            return Held(unknown=f"the sizes of judge.model {config.judge.model} are not known here")
        return Held({"judge's weights and step": needed, "judge's KV cache": gib(_number(cache))})
    share = judge_share(arguments) * gpu_gib
    if needed is None:
        return Held({"judge's share": share})
    return Held({"judge's weights and step": needed, "judge's KV cache": max(0.0, share - needed)})


def judge_needs(config: RunConfig) -> float | None:
    """GiB of a judge on each of its GPUs before it has a cache: weights in 16 bits, room for a step, the process. None: not known."""
    shape = _shape(config.judge.model)
    if shape is None:
        return None
    devices = int(option(config.judge.engine_args, "--tensor-parallel-size", "-tp") or 1)
    step = 2 * ENGINE_TOKENS * (4 * shape.hidden + (2 * (shape.query + 2 * shape.key) + 3 * shape.inner) / devices)
    return gib(2 * shape.num_parameters / devices + step) + PROCESS_GIB


def judge_share(arguments: Sequence[str]) -> float:
    """Of each of its GPUs that a judge's engine takes."""
    return float(option(arguments, "--gpu-memory-utilization") or VLLM_SHARE)


def encoder_held(config: RunConfig, gpu_gib: float) -> Held:
    """A query encoder: a model in 16 bits and one pass; only `encoder.kind: hf` puts anything on a GPU."""
    encoder = config.retrieval.encoder
    if encoder.kind != "hf" or encoder.device == "cpu":
        return Held()
    try:
        settings = read_json(resolve(encoder.model) / "config.json", "the configuration of the encoder")
    except UserError:
        return Held(unknown=f"the model of retrieval.encoder.model={encoder.model} is not at hand")
    files = sum(file.stat().st_size for file in resolve(encoder.model).glob("*.safetensors"))
    stored = (
        2 if str(settings.get("dtype") or settings.get("torch_dtype") or "float32") in ("float16", "bfloat16") else 4
    )
    word = 4 if encoder.dtype == "float32" else 2
    width, inner = int(settings.get("hidden_size", 0)), int(settings.get("intermediate_size", 0))
    tokens = encoder.batch_tokens or ENCODER_TOKENS
    # In a layer: the stream, its norm, queries, keys, values, their outcome and a copy; the widened, and what becomes of it.
    a_pass = word * tokens * (8 * width + 3 * inner)
    return Held({"encoder's weights": gib(files * word / stored), "encoder's pass": gib(a_pass) + PROCESS_GIB})


def shard_held(config: RunConfig, gpu_gib: float) -> Held:
    """A shard of a FAISS index, cut over the GPUs that its process sees. One on the CPU asks for GPUs and takes nothing of them."""
    faiss, source = config.retrieval.faiss, config.world
    if faiss.device != "gpu":
        return Held()
    folder = source.jsonl.index if source.kind == "jsonl" else ""
    if not folder:
        return Held(unknown="the index is not built yet; build it by `gumshoe index` and name it (world.jsonl.index)")
    try:
        manifest = Manifest.read(resolve(folder))
        rows = max(run.rows for run in manifest.legs["faiss"].shards)
        whole = estimate(faiss, rows, int((manifest.encoder or {})["dim"])).gpu_bytes
    except (RetrievalError, KeyError, ValueError) as error:
        return Held(unknown=f"the index {folder} cannot be read: {' '.join(str(error).split())[:120]}")
    return Held(
        {"shard's index": gib(whole) / max(1.0, config.service.topology.shard_gpus), "shard's process": PROCESS_GIB}
    )


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of the last such option among arguments, as `--name value` or `--name=value`; None where it is not given."""
    found = None
    for i, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name.replace("_", "-") in names:
            found = value if given else arguments[i + 1] if i + 1 < len(arguments) else None
    return found


def _number(text: str) -> float:
    """A number of bytes as vLLM reads it: `8589934592`, `8G`, `25.6g`."""
    match = re.fullmatch(r"([0-9.]+)\s*([kKmMgGtT]?)", text.strip())
    return float(match[1]) * _SUFFIXES.get(match[2], 1) if match else 0.0


def _shape(model: str) -> ModelShape | None:
    """Of a model folder that is at hand."""
    folder = resolve(model) if model else Path()
    try:
        return ModelShape.of(read_json(folder / "config.json", "the configuration of a model")) if model else None
    except UserError:
        return None
