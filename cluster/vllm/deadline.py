"""Ends for calls into a library that knows none: NCCL waits for a lost peer for ever.

Invariants:
- Whoever calls goes on within the limit, by a CollectiveError at the latest.
- A communicator that exists is aborted, which ends what hangs in it. One that is still being made cannot be: its thread stays inside
  the library, maybe with a kernel on the device, and the process is of no more use (`Stuck`).

No vLLM here: the learner imports this file too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from cluster.vllm.collective import CollectiveError

T = TypeVar("T")


class Stuck(CollectiveError):
    """A call that nothing can end: this process must."""


def joined(limit_s: float, join: Callable[[], T]) -> T:
    """The communicator that `join` makes, in a thread of its own and on this thread's device. Raises Stuck when that takes longer; what
    `join` raises is raised as it is."""
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    found: Future[T] = Future()

    def run() -> None:
        try:
            with torch.accelerator.device_index(device):
                found.set_result(join())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="gumshoe-join", daemon=True).start()
    try:
        return found.result(max(0.0, limit_s))
    except TimeoutError:
        if found.done():
            return found.result()
        raise Stuck(f"the group was not joined within {limit_s:.3g} s, and the attempt cannot be ended") from None


@contextlib.contextmanager
def aborted_after(limit_s: float, communicator: Any) -> Iterator[None]:
    """Ends what hangs in an NCCL communicator (vLLM's `PyNcclCommunicator`). Raises CollectiveError if that was needed."""
    late = threading.Event()

    def end() -> None:
        late.set()
        communicator.destroy()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not late.is_set():
            raise
        raise CollectiveError(f"the broadcast did not end within {limit_s:g} s and was aborted") from error
    finally:
        timer.cancel()
    if late.is_set():
        raise CollectiveError(f"the broadcast did not end within {limit_s:g} s and was aborted")
