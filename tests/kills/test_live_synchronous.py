"""`buffer.max_staleness=0`, live: every trained token carries the learner's version, also when a rollout worker dies."""

import json
import os
import re
import signal
import subprocess

from tests.runs import SMALL, balanced, finished, gumshoe, rows, wait_for


def rollout_worker(parent: int) -> int:
    """Pid of one rollout worker below the run's process group."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    table = [re.split(r"\s+", line.strip(), maxsplit=2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(ppid) for pid, ppid, _ in table}

    def below(pid: int) -> bool:
        while pid in parents and pid != parent:
            pid = parents[pid]
        return pid == parent

    return next(int(pid) for pid, _, args in table if args.startswith("ray::RolloutWorker") and below(int(pid)))


def test_synchronous_training_survives_a_dead_rollout_worker(tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "sync"
    run = (
        "train",
        "configs/demo.yaml",
        "name=sync",
        f"storage_path={tmp_path}",
        "train.steps=6",
        "buffer.max_staleness=0",
    )
    with gumshoe(*run, *SMALL, "rollout.workers=2", log=log) as process:
        wait_for(lambda: rows(run_dir, "train"), process, log, 180)
        os.kill(rollout_worker(process.pid), signal.SIGKILL)
        output = finished(process, log, 240)
    assert "took its place" in output
    trained = rows(run_dir, "train")
    assert [r["step"] for r in trained] == list(range(1, 7))
    assert all(r["staleness/max"] == 0 and balanced(r) for r in trained)
    assert all(r["mismatch/kl_k3"] < 1e-6 for r in trained), "sampler and learner compute the same probabilities"
    ledger = json.loads((run_dir / "summary.json").read_text())["ledger"]
    assert ledger["trained"] == 6 * 8
