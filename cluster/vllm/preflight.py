"""What can be known to be wrong before an engine is spawned, as one line each.

A spawned engine fails with a page of traceback in another process. The checks are those of `cluster.preflight`, made again
where the engine starts: it may be another machine, later. They never start anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import preflight as checks
from cluster.errors import UserError
from cluster.machine import free_memory
from cluster.model import ModelShape
from cluster.sizes import CPU_KV_GIB, ENGINE_GIB, GIB, gib, kv_bytes_per_token

if TYPE_CHECKING:
    from cluster.vllm.options import EngineConfig


class EngineError(Exception):
    """An engine's failure in one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        """`missing_model`, `mismatch`, `memory`, `start`, `dead`, `request` or `weights`."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with more than one argument do not survive a process boundary by themselves.
        return (type(self), (self.kind, str(self)))


def check_model(model: str, max_model_len: int) -> Any:
    """Read the checkpoint's configuration; refuse a missing one and one its tokenizer does not fit."""
    from transformers import AutoConfig

    folder = Path(model)
    if folder.is_absolute() or model.startswith((".", "~")) or folder.exists():  # else a name in the local cache
        missing = not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors"))
        try:
            checks.check_model(folder, max_model_len=max_model_len)
            if (folder / "tokenizer.json").is_file():
                checks.check_tokenizer(folder, folder)
        except UserError as error:
            raise EngineError("missing_model" if missing else "mismatch", str(error)) from error
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError("missing_model", f"cannot read the configuration of model {model}: {first}") from error


def check_memory(config: EngineConfig, hf_config: Any, *, on_cpu: bool) -> int | None:
    """Bytes for the key-value cache, or None where the GPU's share decides. Refuses what cannot fit."""
    kv_gib = config.kv_cache_gb
    if kv_gib is None:
        if not on_cpu:
            return None
        kv_gib = CPU_KV_GIB
    per_token = kv_bytes_per_token(config, ModelShape.of(hf_config.to_dict()), on_cpu=on_cpu)
    try:
        checks.check_cache(kv_gib, per_token // config.tensor_parallel, config.max_model_len)
    except UserError as error:
        raise EngineError("memory", str(error)) from error
    if on_cpu:
        weights = gib(sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors")))
        need, free = config.tensor_parallel * (kv_gib + ENGINE_GIB) + weights, gib(free_memory())
        if need > free:
            raise EngineError(
                "memory",
                f"an engine for {config.model} takes about {need:.1f} GiB, {free:.1f} GiB are free; "
                "lower engine.kv_cache_gb or fleet.num_engines",
            )
    return int(kv_gib * GIB)
