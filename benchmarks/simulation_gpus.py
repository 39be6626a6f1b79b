"""From a card, a model and a number of GPUs to a simulated system. Nothing here was measured on a GPU.

Every number is either of a data sheet (cards), of the model's configuration, measured on CPU (`Control`), or an assumption with a
default (`Assumptions`), which the command takes as an argument. Roofline arithmetic: a decode step reads the weights once and the
keys and values of all sequences, and computes; prefill and training compute at a share of the dense bf16 peak.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from benchmarks.simulation_parts import EngineModel, Episode, System, Turn, Workload
from cluster.model import ModelShape


@dataclass(frozen=True)
class Card:
    """Data sheet: dense bf16 operations per second, bytes per second and bytes of its memory."""

    flops: float
    bandwidth: float
    memory: float


GROUP = 8
"""Episodes of a group."""
CARDS = {
    "a100-80": Card(312e12, 2.0e12, 80e9), "h100": Card(989e12, 3.35e12, 80e9), "h200": Card(989e12, 4.8e12, 141e9),
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What nobody measured here, with a default. Seconds, bytes, tokens and shares."""

    mfu: float = 0.35
    """Learner: share of the card's peak, all that FSDP overlaps included (goal of this project: 0.40)."""
    prefill_mfu: float = 0.5
    """Engine: the same of prefill and of the arithmetic of decoding."""
    memory_share: float = 0.7
    """Engine: share of the memory's bandwidth that decoding reaches."""
    kv_share: float = 0.85
    """Of the card's memory, for weights and cache of an engine."""
    launch_s: float = 0.004
    """Engine: a decode step beside reading and computing: launches, scheduler, sampling."""
    max_sequences: float = 256
    """Engine: sequences at a time."""
    tensor_parallel: float = 1
    """GPUs of an engine."""
    network: float = 40e9
    """Bytes per second and GPU between nodes."""
    microbatch_tokens: float = 32768
    """Learner: tokens between two gatherings of all weights."""
    optimiser_s: float = 0.5
    """Learner: optimiser, gradient norm and what else a step takes whatever its size."""
    engine_call_s: float = 0.004
    """Publish: per engine, for the calls of all phases by the one fleet actor."""
    publish_s: float = 0.2
    """Publish: phases and checks, whatever the size."""
    ray_s: float = 0.0005
    """A call of an actor beside what it does: dispatch, serialisation of small arguments."""
    turns: float = 20
    """Policy turns of an episode, on average."""
    said: float = 400
    """Tokens sampled in a turn, on average."""
    shown: float = 600
    """Tokens of an observation."""
    prompt: float = 1000
    """Tokens of the first prompt."""
    max_context: float = 64000
    """An episode ends there."""
    task_spread: float = 0.5
    """Spread of turns between tasks: sigma of a log-normal."""
    episode_spread: float = 0.4
    """The same between attempts at one task, and of the tokens said in a turn."""
    tool_s: float = 1.0
    """A tool call; log-normal with sigma 1."""
    tool_service_s: float = 0.02
    """Of it, the time a search server is held."""
    judge_s: float = 10.0
    """Judgement of an episode by an LLM."""
    groups_in_flight: float = 16
    """Leases a rollout worker plays at a time."""

    def with_(self, changes: Sequence[str]) -> Assumptions:
        """`name=value` each. Raises ValueError, one line, that names what there is."""
        names = {f.name for f in fields(self)}
        values = {}
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals or name not in names:
                raise ValueError(f"--assume {change}: give name=number, with a name of {', '.join(sorted(names))}")
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"--assume {change}: {value!r} is not a number") from None
            if not values[name] >= 0 or (values[name] == 0 and not name.endswith(("_s", "spread"))):
                raise ValueError(f"--assume {change}: it must be above 0")
        return replace(self, **values)


