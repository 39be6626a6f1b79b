"""What does not fit onto GPUs, one line each: what, where, how to mend.

Invariants: plain arithmetic by `cluster.layout`, nothing is started; the change that a line names is one of which the same
arithmetic says that it is enough, the cheapest of those that are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.layout import Gpu, Moment, moments, one_node, sampling_parts, seats
from cluster.model import ModelShape
from cluster.sizes import needs, shares_gpus

if TYPE_CHECKING:
    from cluster.schema import RunConfig

Change = Callable[["RunConfig"], "RunConfig"]
Mend = tuple[str, Change]
"""How it is said, and what it does."""
_ENOUGH = 1.0005
"""What an engine's share may be off by rounding."""


def misfits(config: RunConfig, shape: ModelShape, nodes: Sequence[Sequence[float]]) -> list[str]:
    """One line for each thing that does not fit onto these GPUs, with how to mend it. Empty: all fits."""
    gpus, left = seats(config, nodes)
    found = []
    if left:
        there = sum(len(n) for n in nodes)
        single = len(left) == 1
        kinds = " and ".join(sorted({name.partition("-")[0] + ("" if single else "s") for name in left}))
        mend = "lower fleet.num_engines or train.num_workers, set layout.kind=collocated, or use more GPUs"
        if config.engine.tensor_parallel > max((len(n) for n in nodes), default=0):
            mend = f"engine.tensor_parallel={config.engine.tensor_parallel} needs as many GPUs on one node"
        elif shares_gpus(config):
            mend = "lower fleet.num_engines and train.num_workers together, or use more GPUs"
        found.append(
            f"{len(left)} {kinds} {'has' if single else 'have'} no GPU to sit on ({there} GPUs, first {left[0]}); {mend}"
        )
    if line := one_node(config, {g.node for g in gpus if any(t.name.startswith("sampler") for t in g.tenants)}):
        found.append(line)
    told: set[tuple[str, bool]] = set()
    for gpu in gpus:
        # Of the learner's moments the fullest is told: what mends it mends the others.
        for moment in sorted(moments(config, shape, gpu), key=lambda m: -m.gib):
            one = _sequence(config, shape, gpu.gib, nodes) if moment.name == "sampling" else ""
            who = " and ".join(sorted({t.name.partition("-")[0] for t in gpu.tenants}))
            key = (who, moment.name == "sampling")
            if key in told or not (one or moment.gib > gpu.gib):
                continue
            told.add(key)
            found.append(one or _too_much(config, shape, gpu, moment, who, nodes))
    return found


def _sequence(config: RunConfig, shape: ModelShape, gpu_gib: float, nodes: Sequence[Sequence[float]]) -> str:
    """Whether an engine's share holds its weights, a step, and one sequence: it does not start otherwise."""
    engine = config.engine
    if engine.kv_cache_gb is not None:
        return ""
    room = engine.gpu_memory_utilization * gpu_gib
    need = sum(sampling_parts(config, shape, 0.0).values())  # of no share at all: the cache is that of one sequence
    if need <= room * _ENOUGH:
        return ""

    def holds(changed: RunConfig) -> bool:
        return not _sequence(changed, shape, gpu_gib, nodes)

    mend = _first(config, _engine_mends(config, shape), holds, nodes)
    return (
        f"a sampler takes {need:.1f} GiB on a GPU for its weights, a step and one sequence of {engine.max_model_len} tokens, "
        f"engine.gpu_memory_utilization={engine.gpu_memory_utilization:g} leaves it {room:.1f} of {gpu_gib:.1f}; "
        f"{mend or 'use GPUs with more memory'}"
    )


def _too_much(
    config: RunConfig, shape: ModelShape, gpu: Gpu, moment: Moment, who: str, nodes: Sequence[Sequence[float]]
) -> str:
    biggest = sorted(moment.named.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size:.1f}" for name, size in biggest)
    mends = _engine_mends(config, shape) if moment.name == "sampling" else _learner_mends(config)

    def holds(changed: RunConfig) -> bool:
        sampling = moment.name == "sampling"
        return all(m.gib <= gpu.gib for m in moments(changed, shape, gpu) if (m.name == "sampling") == sampling)

    mend = _first(config, [*_sharing_mends(config, moment, gpu.gib), *mends], holds, nodes)
    subject = f"a {who}" if " and " not in who else f"a {who.replace(' and ', ' and a ')} on one GPU"
    verb = "take" if " and " in who else "takes"
    return (
        f"{subject} {verb} {moment.gib:.1f} GiB while {moment.name} ({parts}), a GPU has {gpu.gib:.1f}; "
        f"{mend or 'use GPUs with more memory, or train adapters (learner.lora.rank)'}"
    )


