"""Encoders: texts to vectors whose inner product is the score.

Invariants: vectors are float32 and of length 1 (or 0 when a text has no terms); documents and queries are encoded by
separate methods, since many models prefix them differently; `spec()` names everything that changes the vectors and goes into
the index fingerprint. The hashing encoder needs no download and gives the same vectors in every process.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from retrieval.analysis import ANALYSIS, words

_IDF_BUCKETS = 1 << 16
_MAX_CACHED_WORDS = 500_000


class Encoder(Protocol):
    """What a dense index asks of an encoder."""

    dim: int

    def spec(self) -> dict[str, Any]: ...

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray: ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray: ...

    def state(self) -> dict[str, np.ndarray]: ...


@dataclass
class EncoderConfig:
    """Which encoder, and how."""

    kind: str = "hashing"
    """`hashing`: deterministic, offline."""
    dim: int = 1024
    """Length of the vectors; an index needs 4 bytes times `dim` per document."""
    char_min: int = 3
    """Shortest character n-gram inside a word."""
    char_max: int = 4
    """Longest character n-gram; 0 turns n-grams off."""
    char_weight: float = 0.5
    """Length of a word's n-gram part relative to the word itself: how much similar spellings count."""
    idf: bool = True
    """Weigh rare words more, with document frequencies fitted on the corpus."""


class HashingEncoder:
    """Words and their character n-grams, hashed with signs into `dim` buckets; sublinear tf, hashed idf, length 1.

    A word's vector is its own feature (weight 1) plus its n-grams (total length `char_weight`); a text is the sum over its
    distinct words of (1 + ln tf) * idf * vector. idf is ln((1 + N) / (1 + df)) + 1, kept in hashed buckets; before
    `fit`, or with idf off, it is 1.
    """

    def __init__(self, config: EncoderConfig, state: Mapping[str, np.ndarray] | None = None) -> None:
        if config.dim < 8:
            raise ValueError(f"encoder dim {config.dim} is too small; use at least 8")
        if config.char_max and not 0 < config.char_min <= config.char_max:
            raise ValueError(f"encoder n-grams {config.char_min}..{config.char_max} are not a range")
        self.config = config
        self.dim = config.dim
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
            "kind": "hashing", "version": 1, "analysis": ANALYSIS, "dim": c.dim, "char_min": c.char_min, "char_max": c.char_max,
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


ENCODERS: dict[str, Callable[[EncoderConfig, Mapping[str, np.ndarray] | None], HashingEncoder]] = {
    "hashing": HashingEncoder,
}


def make_encoder(config: EncoderConfig, state: Mapping[str, np.ndarray] | None = None) -> HashingEncoder:
    """The encoder a configuration names. Raises ValueError that lists the known kinds."""
    if config.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {config.kind!r}; known: {', '.join(sorted(ENCODERS))}")
    return ENCODERS[config.kind](config, state)
