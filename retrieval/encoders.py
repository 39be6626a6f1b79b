"""Encoders: texts to vectors whose inner product is the score.

Invariants: vectors are float32 and of length 1 (or 0 when a text has no terms), unless `normalize` is off; documents and
queries are encoded by separate methods, since many models prefix them differently; `spec()` names everything that changes the
vectors and goes into the index fingerprint. The hashing encoder needs no download and gives the same vectors in every
process; those of models differ in their last bits with batch and machine (`"repeatable": False` in the spec), so rankings are
exact only for vectors that are given.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from retrieval.analysis import ANALYSIS, words
from retrieval.errors import RetrievalError

_IDF_BUCKETS = 1 << 16
_MAX_CACHED_WORDS = 500_000
_DIM = 1024


class Encoder(Protocol):
    """What a dense index asks of an encoder. One that must see the corpus first has `fit(texts)` besides."""

    @property
    def dim(self) -> int: ...

    def spec(self) -> dict[str, Any]: ...

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray: ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray: ...

    def state(self) -> dict[str, np.ndarray]: ...


_RUNTIME: dict[str, Any] = {"runtime": True}


@dataclass
class EncoderConfig:
    """Which encoder, and how. Fields marked `runtime` do not change the vectors beyond rounding."""

    kind: str = "hashing"
    """`hashing`: words, deterministic, offline. `hf`: a sentence-transformers or Hugging Face model. `endpoint`: an
    OpenAI-compatible server."""
    dim: int = 0
    """Length of the vectors; an index needs 4 bytes times `dim` per passage. 0: 1024 for `hashing`, else all that the model
    gives; a smaller number keeps the first ones, for models that were trained to be cut."""
    char_min: int = 3
    """hashing: shortest character n-gram inside a word."""
    char_max: int = 4
    """hashing: longest character n-gram; 0 turns n-grams off."""
    char_weight: float = 0.5
    """hashing: length of a word's n-gram part relative to the word itself: how much similar spellings count."""
    idf: bool = True
    """hashing: weigh rare words more, with document frequencies fitted on the corpus."""
    model: str = ""
    """hf: a folder, `package:NAME` for one inside an installed Python package, or a model id of the hub. endpoint: the name
    that the server knows."""
    revision: str = ""
    """hf: commit, branch or tag of a model id."""
    pooling: str = ""
    """hf: `mean`, `cls` or `last` (token). Empty: as the model's folder says, else as its family does, else mean."""
    normalize: bool | None = None
    """Scale vectors to length 1, so that scores are cosines. Null: yes, unless the model's folder says its score is `dot`."""
    query_prefix: str | None = None
    """Stands before each query. Null: as the model's folder says, else as its family does (E5, BGE, GTE, Qwen3-Embedding)."""
    document_prefix: str | None = None
    """Stands before each document. Null: likewise."""
    max_length: int = 0
    """Longest text in tokens, the rest is cut off (endpoint: 4 characters count as one). 0: as the model says; endpoint: no cut."""
    dtype: str = field(default="", metadata=_RUNTIME)
    """hf: `float32`, `float16` or `bfloat16`. Empty: float16 on a GPU, else float32."""
    device: str = field(default="", metadata=_RUNTIME)
    """hf: such as `cpu` or `cuda:1`. Empty: a GPU when there is one."""
    batch_tokens: int = field(default=0, metadata=_RUNTIME)
    """hf: tokens of one forward pass, padding counted. 0: 1024 on a CPU, where more leave its caches, else 16384."""
    threads: int = field(default=0, metadata=_RUNTIME)
    """hf: torch's threads, of the whole process. 0: as they are."""
    url: str = field(default="", metadata=_RUNTIME)
    """endpoint: such as `http://localhost:8000/v1`; `/embeddings` is added."""
    api_key_env: str = field(default="", metadata=_RUNTIME)
    """endpoint: name of the environment variable that holds the key. Empty: none is sent."""
    batch_size: int = field(default=64, metadata=_RUNTIME)
    """endpoint: texts of one request."""
    concurrency: int = field(default=4, metadata=_RUNTIME)
    """endpoint: requests under way at once."""
    attempts: int = field(default=5, metadata=_RUNTIME)
    """endpoint: tries of one request, with growing pauses."""
    timeout_s: float = field(default=60.0, metadata=_RUNTIME)
    """endpoint: of one try."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dim", "max_length", "threads", "batch_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"encoder.{name} is {getattr(self, name)}; it must not be negative")
        if self.pooling not in ("", *POOLINGS):
            raise ValueError(f"encoder.pooling is {self.pooling!r}; known: {', '.join(POOLINGS)}")
        if self.kind in ("hf", "endpoint") and not self.model:
            raise ValueError(f"encoder.kind {self.kind} needs encoder.model")


@dataclass(frozen=True)
class Family:
    """What the authors of a line of models say about their use, in the model cards."""

    pooling: str = "mean"
    query_prefix: str = ""
    document_prefix: str = ""


POOLINGS = ("mean", "cls", "last")
_WEB = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"qwen3-embedding", Family("last", _WEB)),
    (r"gte-qwen", Family("last", _WEB + " ")),
    (r"e5-mistral", Family("last", _WEB + " ")),
    (r"e5-.*-instruct", Family("mean", _WEB + " ")),
    (r"(^|-)e5-", Family("mean", "query: ", "passage: ")),
    (r"bge-.*-en", Family("cls", "Represent this sentence for searching relevant passages: ")),
    (r"bge-.*-zh", Family("cls", "为这个句子生成表示以用于检索相关文章：")),
    (r"bge-|gte-.*(v1\.5|modernbert)", Family("cls")),
)
"""Pattern of the model's own name, in lower case, and its family; the first that fits counts."""


