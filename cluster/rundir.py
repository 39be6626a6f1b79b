"""A run's folder, and the folder in memory for the weights it publishes.

Invariants: a run never writes over another: an older folder of the same name steps aside under its date. The segment
folder is removed when the run ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agents.interfaces import Speech
from agents.plain import to_plain
from agents.types import Group
from cluster.config import save_resolved
from cluster.errors import UserError

WHOLE_TRAJECTORIES = 12
_SEGMENTS = "gumshoe-weights-"


def storage_dir(storage_path: str) -> Path:
    """`storage_path` as a folder. Raises UserError for what cannot be one.

    A job's working directory is a temporary copy that Ray removes, so a relative path in a job lies below the home folder.
    """
    if "://" in storage_path:
        raise UserError(
            f"storage_path {storage_path} is a URI, which is not supported yet; give a folder that all nodes share"
        )
    path = Path(storage_path).expanduser()
    if not path.is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return Path.home() / "gumshoe" / path
    return path.absolute()


@contextlib.contextmanager
def open_run(config: Any) -> Iterator[Path]:
    """Makes the run's folder, saves the resolved config in it, and keeps it locked. Raises UserError when it is in use."""
    storage = storage_dir(config.storage_path)
    storage.mkdir(parents=True, exist_ok=True)
    with open(storage / f".{config.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"run {config.name!r} is going on in {storage}; wait for it, or give this one another name="
            ) from None
        run_dir = storage / config.name
        if run_dir.exists() and any(run_dir.iterdir()):
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(run_dir.stat().st_mtime))
            run_dir.rename(run_dir.with_name(f"{config.name}-{stamp}"))
        for part in ("eval", "logs"):
            (run_dir / part).mkdir(parents=True, exist_ok=True)
        save_resolved(config, run_dir / "config.yaml")
        yield run_dir


@contextlib.contextmanager
def segment_dir() -> Iterator[str]:
    """A folder for weight segments: in shared memory where the machine has it, else in the temporary folder.

    Folders of runs that were killed before they could clean up are removed on the way.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
    for left in parent.glob(f"{_SEGMENTS}*-*"):
        owner = left.name.removeprefix(_SEGMENTS).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{_SEGMENTS}{os.getpid()}-", dir=parent)
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


def write_trajectories(run_dir: Path, groups: Sequence[Group], speech: Speech) -> None:
    """A few whole trajectories with their decoded text, for the report: right and wrong ones, easy and hard ones."""

    def rank(group: Group) -> tuple[float, str]:
        return (min(v.reward for v in group.verdicts), group.task.id)

    ordered = sorted(groups, key=rank)
    half = WHOLE_TRAJECTORIES // 2
    chosen = ordered if len(ordered) <= WHOLE_TRAJECTORIES else [*ordered[:half], *ordered[-half:]]
    with open(run_dir / "trajectories.jsonl", "w", encoding="utf-8") as file:
        for group in chosen:
            text = [[speech.decode(t.token_ids.tolist()) for t in m.trajectory.turns] for m in group.members]
            file.write(json.dumps({"group": to_plain(group), "text": text}, ensure_ascii=False) + "\n")
