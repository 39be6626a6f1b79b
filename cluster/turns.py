"""Turns on shared GPUs: samplers and learner, one after the other, and what each does before it leaves.

    samplers' turn   engines sample; the learner waits for a batch, its tensors in the machine's memory (`layout.offload`)
    learn()          engines are put to sleep (requests held, weights and cache given back); the learner's tensors come back
                     optimiser step; gradients are dropped
    publish          engines map memory for weights, receive them, and are told the new version; none samples yet
                     a checkpoint, where one is due
    sample()         the learner's tensors leave; engines map their cache and go on with the requests they hold

Invariants: no engine samples between `learn()` and `sample()`, nor with weights from before the turn: one that was not sent new ones
refuses to wake, is fenced, and starts again; an engine that starts anew does so in the samplers' turn, and a learner that starts anew
begins with `learn()`; both sides wait for each other with deadlines. On CPU the same steps are taken and no memory is moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError

if TYPE_CHECKING:
    import torch

KEPT = 1000
"""Turns of the learner that are remembered."""
SEATED_S = 60.0
"""How long a learner waits until each engine of its node is there: what ended it may have ended one of them, which is being replaced."""
_LOOK_S = 1.0


class FleetTurns:
    """The fleet's side: whose turn it is, and since when. One event loop."""

    def __init__(self, keep: Path | None = None) -> None:
        """`keep`: a file that tells a fleet which Ray starts again whose turn it was."""
        self._keep = keep
        self._samplers = asyncio.Event()
        self._samplers.set()
        self._starting = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._turns: list[tuple[float, float]] = []
        """(began, ended) of the learner's turns, unix seconds; the last may not have ended."""
        if keep is not None and keep.is_file():
            self._take(float(keep.read_text(encoding="utf-8")))

    @property
    def samplers(self) -> bool:
        return self._samplers.is_set()

    @contextlib.asynccontextmanager
    async def start(self) -> AsyncIterator[None]:
        """An engine takes memory within the block: it waits for the samplers' turn, and the learner's turn waits for its end."""
        while True:
            await self._samplers.wait()
            if self.samplers:  # it may have ended before this coroutine went on
                break
        self._starting += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._starting -= 1
            if not self._starting:
                self._idle.set()

    async def to_learner(self) -> None:
        """No engine may take memory from here on; returns when none is about to."""
        if self.samplers:
            self._take(time.time())
        await self._idle.wait()

    def to_samplers(self) -> None:
        if not self.samplers:
            self._turns[-1] = (self._turns[-1][0], time.time())
            self._samplers.set()
            if self._keep is not None:
                self._keep.unlink(missing_ok=True)

    def slept_s(self, since: float) -> float:
        """Seconds after `since` (unix) in which no engine could sample."""
        now = time.time()
        return sum(max(0.0, min(ended, now) - max(began, since)) for began, ended in self._turns)

    def _take(self, began: float) -> None:
        self._samplers.clear()
        self._turns = [*self._turns[1 - KEPT :], (began, float("inf"))]
        if self._keep is not None:
            self._keep.write_text(str(began), encoding="utf-8")


