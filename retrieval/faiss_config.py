"""How a dense index is built and searched, and the bytes it will need. Needs no FAISS.

Invariants: every kind is a FAISS factory string in the end, so names and strings are built, searched and estimated by the same
code; what is chosen by size follows the rules in `factory`, never silently another kind.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from retrieval.errors import RetrievalError
from retrieval.manifest import lasting

NAMES = ("flat", "sq8", "ivf_flat", "ivf_pq", "hnsw")
DEVICES = ("cpu", "gpu")
TRAIN_PER_LIST, TRAIN_LEAST = 64, 1 << 16
"""Vectors that training reads per list of an IVF index, and of any index that trains."""
_GOOD_PER_LIST = 39
"""Below this many vectors per centroid FAISS calls its clusters poor."""
_GPU_SCRATCH = 3 << 29
"""Working memory that FAISS reserves on a card of more than 8 GB (its `StandardGpuResources`)."""
_GPU_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""Codes per vector that FAISS has GPU kernels for, of 8 bits each (its `IVFPQ::isSupportedPQCodeLength`)."""
_GPU_NPROBE = 2048
_GPU_KINDS = re.compile(r"(?:(?:OPQ|PCA[RW]?|ITQ|RR)[\d_]*,)*(?:Flat|IVF\d+k?,(?:Flat|SQ(?:4|8|fp16)|PQ\d+(?:x\d+)?))")
_RUNTIME: dict[str, Any] = {"runtime": True}


