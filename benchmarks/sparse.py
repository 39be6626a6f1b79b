"""Which BM25 serves a corpus best: `python benchmarks/sparse.py [--corpus debian passages:1000000] [--engines ...]`.

Each engine indexes the same terms (of our English analysis) in a process of its own and answers the same queries: tantivy, as
`retrieval/bm25.py` uses it, and bm25s with its numpy and its numba backend. Corpora: `debian`, the packages this Debian machine
knows, without the sentence the query is made of; `passages:N`, N generated passages of 60 words from a Zipf-Mandelbrot vocabulary
(what English looks like without its stop words), queries of 6 words of one passage.

Quality is against exact BM25 in float64, added up here over all rows: overlap@10 (a row that ties with the tenth is as good),
and how many rankings are exact, ties by row. Rates are queries per second of wall time and, since other programs may share the
machine, of CPU time. A part that is already in the result file is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results_file import RESULTS, about, write_json
from retrieval.analysis import analyzer

K = 10
K1, B = 1.2, 0.75
BATCH = 64
Ranking = list[tuple[int, float]]
Search = Callable[[Sequence[str]], list[Ranking]]


# ---------------------------------------------------------------------------------------------------- corpora


def make_corpus(name: str, folder: Path, num_queries: int) -> None:
    """Writes `texts` (one a line), and `queries` as [[text, row], ...]."""
    folder.mkdir(parents=True)
    kind, _, size = name.partition(":")
    texts, queries = debian() if kind == "debian" else passages(int(size))
    with (folder / "texts").open("w", encoding="utf-8") as file:
        file.writelines(" ".join(text.split()) + "\n" for text in texts)
    chosen = random.Random(0).sample(queries, min(num_queries, len(queries)))
    (folder / "queries").write_text(json.dumps(chosen), encoding="utf-8")


def debian() -> tuple[list[str], list[tuple[str, int]]]:
    """Packages as documents; the summary, which no other package has, is held out of its document and is the query."""
    from tests.support.real_text import machine_packages, text, title

    packages = machine_packages()
    count = Counter(p.summary.lower() for p in packages)
    texts = [f"{title(p)} {text(p).replace(f'{p.name}: {p.summary}.', '', 1)}" for p in packages]
    queries = [
        (p.summary, row)
        for row, p in enumerate(packages)
        if count[p.summary.lower()] == 1 and len(p.summary.split()) > 3
    ]
    return texts, queries


def passages(size: int, words: int = 60, vocabulary: int = 300_000) -> tuple[Iterator[str], list[tuple[str, int]]]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng = np.random.default_rng(0)
    names = ["".join(syllables[s] for s in _digits(i + 5000, len(syllables))) for i in range(vocabulary)]
    chances = np.cumsum(1 / (np.arange(vocabulary) + 30))
    chosen = set(random.Random(1).sample(range(size), min(2000, size)))
    queries: list[tuple[str, int]] = []

    def draw() -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, size, 10_000):
            rows = np.searchsorted(chances, np.random.default_rng([2, first]).random((10_000, words)) * chances[-1])
            yield from enumerate(rows[: size - first], start=first)

    for row, ranks in draw():
        if row in chosen:
            queries.append((" ".join(names[i] for i in rng.choice(ranks, 6, replace=False)), row))
    return (" ".join([names[i] for i in ranks.tolist()]) for _, ranks in draw()), queries


def _digits(number: int, base: int) -> list[int]:
    digits = []
    while number:
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits


def _texts(folder: Path) -> Iterator[str]:
    with (folder / "texts").open(encoding="utf-8") as file:
        yield from file


# ---------------------------------------------------------------------------------------------------- engines


def build_tantivy(folder: Path, out: Path) -> None:
    from retrieval.bm25 import Bm25Config, build

    num_rows = sum(1 for _ in _texts(folder))
    build(Bm25Config(), out, lambda: _texts(folder), None, num_rows)


def load_tantivy(out: Path) -> Search:
    from retrieval.bm25 import Bm25Config, load
    from retrieval.engine import Queries

    engine = load(Bm25Config(), out)

    def search(texts: Sequence[str]) -> list[Ranking]:
        return [
            list(zip(f.rows_K.tolist(), f.scores_K.tolist(), strict=True))
            for f in engine.search(Queries(tuple(texts)), K)
        ]

    return search


def build_bm25s(folder: Path, out: Path) -> None:
    import bm25s

    terms, vocabulary = analyzer("english"), dict[str, int]()
    rows = [[vocabulary.setdefault(t, len(vocabulary)) for t in terms(text)] for text in _texts(folder)]
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index((rows, vocabulary), show_progress=False)
    index.save(str(out), show_progress=False)


def load_bm25s(out: Path, backend: str = "numpy") -> Search:
    import bm25s

    index = bm25s.BM25.load(str(out), mmap=True, show_progress=False)
    index.backend = backend
    if backend == "numba":
        index.activate_numba_scorer()
    terms = analyzer("english")

    def search(texts: Sequence[str]) -> list[Ranking]:
        tokens = [[t for t in terms(text) if t in index.vocab_dict] for text in texts]
        kept = [t for t in tokens if t]
        if not kept:
            return [[] for _ in tokens]
        found = index.retrieve(kept, k=K, show_progress=False, backend_selection=backend)
        rankings = iter([list(zip(r.tolist(), s.tolist(), strict=True)) for r, s in zip(*found, strict=True)])
        return [[(r, s) for r, s in next(rankings) if s > 0] if t else [] for t in tokens]

    return search


ENGINES: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], Search]]] = {
    "tantivy": (build_tantivy, load_tantivy),
    "bm25s": (build_bm25s, load_bm25s),
    "bm25s-numba": (build_bm25s, lambda out: load_bm25s(out, "numba")),
}


# --------------------------------------------------------------------------------------------------- reference


def make_reference(folder: Path) -> None:
    """The exact (row, score) lists of the queries, best first and long enough to hold the ties with the tenth."""
    terms = analyzer("english")
    asked = [terms(text) for text, _ in json.loads((folder / "queries").read_text(encoding="utf-8"))]
    wanted = {t: ([], []) for query in asked for t in query}  # type: dict[str, tuple[list[int], list[int]]]
    lengths = []
    for row, text in enumerate(_texts(folder)):
        found = terms(text)
        lengths.append(len(found))
        for term in wanted.keys() & set(found):
            wanted[term][0].append(row)
            wanted[term][1].append(found.count(term))
    norms_N = K1 * (1 - B + B * np.array(lengths) / np.mean(lengths))
    rankings = []
    for query in asked:
        scores_N = np.zeros(len(lengths))
        for term in sorted(query):
            rows, counts = (np.array(x, dtype=np.int64) for x in wanted[term])
            idf = np.log(1 + (len(lengths) - len(rows) + 0.5) / (len(rows) + 0.5))
            scores_N[rows] += idf * counts / (counts + norms_N[rows])
        scores_N = np.round(scores_N, 5)  # so that what is equal but for rounding ties
        kth = max(np.partition(scores_N, -K)[-K], 1e-9)
        rows = np.flatnonzero(scores_N >= kth)
        rows = rows[np.argsort(-scores_N[rows], kind="stable")]
        rankings.append([(int(r), float(scores_N[r])) for r in rows[:1000]])
    with (folder / "reference").open("wb") as file:
        pickle.dump(rankings, file)


# ---------------------------------------------------------------------------------------------------- measures


def measure_build(engine: str, folder: Path, out: Path) -> dict[str, Any]:
    before = _memory()["peak_mb"]
    wall, cpu = time.perf_counter(), time.process_time()
    ENGINES[engine][0](folder, out)
    return {
        "build_s": round(time.perf_counter() - wall, 1), "build_cpu_s": round(time.process_time() - cpu, 1),
        "build_peak_mb": round(_memory()["peak_mb"] - before),
        "disk_mb": round(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6, 1),
    }  # fmt: skip


def measure_search(engine: str, folder: Path, out: Path) -> dict[str, Any]:
    queries = json.loads((folder / "queries").read_text(encoding="utf-8"))
    with (folder / "reference").open("rb") as file:
        reference = pickle.load(file)  # written by the parent of this process
    texts = [text for text, _ in queries]
    before = _memory()
    started = time.perf_counter()
    search = ENGINES[engine][1](out)
    search(texts[:1])
    ready_s = time.perf_counter() - started
    search(texts[:BATCH])
    singles: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    found = []
    for text in texts:
        begun = time.perf_counter()
        found += search([text])
        singles.append(time.perf_counter() - begun)
    single_s, single_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    batched = [r for batch in batches for r in search(batch)]
    batch_s, batch_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    wall = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(search, batches))
    threads_s = time.perf_counter() - wall
    after = _memory()
    n = len(texts)
    return {
        "ready_s": round(ready_s, 2),
        "own_memory_mb": round(after["own_mb"] - before["own_mb"], 1),
        "mapped_mb": round(after["mapped_mb"] - before["mapped_mb"], 1),
        "single_qps": round(n / single_s), "single_cpu_qps": round(n / single_cpu_s),
        "batch_qps": round(n / batch_s), "batch_cpu_qps": round(n / batch_cpu_s), "two_threads_qps": round(n / threads_s),
        "p50_ms": round(1e3 * float(np.median(singles)), 3), "p99_ms": round(1e3 * float(np.quantile(singles, 0.99)), 3),
        "recall_at_1": _mean([[r for r, _ in f[:1]] == [row] for f, (_, row) in zip(found, queries, strict=True)]),
        "recall_at_10": _mean([row in [r for r, _ in f] for f, (_, row) in zip(found, queries, strict=True)]),
        "overlap_at_10": _mean([_overlap(f, best) for f, best in zip(found, reference, strict=True)]),
        "exact_rankings": _mean([[r for r, _ in f] == [r for r, _ in best[:K]] for f, best in zip(found, reference, strict=True)]),
        "same_in_batches": found == batched,
    }  # fmt: skip


def _overlap(found: Ranking, best: Ranking) -> float:
    size = min(K, len(best))
    return min(1.0, len({r for r, _ in found} & {r for r, _ in best}) / size) if size else float(not found)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _memory() -> dict[str, float]:
    """MB of this process: its own (anonymous), of mapped files, and the peak of all."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[key].split()[0]) / 1e3
        for name, key in (("own_mb", "RssAnon"), ("mapped_mb", "RssFile"), ("peak_mb", "VmHWM"))
    }


