"""A run's folder, and the folder in memory for the weights it publishes.

Invariants: a run never writes over another: an older folder of the same name steps aside under its date. The segment
folder is removed when the run ends, however it ends.
"""

from __future__ import annotations

import contextlib
import json
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

WHOLE_TRAJECTORIES = 12


def open_run(config: Any) -> Path:
    """Makes the run's folder and saves the resolved config in it."""
    run_dir = Path(config.storage_path).expanduser().absolute() / config.name
    if run_dir.exists() and any(run_dir.iterdir()):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(run_dir.stat().st_mtime))
        run_dir.rename(run_dir.with_name(f"{config.name}-{stamp}"))
    for part in ("eval", "logs"):
        (run_dir / part).mkdir(parents=True, exist_ok=True)
    save_resolved(config, run_dir / "config.yaml")
    return run_dir


@contextlib.contextmanager
def segment_dir(name: str) -> Iterator[str]:
    """A folder for weight segments: in shared memory where the machine has it, else in the temporary folder."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix=f"gumshoe-{name}-", dir=memory if memory.is_dir() else None)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
