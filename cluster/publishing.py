"""The fleet's side of publishing: by which transport, to whom, and what was published last.

Invariants:
- A meeting's epoch stands for exactly the engines that were there; weights of an epoch that is over go nowhere.
- One publish at a time: whoever calls holds the fleet's lock, except `cleared`, `hand_out` and `sent`, by which the learner
  takes part in the publish that is going on.
- What was published last is on disk: segments can be loaded again from it, and a number of an epoch never comes back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.types import Version
from cluster.errors import Fenced, one_line
from cluster.fleet_config import FleetConfig
from cluster.membership import SEGMENTS, Member, Membership, Place, StaleEpoch, choose, choose_for_adapters
from cluster.vllm.handshake import Chunks, Collective, Exchange, Guest
from cluster.vllm.transfer import (
    Deadlines,
    EngineClient,
    EngineResult,
    Manifest,
    Phase,
    PublishReport,
    ShmTransport,
    publish,
)

_WITHIN = 0.8
"""Share of a phase's deadline after which a worker gives a wait up by itself, so that it still answers."""
START_SLACK_S = 120.0
"""Beyond an engine's time to start, after which a learner's turn no longer waits for it."""
_POLL_S = 0.01
_BESIDE = Place()


def deadlines(config: FleetConfig) -> Deadlines:
    """Of the phases of a publish."""
    limit = config.publish_deadline_s
    return Deadlines(init_s=limit, stage_s=limit, update_s=limit, finish_s=limit)


def longest_s(limits: Deadlines) -> float:
    """Seconds that one publish may take within its deadlines: a segment's way to other nodes, all phases, and the way back of an engine
    that fails."""
    return limits.stage_s + sum(limits.of(phase) for phase in Phase) + limits.start_s + limits.resume_s


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself when it is up. The defaults are an engine on CPU beside the learner."""

    place: Place = _BESIDE
    num_workers: int = 1
    dtype: str = ""
    """Of its weights, by the name safetensors has for it; empty: that of the learner."""


@dataclass(frozen=True)
class Peer:
    """An engine that takes part in a publish."""

    client: EngineClient
    facts: Facts
    land: Callable[[dict[str, Any], Sequence[Any]], Awaitable[dict[str, Any]]]
    """Writes a segment from Ray's object store on its node; manifest and references in, manifest out."""


@dataclass(frozen=True)
class Meeting:
    """What a learner is told before it publishes."""

    kind: str
    """The transport."""
    epoch: int
    """0 where nobody has to meet."""
    world_size: int
    num_engines: int
    dtype: str
    """In which the engines hold weights; empty: as the learner does."""
    bucket_bytes: int
    limit_s: float
    """Deadline of each wait inside the transport."""


