"""A run of two nodes loses one, goes on, and has it back: with a sampler and a rollout worker on it, and once with the learner too.

Two raylets on one machine; the driver is a process of its own, as a user starts it. The journal proves that the books balance.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.books import journal, replayed
from tests.runs import SMALL, balanced, events, finished, gumshoe, rows, wait_for
from tests.support.two_nodes import OPEN, TwoNodes, two_nodes

RUN = (
    "train", "configs/demo.yaml", "name=nodes", *SMALL, "train.checkpoint_every=2", "learner.lr=1e-5", "fleet.num_engines=2",
    "rollout.workers=2", "placement.sampler.strategy=strict_spread", "placement.routers=node", "buffer.max_staleness=1", "watch.silent_s=3",
    "watch.replace_s=20", "fleet.max_restarts=1", "rollout.max_restarts=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[TwoNodes]:
    with two_nodes(cpus=2) as there:
        yield there


@pytest.mark.parametrize("learner", ["head", "other"])
def test_a_run_goes_on_without_a_node_and_takes_it_back(pair: TwoNodes, tmp_path: Path, learner: str) -> None:
    run_dir, log = tmp_path / "nodes", tmp_path / "log"
    more = (
        f"storage_path={tmp_path}",
        f"ray.address={pair.address}",
        f"placement.learner.labels={{side: {learner}}}",
        "train.steps=40",  # enough for an engine to come up again meanwhile
    )
    with gumshoe(*RUN, *more, log=log, env=OPEN) as process:

        def until(what: object, timeout_s: float = 240) -> None:
            wait_for(what, process, log, timeout_s)  # type: ignore[arg-type]

        def says(pattern: str) -> None:
            until(lambda: any(re.search(pattern, line) for line in events(run_dir)))

        def settled_since(when: float) -> int:
            return sum(m["op"] == "settle" and m["time"] > when for m in journal(run_dir / "ledger.jsonl"))

        until(lambda: list(run_dir.glob("checkpoints/step-*")), 400)
        pair.kill()
        killed = time.time()
        says(r"sampler-\d was fenced: .*; 1 of 2 engines work")
        says(r"rollout-\d died with its node, and another took its place")
        if learner == "head":
            until(lambda: settled_since(killed) >= 2)
        says("a sampler waits for a node with 0.5 CPU to join; 1 of 2 engines work")
        pair.join()
        says(r"sampler-\d+ took its place with weights")
        if learner == "other":
            says("learner 1 begins")
        finished(process, log, 400)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 40
    trained = rows(run_dir, "train")
    assert all(balanced(r) and r["staleness/max"] <= 1 for r in trained)
    # One optimiser step moves log-probs by so much at this rate; of a batch of the newest weights they agree.
    assert all(r["mismatch/kl_k3"] < 1e-5 for r in trained), "a sampler held other weights than its label says"
    assert all(r["mismatch/kl_k3"] < 1e-8 for r in trained if r["staleness/max"] == 0)
    books = replayed(journal(run_dir / "ledger.jsonl"))
    books.agrees(summary["ledger"])
    assert books.counts().get("dropped: worker_lost"), "the lost node's worker held leases"
    assert books.restores == (learner == "other")
    assert len(books.trained_at) * 4 == summary["ledger"]["trained"] == 40 * 8