class LearnerTurns:
    """A learner process's side. Every rank makes every call, in the order of the module's text."""

    def __init__(
        self, fleet: Any, device: str | torch.device, *, rank: int, offload: bool, ask: Callable[[Any], Any]
    ) -> None:
        """`fleet`: None where nobody shares, and then nothing is done. `ask`: waits for an answer of an actor, with a deadline."""
        self._fleet, self._device, self._rank, self._ask = fleet, device, rank, ask
        self._offload = offload and str(device) != "cpu"
        self._belongings: Belongings | None = None

    def own(self, belongings: Belongings) -> None:
        """What moves. Before this call nothing does: the learner is still loading, in its first turn."""
        self._belongings = belongings

    def learn(self) -> None:
        """Returns when the device is the learner's, with all its tensors there."""
        if self._fleet is None:
            return
        if self._rank == 0:
            self._ask(self._fleet.sleep.remote())
        self._together()
        if self._belongings is not None and self._offload:
            self._belongings.move(self._device)

    def before_publish(self) -> None:
        """Room for the weights of engines: gradients go. Moments stay where they are, for a checkpoint that may be due."""
        if self._fleet is None or self._belongings is None:
            return
        self._belongings.drop_gradients()
        self._together()

    def sample(self) -> None:
        """The device is the samplers' again."""
        if self._fleet is None:
            return
        if self._belongings is not None and self._offload:
            self._belongings.move("cpu")
        self._together()  # no engine may map its cache while another rank's tensors are there
        if self._rank == 0:
            self._ask(self._fleet.wake.remote())

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A whole turn of the learner in which weights are published and nothing is trained."""
        self.learn()
        self.before_publish()
        yield
        self.sample()

    def _together(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()


class Belongings:
    """All tensors of a learner process that live on its device between steps."""

    def __init__(self, models: Iterable[Any], optimisers: Iterable[torch.optim.Optimizer]) -> None:
        """`models`: modules, sharded by FSDP2 or not."""
        self._models, self._optimisers = list(models), list(optimisers)

    @classmethod
    def of(cls, learner: Any, *beside: Any) -> Belongings:
        """Of a Learner, its critic, and models beside them, such as a reference. None among `beside` is left out."""
        trained = [learner.trained, *([learner.critic.trained] if learner.critic is not None else [])]
        models = [learner.model, *([learner.critic.model] if learner.critic is not None else []), *beside]
        # A critic that is a head on the policy's states is the same module; it moves once.
        return cls({id(m): m for m in models if m is not None}.values(), [t.optimiser for t in trained])

    def drop_gradients(self) -> None:
        """They are made anew by the next step."""
        for model in self._models:
            for parameter in model.parameters():
                parameter.grad = None

    def move(self, device: str | torch.device) -> None:
        """To another device. Parameters stay the objects that the optimiser knows."""
        import torch

        with torch.no_grad():
            for optimiser in self._optimisers:
                for parameter, state in optimiser.state.items():
                    for name, value in state.items():
                        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:  # not the count of steps
                            state[name] = value.to(device)
            for model in self._models:
                model.to(device)  # FSDP2 follows by itself (`FSDPModule._apply`)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the allocator would keep the pages from the engine


def shared_device(
    seats: Mapping[str, Sequence[str]], node: str, local_rank: int, num_local: int, visible: str | None = None
) -> int:
    """Index of the GPU, among those this process sees, on which a learner shares an engine's.

    `seats`: GPU ids of all engines by node id; `visible`: CUDA_VISIBLE_DEVICES of this process, None where it is not set.
    Raises UserError when learners and engines are not one to one on this node.
    """
    here = sorted(seats.get(node, ()), key=_natural)
    if len(here) != num_local:
        raise UserError(
            f"layout.kind=collocated needs one learner on each GPU of the engines, and a node has {num_local} learners beside {len(here)} such "
            "GPUs: engines have moved to another node, or one is missing; start the run again with resume=, or set layout.kind=split"
        )
    mine = here[local_rank]
    if visible is None:
        return int(mine)
    known = [v.strip() for v in visible.split(",") if v.strip()]
    if mine not in known:
        raise UserError(
            f"a learner is to share GPU {mine}, and CUDA_VISIBLE_DEVICES of its process is {visible!r}; unset it for Ray's workers, or unset "
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
        )
    return known.index(mine)


def find_device(fleet: Any, context: Any, ask: Callable[[Any], Any]) -> torch.device:
    """The shared GPU of this learner process, made its current one. `context`: Ray Train's."""
    import ray
    import torch

    node, num_local = ray.get_runtime_context().get_node_id(), context.get_local_world_size()
    deadline = time.monotonic() + SEATED_S
    while len((seats := ask(fleet.gpus.remote())).get(node, ())) != num_local and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    index = shared_device(seats, node, context.get_local_rank(), num_local, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (1 << 30, text)
