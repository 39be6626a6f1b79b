"""Publishing: new weights from the trainer into all engines, while their generations are held.

One state machine for every backend. Per engine: init, stage (checked while it still generates), pause (keep),
start, update, finish, label, resume. A backend only says what the engines are told and, if it sends data itself,
sends it.

Invariants:
- Every phase has a deadline; `publish` returns within their sum even if an engine hangs or dies.
- One engine's failure never changes another's outcome, unless the backend is collective and says so.
- The version label changes only after the weights were applied and before the first token is sampled by them.
- An engine is resumed only if its weights are known to be whole: all new (with the new label) or all old. In any
  other case it stays held: `serving` is "held" if it can be sent to again (a collective that broke), else "unknown", and
  then the caller must fence and restart it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from cluster.errors import one_line
from cluster.vllm.segment import Manifest, SegmentError, ShmWriter

__all__ = [
    "Deadlines",
    "EngineClient",
    "EngineResult",
    "Manifest",
    "Phase",
    "PublishReport",
    "SegmentError",
    "ShmTransport",
    "ShmWriter",
    "Transport",
    "publish",
]


class Phase(StrEnum):
    """The steps of one publish, in order."""

    INIT = "init"
    """Meet the transport, once per engine and membership."""
    STAGE = "stage"
    """Check what will be loaded; the engine still generates."""
    PAUSE = "pause"
    """Hold all requests; clear cached prefixes unless configured to keep them."""
    START = "start"
    """Open the update."""
    UPDATE = "update"
    """Move the weights."""
    FINISH = "finish"
    """Apply them."""
    LABEL = "label"
    """Name them: tokens sampled from here on carry the new version."""
    RESUME = "resume"
    """Go on with held and queued requests."""


PHASES: tuple[Phase, ...] = tuple(Phase)
_BEFORE_PAUSE = (Phase.INIT, Phase.STAGE)


class EngineClient(Protocol):
    """What publishing needs of an engine: `PolicyEngine`, or an adapter around an actor handle."""

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None: ...
    async def stage_weights(self, update_info: Mapping[str, Any]) -> None: ...
    async def pause(self) -> None: ...
    async def start_weight_update(self) -> None: ...
    async def update_weights(self, update_info: Mapping[str, Any]) -> None: ...
    async def finish_weight_update(self) -> None: ...
    async def abort_weight_update(self) -> None: ...
    async def set_version(self, label: str) -> None: ...
    async def resume(self) -> None: ...


class Transport(Protocol):
    """A backend, on the trainer's side. `index` counts the engines of this publish from 0."""

    @property
    def collective(self) -> bool:
        """Whether the data phases need all engines together: then one failure before them fails all."""
        ...

    @property
    def unsafe_from(self) -> Phase:
        """The first phase whose failure can leave an engine's weights half old and half new."""
        ...

    @property
    def resendable(self) -> bool:
        """Whether an engine that gave an update up half-way takes a whole one afterwards."""
        ...

    def init_info(self, index: int, num_engines: int) -> Mapping[str, Any]: ...
    def stage_info(self, index: int) -> Mapping[str, Any]:
        """What STAGE is to check."""
        ...

    def updates(self, index: int) -> AsyncGenerator[Mapping[str, Any], None]:
        """What UPDATE tells the engine, one call after the other."""
        ...

    async def send(self) -> None:
        """The trainer's part of UPDATE, run beside the engines' part. Returns when everything was sent."""
        ...


@dataclass(frozen=True)
class ShmTransport:
    """Weights lie in a segment that the engines map: each pulls by itself, nothing is sent."""

    manifest: Manifest | Sequence[Manifest]
    """What `ShmWriter.write` returned; one per engine where they lie on several nodes."""
    verify_in_worker: bool = False
    """Let the worker hash the bytes again inside the pause, beside the check at STAGE."""
    collective: bool = False
    resendable: bool = False
    unsafe_from: Phase = Phase.FINISH

    def init_info(self, index: int, num_engines: int) -> Mapping[str, Any]:
        return {}

    def stage_info(self, index: int) -> Mapping[str, Any]:
        manifest = self.manifest if isinstance(self.manifest, Manifest) else self.manifest[index]
        return {"manifest": manifest.to_dict(), "verify_checksum": self.verify_in_worker}

    async def updates(self, index: int) -> AsyncGenerator[Mapping[str, Any], None]:
        yield self.stage_info(index)

    async def send(self) -> None:
        return None


