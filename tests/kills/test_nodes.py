"""A run of two nodes loses one in mid-run, with the learner, a sampler and a rollout worker on it; goes on without it, and has it back.

Two raylets on one machine, which see the same storage and nothing of each other's memory; the driver is a process of its own, as a user
starts it. Engines are tiny ones without vLLM (`tests/support/node`): what is killed here are nodes. The run is synchronous, so a sampler that
held other weights than the learner would be seen by their probabilities. The journal proves that the books balance.
"""

from __future__ import annotations

import logging
import re
import signal
import time
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group

from tests.books import Books, journal, replayed
from tests.runs import SMALL, balanced, events, gumshoe, rows, wait_for
from tests.support.two_nodes import OPEN, TINY, two_nodes

RUN = (
    "train", "configs/demo.yaml", "name=nodes", *SMALL, "train.eval_tasks=1", "train.steps=1000", "train.checkpoint_every=1", "learner.lr=1e-5",
    "fleet.num_engines=2", "fleet.max_restarts=1", "rollout.workers=2", "rollout.groups_in_flight=1", "rollout.max_restarts=1",
    "placement.sampler.strategy=strict_spread", "placement.learner.resources={seat: 1}", "buffer.max_staleness=0", "train.verify_every=1", "watch.silent_s=3", "watch.replace_s=20",
)  # fmt: skip


def test_a_run_goes_on_without_a_node_and_takes_it_back(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "nodes", tmp_path / "log"
    moves = run_dir / "ledger.jsonl"
    with two_nodes(cpus=4, env=TINY) as pair:
        ray.init(address=pair.address, logging_level=logging.ERROR, log_to_driver=False)
        room = placement_group([{"seat": 1, "head": 0.5}])  # so that the learner begins on the other node
        assert room.wait(30)
        with gumshoe(*RUN, f"storage_path={tmp_path}", f"ray.address={pair.address}", log=log, env=OPEN) as process:

            def until(what: Any, timeout_s: float = 120) -> None:
                wait_for(what, process, log, timeout_s)

            def says(pattern: str) -> None:
                until(lambda: any(re.search(pattern, line) for line in events(run_dir)))

            def rolling() -> bool:
                """Whether each worker has a lease, and has not delivered it."""
                moved = [m["op"] for m in journal(moves)]
                since = moved[len(moved) - moved[::-1].index("settle") :]
                return since.count("admit") == 2 and "finish" not in since

            def settled_since(when: float) -> int:
                return sum(m["op"] == "settle" and m["time"] > when for m in journal(moves))

            until(lambda: list(run_dir.glob("checkpoints/step-*")), 240)
            remove_placement_group(room)
            until(rolling)
            pair.kill()
            killed = time.time()
            says(r"sampler-\d was fenced: .*; 1 of 2 engines work")
            says(r"rollout-\d died with its node, and another took its place")
            says("a sampler waits for a node with 0.5 CPU to join; 1 of 2 engines work")
            says("learner 1 begins")
            until(lambda: settled_since(killed) >= 1)
            pair.join()
            says(r"sampler-\d+ took its place with weights 1\.")
            whole = time.time()
            until(lambda: settled_since(whole) >= 1)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        ray.shutdown()
    trained = rows(run_dir, "train")
    assert all(balanced(r) and r["staleness/max"] == 0 for r in trained)
    assert all(r["mismatch/kl_k3"] < 1e-6 for r in trained), "a sampler held other weights than the learner"
    books = replayed(journal(moves))
    assert books.restores == 1 and books.incarnation == 1
    assert books.counts().get("dropped: worker_lost"), "the lost node's worker held a lease"
    assert_rows_stand_in_the_journal(moves, trained)


def assert_rows_stand_in_the_journal(moves: Path, trained: list[dict[str, Any]]) -> None:
    """Every train row tells of a step that the journal has settled, with as many episodes trained as it says."""
    books, settled = Books(), set()
    for move in journal(moves):
        books.move(move)
        if move["op"] == "settle":
            settled.add((books.step, books.counts()["trained"]))
    assert trained and {(row["step"], row["ledger/trained"]) for row in trained} <= settled
