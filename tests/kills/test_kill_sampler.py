"""A sampler that is killed in the middle of a run costs time, never the run."""

import json
import os
import signal

from tests.runs import SMALL, alive, balanced, finished, gumshoe, rows, wait_for


def test_a_killed_sampler_is_replaced_and_the_ledger_balances(tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "kill"
    run = (
        "train",
        "configs/demo.yaml",
        "name=kill",
        f"storage_path={tmp_path}",
        "train.steps=8",
        "fleet.num_engines=2",
    )
    with gumshoe(*run, *SMALL, log=log) as process:
        wait_for(lambda: rows(run_dir, "train"), process, log, 180)
        events = [r["message"] for r in rows(run_dir, "event") if r["message"].startswith("engines: ")]
        engines = json.loads(events[0].removeprefix("engines: "))
        actor, *engine_processes = engines["sampler-0"]
        os.kill(actor, signal.SIGKILL)
        output = finished(process, log, 240)
        assert "fenced" in output
        assert not any(alive(pid) for pid in engine_processes), "the killed actor left its engine behind"
    trained = rows(run_dir, "train")
    assert [r["step"] for r in trained] == list(range(1, 9))
    assert all(balanced(r) for r in trained)
    ledger = json.loads((run_dir / "summary.json").read_text())["ledger"]
    assert ledger["trained"] == 8 * 8
    assert ledger["admitted"] == sum(ledger[k] for k in ("running", "ready", "in_batch", "trained")) + sum(
        ledger["dropped"].values()
    )