@dataclass(frozen=True)
class Deadlines:
    """Seconds each phase may take. The pause must outlast one engine step, the rest scales with the weights."""

    init_s: float = 60.0
    stage_s: float = 60.0
    pause_s: float = 30.0
    start_s: float = 30.0
    update_s: float = 120.0
    finish_s: float = 120.0
    label_s: float = 10.0
    resume_s: float = 10.0

    def of(self, phase: Phase) -> float:
        return float(getattr(self, f"{phase.value}_s"))


Serving = Literal["new", "old", "held", "unknown"]


@dataclass(frozen=True)
class EngineResult:
    """How the publish went for one engine."""

    ok: bool
    """Whether it samples with the new weights under the new label."""
    serving: Serving
    """Which weights it samples with now; "held": none, but it answers and can be sent to again; "unknown": it is gone or
    its weights are in doubt, and it must be restarted."""
    failed_phase: Phase | None = None
    """Where it failed."""
    own_fault: bool = True
    """Whether it failed by itself, not because another engine or the sender did."""
    reason: str = ""
    """Why, in one line."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Duration of each phase that was entered."""
    pause_ms: float = 0.0
    """From asking for the pause until resumed: the time in which nothing was sampled."""


@dataclass(frozen=True)
class PublishReport:
    """One publish over all engines."""

    version: str
    """The label that was published."""
    results: Mapping[str, EngineResult]
    """By the caller's name of the engine."""
    seconds: float
    """Wall-clock time of the whole publish."""

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results.values())

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(name for name, result in self.results.items() if not result.ok)

    @property
    def pause_ms(self) -> float:
        """The longest pause of any engine."""
        return max((result.pause_ms for result in self.results.values()), default=0.0)


async def publish(
    engines: Mapping[str, EngineClient],
    transport: Transport,
    version: str,
    deadlines: Deadlines | None = None,
) -> PublishReport:
    """Bring `version` into all engines. Never raises for an engine's failure: read the report."""
    began = time.perf_counter()
    limits = deadlines or Deadlines()
    tracks = [
        _Track(engine, transport, version, limits, index, len(engines)) for index, engine in enumerate(engines.values())
    ]
    if transport.collective:
        await _in_step(tracks, transport, limits)
    else:
        await asyncio.gather(*(track.run(PHASES) for track in tracks))
    results = dict(zip(engines, (track.result() for track in tracks), strict=True))
    return PublishReport(version, results, time.perf_counter() - began)


async def _in_step(tracks: Sequence[_Track], transport: Transport, limits: Deadlines) -> None:
    """Phase by phase over all engines, as a collective needs it."""
    for phase in PHASES:
        work: list[Awaitable[None]] = [track.run((phase,)) for track in tracks]
        if phase is Phase.UPDATE:
            work.append(_send(tracks, transport, limits.update_s))
        await asyncio.gather(*work)
        lost = [track for track in tracks if track.failed_phase is not None]
        if lost and PHASES.index(phase) < PHASES.index(Phase.FINISH):
            reason = f"another engine failed in {lost[0].failed_phase}: {lost[0].reason}"
            await asyncio.gather(*(track.fail(phase, reason, own=False) for track in tracks if track not in lost))
            return


