"""LoRA adapters as the published weights: a few megabytes go out instead of all weights, and engines add them as LoRA.

The learner writes an adapter as PEFT lays one out (`adapter_config.json`, `adapter_model.safetensors`) into a folder of its own in
memory; every engine keeps one adapter under one id and replaces it in place while its requests are held, so that requests in
flight go on with the new one.

Invariants:
- A folder appears whole, by one rename, and is never written again; the writer keeps at most `segment.KEEP` of them.
- An engine loads only what was checked, byte by byte, while it still generated; vLLM has read the new adapter before it lets
  go of the old one.
- The engine's base weights are those of the checkpoint the learner started from, and nobody changes them.

No vLLM is imported before an engine asks for it: the learner imports this file too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cluster.vllm.options import LORA_RANKS
from cluster.vllm.segment import KEEP, Manifest, SegmentError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
NAME, ID = "policy", 1
"""The one adapter of an engine. vLLM tells cached prefixes apart by its name and folder: a pause must clear them, as it does."""
ADAPTER = "adapter"
"""`Manifest.kind` of what is written here: `nbytes` is the size of the weights' file, `checksum` is of it and of the settings behind it."""


class AdapterWriter:
    """Writes adapters into a folder, normally in shared memory, and clears the old ones away."""

    def __init__(self, directory: str | Path, settings: Mapping[str, Any], *, prefix: str = "weights") -> None:
        """`settings`: what goes into `adapter_config.json` (`agents.learning.lora.peft_config`)."""
        self._directory = Path(directory)
        self._settings = json.dumps(dict(settings), indent=1).encode()
        self._prefix = prefix
        self._sequence = 0
        self._written: list[Path] = []

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
        """Write one adapter; it is visible to readers once this returns."""
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in named_tensors}
        if not tensors:
            raise SegmentError("no adapters to write: set learner.lora.rank above 0, or learner.lora.publish=merged")
        data = save(tensors, metadata={"format": "pt"})
        path = self._directory / f"{self._prefix}-{os.getpid()}-{self._sequence:06d}.adapter"
        aside = path.with_suffix(".partial")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            (aside / WEIGHTS).write_bytes(data)
            (aside / SETTINGS).write_bytes(self._settings)
            aside.rename(path)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise SegmentError(f"cannot write adapters to {path}: {error.strerror}") from error
        self._sequence += 1
        self._written.append(path)
        self._clear(KEEP)
        return Manifest(str(path), len(data), _digest(data, self._settings), len(tensors), ADAPTER)

    def close(self) -> None:
        """Remove what this writer wrote. An engine has a copy of what it loaded."""
        self._clear(0)

    def _clear(self, keep: int) -> None:
        while len(self._written) > keep:
            shutil.rmtree(self._written.pop(0), ignore_errors=True)


def verify_adapter(manifest: Manifest) -> None:
    """Raises SegmentError, one line, when the folder does not hold what its writer wrote."""
    folder = Path(manifest.path)
    try:
        data, settings = (folder / WEIGHTS).read_bytes(), (folder / SETTINGS).read_bytes()
    except OSError as error:
        raise SegmentError(f"cannot read adapters at {folder}: {error.strerror}") from error
    if len(data) != manifest.nbytes:
        raise SegmentError(f"{folder / WEIGHTS} holds {len(data)} bytes, its manifest says {manifest.nbytes}")
    if (found := _digest(data, settings)) != manifest.checksum:
        raise SegmentError(f"checksum of {folder} is {found[:12]}..., its manifest says {manifest.checksum[:12]}...")


def adapter_options(rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter of that rank; none for rank 0. Raises SegmentError for a rank beyond vLLM's.

    `targets`: the layers that have room for one. It must not be all: vLLM 0.32 on CPU fails at log-probabilities of a prompt where the
    output matrix has room for an adapter.
    """
    if rank == 0:
        return {}
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        raise SegmentError(
            f"learner.lora.rank={rank} is more than engines take ({LORA_RANKS[-1]}): set learner.lora.publish=merged"
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": room,
        "lora_target_modules": list(targets),
    }


def adapter_request(manifest: Manifest) -> Any:
    """The LoRARequest that loads this adapter in place of the one before it, and by which requests ask for it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, ID, manifest.path, load_inplace=True)


def use_request(manifest: Manifest) -> Any:
    """The LoRARequest of a generation: the adapter that is loaded, whatever is published meanwhile."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, ID, manifest.path)


async def load_adapter(llm: Any, manifest: Manifest) -> Any:
    """Brings a checked adapter into a running AsyncLLM whose requests are held. Returns what its generations must be given.

    Raises what vLLM raises when it refuses the adapter; the engine then still has the one before it.
    """
    await llm.add_lora(adapter_request(manifest))
    return use_request(manifest)


def _digest(data: bytes, settings: bytes) -> str:
    return hashlib.sha256(data + settings).hexdigest()
