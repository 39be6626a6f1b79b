"""The ledger's journal on disk: what a buffer that comes back reads in it beside the books, and how an ended run closes it.

Invariant: it is read one move at a time, for it may be long; what is kept is small.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agents.recordfile import RecordReader, RecordWriter
from cluster.ledger import RUN_ENDED

ROWS_AGAIN = 20
"""Steps whose rows a buffer that came back tells once more; the driver knows which it has."""


class Seen:
    """What a journal says beside the books, gathered while these are made from it: one move at a time, for it may be long."""

    def __init__(self) -> None:
        self.moves = self.leases = 0
        self.saved = 0
        """Step of the last checkpoint."""
        self.tasks: dict[str, str] = {}
        """Task of each lease that is not at its end."""
        self.order: dict[str, Any] | None = None
        self.masks: dict[str, Any] | None = None
        self.stats: dict[str, float] = {}
        self.tokens: dict[int, float] = {}
        """Sampled tokens of each batch, by optimiser step from 1; of a step that was taken again, the last."""
        self.rows: deque[dict[str, Any]] = deque(maxlen=ROWS_AGAIN)
        """Of the last steps of the current incarnation."""

    def all(self, path: Path) -> Iterator[Mapping[str, Any]]:
        shipped: list[str] = []
        for move in RecordReader[Any](path):
            op = move["op"]
            self.moves += 1
            if op == "admit":
                self.leases += 1
                self.tasks[move["lease"]] = move["task"]
            elif op in ("fail", "drop"):
                self.tasks.pop(move["lease"], None)
            elif op == "ship":
                shipped, self.stats = list(move["leases"]), move.get("stats", {})
                stats = self.stats  # of a run that wrote no tokens
                counted = stats.get("episodes", 0.0) * stats.get("episode/sampled_tokens", 0.0)
                self.tokens[int(move["step"]) + 1] = float(move.get("tokens", counted))
            elif op == "settle":
                self.rows.append(move["row"])
                for lease_id in shipped:
                    self.tasks.pop(lease_id, None)
            elif op == "checkpoint":
                self.saved = int(move["step"])
            elif op == "order":
                self.order = move
            elif op == "masks":
                self.masks = move
            elif op in ("enter", "restore"):
                self.rows.clear()
                self.saved = int(move["step"] if op == "enter" else move["state"]["version"])
            yield move


def close_books(journal: Path) -> None:
    """The run that kept this journal has ended, and with it whatever was under way."""
    if journal.exists():
        with RecordWriter(journal) as writer:
            writer.write(
                {"op": "lose", "reason": RUN_ENDED, "places": ["running", "ready", "in_batch"], "time": time.time()}
            )
