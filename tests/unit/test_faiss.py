"""Dense indexes: exactness, ties, shards, recall, stored indexes, what is refused, what they will need."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gumshoe import ROOT
from retrieval.engine import Found, Queries, merge
from retrieval.errors import IndexMismatch, RetrievalError
from retrieval.faiss_config import Estimate, FaissConfig, built, check_gpu, estimate, factory
from retrieval.faiss_index import FaissEngine, build, check, load

APPROXIMATE = {
    "sq8": FaissConfig("sq8"),
    "ivf_flat": FaissConfig("ivf_flat", nprobe=8),
    "ivf_pq": FaissConfig("ivf_pq", pq_bits=4, pq_m=16, nprobe=16, refine_factor=16),
    "hnsw": FaissConfig("hnsw", hnsw_m=8, ef_construction=40),
    "PCA16,IVF8,PQ8x4": FaissConfig("PCA16,IVF8,PQ8x4", nprobe=8, refine_factor=20),
}


def clustered(rows: int = 2000, dim: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((20, dim))[rng.integers(0, 20, rows)] + 0.5 * rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make(vectors: np.ndarray, config: FaissConfig | None = None, where: str = "unused") -> FaissEngine:
    return build(config or FaissConfig(), Path(where), lambda: iter(()), vectors, len(vectors))


def ask(vectors: np.ndarray) -> Queries:
    return Queries(("",) * len(vectors), vectors)


def plain(found: list[Found]) -> list[tuple[list[int], list[float]]]:
    return [(f.rows_K.tolist(), f.scores_K.tolist()) for f in found]


def brute(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    rows = sorted(range(len(vectors)), key=lambda r: (-scores[r], r))[:k]
    return rows, [float(scores[r]) for r in rows]


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.sampled_from([1.0, 30.0, 1e-3]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_flat_is_brute_force_with_ties_by_row_in_any_number_of_shards(
    seed: int, k: int, size: float, shards: int
) -> None:
    rng = np.random.default_rng(seed)
    # few distinct vectors, so that ties are the rule; of any length, as a model without normalisation gives them
    pool = (size * rng.integers(-1, 2, (4, 8))).astype(np.float32)
    vectors = pool[rng.integers(0, 4, 60)]
    queries = np.concatenate([pool[:2] + np.float32(size / 2), rng.standard_normal((1, 8)).astype(np.float32)])
    whole = make(vectors).search(ask(queries), k)
    assert plain(whole) == [brute(vectors, q, k) for q in queries]
    bounds = sorted({0, 60, *rng.integers(1, 60, shards - 1).tolist()})
    parts = [make(vectors[a:b]).search(ask(queries), k) for a, b in pairwise(bounds)]
    assert plain([merge(found, bounds[:-1], k) for found in zip(*parts, strict=True)]) == plain(whole)


def test_scores_do_not_depend_on_the_batch_and_zero_finds_nothing() -> None:
    rng = np.random.default_rng(1)
    vectors, queries = (rng.standard_normal((n, 96)).astype(np.float32) for n in (500, 64))
    engine = make(vectors)
    assert plain(engine.search(ask(queries), 7)) == [plain(engine.search(ask(q[None]), 7))[0] for q in queries]
    assert plain(engine.search(ask(np.zeros((1, 96), np.float32)), 3)) == [([], [])]
    with pytest.raises(IndexMismatch, match="95 dimensions, the index has 96"):
        engine.search(ask(queries[:, :95]), 3)
    with pytest.raises(IndexMismatch, match="queries have none"):
        engine.search(Queries(("x",)), 3)


@pytest.mark.parametrize("config", APPROXIMATE.values(), ids=APPROXIMATE.keys())
def test_approximate_kinds_find_most_score_exactly_and_keep_it_in_a_folder(config: FaissConfig, tmp_path: Path) -> None:
    vectors, queries = clustered(), clustered(40, seed=5)
    queries[7] = 0
    vectors[1000:1010] = vectors[3]
    engine = make(vectors, config)
    found = engine.search(ask(queries), 10)
    truth = [brute(vectors, q, 10) for q in queries]
    shared = sum(len(set(f.rows_K.tolist()) & set(t[0])) for f, t in zip(found, truth, strict=True)) - len(
        found[7].rows_K
    )
    assert shared / 390 > 0.9
    assert plain(found)[7] == ([], [])
    for query, hits in zip(queries, found, strict=True):
        exact = (vectors[hits.rows_K].astype(np.float64) * query.astype(np.float64)).sum(axis=1)
        assert hits.scores_K.tolist() == exact.tolist()
        assert sorted(zip(-hits.scores_K, hits.rows_K, strict=True)) == list(
            zip(-hits.scores_K, hits.rows_K, strict=True)
        )
    engine.save(tmp_path / "i")
    opened = load(config, tmp_path / "i")
    opened.save(tmp_path / "i")
    assert plain(opened.search(ask(queries), 10)) == plain(found)
    assert plain(make(vectors, config).search(ask(queries), 10)) == plain(found)
    assert opened.spec() == engine.spec() and opened.spec()["scores"] == "exact"
    everything = engine.search(ask(queries[:1]), 10**6)[0]
    assert 10 <= len(everything.rows_K) == len(set(everything.rows_K.tolist())) <= 2000


def test_search_settings_need_no_new_index_but_the_others_do(tmp_path: Path) -> None:
    vectors = clustered()
    config = FaissConfig("ivf_flat", nlist=32, nprobe=1)
    make(vectors, config).save(tmp_path)
    query = ask(vectors[:50] + 0.3)
    narrow, wide = load(config, tmp_path), load(replace(config, nprobe=32), tmp_path)
    truth = [brute(vectors, q, 10)[0] for q in vectors[:50] + 0.3]
    assert [f.rows_K.tolist() for f in wide.search(query, 10)] == truth
    assert [f.rows_K.tolist() for f in narrow.search(query, 10)] != truth
    assert narrow.spec() != wide.spec() and built(config) == built(replace(config, nprobe=32))
    with pytest.raises(IndexMismatch, match=r"faiss\.nlist: built with 32, asked for 16"):
        load(replace(config, nlist=16), tmp_path)


def test_without_the_vectors_scores_are_approximate_and_say_so(tmp_path: Path) -> None:
    vectors, config = clustered(), FaissConfig("sq8", keep_vectors=False)
    engine = make(vectors, config)
    engine.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faiss.json", "index.faiss"]
    found = load(config, tmp_path).search(ask(vectors[:5]), 4)
    assert [f.rows_K[0] for f in found] == list(range(5))
    assert found[0].scores_K[0] == pytest.approx(1, abs=0.02)
    assert engine.spec()["scores"] == "approximate"


def test_a_stored_index_is_mapped_into_memory_not_read(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((60_000, 128)).astype(np.float32)
    for name in ("flat", "sq8"):
        make(vectors, FaissConfig(name)).save(tmp_path / name)
    code = """
