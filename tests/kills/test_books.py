"""The audit of a journal: it agrees with a ledger that was moved at random, and refuses every kind of forged journal."""

import json
import random

import pytest

from cluster.ledger import Ledger, audit
from tests.books import replayed


def honest(seed: int, moves: int = 400) -> tuple[list[dict], Ledger]:
    """The journal of a ledger that went through rollouts, deaths and restores at random, and that ledger."""
    rng, journal = random.Random(seed), []
    ledger = Ledger(8, 1, journal.append)
    saved, serial = {"version": 0, "trained": 0}, 0
    ledger.enter(0, 0)
    ledger.publish(0)
    for _ in range(moves):
        chance = rng.random()
        if ledger.held or ledger.version < ledger.step:
            ledger.publish(ledger.step)
        elif chance < 0.4:
            serial += 1
            ledger.admit(f"t/{serial}", 4, f"t{serial}")
        elif chance < 0.7 and ledger.running:
            ledger.finish(rng.choice(ledger.running_leases()))
        elif chance < 0.75 and ledger.running:
            ledger.fail(rng.choice(ledger.running_leases()), "worker_lost")
        elif chance < 0.9 and len(ledger.ready_leases()) >= 2 and not ledger.in_batch:
            ledger.ship(ledger.ready_leases()[:2])
        elif chance < 0.95 and ledger.in_batch:
            ledger.settle()
            if ledger.step % 2 == 0:
                saved = ledger.state()
                ledger.checkpointed(ledger.step)
        elif chance < 0.97:
            ledger.lose("buffer_lost")
        elif chance > 0.98:
            at_hand = [*ledger.recent_leases(), *ledger.batch_leases(), *ledger.ready_leases()]
            ledger.enter(saved["version"], saved["trained"], [i for i in at_hand if rng.random() < 0.5])
    return json.loads(json.dumps(journal)), ledger


@pytest.mark.parametrize("seed", range(8))
def test_it_comes_to_the_same_counts_as_the_ledger(seed):
    journal, ledger = honest(seed)
    books, counts = replayed(journal), ledger.counts()
    places = {k: getattr(counts, k) for k in ("admitted", "running", "ready", "in_batch", "trained")}
    books.agrees({**places, "dropped": dict(counts.dropped)})
    found = audit(journal)
    assert found["trained"] == len(books.trained_at) and found["restores"] == books.restores > 0
    with pytest.raises(AssertionError):
        books.agrees({**places, "trained": counts.trained + 1, "dropped": dict(counts.dropped)})


def repeated(journal, op):
    """The last move of that kind comes once more, at the end."""
    return [*journal, next(m for m in reversed(journal) if m["op"] == op)]


FORGED = {
    "a lease is admitted twice": lambda j: repeated(j, "admit"),
    "a result is taken twice": lambda j: repeated(j, "finish"),
    "a step is settled twice": lambda j: repeated(j, "settle"),
    "a batch is shipped twice": lambda j: repeated(j, "ship"),
    "an incarnation comes twice": lambda j: repeated(j, "enter"),
    "a restore says too much was trained": lambda j: [{**m, "trained": m["trained"] + 4} if m["op"] == "enter" else m for m in j],
    "weights are published before their step": lambda j: [{**m, "step": m["step"] + 1} if m["op"] == "publish" else m for m in j],
    "leases start before the weights are published": lambda j: [m for m in j if m["op"] != "publish"],
    "a lease starts from nowhere": lambda j: [m for m in j if m["op"] != "admit"],
    "a failure has no reason": lambda j: [{**m, "reason": ""} if m["op"] == "fail" else m for m in j],
    "a restore keeps what is unknown": lambda j: [{**m, "keep": ["t/0"]} if m["op"] == "enter" else m for m in j],
    "a trained lease returns to ready without a restore": lambda j: [
        *j, {"op": "ship", "step": replayed(j).step, "leases": [next(iter(replayed(j).trained_at))]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_journal_is_refused(how):
    journal, _ = honest(3)
    with pytest.raises(AssertionError, match=r"line \d+ of the journal"):
        replayed(FORGED[how](journal))