@dataclass(frozen=True)
class Control:
    """Measured on CPU: the central actors' own code (`simulation_control`) and a turn's way (`pipeline.json`)."""

    lease_s: float
    put_s: float
    ship_s: float
    pickle_s: float
    """Of one episode of a batch, each time it is sent."""
    shard_s: float
    """Per episode and learner rank: cutting a batch into shards."""
    turn_s: float
    turn_per_token_s: float


@dataclass(frozen=True)
class Policy:
    """What the arithmetic needs of a decoder's `config.json`."""

    name: str
    parameters: float
    kv_bytes: float
    """Per token, bf16."""
    attention_flops: float
    """Forward, per token and token of context before it."""

    @classmethod
    def of(cls, path: Path) -> Policy:
        """Dense decoders: of one with experts a token does not use all parameters."""
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("num_experts") or config.get("n_routed_experts"):
            raise ValueError(
                f"{path}: a model with experts; give a dense one, its active parameters are not known here"
            )
        shape = ModelShape.of(config)
        width = config["num_attention_heads"] * config.get(
            "head_dim", config["hidden_size"] // config["num_attention_heads"]
        )
        return cls(
            path.stem, shape.num_parameters, 2.0 * shape.kv_values_per_token, 4.0 * config["num_hidden_layers"] * width
        )