async def _send(tracks: Sequence[_Track], transport: Transport, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await transport.send()
    except Exception as error:
        reason = _reason(error, Phase.UPDATE, limit_s)
        await asyncio.gather(*(track.fail(Phase.UPDATE, reason, own=False) for track in tracks))


class _Track:
    """One engine's way through the phases."""

    def __init__(
        self,
        engine: EngineClient,
        transport: Transport,
        version: str,
        limits: Deadlines,
        index: int,
        num_engines: int,
    ) -> None:
        self.failed_phase: Phase | None = None
        self.reason = ""
        self._engine = engine
        self._limits = limits
        self._transport = transport
        self._index = index
        self._own_fault = True
        self._serving: Serving = "old"
        self._seconds: dict[str, float] = {}
        self._paused_at: float | None = None
        self._pause_ms = 0.0
        self._calls: dict[Phase, Callable[[], Awaitable[None]]] = {
            Phase.INIT: lambda: engine.init_weight_transfer(transport.init_info(index, num_engines)),
            Phase.STAGE: lambda: engine.stage_weights(transport.stage_info(index)),
            Phase.PAUSE: engine.pause,
            Phase.START: engine.start_weight_update,
            Phase.UPDATE: self._update,
            Phase.FINISH: engine.finish_weight_update,
            Phase.LABEL: lambda: engine.set_version(version),
            Phase.RESUME: engine.resume,
        }

    async def run(self, phases: Sequence[Phase]) -> None:
        for phase in phases:
            if self.failed_phase is not None:
                return
            began = time.perf_counter()
            if phase is Phase.PAUSE:
                self._paused_at = began
            limit_s = self._limits.of(phase)
            try:
                async with asyncio.timeout(limit_s):
                    await self._calls[phase]()
            except Exception as error:
                self._seconds[phase] = time.perf_counter() - began
                await self.fail(phase, _reason(error, phase, limit_s))
                return
            self._seconds[phase] = time.perf_counter() - began
        if phases[-1] is Phase.RESUME:
            self._serving = "new"
            self._end_pause()

    async def fail(self, phase: Phase, reason: str, *, own: bool = True) -> None:
        """Note the first failure and, where the old weights are whole, go on with them."""
        if self.failed_phase is not None:
            return
        self.failed_phase, self.reason, self._own_fault = phase, reason, own
        if phase is Phase.INIT and own and self._transport.resendable:
            self._own_fault = not await self._aborted()  # who answers was kept waiting by another
        if phase in _BEFORE_PAUSE:
            return
        self._serving = "unknown"
        if PHASES.index(phase) >= PHASES.index(self._transport.unsafe_from):
            if self._transport.resendable and await self._aborted():
                self._serving = "held"
            return
        try:
            if phase is not Phase.PAUSE:
                async with asyncio.timeout(self._limits.start_s):
                    await self._engine.abort_weight_update()
                if self._transport.resendable:
                    self._serving = "held"  # should it not go on: an engine that slept has no old weights
            async with asyncio.timeout(self._limits.resume_s):
                await self._engine.resume()
        except Exception as error:
            second = _reason(error, Phase.RESUME, self._limits.resume_s)
            if second != self.reason:
                self.reason += f"; then could not resume: {second}"
            return
        self._serving = "old"
        self._end_pause()

    def result(self) -> EngineResult:
        return EngineResult(
            ok=self.failed_phase is None,
            serving=self._serving,
            failed_phase=self.failed_phase,
            own_fault=self._own_fault,
            reason=self.reason,
            seconds={str(phase): value for phase, value in self._seconds.items()},
            pause_ms=self._pause_ms,
        )

    async def _aborted(self) -> bool:
        """Whether the engine answers, and has left the group and the update."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._limits.start_s):
                await self._engine.abort_weight_update()
            return True
        return False

    async def _update(self) -> None:
        # Closed at once when the engine fails, so that a sender which feeds it hears of that.
        async with contextlib.aclosing(self._transport.updates(self._index)) as updates:
            async for info in updates:
                await self._engine.update_weights(info)

    def _end_pause(self) -> None:
        if self._paused_at is not None:
            self._pause_ms = (time.perf_counter() - self._paused_at) * 1e3


def _reason(error: Exception, phase: Phase, limit_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer to {phase} within {limit_s:g} s"
    return one_line(error) or type(error).__name__
