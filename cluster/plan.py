"""The plan of a run: who is started where, what it takes, and everything that is missing (`--dry-run`) or does not fit (`gumshoe plan`).

Invariants: nothing is started, and nothing is written; all that is missing is said in one go, one line each; sizes come from
`cluster.sizes` alone, and where they are not known the plan says so instead of guessing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.fitting import misfits
from cluster.layout import Gpu, Moment, arranged, check_layout, moments, room_for, seats, summary, uncounted
from cluster.machine import free_memory, machine_gpus
from cluster.model import ModelShape, model_shape
from cluster.preflight import check_section, check_settings, findings
from cluster.rundir import find_run
from cluster.runtime import RayUnreachable, joined_address
from cluster.sizes import (
    Share,
    checkpoints_gib,
    gib,
    host_gib,
    needs,
    offloaded_gib,
    passing_gib,
    published_gib,
    rest_gib,
    shares,
    shares_gpus,
    trains_on_gpu,
)

if TYPE_CHECKING:
    from cluster.learner import TrainConfig
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
    config = arranged(config)
    missing = findings(config)
    try:
        joined = joined_address(config.ray)
    except RayUnreachable:  # one of the findings
        joined = os.environ.get("RAY_ADDRESS") or config.ray.address
    gpus = machine_gpus() if not joined and needs(config).get("GPU") else []
    shape = model_shape(config.model)
    lines = [
        *_what(config, shape, joined),
        *_actors(config, shape, min(gpus, default=None)),
        *layout_lines(config, shape, [gpus] if gpus else []),
        *_sizes(config, shape, gpus, local=not joined),
    ]
    missing += misfits(config, shape, [gpus]) if shape and gpus else []
    return Plan(tuple(lines), tuple(dict.fromkeys(missing)))


def plan_layout(config: RunConfig, nodes: Sequence[Sequence[float]] | None = None) -> Plan:
    """Who sits on which GPU, what each holds, and what does not fit. `nodes`: GPUs by node, in GiB; None: those of this machine.

    Files, endpoints and the machine's own memory are not looked at: `--dry-run` does that.
    """
    config = arranged(config)
    missing: list[str] = []
    for check in (
        partial(check_section, config.layout),
        partial(check_settings, config),
        partial(check_layout, config),
    ):
        try:
            check()
        except UserError as error:
            missing.append(str(error))
    if nodes is None:
        here = machine_gpus()
        nodes = [here] if here else []
    shape = model_shape(config.model)
    if shape is None:
        missing.append(
            f"the sizes of {config.model.path or 'the policy'} are not known; give a folder with its config.json (model.path), or that file "
            "alone (model.shape)"
        )
    lines = [_policy(config, shape), *layout_lines(config, shape, nodes)]
    if shape is not None:
        lines += [*_host(config, shape), *_staleness(config)]
        if nodes and not missing:
            missing += misfits(config, shape, nodes)
        elif not nodes and needs(config).get("GPU"):
            lines.append(
                "fits        not known: this machine has no GPUs; describe those of the run by --gpus, such as --gpus 8x80"
            )
    return Plan(tuple(lines), tuple(missing))


def layout_lines(config: RunConfig, shape: ModelShape | None, nodes: Sequence[Sequence[float]]) -> list[str]:
    """The layout in words, the GPUs with who sits there, and what fills them."""
    lines = [f"layout      {summary(config)}"]
    if shape is None or not (config.fleet.num_gpus or trains_on_gpu(config)):
        return lines
    gpus, _ = seats(config, nodes)
    if not gpus:  # one of each kind, to say at least what it takes
        return [*lines, *_needs_alone(config, shape)]
    shown: list[Moment] = []
    for node, sizes in enumerate(nodes):
        lines.append(f"node {node:<6} {len(sizes)} GPU{'s' if len(sizes) != 1 else ''} of {min(sizes):.1f} GiB")
        here = [g for g in gpus if g.node == node]
        for first, last, found in _alike([(g, moments(config, shape, g)) for g in here]):
            shown += [m for m in found if all(m.name != s.name or m.parts.keys() != s.parts.keys() for s in shown)]
            lines.append(_seat_row(first, last, found))
    unknown = dict.fromkeys(line for gpu in gpus for line in uncounted(config, gpu))
    return [
        *lines,
        *(_moment_row(m, config, shape, min(g.gib for g in gpus)) for m in shown),
        *(f"not counted {line}; whether it fits where it sits is not known" for line in unknown),
    ]


def _needs_alone(config: RunConfig, shape: ModelShape) -> list[str]:
    """What an engine and a learner take where no GPU is known: of the engine's cache, one sequence."""
    rows = []
    for share in shares(config, shape):
        if share.gpus or (share.actor == "learner" and trains_on_gpu(config)):
            parts = ", ".join(f"{name} {_size(size)}" for name, size in share.parts_gib.items())
            rows.append(f"{share.actor:<11} {_size(share.each_gib)}: {parts}")
    return rows


