"""A submitted job trains as the command does, though a foreign `agents` is installed on the cluster and at the user's."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT, SMALL, finished, gumshoe, rows

OPEN = {"RAY_AUTH_MODE": "disabled"}
"""The cluster is on loopback and lives for one test; Ray may otherwise ask for a token."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A site folder with a distribution `openai-agents`, whose `agents` fails whoever imports it."""
    site = tmp_path / "site"
    (site / "agents").mkdir(parents=True)
    (site / "agents" / "__init__.py").write_text("raise RuntimeError('the foreign agents package was imported')\n")
    info = site / "openai_agents-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 9.9\n")
    (info / "RECORD").write_text("agents/__init__.py,,\n")
    return site


@contextlib.contextmanager
def cluster(site: Path, log: Path) -> Iterator[str]:
    """`ray start --head` on loopback; yields the dashboard's address; ends what it started."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="gs-ray-", dir="/tmp")  # socket paths must be short
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}",
        "--object-store-memory=150000000", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    with open(log, "wb") as out:
        head = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env={**os.environ, **OPEN, "PYTHONPATH": str(site)},
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/version", timeout=2)
                break
            assert time.monotonic() < deadline and head.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_jobs_train_beside_a_foreign_agents_package(foreign: Path, tmp_path: Path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    small = ("train.steps=2", *SMALL)
    with cluster(foreign, tmp_path / "ray.log") as address:
        submit = ("submit", "configs/demo.yaml", "name=ours", f"storage_path={store}", *small, "--address", address)
        with gumshoe(*submit, log=log, env={**OPEN, "PYTHONPATH": str(foreign)}) as process:
            output = finished(process, log, 240)
        assert "MiB" in output, "the upload's size is printed"
        # Plain Ray, and a relative storage_path: nothing of value may lie in the job's unpacked folder.
        ray, home = str(Path(sys.executable).with_name("ray")), tmp_path / "home"
        variables = json.dumps({"env_vars": {"HOME": str(home)}})
        plain = [
            ray, "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env-json", variables, "--",
            sys.executable, "-m", "cluster.cli", "train", "configs/demo.yaml", "name=plain", "storage_path=mine", *small,
        ]  # fmt: skip
        done = subprocess.run(plain, cwd=ROOT, env={**os.environ, **OPEN}, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for run_dir in (store / "ours", home / "gumshoe" / "mine" / "plain"):
        assert [r["step"] for r in rows(run_dir, "train")] == [1, 2]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["ledger"]["trained"] == 16
        assert Path(summary["checkpoint"]).is_dir()
        assert (run_dir / "report.html").exists()
