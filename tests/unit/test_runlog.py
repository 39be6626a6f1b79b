"""What a run writes down, and what it shows meanwhile."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from cluster.progress import Progress, short_number, short_time
from cluster.runlog import RunLog, full_name, ray_name, read_metrics


def test_rows_are_on_disk_at_once_and_go_on_after_a_crash(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", tensorboard=False, clock=lambda: 12.3456)
    log.log("train", 1, {"reward/mean": np.float32(0.5), "loss": float("nan"), "flag": True})
    assert read_metrics(tmp_path / "run") == [
        {"kind": "train", "step": 1, "time": 12.346, "reward/mean": 0.5, "loss": None, "flag": 1}
    ]
    log.close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a writer that was killed
    with RunLog(tmp_path / "run", tensorboard=False) as again:
        again.evaluation(2, {"success/mean": 0.25})
        again.event(2, "restored\nfrom checkpoint 1")
        again.write({"kind": "eval", "step": 3, "time": 5.0, "label": "after", "success/mean": np.float64(0.5)})
    assert [r["kind"] for r in read_metrics(tmp_path / "run")] == ["train", "eval", "event", "eval"]
    assert read_metrics(tmp_path / "run")[2]["step"] == 2
    assert read_metrics(tmp_path / "run")[3] == {
        "kind": "eval", "step": 3, "time": 5.0, "label": "after", "success/mean": 0.5
    }  # fmt: skip
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log("train", 1, {"reward/mean": 0.5})
        log.evaluation(1, {"success/mean": 0.75})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("reward/mean")[0].value == 0.5
    assert events.Scalars("eval/success/mean")[0].value == 0.75


def test_a_failing_tensorboard_never_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path) as log:
        log.log("train", 1, {"loss": 1.0})
        log.log("train", 2, {"loss": 0.5})
    kinds = [r["kind"] for r in read_metrics(tmp_path)]
    assert kinds == ["train", "event", "train"]


class Wandb:
    """Stands in for the module and for its run."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.broken = False

    def init(self, **settings: Any) -> Wandb:
        self.calls.append(settings)
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.rows.append(row)

    def finish(self) -> None: ...


def test_wandb_has_the_same_numbers_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        with RunLog(tmp_path / "demo", tensorboard=False, wandb=True) as log:
            log.log("train", step, {"reward/mean": 0.5, "label": "x"})
            log.evaluation(step, {"success/mean": 0.75})
    assert wandb.rows[:2] == [{"gumshoe_step": 1, "reward/mean": 0.5}, {"gumshoe_step": 1, "eval/success/mean": 0.75}]
    assert wandb.calls[0] == wandb.calls[1] and wandb.calls[0]["name"] == "demo" and len(wandb.calls[0]["id"]) == 12


def test_a_failing_wandb_never_ends_a_run_and_a_missing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(tmp_path, tensorboard=False, wandb=True) as log:
        wandb.broken = True
        log.log("train", 1, {"loss": 1.0})
        log.log("train", 2, {"loss": 1.0})
    assert [r["kind"] for r in read_metrics(tmp_path)] == ["train", "event", "train"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb, or set it to false"):
        RunLog(tmp_path, tensorboard=False, wandb=True)


def test_summary_is_whole_and_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        path = log.summary(
            {"success_after": {"mean": np.float64(0.8), "n": 200}, "bad": float("inf"), "path": "runs/a"}
        )
    assert json.loads(path.read_text()) == {"success_after": {"mean": 0.8, "n": 200}, "bad": None, "path": "runs/a"}
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_ray_names() -> None:
    assert full_name("publish", "publish/pause_ms") == "publish/pause_ms"
    assert full_name("publish", "time/publish_s") == "publish/time/publish_s"
    assert ray_name("reward/mean") == "gumshoe_reward_mean"
    assert ray_name("stop/turn-limit.x") == "gumshoe_stop_turn_limit_x"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_one_line_per_step_in_a_log() -> None:
    out, clock = io.StringIO(), Clock()
    bar = Progress(10, stream=out, clock=clock)
    for step in (1, 2):
        clock.now += 30.0
        bar.update(step, {"reward/mean": 0.4321, "success": 0.5, "tokens_per_s": 1234.0, "time/step_s": 30.0})
    bar.close()
    lines = out.getvalue().splitlines()
    assert lines[1] == "step  2/10 · reward 0.432 · success 0.500 · 1.2k tok/s · 30.0 s/step · 4m 00s left"
    assert len(lines) == 2


def test_getting_ready_is_not_part_of_the_pace() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(100, unit="question", stream=stream, clock=lambda: now[0], live=False)
    now[0] = 60.0  # engines came up
    progress.begin()
    now[0] = 61.0
    progress.update(1, {})
    assert stream.getvalue() == "question   1/100 · 1m 39s left\n"


def test_progress_updates_one_line_on_a_terminal_and_keeps_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    bar = Progress(10, stream=out, live=True)
    bar.update(1, {"reward/mean": 0.1, "success": 0.2, "tokens_per_s": 10.0, "staleness/mean": 1.0})
    bar.evaluation(1, {"success/mean": 0.5, "success/low": 0.4, "success/high": 0.6, "success/n": 200})
    bar.close()
    text = out.getvalue()
    assert "eval at step 1: success 0.500 [0.400, 0.600] on 200 held-out tasks\n" in text
    assert text.count("\n") == 2
    updates = [
        piece.split("\x1b[2K")[-1] for line in text.split("\n") for piece in line.split("\r") if "step  1/" in piece
    ]
    assert updates and all(len(update) <= 40 for update in updates)


def test_a_closed_terminal_never_ends_a_run() -> None:
    out = io.StringIO()
    bar = Progress(3, stream=out, live=False)
    out.close()
    bar.update(1, {})
    bar.note("x")
    bar.close()


def test_short_forms() -> None:
    assert [short_number(v) for v in (3, 3.25, 999, 1234, 4.5e6)] == ["3", "3.2", "999", "1.2k", "4.5M"]
    assert [short_time(v) for v in (5, 272, 7500)] == ["5s", "4m 32s", "2h 05m"]