def _alike(rows: Sequence[tuple[Gpu, list[Moment]]]) -> Iterator[tuple[Gpu, Gpu, list[Moment]]]:
    """Neighbours on a node that hold the same: first, last, and what."""
    for _, group in groupby(rows, key=lambda r: ([t.name.rstrip("0123456789.") for t in r[0].tenants], r[1])):
        same = list(group)
        yield same[0][0], same[-1][0], same[0][1]


def _seat_row(first: Gpu, last: Gpu, found: Sequence[Moment]) -> str:
    numbers = f"{first.number}" if first is last else f"{first.number}-{last.number}"
    names = [
        a.name if a.name == b.name else f"{a.name} .. {b.name}"
        for a, b in zip(first.tenants, last.tenants, strict=True)
    ]
    held = ", ".join(f"{m.name} {m.gib:.1f}{' (too much)' if m.gib > first.gib else ''}" for m in found)
    free = "free" if not first.tenants else "not counted"
    return f"  gpu {numbers:<5} {' with '.join(names) or '-':<28} {held + ' GiB' if held else free}"


def _moment_row(moment: Moment, config: RunConfig, shape: ModelShape, gpu_gib: float) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in moment.named.items() if size)
    room = room_for(config, shape, gpu_gib) if moment.name == "sampling" else ""
    owners = {name.partition("'s ")[0] for name in moment.parts}
    whose = f" of a {owners.pop()}" if len(owners) == 1 else ""
    return f"{moment.name:<11} {moment.gib:.1f} GiB{whose}: {parts}{f'; {room}' if room else ''}"


def _what(config: RunConfig, shape: ModelShape | None, joined: str) -> list[str]:
    where = f"the Ray at {joined}" if joined else "a Ray of its own, on this machine"
    try:
        _, folder, resumed = find_run(config)
        run = f"{folder}, {'which goes on, ' if resumed else ''}on {where}"
    except UserError:
        run = f"{config.resume or f'{config.storage_path}/{config.name}'}, on {where}"
    judge = {
        "chat": f"{config.judge.model} at {config.judge.base_url}",
        "vllm": f"{config.judge.engines} x {config.judge.model}",
    }.get(config.judge.kind, config.judge.kind)
    return [
        f"run         {run}",
        _policy(config, shape),
        f"world       {config.world.kind}, retrieval {config.retrieval.kind}; reward {config.reward.name}, judge {judge}",
        f"learning    {config.advantage.name}, lr {config.learner.lr:g}, {config.train.steps} steps",
    ]


def _policy(config: RunConfig, shape: ModelShape | None) -> str:
    about = f"{shape.architecture}, {_count(shape.num_parameters)} parameters" if shape else "of unknown size"
    return (
        f"policy      {config.model.path or '(none)'} ({config.model.init}), {about}, protocol {config.protocol.name}"
    )


def _actors(config: RunConfig, shape: ModelShape | None, gpu_gib: float | None) -> list[str]:
    """A table of the actors that ask for something, and a line for the others."""
    both = shares(config, shape, gpu_gib) if shape else shares(config, ModelShape("", 0, 0, 0))
    together = shares_gpus(config)
    rows = [_row(share, known=shape is not None, shared=together and share.actor == "learner") for share in both]
    rest = f"{_size(rest_gib(config))} together, Ray's object store with them"
    others = f"{config.rollout.workers} x rollout, {', '.join(OTHERS)}: {rest}"
    return ["actors      number  CPUs  GPUs  memory of each", *rows, f"            {others}"]


