"""The plan of a run, for `--dry-run`: who is started where, what it takes, and everything that is missing.

Invariants: nothing is started, and nothing is written; all that is missing is said in one go, one line each; sizes come from
`cluster.sizes` alone, and where they are not known the plan says so instead of guessing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.machine import free_memory, machine_gpus
from cluster.model import ModelShape, model_shape
from cluster.preflight import findings
from cluster.rundir import storage_dir
from cluster.sizes import Share, checkpoints_gib, gib, host_gib, needs, published_gib, rest_gib, saved_gib, shares

if TYPE_CHECKING:
    from cluster.schema import RunConfig

OTHERS = ("driver", "fleet", "buffer", "retrieval", "reward")
"""Actors that are there once and ask Ray for nothing."""


@dataclass(frozen=True)
class Plan:
    """What a run would do, and what keeps it from doing so."""

    lines: tuple[str, ...]
    missing: tuple[str, ...]
    """One line each: what, where, how to mend. Empty: the run can start."""

    @property
    def text(self) -> list[str]:
        """The plan as it is printed."""
        verdict = [f"missing     {line}" for line in self.missing] or ["missing     nothing"]
        return [*self.lines, *verdict, "Nothing was started."]


def plan(config: RunConfig) -> Plan:
    """The plan of `config` on this machine, or on the cluster it names."""
    missing = findings(config)
    local = config.ray.address == "local"
    gpus = machine_gpus() if local and needs(config).get("GPU") else []
    shape = model_shape(config.model)
    lines = [*_what(config, shape), *_actors(config, shape, min(gpus, default=None)), *_sizes(config, shape, gpus)]
    return Plan(tuple(lines), tuple(missing))


def _what(config: RunConfig, shape: ModelShape | None) -> list[str]:
    where = "a Ray of its own, on this machine" if config.ray.address == "local" else f"the Ray at {config.ray.address}"
    about = f"{shape.architecture}, {_count(shape.num_parameters)} parameters" if shape else "of unknown size"
    try:
        folder = str(storage_dir(config.storage_path) / config.name)
    except UserError:
        folder = f"{config.storage_path}/{config.name}"
    judge = f"{config.judge.model} at {config.judge.base_url}" if config.judge.kind == "chat" else config.judge.kind
    return [
        f"run         {folder}, on {where}",
        f"policy      {config.model.path or '(none)'} ({config.model.init}), {about}, protocol {config.protocol.name}",
        f"world       {config.world.kind}, retrieval {config.retrieval.kind}; reward {config.reward.name}, judge {judge}",
        f"learning    {config.advantage.name}, lr {config.learner.lr:g}, {config.train.steps} steps",
    ]


def _actors(config: RunConfig, shape: ModelShape | None, gpu_gib: float | None) -> list[str]:
    """A table of the actors that ask for something, and a line for the others."""
    both = shares(config, shape, gpu_gib) if shape else shares(config, ModelShape("", 0, 0, 0))
    rows = [_row(share, known=shape is not None) for share in both]
    rest = f"{_size(rest_gib(config))} together, Ray's object store with them"
    others = f"{config.rollout.workers} x rollout, {', '.join(OTHERS)}: {rest}"
    return ["actors      number  CPUs  GPUs  memory of each", *rows, f"            {others}"]


def _row(share: Share, *, known: bool) -> str:
    where = f"{share.gpus:g} GPU" if share.gpus else "the machine"
    parts = ", ".join(f"{name} {_size(size)}" for name, size in share.parts_gib.items())
    memory = f"{_size(share.each_gib)} of {where} ({parts})" if known else "unknown until config.json is there"
    return f"  {share.actor:<9} {share.count:>6}  {share.cpus:>4g}  {share.gpus:>4g}  {memory}"


def _sizes(config: RunConfig, shape: ModelShape | None, gpus: list[float]) -> list[str]:
    """What all of it takes together."""
    asked = ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(needs(config).items()))
    episodes, ahead = config.buffer.groups_per_batch * config.buffer.group_size, config.buffer.max_staleness + 1
    tokens = episodes * config.sampling.max_context
    lines = [f"asks Ray    {asked}"]
    if shape is not None:
        free = f" of {_size(gib(free_memory()))} free" if config.ray.address == "local" else ""
        on_gpus = sum(s.count * s.each_gib for s in shares(config, shape, min(gpus, default=None)) if s.gpus)
        lines += [
            f"memory      {_size(host_gib(config, shape))}{free} on the machine, with {_size(published_gib(config, shape))} of shared memory "
            f"for published weights and {_size(saved_gib(config, shape))} while a checkpoint is written; the index is not counted",
            *([f"            {_size(on_gpus)} on GPUs; activations are not counted"] if on_gpus else []),
            f"disk        checkpoints of at most {_size(checkpoints_gib(config, shape))} ({config.train.keep_checkpoints} kept, one being "
            f"written), one every {config.train.checkpoint_every or config.train.steps} steps",
        ]
    shared = math.ceil(tokens / max(1, config.train.num_workers))
    return [
        *lines,
        f"tokens      a step trains at most {tokens:,}: {episodes} episodes ({config.buffer.groups_per_batch} tasks x "
        f"{config.buffer.group_size}) of at most {config.sampling.max_context:,}; {shared:,} a learner",
        f"staleness   at most {config.buffer.max_staleness}: {episodes * ahead} episodes at most are running or waiting",
    ]


def _size(size_gib: float) -> str:
    return f"{size_gib:.1f} GiB" if size_gib >= 1 else f"{math.ceil(size_gib * 1024)} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
