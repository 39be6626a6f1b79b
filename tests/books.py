"""What a run's journal (`ledger.jsonl`) proves, read by code that shares nothing with the ledger.

Every lease has one place: running, ready, batch, trained, or dropped with a reason. `Books.move` takes one line of the
journal and raises AssertionError for a line that cannot follow the ones before. So a journal that can be read to its end shows:
- each lease was admitted once, and went only ways that exist (a result is never taken twice, nor from a lease that was dropped);
- no lease was trained a second time, unless a restore had taken the first time back;
- after a learner began, no lease started before its weights were published;
- incarnations grow one by one, and what a restore says was trained is what was trained.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNING, READY, BATCH, TRAINED = "running", "ready", "in_batch", "trained"
GONE = "dropped: "


@dataclass
class Books:
    """Where every lease is, after the moves so far."""

    place: dict[str, str] = field(default_factory=dict)
    episodes: dict[str, int] = field(default_factory=dict)
    trained_at: dict[str, int] = field(default_factory=dict)
    """Optimiser batch a lease was trained in, as long as no restore took it back."""
    earlier: Counter[str] = field(default_factory=Counter)
    """Episodes that books made from a checkpoint alone began with, by place."""
    step: int = 0
    incarnation: int = -1
    held: bool = True
    moves: int = 0
    steps_settled: int = 0
    """Optimiser batches trained, those counted that were taken back later."""
    restores: int = 0
    taken_back: int = 0
    """Leases whose training a restore took back."""
    returned: int = 0
    """Leases that a restore put back to ready."""

    def move(self, line: Mapping[str, Any]) -> None:
        """One line of the journal. Raises AssertionError, naming the line, for one that cannot follow."""
        self.moves += 1
        try:
            getattr(self, f"_{line['op']}")(line)
        except AssertionError as error:
            raise AssertionError(f"line {self.moves} of the journal, {json.dumps(line)[:300]}: {error}") from None

    def counts(self) -> dict[str, int]:
        """Episodes by place; dropped ones by reason as `dropped: REASON`."""
        found = Counter(self.earlier)
        for lease, place in self.place.items():
            found[place] += self.episodes[lease]
        return dict(found)

    @property
    def admitted(self) -> int:
        return sum(self.episodes.values()) + sum(self.earlier.values())

    def agrees(self, ledger: Mapping[str, Any]) -> None:
        """Asserts that `ledger` (of a summary: counts by place, dropped by reason) says what the journal says.

        What was still being rolled out when the summary was made may have become ready since.
        """
        counts = self.counts()
        dropped = {place.removeprefix(GONE): n for place, n in counts.items() if place.startswith(GONE) and n}
        ours = {k: counts.get(k, 0) for k in (BATCH, TRAINED)}
        ours |= {"admitted": self.admitted, "under way": counts.get(RUNNING, 0) + counts.get(READY, 0)}
        theirs = {**ledger, "under way": ledger[RUNNING] + ledger[READY]}
        assert {k: int(theirs[k]) for k in ours} == ours
        assert {k: v for k, v in ledger["dropped"].items() if v} == dropped

    # ------------------------------------------------------------------------------------------------- moves

    def _go(self, lease: str, origin: str, target: str) -> None:
        here = self.place.get(lease, "unknown")
        assert here == origin, f"{lease} is {here}, not {origin}"
        self.place[lease] = target

    def _at(self, place: str) -> list[str]:
        return [lease for lease, here in self.place.items() if here == place]

    def _admit(self, line: Mapping[str, Any]) -> None:
        assert not self.held, "a lease started before the weights of this incarnation were published"
        assert line["lease"] not in self.place, f"{line['lease']} was admitted before"
        self.place[line["lease"]] = RUNNING
        self.episodes[line["lease"]] = int(line["n"])

    def _finish(self, line: Mapping[str, Any]) -> None:
        self._go(line["lease"], RUNNING, READY)

    def _fail(self, line: Mapping[str, Any]) -> None:
        assert line["reason"], "dropped without a reason"
        self._go(line["lease"], RUNNING, GONE + line["reason"])

    def _drop(self, line: Mapping[str, Any]) -> None:
        assert line["reason"], "dropped without a reason"
        self._go(line["lease"], READY, GONE + line["reason"])

    def _ship(self, line: Mapping[str, Any]) -> None:
        assert line["step"] == self.step, f"shipped for step {line['step']} at step {self.step}"
        assert not self._at(BATCH), "a batch was shipped while another was with the learner"
        for lease in line["leases"]:
            assert lease not in self.trained_at, f"{lease} was trained in step {self.trained_at[lease]} already"
            self._go(lease, READY, BATCH)

    def _settle(self, line: Mapping[str, Any]) -> None:
        assert line["step"] == self.step, f"step {line['step']} was settled at step {self.step}"
        batch = self._at(BATCH)
        assert batch, "a step was settled without a batch"
        for lease in batch:
            assert lease not in self.trained_at, f"{lease} was trained in step {self.trained_at[lease]} already"
            self._go(lease, BATCH, TRAINED)
            self.trained_at[lease] = self.step
        self.step += 1
        self.steps_settled += 1

    def _publish(self, line: Mapping[str, Any]) -> None:
        assert line["step"] == self.step, f"weights of step {line['step']} were published at step {self.step}"
        self.held = False

    def _checkpoint(self, line: Mapping[str, Any]) -> None:
        assert line["step"] <= self.step, "a checkpoint of a step that was not trained"

    def _order(self, line: Mapping[str, Any]) -> None:
        """Where the order of tasks stands: says nothing about leases."""

    def _masks(self, line: Mapping[str, Any]) -> None:
        """Where the watch over masked rollouts stands: nor does this."""

    def _lose(self, line: Mapping[str, Any]) -> None:
        assert line["reason"], "dropped without a reason"
        assert set(line["places"]) <= {RUNNING, READY, BATCH}, "what was trained cannot be lost"
        for place in line["places"]:
            for lease in self._at(place):
                self._go(lease, place, GONE + line["reason"])

    def _enter(self, line: Mapping[str, Any]) -> None:
        assert line["incarnation"] == self.incarnation + 1, (
            f"incarnation {line['incarnation']} after {self.incarnation}"
        )
        assert line["step"] <= self.step, f"back to step {line['step']} from step {self.step}"
        keep = set(line["keep"])
        back = {lease for lease, step in self.trained_at.items() if step >= line["step"]}
        for lease in back:
            del self.trained_at[lease]
        since = back | {lease for place in (RUNNING, READY, BATCH) for lease in self._at(place)}
        assert keep <= since, f"{sorted(keep - since)[:3]} cannot return to ready"
        assert not keep & set(self._at(RUNNING)), "a lease that was running returned to ready"
        for lease in since:
            self.place[lease] = READY if lease in keep else GONE + "lineage"
        self.restores += self.incarnation >= 0
        self.taken_back += len(back)
        self.returned += len(keep)
        self.incarnation, self.step, self.held = line["incarnation"], line["step"], True
        trained = self.counts().get(TRAINED, 0)
        assert trained == line["trained"], (
            f"the checkpoint holds {line['trained']} trained episodes, the journal {trained}"
        )

    def _restore(self, line: Mapping[str, Any]) -> None:
        state = line["state"]
        assert not self.place, "books were made from a checkpoint alone though there was a journal"
        self.earlier = Counter({TRAINED: int(state["trained"])})
        self.earlier.update({GONE + reason: int(n) for reason, n in state["dropped"].items()})
        self.step, self.incarnation = int(state["version"]), int(state["incarnation"])


def replayed(moves: Iterable[Mapping[str, Any]]) -> Books:
    """The books after `moves`. Raises AssertionError for the first that cannot follow."""
    books = Books()
    for move in moves:
        books.move(move)
    return books


def journal(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a torn line (its writer was killed) must be the last before a writer began anew."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)
