"""A weight segment: one published set of weights as one file that other processes map.

The trainer writes it, every engine's worker maps it. The file has the safetensors layout (a length, a JSON
header, raw tensors), so any tool can read it and nothing is ever unpickled.

Invariants:
- A segment appears under its final name complete or not at all (written aside, then renamed), and is never
  written again. Whoever mapped it keeps its bytes even after it was unlinked.
- The writer keeps at most `KEEP` segments: the one being read and the one before it.
- A reader hands out tensors only after names, shapes, dtypes and, if asked, the checksum were verified, so a
  refused segment leaves the model as it was.

No vLLM here: the learner imports this file too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

KEEP = 2
"""Segments of one writer that exist at a time."""

_LENGTH = struct.Struct("<Q")
_ALIGN = 64
_HASH_CHUNK = 1 << 24

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SegmentError(Exception):
    """A segment that cannot be used; the message is one line that says what is wrong."""


@dataclass(frozen=True)
class TensorSpec:
    """What a header says about one tensor."""

    dtype: str
    """The safetensors name of the element type, such as `F32`."""
    shape: tuple[int, ...]
    """The full (unsharded) shape, as in the checkpoint."""

    @property
    def nbytes(self) -> int:
        return _numel(self.shape) * torch_dtype(self.dtype).itemsize


Layout = Mapping[str, TensorSpec]
"""Every tensor of a checkpoint by name."""


@dataclass(frozen=True)
class Manifest:
    """What the trainer tells the engines about a segment. Plain values: it crosses processes."""

    path: str
    """Where the segment lies; every engine that gets this manifest must see this path."""
    nbytes: int
    """Size of the whole file."""
    checksum: str
    """SHA-256 of the whole file, header included, as hexadecimal."""
    num_tensors: int
    """How many tensors it holds."""
    kind: str = "weights"
    """`adapter`: the path is a folder with adapters alone (`cluster.vllm.adapters`), and the checksum is of the files in it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Manifest:
        try:
            return cls(**fields)
        except TypeError as error:
            raise SegmentError(f"not a weight manifest: {error}") from None


class ShmWriter:
    """Writes segments into a folder, normally in shared memory, and clears the old ones away.

    Peak memory is one CPU copy of what does not lie contiguous on the CPU yet, plus the file.
    """

    def __init__(self, directory: str | Path, *, prefix: str = "weights") -> None:
        self._directory = Path(directory)
        self._prefix = prefix
        self._sequence = 0
        self._written: list[Path] = []

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
        """Write one segment; it is visible to readers once this returns."""
        tensors = {name: _plain(tensor) for name, tensor in named_tensors}
        if not tensors:
            raise SegmentError("no tensors to write")
        header = _encode_header(tensors)
        self._directory.mkdir(parents=True, exist_ok=True)
        # The process id keeps a restarted trainer from writing over what engines still map.
        path = self._directory / f"{self._prefix}-{os.getpid()}-{self._sequence:06d}.safetensors"
        aside = path.with_suffix(".partial")
        digest = hashlib.sha256()
        nbytes = 0
        try:
            with aside.open("wb") as file:
                for chunk in _chunks(header, tensors):
                    digest.update(chunk)
                    nbytes += file.write(chunk)
            aside.rename(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise SegmentError(f"cannot write weights to {path}: {error.strerror}") from error
        self._sequence += 1
        self._written.append(path)
        self._clear(keep=KEEP)
        return Manifest(str(path), nbytes, digest.hexdigest(), len(tensors))

    def close(self) -> None:
        """Remove what this writer wrote. Mapped segments stay readable for those who mapped them."""
        self._clear(keep=0)
        with contextlib.suppress(OSError):
            # Only if nobody else keeps something there.
            self._directory.rmdir()

    def _clear(self, keep: int) -> None:
        while len(self._written) > keep:
            self._written.pop(0).unlink(missing_ok=True)


class SegmentReader:
    """One mapped segment. Construction verifies size and header; nothing is copied before it is read."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        path = Path(manifest.path)
        try:
            with path.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes != manifest.nbytes:
                    raise SegmentError(f"{path} holds {nbytes} bytes, its manifest says {manifest.nbytes}")
                # Copy-on-write: torch wants writable memory, the file must never change.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise SegmentError(f"cannot read weights at {path}: {error.strerror}") from error
        self.layout, self._offsets = _decode_header(self._map, path, nbytes)
        if len(self.layout) != manifest.num_tensors:
            raise SegmentError(f"{path} holds {len(self.layout)} tensors, its manifest says {manifest.num_tensors}")

    def verify_checksum(self) -> None:
        """Read every byte and compare with the manifest."""
        digest = hashlib.sha256()
        with memoryview(self._map) as view:
            for start in range(0, len(view), _HASH_CHUNK):
                digest.update(view[start : start + _HASH_CHUNK])
        if digest.hexdigest() != self.manifest.checksum:
            raise SegmentError(
                f"checksum of {self.manifest.path} is {digest.hexdigest()[:12]}..., "
                f"its manifest says {self.manifest.checksum[:12]}..."
            )

    def verify_layout(self, expected: Layout, *, optional: frozenset[str] = frozenset()) -> None:
        """Refuse any missing, unknown or differently shaped or typed tensor. `optional` may be there or not."""
        check_layout(self.layout, expected, optional=optional, where=self.manifest.path)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and mapped tensor, in file order. A tensor keeps the mapping alive by itself."""
        for name, spec in self.layout.items():
            dtype = _DTYPES[spec.dtype]
            count = _numel(spec.shape)
            if count == 0:
                yield name, torch.empty(spec.shape, dtype=dtype)
                continue
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._offsets[name])
            yield name, flat.view(spec.shape)

    def close(self) -> None:
        # Tensors that are still alive keep the mapping open; it then ends with the last of them.
        with contextlib.suppress(BufferError):
            self._map.close()


