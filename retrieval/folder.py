"""An index folder, checked against a configuration, and its parts for whoever serves them.

Invariant: a folder whose manifest, parts and configuration do not agree is refused with both values named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.types import BackendInfo
from retrieval.build import ENGINES, ROWS, STORE, load_encoder
from retrieval.config import BackendConfig, adopted, from_values, is_dense, legs_of, settings
from retrieval.docstore import DocStore
from retrieval.engine import Engine, LocalShard, Shard
from retrieval.errors import IndexMismatch
from retrieval.indexed import AsyncEncoder, LocalEncoder, LocalPages, Pages
from retrieval.manifest import Manifest, differences, digest, runtime_names
from retrieval.rows import Rows


class IndexFolder:
    """An index folder that fits a configuration: its parts, to be opened by whoever serves them."""

    def __init__(self, config: BackendConfig, directory: str | Path) -> None:
        """Raises RetrievalError when there is no index, IndexMismatch (with both values) when it does not fit."""
        self.directory = Path(directory)
        self.manifest = Manifest.read(directory)
        try:
            built = from_values(BackendConfig, self.manifest.config)
        except (TypeError, ValueError) as error:
            raise IndexMismatch(f"index {directory} was built by another version ({error}); build it again") from None
        self.config = adopted(built, config) if config.kind == "auto" else config
        self.legs = legs_of(self.config)
        found = _misfits(self.manifest, built, self.config)
        if found:
            raise IndexMismatch(
                f"index {directory} does not fit: {'; '.join(found)}; build it again or mend the config"
            )

    def store(self) -> DocStore:
        store = DocStore(self.directory / STORE)
        if store.fingerprint != self.manifest.corpus:
            raise IndexMismatch(
                f"index {self.directory} was built from corpus {self.manifest.corpus}, its documents are "
                f"{store.fingerprint}; build it again"
            )
        return store

    def rows(self) -> Rows:
        rows = Rows(self.directory / ROWS)
        self._agree("rows", {"passages": self.manifest.passages}, {"passages": rows.num_rows})
        return rows

    def encoder(self) -> Any:
        """The encoder of the dense leg."""
        encoder = load_encoder(self.config, self.directory)
        self._agree("encoder", self.manifest.encoder or {}, encoder.spec())
        return encoder

    def engine(self, leg: str, number: int) -> Engine:
        """One shard of a leg."""
        run = self.manifest.legs[leg].shards[number]
        engine = ENGINES[leg][1](self.config, self.directory / run.folder)
        self._agree(run.folder, {"rows": run.rows}, {"rows": engine.num_rows})
        if number == 0:
            runtime = runtime_names(getattr(self.config, leg))
            built, found = (
                {k: v for k, v in s.items() if k not in runtime} for s in (self.manifest.legs[leg].spec, engine.spec())
            )
            self._agree(leg, built, found)
        return engine

    def check(self) -> None:
        """Opens every file once. Raises RetrievalError for the first that is damaged."""
        self.store().close()
        self.rows()
        if (self.manifest.encoder or {}).get(
            "kind"
        ) == "hashing":  # the others keep nothing here, and may take a minute
            self.encoder()
        for leg in self.legs:
            for number in range(len(self.manifest.legs[leg].shards)):
                self.engine(leg, number)

    def info(self, leg: str) -> BackendInfo:
        """What a backend over a leg serves."""
        built = self.manifest
        encoder = built.encoder if is_dense(self.config, leg) else None
        search = asdict(getattr(self.config, leg))
        spec = [built.corpus, settings(self.config, leg), search, built.legs[leg].spec, encoder]
        # hits of a caseless backend do not change with the case of a query
        caseless = encoder is None or encoder.get("kind") == "hashing"
        return BackendInfo(leg, built.documents, digest(spec), ("caseless",) if caseless else ())

    def _agree(self, what: str, built: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        wrong = differences(built, found, "found")
        if wrong:
            raise IndexMismatch(f"{what} of index {self.directory}: {'; '.join(wrong)}; build it again")


class LocalParts:
    """Opens the parts of a folder in this process, each once; a cluster hands `open_backend` one of its own."""

    def __init__(self, folder: IndexFolder) -> None:
        self._folder = folder
        self._pages: LocalPages | None = None
        self._encoder: LocalEncoder | None = None

    def pages(self) -> Pages:
        self._pages = self._pages or LocalPages(self._folder.store())
        return self._pages

    def encoder(self) -> AsyncEncoder:
        self._encoder = self._encoder or LocalEncoder(self._folder.encoder())
        return self._encoder

    def shard(self, leg: str, number: int) -> Shard:
        return LocalShard(self._folder.engine(leg, number))


def _misfits(manifest: Manifest, built: BackendConfig, asked: BackendConfig) -> list[str]:
    missing = [leg for leg in legs_of(asked) if leg not in manifest.legs]
    if missing:
        return [f"kind: built with {built.kind!r}, asked for {asked.kind!r}"]
    return [d for leg in legs_of(asked) for d in differences(settings(built, leg), settings(asked, leg))]
