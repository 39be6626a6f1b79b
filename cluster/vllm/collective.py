"""The collective way of publishing: one sender, all workers of all engines, and buckets that go out by broadcast.

The gloo group is here whole; NCCL and CUDA IPC move their bytes by vLLM's own engines (`receivers.py`, `senders.py`) after
the same meeting.

Invariants:
- Nobody enters a group before all of its ranks were seen alive: a rank that is missing is an error within the deadline on
  every side, never a wait without end inside a library.
- While a bucket is being sent the next one is being gathered, and while one is being loaded the next one is being
  received: two buckets are in memory at most on either side.
- A group that failed once is closed; its peers see a closed connection, not silence.
- A rank listens where the learner is reached from, whatever its machine's name resolves to (127.0.1.1 on a stock Debian).

No vLLM here: the learner imports this file too.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cluster.vllm.buckets import StreamDigest, cut, pack, unpack
from cluster.vllm.segment import Layout

_POLL_S = 0.02
_ASK_S = 0.25
"""How often the learner asks whether waiting for the others still makes sense."""
_GO, _OFF = b"go", b"off"
GATHER_SHARE, ARRIVE_SHARE = 0.5, 0.6
"""Of a limit that holds meeting and joining both: what the learner waits for the others, and what they wait for its word. They wait
longer, so that nobody has left when it lets them in."""


class CollectiveError(RuntimeError):
    """A meeting or a broadcast that failed; the message is one line."""


class Rendezvous:
    """Where the ranks of an epoch meet: a store in the learner's first rank, on a port that the system chose."""

    def __init__(self, host: str) -> None:
        # By itself the store would listen on every interface.
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host, port, None, True, timedelta(seconds=60), wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._secret = secrets.token_hex(16)
        self.endpoint: dict[str, Any] = {"host": host, "port": port, "secret": self._secret}

    def gather(
        self, number: int, world_size: int, limit_s: float, over: Callable[[], bool] = lambda: False
    ) -> dist.Store:
        """Waits until every other rank of epoch `number` is there, then lets all of them in. Returns the epoch's store.

        Raises CollectiveError when one is missing at the deadline, or as soon as `over` says that waiting is no use.
        """
        store = dist.PrefixStore(f"{self._secret}-{number}", self._store)
        deadline = time.monotonic() + limit_s
        asked = time.monotonic()
        for rank in range(1, world_size):
            while not store.check([f"here-{rank}"]):
                now = time.monotonic()
                if now > deadline or (now > asked + _ASK_S and over()):
                    store.set("word", _OFF)  # those that came need not wait for their own deadline
                    raise CollectiveError(f"rank {rank} of {world_size} did not come to membership epoch {number}")
                asked = now if now > asked + _ASK_S else asked
                time.sleep(_POLL_S)
        store.set("word", _GO)
        return store


def arrive(endpoint: Mapping[str, Any], number: int, rank: int, limit_s: float) -> dist.Store:
    """A worker's part of the meeting. Returns the epoch's store. Raises CollectiveError."""
    where = f"{endpoint['host']}:{endpoint['port']}"
    deadline = time.monotonic() + limit_s
    try:
        server = dist.TCPStore(endpoint["host"], endpoint["port"], None, False, timedelta(seconds=limit_s))
        store = dist.PrefixStore(f"{endpoint['secret']}-{number}", server)
        store.set(f"here-{rank}", b"1")
        while not store.check(["word"]):
            if time.monotonic() > deadline:
                raise CollectiveError(f"membership epoch {number} did not meet at {where} within {limit_s:g} s")
            time.sleep(_POLL_S)
        if store.get("word") != _GO:
            raise CollectiveError(f"the meeting of membership epoch {number} was called off: another rank did not come")
    except CollectiveError:
        raise
    except RuntimeError as error:
        raise CollectiveError(f"the learner's meeting place {where} does not answer: {_short(error)}") from error
    return store


class Group(Protocol):
    """A broadcast from rank 0 to all ranks."""

    def broadcast(self, payload: torch.Tensor) -> None: ...
    def close(self) -> None: ...


