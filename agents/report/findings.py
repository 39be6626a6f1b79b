"""What limits a run, and what is wrong with it: in plain words, with the numbers that prove it and the keys to turn.

A pure function over the rows of metrics.jsonl and the spans. Invariant: the first finding matters most: what is broken, then
what limits the speed (the largest share of a step first), then what costs learning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.report.load import number, rewinds, whole_steps
from agents.report.spans import Span, actor_order, clipped, covered_s

RECENT = 50
"""Steps that the verdict rests on: what limited the run an hour ago may be mended."""
STALL = 10.0
"""Times the usual step time without a step after which somebody must be stuck."""
MIN_STALL_S = 120.0
PHASE_S = 1800.0
"""How long a part of the run that makes no optimiser steps may take before somebody must be stuck."""
PHASE = re.compile(r"^[\w, ]+ \.\.\.$")
"""The event with which a part of a run begins, such as “evaluation after training ...”."""
MIN_FREE_BYTES = 2 * 2**30
RESTARTED = re.compile(
    r"^(?:(?P<actor>learner) \d+ begins at step|(?P<other>[a-z]+)(?:-\d+)? (?:was fenced|was killed|died)\b)"
)
"""Events of the fleet, the watchdog and the buffer. A learner counts when it is back, others when they go."""
ONE_DEATH_S = 30.0
"""Several events about one actor within this time tell of one death."""

BROKEN, LIMIT, WARNING = 3, 2, 1


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. `what`: with its numbers. `change`: what would help."""

    rank: int
    weight: float
    """Among findings of the same rank."""
    what: str
    change: str = ""


