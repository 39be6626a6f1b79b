"""The ledger: which episodes were admitted, where each one is now, and when a new one may start. Pure bookkeeping.

Invariants, true after every call:
- admitted = running + ready + in a batch + trained + dropped (by reason), counted in episodes of tasks.
- Each lease is in exactly one place; a result for a lease that is not running is refused (it is late, or a repeat).
- Admission: running + ready < batch * (max_staleness + 1 + version) - consumed, where `version` counts optimiser
  batches whose weights have been published and `consumed` the episodes shipped to the learner. Dropped episodes
  leave both sides. (The capacity rule is AReaL's, arXiv 2505.24298.)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class LedgerError(RuntimeError):
    """The books do not balance, or a call is out of order."""


@dataclass(frozen=True)
class Counts:
    """Episodes by place. `dropped` is by reason."""

    admitted: int
    running: int
    ready: int
    in_batch: int
    trained: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        return self.admitted == self.running + self.ready + self.in_batch + self.trained + sum(self.dropped.values())


class Ledger:
    """Books of one run. `batch_episodes`: episodes in one optimiser batch; `max_staleness`: in optimiser batches."""

    def __init__(self, batch_episodes: int, max_staleness: int) -> None:
        if batch_episodes < 1 or max_staleness < 0:
            raise LedgerError(f"batch of {batch_episodes} episodes with max_staleness {max_staleness} cannot be run")
        self.batch_episodes = batch_episodes
        self.max_staleness = max_staleness
        self.version = 0
        self.admitted = 0
        self.trained = 0
        self._running: dict[str, int] = {}
        self._ready: deque[tuple[str, int]] = deque()
        self._in_batch: dict[str, int] = {}
        self._dropped: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------ queries

    @property
    def running(self) -> int:
        return sum(self._running.values())

    @property
    def ready(self) -> int:
        return sum(n for _, n in self._ready)

    @property
    def in_batch(self) -> int:
        return sum(self._in_batch.values())

    @property
    def consumed(self) -> int:
        """Episodes shipped to the learner, now or before."""
        return self.in_batch + self.trained

    @property
    def capacity(self) -> int:
        """Episodes that may still be admitted now."""
        allowed = self.batch_episodes * (self.max_staleness + 1 + self.version) - self.consumed
        return allowed - self.running - self.ready

    def is_running(self, lease_id: str) -> bool:
        return lease_id in self._running

    def ready_leases(self) -> list[str]:
        """Oldest first."""
        return [lease_id for lease_id, _ in self._ready]

    def counts(self) -> Counts:
        found = Counts(self.admitted, self.running, self.ready, self.in_batch, self.trained, dict(self._dropped))
        if not found.balanced:
            raise LedgerError(f"the ledger does not balance: {found}")
        return found

    # -------------------------------------------------------------------------------------------------- moves

    def admit(self, lease_id: str, episodes: int) -> bool:
        """Starts `episodes` episodes if there is room for at least one. False: wait for the next batch."""
        if self.capacity <= 0:
            return False
        if lease_id in self._running:
            raise LedgerError(f"lease {lease_id} was admitted twice")
        self.admitted += episodes
        self._running[lease_id] = episodes
        return True

    def finish(self, lease_id: str) -> bool:
        """running -> ready. False: the result is late or a repeat, and is refused."""
        if lease_id not in self._running:
            return False
        self._ready.append((lease_id, self._running.pop(lease_id)))
        return True

    def fail(self, lease_id: str, reason: str) -> bool:
        """running -> dropped. False: the lease was not running."""
        if lease_id not in self._running:
            return False
        self._dropped[reason] += self._running.pop(lease_id)
        return True

    def drop_ready(self, lease_id: str, reason: str) -> None:
        """ready -> dropped: over-age, filtered or of a lost lineage."""
        for entry in self._ready:
            if entry[0] == lease_id:
                self._ready.remove(entry)
                self._dropped[reason] += entry[1]
                return
        raise LedgerError(f"lease {lease_id} is not ready and cannot be dropped as {reason}")

    def ship(self, lease_ids: list[str]) -> None:
        """ready -> in a batch."""
        wanted = set(lease_ids)
        taken = {lease_id: n for lease_id, n in self._ready if lease_id in wanted}
        if len(taken) != len(lease_ids):
            raise LedgerError(f"leases {sorted(wanted - set(taken))} are not ready and cannot be shipped")
        self._ready = deque(entry for entry in self._ready if entry[0] not in wanted)
        self._in_batch.update(taken)

    def settle(self) -> None:
        """in a batch -> trained: the optimiser step is done."""
        self.trained += self.in_batch
        self._in_batch.clear()

    def publish(self, version: int) -> None:
        """The samplers now hold the weights after `version` optimiser batches. Versions never go back."""
        if version < self.version:
            raise LedgerError(f"version {version} was published after version {self.version}")
        self.version = version

    def rewind(self, version: int, trained: int) -> None:
        """The learner went back to a checkpoint: what was under way or trained since then is dropped as `lineage`."""
        if version > self.version or trained > self.trained:
            raise LedgerError(f"cannot go back to version {version} with {trained} trained from version {self.version}")
        self._dropped["lineage"] += self.running + self.ready + self.in_batch + self.trained - trained
        self._running.clear()
        self._ready.clear()
        self._in_batch.clear()
        self.version, self.trained = version, trained

    # -------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint: what was trained and dropped. Work under way belongs to no checkpoint."""
        return {"version": self.version, "trained": self.trained, "dropped": dict(self._dropped)}

    @classmethod
    def restored(cls, batch_episodes: int, max_staleness: int, state: Mapping[str, Any]) -> Ledger:
        """Books that go on from a checkpoint: what was trained stays trained, nothing is under way."""
        ledger = cls(batch_episodes, max_staleness)
        ledger.version = int(state["version"])
        ledger.trained = int(state["trained"])
        ledger._dropped = Counter({str(k): int(v) for k, v in state["dropped"].items()})
        ledger.admitted = ledger.trained + sum(ledger._dropped.values())
        return ledger
