"""A run's folder, and the folder in memory for the weights it publishes.

Invariants: a run never writes over another: an older folder of the same name steps aside under its date, unless the run goes
on with it (`resume=`). The segment folder is removed when the run ends, however it ends. Where storage is an object store
(`storage_path` is a URI), the run's folder is on the driver's machine, and `cluster.mirror` copies it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.interfaces import Speech
from agents.recordfile import write_records
from agents.report.timeline import trajectory_row
from agents.types import Group, Task
from cluster.config import as_saved, load_saved, save_resolved
from cluster.errors import UserError
from cluster.mirror import fetch, holds, mirrored
from cluster.storage import folder_path, is_object_store, join, leave_token
from retrieval.manifest import digest

WHOLE_TRAJECTORIES = 12
CONFIG = "config.yaml"
_SEGMENTS = "gumshoe-weights-"


def storage_dir(storage_path: str) -> Path:
    """`storage_path` as a folder; of an object store, the folder on this machine where its runs are while they run.

    A job's working directory is a temporary copy that Ray removes, so a relative path in a job lies below the home folder.
    """
    if is_object_store(storage_path):
        return Path.home() / ".cache" / "gumshoe" / "storage" / digest(storage_path.rstrip("/"))[:16]
    path = folder_path(storage_path)
    if not path.is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return Path.home() / "gumshoe" / path
    return path.absolute()


@dataclass(frozen=True)
class RunFolder:
    """An opened run."""

    path: Path
    resumed: bool = False
    """There is something to go on from."""
    lines: tuple[str, ...] = ()
    """What a person should know about the resumption."""
    uri: str = ""
    """Where it is copied to; empty where storage is a folder."""
    token: str = ""
    """What lies in the folder of checkpoints, for learners on other nodes to know it by (`cluster.storage`)."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end."""
        try:
            found = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


@contextlib.contextmanager
def open_run(config: Any) -> Iterator[RunFolder]:
    """Makes the run's folder, or opens that of `config.resume`, saves the resolved config in it, and keeps it locked.

    Raises UserError when it is in use, when there is nothing to resume, or when the config does not fit what is there.
    """
    storage, run_dir, resumed = find_run(config)
    uri = run_uri(config.storage_path, run_dir.name)
    storage.mkdir(parents=True, exist_ok=True)
    with open(storage / f".{run_dir.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"run {run_dir.name!r} is going on in {storage}; wait for it, or give this one another name="
            ) from None
        lines: list[str] = []
        if uri and resumed:
            fetch(uri, run_dir)
        elif uri and holds(uri, CONFIG):
            raise UserError(
                f"run {run_dir.name!r} is in {config.storage_path} already; go on with it by resume={run_dir.name}, or give another name="
            )
        if resumed:
            lines = _compare(config, run_dir)
        elif run_dir.exists() and any(run_dir.iterdir()):
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(run_dir.stat().st_mtime))
            run_dir.rename(run_dir.with_name(f"{run_dir.name}-{stamp}"))
        for part in ("eval", "logs", "checkpoints"):
            (run_dir / part).mkdir(parents=True, exist_ok=True)
        if lines:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            shutil.copyfile(run_dir / CONFIG, run_dir / f"config-until-{stamp}.yaml")  # there is always one
        if lines or not resumed:
            save_resolved(config, run_dir / CONFIG)
        with mirrored(run_dir, uri) if uri else contextlib.nullcontext():
            yield RunFolder(run_dir, resumed, tuple(lines), uri, leave_token(run_dir / "checkpoints"))


def run_uri(storage_path: str, name: str) -> str:
    """Where a run is copied to; empty where storage is a folder."""
    return join(storage_path, name) if is_object_store(storage_path) else ""


