"""Errors a user can mend, as one line each: what is wrong, where, and how to mend it.

Invariants: the message of an expected error is one line; `is_expected` never imports the room that raised it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

_EXPECTED = {
    "agents.learning.checkpoint.CheckpointError",
    "agents.learning.model.ModelError",
    "agents.protocols.tools.ProtocolError",
    "agents.types.RecordError",
    "cluster.buffer.OutOfOrder",
    "cluster.errors.UserError",
    "cluster.runtime.RayUnreachable",
    "retrieval.errors.RetrievalError",
    "cluster.vllm.preflight.EngineError",
    "cluster.vllm.segment.SegmentError",
    "envs.benchmarks.base.BenchmarkError",
    "envs.jsonl.TaskError",
    "gumshoe.ForeignRoom",
    "rewards.judges.base.JudgeError",
    "rewards.judges.templates.PromptError",
}
"""Errors by full name, so that asking does not import the module. Subclasses count too."""

_MACHINE = {
    errno.ENOSPC: "free some space there or choose another storage_path",
    errno.EDQUOT: "the quota is used up: free some space or choose another storage_path",
    errno.EROFS: "the file system is read-only: choose another storage_path",
    errno.EACCES: "no permission: change the owner or choose another path",
}


class UserError(Exception):
    """Something the user gave cannot work. The message is one line that says what, where and how to mend it."""


class Fenced(RuntimeError):
    """A call of a learner that another one has replaced, or that must begin again."""


def is_expected(error: BaseException) -> bool:
    """Whether `error` is one a user can mend (then its message alone is worth printing)."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return True
    cause = getattr(error, "cause", None)  # Ray's errors hold the one that an actor raised
    if isinstance(cause, BaseException) and cause is not error and is_expected(cause):
        return True
    return any(f"{cls.__module__}.{cls.__qualname__}" in _EXPECTED for cls in type(error).__mro__)


_SECRET = re.compile(r"(?:^|[._-])(?:password|passwd|secret|token|api_?key|key|authorization)$", re.IGNORECASE)
"""Names of settings whose values are nobody's business; `api_key_env` and `max_tokens` are none."""
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(text: str, argv: Sequence[str]) -> str:
    """A text without the passwords and keys that a command line gives, wherever they stand in it."""
    given = [arg.partition("=") for arg in argv]
    hidden = {value.strip("'\"") for name, _, value in given if _SECRET.search(name)}
    hidden |= {found for arg in argv for found in _USERINFO.findall(arg)}
    for value in sorted(filter(None, hidden), key=len, reverse=True):
        text = text.replace(value, "[hidden]")
    return text


def one_line(error: BaseException) -> str:
    """The message of `error` as a single line."""
    if isinstance(error, OSError) and error.errno in _MACHINE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{(error.strerror or 'input or output failed').lower()}; {_MACHINE[error.errno]}"
    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised, with a page of traceback
    if isinstance(cause, BaseException) and cause is not error and is_expected(cause):
        return one_line(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if len(lines) <= 2 else (lines[-1] if lines else type(error).__name__)