@dataclass(frozen=True)
class Layout:
    """How a number of GPUs is used."""

    gpus: int
    learners: int
    batch_episodes: int
    group_size: int = GROUP
    max_staleness: int = 1
    judges: int = 64
    """Judgements at a time."""
    tools: int = 16
    """Search servers."""
    workers: int = 2
    whole_batch: bool = True
    """Every learner rank is sent the whole batch; else its own shard, as the buffer does it."""

    def engines(self, a: Assumptions) -> int:
        return max(1, int((self.gpus - self.learners) // a.tensor_parallel))


def grown(gpus: int, share: float, batch_episodes: int, staleness: int = 1, *, whole_batch: bool = True) -> Layout:
    """What can be multiplied grows with the GPUs: engines, learner ranks, workers, judges, search servers."""
    learners = min(gpus - 1, max(1, round(gpus * share)))
    return Layout(
        gpus, learners, batch_episodes, GROUP, staleness, 16 * gpus, max(4, 2 * gpus), max(2, gpus // 2), whole_batch
    )


def engine_model(policy: Policy, card: Card, a: Assumptions) -> EngineModel:
    weights, ways = 2.0 * policy.parameters, a.tensor_parallel
    read, compute = card.bandwidth * a.memory_share * ways, card.flops * a.prefill_mfu * ways
    context = mean_context(a)
    room = card.memory * a.kv_share * ways - weights
    if room <= policy.kv_bytes * a.max_context:
        raise ValueError(
            f"{policy.name} with a context of {a.max_context:g} does not fit {ways:g} GPUs of {card.memory / 1e9:g} GB"
        )
    return EngineModel(
        weights / read + a.launch_s, 2.0 * policy.parameters / compute, policy.kv_bytes / read,
        (2.0 * policy.parameters + policy.attention_flops * context) / compute, 0.0, int(a.max_sequences), room / policy.kv_bytes,
    )  # fmt: skip


def mean_context(a: Assumptions) -> float:
    """Tokens before a token, on average over an episode of mean length."""
    return (a.prompt + a.turns * (a.said + a.shown)) / 2


def learner_seconds(tokens: Sequence[float], ranks: int, policy: Policy, card: Card, a: Assumptions) -> float:
    """A step: the busiest rank's arithmetic, or the gathering of weights where that takes longer, and the fixed part.

    Episodes are whole on a rank (`agents.sharding`: longest first, to the rank with the least). Weights are gathered twice
    and gradients scattered once per microbatch, at the network's speed if the ranks fill more than one node of 8.
    """
    loads = [0.0] * ranks
    work = [0.0] * ranks
    order = [(0.0, r) for r in range(ranks)]
    for length in sorted(tokens, reverse=True):
        _, rank = order[0]
        loads[rank] += length
        work[rank] += 6.0 * policy.parameters * length + 3.0 * policy.attention_flops * length * length / 2
        heapq.heapreplace(order, (loads[rank], rank))
    compute_s = max(work) / (card.flops * a.mfu)
    if ranks == 1:
        return compute_s + a.optimiser_s
    speed = a.network if ranks > 8 else 8 * a.network
    gathers = max(1, math.ceil(max(loads) / a.microbatch_tokens))
    return max(compute_s, gathers * 3 * 2.0 * policy.parameters / speed) + a.optimiser_s


def gpu_system(layout: Layout, policy: Policy, card: Card, a: Assumptions, control: Control) -> System:
    """The system of a layout; the central actors' times are `control`'s and a call's."""
    engines, ranks = layout.engines(a), layout.learners
    sent = (ranks if layout.whole_batch else 1) * control.pickle_s
    weights = 2.0 * policy.parameters
    transfer_s = weights / a.network  # gathered to one rank, then broadcast along a chain, both at the network's speed
    return System(
        engine_model(policy, card, a), layout.group_size, max(1, layout.batch_episodes // layout.group_size), layout.max_staleness,
        engines, layout.workers, int(a.groups_in_flight),
        learner_of=lambda tokens: learner_seconds(tokens, ranks, policy, card, a),
        publish_s=a.publish_s + 2 * transfer_s + engines * a.engine_call_s, pause_s=transfer_s + engines * a.engine_call_s / 2,
        judge_s=a.judge_s, judges=layout.judges, tools=layout.tools, tool_service_s=a.tool_service_s,
        turn_s=control.turn_s, turn_per_token_s=control.turn_per_token_s, route_s=2 * a.ray_s, lease_s=control.lease_s + a.ray_s,
        put_s=control.put_s + a.ray_s, ship_s=control.ship_s + sent + ranks * control.shard_s,
    )  # fmt: skip


def gpu_workload(a: Assumptions) -> Workload:
    """Long episodes with a long tail: turns vary between tasks and attempts, sampled tokens and tools from turn to turn."""

    def draw(lease: int, rng: np.random.Generator) -> list[Episode]:
        task = rng.lognormal(-(a.task_spread**2) / 2, a.task_spread)
        made: list[Episode] = []
        for own in rng.lognormal(-(a.episode_spread**2) / 2, a.episode_spread, GROUP):
            number = max(1, round(a.turns * task * own))
            said = a.said * rng.lognormal(-(a.episode_spread**2) / 2, a.episode_spread, number)
            tool_s = a.tool_s * rng.lognormal(-0.5, 1.0, number)
            turns, context = [], 0.0
            for n in range(number):
                new = a.prompt if not n else a.shown
                if n and context + new + said[n] > a.max_context:
                    break
                context += new + said[n]
                turns.append(Turn(new, float(said[n]), float(tool_s[n])))
            made.append(turns)
        return made

    return draw


def faster(system: System) -> Mapping[str, System]:
    """The system with one part at twice its speed each, to find what holds it up."""
    e, of = system.engine, system.learner_of
    engine = replace(
        e, step_s=e.step_s / 2, per_sequence_s=e.per_sequence_s / 2, per_context_s=e.per_context_s / 2, prefill_s=e.prefill_s / 2,
        max_sequences=2 * e.max_sequences, kv_tokens=2 * e.kv_tokens,
    )  # fmt: skip
    tool, judge, control = (
        ("tool_service_s",),
        ("judge_s",),
        ("turn_s", "turn_per_token_s", "route_s", "lease_s", "put_s"),
    )

    def halved(names: Sequence[str]) -> System:
        return replace(system, **{n: getattr(system, n) / 2 for n in names})

    return {
        "engines": replace(system, engine=engine),
        "learner": replace(system, learner_of=lambda tokens: of(tokens) / 2 if of else 0.0),
        "search servers": halved(tool), "judges": halved(judge), "publish": halved(("publish_s", "pause_s")),
        "batch assembly": halved(("ship_s",)), "central actors": halved(control),
        "staleness bound": replace(system, max_staleness=2 * system.max_staleness + 1),
    }  # fmt: skip
