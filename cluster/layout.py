"""Layouts: who sits on which GPU, and what that takes at each moment of a step.

`split`: samplers and learners on GPUs of their own, at the same time. `collocated`: they share the same GPUs and take turns
(`cluster.turns`). Invariants: plain arithmetic by `cluster.sizes` and `cluster.memory`; nothing is started.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.membership import Place, choose, choose_for_adapters
from cluster.memory import ASLEEP_GIB, PROCESS_GIB
from cluster.model import ModelShape
from cluster.placement import RolePlacement
from cluster.sizes import gib, handover_of, kv_bytes_per_token, learner_of, shares, shares_gpus, trains_on_gpu
from cluster.tenants import held_by
from retrieval.config import legs_of

if TYPE_CHECKING:
    from cluster.schema import RunConfig

KINDS = ("split", "collocated")
OTHERS = ("judge", "encoder", "shard")
"""Who may have a GPU besides samplers and learners."""
NODE_LABEL = "ray.io/node-id"
"""The label by which Ray knows a node."""
CARDS_GIB = {
    "a10": 22.5, "a100": 79.2, "a100-40": 39.4, "b200": 178.4, "h100": 79.2, "h200": 139.8, "l4": 22.5, "l40s": 44.5, "rtx4090": 23.6,
}  # fmt: skip
"""What a process sees of a card's memory, as drivers tell it, rounded down. For plans without the card."""


@dataclass
class LayoutConfig:
    """How samplers and learners share the GPUs."""

    kind: str = "split"
    """`split`: GPUs of their own; `collocated`: the same GPUs in turns, an engine sleeps while the learner trains."""
    offload: bool = True
    """Collocated: the learner's weights and moments lie in the machine's memory while samplers have the GPUs."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.kind not in KINDS:
            raise ValueError(f"layout.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Tenant:
    """One actor on one GPU."""

    name: str
    """Such as `sampler-0`, or `sampler-0.1` for the second GPU of one engine."""
    share: float = 1.0
    """Of the GPU, in Ray's books."""

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]


@dataclass(frozen=True)
class Turns:
    """What a learner must know of taking turns. It crosses processes."""

    on_gpu: bool
    """It shares the engines' GPUs; else all are on CPU."""
    offload: bool


@dataclass
class Gpu:
    """One GPU, and who sits on it."""

    node: int
    number: int
    gib: float
    tenants: list[Tenant] = field(default_factory=list)

    @property
    def free(self) -> float:
        return 1.0 - sum(t.share for t in self.tenants)


@dataclass(frozen=True)
class Moment:
    """What a GPU holds at the fullest moment of one kind, in GiB by what fills it (`learner's weights`)."""

    name: str
    """`sampling`, `publishing` or `training`; `serving` where neither sampler nor learner is."""
    parts: dict[str, float]

    @property
    def gib(self) -> float:
        return sum(self.parts.values())

    @property
    def named(self) -> dict[str, float]:
        """The parts, without saying whose they are where all are one actor's."""
        if len({name.partition("'s ")[0] for name in self.parts}) > 1:
            return self.parts
        return {name.partition("'s ")[2]: size for name, size in self.parts.items()}


def arranged(config: RunConfig) -> RunConfig:
    """The config with what its layout means for others: learners on shared GPUs ask Ray for none, all sit on one node, and engines can sleep.
    Idempotent."""
    if not shares_gpus(config):
        return config
    train, engine = replace(config.train, worker_gpus=0.0), replace(config.engine, sleeps=True)
    place = config.placement
    sampler, learner = (replace(role, strategy="strict_pack") for role in (place.sampler, place.learner))
    return replace(config, train=train, engine=engine, placement=replace(place, sampler=sampler, learner=learner))


def learner_place(config: RunConfig, nodes: Collection[str]) -> RolePlacement:
    """Where learners may sit, given the nodes (Ray's ids) of the engines: beside those whose GPUs they share. Ray itself would rather give
    actors that ask for no GPU a node without any."""
    place = config.placement.learner
    if not shares_gpus(config) or len(nodes) != 1:
        return place
    return replace(place, labels={**place.labels, NODE_LABEL: next(iter(nodes))})