import sys
from pathlib import Path
import numpy as np
from retrieval.engine import Queries
from retrieval.faiss_config import FaissConfig
from retrieval.faiss_index import load
def held():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
warm = np.ones((1, 128), dtype=np.float32)
before = held()
for name in ("flat", "sq8"):
    load(FaissConfig(name), Path(sys.argv[1]) / name).search(Queries(("",), warm), 10)
print(held() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    size_mb = os.path.getsize(tmp_path / "flat" / "vectors.npy") / 2**20
    assert float(done.stdout) < size_mb / 3


def test_vectors_that_lie_in_the_folder_are_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", clustered())
    inode = (tmp_path / "vectors.npy").stat()
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    build(FaissConfig(), tmp_path, lambda: iter(()), mapped, len(mapped)).save(tmp_path)
    assert (tmp_path / "vectors.npy").stat() == inode
    assert plain(load(FaissConfig(), tmp_path).search(ask(mapped[:3]), 3)) == [brute(mapped, q, 3) for q in mapped[:3]]


def test_broken_and_foreign_folders_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=r"faiss\.json.*build it again"):
        load(FaissConfig(), tmp_path)
    make(clustered(), FaissConfig("sq8")).save(tmp_path)
    np.save(tmp_path / "vectors.npy", clustered(50))
    with pytest.raises(IndexMismatch, match=r"disagree: \[\(50, 32\), \(2000, 32\)\]"):
        load(FaissConfig("sq8"), tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(RetrievalError, match="cannot be read") as caught:
        load(FaissConfig("sq8"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, rows, message",
    [
        (FaissConfig("ivf_flat", nlist=64), 50, r"IVF64,Flat needs at least 64 vectors.*there are 50"),
        (FaissConfig("ivf_pq"), 100, r"at least 256 vectors to train its 8-bit codes, there are 100"),
        (FaissConfig("ivf_pq", pq_m=5), 300, r"pq_m is 5; it must divide the 32 dimensions"),
        (FaissConfig("Magic9"), 50, r"'Magic9' cannot be built.*could not parse"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(config: FaissConfig, rows: int, message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as caught:
        make(clustered(rows), config)
    assert "\n" not in str(caught.value)


class FakeGpus:
    """What faiss-gpu would give: the same index, in half precision."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def add(self, vectors: np.ndarray) -> None:
        self._index.add(vectors.astype(np.float16).astype(np.float32))

    def search(self, queries: np.ndarray, k: int) -> Any:
        assert k <= 2048
        return self._index.search(queries, k)


@pytest.mark.parametrize("index", ["flat", "ivf_flat"])
def test_gpus_find_what_the_cpu_finds(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = clustered(3000), clustered(20, seed=5)
    make(vectors, FaissConfig(index)).save(tmp_path)
    there = FaissConfig(index, device="gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(RetrievalError, match="this FAISS sees none; install faiss-gpu"):
            load(there, tmp_path)
        monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
        monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda made, options: FakeGpus(made))
    engine = load(there, tmp_path)
    assert plain(engine.search(ask(queries), 10)) == plain(load(FaissConfig(index), tmp_path).search(ask(queries), 10))
    assert len(engine.search(ask(queries[:1]), 3000)[0].rows_K) <= 2048


@pytest.mark.parametrize(
    "string, message",
    [
        ("HNSW32,Flat", "HNSW32,Flat cannot be searched on a GPU; set faiss.device to cpu"),
        ("SQ8", "SQ8 cannot be searched on a GPU"),
        ("IVF64,PQ128x8", r"8-bit codes, 1, 2, .* 96 per vector; build it with faiss.pq_bits=8 and faiss.pq_m=96"),
        ("IVF64,PQ16x4", "faiss.pq_bits=8 and faiss.pq_m=16"),
        ("IVF4096_HNSW32,Flat", "cannot be searched on a GPU"),
    ],
)
def test_what_faiss_would_leave_on_the_cpu_or_has_no_kernel_for_is_refused(string: str, message: str) -> None:
    with pytest.raises(RetrievalError, match=message) as caught:
        check_gpu(FaissConfig(string, device="gpu"), string, 384)
    assert "\n" not in str(caught.value)


def test_gpus_take_the_kinds_they_know() -> None:
    for string in (
        "Flat",
        "IVF64,Flat",
        "IVF4k,SQ8",
        "OPQ32_64,IVF64,PQ32",
        "PCA64,Flat",
        "IVF64,SQfp16",
        "IVF64,PQ96x8",
    ):
        check_gpu(FaissConfig(string, device="gpu"), string, 384)
    with pytest.raises(RetrievalError, match="nprobe is 4096; on a GPU it is at most 2048"):
        check_gpu(FaissConfig("ivf_flat", nprobe=4096, device="gpu"), "IVF9000,Flat", 384)
    # 1024 dimensions make 128 codes of 8 bits by default, which no GPU kernel has: known before anything is encoded
    with pytest.raises(RetrievalError, match=r"faiss\.pq_m=64"):
        check(FaissConfig("ivf_pq", device="gpu"), 100_000, 1024)
    check(FaissConfig("ivf_pq"), 100_000, 1024)


def test_bad_settings_are_refused_and_automatic_ones_follow_their_rule() -> None:
    for bad, message in [
        ({"index": "magic"}, "'magic' is unknown; known: flat, sq8"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"device": "tpu"}, "known: cpu, gpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            FaissConfig(**bad)  # type: ignore[arg-type]
    # 4 * sqrt(1e6), 4000 // 39, one list at least
    assert [factory(FaissConfig("ivf_flat"), n, 8) for n in (10**6, 4000, 20)] == [
        "IVF4000,Flat",
        "IVF102,Flat",
        "IVF1,Flat",
    ]
    assert factory(FaissConfig("ivf_pq"), 10**6, 384) == "IVF4000,PQ48x8"
    assert factory(FaissConfig("ivf_pq"), 10**6, 100) == "IVF4000,PQ10x8"


@pytest.mark.parametrize(
    "index", ["flat", "hnsw", "ivf_flat", "ivf_pq", "sq8", "PCA16,SQfp16", "PCA16,IVF8,PQ8x4", "HNSW8_SQ8"]
)
def test_estimates_are_near_the_real_sizes(index: str, tmp_path: Path) -> None:
    vectors = clustered(4000)
    config = FaissConfig(index, pq_bits=4, nlist=8, ef_construction=16)
    make(vectors, config).save(tmp_path)
    sizes: dict[str, Any] = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    expected = estimate(config, 4000, 32)
    assert expected.disk_bytes == pytest.approx(sum(sizes.values()), rel=0.1)
    assert expected.memory_bytes == pytest.approx(sizes.get("index.faiss", sizes.get("vectors.npy")), rel=0.1)


def test_estimates_by_hand() -> None:
    # 21 million passages of E5-base, as others serve them: about 60 GiB, twice over in no case
    assert estimate(FaissConfig(), 21_000_000, 768) == Estimate(21_000_000 * 3072, 21_000_000 * 3072, 0, 0)
    sq8 = estimate(FaissConfig("sq8", keep_vectors=False), 1_000_000, 768)
    assert sq8.memory_bytes == sq8.disk_bytes == 768_000_000 + 8 * 768
    assert sq8.build_bytes == sq8.memory_bytes + 65_536 * 3072
    assert estimate(FaissConfig(device="gpu"), 1_000_000, 768).gpu_bytes == 1_536_000_000 + 3 * 2**29
