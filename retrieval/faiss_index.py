"""Inner-product search by FAISS. The only file that imports faiss.

Invariants: the vectors themselves stand beside the index in `vectors.npy`, memory-mapped, and final candidates are scored from
them in float64, one pair at a time, so a score does not depend on batch, shard, thread or device; equal scores are ordered by
row. `flat` is exact: its hits are those of a float64 scan. The other kinds find most of them; two of their shards, or a query
in another batch, may find other rows. A query of length 0 finds nothing. No test of ours has run on a GPU: there a stand-in
takes its place.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.engine import Found, Queries
from retrieval.errors import IndexMismatch, RetrievalError
from retrieval.faiss_config import TRAIN_LEAST, TRAIN_PER_LIST, FaissConfig, built, check_gpu, factory, num_lists

try:
    import faiss
except ImportError:  # pragma: no cover - depends on the installation
    raise RetrievalError("FAISS is not installed; install the extra: pip install 'gumshoe-rl[cpu]'") from None

VECTORS = "vectors.npy"
_INDEX, _FACTS = "index.faiss", "faiss.json"
_MARGIN = 16
_SLACK, _GPU_SLACK = 1e-4, 4e-3
"""More than single (and half) precision can move an inner product of two vectors of length 1 and usual dimensions."""
_GPU_MOST = 2048
"""FAISS finds no more rows than this in one search on a GPU."""
_BLOCK = 65_536
_NOTHING = Found(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float64))


class FaissEngine:
    """One shard. `facts`: factory string, rows, dim, and the length of the longest vector."""

    wants_vectors = True

    def __init__(
        self, config: FaissConfig, facts: dict[str, Any], vectors_ND: np.ndarray | None, index: Any, threads: int
    ) -> None:
        self._config, self._facts, self._threads = config, facts, threads
        self.home: Path | None = None
        """The folder it was loaded from."""
        self.num_rows, self.dim = int(facts["rows"]), int(facts["dim"])
        self._vectors_ND, self._index = vectors_ND, index
        self._exact = facts["factory"] == "Flat"
        self._gpu: Any = None
        self._gpu_lock = threading.Lock()
        if index is not None:
            for name, value in (("nprobe", config.nprobe), ("efSearch", config.ef_search)):
                _set(index, name, value)

    def to_gpus(self) -> None:
        """Searches there from now on. Raises RetrievalError when there are none."""
        check_gpu(self._config, self._facts["factory"], self.dim)
        self._gpu = _on_gpus(self._index, self._vectors_ND, self.dim)

    def search(self, queries: Queries, k: int) -> list[Found]:
        """The top k rows of each query, best first. Raises IndexMismatch for vectors of another dimension."""
        if queries.vectors_QD is None:
            raise IndexMismatch(
                "a dense index is searched with vectors, the queries have none; give the backend an encoder"
            )
        queries_QD = np.ascontiguousarray(queries.vectors_QD, dtype=np.float32)
        if queries_QD.shape[1] != self.dim:
            raise IndexMismatch(f"queries have {queries_QD.shape[1]} dimensions, the index has {self.dim}")
        faiss.omp_set_num_threads(self._threads)
        found = [_NOTHING for _ in queries_QD]
        open_rows = [i for i, q in enumerate(queries_QD) if q.any()]
        most = self.num_rows if self._gpu is None else min(self.num_rows, _GPU_MOST)
        fetch = min(most, k + _MARGIN if self._exact else k * self._config.refine_factor)
        while open_rows and fetch:
            scores_QK, rows_QK = self._scan(queries_QD[open_rows], fetch)
            unsure = []
            for i, scores_K, rows_K in zip(open_rows, scores_QK, rows_QK, strict=True):
                found[i] = self._score(queries_QD[i], scores_K, rows_K, k)
                # below the last fetched score may stand rows that tie with the k-th
                if self._exact and fetch < most and scores_K[-1] > found[i].scores_K[-1] - self._slack(queries_QD[i]):
                    unsure.append(i)
            open_rows, fetch = unsure, min(most, fetch * 4)
        return found

    def save(self, directory: Path) -> None:
        """Writes the index into a folder; vectors that lie there already stay as they are."""
        directory.mkdir(parents=True, exist_ok=True)
        directory = directory.resolve()
        if directory == self.home:
            return
        # a file that is mapped must not be written over
        path = directory / VECTORS
        if self._vectors_ND is not None and str(getattr(self._vectors_ND, "filename", "")) != str(path):
            np.save(path, self._vectors_ND, allow_pickle=False)
        if self._index is not None:
            faiss.write_index(self._index, str(directory / _INDEX))
        facts = {**self._facts, "built": built(self._config)}
        (directory / _FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")

    def spec(self) -> dict[str, Any]:
        """What changes the results: `flat` has no settings."""
        settings = {"index": "flat"} if self._exact else asdict(self._config)
        scores = "approximate" if self._vectors_ND is None else "exact"
        return {"kind": "faiss", "metric": "inner_product", "scores": scores, **settings}

    def _scan(self, queries_QD: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._gpu is not None:
            with self._gpu_lock:
                scores_QK, rows_QK = self._gpu.search(queries_QD, fetch)
        elif self._exact:
            scores_QK, rows_QK = faiss.knn(queries_QD, self._vectors_ND, fetch, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores_QK, rows_QK = self._index.search(queries_QD, fetch)
        return scores_QK, rows_QK

    def _score(self, query_D: np.ndarray, scores_K: np.ndarray, rows_K: np.ndarray, k: int) -> Found:
        """The best k of the candidates; row -1 is none."""
        order = np.argsort(rows_K, kind="stable")
        order = order[rows_K[order] >= 0]
        rows_K = rows_K[order].astype(np.int64)
        if self._vectors_ND is None:
            exact_K = scores_K[order].astype(np.float64)
        else:
            # one pair at a time in float64: BLAS rounds differently for different batch shapes
            exact_K = (self._vectors_ND[rows_K].astype(np.float64) * query_D.astype(np.float64)).sum(axis=1)
        # equal vectors give equal scores; the stable sort then keeps the order of rows
        best = np.argsort(-exact_K, kind="stable")[:k]
        return Found(rows_K[best], exact_K[best])

    def _slack(self, query_D: np.ndarray) -> float:
        unit = _SLACK if self._gpu is None else _GPU_SLACK
        return max(unit, 1.2e-7 * self.dim) * float(self._facts["longest"]) * float(np.linalg.norm(query_D))


def check(config: FaissConfig, num_rows: int, dim: int) -> None:
    """Raises RetrievalError for an index that FAISS does not know, or not of that size, or not where it is to be searched. What only
    its training shows comes later."""
    string = factory(config, num_rows, dim)
    if config.device == "gpu":
        check_gpu(config, string, dim)
    if string != "Flat":
        _empty(string, num_rows, dim)


def build(
    config: FaissConfig,
    directory: Path,
    texts: Callable[[], Iterator[str]],
    vectors_ND: np.ndarray | None,
    num_rows: int,
    *,
    threads: int = 1,
) -> FaissEngine:
    """An index over float32 [num_rows, dim] vectors, which may be memory-mapped. Raises RetrievalError.

    Nothing is written before `save`; vectors that are the file `vectors.npy` of that folder are taken as they lie.
    """
    if vectors_ND is None or len(vectors_ND) != num_rows:
        raise RetrievalError(
            f"a dense index of {num_rows} rows was given {0 if vectors_ND is None else len(vectors_ND)} vectors"
        )
    dim = int(vectors_ND.shape[1])
    string = factory(config, num_rows, dim)
    if string == "Flat" and vectors_ND.dtype != np.float32:
        raise RetrievalError(
            f"faiss.index flat needs float32 vectors, these are {vectors_ND.dtype}; take SQfp16 for half"
        )
    longest, index = 0.0, None
    faiss.omp_set_num_threads(threads)
    if string != "Flat":
        index = _trained(config, string, vectors_ND)
    for first in range(0, num_rows, _BLOCK):
        block_BD = np.ascontiguousarray(vectors_ND[first : first + _BLOCK], dtype=np.float32)
        longest = max(longest, float(np.sqrt(np.square(block_BD).sum(axis=1).max())))
        if index is not None:
            index.add(block_BD)
    facts = {"factory": string, "rows": num_rows, "dim": dim, "longest": longest}
    keep = string == "Flat" or config.keep_vectors
    return FaissEngine(config, facts, vectors_ND if keep else None, index, threads)


def load(config: FaissConfig, directory: Path, *, threads: int = 1) -> FaissEngine:
    """Opens a saved index, memory-mapped, so that processes of one node share it; on the GPUs if asked to.

    Raises RetrievalError, IndexMismatch.
    """
    try:
        facts = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
        string, asked = facts["factory"], built(config)
        wrong = [
            f"faiss.{k}: built with {v!r}, asked for {asked.get(k)!r}"
            for k, v in facts.pop("built").items()
            if v != asked.get(k)
        ]
        if wrong:
            raise IndexMismatch(
                f"index {directory} does not fit: {'; '.join(wrong)}; build it again or mend the config"
            )
        vectors_ND = index = None
        if string == "Flat" or config.keep_vectors:
            vectors_ND = np.load(directory / VECTORS, mmap_mode="r", allow_pickle=False)
        if string != "Flat":
            index = faiss.read_index(str(directory / _INDEX), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
        shapes = {(facts["rows"], facts["dim"])}
        shapes |= set() if vectors_ND is None else {vectors_ND.shape}
        shapes |= set() if index is None else {(index.ntotal, index.d)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RetrievalError):
            raise
        raise RetrievalError(f"index {directory} cannot be read ({_line(error)}); build it again") from None
    if len(shapes) > 1:
        raise IndexMismatch(f"the files of index {directory} disagree: {sorted(shapes)} vectors; build it again")
    engine = FaissEngine(config, facts, vectors_ND, index, threads)
    engine.home = directory.resolve()
    if config.device == "gpu":
        engine.to_gpus()
    return engine


def _trained(config: FaissConfig, string: str, vectors_ND: np.ndarray) -> Any:
    """An empty index that has been trained, on a sample where there are many vectors."""
    num_rows, dim = vectors_ND.shape
    index = _empty(string, num_rows, dim)
    try:
        _set(index, "efConstruction", config.ef_construction)
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.cp.seed = config.seed + 1  # FAISS takes 0 for "any"
        if not index.is_trained:
            wanted = min(num_rows, max(TRAIN_LEAST, TRAIN_PER_LIST * num_lists(string)))
            rows = np.sort(np.random.default_rng(config.seed).choice(num_rows, wanted, replace=False))
            index.train(np.ascontiguousarray(vectors_ND[rows], dtype=np.float32))
    except RuntimeError as error:
        raise _cannot(string, num_rows, dim, error) from None
    return index


def _empty(string: str, num_rows: int, dim: int) -> Any:
    try:
        return faiss.index_factory(dim, string, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _cannot(string, num_rows, dim, error) from None


def _cannot(string: str, num_rows: int, dim: int, error: RuntimeError) -> RetrievalError:
    return RetrievalError(
        f"faiss.index {string!r} cannot be built over {num_rows} vectors of {dim} dimensions: {_line(error)}"
    )


def _set(index: Any, name: str, value: int) -> None:
    """Sets a parameter of whatever part of the index has it; the others do without."""
    with contextlib.suppress(RuntimeError):
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def num_gpus() -> int:
    """GPUs that this FAISS can use; 0 for one that was built without."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _on_gpus(index: Any, vectors_ND: np.ndarray | None, dim: int) -> Any:
    """The index cut over all GPUs, in half precision."""
    count = num_gpus()
    if not count:
        raise RetrievalError(
            "faiss.device is gpu, but this FAISS sees none; install faiss-gpu on a machine with an NVIDIA GPU, or set it to cpu"
        )
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    try:
        # a flat index goes there empty and is filled in one pass, so the vectors are never copied in host memory
        gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim) if index is None else index, options)
        if index is None:
            gpu.add(np.ascontiguousarray(vectors_ND, dtype=np.float32))
    except RuntimeError as error:
        raise RetrievalError(
            f"the index does not go onto {count} GPUs ({_line(error)}); set faiss.device to cpu"
        ) from None
    return gpu


def _line(error: BaseException) -> str:
    """What FAISS means: its messages end with it, after the place in its source."""
    lines = str(error).strip().splitlines()
    return re.split(r"\.(?:cpp|h):\d+: (?:Error: )?", lines[-1])[-1] if lines else type(error).__name__
