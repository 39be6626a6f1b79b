"""The learner's side of publishing, on every rank: gather, send by whatever transport was agreed, and tell the ledger.

Invariants:
- Every rank runs through the weights in every pass, to the end, whatever fails on the way: gathering them is a collective
  of the learner's ranks, and a rank that stopped would leave the others waiting. A rank that cannot gather ends the learner on all.
- All ranks take the same decisions; rank 0 alone talks to the fleet, and tells the others.
- A collective that breaks is met anew with the engines that are left, a few times; after that they are started again.
- Whatever becomes of a pass here, the fleet hears of it, and engines that wait for more are released.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agents.learning.agreement import GatherError, everybody, to_the_end
from agents.types import Version
from cluster.errors import one_line
from cluster.membership import SEGMENTS, Place
from cluster.publishing import Meeting
from cluster.vllm import relay
from cluster.vllm.adapters import AdapterWriter
from cluster.vllm.buckets import learn_layout, to_wire
from cluster.vllm.collective import CollectiveError, Sent
from cluster.vllm.deadline import Stuck
from cluster.vllm.segment import SegmentError, ShmWriter, TensorSpec, torch_dtype
from cluster.vllm.senders import GlooSender, IpcSender, NcclSender, Sender

ROUNDS = 3
"""Passes over the weights that one publish may take."""

Gather = Callable[[torch.dtype | None], Iterable[tuple[str, torch.Tensor]]]
"""The learner's weights in a type (None: as they are), from the start. Every rank must exhaust it."""
Writer = ShmWriter | AdapterWriter
Ask = Callable[[Any], Any]
"""The value behind a reference to an actor's answer, within a deadline."""


@dataclass
class _End:
    """How a pass ended."""

    sent: Sent | None = None
    reason: str = ""
    stuck: bool = False