def family_of(*names: str) -> Family:
    """By the last part of each name in turn, such as `intfloat/e5-base-v2`. Mean pooling without prefixes when none is known."""
    for name in names:
        own = name.rstrip("/").rpartition("/")[2].lower()
        for pattern, family in FAMILIES:
            if re.search(pattern, own):
                return family
    return Family()


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors of length 1; those of length 0 stay. float32 [N, D]"""
    lengths_N = np.sqrt(np.square(vectors_ND, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.divide(vectors_ND, lengths_N, where=lengths_N > 0, out=np.zeros(vectors_ND.shape)).astype(np.float32)


def checked(vectors_ND: np.ndarray, rows: int, dim: int) -> np.ndarray:
    """The vectors, if they are finite and [rows, dim]. Raises RetrievalError: an index of others finds nonsense."""
    if vectors_ND.shape != (rows, dim) or not np.isfinite(vectors_ND).all():
        raise RetrievalError(
            f"the encoder gave vectors of shape {vectors_ND.shape} for {rows} texts in {dim} dimensions, or numbers that are not "
            "finite; check encoder.model, and encoder.dtype if it is half precision"
        )
    return vectors_ND


class HashingEncoder:
    """Words and their character n-grams, hashed with signs into `dim` buckets; sublinear tf, hashed idf, length 1.

    A word's vector is its own feature (weight 1) plus its n-grams (total length `char_weight`); a text is the sum over its
    distinct words of (1 + ln tf) * idf * vector. idf is ln((1 + N) / (1 + df)) + 1, kept in hashed buckets; before
    `fit`, or with idf off, it is 1.
    """

    def __init__(self, config: EncoderConfig, state: Mapping[str, np.ndarray] | None = None) -> None:
        self.dim = config.dim or _DIM
        if self.dim < 8:
            raise ValueError(f"encoder dim {config.dim} is too small; use at least 8")
        if config.char_max and not 0 < config.char_min <= config.char_max:
            raise ValueError(f"encoder n-grams {config.char_min}..{config.char_max} are not a range")
        self.config = config
        self._idf: np.ndarray | None = None
        self._cache: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        if state and "idf" in state:
            self._idf = np.asarray(state["idf"], dtype=np.float32)

    def fit(self, texts: Iterable[str]) -> None:
        """Counts document frequencies. Does nothing when idf is off."""
        if not self.config.idf:
            return
        frequency = np.zeros(_IDF_BUCKETS, dtype=np.int64)
        num_docs = 0
        for text in texts:
            num_docs += 1
            for word in set(words(text)):
                frequency[_bucket(word)] += 1
        self._idf = (np.log((1 + num_docs) / (1 + frequency)) + 1).astype(np.float32)

    def spec(self) -> dict[str, Any]:
        c = self.config
        state = "" if self._idf is None else hashlib.blake2b(self._idf.tobytes(), digest_size=8).hexdigest()
        return {
            "kind": "hashing", "version": 1, "analysis": ANALYSIS, "dim": self.dim, "char_min": c.char_min, "char_max": c.char_max,
            "char_weight": c.char_weight, "idf": state,
        }  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """What must be stored beside the configuration."""
        return {} if self._idf is None else {"idf": self._idf}

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]"""
        vectors_ND = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            vectors_ND[row] = self._encode(text)
        return vectors_ND

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, dim]; queries and documents are encoded alike."""
        return self.encode_documents(texts)

    def _encode(self, text: str) -> np.ndarray:
        # sorted, so that sums run in one order whatever the order of the words
        counts = sorted(Counter(words(text)).items())
        if not counts:
            return np.zeros(self.dim, dtype=np.float32)
        indices, values = [], []
        for word, count in counts:
            index, weight, bucket = self._word(word)
            idf = 1.0 if self._idf is None else float(self._idf[bucket])
            indices.append(index)
            values.append(weight * ((1.0 + math.log(count)) * idf))
        vector = np.bincount(np.concatenate(indices), np.concatenate(values), minlength=self.dim)
        norm = math.sqrt(float(np.square(vector).sum()))
        return (vector / norm if norm > 0 else vector).astype(np.float32)

    def _word(self, word: str) -> tuple[np.ndarray, np.ndarray, int]:
        cached = self._cache.get(word)
        if cached is not None:
            return cached
        c = self.config
        features = [("w", word, 1.0)]
        marked = f"<{word}>"
        grams = [marked[i : i + n] for n in range(c.char_min, c.char_max + 1) for i in range(len(marked) - n + 1)]
        features += [("c", g, c.char_weight / math.sqrt(len(grams))) for g in grams] if c.char_max else []
        hashes = [_hash(kind + feature) for kind, feature, _ in features]
        index = np.array([h % self.dim for h in hashes], dtype=np.int64)
        signs = np.array([1.0 if h >> 63 else -1.0 for h in hashes])
        entry = index, signs * np.array([w for _, _, w in features]), _bucket(word)
        if len(self._cache) >= _MAX_CACHED_WORDS:
            self._cache.clear()
        self._cache[word] = entry
        return entry


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _bucket(word: str) -> int:
    return _hash("i" + word) % _IDF_BUCKETS


State = Mapping[str, np.ndarray]


def _hf(config: EncoderConfig, state: State | None) -> Encoder:
    from retrieval.encode_hf import HfEncoder

    return HfEncoder(config)


def _endpoint(config: EncoderConfig, state: State | None) -> Encoder:
    from retrieval.encode_http import EndpointEncoder

    return EndpointEncoder(config)


ENCODERS: dict[str, Callable[[EncoderConfig, State | None], Encoder]] = {
    "endpoint": _endpoint,
    "hashing": HashingEncoder,
    "hf": _hf,
}


def make_encoder(config: EncoderConfig, state: State | None = None) -> Encoder:
    """The encoder a configuration names. Raises ValueError that lists the known kinds, and RetrievalError."""
    if config.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {config.kind!r}; known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[config.kind](config, state)
