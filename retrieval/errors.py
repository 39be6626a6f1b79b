"""What can go wrong in retrieval, as types a caller can act on. Each message is one line: what, where, how to mend.

Invariant: every error is built from its message alone, so it crosses process boundaries unchanged.
"""

from __future__ import annotations


class RetrievalError(RuntimeError):
    """Base of all errors of this room."""


class CorpusError(RetrievalError):
    """A corpus is missing or broken; the message names file and line."""


class StoreError(RetrievalError):
    """A document store is missing or broken."""


class IndexMismatch(RetrievalError):
    """A stored index was built from another corpus, encoder or setting; the message names both values."""


class BadQuery(RetrievalError):
    """The query itself cannot be served (empty, k out of range, filters the backend does not know)."""


class Overloaded(RetrievalError):
    """The bounded queue is full. Nothing was enqueued; try again later."""


class DeadlineExceeded(RetrievalError):
    """The request's time ran out before it was answered."""


class Closed(RetrievalError):
    """The service has been closed."""


class Unavailable(RetrievalError):
    """A part of the service is not there, such as a process that died. Nothing is known about the query; try again later."""
