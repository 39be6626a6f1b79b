"""`gumshoe index`: folders that appear whole, builds that go on, estimates, and worlds over them."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.types import Document, Query
from cluster.cli import main
from cluster.errors import UserError
from cluster.index import Reporter, columns_of
from cluster.world import CorpusWorldConfig, WorldSource, open_world
from gumshoe import ROOT
from retrieval.backend import BackendConfig, Corpus, build_backend, open_backend
from retrieval.config import KINDS
from retrieval.errors import RetrievalError
from retrieval.estimate import measure
from retrieval.faiss_config import FaissConfig, smaller
from retrieval.manifest import Manifest
from retrieval.remote import RemoteConfig
from tests.builders import write_documents

SMALL = "retrieval.encoder.dim=64"


def corpus(n: int, words: int = 30) -> list[Document]:
    rng = random.Random(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "lnrst"]
    return [Document(f"d{i:05}", rng.choice(vocabulary), " ".join(rng.choices(vocabulary, k=words))) for i in range(n)]


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    write_documents(tmp_path / "pages.jsonl", corpus(50))
    return tmp_path / "pages.jsonl"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


async def test_one_command_from_files_to_an_index(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i"
    command = ["index", str(pages), SMALL, "--backend", "faiss", "--out", str(out), "--shards", "3"]
    assert main(command) == 0
    assert "50 documents, 50 passages, faiss" in capsys.readouterr().out
    opened = open_backend(BackendConfig(kind="auto"), out)
    assert [r.rows for r in Manifest.read(out).legs["faiss"].shards] == [16, 17, 17]
    (hits,) = await opened.search([Query(corpus(50)[7].text, 1)])
    assert hits[0].doc_id == "d00007"
    assert main(command) == 0
    assert "up to date, nothing to do" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "pages.jsonl"]


def test_skipped_items_columns_and_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "c.jsonl", str(tmp_path / "i")
    path.write_text('{"docid": "a", "body": "one"}\nbroken\n{"docid": "b", "body": "two"}\n')
    command = ["index", str(path), "--out", out, "--config", "demo", SMALL, "--columns", "id=docid,text=body"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: not a JSON object" in error and error.count("\n") == 1 and not Path(out).exists()
    assert main([*command, "--malformed", "skip"]) == 0
    shown = capsys.readouterr().out
    assert f"skipped {path}:2: " in shown and "2 documents" in shown and "1 items skipped" in shown
    assert main([*command, "--malformed", "skip"]) == 0 and "1 items skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "magic"], "unknown retrieval backend 'magic'"),
        (["--backend", "live"], "has no index"),
        (["--backend", "bm25", "--shards", "2"], "cannot be cut into shards"),
        (["retrieval.kidn=bm25"], "did you mean 'retrieval.kind'"),
        (["--columns", "id"], "not of the form"),
        (["--columns", "ids=x"], "columns names 'ids'"),
        (["retrieval.chunk.unit=pages"], "one of none, words, characters"),
        (["missing.jsonl"], "unrecognized argument"),
    ],
)
def test_mistakes_are_one_line(
    pages: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["index", str(pages), "--out", str(pages.parent / "i"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [p.name for p in pages.parent.iterdir()] == ["pages.jsonl"]


def gumshoe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "index", *arguments]


def test_a_killed_build_goes_on_and_gives_the_same_index(tmp_path: Path) -> None:
    path, out, partial = tmp_path / "c.jsonl", tmp_path / "i", tmp_path / ".i.partial"
    write_documents(path, corpus(5000, words=150))
    command = gumshoe(str(path), SMALL, "retrieval.chunk.unit=words", "retrieval.chunk.size=100", "--out", str(out))
    vectors, one_block = partial / "faiss" / "000" / "vectors.npy", 512 * 64 * 4
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not vectors.exists() or vectors.stat().st_size <= one_block:
        assert process.poll() is None and time.monotonic() < deadline, "the build ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and vectors.stat().st_size < 10_000 * 64 * 4
    stored, inode = (partial / "documents.sqlite").stat().st_mtime_ns, vectors.stat().st_ino
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=180)
    assert (out / "documents.sqlite").stat().st_mtime_ns == stored, "documents are not read again"
    assert (out / "faiss" / "000" / "vectors.npy").stat().st_ino == inode, "vectors are not begun again"
    assert not partial.exists()
    subprocess.run([*command[:-1], str(tmp_path / "j")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=180)
    assert content(out) == content(tmp_path / "j")


def test_an_unfinished_build_of_something_else_is_not_gone_on_with(pages: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".i.partial"
    (partial / "faiss").mkdir(parents=True)
    (partial / "stages.json").write_text(json.dumps({"key": "other", "stages": {"documents": {"corpus": "x"}}}))
    assert main(["index", str(pages), SMALL, "--out", str(tmp_path / "i")]) == 0
    assert Manifest.read(tmp_path / "i").documents == 50 and not partial.exists()


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "i"
    write_documents(path, corpus(2500, words=5))
    command = gumshoe(str(path), SMALL, "--out", str(out))

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))  # vectors take 640,128 bytes

    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=little, timeout=180)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "no space left" in failed.stderr, failed.stderr
    assert str(out) in failed.stderr and not out.exists()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=180)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "i"]


def test_two_builds_of_one_place_wait_for_each_other(pages: Path, tmp_path: Path) -> None:
    commands = [gumshoe(str(pages), SMALL, "--out", str(tmp_path / "i")) for _ in range(2)]
    running = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.PIPE, text=True) for c in commands]
    shown = [process.communicate(timeout=180)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("built in" in s for s in shown) == 1 and sum("nothing to do" in s for s in shown) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "pages.jsonl"]


@pytest.mark.parametrize("kind", ["faiss", "bm25", "hybrid"])
def test_a_dry_run_tells_what_is_needed_and_builds_nothing(
    pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    command = ["index", str(pages), "--backend", kind, "--out", str(tmp_path / "i")]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "corpus   50 documents, 50 passages" in shown and "fits     yes" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["pages.jsonl"]
    if kind == "faiss":
        assert "faiss 205 kB" in shown  # 50 * 1024 * 4 bytes
        monkeypatch.setattr("cluster.index.free_memory", lambda: 1000)
        assert main([*command, "--dry-run"]) == 2
        assert re.search(r"fits     no: memory 20\d kB is more than the 1 kB free here", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("faiss", "says"),
    [
        (["nlist=900", "index=ivf_flat"], "faiss"),
        (["index=sq8", "keep_vectors=false"], "; 256 kB more while it is built"),
        (["index=ivf_flat", "device=gpu"], "GB of the GPUs"),
    ],
)
def test_a_dry_run_of_a_trained_index_goes_by_a_smaller_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, faiss: list[str], says: str
) -> None:
    monkeypatch.setattr("retrieval.estimate._TRIAL_ROWS", (100, 400))
    write_documents(tmp_path / "c.jsonl", corpus(1000, words=4))
    settings = [f"retrieval.faiss.{setting}" for setting in faiss]
    assert main(["index", str(tmp_path / "c.jsonl"), SMALL, *settings, "--out", str(tmp_path / "i"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "fits     yes" in shown and says in shown


def test_the_memory_of_a_sparse_build_is_counted(pages: Path, tmp_path: Path) -> None:
    found = measure(BackendConfig(kind="bm25"), Corpus([pages]))
    assert found.build_bytes == 50 * 32 * 14  # 30 words, and the title twice


def test_a_smaller_index_of_the_same_kind_by_hand() -> None:
    of = lambda index, rows, **more: smaller(FaissConfig(index=index, **more), 1_000_000, 64, rows)  # noqa: E731
    assert of("flat", 1000)[1:] == (1000, 1000.0)
    config, rows, factor = of("ivf_pq", 1000, nlist=4000)
    assert (config.index, rows, factor) == ("IVF4,PQ8x8", 1000, 1_000_000.0)
    config, rows, factor = of("OPQ16,IVF65536_HNSW32,PQ16x12", 1000)  # 12-bit codes train on 4096 rows
    assert (config.index, rows) == ("OPQ16,IVF268_HNSW32,PQ16x12", 4096)
    assert smaller(FaissConfig(), 10, 64, 1000)[1:] == (10, 1.0)


def test_progress_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    report = Reporter(stream)
    for second in range(11):
        now[0] = float(second)
        report("vectors", 1000 + 100 * second, 2000)
    report("faiss index", 0, 0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "vectors        1,200 of 2,000, 100/s, 8s left"
    assert lines[-2:] == ["vectors        2,000 of 2,000, 100/s", "faiss index"] and len(lines) == 6


def test_columns_are_pairs() -> None:
    assert columns_of("") == {} and columns_of("id = a, text=b=c") == {"id": "a", "text": "b=c"}
    with pytest.raises(UserError, match="id=docid"):
        columns_of("id=")


def tasks(tmp_path: Path, gold: str = "d00003") -> str:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"id": "t", "question": "Who?", "answers": ["x"], "gold_docs": [gold]}) + "\n")
    return str(path)


def test_a_world_over_any_corpus_or_over_a_built_index(pages: Path, tmp_path: Path) -> None:
    small = BackendConfig()
    small.encoder.dim = 64
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text("# Title\nText.")
    opened = open_world(
        WorldSource("jsonl", jsonl=CorpusWorldConfig([str(folder)], tasks(tmp_path, "a.md"))), small, tmp_path, tmp_path
    )
    assert Manifest.read(opened.index_dir).documents == 1

    assert main(["index", str(pages), SMALL, "--out", str(tmp_path / "i")]) == 0
    built = CorpusWorldConfig(tasks=tasks(tmp_path), index=str(tmp_path / "i"))
    for config in (small, BackendConfig(kind="auto")):
        world = open_world(WorldSource("jsonl", jsonl=built), config, tmp_path, tmp_path)
        assert world.index_dir == str(tmp_path / "i") and [t.id for t in world.train_tasks] == ["t"]
    with pytest.raises(RetrievalError, match=r"encoder\.dim: built with 64, asked for 0"):
        open_world(WorldSource("jsonl", jsonl=built), BackendConfig(), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="'nobody' is not in the corpus"):
        tasks(tmp_path, "nobody")
        open_world(WorldSource("jsonl", jsonl=built), small, tmp_path, tmp_path)
    remote = BackendConfig(kind="remote", remote=RemoteConfig(url="http://127.0.0.1:1"))
    assert open_world(WorldSource("jsonl", jsonl=built), remote, tmp_path, tmp_path).index_dir == ""
    with pytest.raises(UserError, match=r"either world\.jsonl\.corpus or world\.jsonl\.index"):
        open_world(WorldSource("jsonl", jsonl=CorpusWorldConfig(tasks=built.tasks)), small, tmp_path, tmp_path)


def test_runs_that_read_a_corpus_otherwise_have_folders_of_their_own(tmp_path: Path) -> None:
    path, small = tmp_path / "c.jsonl", BackendConfig()
    small.encoder.dim = 64
    path.write_text('{"id": "d00003", "text": "one", "body": "two"}\n')
    worlds = [
        CorpusWorldConfig([str(path)], tasks(tmp_path), columns=columns, malformed=malformed)
        for columns, malformed in (({}, "error"), ({"text": "body"}, "error"), ({}, "skip"))
    ]
    opened = [open_world(WorldSource("jsonl", jsonl=w), small, tmp_path, tmp_path).index_dir for w in worlds]
    assert len(set(opened)) == 3


async def test_a_hybrid_folder_serves_its_legs_too(tmp_path: Path) -> None:
    config = BackendConfig(kind="hybrid", shards=2)
    config.encoder.dim = 64
    backend = build_backend(config, corpus(40), tmp_path / "i")
    assert [len(leg.shards) for _, leg in sorted(Manifest.read(tmp_path / "i").legs.items())] == [1, 2]
    assert "auto" in KINDS and backend.info().name == "hybrid" and backend.info().num_docs == 40
    query = [Query(corpus(40)[9].text, 3)]
    (fused,) = await backend.search(query)
    assert fused[0].doc_id == "d00009"
    for kind in config.hybrid.legs:
        alone = BackendConfig(kind=kind, encoder=config.encoder)
        (hits,) = await open_backend(alone, tmp_path / "i").search(query)
        assert hits[0].doc_id == "d00009"
    assert (await backend.get(["d00001"]))[0] == corpus(40)[1]
    await backend.close()


def test_help_needs_nothing_heavy() -> None:
    script = "import sys; from cluster.cli import build_parser; build_parser(); print([m for m in ('numpy', 'ray', 'pyarrow') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert out.stdout.strip() == "[]"