# -------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=["debian", "passages:1000000"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--storage", type=Path, help="where corpora and indexes lie meanwhile; kept, so that a run goes on"
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        stage, engine, folder, out = given.child
        if stage == "reference":
            make_reference(Path(folder))
            return 0
        print(json.dumps((measure_build if stage == "build" else measure_search)(engine, Path(folder), Path(out))))
        return 0
    result = RESULTS / "sparse.json"
    kept = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    figures: dict[str, Any] = kept.get("figures", {})
    with tempfile.TemporaryDirectory() as temporary:
        storage = given.storage or Path(temporary)
        for name in given.corpus:
            todo = [e for e in given.engines if given.again or e not in figures.get(name, {})]
            folder = storage / name.replace(":", "-")
            if todo and not folder.exists():
                partial = folder.with_name(folder.name + ".partial")
                make_corpus(name, partial, given.queries)
                _child("reference", "-", partial, partial)
                partial.rename(folder)
            for engine in todo:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    out = Path(place) / "index"
                    built = _child("build", engine, folder, out)
                    found = {**built, **_child("search", engine, folder, out)}
                found["command"] = {key: about()[key] for key in ("command", "date", "commit", "load_5min")}
                figures.setdefault(name, {})[engine] = found
                write_json(result, {**about(), "figures": figures})
    for name, table in figures.items():
        print(f"\n{name}")
        columns = [key for key in next(iter(table.values())) if key != "command"]
        for key in columns:
            print(f"  {key:<16}" + "".join(f"{row.get(key)!s:>14}" for row in table.values()))
        print(f"  {'':<16}" + "".join(f"{engine:>14}" for engine in table))
    return 0


def _child(stage: str, engine: str, folder: Path, out: Path) -> dict[str, Any]:
    print(f"{stage} {engine} {folder.name}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--child", stage, engine, str(folder), str(out)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.stdout.strip() else {}


if __name__ == "__main__":
    sys.exit(main())
