"""Bringing a vLLM engine up: its arguments, the environment of its processes, and calm.

Invariants:
- What the spawned processes need is in the environment only while they are spawned.
- Nothing vLLM or its C++ libraries write reaches the console, unless asked; the root cause of a failed start is
  read from what they wrote.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.vllm.options import EngineConfig, batched_tokens

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_ROOT = Path(__file__).resolve().parents[2]
_CALM = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set, unless the user set them, before vLLM is first imported in a process."""


def prepare_calm(config: EngineConfig) -> None:
    """Set what vLLM reads when it is first imported. Call it before."""
    for name, value in _CALM.items():
        if not (config.verbose and name == "VLLM_LOGGING_LEVEL"):
            os.environ.setdefault(name, value)


def hush(config: EngineConfig) -> None:
    """Keep vLLM's traceback of a dying engine off the console of this process: callers get an `EngineError`.

    Whoever set a level below ERROR wants to hear vLLM, and does. Call it after the build, which sets the loggers up.
    """
    if not config.verbose and os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "ERROR":
        logging.getLogger("vllm").setLevel(logging.CRITICAL)


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def build(config: EngineConfig, on_cpu: bool, kv_bytes: int | None) -> AsyncLLM:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    options: dict[str, Any] = {}
    if (tokens := batched_tokens(config, on_cpu)) is not None:
        options["max_num_batched_tokens"] = tokens
    if on_cpu:
        options["enable_chunked_prefill"] = False
    block_size = config.block_size or (32 if on_cpu else None)
    if block_size is not None:
        options["block_size"] = block_size
    if kv_bytes is not None:
        options["kv_cache_memory_bytes"] = kv_bytes
    if not on_cpu:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
    args = AsyncEngineArgs(
        model=config.model,
        dtype=dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel,
        enforce_eager=config.enforce_eager,
        seed=config.seed,
        enable_prefix_caching=True,
        # Ids in, ids out: the tokenizer belongs to the protocol, not to the engine.
        skip_tokenizer_init=True,
        # "auto" would take top-p, top-k and temperature from the checkpoint's generation_config.json.
        generation_config="vllm",
        # The default is "raw": before temperature.
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        worker_extension_cls="cluster.vllm.worker.WorkerExtension",
        weight_transfer_config={"backend": "gumshoe_shm"},  # worker.BACKEND; importing it here would load the worker
        **options,
    )
    return AsyncLLM.from_engine_args(args)


def child_environment(config: EngineConfig, on_cpu: bool) -> dict[str, str]:
    """What the spawned processes need; not left behind in this one."""
    path = os.environ.get("PYTHONPATH")
    env = {
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *([path] if path else [])]),
        "GUMSHOE_ENGINE_OWNER_PID": str(os.getpid()),
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.start_timeout_s)),
    }
    if on_cpu:
        env |= {
            "OMP_NUM_THREADS": str(config.threads),
            # Spinning threads of several processes on few cores cost a factor of eight.
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if config.tensor_parallel == 1:
            # On CPU vLLM would put the one worker into a process of its own below the engine core, to set its
            # threads. They are set above; one process less is less memory and a shorter step.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def output_to(path: Path | None) -> Iterator[None]:
    """Send stdout and stderr, those of spawned processes and C++ libraries included, to a file."""
    if path is None:
        yield
        return
    saved = [os.dup(1), os.dup(2)]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        for target, source in zip((1, 2), saved, strict=True):
            os.dup2(source, target)
            os.close(source)
        os.close(log)


_CAUSE = re.compile(r"\b(\w+(?:Error|Exception)): (.+)$")


def root_cause(log: Path | None) -> str | None:
    """The first named exception in the engine's own output that is not merely its echo."""
    if log is None:
        return None
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            match = _CAUSE.search(line)
            if match and "initialization failed" not in match.group(2):
                return match.group(2).strip()
    return None


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # vLLM's wrapping of an exception from another process.
    return re.sub(r"^Call to \w+ method failed: ", "", text)