def check_layout(
    found: Layout, expected: Layout, *, optional: frozenset[str] = frozenset(), where: str = "the learner's weights"
) -> None:
    """Raises SegmentError for any missing, unknown or differently shaped or typed tensor. `optional` may be there or not."""
    missing = sorted(set(expected) - set(found) - optional)
    unknown = sorted(set(found) - set(expected) - optional)
    if missing or unknown:
        parts = [
            f"{label} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for label, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise SegmentError(f"weights do not fit the model: {where} {', '.join(parts)}")
    for name, spec in found.items():
        if spec.dtype not in _DTYPES:
            raise SegmentError(f"weights do not fit the model: {name!r} has unknown type {spec.dtype}")
        wanted = expected.get(name)
        if wanted is None:
            continue
        if spec.shape != wanted.shape:
            raise SegmentError(
                f"weights do not fit the model: {name!r} has shape {list(spec.shape)}, "
                f"the checkpoint has {list(wanted.shape)}"
            )
        if spec.dtype != wanted.dtype:
            raise SegmentError(
                f"weights do not fit the model: {name!r} is {spec.dtype}, the engine takes {wanted.dtype}"
            )


def file_layout(path: str | Path) -> dict[str, TensorSpec]:
    """The layout of any safetensors file, read from its header alone; refuses a truncated file."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        if len(head) < _LENGTH.size or _LENGTH.unpack(head)[0] > size:
            raise SegmentError(f"{path} is not a safetensors file, or was cut off")
        head += file.read(_LENGTH.unpack(head)[0])
    return _decode_header(head, Path(path), size)[0]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    if dtype not in _DTYPE_NAMES:
        raise SegmentError(f"dtype {dtype} cannot be published")
    return _DTYPE_NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """Inverse of `dtype_name`."""
    if name not in _DTYPES:
        raise SegmentError(f"dtype {name} cannot be published")
    return _DTYPES[name]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


def _chunks(header: bytes, tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors.values():
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _encode_header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padding with blanks (the format allows it) lets the first tensor start on a cache line.
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGN)
    return _LENGTH.pack(len(text)) + text


def _decode_header(data: bytes | mmap.mmap, path: Path, size: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    try:
        (length,) = _LENGTH.unpack(data[: _LENGTH.size])
        start = _LENGTH.size + length
        entries = json.loads(data[_LENGTH.size : start])
        entries.pop("__metadata__", None)
        layout: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        for name, entry in entries.items():
            spec = TensorSpec(entry["dtype"], tuple(int(size) for size in entry["shape"]))
            begin, end = entry["data_offsets"]
            known = _DTYPES.get(spec.dtype)
            # Other types (float8) exist in checkpoints; they can be listed, not published.
            right_size = known is None or end - begin == _numel(spec.shape) * known.itemsize
            if begin < 0 or not right_size or start + end > size:
                raise ValueError(f"{name!r} does not lie inside the file")
            layout[name] = spec
            offsets[name] = start + begin
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SegmentError(f"{path} has a broken header: {error}") from None
    return layout, offsets
