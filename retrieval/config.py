"""How a corpus is indexed and searched: the configuration of a backend.

Invariant: `settings` names all that changes what is built for one index, and nothing else, so a folder is opened with other
threads or search depths but not with another encoder. A section says which of its fields only concern the search by
`metadata={"runtime": True}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from retrieval.bm25 import Bm25Config
from retrieval.chunks import ChunkConfig
from retrieval.elastic_index import ElasticConfig
from retrieval.encoders import EncoderConfig
from retrieval.faiss_config import FaissConfig
from retrieval.hybrid import HybridConfig
from retrieval.live import LiveConfig
from retrieval.manifest import lasting, runtime_names
from retrieval.remote import RemoteConfig
from retrieval.rerank import RerankConfig

LEGS = ("faiss", "bm25", "elasticsearch")
"""Indexes that a folder can hold (of Elasticsearch: what the server was told)."""
SERVERS = ("remote", "live")
KINDS = (*LEGS, *SERVERS, "hybrid", "auto")
SHARDED = ("faiss",)
"""Legs that can be cut: BM25 weighs a term by all documents, and Elasticsearch has shards of its own."""
T = TypeVar("T")


@dataclass
class BackendConfig:
    """Which index to serve a corpus with."""

    kind: str = "faiss"
    """`faiss` (dense), `bm25`, `elasticsearch`, `hybrid` (several of them, fused), `remote` (a `/retrieve` server), `live` (a search API),
    or `auto`: what the index folder was built as; all that only concerns the search comes from here."""
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    """How documents are cut into passages."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Encoder of the dense index."""
    faiss: FaissConfig = field(default_factory=FaissConfig)
    """The dense index."""
    bm25: Bm25Config = field(default_factory=Bm25Config)
    """The sparse index."""
    elasticsearch: ElasticConfig = field(default_factory=ElasticConfig)
    """For `kind: elasticsearch`."""
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    """For `kind: hybrid`."""
    rerank: RerankConfig = field(default_factory=RerankConfig)
    """A cross-encoder over the first hits of any kind."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """For `kind: remote`."""
    live: LiveConfig = field(default_factory=LiveConfig)
    """For `kind: live`."""
    title_weight: int = 2
    """How many times an index sees the title."""
    shards: int = 1
    """Parts that a dense index is built in; they can be served by processes of their own."""
    threads: int = 1
    """Threads of one search."""

    def __post_init__(self) -> None:
        for name in ("shards", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def backends_of(config: BackendConfig) -> tuple[str, ...]:
    """The backends that answer, by kind: several for a hybrid. Raises ValueError for an unknown kind."""
    names = tuple(config.hybrid.legs) if config.kind == "hybrid" else (config.kind,)
    for name, known in ((config.kind, KINDS), *((n, (*LEGS, *SERVERS)) for n in names if n != config.kind)):
        if name not in known:
            raise ValueError(f"unknown retrieval backend {name!r}; known: {', '.join(sorted(known))}")
    return names


def legs_of(config: BackendConfig) -> tuple[str, ...]:
    """Those of the backends that need an index in the folder."""
    return tuple(name for name in backends_of(config) if name in LEGS)


def is_dense(config: BackendConfig, leg: str) -> bool:
    """Whether a leg compares vectors."""
    return leg == "faiss" or (leg == "elasticsearch" and config.elasticsearch.dense)


def settings(config: BackendConfig, leg: str) -> dict[str, Any]:
    """All that changes what is built for a leg (or, with `encoder`, what any dense one is made of), by name."""
    chunk = lasting(config.chunk) if config.chunk.unit != "none" else {"unit": "none"}
    found: dict[str, Any] = {"title_weight": config.title_weight, "chunk": chunk}
    for name in (leg, "encoder") if is_dense(config, leg) else (leg,):
        found[name] = lasting(getattr(config, name))
    return found


def stored(config: BackendConfig) -> dict[str, Any]:
    """What a folder must remember of a configuration: what its indexes are made of.

    No more: a folder may come from others, and must not say where queries, or which of our secrets, are sent.
    """
    found: dict[str, Any] = {"kind": config.kind, "shards": config.shards}
    for leg in legs_of(config):
        found |= settings(config, leg)
    return found | ({"hybrid": {"legs": list(config.hybrid.legs)}} if config.kind == "hybrid" else {})


def adopted(built: BackendConfig, asked: BackendConfig) -> BackendConfig:
    """For `kind: auto`: what was built as it was built, and how it is searched as asked for. Raises ValueError."""
    found: dict[str, Any] = {
        "kind": built.kind,
        "shards": built.shards,
        "title_weight": built.title_weight,
        "chunk": built.chunk,
    }
    for name in (*LEGS, "encoder"):
        section, given = getattr(built, name), getattr(asked, name)
        found[name] = replace(section, **{field: getattr(given, field) for field in runtime_names(section)})
    if built.kind == "hybrid" and set(asked.hybrid.legs) != set(built.hybrid.legs):
        found["hybrid"] = replace(asked.hybrid, legs=built.hybrid.legs)
    return replace(asked, **found)


def from_values(cls: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from what `dataclasses.asdict` gave. Raises TypeError and ValueError."""
    hints = get_type_hints(cls)
    return cls(**{k: from_values(hints[k], v) if is_dataclass(hints.get(k)) else v for k, v in values.items()})
