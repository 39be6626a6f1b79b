"""What a replay would do, and what keeps it from doing so: before anything is started or written.

A run stops at the first line (`check`), `--dry-run` says them all. Invariants: nothing is started and nothing is written;
sizes are those of `cluster.sizes`, without what only samplers take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agents.advantages import AdvantageConfig, lost_cause, to_samples
from agents.types import Group, RecordError
from cluster.errors import UserError, is_expected, one_line
from cluster.machine import check_gpus, check_port, check_ray, check_storage, free_memory
from cluster.model import ModelShape, model_shape, resolve
from cluster.plan import Plan
from cluster.preflight import Check, check_policy, check_section, check_settings, check_tokenizer
from cluster.record import Recording, check_speech, groups_dir
from cluster.sizes import GIB, checkpoints_gib, gib, host_gib, needs, published_gib, saving_gib

if TYPE_CHECKING:
    from cluster.schema import RunConfig


def alone(config: RunConfig) -> RunConfig:
    """The config without samplers: what a replay takes is what it says."""
    return replace(config, fleet=replace(config.fleet, num_engines=0, num_gpus=0))


def check(config: RunConfig) -> Path:
    """All that can be known to be wrong. Raises the first of it; returns the folder of the groups."""
    for one in _checks(config, []):
        one()
    return source_of(config)


def plan(config: RunConfig) -> Plan:
    """The plan of a replay, with everything that is missing."""
    opened: list[Recording] = []
    missing: list[str] = []
    for one in _checks(config, opened):
        try:
            one()
        except Exception as error:
            if not is_expected(error):
                raise
            missing.append(one_line(error))
    train, batch = config.train, config.buffer.groups_per_batch
    what, passes = f"{config.replay}: not known", ""
    if opened:
        order = "as they were trained" if opened[0].entries[0].step >= 0 else "as they were recorded"
        what = f"{opened[0].folder}: {len(opened[0])} groups, {order}"
        passes = f": {batch * train.steps / len(opened[0]):.2f} passes"
    lines = [
        f"replay      {what}",
        f"learning    {config.advantage.name}, lr {config.learner.lr:g}, {train.steps} steps of {batch} groups{passes}",
        "asks Ray    " + ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(needs(alone(config)).items())),
    ]
    shape = model_shape(config.model)
    if shape is not None:
        lines += [
            f"memory      {memory_gib(config, shape):.1f} GiB on the machine, with {saving_gib(config, shape):.1f} while a checkpoint is written",
            f"disk        checkpoints of at most {checkpoints_gib(config, shape):.1f} GiB ({train.keep_checkpoints} kept, one being written)",
        ]
    return Plan(tuple(lines), tuple(dict.fromkeys(missing)))


def source_of(config: RunConfig) -> Path:
    """The folder of the groups that `config.replay` names. Raises RecordError when there are none."""
    from cluster.rundir import storage_dir

    given = Path(config.replay).expanduser()
    return groups_dir(given if given.is_dir() else storage_dir(config.storage_path) / config.replay)


def memory_gib(config: RunConfig, shape: ModelShape) -> float:
    """Of the machine, for learners, Ray and the replay; nothing is published."""
    return host_gib(alone(config), shape) - published_gib(alone(config), shape)


def _checks(config: RunConfig, opened: list[Recording]) -> Iterator[Check]:
    """Every check, the cheap ones first; the recording lies in `opened` once its check has passed."""
    yield from (
        partial(check_section, section) for section in (config.advantage, config.learner, config.buffer, config.train)
    )
    yield partial(check_settings, config)
    yield partial(_check_limit, config)
    model = resolve(config.model.path)
    tokenizer = resolve(config.model.tokenizer) if config.model.tokenizer else model
    yield lambda: opened.append(_open(config))
    yield partial(check_policy, config, model)
    if opened:
        yield partial(check_recording, opened[0], config.advantage, config.buffer.groups_per_batch)
    if (config.model.path and model.is_dir()) or config.model.tokenizer:
        yield partial(_check_spoken, config, opened[:1], tokenizer, model)
    shape = model_shape(config.model)
    saved = checkpoints_gib(config, shape) if shape else 0.0
    yield partial(check_storage, config.storage_path, need_bytes=int((saved + 0.5) * GIB))
    yield from _machine(config, shape)


def _machine(config: RunConfig, shape: ModelShape | None) -> Iterator[Check]:
    from cluster.runtime import joined_address

    joined: list[str] = []
    yield lambda: joined.append(joined_address(config.ray) or "")
    if not joined:
        return
    if joined[0]:
        yield partial(check_ray, joined[0])
        return
    if config.ray.dashboard:
        yield partial(check_port, config.ray.dashboard_port, "ray.dashboard_port")
    if shape is not None:
        yield partial(check_memory, memory_gib(config, shape))
    if needs(alone(config)).get("GPU"):
        yield partial(check_gpus, alone(config), shape)


def _open(config: RunConfig) -> Recording:
    from cluster.rundir import find_run

    source, run_dir = source_of(config), find_run(config)[1]
    if run_dir.resolve() in (source.resolve(), source.resolve().parent):
        raise UserError(f"the replay of {run_dir} would take the place of what it reads; give it another name=")
    return Recording(source)


def _check_spoken(config: RunConfig, recording: list[Recording], tokenizer: Path, model: Path) -> None:
    from cluster.speech import make_speech

    check_tokenizer(tokenizer, model)
    speech = make_speech(str(tokenizer), config.protocol)
    for one in recording:
        check_speech(one.manifest, speech, one.folder)


def _check_limit(config: RunConfig) -> None:
    if config.train.max_sampled_tokens:
        raise UserError(
            "train.max_sampled_tokens counts what is sampled, which a replay is not; set it to 0 (train.steps ends a replay)"
        )


def check_memory(need_gib: float, free_bytes: int | None = None) -> None:
    """Whether a replay that takes so much fits into this machine's memory."""
    free = gib(free_memory() if free_bytes is None else free_bytes)
    if need_gib > free:
        raise UserError(
            f"not enough memory: a replay of this policy takes about {need_gib:.1f} GiB, {free:.1f} GiB are free; "
            "set learner.lora.rank above 0, or use a machine with more memory"
        )


def check_recording(recording: Recording, advantage: AdvantageConfig, groups_per_batch: int) -> None:
    """What a first look can tell. Raises RecordError, one line, when the groups cannot be trained in this way."""
    if len(recording) < groups_per_batch:
        raise RecordError(
            f"{recording.folder} holds {len(recording)} groups, which is less than one batch; "
            f"set buffer.groups_per_batch={len(recording)} or less"
        )
    entry, group = next(
        ((e, g) for e in recording.entries for g in [e.frame.read(Group)] if not lost_cause(g)),
        (None, None),
    )
    if entry is None or group is None:
        raise RecordError(f"no group in {recording.folder} was judged, so there is nothing to train; give another run")
    try:
        to_samples(group, advantage)
    except RecordError as error:
        raise RecordError(f"{entry.frame.path}:{entry.frame.number}: {error}") from None
    lazy = [v for v in group.verdicts if v.parts.get("rubric_judged") == 0]
    if lazy and advantage.name == "c_grpo" and not advantage.correct_only:
        raise RecordError(
            f"{recording.folder} was recorded with lazy rubrics: wrong answers have none; "
            "advantage.correct_only=false needs a recording with reward.lazy_rubrics=false"
        )
