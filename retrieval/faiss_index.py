"""Exact inner-product search by FAISS. The only file that imports faiss.

Invariants: document ids stay outside FAISS, as a sorted list that maps row to id; results are the exact top k, scored in
float64 one pair at a time, so a score does not depend on which queries share a batch; equal scores are ordered by document id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.errors import IndexMismatch, RetrievalError

try:
    import faiss
except ImportError:  # pragma: no cover - depends on the installation
    raise RetrievalError("FAISS is not installed; install the extra: pip install 'gumshoe-rl[cpu]'") from None

_FILE, _IDS = "vectors.faiss", "ids.json"
_MARGIN = 16
_SLACK = 1e-4
"""More than float32 rounding can move an inner product of two vectors of length 1."""


class FaissIndex:
    """A flat index over vectors of length 1."""

    def __init__(self, index: Any, ids: Sequence[str], threads: int) -> None:
        if index.ntotal != len(ids):
            raise IndexMismatch(f"the index holds {index.ntotal} vectors but {len(ids)} document ids; build it again")
        self._index = index
        self.ids = list(ids)
        self.dim = int(index.d)
        self._threads = threads
        self._vectors_ND = (
            faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
            if index.ntotal
            else np.zeros((0, index.d), dtype=np.float32)
        )

    @classmethod
    def build(cls, vectors_ND: np.ndarray, ids: Sequence[str], *, threads: int = 1) -> FaissIndex:
        """Indexes float32 [N, dim] vectors; rows are put in order of document id."""
        order = sorted(range(len(ids)), key=ids.__getitem__)
        sorted_ids = [ids[i] for i in order]
        index = faiss.IndexFlatIP(vectors_ND.shape[1])
        rows = vectors_ND if sorted_ids == list(ids) else vectors_ND[order]
        index.add(np.ascontiguousarray(rows, dtype=np.float32))
        return cls(index, sorted_ids, threads)

    def search(self, queries_QD: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """(document id, score) of the exact top k of each query, best first. A query of length 0 finds nothing."""
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        if queries_QD.shape[1] != self.dim:
            raise IndexMismatch(f"queries have {queries_QD.shape[1]} dimensions, the index has {self.dim}")
        faiss.omp_set_num_threads(self._threads)
        total = len(self.ids)
        found: list[list[tuple[str, float]]] = [[] for _ in queries_QD]
        open_rows = [i for i, q in enumerate(queries_QD) if q.any()]
        fetch = min(total, k + _MARGIN)
        while open_rows and fetch:
            scores_QK, rows_QK = self._index.search(queries_QD[open_rows], fetch)
            unsure = []
            for i, scores_K, rows_K in zip(open_rows, scores_QK, rows_QK, strict=True):
                rows_K = np.sort(rows_K)
                # one pair at a time in float64: BLAS rounds differently for different batch shapes
                exact_K = (self._vectors_ND[rows_K].astype(np.float64) * queries_QD[i].astype(np.float64)).sum(axis=1)
                # equal vectors give equal scores; the stable sort then keeps the order of ids
                best = np.argsort(-exact_K, kind="stable")[:k]
                # below the last fetched score may stand documents that tie with the k-th
                if fetch < total and float(scores_K[-1]) > exact_K[best[-1]] - _SLACK:
                    unsure.append(i)
                else:
                    found[i] = [(self.ids[rows_K[j]], float(exact_K[j])) for j in best]
            open_rows, fetch = unsure, min(total, fetch * 4)
        return found

    def save(self, directory: str | Path) -> None:
        """Writes vectors and ids into a folder."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._index, str(directory / _FILE))
        (directory / _IDS).write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, *, threads: int = 1, mmap: bool = True) -> FaissIndex:
        """Opens a saved index, memory-mapped, so that processes of one node share it. Raises RetrievalError."""
        path = Path(directory) / _FILE
        try:
            ids = json.loads((Path(directory) / _IDS).read_text(encoding="utf-8"))
            index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mmap else 0)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise RetrievalError(f"index {path} cannot be read ({reason}); build it again") from None
        if not isinstance(index, faiss.IndexFlatIP):
            raise IndexMismatch(f"index {path} is {type(index).__name__}, expected IndexFlatIP; build it again")
        return cls(index, ids, threads)
