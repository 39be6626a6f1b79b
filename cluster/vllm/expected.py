"""Which weights an engine takes: those of the checkpoint it was started from, whatever a trainer says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.vllm.segment import SegmentError, TensorSpec, dtype_name, file_layout

TIED_NAME = "lm_head.weight"


def expected_layout(model: str, engine_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names and shapes of the checkpoint's safetensors; floating types become the engine's own type."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SegmentError(f"{folder} holds no .safetensors file, so published weights cannot be checked")
    layout: dict[str, TensorSpec] = {}
    wanted = dtype_name(engine_dtype)
    for file in files:
        for name, spec in file_layout(file).items():
            floating = spec.dtype.startswith(("F", "BF"))
            layout[name] = TensorSpec(wanted if floating else spec.dtype, spec.shape)
    return layout


def optional_names(hf_config: Any) -> frozenset[str]:
    """A model with tied embeddings may or may not carry its output matrix a second time."""
    return frozenset({TIED_NAME}) if getattr(hf_config, "tie_word_embeddings", False) else frozenset()
