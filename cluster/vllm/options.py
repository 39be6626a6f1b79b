"""How one sampler engine runs, as plain values. Importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How one sampler engine runs."""

    model: str
    """Folder of a Hugging Face checkpoint, or the name of one in the local cache."""
    dtype: str = "auto"
    """`auto`: float32 on CPU, bfloat16 on GPU."""
    max_model_len: int = 4096
    """Longest sequence in tokens, prompt and answer together."""
    max_num_seqs: int = 64
    """Sequences that run at once; more wait."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step over all sequences; None leaves it to vLLM. On CPU at least `max_model_len`, see `batched_tokens`."""
    kv_cache_gb: float | None = None
    """Memory for keys and values in GiB; None: 0.5 on CPU, what `gpu_memory_utilization` leaves on GPU."""
    block_size: int | None = None
    """Tokens per cache block, the grain of prefix reuse; None: 32 on CPU, vLLM's choice on GPU."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU's memory for this engine. Not used on CPU."""
    tensor_parallel: int = 1
    """Devices that share one copy of the weights."""
    threads: int = 1
    """OpenMP threads of each worker on CPU. Threads of all processes must add up to the cores, no more."""
    enforce_eager: bool = True
    """Run without compilation or graph capture: faster start, slower steps on GPU."""
    seed: int = 0
    """Seed of the engine's own generator, which samples where a request brings no seed."""
    kv_after_update: Literal["recompute", "keep"] = "recompute"
    """`keep` reuses keys and values of older weights after a publish: faster, biased."""
    version: str = "initial"
    """Label of the weights the engine starts with."""
    start_timeout_s: float = 300.0
    """How long the engine may take to come up."""
    log_path: str | None = None
    """File that gets all output of the engine's processes; None: a temporary one, removed after the start."""
    verbose: bool = False
    """Let vLLM talk to the console instead."""


def batched_tokens(config: EngineConfig, on_cpu: bool) -> int | None:
    """`max_num_batched_tokens` as vLLM is told.

    On CPU a prompt is never cut into chunks (vLLM's `enable_chunked_prefill`), and a step must have room for the longest: after a chunk
    vLLM takes back the draw of a request with a seed by the offset of its generator, which generators on CPU do not have, and the
    engine dies (vLLM 0.32, `GPUModelRunner._bookkeeping_sync`).
    """
    given = config.max_num_batched_tokens
    return max(given, config.max_model_len) if on_cpu and given is not None else given
