"""Who takes part in a publish, where everybody sits, and which transport that means.

A collective (gloo, NCCL) knows its members once and for all: one that is lost breaks it, one that comes is not in it. So
each set of members has an epoch, a number that only grows; the fleet owns it, and both sides meet anew when it changes.

Invariants:
- A number never stands for two sets of members, two senders, or a group that broke.
- The learner's first rank is rank 0 of the group. An engine's workers follow those of the engines before it, whatever
  their numbers: its offset is 1 + the sum of the workers before.
- Pure: nothing here talks to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import UserError

TRANSPORTS = ("auto", "shm", "relay", "gloo", "nccl", "ipc")
"""What `fleet.transport` can be."""
SEGMENTS = ("shm", "relay")
"""Transports by which engines pull a segment, each by itself; all others move bytes to all engines together."""


class StaleEpoch(RuntimeError):
    """Somebody speaks of a membership that is over; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Where a learner's ranks or an engine's workers sit."""

    node: str = ""
    """Ray's id of the node: of the learner's first rank, or of the engine."""
    devices: tuple[str, ...] = ()
    """Unique ids of their GPUs, one per rank or worker; empty on CPU."""


@dataclass(frozen=True)
class Member:
    """One engine of an epoch."""

    name: str
    num_workers: int = 1
    """Processes of the engine that receive weights: its tensor-parallel (times pipeline-parallel) size."""


@dataclass(frozen=True)
class Epoch:
    """One set of members that meets once and publishes many times."""

    number: int
    sender: str
    """Names the process that sends; a learner that was started again is another one."""
    members: tuple[Member, ...]

    @property
    def world_size(self) -> int:
        """Ranks of the group: the sender, and every worker of every engine."""
        return 1 + sum(member.num_workers for member in self.members)

    def rank_offset(self, index: int) -> int:
        """Rank of the first worker of the member at `index`."""
        return 1 + sum(member.num_workers for member in self.members[:index])


class Membership:
    """The epochs, on the side of the fleet."""

    def __init__(self, number: int = 0) -> None:
        """`number`: of the last epoch that is known to be over."""
        self.number = number
        self._epoch: Epoch | None = None

    def agree(self, sender: str, members: Sequence[Member]) -> Epoch:
        """The epoch of these members: the current one, or a new one where anything differs."""
        found = tuple(members)
        if self._epoch is None or (self._epoch.sender, self._epoch.members) != (sender, found):
            self.number += 1
            self._epoch = Epoch(self.number, sender, found)
        return self._epoch

    def current(self, number: int) -> Epoch:
        """The epoch of that number. Raises StaleEpoch when it is over."""
        if self._epoch is None or self._epoch.number != number:
            raise StaleEpoch(f"membership epoch {number} is over; the last one is {self.number}")
        return self._epoch

    def disband(self) -> None:
        """The group is broken, even if its members stay: whoever goes on meets anew."""
        self._epoch = None


class EpochGuard:
    """The epochs, on the side of an engine's worker."""

    def __init__(self) -> None:
        self.number = 0

    def enter(self, number: int) -> None:
        """A group of that epoch is to be met. Raises StaleEpoch for one that a later one has replaced."""
        if number < self.number:
            raise StaleEpoch(f"asked to meet in membership epoch {number}, which epoch {self.number} has replaced")
        self.number = number

    def check(self, number: int) -> None:
        """Weights of that epoch are to be received. Raises StaleEpoch for any but the one that was entered."""
        if number != self.number:
            raise StaleEpoch(f"weights of membership epoch {number}, but this engine is in epoch {self.number}")


def choose(asked: str, learner: Place, engines: Mapping[str, Place]) -> str:
    """The transport that `fleet.transport=asked` means for a learner and engines that sit there.

    `auto`: shared memory for CPU engines beside the learner and `relay` where one is on another node; CUDA IPC for
    engines on the learner's own GPUs, NCCL for engines on others. Raises UserError for what cannot work.
    """
    away = sorted(name for name, place in engines.items() if place.node not in ("", learner.node))
    shared = sorted(name for name, place in engines.items() if set(place.devices) & set(learner.devices))
    inside = sorted(n for n, p in engines.items() if p.devices and set(p.devices) <= set(learner.devices))
    on_cpu = sorted(name for name, place in engines.items() if not place.devices)
    if asked == "auto":
        if not learner.devices or len(on_cpu) == len(engines):
            return "relay" if away else "shm"
        if on_cpu or (shared and len(inside) < len(engines)):
            mixed = on_cpu or sorted(set(engines) - set(inside))
            raise UserError(
                f"fleet.transport=auto: {mixed[0]} does not sit as the other engines do (on the learner's GPUs, or on others); "
                "place all engines alike, or set fleet.transport=gloo"
            )
        return "ipc" if inside else "nccl"
    if asked == "shm" and away:
        raise UserError(
            f"fleet.transport=shm: {len(away)} of {len(engines)} engines ({away[0]}, ...) are not on the learner's node; "
            "set fleet.transport=relay or auto"
        )
    if asked in ("nccl", "ipc") and (on_cpu or not learner.devices):
        who = "the learner" if not learner.devices else on_cpu[0]
        raise UserError(
            f"fleet.transport={asked}: {who} has no GPU; set fleet.transport=auto (or gloo for a collective on CPU)"
        )
    if asked == "nccl" and shared:
        raise UserError(
            f"fleet.transport=nccl: {shared[0]} sits on a GPU of the learner, and NCCL takes a GPU once; set fleet.transport=ipc or auto"
        )
    if asked == "ipc" and len(inside) < len(engines):
        outside = sorted(set(engines) - set(inside))
        raise UserError(
            f"fleet.transport=ipc: {outside[0]} sits on a GPU that no learner rank uses; set fleet.transport=nccl or auto"
        )
    return asked


def choose_for_adapters(learner: Place, engines: Mapping[str, Place]) -> str:
    """The transport of adapters alone: files in shared memory, whatever the engines run on. Raises UserError where one is elsewhere."""
    away = sorted(name for name, place in engines.items() if place.node not in ("", learner.node))
    if away:
        raise UserError(
            f"learner.lora.publish=adapter: {len(away)} of {len(engines)} engines ({away[0]}, ...) are not on the learner's node, and "
            "adapters travel by shared memory alone; set learner.lora.publish=merged"
        )
    return "shm"
