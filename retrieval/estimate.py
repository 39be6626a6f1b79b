"""What an index will need, measured on a sample of its corpus with the encoder and the store that will build it.

Invariants: nothing is left behind; reading stops after `READ_S`, encoding after `ENCODE_S`, and the trial index grows only while it takes less than
`TRIAL_S`, so the answer comes within a minute or so for a corpus of any size; what could not be seen is scaled up from what was.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agents.types import Document
from retrieval import faiss_config
from retrieval.analysis import indexed_text
from retrieval.backend import Corpus
from retrieval.build import ENGINES
from retrieval.chunks import passages
from retrieval.config import BackendConfig, is_dense, legs_of
from retrieval.corpus import CorpusReport, corpus_files
from retrieval.docstore import DocStore
from retrieval.encoders import make_encoder

READ_S, ENCODE_S, TRIAL_S = 20.0, 20.0, 1.0
SAMPLE = 1000
_BATCH = 64
_TRIAL_ROWS = (1000, 20_000)
"""Of a trial index: the first, and the largest."""
_BM25_WORD, _BM25_MOST = 14, 3_500_000_000
"""Bytes that the writer of the sparse index holds per word, and all together."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole index."""

    documents: int
    passages: int
    whole: bool
    """Whether the whole corpus was read, so that the numbers above are counts."""
    disk_bytes: dict[str, int]
    """By part."""
    memory_bytes: int
    """To serve it, all that a search may touch held in memory; shared by the processes of a node."""
    build_bytes: int
    """Memory at the peak of building, besides the encoder's."""
    build_disk_bytes: int
    """More on disk at the peak of building."""
    gpu_bytes: int
    """Over all GPUs together, to serve it from there; 0 when none is used."""
    seconds: dict[str, float]
    """By stage."""


def measure(config: BackendConfig, corpus: Corpus) -> Estimate:
    """Raises what reading, encoder and index raise; CorpusError for an item that does not fit, as asked."""
    report, rng = CorpusReport(), random.Random(0)
    sample: list[Document] = []
    began, whole = time.monotonic(), True
    for document in corpus.read(report):
        # every document seen so far is in the sample with the same chance
        slot = rng.randrange(report.documents)
        if len(sample) < SAMPLE:
            sample.append(document)
        elif slot < SAMPLE:
            sample[slot] = document
        if time.monotonic() - began > READ_S:
            whole = False
            break
    read_s = time.monotonic() - began
    total = sum(f.stat().st_size for f in corpus_files(corpus.paths))
    scale = 1.0 if whole else max(1.0, total / max(1, report.bytes_read))
    num_documents = round(report.documents * scale)
    cuts = [passages(d.text, config.chunk) for d in sample]
    texts = [
        indexed_text(d.title, d.text[start:end], config.title_weight)
        for d, spans in zip(sample, cuts, strict=True)
        for start, end in spans
    ]
    num_rows = round(num_documents * len(texts) / len(sample))
    by_document, by_row = num_documents / len(sample), num_rows / len(texts)
    disk, seconds = {}, {"read": read_s * scale}
    memory = build = build_disk = gpu = 0
    with tempfile.TemporaryDirectory(prefix="gumshoe-estimate-") as folder:
        path = Path(folder) / "store"
        began = time.monotonic()
        DocStore.build(path, sample).close()
        seconds["store"] = (time.monotonic() - began) * by_document
        disk["documents"] = round(path.stat().st_size * by_document)
        ids = sum(len(d.id.encode()) for d in sample) / len(sample) + 8
        disk["rows"] = round(num_documents * ids + (12 * num_rows if config.chunk.unit != "none" else 0))
        memory += disk["rows"]
        for leg in legs_of(config):
            if is_dense(config, leg):
                dim, seconds["encode"] = _encoding(config, texts, num_rows)
            if leg == "faiss":
                shards = min(config.shards, num_rows)
                rows = -(-num_rows // shards)
                needs = faiss_config.estimate(config.faiss, rows, dim)  # each has a number of lists of its own
                disk[leg], gpu = shards * needs.disk_bytes, shards * needs.gpu_bytes
                memory += shards * needs.memory_bytes
                build, build_disk = max(build, needs.build_bytes), needs.build_disk_bytes  # one shard at a time
                seconds[leg] = shards * _indexing(config, rows, dim, Path(folder) / leg)
            elif leg in ENGINES:
                place = Path(folder) / leg
                began = time.monotonic()
                engine = ENGINES[leg][0](config, place, lambda: iter(texts), None, len(texts))
                engine.save(place)
                seconds[leg] = (time.monotonic() - began) * by_row
                disk[leg] = round(sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) * by_row)
                memory += disk[leg]
                words = sum(len(text.split()) for text in texts)
                build = max(build, min(_BM25_MOST, round(words * by_row * _BM25_WORD)))
    return Estimate(num_documents, num_rows, whole, disk, memory, build, build_disk, gpu, seconds)


def _encoding(config: BackendConfig, texts: list[str], num_rows: int) -> tuple[int, float]:
    """(dimension, seconds for all rows)"""
    encoder, fitted_s = make_encoder(config.encoder), 0.0
    began = time.monotonic()
    if hasattr(encoder, "fit"):
        encoder.fit(texts)
        fitted_s = (time.monotonic() - began) / len(texts)
    encoder.encode_documents(texts[:1])  # the first call loads the model
    began, done = time.monotonic(), 0
    while done < len(texts) and time.monotonic() - began < ENCODE_S:
        encoder.encode_documents(texts[done : done + _BATCH])
        done = min(len(texts), done + _BATCH)
    return encoder.dim, num_rows * (fitted_s + (time.monotonic() - began) / done)


def _indexing(config: BackendConfig, num_rows: int, dim: int, folder: Path) -> float:
    """Seconds to index all vectors, from smaller indexes over random ones; what trains on a sample takes rather less."""
    wanted, most = _TRIAL_ROWS
    folder.mkdir()
    while True:
        small, rows, factor = faiss_config.smaller(config.faiss, num_rows, dim, wanted)
        vectors_ND = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        began = time.monotonic()
        ENGINES["faiss"][0](replace(config, faiss=small), folder, lambda: iter(()), vectors_ND, rows)
        took_s = time.monotonic() - began
        if took_s > TRIAL_S or rows >= min(num_rows, most):
            return took_s * factor
        wanted = min(most, rows * 4)
