"""The world of a run: documents behind an index, training tasks, and the frozen held-out tasks.

Either a synthetic world (trained in some seeds, evaluated in others) or a user's own JSONL corpus with JSONL tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agents.types import Task
from cluster.errors import UserError
from cluster.model import resolve
from envs.jsonl import read_tasks
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
class JsonlConfig:
    """A user's own world: no code needed."""

    corpus: list[str] = field(default_factory=list)
    """Corpus files (JSONL with id, title, text; also gzipped, also Search-R1's id, contents)."""
    tasks: str = ""
    """Training tasks, JSONL."""
    eval_tasks: str = ""
    """Held-out tasks, JSONL."""
    malformed: str = "error"
    """A malformed corpus line is an `error`, or counted and skipped (`skip`)."""


@dataclass
class WorldSource:
    """Where documents and tasks come from."""

    kind: str = "synthetic"
    """`synthetic` or `jsonl`."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """For `kind: synthetic`."""
    jsonl: JsonlConfig = field(default_factory=JsonlConfig)
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
                "give world.synthetic.train.seed and world.synthetic.held_out.seed different values"
            )
        index_dir = run_dir / "index"
        built = build_backend(backend, [*train.documents, *held_out.documents], index_dir)
        built.store.close()
        return OpenWorld(str(index_dir), list(train.tasks), list(held_out.tasks))
    if source.kind == "jsonl":
        config = source.jsonl
        if not config.corpus or not config.tasks:
            raise UserError("world.kind is jsonl, which needs world.jsonl.corpus and world.jsonl.tasks")
        index_dir = storage / "indexes" / "-".join([backend.kind, *(Path(c).stem for c in config.corpus)])
        built = prepare_backend(backend, [resolve(c) for c in config.corpus], index_dir, malformed=config.malformed)
        known = set(built.store.ids())
        built.store.close()
        tasks = read_tasks(resolve(config.tasks), known_ids=known)
        eval_tasks = read_tasks(resolve(config.eval_tasks), known_ids=known) if config.eval_tasks else []
        return OpenWorld(str(index_dir), tasks, eval_tasks)
    raise UserError(f"world.kind is {source.kind!r}; it must be `synthetic` or `jsonl`")
