"""The ledger balances whatever happens, and admission follows its formula."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger import Ledger, LedgerError, audit


def test_capacity_by_hand():
    """Batch of 8 episodes, staleness 1, version 0: 8 * (1 + 1 + 0) - 0 = 16 episodes may start."""
    ledger = Ledger(batch_episodes=8, max_staleness=1)
    assert ledger.capacity == 16
    assert ledger.admit("a", 8) and ledger.admit("b", 8)
    assert not ledger.admit("c", 8)
    ledger.finish("a")
    assert ledger.capacity == 0, "ready episodes still count"
    ledger.ship(["a"])
    ledger.settle()
    assert ledger.capacity == 0, "trained but not published: 16 - 8 consumed - 8 running"
    ledger.publish(1)
    assert ledger.capacity == 8


def test_synchronous_when_staleness_is_zero():
    ledger = Ledger(batch_episodes=4, max_staleness=0)
    assert ledger.admit("a", 4)
    assert not ledger.admit("b", 4), "nothing of the next batch may start"
    ledger.finish("a")
    ledger.ship(["a"])
    assert not ledger.admit("b", 4), "not while the batch trains"
    ledger.settle()
    assert not ledger.admit("b", 4), "not before the new weights are published"
    ledger.publish(1)
    assert ledger.admit("b", 4)


def test_dropped_episodes_leave_both_sides():
    ledger = Ledger(batch_episodes=4, max_staleness=0)
    ledger.admit("a", 4)
    ledger.fail("a", "worker_lost")
    assert ledger.capacity == 4
    assert ledger.counts().dropped == {"worker_lost": 4}


def test_late_and_repeated_results_are_refused():
    ledger = Ledger(batch_episodes=4, max_staleness=0)
    ledger.admit("a", 4)
    assert ledger.finish("a")
    assert not ledger.finish("a")
    assert not ledger.fail("a", "x")
    assert not ledger.finish("never admitted")
    with pytest.raises(LedgerError, match="not ready"):
        ledger.ship(["never admitted"])


def test_a_journal_gives_the_same_books():
    """Admitted 3 x 4: one lease trained, one ready, one running; then the process dies."""
    moves: list[dict] = []
    ledger = Ledger(batch_episodes=4, max_staleness=2, write=moves.append)
    ledger.enter(0, 0)
    ledger.publish(0)
    for lease in "abc":
        ledger.admit(lease, 4)
    ledger.finish("a")
    ledger.ship(["a"])
    ledger.settle()
    ledger.publish(1)
    ledger.finish("b")
    back = Ledger.replayed(4, 2, moves)
    assert back.counts() == ledger.counts()
    assert (back.step, back.version, back.incarnation, back.held) == (1, 1, 0, False)
    assert back.ready_leases() == ["b"] and back.running_leases() == ["c"]
    back.lose("buffer_lost")
    assert back.counts().dropped == {"buffer_lost": 8} and back.trained == 4
    with pytest.raises(LedgerError, match="move 2 of the journal"):
        Ledger.replayed(4, 2, [*moves[:1], {"op": "finish", "lease": "never"}])


def test_a_learner_that_goes_back_takes_the_books_with_it():
    """Checkpoint after step 1; then b is trained, c ready, d running. b and c may still be trained, d may not."""
    moves: list[dict] = []
    ledger = Ledger(batch_episodes=4, max_staleness=2, write=moves.append)
    ledger.enter(0, 0)
    ledger.publish(0)
    for lease in "abc":
        ledger.admit(lease, 4)
        ledger.finish(lease)
    ledger.ship(["a"])
    ledger.settle()
    ledger.publish(1)
    ledger.checkpointed(1)
    ledger.ship(["b"])
    ledger.settle()
    ledger.publish(2)
    ledger.admit("d", 4)
    ledger.enter(1, 4, keep=["b", "c"])
    assert ledger.held and ledger.step == ledger.version == 1 and ledger.trained == 4
    assert ledger.ready_leases() == ["b", "c"] and ledger.counts().dropped == {"lineage": 4}
    assert not ledger.finish("d"), "a late result of the dead incarnation"
    assert ledger.descends(0, 1) and not ledger.descends(0, 2), "weights of step 2 were lost"
    assert ledger.descends(1, 5)
    found = audit(moves)
    assert found["taken_back"] == 1 and found["restores"] == 1


def test_the_audit_finds_a_lease_that_trains_twice():
    twice = [
        {"op": "enter", "step": 0, "trained": 0, "keep": []},
        {"op": "admit", "lease": "a", "n": 4, "task": "t"}, {"op": "finish", "lease": "a"},
        {"op": "ship", "leases": ["a"], "step": 0}, {"op": "settle", "step": 0},
        {"op": "admit", "lease": "a", "n": 4, "task": "t"}, {"op": "finish", "lease": "a"},
        {"op": "ship", "leases": ["a"], "step": 1}, {"op": "settle", "step": 1},
    ]  # fmt: skip
    with pytest.raises(LedgerError, match="trained twice"):
        audit(twice)


def test_restored_books_go_on():
    ledger = Ledger(batch_episodes=4, max_staleness=1)
    ledger.admit("a", 4)
    ledger.admit("b", 4)
    ledger.finish("a")
    ledger.ship(["a"])
    ledger.settle()
    ledger.publish(1)
    back = Ledger(4, 1)
    back.restore(ledger.state())
    assert back.trained == 4 and back.version == 1 and back.running == 0
    assert back.capacity == 4 * (1 + 1 + 1) - 4, "no burst after a restore"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["admit", "finish", "fail", "drop", "ship", "settle", "publish", "checkpoint", "enter", "lose"]
            ),
            st.integers(0, 30),
        )
    ),
    st.integers(0, 3),
)
def test_always_balances_and_never_overruns(moves, max_staleness):
    journal: list[dict] = []
    ledger = Ledger(batch_episodes=4, max_staleness=max_staleness, write=journal.append)
    ledger.enter(0, 0)
    serial, saved = 0, (0, 0)
    for move, pick in moves:
        running, ready = ledger.running_leases(), ledger.ready_leases()
        if move == "admit":
            if ledger.admit(f"l{serial}", 4):
                serial += 1
        elif move == "finish" and running:
            ledger.finish(running[pick % len(running)])
        elif move == "fail" and running:
            ledger.fail(running[pick % len(running)], "lost")
        elif move == "drop" and ready:
            ledger.drop_ready(ready[pick % len(ready)], "stale")
        elif move == "ship" and ready and not ledger.in_batch:
            ledger.ship(ready[:1])
        elif move == "settle" and ledger.in_batch:
            ledger.settle()
        elif move == "publish":
            ledger.publish(ledger.step)
        elif move == "checkpoint" and not ledger.in_batch:
            saved = (ledger.step, ledger.trained)
            ledger.checkpointed(ledger.step)
        elif move == "enter":
            at_hand = [*ledger.recent_leases(), *ledger.batch_leases(), *ready]
            ledger.enter(*saved, keep=at_hand[: pick % 3])
        elif move == "lose":
            ledger.lose("buffer_lost", ["running", "ready", "in_batch"][pick % 3 :])
        counts = ledger.counts()
        assert counts.balanced
        if move not in ("enter", "publish"):  # what a restore keeps was admitted under the older weights
            assert counts.running + counts.ready + ledger.consumed <= 4 * (
                max_staleness + 1 + max(ledger.version, ledger.step)
            )
    audit(journal)
    back = Ledger.replayed(4, max_staleness, journal)
    assert back.counts() == ledger.counts() and back.capacity == ledger.capacity and back.branches == ledger.branches
