"""From the verdicts of a group to advantages, and from a group to the learner's samples.

Invariants:
- A masked member (its verdict is unavailable, or infrastructure ended it) gets no sample and leaves the baseline of
  its group: means, spreads and maxima are taken over the remaining members.
- Rewards that are all equal give advantages of exactly 0, and so does a group of one. `raft`, which has no baseline, is the exception.
- `gae` (PPO) leaves advantages to the learner and its critic: they are 0 here, and aux `rewards` holds a reward per token.
  The other members of a group do not matter to it: a group may be of one.
- The loss mask is the policy's own tokens of the turns from `Member.first_turn` on; observations are never in it.
- Of a group with step groups (`Group.steps`, SLATE) the steps are trained, each over its own candidates; the members, whole episodes,
  only lend their outcome (`outcome_weight`) to the candidates that were kept.

Sources: GRPO, Dr.GRPO and RLOO as commonly stated; C-GRPO: CaRR paper, section 4 (reward) with the variants that its
released code runs; RAFT: Dong et al. 2023 (2304.06767), with all right samples kept in place of the best of each group. numpy only. Axis suffix: G members of one group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agents.types import Group, Member, RecordError, Role, Sample, Status, StopReason, Turn, Verdict

VOID_STOPS = (StopReason.malformed, StopReason.context_full, StopReason.turn_limit)
"""Ill-formed or over-long endings: C-GRPO's reward is 0."""


RUBRIC_PARTS = ("rubric", "identified", "supported", "connected", "num_rubrics", "cited_pages")
"""Verdict parts that say something only where rubrics were judged (part `rubric_judged`)."""


@dataclass
class AdvantageConfig:
    """How rewards of a group become advantages."""

    name: str = "grpo"
    """One of ADVANTAGES: grpo, dr_grpo, rloo, c_grpo, raft (rejection sampling: a control, not a competitor), gae (PPO:
    the learner's critic makes them; see `learner.critic`)."""
    eps: float = 1e-6
    """Added to the standard deviation (grpo, c_grpo)."""
    alpha: float = 0.3
    """c_grpo: share of the rubric in the reward."""
    normalise: str = "group"
    """c_grpo: rubric reward divided by the best of the `group` (paper), of the `correct` ones, or `raw` (released code)."""
    correct_only: bool = True
    """c_grpo: the rubric counts for correct rollouts only (paper); false is the all-rollouts ablation."""
    outcome_weight: float = 0.0
    """Step groups: what is added to a kept candidate's advantage per unit of its episode's own, over the rewards of the task's episodes."""
    step_rewards: bool = False
    """gae: each policy turn earns its own of `Verdict.step_rewards`, at its last token, and the member's reward is not read; false: the
    reward, at the end."""
    drop_zero_spread: bool = False
    """Make no samples of a group whose rewards are all equal (DAPO's filter). They carry no gradient in any case; not for raft and gae."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        if self.name not in ADVANTAGES:
            raise ValueError(f"advantage.name {self.name!r} is unknown; one of {', '.join(sorted(ADVANTAGES))}")
        if self.normalise not in ("group", "correct", "raw"):
            raise ValueError(f"advantage.normalise {self.normalise!r} is unknown; one of group, correct, raw")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"advantage.alpha {self.alpha} is outside [0, 1]")
        if self.drop_zero_spread and self.name == "raft":
            raise ValueError(
                "advantage.drop_zero_spread would drop what raft learns most from, all right: set it to false"
            )
        if self.drop_zero_spread and self.name == "gae":
            raise ValueError("advantage.drop_zero_spread is about groups, which gae does not compare: set it to false")
        if self.step_rewards and self.name != "gae":
            raise ValueError(
                f"advantage.step_rewards is for gae, not for {self.name}: set it to false, or advantage.name=gae"
            )
        for name in ("eps", "outcome_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"advantage.{name} {getattr(self, name)} is negative or not finite")


@dataclass(frozen=True)
class GroupStats:
    """What happened to one group on its way to the learner. `summarise` adds many of them up."""

    rewards_G: tuple[float, ...]
    """Rewards the advantages were computed over; masked members are absent."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Named verdict parts of the same members; RUBRIC_PARTS only of those whose rubrics were judged."""
    masked: Mapping[str, int] = field(default_factory=dict)
    """Members without a sample, by cause (see `masked_causes`)."""
    num_groups: int = 1
    """Groups that advantages were computed over: this one, or its step groups."""
    zero_spread: int = 0
    """Those of them whose rewards are all equal."""
    num_samples: int = 0
    num_tokens: int = 0
    """Tokens in the loss."""
    unjudgeable: Mapping[str, int] = field(default_factory=dict)
    """Members that score 0 because a judge failed on them, by cause."""


