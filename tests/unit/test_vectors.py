"""Encoding a corpus into one file: blocks, resuming, what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gumshoe import ROOT
from retrieval.encoders import EncoderConfig, HashingEncoder
from retrieval.errors import RetrievalError
from retrieval.vectors import encode_rows

ROWS, BLOCK = 103, 10


def texts(first: int = 0) -> Iterator[str]:
    return (f"text {i} of {i * i}" for i in range(first, ROWS))


def encoder(dim: int = 16) -> HashingEncoder:
    return HashingEncoder(EncoderConfig(dim=dim))


def test_all_rows_in_order_and_none_twice(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "v.npy"
    vectors = encode_rows(encoder(), texts, ROWS, path, block=BLOCK, progress=lambda *p: seen.append(p))
    assert np.array_equal(vectors, encoder().encode_documents(list(texts())))
    assert isinstance(vectors, np.memmap) and not vectors.flags.writeable
    assert seen == [(min(i, ROWS), ROWS) for i in range(0, ROWS + BLOCK, BLOCK)]

    def never(first: int) -> Iterator[str]:
        raise AssertionError("all rows are there")

    assert np.array_equal(encode_rows(encoder(), never, ROWS, path, block=BLOCK), vectors)


@pytest.mark.parametrize("bytes_kept", [0, 5, 128, 128 + 7 * 64, 128 + 30 * 64, 128 + 35 * 64 + 3])
def test_a_cut_file_goes_on_to_the_same_bytes(bytes_kept: int, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    encode_rows(encoder(), texts, ROWS, path, block=BLOCK)
    whole = path.read_bytes()
    path.write_bytes(whole[:bytes_kept])
    asked: list[int] = []

    def counted(first: int) -> Iterator[str]:
        asked.append(first)
        return texts(first)

    encode_rows(encoder(), counted, ROWS, path, block=BLOCK)
    assert path.read_bytes() == whole
    assert asked == [max(0, bytes_kept - 128) // 64 // BLOCK * BLOCK]


def test_a_killed_encoding_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/unit")
import test_vectors as t
def slow(first):
    for text in t.texts(first):
        time.sleep(0.01)
        yield text
t.encode_rows(t.encoder(), slow, t.ROWS, Path(sys.argv[1]), block={BLOCK})
"""
    path = tmp_path / "v.npy"
    child = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_size < 128 + 2 * BLOCK * 64:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    started: list[int] = []
    encode_rows(encoder(), texts, ROWS, path, block=BLOCK, progress=lambda done, total: started.append(done))
    encode_rows(encoder(), texts, ROWS, tmp_path / "whole.npy", block=BLOCK)
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert 2 * BLOCK <= started[0] < ROWS


@pytest.mark.parametrize("change", ["encoder", "corpus", "block", "note"])
def test_vectors_of_others_are_begun_anew(change: str, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    encode_rows(encoder(), texts, ROWS, path, corpus="a", block=BLOCK)
    if change == "note":
        (tmp_path / "v.npy.json").write_text("{")
    asked: list[int] = []

    def counted(first: int) -> Iterator[str]:
        asked.append(first)
        return texts(first)

    model, block = encoder(32 if change == "encoder" else 16), 7 if change == "block" else BLOCK
    corpus = "b" if change == "corpus" else "a"
    vectors = encode_rows(model, counted, ROWS, path, corpus=corpus, block=block)
    assert asked == [0] and vectors.shape == (ROWS, model.dim)
    encode_rows(model, counted, ROWS, path, corpus=corpus, block=block)
    assert asked == [0]


@pytest.mark.parametrize(
    "wrong, message", [(ROWS + 1, "gave 103 texts for 104 rows"), (ROWS - 1, "more texts than 102 rows")]
)
def test_a_corpus_that_changed_is_refused(wrong: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=message):
        encode_rows(encoder(), texts, wrong, tmp_path / "v.npy", block=BLOCK)
