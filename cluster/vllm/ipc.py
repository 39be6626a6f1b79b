"""CUDA IPC handles as plain values, so that they travel through any serialiser and nothing is unpickled.

torch describes a shared GPU tensor by the arguments of its `rebuild_cuda_tensor`. Of those of a packed buffer three are
always the same (plain tensor, typed storage, bytes); the rest are numbers and byte strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_CONSTANT: dict[int, Any] = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}
"""By position in the arguments."""
_SIZES = (1, 2)
"""Positions of shape and stride."""


def export(buffer: torch.Tensor) -> tuple[str, list[Any]]:
    """(id of its GPU, handle) of a buffer of bytes that processes beside this one may map. Each call is an export of its own, which torch
    wants mapped and let go of exactly once."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(buffer)
    return str(torch.cuda.get_device_properties(buffer.device).uuid), to_plain(arguments)


def to_plain(arguments: Sequence[Any]) -> list[Any]:
    """What `torch.multiprocessing.reductions.reduce_tensor` said of a packed buffer. Raises ValueError for anything else."""
    plain: list[Any] = []
    for position, value in enumerate(arguments):
        if position in _CONSTANT:
            if value is not _CONSTANT[position]:
                raise ValueError(f"a CUDA IPC handle of {value} is not one of a packed buffer of bytes")
            plain.append(None)
        elif position in _SIZES:
            plain.append([int(size) for size in value])
        elif value is None or isinstance(value, (bool, int, bytes)):
            plain.append(value)
        else:
            raise ValueError(f"a CUDA IPC handle with a {type(value).__name__} at {position} is of an unknown torch")
    return plain


def from_plain(fields: Sequence[Any]) -> tuple[Any, ...]:
    """Inverse of `to_plain`."""
    values = list(fields)
    for position, constant in _CONSTANT.items():
        values[position] = constant
    for position in _SIZES:
        values[position] = torch.Size(values[position]) if position == 1 else tuple(values[position])
    return tuple(values)