# -------------------------------------------------------------------------------------------------- advantages


def grpo(rewards_G: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """(r - mean) / (std + eps), std with n - 1. float64 [G]; exactly 0 when all rewards are equal."""
    centred = dr_grpo(rewards_G, config)
    if not centred.any():
        return centred
    return centred / (np.std(rewards_G, ddof=1) + config.eps)


def dr_grpo(rewards_G: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """r - mean, not divided by the spread. float64 [G].

    Dr.GRPO also sums token losses and divides by a constant instead of by lengths: pair this with the learner's
    `aggregation=constant`.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    if _equal(rewards_G):
        return np.zeros_like(rewards_G)  # the mean of equal numbers may miss them by a rounding error
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """r minus the mean of the others: G / (G - 1) * (r - mean). float64 [G]."""
    centred = dr_grpo(rewards_G, config)
    return centred * (len(centred) / (len(centred) - 1)) if len(centred) > 1 else centred


def raft(rewards_G: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """r itself, no baseline: over the rewards of GROUP_REWARDS 1 for an accepted rollout, 0 for a rejected one. float64 [G].

    With one optimiser step per batch and `loss.mismatch=none` the gradient is that of the log-likelihood of the accepted samples.
    """
    return np.asarray(rewards_G, dtype=np.float64)


def gae(rewards_G: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """0 for all: the learner computes them (`agents.learning.gae`). float64 [G]."""
    return np.zeros(len(rewards_G))


ADVANTAGES: dict[str, Callable[[np.ndarray, AdvantageConfig], np.ndarray]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "c_grpo": grpo,
    "raft": raft,
    "gae": gae,
}
"""By name: rewards [G] -> advantages [G]. `c_grpo` is grpo over the C-GRPO reward (see GROUP_REWARDS)."""


# ------------------------------------------------------------------------------------------------------ rewards


def cgrpo_rewards(
    outcome_G: Sequence[float] | np.ndarray,
    rubric_G: Sequence[float] | np.ndarray,
    alpha: float = 0.3,
    normalise: str = "group",
    correct_only: bool = True,
    void_G: Sequence[bool] | np.ndarray | None = None,
) -> np.ndarray:
    """C-GRPO's reward (1 - a) R_o + a R_o Rhat_r with Rhat_r = R_r / max_j R_r(j), 0 when the maximum is 0.

    `normalise`: the maximum is over the `group` (paper), over `correct` rollouts only, or there is none (`raw`, what the
    released code computes). `correct_only=False` is the ablation in which every rollout earns its rubric: a Rhat_r.
    `void_G` marks ill-formed or over-long rollouts: reward 0, and no part in the maximum. float64 [G].
    """
    outcome = np.asarray(outcome_G, dtype=np.float64)
    rubric = np.asarray(rubric_G, dtype=np.float64)
    live = np.ones(len(outcome), dtype=bool) if void_G is None else ~np.asarray(void_G, dtype=bool)
    if normalise == "raw":
        scale = 1.0
    elif normalise in ("group", "correct"):
        counted = rubric[live & (outcome > 0)] if normalise == "correct" else rubric[live]
        scale = float(counted.max(initial=0.0))
    else:
        raise ValueError(f"advantage.normalise {normalise!r} is unknown; one of group, correct, raw")
    # A wrong rollout may beat the best correct one: its share stays at most 1.
    share = np.minimum(rubric / scale, 1.0) if scale > 0 else np.zeros_like(rubric)
    rewards = (1 - alpha) * outcome + alpha * (outcome * share if correct_only else share)
    return np.where(live, rewards, 0.0)


def _verdict_rewards(members: Sequence[Member], config: AdvantageConfig) -> np.ndarray:
    return np.array([m.trajectory.verdict.reward for m in members if m.trajectory.verdict], dtype=np.float64)


def _parts(members: Sequence[Member], name: str, needed: tuple[str, ...], mend: str) -> list[Mapping[str, float]]:
    parts = [m.trajectory.verdict.parts for m in members if m.trajectory.verdict]
    for member, found in zip(members, parts, strict=True):
        missing = set(needed) - set(found)
        if missing:
            raise RecordError(
                f"{name} needs the verdict parts {' and '.join(needed)}; {member.trajectory.identity.uid} lacks"
                f" {', '.join(sorted(missing))}: {mend}, or another advantage"
            )
    return parts


def _raft_rewards(members: Sequence[Member], config: AdvantageConfig) -> np.ndarray:
    parts = _parts(members, "raft", ("outcome",), "use a reward that judges the outcome")
    return np.array([float(p["outcome"] == 1.0) for p in parts], dtype=np.float64)


def _cgrpo_rewards(members: Sequence[Member], config: AdvantageConfig) -> np.ndarray:
    parts = _parts(members, "c_grpo", ("outcome", "rubric"), "use the reward 'carr'")
    return cgrpo_rewards(
        [p["outcome"] for p in parts],
        [p["rubric"] for p in parts],
        config.alpha,
        config.normalise,
        config.correct_only,
        [m.trajectory.stop in VOID_STOPS for m in members],
    )


GROUP_REWARDS: dict[str, Callable[[Sequence[Member], AdvantageConfig], np.ndarray]] = {
    "c_grpo": _cgrpo_rewards,
    "raft": _raft_rewards,
}
"""By advantage name: rewards recombined from verdict parts over the group. Not named here: `Verdict.reward` itself."""


# ------------------------------------------------------------------------------------------------------- groups


def masked_cause(member: Member) -> str:
    """Why a member must leave loss and baseline; empty when it stays. Raises RecordError for an unscored member."""
    trajectory = member.trajectory
    if trajectory.stop.infrastructure:
        return str(trajectory.stop)
    if trajectory.verdict is None:
        raise RecordError(f"{trajectory.identity.uid} has not been scored; score the group before computing advantages")
    if trajectory.verdict.masked:
        part = next(p for p, s in trajectory.verdict.status.items() if s is Status.unavailable)
        return trajectory.verdict.causes.get(part) or f"{part}_unavailable"
    return ""


def _unjudgeable_causes(verdict: Verdict) -> list[str]:
    """Why a judge failed on the text, per part on which it did."""
    failed = [part for part, status in verdict.status.items() if status is Status.unjudgeable]
    return [verdict.causes.get(part) or f"{part}_unjudgeable" for part in failed]


def trained_members(group: Group) -> list[Member]:
    """Those that samples are made of: the candidates of its step groups where there are any, else its own."""
    return [m for part in group.steps or (group,) for m in part.members]


def masked_causes(group: Group) -> list[str]:
    """Per trained member the cause that masks it, or an empty string.

    Of a group with step groups, an episode that was masked for another cause than its candidates (its backend failed) counts
    besides, as the candidates of the one step that it did not get to.
    """
    found = [masked_cause(m) for m in trained_members(group)]
    if group.steps:
        of = [(m.trajectory.identity.uid.attempt, c) for m, c in zip(trained_members(group), found, strict=True)]
        for member in group.members:
            cause = masked_cause(member)
            if cause and (member.trajectory.identity.uid.attempt, cause) not in of:
                found += [cause] * len(group.steps[0].members)
    return found


def lost_cause(group: Group) -> str:
    """The most frequent cause, of a group of which nothing can be trained; empty when something can."""
    causes = [masked_cause(m) for m in trained_members(group)]
    return Counter(causes).most_common(1)[0][0] if all(causes) else ""


def group_rewards(group: Group, config: AdvantageConfig) -> list[float | None]:
    """The reward each member's advantage is computed from; None for masked members."""
    kept = [i for i, m in enumerate(group.members) if not masked_cause(m)]
    compute = GROUP_REWARDS.get(config.name, _verdict_rewards)
    rewards: list[float | None] = [None] * len(group.members)
    for i, reward in zip(kept, compute([group.members[i] for i in kept], config), strict=True):
        rewards[i] = float(reward)
    return rewards


def group_advantages(group: Group, config: AdvantageConfig) -> list[float | None]:
    """One advantage per member, in order; None for masked members. Raises ValueError for an unknown advantage."""
    return _advantages(group_rewards(group, config), config)


def _advantages(rewards: Sequence[float | None], config: AdvantageConfig) -> list[float | None]:
    config.check()
    kept = [i for i, r in enumerate(rewards) if r is not None]
    advantages: list[float | None] = [None] * len(rewards)
    if kept:
        values = ADVANTAGES[config.name](np.array([rewards[i] for i in kept], dtype=np.float64), config)
        for i, value in zip(kept, values, strict=True):
            advantages[i] = float(value)
    return advantages


def to_samples(group: Group, config: AdvantageConfig) -> tuple[list[Sample], GroupStats]:
    """A scored group as the learner's samples, one per member that stays, and what happened on the way.

    Members of a group share their tokens up to the first trainable turn when those are equal (`prefix_len`), and the steps of
    an episode the shorter of their prefixes (`prefix_id`): a learner may compute them once.
    """
    if group.steps:
        return _step_samples(group, config)
    rewards = group_rewards(group, config)
    return _samples(group, config, rewards, _advantages(rewards, config))


def _step_samples(group: Group, config: AdvantageConfig) -> tuple[list[Sample], GroupStats]:
    """Samples of all step groups; statistics over their candidates, with the parts of whole episodes that steps do not have."""
    gained: dict[tuple[int, int], float] = {}  # (attempt, turn of the kept path) -> what its episode adds
    if config.outcome_weight:
        whole = group_advantages(replace(group, steps=()), config)
        for member, advantage in zip(group.members, whole, strict=True):
            attempt = member.trajectory.identity.uid.attempt
            gained |= {(attempt, t.id): config.outcome_weight * (advantage or 0.0) for t in member.trajectory.turns}
    made = []
    for step in group.steps:
        rewards = group_rewards(step, config)
        advantages = [
            a if a is None else a + gained.get((m.trajectory.identity.uid.attempt, m.trajectory.turns[m.first_turn].id), 0.0)
            for a, m in zip(_advantages(rewards, config), step.members, strict=True)
        ]  # fmt: skip
        made.append(_samples(step, config, rewards, advantages))
    stats = [found for _, found in made]
    parts: dict[str, tuple[float, ...]] = {}
    for verdict in (m.trajectory.verdict for m in group.members if not masked_cause(m)):
        for name, value in verdict.parts.items() if verdict else ():
            parts[name] = (*parts.get(name, ()), value)
    for name in {name for found in stats for name in found.parts}:
        parts[name] = tuple(value for found in stats for value in found.parts.get(name, ()))
    masked = Counter(filter(None, masked_causes(group)))
    for found in stats:
        masked["no_policy_tokens"] += found.masked.get("no_policy_tokens", 0)
    return [sample for samples, _ in made for sample in samples], GroupStats(
        tuple(reward for found in stats for reward in found.rewards_G),
        parts,
        dict(+masked),
        len(stats),
        sum(found.zero_spread for found in stats),
        sum(found.num_samples for found in stats),
        sum(found.num_tokens for found in stats),
        dict(sum((Counter(found.unjudgeable) for found in stats), Counter[str]())),
    )


def _samples(
    group: Group, config: AdvantageConfig, rewards: Sequence[float | None], advantages: Sequence[float | None]
) -> tuple[list[Sample], GroupStats]:
    kept = np.array([r for r in rewards if r is not None], dtype=np.float64)
    zero_spread = _equal(kept) and config.name != "gae"
    masked: Counter[str] = Counter()
    unjudgeable: Counter[str] = Counter()
    parts: dict[str, list[float]] = {}
    samples: list[Sample] = []
    prefixes = [_given_prefix(m) for m in group.members]
    shared = all(np.array_equal(p, prefixes[0]) for p in prefixes)
    for index, (member, reward, advantage) in enumerate(zip(group.members, rewards, advantages, strict=True)):
        if reward is None or advantage is None:
            masked[masked_cause(member)] += 1
            continue
        if member.trajectory.verdict:
            found = member.trajectory.verdict.parts
            unjudgeable.update(_unjudgeable_causes(member.trajectory.verdict)[:1])
            unjudged = RUBRIC_PARTS if found.get("rubric_judged") == 0 else ()
            for name, value in found.items():
                if name in unjudged:
                    continue  # a 0 here says that nobody looked
                parts.setdefault(name, []).append(value)
        if zero_spread and config.drop_zero_spread and not advantage:
            continue
        sample = _sample(group.id, index, member, reward, advantage, len(prefixes[index]) if shared else 0)
        if config.name == "gae":
            sample = replace(sample, aux={"rewards": token_rewards(member, sample.mask, reward, config)})
        if sample.mask.any():
            samples.append(sample)
        else:
            masked["no_policy_tokens"] += 1
    stats = GroupStats(
        tuple(kept.tolist()),
        {name: tuple(values) for name, values in parts.items()},
        dict(masked),
        1,
        int(zero_spread),
        len(samples),
        sum(int(s.mask.sum()) for s in samples),
        dict(unjudgeable),
    )
    return samples, stats


def batch_samples(groups: Sequence[Group], config: AdvantageConfig) -> tuple[list[Sample], dict[str, float]]:
    """`to_samples` over a batch of groups: all samples, and the summary of `summarise`."""
    made = [to_samples(group, config) for group in groups]
    return [s for samples, _ in made for s in samples], summarise([stats for _, stats in made])


def summarise(stats: Sequence[GroupStats]) -> dict[str, float]:
    """Flat metrics of a batch: reward/mean, reward/std, reward/<part>, masked/<cause>, masked/share, unjudgeable/..., groups/..."""
    rewards = [r for s in stats for r in s.rewards_G]
    out: dict[str, float] = {
        "groups/count": sum(s.num_groups for s in stats),
        "groups/zero_spread": sum(s.zero_spread for s in stats),
        "groups/samples": sum(s.num_samples for s in stats),
        "groups/trained_tokens": sum(s.num_tokens for s in stats),
    }
    if rewards:
        out["reward/mean"] = float(np.mean(rewards))
        out["reward/std"] = float(np.std(rewards))
    for name in sorted({name for s in stats for name in s.parts}):
        out[f"reward/{name}"] = float(np.mean([v for s in stats for v in s.parts.get(name, ())]))
    masked: Counter[str] = Counter()
    for s in stats:
        masked.update(s.masked)
    out.update({f"masked/{cause}": float(count) for cause, count in sorted(masked.items())})
    members = len(rewards) + sum(n for cause, n in masked.items() if cause != "no_policy_tokens")
    out["masked/share"] = sum(masked.values()) / members if members else 0.0
    unjudgeable: Counter[str] = Counter()
    for s in stats:
        unjudgeable.update(s.unjudgeable)
    out.update({f"unjudgeable/{cause}": float(count) for cause, count in sorted(unjudgeable.items())})
    out["unjudgeable/share"] = unjudgeable.total() / members if members else 0.0
    return out


def _sample(group_id: str, index: int, member: Member, reward: float, advantage: float, prefix_len: int) -> Sample:
    trajectory = member.trajectory
    token_ids, sampled = trajectory.token_ids, trajectory.mask
    mask = sampled.copy()
    mask[: _num_tokens(trajectory.turns[: member.first_turn])] = 0
    in_loss = mask == 1
    uid = trajectory.identity.uid
    rollout_id = f"{uid.task}/{uid.group}/{uid.attempt}"
    prefix_id = group_id
    if member.first_turn:  # candidates of one step share their attempt, and with later steps the kept path
        rollout_id, prefix_id = f"{rollout_id}/{group_id}#{index}", rollout_id
    return Sample(
        token_ids=token_ids,
        mask=mask,
        logprobs=trajectory.logprobs,
        advantages=np.where(in_loss, advantage, 0.0),
        versions=trajectory.versions_T,
        temperatures=np.where(sampled == 1, trajectory.identity.sampling.temperature, 1.0),
        group_id=group_id,
        rollout_id=rollout_id,
        reward=reward,
        prefix_id=prefix_id if prefix_len else "",
        prefix_len=prefix_len,
    )


def token_rewards(member: Member, mask_T: np.ndarray, reward: float, config: AdvantageConfig) -> np.ndarray:
    """The reward of each token, float32 [T], on trained tokens only; zeros when nothing is trained.

    Under `step_rewards` a verdict without any (a rollout that was not judged) pays `reward` at the end. Raises RecordError for a
    candidate step, whose return nobody knows, and for step rewards that are missing or do not fit the turns.
    """
    trajectory, verdict = member.trajectory, member.trajectory.verdict
    uid = trajectory.identity.uid
    if member.first_turn:
        raise RecordError(f"advantage gae needs whole trajectories, {uid} is a candidate step: use another advantage")
    rewards_T, trained = np.zeros(len(mask_T), dtype=np.float32), np.flatnonzero(mask_T)
    scores = verdict.step_rewards if config.step_rewards and verdict is not None else ()
    if not len(trained):
        return rewards_T
    if config.step_rewards and verdict is not None:
        turns = zip(trajectory.turns, np.cumsum([len(t.token_ids) for t in trajectory.turns]), strict=True)
        ends = [end for turn, end in turns if turn.role is Role.policy]
        judged = trajectory.stop.finished and all(s is Status.ok for s in verdict.status.values())
        if len(scores) != len(ends) and (scores or judged):
            raise RecordError(
                f"advantage.step_rewards needs one reward per policy turn; {uid} has {len(scores)} for {len(ends)} turns: use a"
                " reward that judges steps, such as stepsearch, or set advantage.step_rewards=false"
            )
        for end, score in zip(ends, scores, strict=False):
            rewards_T[trained[max(0, np.searchsorted(trained, end) - 1)]] += score
    if not scores:
        rewards_T[trained[-1]] = reward
    return rewards_T


def _given_prefix(member: Member) -> np.ndarray:
    """Tokens before the first one that this member may train."""
    turns = member.trajectory.turns
    end = member.first_turn
    while end < len(turns) and not turns[end].mask.any():
        end += 1
    return np.concatenate([t.token_ids for t in turns[:end]]) if end else np.zeros(0, dtype=np.int32)


def _num_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(t.token_ids) for t in turns)


def _equal(rewards_G: np.ndarray) -> bool:
    """True when there is nothing to tell members apart: equal to the last bit, one member, or none."""
    return len(rewards_G) < 2 or bool(rewards_G.max() == rewards_G.min())