def _row(share: Share, *, known: bool, shared: bool) -> str:
    where = f"{share.gpus:g} GPU" if share.gpus else "a sampler's GPU" if shared else "the machine"
    parts = ", ".join(f"{name} {_size(size)}" for name, size in share.parts_gib.items())
    memory = f"{_size(share.each_gib)} of {where} ({parts})" if known else "unknown until config.json is there"
    return f"  {share.actor:<9} {share.count:>6}  {share.cpus:>4g}  {share.gpus:>4g}  {memory}"


def _sizes(config: RunConfig, shape: ModelShape | None, gpus: list[float], *, local: bool) -> list[str]:
    """What all of it takes together."""
    asked = ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(needs(config).items()))
    episodes = config.buffer.groups_per_batch * config.buffer.group_size
    of, tokens = _trained(config)
    tokens *= episodes
    lines = [f"asks Ray    {asked}"]
    if shape is not None:
        free = f" of {_size(gib(free_memory()))} free" if local else ""
        lines += [
            f"memory      {_size(host_gib(config, shape))}{free} on the machine, with {_size(published_gib(config, shape))} for weights on their "
            f"way to the engines and {_size(passing_gib(config, shape))} while learners load or a checkpoint is written; the index is not "
            "counted",
            f"disk        checkpoints of at most {_size(checkpoints_gib(config, shape))} ({config.train.keep_checkpoints} kept, one being "
            f"written), {_checkpoints(config.train)}",
        ]
    shared = math.ceil(tokens / max(1, config.train.num_workers))
    return [
        *lines,
        f"tokens      a step trains at most {tokens:,}: {episodes} episodes ({config.buffer.groups_per_batch} tasks x "
        f"{config.buffer.group_size}) of at most {of}; {shared:,} a learner",
        *_step_judgements(config, episodes),
        *_staleness(config),
    ]


def _host(config: RunConfig, shape: ModelShape) -> list[str]:
    """The machine's memory beside the GPUs, were all on one machine."""
    away = offloaded_gib(config, shape)
    beside = f", {_size(away)} of it learners while samplers have their GPUs" if away else ""
    return [
        f"machine     {_size(host_gib(config, shape))} of its own memory on one machine, {_size(published_gib(config, shape))} of it weights on their way to the engines{beside}"
    ]


def _staleness(config: RunConfig) -> list[str]:
    episodes, ahead = config.buffer.groups_per_batch * config.buffer.group_size, config.buffer.max_staleness + 1
    return [
        f"staleness   at most {config.buffer.max_staleness}: {episodes * ahead} episodes at most are running or waiting"
    ]


def _trained(config: RunConfig) -> tuple[str, int]:
    """Most tokens that one episode trains: in words, and their number."""
    sampling, steps = config.sampling, config.sampling.steps
    if sampling.sampler != "steps":
        return f"{sampling.max_context:,}", sampling.max_context
    each = min(sampling.max_turn_tokens, sampling.max_context)
    return f"{steps.budget} steps x {steps.k} candidates x {each:,}", steps.budget * steps.k * each


def _step_judgements(config: RunConfig, episodes: int) -> list[str]:
    """What step groups ask a judge, at most."""
    slate, steps = config.reward.slate, config.sampling.steps
    if config.sampling.sampler != "steps" or slate.judge != "steps":
        return []
    outcome = int(config.reward.outcome == "judge")
    each = 2 * steps.k * steps.budget + outcome
    beside = ", and once for its outcome" if outcome else ""
    return [
        f"judge       a batch asks at most {episodes * each:,} times: an episode {each}, twice for each candidate{beside}"
    ]


def _checkpoints(train: TrainConfig) -> str:
    """When one is written, by steps and by the clock."""
    steps, minutes = train.checkpoint_every, train.checkpoint_minutes
    if steps and minutes:
        return f"one every {steps} steps, and sooner once {minutes:g} minutes have passed"
    return f"one every {minutes:g} minutes" if minutes else f"one every {steps or train.steps} steps"


def _size(size_gib: float) -> str:
    return f"{size_gib:.1f} GiB" if size_gib >= 1 else f"{math.ceil(size_gib * 1024)} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