def _first(
    config: RunConfig, mends: Iterable[Mend], holds: Callable[[RunConfig], bool], nodes: Sequence[Sequence[float]]
) -> str:
    """The first change after which it fits, and how many GPUs that takes where these are too few."""
    for text, change in mends:
        changed = change(config)
        if holds(changed):
            wanted = needs(changed).get("GPU", 0)
            return f"{text}, on {wanted:g} GPUs" if wanted > sum(map(len, nodes)) else text
    return ""


def _set(section: str, **values: Any) -> Change:
    return lambda config: replace(config, **{section: replace(getattr(config, section), **values)})


def _then(*changes: Change) -> Change:
    def both(config: RunConfig) -> RunConfig:
        for change in changes:
            config = change(config)
        return config

    return both


def _learner_mends(config: RunConfig) -> Iterator[Mend]:
    """From the cheapest to the dearest."""
    learner, longest = config.learner, config.sampling.max_context
    saves = _set("learner", gradient_checkpointing=True)
    if not learner.gradient_checkpointing:
        yield "set learner.gradient_checkpointing=true", saves
    budget = learner.max_tokens_per_microbatch
    short = _set("learner", max_tokens_per_microbatch=longest)
    if budget > longest:
        while (budget := budget // 2) > longest:
            yield f"set learner.max_tokens_per_microbatch={budget}", _set("learner", max_tokens_per_microbatch=budget)
        yield f"set learner.max_tokens_per_microbatch={longest}", short
        yield (
            f"set learner.gradient_checkpointing=true and learner.max_tokens_per_microbatch={longest}",
            _then(saves, short),
        )
    gpus = config.fleet.num_engines * config.engine.tensor_parallel
    for ranks in (2, 4, 8, 16, 32, 64, 128, 256):
        if ranks <= config.train.num_workers:
            continue
        more = _then(_set("train", num_workers=ranks), saves)
        said = f"set train.num_workers={ranks}"
        if shares_gpus(config):
            engines = max(1, ranks // config.engine.tensor_parallel)
            if ranks <= gpus:
                continue
            more, said = _then(more, _set("fleet", num_engines=engines)), f"{said} and fleet.num_engines={engines}"
        yield said + ("" if learner.gradient_checkpointing else " and learner.gradient_checkpointing=true"), more
    for part in (2, 4, 8):
        if config.train.num_workers % part == 0 and part > learner.context_parallel:
            yield (
                f"set learner.context_parallel={part}",
                _then(_set("learner", context_parallel=part, layout="packed", attention="varlen"), saves),
            )


def _engine_mends(config: RunConfig, shape: ModelShape) -> Iterator[Mend]:
    engine = config.engine
    for share in (0.85, 0.9, 0.95):
        if share > engine.gpu_memory_utilization and not shares_gpus(config):
            yield f"set engine.gpu_memory_utilization={share:g}", _set("engine", gpu_memory_utilization=share)
    if config.sampling.max_context < engine.max_model_len:
        length = config.sampling.max_context
        yield f"set engine.max_model_len={length}", _set("engine", max_model_len=length)
    for devices in (2, 4, 8):
        heads = max(1, shape.num_kv_heads)
        if devices <= engine.tensor_parallel or (devices % heads and heads % devices):
            continue
        change = _then(_set("engine", tensor_parallel=devices), _set("fleet", num_gpus=float(devices)))
        said = f"set engine.tensor_parallel={devices} and fleet.num_gpus={devices}"
        if shares_gpus(config):  # the same GPUs, in fewer engines
            engines = config.train.num_workers // devices
            if engines * devices != config.train.num_workers:
                continue
            change, said = _then(change, _set("fleet", num_engines=engines)), f"{said} and fleet.num_engines={engines}"
        yield said, change


def _sharing_mends(config: RunConfig, moment: Moment, gpu_gib: float) -> Iterator[Mend]:
    """Of two who take turns."""
    if not shares_gpus(config):
        return
    if not config.layout.offload:
        yield "set layout.offload=true", _set("layout", offload=True)
    if moment.name == "sampling":
        beside = sum(size for name, size in moment.parts.items() if name.startswith("learner"))
        share = int(100 * (gpu_gib - beside) / gpu_gib) / 100
        if 0 < share < config.engine.gpu_memory_utilization:
            yield (
                f"set engine.gpu_memory_utilization={share:g}",
                _set("engine", gpu_memory_utilization=share),
            )