def node_gone(config: RunConfig, node: str) -> str:
    """The line with which a run ends whose samplers and learners shared the GPUs of a node that was lost."""
    gpus = round(config.fleet.num_engines * config.fleet.num_gpus)
    return (
        f"node {node[:8]} was lost, whose GPUs samplers and learners share (layout.kind=collocated): learners cannot follow the engines to another "
        f"one within a run; nothing up to the last checkpoint is lost: go on with resume=auto once a node with {gpus} free "
        f"GPU{'s' if gpus != 1 else ''} is there"
    )


def check_layout(config: RunConfig) -> None:
    """What only several sections together can tell. Raises UserError."""
    if config.layout.kind != "collocated" or not config.fleet.num_engines:
        return
    fleet, train, engine = config.fleet, config.train, config.engine
    if engine.kv_after_update == "keep":
        raise UserError(
            "layout.kind=collocated gives the cache back while the learner trains, so nothing of it can be kept; set engine.kv_after_update=recompute"
        )
    if train.worker_gpus and not fleet.num_gpus:
        raise UserError(
            "layout.kind=collocated shares the engines' GPUs, and fleet.num_gpus is 0; set fleet.num_gpus=1, or layout.kind=split"
        )
    gpus = fleet.num_engines * engine.tensor_parallel
    if fleet.num_gpus and train.num_workers != gpus:
        raise UserError(
            f"layout.kind=collocated puts one learner on each GPU of the engines: there are {gpus} "
            f"(fleet.num_engines={fleet.num_engines} x engine.tensor_parallel={engine.tensor_parallel}) and train.num_workers="
            f"{train.num_workers}; set train.num_workers={gpus}"
        )
    if fleet.num_gpus and fleet.num_gpus != engine.tensor_parallel:
        raise UserError(
            f"layout.kind=collocated shares whole GPUs; set fleet.num_gpus={engine.tensor_parallel}, as engine.tensor_parallel says"
        )
    if fleet.min_engines and fleet.min_engines < fleet.num_engines:
        raise UserError("layout.kind=collocated needs all engines from the start; set fleet.min_engines=0")


# ------------------------------------------------------------------------------------------------------ seats


def parse_gpus(text: str) -> list[list[float]]:
    """GPUs by node, each its memory in GiB, from `8x80`, `h200`, `2x8xh100` (nodes x GPUs x card). Raises UserError."""
    match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([a-z][a-z0-9-]*|\d+(?:\.\d+)?)", text.strip().lower())
    card = match[3] if match else ""
    memory = CARDS_GIB.get(card) if not card[:1].isdigit() else float(card)
    if match is None or not memory:
        raise UserError(
            f"--gpus {text!r} cannot be read; give nodes x GPUs x GiB, such as 80, 8x80 or 2x8xh100 (cards: {', '.join(CARDS_GIB)})"
        )
    nodes, each = (int(match[i] or 1) for i in (1, 2))
    if not nodes or not each:
        raise UserError(f"--gpus {text!r} means no GPU at all; give at least one, such as 1x80")
    return [[memory] * each for _ in range(nodes)]


