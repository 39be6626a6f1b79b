"""The ledger balances whatever happens, and admission follows its formula."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger import Ledger, LedgerError


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


def test_restored_books_go_on():
    ledger = Ledger(batch_episodes=4, max_staleness=1)
    ledger.admit("a", 4)
    ledger.admit("b", 4)
    ledger.finish("a")
    ledger.ship(["a"])
    ledger.settle()
    ledger.publish(1)
    back = Ledger.restored(4, 1, ledger.state())
    assert back.trained == 4 and back.version == 1 and back.running == 0
    assert back.capacity == 4 * (1 + 1 + 1) - 4, "no burst after a restore"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "finish", "fail", "drop", "ship", "settle", "publish"]), st.integers(0, 30))
    ),
    st.integers(0, 3),
)
def test_always_balances_and_never_overruns(moves, max_staleness):
    ledger = Ledger(batch_episodes=4, max_staleness=max_staleness)
    serial, settled = 0, 0
    for move, pick in moves:
        running = [f"l{i}" for i in range(serial) if ledger.is_running(f"l{i}")]
        ready = ledger.ready_leases()
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
            settled += 1
        elif move == "publish":
            ledger.publish(settled)
        counts = ledger.counts()
        assert counts.balanced
        assert counts.running + counts.ready + ledger.consumed <= 4 * (max_staleness + 1 + ledger.version)
