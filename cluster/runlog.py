"""What a run writes down as it goes: metrics.jsonl, TensorBoard, Ray metrics, Weights & Biases, summary.json.

Rows of metrics.jsonl: {"kind": "train" | "eval" | "publish" | "event", "step": int, "time": unix seconds, "a/b": number}.

Invariants: a row is flushed whole before the call returns; logging never ends a run (TensorBoard, Ray metrics and wandb are
dropped with one event when they fail; only the run's own folder must be writable); numbers that are not finite are
written as null; safe to call from several threads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError, one_line

_LOG = logging.getLogger(__name__)
_FAMILIES = ("train", "eval", "publish")
_BOOKKEEPING = frozenset({"kind", "step", "time"})


class RunLog:
    """Writes a run's metrics. Close it at the end; it may be opened again to go on with the same run."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = True,
        ray_metrics: bool = True,
        wandb: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = _open_wandb(self.run_dir) if wandb else None
        self.path = self.run_dir / "metrics.jsonl"
        self._clock = clock
        self._lock = threading.Lock()
        mend_tail(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._tensorboard: Any = None if tensorboard else False
        self._ray = ray_metrics
        self._gauges: dict[str, Any] = {}
        self._step = 0

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self.run_dir

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write one row of numbers under `kind` (`train`, `eval` or `publish`); returns the row."""
        return self.write({"kind": kind, "step": step, **values})

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write one row that carries its own `kind` and `step` (and `time`, else now); returns what was written."""
        row = {"kind": row["kind"], "step": int(row["step"]), "time": round(self._clock(), 3), **_finite(row)}
        kind, step = row["kind"], row["step"]
        with self._lock:
            self._step = max(self._step, step)
            self._write(row)
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in _BOOKKEEPING}
            self._to_tensorboard(kind, step, numbers)
            self._to_ray(kind, numbers)
            self._to_wandb(kind, step, numbers)
        return row

    def evaluation(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """The row of one held-out evaluation: success/mean, success/low, success/high, success/n, ..."""
        return self.log("eval", step, values)

    def event(self, step: int, message: str) -> None:
        """Something worth telling a person: a restart, a checkpoint, a warning."""
        with self._lock:
            self._write(
                {
                    "kind": "event",
                    "step": int(step),
                    "time": round(self._clock(), 3),
                    "message": str(message),
                }
            )

    def summary(self, values: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all."""
        path = self.run_dir / "summary.json"
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    def close(self) -> None:
        with self._lock:
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()
            self._tensorboard = False
            if self._wandb is not None:
                with contextlib.suppress(Exception):
                    self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- writers

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def _to_tensorboard(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        if self._tensorboard is False:
            return
        try:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), flush_secs=10)
            for name, value in numbers.items():
                self._tensorboard.add_scalar(full_name(kind, name), value, step)
        except Exception as error:
            self._tensorboard = False
            self._write_loss(step, f"TensorBoard log stopped: {type(error).__name__}: {error}")

    def _to_ray(self, kind: str, numbers: Mapping[str, float]) -> None:
        ray = sys.modules.get("ray")
        if not self._ray or kind not in _FAMILIES or ray is None:
            return
        try:
            if not ray.is_initialized():
                return
            from ray.util.metrics import Gauge

            for name, value in numbers.items():
                metric = ray_name(full_name(kind, name))
                if metric not in self._gauges:
                    self._gauges[metric] = Gauge(metric, description=f"Gumshoe {kind} metric {name}", tag_keys=("run",))
                self._gauges[metric].set(float(value), tags={"run": self.run_dir.name})
        except Exception as error:
            self._ray = False
            self._write_loss(self._step, f"Ray metrics stopped: {type(error).__name__}: {error}")

    def _to_wandb(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        if self._wandb is None:
            return
        try:  # `gumshoe_step` is the x axis: wandb's own step never goes back, ours does after a restore
            self._wandb.log({"gumshoe_step": step, **{full_name(kind, name): value for name, value in numbers.items()}})
        except Exception as error:
            self._wandb = None
            self._write_loss(step, f"wandb log stopped: {type(error).__name__}: {error}")

    def _write_loss(self, step: int, message: str) -> None:
        _LOG.warning(message)
        self._write({"kind": "event", "step": step, "time": round(self._clock(), 3), "message": message})


def _open_wandb(run_dir: Path) -> Any:
    """A wandb run in `run_dir`/wandb that a resumed run goes on with. Raises UserError when wandb is not installed.

    WANDB_PROJECT, WANDB_MODE and all else that wandb reads from the environment hold.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.wandb is true, but wandb is not installed; pip install wandb, or set it to false"
        ) from None
    project = os.environ.get("WANDB_PROJECT", "gumshoe")
    try:
        run = wandb.init(project=project, name=run_dir.name, id=_wandb_id(run_dir), dir=run_dir, resume="allow")
    except Exception as error:
        raise UserError(
            f"wandb did not start: {one_line(error)}; set WANDB_MODE=offline or train.wandb=false"
        ) from error
    run.define_metric("*", step_metric="gumshoe_step")
    return run


def _wandb_id(run_dir: Path) -> str:
    """One id per run's folder, kept in it, so that a run of the same name elsewhere is another one."""
    path = run_dir / "wandb.id"
    if not path.is_file():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def full_name(kind: str, name: str) -> str:
    """A number's name where all kinds share one space: those of training rows as they are, others behind their kind."""
    return name if kind == "train" or name.startswith(f"{kind}/") else f"{kind}/{name}"


def ray_name(name: str) -> str:
    """A metric's name on Ray's dashboard: `reward/mean` -> `gumshoe_reward_mean`."""
    return "gumshoe_" + re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, oldest first. A torn last line and a missing file give what there is."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "kind" in row:
                rows.append(row)
    return rows


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int):
        value = float(value)  # numpy scalars and one-element tensors too
        if not math.isfinite(value):
            return None
    return value


def _finite(value: Any) -> Any:
    """Plain JSON values: numpy scalars become numbers, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if value is None or isinstance(value, str):
        return value
    try:
        return _number(value)
    except (TypeError, ValueError):
        return str(value)


def mend_tail(path: Path) -> None:
    """End a line that a crashed writer left open, so that the next row does not stick to it."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
