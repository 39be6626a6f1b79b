"""Weights as a model directory names them, and as the model holds them.

transformers stacks the experts of a layer, with gate and up projection end to end; checkpoints, and the engines that read
them, have one matrix each. Invariants: `unstack` and `Stacked` are each other's inverse; nothing is read before it is asked
for, and then no more than the block that was asked for, so that a rank which holds a part of a weight reads that part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from agents.learning.agreement import whole

_EXPERT = re.compile(r"(?P<stem>.*\.experts\.)(?P<index>\d+)\.(?P<kind>gate|up|down)_proj\.weight$")


class Stacked(Mapping[str, Tensor]):
    """Weights by their names in a checkpoint (tensors, or slices of an open file), as the model holds them.

    Experts are stacked when they are asked for, so that one layer of them is in memory at a time.
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        experts: dict[str, dict[int, dict[str, Any]]] = {}
        self._parts: dict[str, Any] = {}
        """A weight, or for each expert its matrices from top to bottom"""
        for name, weight in weights.items():
            match = _EXPERT.match(name)
            if match:
                experts.setdefault(match["stem"], {}).setdefault(int(match["index"]), {})[match["kind"]] = weight
            else:
                self._parts[name] = weight
        for stem, found in experts.items():
            ordered = [found[i] for i in sorted(found)]
            self._parts[f"{stem}gate_up_proj"] = [[e["gate"], e["up"]] for e in ordered]
            self._parts[f"{stem}down_proj"] = [[e["down"]] for e in ordered]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without reading it."""
        parts = self._parts[name]
        if not isinstance(parts, list):
            return _shape(parts)
        first = [_shape(p) for p in parts[0]]
        return (len(parts), sum(rows for rows, *_ in first), *first[0][1:])

    def block(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a weight that begins at `offset`; only the files' bytes of that part are read."""
        parts = self._parts[name]
        if 0 in shape:  # a rank beyond the last row; files refuse to be asked for nothing
            return torch.empty(tuple(shape))
        if not isinstance(parts, list):
            return _block(parts, offset, shape)
        chosen = []
        for matrices in parts[offset[0] : offset[0] + shape[0]]:
            rows, top = [], 0
            for matrix in matrices:
                height = _shape(matrix)[0]
                start, stop = max(offset[1] - top, 0), min(offset[1] + shape[1] - top, height)
                if start < stop:
                    rows.append(_block(matrix, (start, *offset[2:]), (stop - start, *shape[2:])))
                top += height
            chosen.append(torch.cat(rows))
        return torch.stack(chosen)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.block(name, (0,) * len(shape), shape)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def open_weights(folder: str | Path, stack: ExitStack, prefix: str = "") -> Stacked:
    """All weights in the safetensors files of a model directory, mapped; `stack` closes them. `prefix` goes before each name."""
    found: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        opened = stack.enter_context(safe_open(str(file), framework="pt"))
        found.update({f"{prefix}{name}": opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
    return Stacked(found)


def unstack(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter by its names in a checkpoint."""
    stem, kind = name.rpartition(".")[::2]
    if not stem.endswith(".experts") or kind not in ("gate_up_proj", "down_proj"):
        yield name, weight
        return
    for index, expert in enumerate(weight):
        if kind == "down_proj":
            yield f"{stem}.{index}.down_proj.weight", expert
            continue
        gate, up = expert.chunk(2)
        yield f"{stem}.{index}.gate_proj.weight", gate
        yield f"{stem}.{index}.up_proj.weight", up


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; gathers a shard (a collective). Raises GatherError, on every rank."""
    tensor = tensor.detach()
    return whole(tensor) if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached; writing to it writes to the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, shape) of what this rank holds, in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, Tensor) else tuple(weight.get_shape())


def _block(weight: Any, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    if not shape:
        return weight if isinstance(weight, Tensor) else torch.as_tensor(weight[...])
    if isinstance(weight, DTensor):
        return weight.to_local()  # laid out as the parameter that asks
    found: Tensor = weight[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    return found
