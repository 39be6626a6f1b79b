"""The parts of a checkpoint that every rank writes for itself, so that none gathers what all hold together.

Weights are gathered one by one, as for a publish, and each rank keeps and writes its turn of the files of a Hugging Face model
directory. The optimiser's state, adapters and a critic are never gathered: `torch.distributed.checkpoint` writes each rank's
shards (as safetensors, so that reading them runs no code) and reads them back onto any number of ranks.

Invariant: what fails on one rank fails on all of them, with the same words, and nobody waits for a rank that gave up.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from agents.learning.agreement import everybody as everybody
from agents.learning.agreement import reason_of, to_the_end, world_size
from agents.learning.agreement import together as together

SHARDS, INDEX = "shards", "model.safetensors.index.json"
FILE_BYTES = 4 << 30
"""Most bytes of one weight file. A rank holds two of them at a time: one being gathered, one being written."""


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    num_bytes: int,
    group: dist.ProcessGroup | None = None,
) -> list[Path]:
    """The files this rank wrote of a model directory's weights. Files are as many as there are ranks, or more.

    `weights`: (name, whole tensor), gathered as it is run through, which all ranks do to its end whatever happens to a disk.
    `num_bytes`: about how much they are, which decides where a file ends.
    """
    rank, world = _rank(group), world_size(group)
    most = min(FILE_BYTES, max(1, -(-num_bytes // world)))
    held: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    written: list[Path] = []
    work: list[Future[None]] = []
    filled, number = 0, 1

    def end_of_file() -> None:
        nonlocal held, filled, number
        if held:
            wait(work[-1:])
            written.append(folder / _file(number))
            work.append(pool.submit(save_file, held, str(written[-1]), {"format": "pt"}))
        held, filled, number = {}, 0, number + 1

    with ThreadPoolExecutor(1) as pool, to_the_end(weights) as given:
        for name, weight in given:
            if (number - 1) % world == rank:
                held[name] = weight.detach().cpu().contiguous()
            index[name] = _file(number)
            filled += weight.numel() * weight.element_size()
            if filled >= most:
                end_of_file()
        if filled:
            end_of_file()
    for done in work:
        done.result()
    if rank == 0:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1), encoding="utf-8")
    return written


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> list[Path]:
    """Every rank's part of the tensors, which all ranks name alike. Returns the files this rank wrote."""
    if not tensors:
        return []
    _calmly(
        dcp.save,
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=group,
    )
    return sorted(folder.glob(f"shard-{_rank(group) + 1:05d}-*"))


def shard_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors by name, from the headers alone. Raises ValueError."""
    if not folder.is_dir():
        return {}
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"the parts in {folder} cannot be read: {reason_of(error)}") from error
    return {name: tuple(about.size) for name, about in found.items()}


def read_shards(folder: Path, like: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The tensors of these names, laid out as those given, which stay as they are. Every rank calls it. Raises ValueError."""
    made = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in like.items()}
    if made:
        try:
            _calmly(dcp.load, made, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group)
        except Exception as error:
            raise ValueError(f"the parts in {folder} cannot be read: {reason_of(error)}") from error
    return made


def whats(names: Sequence[str], owner: str) -> list[str]:
    """What is kept of an owner's parameters: `exp_avg` for a name such as `policy/exp_avg/hf.lm_head.weight`."""
    return sorted({name.split("/")[1] for name in names if name.startswith(f"{owner}/")})


def _calmly(work: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> None:
    """One process is no reason for a warning. What failed is raised as itself: torch's own exception is no `Exception`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            work(tensors, no_dist=not dist.is_initialized(), **options)
        except CheckpointException as error:
            raise _cause(error) from error


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _cause(error: CheckpointException) -> Exception:
    """What torch wraps up with every rank's traceback."""
    inner = next(iter(error.failures.values()), (None, None))[0]
    return inner if isinstance(inner, Exception) else RuntimeError(" ".join(str(error).split())[:300])