class GlooGroup:
    """A gloo group of its own, beside whatever `torch.distributed` has set up in this process."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit_s: float, host: str) -> None:
        """Every rank calls it after the meeting. `limit_s`: of joining, and of each broadcast. `host`: the meeting's, an address of rank 0.
        Raises CollectiveError."""
        meeting = dist.PrefixStore("gloo", store)
        try:
            if os.environ.get("GLOO_SOCKET_IFNAME"):  # who names an interface has it, as of torch's own groups
                self._group: Any = dist.ProcessGroupGloo(meeting, rank, world_size, timedelta(seconds=limit_s))
            else:
                options = dist.ProcessGroupGloo._Options()
                address = host if rank == 0 else _address_towards(host)
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                options._timeout, options._threads = timedelta(seconds=limit_s), 2
                self._group = dist.ProcessGroupGloo(meeting, rank, world_size, options)
        except (RuntimeError, OSError) as error:
            raise CollectiveError(f"rank {rank} of {world_size} could not connect: {_short(error)}") from error
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0

    def broadcast(self, payload: torch.Tensor) -> None:
        """Blocks until `payload` (uint8, on the CPU) was sent or filled. Raises CollectiveError."""
        if self._group is None:
            raise CollectiveError("the group was closed")
        try:
            self._group.broadcast([payload], self._options).wait()
        except RuntimeError as error:
            self.close()
            raise CollectiveError(f"a broadcast broke: {_short(error)}") from error

    def close(self) -> None:
        """Drops the connections; peers that wait for this rank get an error at once."""
        self._group = None


@dataclass(frozen=True)
class Sent:
    """One pass over the weights."""

    checksum: str
    """`StreamDigest` of what was sent."""
    nbytes: int
    seconds: float
    """Of the whole pass."""
    gather_s: float | None = None
    """Seconds in which this thread gathered and packed; None: not measured."""
    send_s: float | None = None
    """Seconds in which the other thread sent. With `gather_s` more than `seconds` by what overlapped."""


def send(weights: Iterable[tuple[str, torch.Tensor]], layout: Layout, group: Group, bucket_bytes: int) -> Sent:
    """Broadcasts `weights`, which must come in the order of `layout`. Raises CollectiveError, SegmentError."""
    began = time.perf_counter()
    digest, nbytes, sending = StreamDigest(), 0, [0.0]
    iterator = iter(weights)

    def out(payload: torch.Tensor) -> None:
        at = time.perf_counter()
        group.broadcast(payload)
        sending[0] += time.perf_counter() - at

    waited = 0.0
    under_way: Future[None] | None = None
    sender = ThreadPoolExecutor(1, "publish-send")
    try:
        for bucket in cut(layout, bucket_bytes):
            payload = pack(bucket, iterator)
            for name, tensor in unpack(bucket, payload):
                digest.add(name, tensor)
            nbytes += bucket.nbytes
            at = time.perf_counter()
            if under_way is not None:
                under_way.result()
            waited += time.perf_counter() - at
            if bucket.nbytes:
                under_way = sender.submit(out, payload)
        at = time.perf_counter()
        if under_way is not None:
            under_way.result()
        waited += time.perf_counter() - at
        if (left := next(iterator, None)) is not None:
            raise CollectiveError(f"the learner gathered {left[0]!r}, which was not announced")
    finally:
        sender.shutdown(wait=False)
    seconds = time.perf_counter() - began
    return Sent(digest.hexdigest(), nbytes, seconds, seconds - waited, sending[0])


def receive(
    layout: Layout, group: Group, bucket_bytes: int, load: Callable[[list[tuple[str, torch.Tensor]]], None]
) -> str:
    """Hands the weights of each bucket to `load` as they come. Returns the `StreamDigest`. Raises CollectiveError.

    `load` may keep the tensors: no payload is used twice.
    """
    digest = StreamDigest()
    buckets = cut(layout, bucket_bytes)

    def fetch(index: int) -> torch.Tensor:
        payload = torch.empty(buckets[index].nbytes, dtype=torch.uint8)
        if payload.numel():
            group.broadcast(payload)
        return payload

    receiver = ThreadPoolExecutor(1, "publish-receive")
    try:
        coming = receiver.submit(fetch, 0) if buckets else None
        for index, bucket in enumerate(buckets):
            assert coming is not None
            payload = coming.result()
            if index + 1 < len(buckets):
                coming = receiver.submit(fetch, index + 1)
            weights = unpack(bucket, payload)
            for name, tensor in weights:
                digest.add(name, tensor)
            load(weights)
    finally:
        receiver.shutdown(wait=False, cancel_futures=True)
    return digest.hexdigest()


def _address_towards(host: str) -> str:
    """This machine's address on the way to another, which hears nothing of it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _short(error: Exception) -> str:
    """The first sentence of a torch error, without where it was raised in C++."""
    text = re.sub(r"^\[[^\]]*\] ", "", str(error).split("\n")[0])
    return " ".join(text.partition(". ")[0].split())[:200]