@dataclass
class FaissConfig:
    """Which FAISS index, and how. A change of a field that only concerns the search needs no new index."""

    index: str = "flat"
    """`flat` (exact), `sq8`, `ivf_flat`, `ivf_pq`, `hnsw`, or a FAISS factory string such as `OPQ32,IVF4096,PQ32`."""
    nlist: int = 0
    """IVF: lists. 0: 4 * sqrt(rows), but at least 39 rows for each list."""
    pq_m: int = 0
    """IVF-PQ: codes per vector, a divisor of the dimension. 0: one code for every 8 dimensions, or the next fewer that divide."""
    pq_bits: int = 8
    """IVF-PQ: bits per code; needs at least 2 ** bits rows to train on."""
    hnsw_m: int = 32
    """HNSW: links per vector and level (twice as many on the lowest)."""
    ef_construction: int = 100
    """HNSW: candidates kept while inserting."""
    seed: int = 0
    """Of the training sample and of k-means. HNSW is repeatable only when it is built by one thread."""
    keep_vectors: bool = True
    """Keep the vectors themselves, memory-mapped, beside an approximate index, for exact scores. Without them the scores are
    FAISS's own, and approximate. `flat` is the vectors themselves."""
    nprobe: int = field(default=16, metadata=_RUNTIME)
    """IVF: lists that a search reads."""
    ef_search: int = field(default=64, metadata=_RUNTIME)
    """HNSW: candidates kept while searching."""
    refine_factor: int = field(default=4, metadata=_RUNTIME)
    """Candidates that are scored exactly, as a multiple of the number asked for."""
    device: str = field(default="cpu", metadata=_RUNTIME)
    """`cpu`, or `gpu`: cut over all GPUs in half precision by faiss-gpu; the candidates are scored exactly as on the CPU."""

    def __post_init__(self) -> None:
        for name in ("pq_bits", "hnsw_m", "ef_construction", "nprobe", "ef_search", "refine_factor"):
            if getattr(self, name) < 1:
                raise ValueError(f"faiss.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("nlist", "pq_m", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"faiss.{name} is {getattr(self, name)}; it must not be negative")
        if self.device not in DEVICES:
            raise ValueError(f"faiss.device is {self.device!r}; known: {', '.join(DEVICES)}")
        if self.index.islower() and self.index not in NAMES:
            raise ValueError(
                f"faiss.index {self.index!r} is unknown; known: {', '.join(NAMES)}, or a FAISS factory string"
            )


def built(config: FaissConfig) -> dict[str, Any]:
    """The settings that are fixed when an index is built."""
    return lasting(config)


def factory(config: FaissConfig, num_rows: int, dim: int) -> str:
    """The FAISS factory string. Raises RetrievalError when the vectors are too few or of a dimension that does not fit."""
    if config.index not in NAMES:
        string = config.index
    else:
        nlist = config.nlist or max(1, min(round(4 * math.sqrt(num_rows)), num_rows // _GOOD_PER_LIST))
        eighth = max(1, dim // 8)
        codes = config.pq_m or next(m for m in range(eighth, 0, -1) if dim % m == 0)
        string = {
            "flat": "Flat",
            "sq8": "SQ8",
            "ivf_flat": f"IVF{nlist},Flat",
            "ivf_pq": f"IVF{nlist},PQ{codes}x{config.pq_bits}",
            "hnsw": f"HNSW{config.hnsw_m},Flat",
        }[config.index]
    if (lists := num_lists(string)) > num_rows:
        raise RetrievalError(
            f"faiss.index {string} needs at least {lists:,} vectors to train its lists, there are {num_rows:,}; "
            "set faiss.nlist to 0 or fewer, or faiss.index to flat"
        )
    for codes_text, bits in _codes(string):
        if 1 << bits > num_rows:
            raise RetrievalError(
                f"faiss.index {string} needs at least {1 << bits:,} vectors to train its {bits}-bit codes, there are "
                f"{num_rows:,}; set faiss.index to flat, or fewer faiss.pq_bits"
            )
        if config.index == "ivf_pq" and dim % int(codes_text):
            raise RetrievalError(f"faiss.pq_m is {codes_text}; it must divide the {dim} dimensions of the vectors")
    return string


def check_gpu(config: FaissConfig, string: str, dim: int) -> None:
    """Raises RetrievalError for an index of which FAISS has no version for GPUs: some it would leave on the CPU without a word."""
    if not _GPU_KINDS.fullmatch(string):
        raise RetrievalError(
            f"faiss.index {string} cannot be searched on a GPU; set faiss.device to cpu, or faiss.index to flat (half precision there), "
            "ivf_flat or ivf_pq"
        )
    for codes_text, bits in _codes(string):
        if bits != 8 or int(codes_text) not in _GPU_CODES:
            fewer = max(m for m in _GPU_CODES if m <= int(codes_text) and dim % m == 0)
            raise RetrievalError(
                f"faiss.index {string} cannot be searched on a GPU, which knows 8-bit codes, {', '.join(map(str, _GPU_CODES))} per vector; "
                f"build it with faiss.pq_bits=8 and faiss.pq_m={fewer}, or set faiss.device to cpu"
            )
    if num_lists(string) and config.nprobe > _GPU_NPROBE:
        raise RetrievalError(f"faiss.nprobe is {config.nprobe}; on a GPU it is at most {_GPU_NPROBE}")


def smaller(config: FaissConfig, num_rows: int, dim: int, rows: int) -> tuple[FaissConfig, int, float]:
    """A smaller index of the same kind: (its configuration, its rows, how many times longer the whole takes to build).

    It has about `rows` rows, and as many fewer lists: k-means and the search for each vector's list take rows x lists.
    Raises RetrievalError as `factory`.
    """
    string = factory(config, num_rows, dim)
    rows = min(num_rows, max(rows, *(1 << bits for _, bits in _codes(string)), 1))
    lists = num_lists(string)
    fewer = max(1, lists * rows // num_rows)
    config = replace(config, index=re.sub(r"IVF\d+k?", f"IVF{fewer}", string))
    return config, rows, num_rows / rows * max(1.0, lists / fewer)


def _codes(string: str) -> list[tuple[str, int]]:
    """(codes, bits of each) of the product quantisers."""
    return [(m, int(bits or 8)) for m, bits in re.findall(r"(?<!O)PQ(\d+)(?:x(\d+))?", string)]


def num_lists(string: str) -> int:
    """Lists of an IVF index; 0 for others."""
    match = re.search(r"IVF(\d+)(k?)", string)
    return 0 if match is None else int(match[1]) * (1024 if match[2] else 1)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one index."""

    disk_bytes: int
    memory_bytes: int
    """While it serves, all that a search may touch held in memory; processes of one node share it."""
    build_bytes: int
    """At the peak of building, besides the file of vectors that is read."""
    gpu_bytes: int
    """Over all GPUs together; 0 when none is used."""
    build_disk_bytes: int = 0
    """Of vectors that lie on disk until it is built, and then go."""


def estimate(config: FaissConfig, num_rows: int, dim: int) -> Estimate:
    """What an index of so many vectors will need. Parts of a factory string that are unknown here count as whole vectors.

    Raises RetrievalError as `factory`.
    """
    string = factory(config, num_rows, dim)
    raw = 4 * num_rows * dim
    if string == "Flat":
        gpu = raw // 2 + _GPU_SCRATCH if config.device == "gpu" else 0
        return Estimate(raw, raw, 0, gpu)
    fixed, each = _size(string, dim)
    size = fixed + round(each * num_rows)
    train = 4 * dim * min(num_rows, max(TRAIN_LEAST, TRAIN_PER_LIST * num_lists(string)))
    kept = raw if config.keep_vectors else 0
    gpu = size + _GPU_SCRATCH if config.device == "gpu" else 0
    return Estimate(size + kept, size, size + train, gpu, raw - kept)


def _size(string: str, dim: int) -> tuple[int, float]:
    """(bytes once, bytes per vector) of the index file of a factory string."""
    fixed, each = 0, 0.0
    for part in string.split(","):
        if match := re.fullmatch(r"(?:OPQ\d+|PCAR?|PCAW|ITQ|RR)_?(\d+)?", part):
            out = int(match[1] or dim)
            fixed, dim = fixed + 4 * dim * out, out
        elif part.startswith("IVF"):
            fixed, each = fixed + 4 * dim * num_lists(part), each + 8
        elif match := re.fullmatch(r"HNSW(\d+)(?:_(\w+))?", part):
            links = int(match[1])
            # 2 M links on the lowest level, M on each level above, which holds 1 / M of the vectors of the one below
            each += 12 + 8 * links + 4 * links / max(links - 1, 1)
            if match[2]:
                once, more = _size(match[2], dim)
                fixed, each = fixed + once, each + more
        elif match := re.fullmatch(r"PQ(\d+)(?:x(\d+))?\w*", part):
            bits = int(match[2] or 8)
            fixed, each = fixed + 4 * dim * (1 << bits), each + math.ceil(int(match[1]) * bits / 8)
        elif match := re.fullmatch(r"SQ(4|6|8|fp16|bf16)", part):
            fixed, each = fixed + 8 * dim, each + math.ceil(dim * {"4": 4, "6": 6, "8": 8}.get(match[1], 16) / 8)
        else:
            each += 4 * dim
    return fixed, each
