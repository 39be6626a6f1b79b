"""Buckets: named weights cut into pieces of bounded size, as one byte tensor each, and a digest of the whole stream.

Both sides of a collective cut by the same rule from the same layout, so that they agree without a word.

Invariants:
- A bucket holds at most the asked number of bytes; a tensor that is larger travels alone, whole.
- Every weight begins where its element type may begin. A `dense` bucket ends where that would take a gap.
- Weights keep their order, and every one lies in exactly one bucket.
- `StreamDigest` depends on names, types, shapes and every byte in its place, and not on where the buckets were cut or on
  which device it was computed.

No vLLM here: the learner imports this file too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.vllm.segment import Layout, SegmentError, TensorSpec, dtype_name, torch_dtype

_ALIGN = 16
"""Bytes: every tensor starts where any element type may start."""
_WORDS = 1 << 20
"""8-byte words that are folded at once: what bounds the memory of a digest."""


@dataclass(frozen=True)
class Bucket:
    """Some weights in order, and where each begins in the payload."""

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """In bytes."""
    nbytes: int
    """Of the payload, padding included."""


def cut(layout: Layout, bucket_bytes: int, *, dense: bool = False) -> list[Bucket]:
    """The buckets of these weights. `dense`: without gaps in them, as vLLM reads a packed buffer."""
    buckets: list[Bucket] = []
    names: list[str] = []
    offsets: list[int] = []
    end = 0

    def close() -> None:
        nonlocal end
        if names:
            buckets.append(Bucket(tuple(names), tuple(layout[n] for n in names), tuple(offsets), end))
        names.clear()
        offsets.clear()
        end = 0

    for name, spec in layout.items():
        begin = end if dense else -(-end // _ALIGN) * _ALIGN
        gap = dense and begin % torch_dtype(spec.dtype).itemsize
        if names and (gap or begin + spec.nbytes > bucket_bytes):
            close()
            begin = 0
        names.append(name)
        offsets.append(begin)
        end = begin + spec.nbytes
    close()
    return buckets


def largest(buckets: Iterable[Bucket]) -> int:
    """Bytes of the largest payload: the buffer that any of them fits into."""
    return max((bucket.nbytes for bucket in buckets), default=0)


def pack(bucket: Bucket, weights: Iterator[tuple[str, torch.Tensor]], into: torch.Tensor | None = None) -> torch.Tensor:
    """The payload (uint8) of a bucket, from the next weights: the beginning of `into`, or on the CPU. Raises SegmentError where they
    differ from the layout."""
    payload = torch.empty(bucket.nbytes, dtype=torch.uint8) if into is None else into[: bucket.nbytes]
    for name, spec, offset in zip(bucket.names, bucket.specs, bucket.offsets, strict=True):
        given = next(weights, None)
        if given is None:
            raise SegmentError(f"the learner's weights end before {name!r}")
        found, tensor = given
        if found != name or describe(tensor) != spec:
            raise SegmentError(f"the learner gathered {found!r} ({describe(tensor)}), announced was {name!r} ({spec})")
        payload[offset : offset + spec.nbytes].copy_(_as_bytes(tensor))
    return payload


def unpack(bucket: Bucket, payload: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The weights in a payload, as views of it."""
    return [
        (name, payload[offset : offset + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape))
        for name, spec, offset in zip(bucket.names, bucket.specs, bucket.offsets, strict=True)
    ]


def describe(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))


def learn_layout(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, TensorSpec]:
    """Names, types and shapes of weights, by running through all of them."""
    return {name: describe(tensor) for name, tensor in weights}


def to_wire(layout: Layout) -> dict[str, Any]:
    """A layout as plain values that any transport can carry. Order is kept."""
    return {
        "names": list(layout),
        "dtypes": [spec.dtype for spec in layout.values()],
        "shapes": [list(spec.shape) for spec in layout.values()],
    }


def from_wire(fields: Mapping[str, Sequence[Any]]) -> dict[str, TensorSpec]:
    """Inverse of `to_wire`."""
    try:
        parts = zip(fields["names"], fields["dtypes"], fields["shapes"], strict=True)
        return {name: TensorSpec(dtype, tuple(shape)) for name, dtype, shape in parts}
    except (KeyError, TypeError, ValueError) as error:
        raise SegmentError(f"not a layout of weights: {error}") from None


class StreamDigest:
    """A checksum of named tensors in order, by integer sums where they lie, so that no weight leaves its GPU for it.

    Per tensor two sums of its 8-byte words modulo 2^64, one plain and one weighted by position; SHA-256 over all of them.
    It finds what goes wrong by accident (a lost, doubled, torn or swapped piece), not what somebody forges.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._sums: list[torch.Tensor] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        spec = describe(tensor)
        self._hash.update(f"{name}:{spec.dtype}:{spec.shape};".encode())
        self._sums.append(_fold(_as_bytes(tensor)))

    def hexdigest(self) -> str:
        """Waits for the device once. Further weights may be added."""
        digest = self._hash.copy()
        if self._sums:
            digest.update(torch.stack(self._sums).cpu().numpy().tobytes())
        return digest.hexdigest()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _fold(raw: torch.Tensor) -> torch.Tensor:
    """int64 [2]: sum of the words, and sum of each times its number (from 1)."""
    padding = -raw.numel() % 8
    if padding or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(padding)])
    words = raw.view(torch.int64)
    total = torch.zeros(2, dtype=torch.int64, device=raw.device)
    for begin in range(0, words.numel(), _WORDS):
        part = words[begin : begin + _WORDS]
        number = torch.arange(begin + 1, begin + 1 + part.numel(), dtype=torch.int64, device=raw.device)
        total += torch.stack([part.sum(), (part * number).sum()])
    return total
