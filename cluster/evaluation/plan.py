"""What an evaluation is about to do: its questions, its corpus, its units, and all that can be known to be wrong before it begins.

Invariants: what is wrong is one line (what, where, how to mend) before anything is started; a note is said where numbers mean less than they
seem to; an index is built once per content and settings.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from agents.recordfile import RecordReader, read_records
from agents.types import Document, Group, RecordError, Task
from cluster.errors import UserError, one_line
from cluster.evaluation.config import EvalConfig
from cluster.evaluation.contents import GROUPS, STAGES
from cluster.evaluation.journal import IDENTITY, TASKS, UNITS, Folder, Key
from cluster.evaluation.records import Played, State, Unit
from cluster.evaluation.sealing import all_canaries
from cluster.evaluation.workers import evidence_of
from cluster.machine import check_engines
from cluster.model import ModelShape, model_shape, resolve
from cluster.preflight import (
    Check,
    check_cache,
    check_corpus,
    check_file,
    check_key,
    check_language,
    check_policy,
    check_section,
    check_tokenizer,
)
from cluster.rundir import storage_dir
from cluster.runtime import joined_address
from cluster.sizes import CPU_KV_GIB, kv_bytes_per_token
from cluster.storage import is_object_store
from cluster.world import CorpusWorldConfig, index_of
from envs.benchmarks.base import Benchmark
from envs.benchmarks.registry import FAMILIES, load_benchmark
from envs.config import MIN_CANARY, SandboxConfig
from envs.journal import digest
from envs.parallel_world import posed_rows
from retrieval.backend import IndexFolder
from retrieval.build import Busy, build_folder
from retrieval.config import KINDS, legs_of, settings
from retrieval.errors import RetrievalError
from retrieval.manifest import read_key

WORLD = "world"
"""`benchmark.kind` of questions about a synthetic world, which is made on the spot from the section `world`."""


@dataclass(frozen=True)
class Job:
    """A unit that is still to be played."""

    task: Task
    unit: Unit
    probe: str = ""

    @property
    def key(self) -> Key:
        return self.unit.task, self.unit.sample, self.probe


def checks(config: EvalConfig, stages: Collection[str] = STAGES) -> Iterator[Check]:
    """Every check that needs neither the benchmark nor Ray, the cheap ones first; of what a stage needs, only where it is asked for."""
    yield partial(check_section, config)
    yield partial(check_names, config)
    yield partial(check_place, config.storage_path)
    brings_questions = not config.benchmark.kind
    if config.policy.kind == "recorded" and ("run" in stages or brings_questions):
        yield partial(check_recorded, resolve(config.policy.recorded))
    if "run" in stages:
        yield from _checks_to_play(config)
    if "judge" in stages and config.judge.kind == "chat" and not config.judge.replay:
        yield partial(check_key, config.judge.api_key_env, "judge.api_key_env")


def _checks_to_play(config: EvalConfig) -> Iterator[Check]:
    if config.policy.kind == "checkpoint":
        model = resolve(config.model.path)
        yield partial(check_policy, cast(Any, config), model)
        if config.model.path and model.is_dir():
            tokenizer = resolve(config.model.tokenizer) if config.model.tokenizer else model
            check = partial(check_language, cast(Any, config)) if config.hosted else check_tokenizer
            yield partial(check, tokenizer, model)
    if config.policy.kind == "chat":
        yield partial(check_key, config.policy.chat.api_key_env, "policy.chat.api_key_env")
    for path in config.corpus.files:
        yield partial(check_corpus, resolve(path))
    if config.corpus.index:
        yield partial(check_file, resolve(config.corpus.index), "index", "corpus.index", folders=True)
    shape = model_shape(config.model) if config.policy.kind == "checkpoint" else None
    if shape is not None:
        yield partial(check_fits, config, shape)


def check_fits(config: EvalConfig, shape: ModelShape) -> None:
    """Of this machine: that the engines of a checkpoint fit into it."""
    if joined_address(config.ray):
        return
    on_cpu, engine = not config.fleet.num_gpus, config.engine
    if on_cpu or engine.kv_cache_gb is not None:
        per_token = kv_bytes_per_token(engine, shape, on_cpu=on_cpu) // max(1, engine.tensor_parallel)
        check_cache(CPU_KV_GIB if engine.kv_cache_gb is None else engine.kv_cache_gb, per_token, engine.max_model_len)
    check_engines(config, shape)


def check_names(config: EvalConfig) -> None:
    """Names that stand in registries of other rooms."""
    import re

    from agents.protocols import PROTOCOLS
    from rewards.metrics.registry import METRICS

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"name {config.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
    for key, value, known in (
        ("protocol.name", config.protocol.name, PROTOCOLS),
        ("model.init", config.model.init, ("pretrained", "random")),
        ("retrieval.kind", config.retrieval.kind, KINDS),
        *((f"metrics[{i}]", name, METRICS) for i, name in enumerate(config.metrics)),
    ):
        if value not in known:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(sorted(known))}")


def check_place(storage_path: str) -> None:
    """That what is written lies where it was asked for: a folder is appended to and locked, which an object store cannot be."""
    if is_object_store(storage_path):
        raise UserError(
            f"storage_path {storage_path} is an object store; an evaluation is written to a folder, and goes on from it: set storage_path to one"
        )


def check_recorded(folder: Path) -> None:
    """Whether there is something recorded in a folder."""
    if not any((folder / name).is_file() for name in (UNITS, *GROUPS)):
        raise UserError(
            f"{folder} holds nothing that was played ({UNITS}, or {' or '.join(GROUPS)}); correct policy.recorded"
        )


# ------------------------------------------------------------------------------------------------------ questions


def questions(config: EvalConfig) -> Benchmark:
    """The benchmark in memory. Raises BenchmarkError and UserError."""
    found = _questions(config)
    if config.corpus.source != "parallel_world":
        return found
    try:  # families of parallel worlds have posed them already, in the setting that was asked for
        tasks = found.tasks if all("setting" in t.meta for t in found.tasks) else tuple(posed_rows(found.tasks))
    except ValueError as error:
        raise UserError(f"corpus.source is parallel_world: {error}") from None
    return replace(found, tasks=tasks, documents=None)


def _questions(config: EvalConfig) -> Benchmark:
    kind = config.benchmark.kind
    if kind == WORLD:
        return _limited(_world(config), config)
    if not kind and config.policy.kind == "recorded":
        return _limited(_of_recording(config), config)
    if not kind:
        raise UserError(f"benchmark.kind is not set; one of {', '.join((WORLD, *FAMILIES))}")
    if kind not in FAMILIES:
        load_benchmark(config.benchmark)  # says which is near
    path = str(resolve(config.benchmark.path)) if config.benchmark.path else ""
    return load_benchmark(replace(config.benchmark, path=path))


def _world(config: EvalConfig) -> Benchmark:
    from envs.world import build_world

    made = build_world(config.world)
    metrics = ("accuracy", "evidence", "citations", "carr", "factorised", "effort")
    name = f"world-{config.world.split}-{config.world.seed}"
    return Benchmark(name, tuple(made.tasks), metrics, documents=lambda: list(made.documents))


def _of_recording(config: EvalConfig) -> Benchmark:
    """The questions that a recording brings."""
    folder = resolve(config.policy.recorded)
    path = folder / TASKS
    if (folder / UNITS).is_file():
        try:
            tasks = read_records(path, Task)
        except RecordError as error:
            raise UserError(
                f"the questions of {folder} cannot be read ({one_line(error)[:120]}); name the set itself in section benchmark"
            ) from None
    else:
        tasks = [group.task for group in _groups(folder)]
    return Benchmark(folder.name, tuple(tasks), ("accuracy", "em", "f1", "effort"))


def _limited(found: Benchmark, config: EvalConfig) -> Benchmark:
    """As `load_benchmark` does it: shuffled, and only the first."""
    import random

    tasks, asked = list(found.tasks), config.benchmark
    if asked.shuffle:
        random.Random(asked.seed).shuffle(tasks)
    return replace(found, tasks=tuple(tasks[: asked.limit] if asked.limit else tasks))


def jobs(config: EvalConfig, folder: Folder, *, retry_errors: bool) -> list[Job]:
    """Units that are still to be played: all questions once, then again, then the probes."""
    done = {key for key, state in folder.keys().items() if state is State.done or not retry_errors}
    units = [(sample, "") for sample in range(config.samples)] + [(0, probe) for probe in config.probes]
    made = (
        Job(task, Unit(task.id, sample, folder.config), probe)
        for sample, probe in units
        for task in folder.benchmark.tasks
        if probe != "oracle" or evidence_of(task)
    )
    return [job for job in made if job.key not in done]


# --------------------------------------------------------------------------------------------------------- corpus


def open_corpus(config: EvalConfig, benchmark: Benchmark) -> tuple[str | None, list[str]]:
    """(folder of the index, built where it is missing; empty for a server, None where nothing is served), notes for a reader."""
    source, storage = config.corpus.source, storage_dir(config.storage_path)
    if source in ("none", "parallel_world"):
        return None, []
    if source == "server":
        return "", []
    if source == "benchmark":
        directory = _of_benchmark(config, benchmark, storage)
    else:
        given = config.corpus
        files = [str(resolve(f)) for f in given.files]
        directory = index_of(
            CorpusWorldConfig(corpus=files, malformed=given.malformed, index=given.index, columns=given.columns),
            config.retrieval,
            storage,
        )
    with contextlib.closing(IndexFolder(config.retrieval, directory).store()) as store:
        return str(directory), lacking(benchmark, cast("Collection[str]", store))


def lacking(benchmark: Benchmark, known: Collection[str]) -> list[str]:
    """A note when evidence is not in the corpus."""
    missing = {task.id: [d for d in evidence_of(task) if d not in known] for task in benchmark.tasks}
    short = {task: docs for task, docs in missing.items() if docs}
    if not short:
        return []
    documents = {d for docs in short.values() for d in docs}
    return [
        f"the corpus lacks {len(documents)} evidence documents of {len(short)} of {len(benchmark.tasks)} questions, which cannot be answered from it as they should"
    ]


def _of_benchmark(config: EvalConfig, benchmark: Benchmark, storage: Path) -> Path:
    if benchmark.documents is None:
        raise UserError(
            f"{benchmark.name} comes with no documents; set corpus.source to files, index, server or parallel_world, or to none for a closed book"
        )
    backend = config.retrieval
    if backend.kind == "auto":
        raise UserError(
            "retrieval.kind is auto, which needs corpus.source=index, a folder that `gumshoe index` has built"
        )
    documents: list[Document] = benchmark.documents()
    content = digest([[d.id, d.title, d.text] for d in documents])
    key = digest([content, {leg: settings(backend, leg) for leg in legs_of(backend)}, backend.shards])
    directory = storage / "indexes" / f"{backend.kind}-{benchmark.name}-{key[:8]}"
    if not _built(config, directory, key):
        with contextlib.suppress(Busy):
            build_folder(backend, lambda: documents, directory, key=key)
    return directory


def _built(config: EvalConfig, directory: Path, key: str) -> bool:
    try:
        IndexFolder(config.retrieval, directory).check()
        return read_key(directory) == key
    except (RetrievalError, OSError):
        return False


def guarded(sandbox: SandboxConfig, benchmark: Benchmark, path: Path) -> SandboxConfig:
    """The sandbox with the set's canaries in its guard, and a journal that lies in the evaluation's folder."""
    canaries = [c for c in all_canaries(benchmark)[:16] if sum(map(str.isalnum, c)) >= MIN_CANARY]
    guard = replace(sandbox.guard, canaries=list(dict.fromkeys([*sandbox.guard.canaries, *canaries])))
    journal = sandbox.journal  # workers have folders of their own, so paths are made whole here
    journal = replace(
        journal,
        folder=str(resolve(journal.folder) if journal.folder else path / "journals"),
        replay=str(resolve(journal.replay)) if journal.replay else "",
    )
    return replace(sandbox, guard=guard, journal=journal)


# ------------------------------------------------------------------------------------------------------- recorded


def recorded(config: EvalConfig, folder: Folder) -> Iterator[Played]:
    """What was played before, as units of this evaluation, of questions that are asked for; what infrastructure lost stays lost."""
    source = resolve(config.policy.recorded)
    if not (source / UNITS).is_file():
        for group in _groups(source):
            for number, member in enumerate(group.members):
                if group.task.id in folder.tasks and not member.trajectory.stop.infrastructure:
                    trajectory = replace(member.trajectory, verdict=None)
                    yield Played(
                        Unit(group.task.id, number, folder.config), State.done, trajectory, seconds=group.seconds
                    )
        return
    theirs = Folder(source, _hash_of(source), folder.benchmark)
    for played in theirs.played():
        yield replace(played, unit=played.unit._replace(config=folder.config))


def _hash_of(folder: Path) -> str:
    try:
        found: Mapping[str, Any] = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        return str(found["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _groups(folder: Path) -> Iterator[Group]:
    for name in GROUPS:
        if (folder / name).is_file():
            yield from RecordReader(folder / name, Group)
            return
    raise UserError(f"{folder} holds no evaluation of its own ({' or '.join(GROUPS)}); correct policy.recorded")
