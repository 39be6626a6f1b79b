"""What ranks tell each other before they do something that none can do alone.

A collective waits for every rank, so one that cannot come must say so, or the others wait as long as their process group lets
them. Invariants: all ranks exchange the same kind of word, one after the other, whatever each is about to do; so a word of failure
meets whichever word the others say next, and what fails on one rank is raised on all, with the same text. After a GatherError
nobody is met any more for the same work: every rank has it, or the process group itself is broken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


class GatherError(RuntimeError):
    """A rank could not do its part in gathering weights; one line that names it, the same on every rank."""


ERRORS: dict[str, type[Exception]] = {"": RuntimeError, "disk": OSError, "gather": GatherError}
"""What is raised on every rank, by the kind of what one of them could not do."""


@dataclass(frozen=True)
class Word:
    """What a rank says."""

    value: Any = None
    reason: str = ""
    """Why it cannot go on, one line; empty: it can."""
    kind: str = ""
    """Of the reason: a key of `ERRORS`."""


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def everybody(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank says, in their order."""
    if world_size(group) == 1:
        return [value]
    said: list[Any] = [None] * world_size(group)
    dist.all_gather_object(said, value, group=group)
    return said


def heard(said: Sequence[Word]) -> list[Any]:
    """Every rank's value. Raises what the first of those that cannot go on has said."""
    for rank, word in enumerate(said):
        if word.reason:
            raise ERRORS[word.kind](f"rank {rank}: {word.reason}")
    return [word.value for word in said]


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """This rank's part of a work of all. Raises on every rank what went wrong on any; what came from a disk is an OSError."""
    word, cause = Word(), None
    try:
        result = work()
    except GatherError:
        raise  # every rank has it
    except Exception as error:
        word, cause = Word(None, reason_of(error), "disk" if isinstance(error, OSError) else ""), error
    try:
        heard(everybody(word, group))
    except Exception as error:
        raise error from cause
    return result


def whole(tensor: DTensor) -> Tensor:
    """A sharded tensor, gathered. Every rank calls it; raises GatherError on all of them when one is not ready, which is asked first:
    whether there is room for the result is found out before anybody waits for its parts."""
    mesh = tensor.device_mesh
    if mesh.size() == 1:
        return tensor.full_tensor()
    word = Word()
    try:
        _try_room(tensor)
    except Exception as error:
        word = Word(None, reason_of(error), "gather")
    heard(everybody(word, group_of(tensor)))
    return tensor.full_tensor()


def in_step(gathered: Iterator[T], like: Tensor) -> Iterator[T]:
    """The items of `gathered`, which gathers tensors sharded as `like`, on every rank to its end. What one rank raises between two gathers
    is raised on all as GatherError: they hear of it when they say their next word."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return gathered
    return said(gathered, partial(everybody, group=group_of(like)))


def said(gathered: Iterator[T], everybody: Callable[[Word], list[Word]]) -> Iterator[T]:
    """See `in_step`. `everybody`: what each rank says."""
    try:
        yield from gathered
    except (GatherError, dist.DistError):
        raise
    except Exception as error:
        heard(everybody(Word(None, reason_of(error), "gather")))
        raise
    heard(everybody(Word()))


@contextlib.contextmanager
def to_the_end(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Items that are run through to the end, however the block ends, for the other ranks gather them too; unless they have given up with
    this one."""
    iterator = iter(items)
    try:
        yield iterator
    except GatherError:
        raise
    except BaseException:
        _exhaust(iterator)
        raise
    _exhaust(iterator)


def group_of(tensor: DTensor) -> dist.ProcessGroup | None:
    """Of the ranks that share a tensor; None, which is the default group, where those are all."""
    mesh = tensor.device_mesh
    return None if mesh.size() == world_size() else mesh.get_group()


def reason_of(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _exhaust(items: Iterator[Any]) -> None:
    for _ in items:
        pass


def _try_room(tensor: DTensor) -> None:
    """Takes the memory that gathering will take, and gives it back to the allocator, which keeps it."""
    ranks = tensor.device_mesh.size()
    rows, *rest = tensor.shape or (1,)
    torch.empty((math.ceil(rows / ranks) * ranks, *rest), dtype=tensor.dtype, device=tensor.device)
