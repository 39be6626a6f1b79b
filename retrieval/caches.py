"""What was answered before, kept while it is used. Invariant: the weights of what is kept never add up to more than the bound."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from agents.types import Document

T = TypeVar("T")


class Cache(Generic[T]):
    """Forgets first what was not asked for the longest. `limit` 0 keeps nothing."""

    def __init__(self, limit: int, weight: Callable[[T], int] = lambda value: 1) -> None:
        self._limit, self._weigh = limit, weight
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self.weight = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> T | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: T) -> None:
        """What is heavier than the whole bound is not kept."""
        self.weight -= self._kept.pop(key, (None, 0))[1]
        weight = self._weigh(value)
        if weight > self._limit:
            return
        self._kept[key] = value, weight
        self.weight += weight
        while self.weight > self._limit:
            self.weight -= self._kept.popitem(last=False)[1][1]


def page_bytes(page: Document) -> int:
    """What a page takes in memory, about: its texts as they lie there, its other fields by the length of their JSON, and 1 KiB."""
    fields = len(json.dumps(dict(page.meta), default=str)) if page.meta else 0
    return sys.getsizeof(page.text) + sys.getsizeof(page.title) + fields + 1024