def seats(config: RunConfig, nodes: Sequence[Sequence[float]]) -> tuple[list[Gpu], list[str]]:
    """Every GPU with who sits on it, and who found no place. One way in which Ray may do it: an engine's GPUs are on one node."""
    gpus = [Gpu(n, i, size) for n, sizes in enumerate(nodes) for i, size in enumerate(sizes)]
    fleet, train, judge, spread = config.fleet, config.train, config.judge, config.service.topology
    left: list[str] = []

    def sit(name: str, asked: float) -> list[Gpu]:
        whole = max(1, round(asked)) if asked >= 1 else 1
        share = 1.0 if asked >= 1 else asked
        for node in range(len(nodes)):
            free = [g for g in gpus if g.node == node and g.free >= share - 1e-9]
            if len(free) >= whole:
                for i, gpu in enumerate(free[:whole]):
                    gpu.tenants.append(Tenant(f"{name}.{i}" if whole > 1 else name, share))
                return free[:whole]
        left.append(name)
        return []

    together = shares_gpus(config)
    rank = 0
    for e in range(fleet.num_engines if fleet.num_gpus else 0):
        for gpu in sit(f"sampler-{e}", fleet.num_gpus):
            if together:
                gpu.tenants.append(Tenant(f"learner-{rank}", 0.0))
                rank += 1
    for i in range(train.num_workers if train.worker_gpus and not together else 0):
        sit(f"learner-{i}", train.worker_gpus)
    others = [("judge", judge.engines, judge.num_gpus if judge.kind == "vllm" and not judge.replay else 0.0)]
    others += [("encoder", spread.encoders, spread.encoder_gpus)]
    shards = len(legs_of(config.retrieval)) * config.retrieval.shards * spread.shard_replicas
    others += [("shard", shards, spread.shard_gpus)]
    for name, count, asked in others:
        for i in range(count if asked else 0):
            sit(f"{name}-{i}", asked)
    return gpus, left


# ----------------------------------------------------------------------------------------------------- moments


def moments(config: RunConfig, shape: ModelShape, gpu: Gpu) -> list[Moment]:
    """What all tenants hold on one GPU at the fullest moments of a step. Those whose bytes are not known (`uncounted`) are left out."""
    roles = Counter(t.role for t in gpu.tenants)
    samplers, learners = roles["sampler"], roles["learner"]
    others = _others(config, roles, gpu.gib)
    if not (samplers or learners):
        return [Moment("serving", others)] if others else []
    learner, passing = learner_of(config, shape), handover_of(config, shape, beside=bool(samplers and learners))
    sampling = _times(samplers, sampling_parts(config, shape, gpu.gib))
    receiving = _times(samplers, _parts("sampler", passing.receiver))
    stays = _times(learners, _parts("learner", passing.stays))
    sending = _times(learners, _parts("learner", learner.held | passing.sender)) | stays
    training = _times(learners, _parts("learner", learner.training)) | stays
    process = {"learner's process": learners * PROCESS_GIB} if learners else {}
    if shares_gpus(config) and samplers and learners:
        residue = stays if config.layout.offload else _times(learners, _parts("learner", learner.kept)) | stays
        awake = sampling_parts(config, shape, gpu.gib)["sampler's weights"]
        giving = _times(learners, _parts("learner", learner.kept | passing.sender)) | stays
        asleep = {"sampler's process": samplers * ASLEEP_GIB} | process | others
        return [
            Moment("sampling", sampling | residue | process | others),
            Moment("training", training | asleep),
            # All but the gradients is there, and engines have their weights, but no cache.
            Moment("publishing", giving | {"sampler's weights": samplers * awake} | receiving | asleep),
        ]
    found = []
    if not learners:
        found.append(Moment("sampling", sampling | others))
    else:  # shares of one GPU, at the same time
        found.append(Moment("training", sampling | training | process | others))
    if config.fleet.num_engines:
        found.append(Moment("publishing", sampling | receiving | sending | process | others))
    return found


def uncounted(config: RunConfig, gpu: Gpu) -> list[str]:
    """One line for each kind of tenant of a GPU whose bytes are not known."""
    kinds = [r for r in dict.fromkeys(t.role for t in gpu.tenants) if r in OTHERS]
    return [f"{kind}: {why}" for kind in kinds if (why := held_by(config, kind, gpu.gib).unknown)]


