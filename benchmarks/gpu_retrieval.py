"""Retrieval on a GPU: `python benchmarks/gpu_retrieval.py [--only A,B] [--out FILE]`.

FAISS: the same folder served from the CPU and, in half precision, from all GPUs, through the backend that serves runs; flat hits must be the same
rows with the same scores, those of inverted lists nearly so. Encoder: a random BERT of MiniLM's size, in float32 on the CPU and in half precision on
the GPU. `--cpu` rehearses both with the CPU on either side.

Invariants: vectors and texts depend on a seed; both sides get the same queries in the same batches; the first search is not timed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.gpu_check import Bench, Failed, Figures, Function, NotRun, program  # noqa: E402

K = 10
LEAST_SHARED = 0.95
"""Of the hits of inverted lists: half precision may sort the lists' candidates a little differently."""


def faiss_gpu(bench: Bench) -> Figures:
    """Flat, IVF-Flat and IVF-PQ from the GPUs against the CPU: hits and queries per second; what cannot go there is refused."""
    import numpy as np

    from retrieval.errors import RetrievalError
    from retrieval.faiss_config import FaissConfig
    from retrieval.faiss_index import build, load, num_gpus

    there = "cpu" if bench.tiny else "gpu"
    if there == "gpu" and not num_gpus():
        raise NotRun("this FAISS was built without GPUs: install faiss-gpu")
    rows, dim, batch = (4000, 32, 16) if bench.tiny else (1_000_000, 768, 64)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((64, dim), dtype=np.float32)
    vectors = centres[rng.integers(0, 64, rows)] + rng.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[rng.integers(0, rows, 4 * batch)] + 0.05 * rng.standard_normal((4 * batch, dim), dtype=np.float32)
    figures: Figures = {"rows": rows, "dim": dim, "gpus": num_gpus()}
    lists, threads = (32, 1) if bench.tiny else (1024, os.cpu_count() or 1)
    for config in (
        FaissConfig("flat"),
        FaissConfig("ivf_flat", nlist=lists, nprobe=16),
        FaissConfig("ivf_pq", nlist=lists, nprobe=16, pq_m=8 if bench.tiny else 96, refine_factor=8),
    ):
        with tempfile.TemporaryDirectory(prefix="gumshoe-faiss-") as folder:
            place = Path(folder)
            build(config, place, lambda: iter(()), vectors, rows, threads=threads).save(place)
            here, on_gpu = (
                load(config, place, threads=threads),
                load(replace(config, device=there), place, threads=threads),
            )
            (expected, cpu_qps), (found, gpu_qps) = (_searched(e, queries, batch) for e in (here, on_gpu))
        shared = sum(len(set(a.rows_K) & set(b.rows_K)) for a, b in zip(expected, found, strict=True)) / (
            K * len(found)
        )
        name = config.index
        figures |= {f"{name}_shared": shared, f"{name}_cpu_qps": cpu_qps, f"{name}_gpu_qps": gpu_qps}
        bench.note(figures)
        same = all(
            (a.rows_K == b.rows_K).all() and (a.scores_K == b.scores_K).all()
            for a, b in zip(expected, found, strict=True)
        )
        if name == "flat" and not same:
            raise Failed("flat hits on the GPU are not those on the CPU", figures)
        if shared < LEAST_SHARED:
            raise Failed(f"{name}: {shared:.3f} of the hits are the CPU's, under {LEAST_SHARED}", figures)
    with tempfile.TemporaryDirectory(prefix="gumshoe-faiss-") as folder:
        place, config = Path(folder), FaissConfig("hnsw", hnsw_m=8, ef_construction=16)
        build(config, place, lambda: iter(()), vectors[:2000], 2000).save(place)
        try:
            load(replace(config, device="gpu"), place)
        except RetrievalError as error:
            figures["refused"] = str(error)
        else:
            raise Failed("HNSW was taken for the GPU, where FAISS has none", figures)
    return figures


def encoder_gpu(bench: Bench) -> Figures:
    """Vectors of a random encoder in half precision on the GPU against float32 on the CPU; texts per second."""
    import numpy as np

    from retrieval.encode_hf import HfEncoder
    from retrieval.encoders import EncoderConfig

    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2000)]
    texts = [" ".join(rng.choice(words, rng.integers(8, 200))) for _ in range(32 if bench.tiny else 4096)]
    with tempfile.TemporaryDirectory(prefix="gumshoe-encoder-") as folder:
        _random_encoder(Path(folder), words, tiny=bench.tiny)
        config = EncoderConfig(kind="hf", model=folder)
        here = HfEncoder(replace(config, device="cpu", dtype="float32"))
        there = HfEncoder(replace(config, device=bench.device, dtype="bfloat16" if bench.tiny else ""))
        few = texts[:32]
        expected, found = here.encode_documents(few), there.encode_documents(few)
        began = time.perf_counter()
        there.encode_documents(texts)
        seconds = time.perf_counter() - began
    least = float((expected * found).sum(axis=1).min())
    figures = {"least_cosine": least, "texts_per_s": round(len(texts) / seconds, 1), "texts": len(texts)}
    if not least > (0.99 if bench.tiny else 0.999):
        raise Failed(f"a vector has a cosine of {least:.4f} with the CPU's", figures)
    return figures


def _searched(engine: Any, queries: Any, batch: int) -> tuple[list[Any], float]:
    """What an engine finds, and its queries per second."""
    from retrieval.engine import Queries

    def ask(part: Any) -> Sequence[Any]:
        found: Sequence[Any] = engine.search(Queries(("",) * len(part), part), K)
        return found

    ask(queries[:batch])
    began = time.perf_counter()
    found = [hit for first in range(0, len(queries), batch) for hit in ask(queries[first : first + batch])]
    return found, round(len(queries) / (time.perf_counter() - began), 1)


def _random_encoder(folder: Path, words: Sequence[str], *, tiny: bool) -> None:
    """A model folder: a BERT with random weights, and a tokenizer that knows these words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=256
    ).save_pretrained(folder)
    width, layers = (32, 2) if tiny else (384, 6)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocab), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16,
            intermediate_size=4 * width, max_position_embeddings=256,
        )
    ).save_pretrained(folder)  # fmt: skip


FUNCTIONS: dict[str, Function] = {"faiss_gpu": faiss_gpu, "encoder_gpu": encoder_gpu}

if __name__ == "__main__":
    sys.exit(program("gpu_retrieval", FUNCTIONS, sys.argv[1:]))
