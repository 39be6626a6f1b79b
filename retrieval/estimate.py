"""What an index will need, measured on a sample of its corpus with the encoder and the store that will build it.

Invariants: nothing is left behind; reading stops after `READ_S` and encoding after `ENCODE_S`, so the answer comes within a minute or so for
a corpus of any size; what could not be seen is scaled up from what was.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass
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

READ_S, ENCODE_S = 20.0, 20.0
SAMPLE = 1000
_BATCH = 64


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
    """More than that at the peak of building."""
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
    memory = build = 0
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
                needs = faiss_config.estimate(config.faiss, num_rows, dim)
                disk[leg], memory, build = needs.disk_bytes, memory + needs.memory_bytes, build + needs.build_bytes
                seconds[leg] = _indexing(config, num_rows, dim, Path(folder) / leg)
            elif leg in ENGINES:
                place = Path(folder) / leg
                began = time.monotonic()
                engine = ENGINES[leg][0](config, place, lambda: iter(texts), None, len(texts))
                engine.save(place)
                seconds[leg] = (time.monotonic() - began) * by_row
                disk[leg] = round(sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) * by_row)
                memory += disk[leg]
    return Estimate(num_documents, num_rows, whole, disk, memory, build, seconds)


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
    """Seconds to index all vectors, from a build over some random ones; the time of an index that trains is a lower bound."""
    rows = min(num_rows, 20_000)
    vectors_ND = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    folder.mkdir()
    began = time.monotonic()
    ENGINES["faiss"][0](config, folder, lambda: iter(()), vectors_ND, rows)
    return (time.monotonic() - began) * num_rows / rows