def findings(
    rows: Sequence[Mapping[str, Any]],
    spans: Sequence[Span] = (),
    *,
    now: float | None = None,
    finished: bool = False,
    free_bytes: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """All findings, most important first. `rows`: all kinds, in the order they were written; `config`: the run's, resolved."""
    config = config or {}
    train = [dict(r) for r in rows if r.get("kind") == "train" and isinstance(r.get("step"), int)]
    events = [r for r in rows if r.get("kind") == "event"]
    whole = whole_steps(train, [dict(r) for r in rows if r.get("kind") == "publish"], spans)
    recent = Means(
        whole[-RECENT:] if len(whole) < 4 else whole[max(1, len(whole) - RECENT) :]
    )  # the first holds the set-up
    made = [
        *_stalled(train, events, spans, recent, now, finished, config),
        *_ledger(train),
        *_disk(free_bytes),
        *_limits(recent, _idle(spans, recent)),
        *_learning(recent, setting(config, "advantage", "name")),
        *_restarts(train, events),
    ]
    return sorted(made, key=lambda f: (-f.rank, -f.weight))


class Means:
    """Means of a metric over some rows; 0 for one that nobody logged."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __call__(self, key: str) -> float:
        found = [v for r in self.rows if (v := number(dict(r), key)) is not None]
        return sum(found) / len(found) if found else 0.0

    def has(self, key: str) -> bool:
        return any(number(dict(r), key) is not None for r in self.rows)

    def keys(self, prefix: str) -> list[str]:
        return list(dict.fromkeys(k for r in self.rows for k in r if k.startswith(prefix)))


# ------------------------------------------------------------------------------------------------------- limits


def _limits(mean: Means, idle: float) -> list[Finding]:
    """Who is waited for. A step is wait + train + publish + checkpoint + other, one after the other."""
    step_s = mean("time/step_s")
    if step_s <= 0:
        return []
    wait, train, publish, checkpoint = (
        mean(f"time/{k}_s") / step_s for k in ("wait", "train", "publish", "checkpoint")
    )
    made = []
    if wait >= 0.2 and idle >= 0.15:
        made.append(Finding(
            LIMIT, wait,
            f"admission limits: the learner waited {_share(wait)} of a step of {_s(step_s)} and a rollout worker stood without any lease "
            f"{_share(idle)} of the time: they take turns (staleness {mean('staleness/mean'):.1f} on average)",
            "raise buffer.max_staleness by 1, so that rollouts go on while the learner trains",
        ))  # fmt: skip
    elif wait >= 0.2:
        made.append(_rollouts(mean, wait, step_s))
    if train >= 0.5 or (train >= 0.3 and train >= max(wait, publish, checkpoint)):
        made.append(_learner(mean, wait, train, step_s))
    if publish >= 0.15:
        pause = (
            f" (samplers stood still {mean('publish/pause_ms'):.0f} ms of it)" if mean.has("publish/pause_ms") else ""
        )
        made.append(Finding(
            LIMIT, publish, f"publishing limits: {_share(publish)} of a step, {_s(mean('time/publish_s'))} each time{pause}",
            "more groups a batch (buffer.groups_per_batch) publish less often; learner.lora.rank > 0 makes weights small; "
            "train.verify_every higher checks them less often",
        ))  # fmt: skip
    if checkpoint >= 0.1:
        made.append(Finding(
            LIMIT, checkpoint, f"checkpoints limit: {_share(checkpoint)} of the time goes into writing them",
            "raise train.checkpoint_every, or give storage_path a faster disk",
        ))  # fmt: skip
    other = 1 - wait - train - publish - checkpoint
    if other >= 0.25:
        made.append(Finding(
            LIMIT, other, f"{_share(other)} of a step is in none of the learner's phases",
            "learner.loss.kl_coef > 0 scores every batch with the reference, and checkpoints count here in older runs",
        ))  # fmt: skip
    return made


def _rollouts(mean: Means, wait: float, step_s: float) -> Finding:
    """The learner waits for rollouts: for which part of them?"""
    parts = {k: mean(f"rollout/{k}_s") for k in ("generate", "tools", "judge")}
    whole = sum(parts.values())
    head = f"the learner waited {_share(wait)} of a step of {_s(step_s)}"
    if whole <= 0:
        return Finding(
            LIMIT, wait, f"rollouts limit: {head}", "fleet.num_engines, rollout.workers, rollout.groups_in_flight"
        )
    longest = max(parts, key=lambda k: parts[k])
    share = f"{_share(parts[longest] / whole)} of an episode's {_s(whole)}"
    if longest == "judge":
        return Finding(
            LIMIT, wait, f"the judge limits: {head}; judging is {share}",
            "raise judge.concurrency if the endpoint has room, else use a faster judge or more of them; judge.cache_size keeps answers",
        )  # fmt: skip
    if longest == "tools":
        return Finding(
            LIMIT, wait, f"the tools limit: {head}; searching and opening pages is {share}",
            "raise service.concurrency and service.max_batch, or rollout.groups_in_flight so that more episodes wait at once",
        )  # fmt: skip
    busy = f"; {mean('engine/running'):.0f} requests run at a time" if mean.has("engine/running") else ""
    tail = mean("rollout/wall_s") / (parts["generate"] + parts["tools"] + 1e-9)
    slow = f"; the slowest attempt of a group takes {tail:.1f} times the mean" if tail >= 2 else ""
    change = "raise fleet.num_engines, or rollout.groups_in_flight and engine.max_num_seqs while engines have room"
    if tail >= 2:
        change += "; buffer.max_staleness by 1 or a lower sampling.max_turns or sampling.max_context shortens the tail"
    return Finding(LIMIT, wait, f"sampling limits: {head}; generating is {share}{busy}{slow}", change)


def _learner(mean: Means, wait: float, train: float, step_s: float) -> Finding:
    core = (mean("time/forward_s") + mean("time/backward_s")) / step_s
    split = (
        f"; forward and backward are {_share(core)} of a step of {_s(step_s)}"
        if core
        else f" of a step of {_s(step_s)}"
    )
    rest = {k: mean(f"time/{k}_s") / step_s for k in ("pack", "optimiser")}
    split += "".join(f", {'packing' if k == 'pack' else k} {_share(v)}" for k, v in rest.items() if v >= 0.1)
    tokens = mean("learner/tokens")
    waste = 1 - tokens / mean("learner/computed_tokens") if mean("learner/computed_tokens") > tokens > 0 else 0.0
    change = "more learner processes (train.num_workers) or threads (learner.threads), a larger learner.max_tokens_per_microbatch, or fewer tokens (buffer.group_size, sampling.max_context)"
    if waste >= 0.15:
        split += f"; {_share(waste)} of what it computes is padding"
        change = f"learner.layout=packed; {change}"
    return Finding(
        LIMIT,
        train,
        f"the learner limits: it waited {_share(wait)} of the time and trained {_share(train)}{split}",
        change,
    )


# ------------------------------------------------------------------------------------------------------ problems


def _stalled(
    train: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], spans: Sequence[Span], mean: Means,
    now: float | None, finished: bool, config: Mapping[str, Any],
) -> list[Finding]:  # fmt: skip
    """No optimiser step for long, though one is due: who did something last, and who did not."""
    at = number(dict(train[-1]), "time") if train else None
    steps = setting(config, "train", "steps")
    if finished or now is None or at is None or (isinstance(steps, int) and train[-1]["step"] >= steps):
        return []
    since, usual = now - at, mean("time/step_s") or 1.0
    phase, began = phase_of(events)
    in_phase = phase and began > at  # it comes up again, or plays its last evaluation: no step, and it may take long
    if since < (long := max(MIN_STALL_S, STALL * usual)) or (in_phase and now - began < PHASE_S):
        return []
    what = f"no optimiser step for {_s(since)} (one takes {_s(usual)})"
    if in_phase:
        what += f"; “{phase}” began {_s(now - began)} ago"
    last: dict[str, Span] = {}
    for span in spans:
        if span.ended > max(at - long, last[span.actor].ended if span.actor in last else 0.0):
            last[span.actor] = span
    alive = {a: s for a, s in last.items() if now - s.ended < long}
    heard = max([at, *(s.ended for s in last.values()), *(number(dict(e), "time") or 0.0 for e in events)])
    row = train[-1]
    books = ", ".join(
        f"{number(dict(row), f'ledger/{k}') or 0:.0f} {k}" for k in ("running", "ready") if f"ledger/{k}" in row
    )
    change = (
        f"at that step the ledger held {books} episodes; see logs/ in the run's folder"
        if books
        else "see logs/ in the run's folder"
    )
    if now - heard >= long:
        what += f"; nobody wrote anything for {_s(now - heard)}: the driver was stopped or killed"
        change = "start it again with resume=auto; it goes on from the last checkpoint"
    elif last:
        silent = sorted(set(last) - set(alive), key=actor_order)
        stuck = "learner" if "learner" in silent and any(a.startswith("rollout") for a in alive) else ""
        waited = stuck or ", ".join(silent[:4])
        what += "; " + (f"{waited} did nothing since" if waited else "every actor is at work") + _phases(last, waited)
    if events:
        what += f"; the last event: {_line(events[-1])}"
    return [Finding(BROKEN, 3, what, change)]


def phase_of(events: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The part of the run that began last, and when (unix seconds)."""
    for event in reversed(events):
        message, at = str(event.get("message", "")), number(event, "time")
        if at is not None and PHASE.match(message):
            return message.removesuffix(" ..."), at
    return "", 0.0


def setting(config: Mapping[str, Any], section: str, key: str) -> Any:
    """A value of a resolved config, None where it is not there."""
    found = config.get(section)
    return found.get(key) if isinstance(found, Mapping) else None


def _phases(last: Mapping[str, Span], waited: str) -> str:
    found = [f"{a}: {last[a].phase}" for a in waited.split(", ") if a in last]
    return f" (last seen {', '.join(found)})" if found else ""


def _ledger(train: Sequence[Mapping[str, Any]]) -> list[Finding]:
    row = dict(next((r for r in reversed(train) if number(dict(r), "ledger/admitted") is not None), {}))
    names = ("running", "ready", "in_batch", "trained", "dropped")
    admitted = number(row, "ledger/admitted")
    parts = {n: number(row, f"ledger/{n}") or 0.0 for n in names}
    made = []
    if admitted is not None and abs(admitted - sum(parts.values())) >= 0.5:
        made.append(Finding(
            BROKEN, 2, f"the ledger does not balance: {admitted:.0f} admitted, {sum(parts.values()):.0f} accounted for",
            "its figures cannot be trusted: keep the run's folder and report it",
        ))  # fmt: skip
    reasons = {k.removeprefix("dropped/"): v for k in row if k.startswith("dropped/") and (v := number(row, k))}
    if admitted and parts["dropped"] / admitted >= 0.1:
        by = ", ".join(
            f"{_share(v / admitted)} {k}"
            for k, v in sorted(reasons.items(), key=lambda i: -i[1])[:3]
            if v / admitted >= 0.005
        )
        made.append(Finding(
            WARNING, parts["dropped"] / admitted, f"{_share(parts['dropped'] / admitted)} of the admitted episodes were dropped ({by})",
            "stale: a lower rollout.groups_in_flight or a higher buffer.max_staleness; others: see the events",
        ))  # fmt: skip
    return made


def _disk(free_bytes: float | None) -> list[Finding]:
    if free_bytes is None or free_bytes >= MIN_FREE_BYTES:
        return []
    return [Finding(
        BROKEN, 1, f"the disk is nearly full: {free_bytes / 2**30:.2f} GiB free where the run lies",
        "free some space, lower train.keep_checkpoints, or go on elsewhere with another storage_path",
    )]  # fmt: skip


def _learning(mean: Means, advantage: str | None) -> list[Finding]:
    """What costs learning, not time."""
    made = []
    kl = mean("mismatch/kl_k3")
    if kl >= 0.01:
        cut = f"; {_share(mean('mismatch/cut'))} of the tokens were cut for it" if mean("mismatch/cut") else ""
        made.append(Finding(
            WARNING, min(1.0, 10 * kl), f"sampler and learner disagree: KL (k3) {kl:.2g}, ratio up to {mean('ratio/max'):.3g}{cut}",
            "the same engine.dtype and learner.dtype, engine.kv_after_update=recompute, a smaller buffer.max_staleness or learner.lr",
        ))  # fmt: skip
    groups, same = mean("groups/count"), mean("groups/zero_spread")
    if groups and same / groups >= 0.5 and advantage != "raft":  # which learns from groups that are all right
        success = mean("success")
        why = "too easy" if success >= 0.7 else "too hard" if success <= 0.3 else "of one outcome each"
        made.append(Finding(
            WARNING, same / groups, f"{_share(same / groups)} of the groups teach nothing: all their attempts got the same reward (success {success:.2f}, so the tasks are {why})",
            "other tasks or a curriculum, more attempts (buffer.group_size, sampling.steps.k), a reward with parts",
        ))  # fmt: skip
    masked = mean("masked/share")
    if masked >= 0.05:
        causes = {
            k.removeprefix("masked/"): mean(k)
            for k in mean.keys("masked/")
            if k not in ("masked/share", "masked/stale")
        }
        by = ", ".join(f"{k} {v:.1f}" for k, v in sorted(causes.items(), key=lambda i: -i[1])[:3] if v)
        made.append(Finding(
            WARNING, masked, f"{_share(masked)} of the attempts are left out of the loss (of a batch: {by or 'no cause logged'})",
            "a judge or retrieval that does not answer: its endpoint, judge.timeout_s, judge.concurrency, service.timeout_s",
        ))  # fmt: skip
    unjudgeable = mean("unjudgeable/share")
    if unjudgeable >= 0.05:
        causes = {
            k.removeprefix("unjudgeable/"): mean(k) for k in mean.keys("unjudgeable/") if k != "unjudgeable/share"
        }
        by = ", ".join(f"{k} {v:.1f}" for k, v in sorted(causes.items(), key=lambda i: -i[1])[:3] if v)
        made.append(Finding(
            WARNING, unjudgeable, f"{_share(unjudgeable)} of the attempts score 0 because no judge could judge them (of a batch: {by})",
            "read some of these texts: empty or hostile ones are the policy's doing; else judge.timeout_s, judge.max_tokens, another judge.model",
        ))  # fmt: skip
    bad = mean("skipped/nonfinite")
    if bad > 0:
        made.append(Finding(
            WARNING, 1.0, f"{bad * len(mean.rows):.0f} of the last {len(mean.rows)} optimiser steps were skipped: loss or gradient was not finite",
            "a smaller learner.lr or learner.grad_clip; learner.dtype=float32 shows whether precision is the cause",
        ))  # fmt: skip
    return made


def _restarts(train: Sequence[dict[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Finding]:
    made = []
    found: list[tuple[str, Mapping[str, Any]]] = []
    last: dict[str, float] = {}
    for event in events:
        if (m := RESTARTED.match(str(event.get("message", "")))) is None:
            continue
        at, who = number(dict(event), "time") or 0.0, str(event["message"]).split(" ")[0]
        if who == "learner" or at - last.get(who, -ONE_DEATH_S) >= ONE_DEATH_S:
            found.append((m["actor"] or m["other"], event))
        last[who] = at
    if len(found) >= 3:
        kinds = Counter(kind for kind, _ in found)
        by = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(3))
        made.append(Finding(
            WARNING, min(1.0, len(found) / 20), f"{len(found)} restarts ({by}); the last: {_line(found[-1][1])}",
            "see logs/ in the run's folder; memory is the usual cause (engine.kv_cache_gb, learner.max_tokens_per_microbatch)",
        ))  # fmt: skip
    back = rewinds(train)
    if back:
        lost = sum(r.reached - r.kept for r in back)
        made.append(Finding(
            WARNING, min(1.0, lost / max(1, train[-1]["step"])),
            f"the learner went back {len(back)} time{'s' if len(back) > 1 else ''}; {lost} steps were trained again",
            "a lower train.checkpoint_every loses less each time",
        ))  # fmt: skip
    return made


def _idle(spans: Sequence[Span], mean: Means) -> float:
    """Share of the learner's recent time in which a rollout worker had no lease at all, mean over workers; 0 if unknown."""
    times = [at for r in mean.rows if (at := number(dict(r), "time")) is not None]
    if len(times) < 2:
        return 0.0
    by: dict[str, list[Span]] = {}
    for s in clipped(spans, min(times), max(times)):
        if s.actor == "learner" or (s.actor.startswith("rollout") and s.phase != "wait"):
            by.setdefault(s.actor, []).append(s)
    learner, shares = by.pop("learner", []), []
    for these in by.values():  # one that died or came later counts only while it lived
        lived = clipped(learner, min(s.began for s in these), max(s.ended for s in these)) if len(by) > 1 else learner
        if (whole := covered_s(lived)) > 0:
            shares.append((covered_s([*lived, *these]) - covered_s(these)) / whole)
    return sum(shares) / len(shares) if shares else 0.0


def _line(event: Mapping[str, Any]) -> str:
    return f"“{' '.join(str(event.get('message', '')).split())[:120]}” (step {event.get('step', '?')})"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _s(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