def find_run(config: Any) -> tuple[Path, Path, bool]:
    """Storage, the run's folder, and whether a run there goes on. `resume`: a run's name, its folder, or `auto`."""
    storage = storage_dir(config.storage_path)
    wanted = config.resume
    if not wanted:
        return storage, storage / config.name, False
    if wanted == "auto":
        folder = storage / config.name
        return storage, folder, _is_there(config.storage_path, folder)
    folder = storage / wanted
    if _is_there(config.storage_path, folder):
        return storage, folder, True
    if (Path(wanted).expanduser() / CONFIG).is_file():
        folder = Path(wanted).expanduser().absolute()
    if not (folder / CONFIG).is_file():
        there = sorted(p.parent.name for p in storage.glob(f"*/{CONFIG}")) if storage.is_dir() else []
        raise UserError(
            f"resume={wanted}: there is no run {folder}; "
            + (f"runs in {storage}: {', '.join(there[-6:])}" if there else f"{storage} holds no run")
            + "; resume=auto goes on if there is something to go on from"
        )
    return folder.parent, folder, True


FIXED = (
    "seed", "model", "protocol", "world", "curriculum", "learner.lora", "learner.critic.kind", "buffer.group_size", "buffer.groups_per_batch",
    "sampling.max_context", "replay",
)  # fmt: skip
"""Keys that a resumed run may not change: its checkpoint, its task order or its evaluation would mean something else."""
_FREE = frozenset({"resume", "storage_path", "name"})


def _compare(config: Any, run_dir: Path) -> list[str]:
    """Lines about what differs from the run's own config. Raises UserError for a key that must not."""
    before, now = flat(load_saved(run_dir / CONFIG)), flat(as_saved(config))
    changed = sorted(k for k in now.keys() & before.keys() - _FREE if now[k] != before[k])
    for key in changed:
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise UserError(
                f"resume={config.resume}: {key} is {now[key]!r}, the run in {run_dir} was started with {before[key]!r}; "
                "give it as it was, or start a new run"
            )
    return [f"resumed with {key} {now[key]!r} (was {before[key]!r})" for key in changed]


def _is_there(storage_path: str, folder: Path) -> bool:
    """Whether there is a run, in an object store or on this machine."""
    uri = run_uri(storage_path, folder.name)
    return (folder / CONFIG).is_file() or bool(uri and holds(uri, CONFIG))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    if isinstance(values, dict) and values:
        return {k: v for key, inner in values.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): values}


@contextlib.contextmanager
def segment_dir() -> Iterator[str]:
    """A folder for weight segments: in shared memory where the machine has it, else in the temporary folder.

    Folders of runs that were killed before they could clean up are removed on the way.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
    here = digest(socket.gethostname())[:8]  # a learner on another machine writes to a folder of the same name there
    for left in parent.glob(f"{_SEGMENTS}*-{here}-*"):
        owner = left.name.removeprefix(_SEGMENTS).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{_SEGMENTS}{os.getpid()}-{here}-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_whole(path: Path, records: Sequence[Any]) -> None:
    """Records as a file that appears complete or not at all."""
    part = path.with_name(f".part-{path.name}")
    part.unlink(missing_ok=True)
    write_records(part, list(records))
    part.replace(path)


def write_tasks(run_dir: Path, tasks: Sequence[Task]) -> str:
    """The training tasks of a run, beside its ledger. Returns the file's path."""
    write_whole(run_dir / "tasks.jsonl", tasks)
    return str(run_dir / "tasks.jsonl")


def write_trajectories(run_dir: Path, groups: Sequence[Group], speech: Speech, trained: Sequence[Group] = ()) -> None:
    """A few whole trajectories with their decoded text, for the report: right and wrong ones, easy and hard ones, and those of
    `trained` last, which the report shows first."""

    def rank(group: Group) -> tuple[float, str]:
        return (min(v.reward for v in group.verdicts), group.task.id)

    ordered = sorted(groups, key=rank)
    most = WHOLE_TRAJECTORIES - len(trained)
    chosen = ordered if len(ordered) <= most else [*ordered[: most // 2], *ordered[-(most - most // 2) :]]
    with open(run_dir / "trajectories.jsonl", "w", encoding="utf-8") as file:
        for group in (*chosen, *trained):
            file.write(json.dumps(trajectory_row(group, speech.decode), ensure_ascii=False) + "\n")