class Publisher:
    """One learner process's way to the samplers. Create it on every rank."""

    def __init__(
        self, setup: Any, incarnation: int, ask: Ask, rank: int, world: int, device: torch.device | str = "cpu",
        writer: Writer | None = None,
    ) -> None:  # fmt: skip
        """`setup`: a `cluster.learner.Setup`, of which `buffer`, `fleet`, `segments` and `train.verify_every` matter here. `writer`: of what
        engines pull; None: of segments with all weights."""
        self._setup, self._incarnation, self._ask = setup, incarnation, ask
        self._rank, self._world = rank, world
        self._device = torch.device(device)
        self._writer = writer or ShmWriter(setup.segments, prefix=f"weights-{incarnation}")
        self._layout: dict[str, TensorSpec] = {}
        self._sender: Sender | None = None
        self._ipc = IpcSender(rank, self._device, self._everybody)
        self._epoch = 0
        self._passes = 0
        self._first = True
        self._node, self._host = _here()
        self._name = f"{incarnation}-{os.getpid()}"
        self._devices = self._all_devices()
        self.collective = False
        """Whether the last meeting was for a transport that sends to all engines together."""

    def publish(self, gather: Gather, step: int, *, again: bool = False) -> float:
        """Brings the weights of `step` into the engines. `again`: the ledger knows of it already. Returns the seconds it took. Raises
        GatherError on every rank when one cannot gather them."""
        try:
            return self._publish(gather, step, again)
        except GatherError as error:
            if self._rank == 0:
                self._event(
                    f"the weights of step {step} were not gathered, so the learner starts again: {one_line(error)}"
                )
            raise

    def _publish(self, gather: Gather, step: int, again: bool) -> float:
        began, report = time.monotonic(), {}
        if self._setup.fleet is not None:
            for number in range(1, ROUNDS + 1):
                meeting = self._meet()
                self.collective = meeting.kind not in SEGMENTS
                if not self.collective:
                    report = self._by_segment(gather, meeting, step)
                    break
                report = self._by_broadcast(gather, meeting, step, last=number == ROUNDS)
                if not self._tell(bool(report.pop("publish/again", 0.0))):
                    break
            if self._rank == 0 and self._setup.train.verify_every and step % self._setup.train.verify_every == 0:
                self._ask(self._setup.fleet.verify.remote())
                report["publish/verified"] = 1.0
        seconds = time.monotonic() - began
        if self._rank == 0 and not again:
            report["time/publish_s"] = seconds
            self._ask(self._setup.buffer.published.remote(self._incarnation, step, report))
        return seconds

    def next_batch(
        self, fetch: Callable[[], Any], gather: Gather, step: int,
        turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Any:  # fmt: skip
        """The batch of `step`, by asking `fetch` until it is not None. While it is awaited, engines that stand without weights get
        those of now: without them no batch may ever come. `turn`: what such a publish stands in, where engines share the device."""
        while True:
            batch = fetch()
            if self._setup.fleet is None:
                if batch is not None:
                    return batch
                continue
            word = ""
            if self._rank == 0:
                starving = batch is None and self._ask(self._setup.fleet.starving.remote())
                word = "publish" if starving else "wait" if batch is None else "go"
            word = self._tell(word)
            if word == "publish":
                with turn():
                    self.publish(gather, step, again=True)
            while word == "go":  # a rank that asked too early
                if batch is not None:
                    return batch
                batch = fetch()

    # ------------------------------------------------------------------------------------------------ segments

    def _by_segment(self, gather: Gather, meeting: Meeting, step: int) -> dict[str, float]:
        with to_the_end(gather(self._dtype(meeting))) as weights:
            if self._rank != 0:
                return {}
            manifest = self._writer.write(weights)
        parcel = relay.load(manifest, meeting.bucket_bytes) if meeting.kind == "relay" else []
        label = Version(self._incarnation, step).label
        report = dict(self._ask(self._setup.fleet.publish.remote(manifest.to_dict(), label, parcel)))
        if self._first:
            self._clear_old(Path(manifest.path))
        self._first = False
        return report

    def _clear_old(self, current: Path) -> None:
        """Segments of learners before this one: nobody will read them again."""
        for old in current.parent.glob("weights-*"):
            if not old.name.startswith(f"weights-{self._incarnation}-"):
                if old.is_dir():  # adapters
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------ collectives

    def _by_broadcast(self, gather: Gather, meeting: Meeting, step: int, *, last: bool) -> dict[str, float]:
        dtype = self._dtype(meeting)
        if not self._layout:  # the engines must know what comes before it comes
            self._layout = learn_layout(gather(dtype))
        if meeting.kind == "ipc":
            return self._by_pieces(gather, meeting, step, last)
        with to_the_end(gather(dtype)) as weights:
            return self._drive(weights, meeting, step, last) if self._rank == 0 else {}

    def _drive(
        self, weights: Iterable[tuple[str, torch.Tensor]], meeting: Meeting, step: int, last: bool
    ) -> dict[str, float]:
        """Rank 0: the fleet walks the engines through the phases, this process meets them and sends."""
        fleet, epoch, sender = self._setup.fleet, meeting.epoch, self._sender_of(meeting)
        fresh = epoch != self._epoch
        ticket, label = self._new_ticket(), Version(self._incarnation, step).label
        going = fleet.broadcast.remote(ticket, epoch, label, dict(sender.endpoint), to_wire(self._layout), last)
        with self._telling(ticket) as end:
            try:
                if fresh:
                    self._epoch = epoch
                    sender.join(
                        epoch,
                        meeting.world_size,
                        meeting.limit_s,
                        lambda: bool(self._ask(fleet.called_off.remote(ticket))),
                    )
                if self._ask(fleet.cleared.remote(ticket)):
                    end.sent = sender.send(weights, self._layout, meeting.bucket_bytes, meeting.limit_s)
            except BaseException:
                self._leave()  # engines that wait for more hear of it at once
                raise
        report = dict(self._ask(going))
        if end.stuck:
            self._die(end.reason)
        if report["publish/again"]:
            self._leave()
        return report | _sent_metrics(end.sent)

    def _by_pieces(self, gather: Gather, meeting: Meeting, step: int, last: bool) -> dict[str, float]:
        """CUDA IPC: every rank sends, rank 0 hands out what all of them have laid down. A pass for which the engines are not ready is not
        begun."""
        fleet, ticket, label = self._setup.fleet, self._new_ticket(), Version(self._incarnation, step).label
        going, cleared = None, False

        def hand_out(piece: Any) -> None:
            self._ask(fleet.hand_out.remote(ticket, piece))

        if self._rank == 0:
            going = fleet.broadcast.remote(ticket, meeting.epoch, label, {}, to_wire(self._layout), last)
            cleared = bool(self._ask(fleet.cleared.remote(ticket)))
        with self._telling(ticket) as end:
            if self._tell(cleared):
                with to_the_end(gather(self._dtype(meeting))) as given:
                    end.sent = self._ipc.send(given, self._layout, meeting.bucket_bytes, hand_out)
        return dict(self._ask(going)) | _sent_metrics(end.sent) if going is not None else {}

    @contextlib.contextmanager
    def _telling(self, ticket: str) -> Iterator[_End]:
        """Tells the fleet how the block's pass ended, however that was. What broke the pass alone ends here; it can be met anew."""
        end = _End()
        try:
            yield end
        except (CollectiveError, SegmentError) as error:
            end.reason, end.stuck = one_line(error), isinstance(error, Stuck)
        except BaseException as error:
            end.reason = one_line(error) or type(error).__name__
            raise
        finally:
            if self._rank == 0:
                self._ask(self._setup.fleet.sent.remote(ticket, end.sent.checksum if end.sent else "", end.reason))

    def _die(self, reason: str) -> None:
        """Ends this process, in which a call hangs that nothing else can end. Ray Train starts all ranks again."""
        self._event(f"the learner is started again: {reason}")
        os._exit(1)

    def _event(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self._ask(self._setup.buffer.event.remote(line))

    def _sender_of(self, meeting: Meeting) -> Sender:
        """The way out of the meeting's epoch. One of an epoch before is left."""
        if self._sender is None or meeting.epoch != self._epoch:
            self._leave()
            self._sender = NcclSender(self._host) if meeting.kind == "nccl" else GlooSender(self._host)
        return self._sender

    def _new_ticket(self) -> str:
        self._passes += 1
        return f"{self._name}-{self._passes}"

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender, self._epoch = None, 0

    # ------------------------------------------------------------------------------------------------ all ranks

    def _meet(self) -> Meeting:
        found = None
        if self._rank == 0:
            place = Place(self._node, self._devices)
            found = self._ask(self._setup.fleet.meet.remote(self._name, place))
        meeting: Meeting = self._tell(found)
        return meeting

    def _tell(self, word: Any) -> Any:
        """What rank 0 says, on every rank."""
        words = [word]
        if self._world > 1:
            dist.broadcast_object_list(words, src=0)
        return words[0]

    def _everybody(self, word: Any) -> list[Any]:
        """What every rank says, in their order, on every rank."""
        return everybody(word) if self._world > 1 else [word]

    def _all_devices(self) -> tuple[str, ...]:
        mine = ""
        if self._device.type == "cuda":
            mine = str(torch.cuda.get_device_properties(self._device).uuid)
        return tuple(device for device in self._everybody(mine) if device)

    def _dtype(self, meeting: Meeting) -> torch.dtype | None:
        if meeting.dtype:
            return torch_dtype(meeting.dtype)
        # What engines on GPUs hold is bfloat16, and they refuse another type; on CPU both sides are float32.
        return torch.bfloat16 if self._device.type == "cuda" else None


def _sent_metrics(sent: Sent | None) -> dict[str, float]:
    if sent is None:
        return {}
    if sent.gather_s is None or sent.send_s is None:
        return {"publish/bytes": float(sent.nbytes)}
    return {
        "publish/bytes": float(sent.nbytes),
        "publish/gather_s": sent.gather_s,
        "publish/send_s": sent.send_s,
        "publish/overlap_s": max(0.0, sent.gather_s + sent.send_s - sent.seconds),
    }


def _here() -> tuple[str, str]:
    """(Ray's id of this node, its address)."""
    import ray

    return str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address())
