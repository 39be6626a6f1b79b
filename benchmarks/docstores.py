"""Which store should hold a corpus's pages: SQLite, LMDB or Arrow (memory-mapped), with the same documents and the same questions.

`python benchmarks/docstores.py [--documents 100000]` prints a table and writes `benchmarks/results/docstores.json`. Measured: seconds to build
from documents in no order, bytes on disk, fetches of 5 random pages per second by one process and by four, their p50 and p99, and what four
processes hold in memory (their private pages, and the pages they share). Gumshoe keeps the code of the winner alone (`retrieval/docstore.py`);
the others stand here, as short as they can be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agents.types import Document  # noqa: E402
from benchmarks.results_file import RESULTS, write_result  # noqa: E402
from retrieval.docstore import DocStore  # noqa: E402

PAGES, PROCESSES = 5, 4
Get = Callable[[Sequence[str]], list[Document | None]]


def documents(count: int, seed: int = 0) -> Iterator[Document]:
    """Pages of 50 to 500 words, in no order of id."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(20_000)]
    numbers = list(range(count))
    rng.shuffle(numbers)
    for n in numbers:
        yield Document(
            f"page-{n:08}",
            " ".join(rng.choices(words, k=4)),
            " ".join(rng.choices(words, k=rng.randint(50, 500))),
            {"n": n},
        )


def sqlite_build(path: Path, pages: Iterator[Document]) -> None:
    DocStore.build(path, pages).close()


def sqlite_open(path: Path) -> Get:
    return DocStore(path).get


def _packed(d: Document) -> bytes:
    return json.dumps([d.id, d.title, d.text, dict(d.meta)], ensure_ascii=False).encode()


def lmdb_build(path: Path, pages: Iterator[Document]) -> None:
    import lmdb

    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 36, sync=False, metasync=False) as env,
        env.begin(write=True) as transaction,
    ):
        for page in pages:
            transaction.put(page.id.encode(), _packed(page))
    env = lmdb.open(str(path), subdir=False, map_size=1 << 36)
    env.sync(True)
    env.close()


def lmdb_open(path: Path) -> Get:
    import lmdb

    env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, map_size=1 << 36, readahead=False)

    def get(ids: Sequence[str]) -> list[Document | None]:
        with env.begin(buffers=True) as transaction:
            found = (transaction.get(i.encode()) for i in ids)
            return [None if f is None else Document(*json.loads(bytes(f))) for f in found]

    return get


def arrow_build(path: Path, pages: Iterator[Document]) -> None:
    """Sorted by id, so that a page is found by bisection; sorting needs them all in memory, which the others do not."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.large_string()) for name in ("id", "title", "text", "meta")])
    rows = sorted((p.id, p.title, p.text, json.dumps(dict(p.meta))) for p in pages)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(
            pa.record_batch([pa.array(c, pa.large_string()) for c in zip(*rows, strict=True)], schema=schema)
        )


def arrow_open(path: Path) -> Get:
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    ids, *rest = (batch.column(i) for i in range(4))

    def find(id_: str) -> Document | None:
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if ids[middle].as_py() < id_ else (low, middle)
        if low == len(ids) or ids[low].as_py() != id_:
            return None
        title, text, meta = (c[low].as_py() for c in rest)
        return Document(id_, title, text, json.loads(meta))

    return lambda wanted: [find(i) for i in wanted]


STORES: dict[str, tuple[Callable[[Path, Iterator[Document]], None], Callable[[Path], Get]]] = {
    "sqlite": (sqlite_build, sqlite_open), "lmdb": (lmdb_build, lmdb_open), "arrow": (arrow_build, arrow_open),
}  # fmt: skip


def fetch(name: str, path: Path, count: int, seconds: float, seed: int, out: Any, gate: Any) -> None:
    """One process: fetches of random pages for a while."""
    get, rng = STORES[name][1](path), random.Random(seed)
    get([f"page-{0:08}"])
    gate.wait()
    times_s: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ids = [f"page-{rng.randrange(count):08}" for _ in range(PAGES)]
        began = time.perf_counter()
        found = get(ids)
        times_s.append(time.perf_counter() - began)
        assert [d.id for d in found if d] == ids
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {k: int(fields[k].split()[0]) for k in ("Private_Dirty", "Private_Clean", "Shared_Clean", "Pss", "Rss")}
    gate.wait()
    out.put((times_s, kib))


def measure(name: str, path: Path, count: int, processes: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    out, gate = context.Queue(), context.Barrier(processes)
    running = [context.Process(target=fetch, args=(name, path, count, seconds, i, out, gate)) for i in range(processes)]
    for process in running:
        process.start()
    found = [out.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    times_s = sorted(t for times, _ in found for t in times)
    return {
        "fetches_per_s": len(times_s) / seconds,
        "p50_us": times_s[len(times_s) // 2] * 1e6,
        "p99_us": times_s[len(times_s) * 99 // 100] * 1e6,
        "rss_mb": sum(kib["Rss"] for _, kib in found) / processes / 1024,
        "private_mb": sum(kib["Private_Dirty"] + kib["Private_Clean"] for _, kib in found) / processes / 1024,
        "pss_mb": sum(kib["Pss"] for _, kib in found) / processes / 1024,
    }


def _earlier(count: int) -> dict[str, Any]:
    """What other stores came to with as many documents, when they are measured one by one."""
    try:
        figures = json.loads((RESULTS / "docstores.json").read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(figures["stores"]) if figures["documents"] == count else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    args = parser.parse_args(argv)
    rows, pages = _earlier(args.documents), list(documents(args.documents))
    for name in args.stores:
        with tempfile.TemporaryDirectory(prefix="docstores-") as folder:
            path = Path(folder) / name
            began = time.perf_counter()
            STORES[name][0](path, iter(pages))
            row = {"build_s": time.perf_counter() - began, "disk_mb": path.stat().st_size / 1e6}
            for processes in (1, PROCESSES):
                row |= {
                    f"{k}_{processes}": v
                    for k, v in measure(name, path, args.documents, processes, args.seconds).items()
                }
        rows[name] = {k: round(v, 1) for k, v in row.items()}
        print(f"{name:8}" + "  ".join(f"{k} {v:,.1f}" for k, v in rows[name].items()), flush=True)
    write_result("docstores", {"documents": args.documents, "pages": PAGES, "stores": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
