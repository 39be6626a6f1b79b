"""What can be known to be wrong before an engine is spawned, as one line each.

A spawned engine fails with a page of traceback in another process; these checks read two JSON files and the
machine's free memory first. They never start anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.vllm.segment import SegmentError, file_layout

if TYPE_CHECKING:
    from cluster.vllm.engine import EngineConfig

_GIB = 1 << 30
_ENGINE_BYTES = 800 << 20
"""What an engine process holds besides weights and cache: torch, vLLM and their buffers (measured, rounded up)."""


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
    looks_local = folder.is_absolute() or model.startswith((".", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise EngineError("missing_model", f"model folder {model} {what}")
    if looks_local and not any(folder.glob("*.safetensors")):
        raise EngineError("missing_model", f"model folder {model} holds no .safetensors weights")
    for file in sorted(folder.glob("*.safetensors")) if looks_local else ():
        try:
            file_layout(file)
        except SegmentError as error:
            raise EngineError("mismatch", f"corrupt checkpoint: {error}") from error
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError("missing_model", f"cannot read the configuration of model {model}: {first}") from error
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and max_model_len > limit:
        raise EngineError(
            "mismatch", f"max_model_len={max_model_len} is more than the {limit} positions of model {model}"
        )
    top = _largest_token_id(folder / "tokenizer.json")
    if top is not None and top >= text.vocab_size:
        raise EngineError(
            "mismatch",
            f"the tokenizer of {model} goes up to id {top}, its model has a vocabulary of {text.vocab_size}",
        )
    return config


def check_memory(config: EngineConfig, hf_config: Any, *, on_cpu: bool) -> int | None:
    """Bytes for the key-value cache, or None where the GPU's share decides. Refuses what cannot fit."""
    gib = config.kv_cache_gb
    if gib is None:
        if not on_cpu:
            return None
        gib = 0.5
    kv_bytes = int(gib * _GIB)
    text = hf_config.get_text_config()
    itemsize = 4 if config.dtype == "float32" or (config.dtype == "auto" and on_cpu) else 2
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_dim * itemsize
    needed = per_token * config.max_model_len // config.tensor_parallel
    if kv_bytes < needed:
        raise EngineError(
            "memory",
            f"kv_cache_gb={gib:g} cannot hold one sequence of max_model_len={config.max_model_len}: "
            f"that takes {needed / _GIB:.3g} GiB",
        )
    if on_cpu:
        import psutil

        weights = sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors"))
        total = config.tensor_parallel * (kv_bytes + _ENGINE_BYTES) + weights
        free = psutil.virtual_memory().available
        if total > free:
            raise EngineError(
                "memory",
                f"an engine for {config.model} takes about {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free; "
                "lower kv_cache_gb or the number of engines",
            )
    return kv_bytes


def _largest_token_id(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [entry["id"] for entry in content.get("added_tokens") or ()]
        return max(ids, default=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError("mismatch", f"{path} is not a readable tokenizer: {error}") from error