def _others(config: RunConfig, roles: Mapping[str, int], gpu_gib: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in OTHERS:
        if roles.get(kind):
            found |= _times(roles[kind], held_by(config, kind, gpu_gib).parts)
    return found


def _times(number: int, parts: Mapping[str, float]) -> dict[str, float]:
    return {name: number * size for name, size in parts.items()} if number else {}


def refused(config: RunConfig, gpus: Sequence[Gpu]) -> str:
    """Why `fleet.transport` cannot serve those who sit there, by the rule of the run (`cluster.membership`); empty when it can."""
    if not config.fleet.num_engines:
        return ""
    where: dict[str, Place] = {}
    for gpu in gpus:
        for tenant in gpu.tenants:
            if tenant.role in ("sampler", "learner"):
                name = "learner" if tenant.role == "learner" else tenant.name.partition(".")[0]
                held = where.get(name, Place(str(gpu.node)))
                where[name] = Place(held.node, (*held.devices, f"{gpu.node}-{gpu.number}"))
    here = next((place.node for place in where.values()), "")
    learner = where.pop("learner", Place(here))
    engines = where if config.fleet.num_gpus else {f"sampler-{i}": Place() for i in range(config.fleet.num_engines)}
    try:
        if config.learner.lora.publish == "adapter":
            choose_for_adapters(learner, engines)
        else:
            choose(config.fleet.transport, learner, engines)
    except UserError as error:
        return str(error)
    return ""


def sampling_parts(config: RunConfig, shape: ModelShape, gpu_gib: float) -> dict[str, float]:
    """One device of an engine: what it takes is its share of the GPU, or with `engine.kv_cache_gb` what it needs."""
    sampler = shares(config, shape, gpu_gib)[0]
    return {f"sampler's {name}": size / config.engine.tensor_parallel for name, size in sampler.parts_gib.items()}


def _parts(who: str, parts: dict[str, float]) -> dict[str, float]:
    return {f"{who}'s {name}": gib(size) for name, size in parts.items()}


def room_for(config: RunConfig, shape: ModelShape, gpu_gib: float | None) -> str:
    """How many tokens an engine's cache holds, and how many of the longest sequences that are; empty where it is not known."""
    sampler = shares(config, shape, gpu_gib)[0]
    cache = sampler.parts_gib.get("KV cache")
    each = kv_bytes_per_token(config.engine, shape, on_cpu=not config.fleet.num_gpus)
    if not cache or not each:
        return ""
    tokens = int(cache * (1 << 30) / each)
    return f"{tokens:,} tokens of {each:,} bytes, {tokens / config.engine.max_model_len:.1f} sequences of {config.engine.max_model_len:,}"


def turns_of(config: RunConfig) -> Turns | None:
    """How samplers and learners take turns; None where they do not. Also on CPU, where no memory is given back."""
    if config.layout.kind != "collocated" or not config.fleet.num_engines:
        return None
    return Turns(shares_gpus(config), config.layout.offload)


def summary(config: RunConfig) -> str:
    """The layout in words."""
    fleet, train, engine = config.fleet, config.train, config.engine
    size = f" of {engine.tensor_parallel} GPUs" if engine.tensor_parallel > 1 else ""
    samplers = f"{fleet.num_engines} sampler{'s' if fleet.num_engines != 1 else ''}{size}"
    learners = f"{train.num_workers} learner{'s' if train.num_workers != 1 else ''}"
    if shares_gpus(config):
        count = round(fleet.num_engines * fleet.num_gpus)
        gone = "gone" if config.layout.offload else "there"
        gpus = f"{count} GPU{'s' if count != 1 else ''}"
        return f"collocated: {samplers} and {learners} take turns on {gpus}; the learner's tensors are {gone} while samplers work"
    where = {
        (False, False): "on CPUs", (True, True): "on GPUs of their own", (True, False): "samplers on GPUs, learners on CPUs",
        (False, True): "samplers on CPUs, learners on GPUs",
    }[bool(fleet.num_gpus), trains_on_gpu(config)]  # fmt: skip
    return f"{'collocated' if turns_of(config) else 'split'}: {samplers} and {learners}, {where}" + (
        ", in turns" if turns_of(config) else ""
    )


def one_node(config: RunConfig, nodes: Collection[Any]) -> str:
    """One line where engines that share their GPUs with learners sit on several nodes, else empty."""
    if not shares_gpus(config) or len(nodes) < 2:
        return ""
    return (
        f"layout.kind=collocated works on the GPUs of one node, and the engines sit on {len(nodes)}: learners, which ask Ray for no GPU, "
        "would not be spread as the engines are; set layout.kind=split, or fewer fleet.num_engines and train.num_workers"
    )
