"""A submitted job trains as the command does, and a job that was killed goes on when it is submitted again.

A foreign `agents` is installed on the cluster and at the user's all the while. The first job is handed in by `gumshoe submit`, the
second by plain `ray job submit` with a relative storage_path: both mean the same folder below the job's home.
"""

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
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.submit import upload_files
from tests.books import journal, replayed
from tests.runs import ROOT, SMALL, below, end, gumshoe, ours, rows, rows_since, wait_for

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


@dataclass(frozen=True)
class Cluster:
    """A running head node."""

    address: str
    pid: int
    folder: Path

    def job(self) -> int:
        """Pid of the driver of the job that is running."""
        return next(
            pid for pid, title in below(self.pid).items() if title.startswith(f"{sys.executable} -m cluster.cli")
        )

    def left_in_job_folders(self) -> set[str]:
        """Files in the jobs' unpacked folders that were not uploaded."""
        found = set()
        for unpacked in self.folder.glob("session_2*/runtime_resources/working_dir_files/*"):
            if unpacked.is_dir():
                found |= {f.relative_to(unpacked).as_posix() for f in unpacked.rglob("*") if f.is_file()}
        assert found, "there are no unpacked folders: has Ray moved them?"
        return {name for name in found - {name for name, _ in upload_files(ROOT)} if "__pycache__" not in name}


@contextlib.contextmanager
def cluster(site: Path, log: Path) -> Iterator[Cluster]:
    """`ray start --head` on loopback; ends what it started."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="gs-ray-", dir="/tmp")  # socket paths must be short
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}",
        "--object-store-memory=150000000", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}",  # the default may be another Ray's, and then no job is taken
    ]  # fmt: skip
    with open(log, "wb") as out:
        head = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env={**os.environ, **OPEN, "PYTHONPATH": str(site)},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=2)
                break
            assert time.monotonic() < deadline and head.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        yield Cluster(f"http://127.0.0.1:{dashboard}", head.pid, Path(folder))
    finally:  # nothing in it is worth an orderly end, which takes ten seconds
        end([head.pid, *below(head.pid)])
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_job_goes_on_when_it_is_submitted_again(foreign: Path, tmp_path: Path) -> None:
    log, home = tmp_path / "log", tmp_path / "home"
    store = home / "gumshoe" / "mine"
    run_dir, run = store / "ours", ("name=ours", "resume=auto", *SMALL, "train.steps=8", "train.checkpoint_every=2")
    with cluster(foreign, tmp_path / "ray.log") as there:
        submit = ("submit", "configs/demo.yaml", *run, f"storage_path={store}", "--address", there.address)
        with gumshoe(*submit, log=log, env={**OPEN, "PYTHONPATH": str(foreign)}) as process:
            wait_for(lambda: list(run_dir.glob("checkpoints/step-*")), process, log, 400)
            actors = ours(there.pid)
            os.kill(there.job(), signal.SIGKILL)
            assert process.wait(60) != 0
            assert actors and not end(actors, 30), "a killed job left its actors behind"
        assert "MiB" in log.read_text(), "the upload's size is printed"
        assert not there.left_in_job_folders()
        saved = max(run_dir.glob("checkpoints/step-*"))
        before = rows(run_dir, "train")
        variables = json.dumps({"env_vars": {"HOME": str(home)}})
        plain = [
            str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", there.address, "--working-dir", ".",
            "--runtime-env-json", variables, "--",
            sys.executable, "-m", "cluster.cli", "train", "configs/demo.yaml", *run, "storage_path=mine",
        ]  # fmt: skip
        done = subprocess.run(plain, cwd=ROOT, env={**os.environ, **OPEN}, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert not there.left_in_job_folders()
    assert len(before) < 8, "the first job was to be killed on its way"
    steps = [r["step"] for r in rows_since(run_dir, "learner 1 begins")]
    assert steps == list(range(int(saved.name.removeprefix("step-")) + 1, 9)), "it went on from the newest checkpoint"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["ledger"]["trained"] == 8 * 8
    replayed(journal(run_dir / "ledger.jsonl")).agrees(summary["ledger"])
    assert Path(summary["checkpoint"]).is_relative_to(store) and Path(summary["checkpoint"]).is_dir()
    assert (run_dir / "report.html").exists()
