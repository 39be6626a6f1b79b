"""`gumshoe eval` and `gumshoe warmup`, as a user calls them."""

import json

from safetensors.torch import load_file

from tests.runs import SMALL, finished, gumshoe, rows


def test_eval_scores_the_policy_without_training(tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "look"
    small = [o for o in SMALL if not o.startswith("train.eval_tasks=")]
    command = ("eval", "configs/demo.yaml", "name=look", f"storage_path={tmp_path}", *small, "train.eval_tasks=12")
    with gumshoe(*command, log=log) as process:
        output = finished(process, log, 240)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["success"]["n"] == 12 and 0 < summary["success"]["mean"] < 1
    assert summary["success"]["low"] < summary["success"]["mean"] < summary["success"]["high"]
    assert [r["kind"] for r in rows(run_dir) if r["kind"] != "event"] == ["eval"]
    assert len((run_dir / "eval" / "eval.jsonl").read_text().splitlines()) == 12
    assert (run_dir / "report.html").exists() and "12" in output


def test_warmup_writes_a_checkpoint_that_differs_from_its_start(tmp_path):
    log, out = tmp_path / "log", tmp_path / "policy"
    stages = "[{name: first, steps: 3, lr: 1.0e-3, final_lr: 1.0e-3, rise_steps: 0}]"
    command = (
        "warmup",
        "configs/warmup.yaml",
        f"out={out}",
        f"warmup.stages={stages}",
        "warmup.num_checks=4",
        "warmup.threads=1",
    )
    with gumshoe(*command, log=log) as process:
        finished(process, log, 120)
    made = json.loads((out / "warmup.json").read_text())
    assert made["step"] == 3 and made["loss"] > 0
    assert (out / "tokenizer.json").exists() and load_file(out / "model.safetensors")
