"""Ray's own metrics endpoint, which Prometheus reads, shows what a run logs."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

from cluster.runlog import RunLog
from cluster.runtime import RayConfig, ray_session

DEADLINE_S = 30.0


def gauges(address: str) -> dict[str, tuple[str, float]]:
    """Our metrics at a node's endpoint: name -> (labels, value)."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        found = re.findall(r"^(ray_gumshoe_\w+)\{(.*)\} (\S+)$", reply.read().decode(), re.M)
    return {name: (labels, float(value)) for name, labels, value in found}


def test_the_endpoint_shows_the_last_row_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    with (
        ray_session(RayConfig(num_cpus=1, object_store_mb=100)) as ray,
        RunLog(tmp_path / "demo", tensorboard=False) as log,
    ):
        log.log("train", 1, {"reward/mean": 0.25, "time/train_s": 1.25})
        log.log("train", 2, {"reward/mean": 0.5, "bad": float("nan")})
        log.log("publish", 2, {"publish/pause_ms": 12.5})
        log.evaluation(2, {"success/mean": 0.75})
        node = ray.nodes()[0]
        address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        found: dict[str, tuple[str, float]] = {}
        until = time.monotonic() + DEADLINE_S
        while "ray_gumshoe_eval_success_mean" not in found and time.monotonic() < until:
            time.sleep(0.5)
            try:
                found = gauges(address)
            except OSError:
                continue  # the agent is not up yet
        assert {name: value for name, (_, value) in found.items()} == {
            "ray_gumshoe_reward_mean": 0.5, "ray_gumshoe_time_train_s": 1.25, "ray_gumshoe_publish_pause_ms": 12.5,
            "ray_gumshoe_eval_success_mean": 0.75,
        }  # fmt: skip
        assert all('run="demo"' in labels for labels, _ in found.values())
