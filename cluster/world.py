"""The world of a run: documents behind an index, training tasks, and the frozen held-out tasks.

Either a synthetic world (trained in some seeds, evaluated in others) or a user's own JSONL corpus with JSONL tasks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from agents.types import Task
from cluster.errors import UserError
from cluster.model import resolve
from envs.jsonl import JsonlWorldConfig, load_tasks
from envs.world import WorldConfig, build_world
from retrieval.backend import BackendConfig, build_backend, prepare_backend


@dataclass
class SyntheticConfig:
    """Synthetic worlds: disjoint in their names when their seeds differ."""

    train: WorldConfig = field(default_factory=WorldConfig)
    """The world of the training tasks."""
    held_out: WorldConfig = field(default_factory=WorldConfig)
    """The unseen world of the evaluation."""


@dataclass
class WorldSource:
    """Where documents and tasks come from."""

    kind: str = "synthetic"
    """`synthetic` or `jsonl`."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """For `kind: synthetic`."""
    jsonl: JsonlWorldConfig = field(default_factory=JsonlWorldConfig)
    """For `kind: jsonl`."""


@dataclass(frozen=True)
class OpenWorld:
    """A world that is ready to be served."""

    index_dir: str
    """Folder that the retrieval actor opens."""
    train_tasks: list[Task]
    eval_tasks: list[Task]


def open_world(source: WorldSource, backend: BackendConfig, run_dir: Path, storage: Path) -> OpenWorld:
    """Builds or opens the index and reads the tasks. Raises the one-line errors of the rooms."""
    if source.kind == "synthetic":
        train, held_out = build_world(source.synthetic.train), build_world(source.synthetic.held_out)
        shared = {d.id for d in train.documents} & {d.id for d in held_out.documents}
        if shared:
            raise UserError(
                f"the training and held-out worlds share {len(shared)} documents, such as {min(shared)!r}; "
                "set world.synthetic.train.split=train and world.synthetic.held_out.split=heldout"
            )
        index_dir = run_dir / "index"
        built = build_backend(backend, [*train.documents, *held_out.documents], index_dir)
        built.store.close()
        return OpenWorld(str(index_dir), list(train.tasks), list(held_out.tasks))
    if source.kind == "jsonl":
        config = source.jsonl
        if not config.corpus or not config.tasks:
            raise UserError("world.kind is jsonl, which needs world.jsonl.corpus and world.jsonl.tasks")
        corpus = [resolve(c) for c in config.corpus]
        place = hashlib.blake2b("\0".join(map(str, corpus)).encode(), digest_size=4).hexdigest()
        index_dir = storage / "indexes" / f"{backend.kind}-{corpus[0].stem}-{place}"
        built = prepare_backend(backend, corpus, index_dir, malformed=config.malformed)
        known = set(built.store.ids())
        built.store.close()
        held_out_file = str(resolve(config.eval_tasks)) if config.eval_tasks else ""
        files = replace(config, tasks=str(resolve(config.tasks)), eval_tasks=held_out_file)
        splits = load_tasks(files, known_ids=known)
        return OpenWorld(str(index_dir), list(splits.train), list(splits.eval))
    raise UserError(f"world.kind is {source.kind!r}; it must be `synthetic` or `jsonl`")
