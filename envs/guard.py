"""The leak guard: pages that repeat the question are hidden, since who wrote the question there often wrote the answer beside it.

CaRR's rule (`specs/carr.md` 1.2): a document is hidden when it shares 13 words in a row with the question, or holds the whole of
a shorter one. Invariants: words are those of any script, without case and punctuation; a question without words hides nothing.
A search shows nothing of a hidden page, whichever part its snippet would be of (the release looks at the snippet alone there).
"""

from __future__ import annotations

from functools import lru_cache

from agents.text import words
from agents.types import Document, Task
from envs.config import SandboxConfig

RUN_WORDS = 13


class LeakGuard:
    """Implements `envs.sandbox.Guard`. Verdicts hang on the question alone, so attempts at it share them."""

    def __init__(self, question: str) -> None:
        said = words(question)
        runs = [said[i : i + RUN_WORDS] for i in range(len(said) - RUN_WORDS + 1)]
        self._leaks = [f" {' '.join(run)} " for run in runs] or [" ".join(said)] * bool(said)
        self._verdicts: dict[int, bool] = {}

    def review(self, document: Document) -> Document | None:
        """None for a document that gives the question away, by its title, id or text."""
        text = f"{document.title} {document.id} {document.text}"
        key = hash(text)
        if key not in self._verdicts:
            self._verdicts[key] = self.leaks(text)
        return None if self._verdicts[key] else document

    def opened(self, doc_id: str) -> None:
        """What was read changes nothing."""

    def leaks(self, text: str) -> bool:
        """Whether a text repeats the question."""
        if not self._leaks:
            return False
        said = f" {' '.join(words(text))} "
        return any(leak in said for leak in self._leaks)


_guard = lru_cache(maxsize=256)(LeakGuard)


def guard_of(config: SandboxConfig, task: Task) -> LeakGuard | None:
    """The guard of a trajectory, where one is wanted."""
    return _guard(task.question) if config.leak_guard == "question" else None