class Publishing:
    """See the module. `state`: where what was published last is kept; None: nowhere."""

    def __init__(
        self, transport: str, bucket_bytes: int, limits: Deadlines, version: str, state: Path | None, *,
        adapters: bool = False,
    ) -> None:  # fmt: skip
        """`adapters`: they alone are published, which are files in shared memory."""
        self.version = version
        self.checksum: str | None = None
        """Of what an engine took last; None: none did."""
        self.rounds = 0
        """Publishes so far: who waits for weights looks at it."""
        self._asked = transport
        self._adapters = adapters
        self._bucket_bytes = bucket_bytes
        self._limits = limits
        self._state = state
        self._membership = Membership()
        self._learner = Place()
        self._kind = "shm"
        self._begun = False
        """Whether a publish was ever begun: from then on no engine may sample from the checkpoint it was started with."""
        self._manifest: Manifest | None = None
        self._parcel: Sequence[Any] = ()
        self._exchange: Exchange | None = None
        self._chunks: Chunks | None = None
        self._ticket = self._over = ""
        """Of the publish that is going on, and of the last that ended."""

    def restore(self) -> bool:
        """What an earlier process published last. False where there is nothing."""
        if self._state is None or not self._state.is_file():
            return False
        saved = json.loads(self._state.read_text(encoding="utf-8"))
        self.version, self.checksum = saved["version"], saved["checksum"]
        self._manifest = Manifest.from_dict(saved["manifest"]) if saved["manifest"] else None
        self._membership = Membership(saved["epoch"])
        self._kind, self._learner = saved["kind"], Place(saved["node"])
        self._begun = True  # it is written when one begins
        return True

    def meet(self, sender: str, learner: Place, peers: Mapping[str, Peer]) -> Meeting:
        """How the next publish of `sender` goes. Raises UserError when the transport cannot serve everybody."""
        self._learner = learner
        places = {name: peer.facts.place for name, peer in peers.items()}
        self._kind = choose_for_adapters(learner, places) if self._adapters else choose(self._asked, learner, places)
        dtypes = {peer.facts.dtype for peer in peers.values()} - {""}
        epoch, world = 0, 1
        if self._kind not in SEGMENTS:
            agreed = self._membership.agree(sender, [Member(n, p.facts.num_workers) for n, p in peers.items()])
            epoch, world = agreed.number, agreed.world_size
        return Meeting(
            self._kind, epoch, world, len(peers), min(dtypes, default=""), self._bucket_bytes,
            _WITHIN * self._limits.update_s,
        )  # fmt: skip

    async def segment(
        self, manifest: Manifest, version: str, parcel: Sequence[Any], peers: Mapping[str, Peer]
    ) -> PublishReport:
        """Engines pull a segment, each by itself. `parcel`: its bytes in Ray's object store, for nodes that cannot see it."""
        self._accept(version)
        self._manifest, self._parcel, self.checksum = manifest, parcel, manifest.checksum
        self._keep()
        report = await self._pull(peers)
        self.rounds += 1
        return report

    async def broadcast(
        self, ticket: str, number: int, version: str, endpoint: Mapping[str, Any], layout: Mapping[str, Any],
        peers: Mapping[str, Peer],
    ) -> PublishReport:  # fmt: skip
        """The learner sends to all engines of epoch `number` together; `ticket` names this publish. Raises StaleEpoch when the engines
        are no longer those that met."""
        try:
            return await self._together(ticket, number, version, endpoint, layout, peers)
        finally:
            if self._exchange is not None:
                self._exchange.close()
            self._exchange, self._chunks, self._ticket, self._over = None, None, "", ticket

    async def _together(
        self, ticket: str, number: int, version: str, endpoint: Mapping[str, Any], layout: Mapping[str, Any],
        peers: Mapping[str, Peer],
    ) -> PublishReport:  # fmt: skip
        self._accept(version)
        epoch = self._membership.current(number)
        if [member.name for member in epoch.members] != list(peers):
            self._membership.disband()
            raise StaleEpoch(f"membership epoch {number} is over: the engines are no longer those that met")
        self._manifest, self._parcel = None, ()  # a segment would be of weights before these
        self._keep()
        exchange = Exchange()
        transport: Chunks | Collective
        if self._kind == "ipc":
            transport = self._chunks = Chunks(epoch, layout, exchange, len(peers))
        else:
            limit_s = _WITHIN * self._limits.update_s
            transport = Collective(self._kind, epoch, endpoint, layout, self._bucket_bytes, limit_s, exchange)
        self._exchange, self._ticket = exchange, ticket
        clients: dict[str, Any] = {name: Guest(peer.client, exchange) for name, peer in peers.items()}
        report = await publish(clients, transport, version, self._limits)
        if any(result.ok for result in report.results.values()):  # others may have failed after the data had come
            self.checksum = exchange.checksum
            self._keep()
        if not report.ok:
            self._membership.disband()
        self.rounds += 1
        return report

    async def bring(self, name: str, peer: Peer) -> EngineResult | None:
        """What was published last, into an engine that came up. None when no publish was begun yet. It fails at INIT or STAGE where
        those weights cannot be had again, and the engine must wait for the next."""
        if not self._begun:
            return None
        if self._manifest is None:
            return EngineResult(False, "old", Phase.INIT, reason="weights come to all engines together")
        return (await self._pull({name: peer})).results[name]

    async def cleared(self, ticket: str) -> bool:
        """For the learner: whether it is to send in that publish, as soon as it is known."""
        while ticket != self._over:
            if self._exchange is not None and ticket == self._ticket:
                return await self._exchange.cleared()
            await asyncio.sleep(_POLL_S)
        return False

    def called_off(self, ticket: str) -> bool:
        """For the learner that waits for engines to meet it: whether that publish has ended, or one of them cannot come."""
        return ticket == self._over or (self._exchange is not None and ticket == self._ticket and self._exchange.missed)

    async def hand_out(self, ticket: str, piece: Mapping[str, Any]) -> None:
        """From the learner, by CUDA IPC: one piece for all engines; returns when they have taken it."""
        if self._chunks is None or ticket != self._ticket:
            raise StaleEpoch("that publish has ended")
        await self._chunks.hand_out(piece)

    def sent(self, ticket: str, checksum: str, reason: str) -> None:
        """From the learner: it has sent everything, or why it could not."""
        if self._exchange is not None and ticket == self._ticket:
            self._exchange.sent(checksum, reason)

    # ------------------------------------------------------------------------------------------------- inside

    def _accept(self, version: str) -> None:
        if Version.parse(version).incarnation < Version.parse(self.version).incarnation:
            raise Fenced(f"weights {version} are of a learner that was replaced; published are {self.version}")
        self.version, self._begun = version, True

    async def _pull(self, peers: Mapping[str, Peer]) -> PublishReport:
        """The segment into these engines; first onto their nodes where it is not."""
        began = time.perf_counter()
        assert self._manifest is not None
        landed = await self._land(peers)
        lost = {name: found for name, found in landed.items() if isinstance(found, str)}
        there = {name: found for name, found in landed.items() if isinstance(found, Manifest)}
        transport = ShmTransport(tuple(there.values()))
        report = await publish({name: peers[name].client for name in there}, transport, self.version, self._limits)
        failed = {name: EngineResult(False, "old", Phase.STAGE, reason=reason) for name, reason in lost.items()}
        return PublishReport(report.version, {**report.results, **failed}, time.perf_counter() - began)

    async def _land(self, peers: Mapping[str, Peer]) -> dict[str, Manifest | str]:
        """By engine, the manifest to map, or why there is none. One engine of each node fetches for all of them there."""
        assert self._manifest is not None
        manifest = self._manifest
        found: dict[str, Manifest | str] = dict.fromkeys(peers, manifest)
        by_node: dict[str, list[str]] = {}
        if self._kind == "relay":
            for name, peer in peers.items():
                if self._asked == "relay" or peer.facts.place.node not in ("", self._learner.node):
                    by_node.setdefault(peer.facts.place.node, []).append(name)

        async def land(names: Sequence[str]) -> None:
            reason = ""
            for fetcher in names:
                try:
                    async with asyncio.timeout(self._limits.stage_s):
                        there = await peers[fetcher].land(manifest.to_dict(), self._parcel)
                except Exception as error:
                    reason = one_line(error) or f"weights did not come within {self._limits.stage_s:g} s"
                    continue
                found.update(dict.fromkeys(names, Manifest.from_dict(there)))
                return
            found.update(dict.fromkeys(names, reason))

        await asyncio.gather(*(land(names) for names in by_node.values()))
        return found

    def _keep(self) -> None:
        if self._state is None:
            return
        part = self._state.with_suffix(".part")
        part.write_text(
            json.dumps(
                {
                    "manifest": self._manifest.to_dict() if self._manifest else None,
                    "version": self.version,
                    "checksum": self.checksum,
                    "epoch": self._membership.number,
                    "kind": self._kind,
                    "node": self._learner.node,
                }
            ),
            encoding="utf-8",
        )
        part.replace(self._state)
