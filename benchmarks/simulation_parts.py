"""What a simulated run is made of: episodes, an engine's and a system's speeds, and what came of the run. Times in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One policy turn: tokens new in its prompt, tokens sampled, then seconds of a tool (0: none)."""

    prompt_tokens: float
    sampled_tokens: float
    tool_s: float = 0.0


Episode = Sequence[Turn]
Workload = Callable[[int, np.random.Generator], Sequence[Episode]]
"""The episodes of lease number i."""


@dataclass(frozen=True)
class EngineModel:
    """How fast one engine is."""

    step_s: float
    """A decode step, whatever is in it: reading the weights, launching kernels."""
    per_sequence_s: float = 0.0
    """More per sequence in the step."""
    per_context_s: float = 0.0
    """More per token of context of all sequences in the step: reading their keys and values."""
    prefill_s: float = 0.0
    """Per prompt token that is not cached."""
    turn_s: float = 0.0
    """Per request: scheduling, whatever its length."""
    max_sequences: int = 256
    kv_tokens: float = math.inf
    """Tokens whose keys and values fit."""

    def step(self, sequences: int, context: float) -> float:
        """Seconds of one step."""
        return self.step_s + self.per_sequence_s * sequences + self.per_context_s * context


@dataclass(frozen=True)
class System:
    """A run's parts and their speeds. Times in seconds; a service time of 0 never queues."""

    engine: EngineModel
    group_size: int = 8
    groups_per_batch: int = 8
    max_staleness: int = 1
    engines: int = 1
    workers: int = 1
    groups_in_flight: int = 12
    """Leases one rollout worker works on at a time."""
    learner_s: float = 0.0
    """A learner step, whatever its size."""
    learner_per_token_s: float = 0.0
    learner_of: Callable[[Sequence[float]], float] | None = None
    """Seconds of a step from the tokens of its episodes, instead of these two."""
    publish_s: float = 0.0
    pause_s: float = 0.0
    recompute: bool = True
    """What older weights cached is computed again after a publish."""
    judge_s: float = 0.0
    """Per episode; a group's are judged side by side, as far as there are `judges`."""
    judges: int = 0
    """Judgements at a time; 0: no limit."""
    tools: int = 0
    """Tool calls served at a time; 0: no limit."""
    tool_service_s: float = 0.0
    """Time a server of tools is held by a call; the rest of a call's time is latency."""
    turn_s: float = 0.0
    """Rollout worker, per policy turn, and more per sampled token of it."""
    turn_per_token_s: float = 0.0
    route_s: float = 0.0
    """Fleet actor, per episode: its route and its release."""
    lease_s: float = 0.0
    """Buffer actor, per lease."""
    put_s: float = 0.0
    """Buffer actor, per delivered group."""
    ship_s: float = 0.0
    """Buffer actor, per episode of a batch that ships."""
    cores: float = 0.0
    """Of the one machine that learner and engines share; 0: each has its own."""
    engine_cores: float = 1.0
    """What a working engine asks of the shared machine, its actor and its share of the worker included; the learner asks for 1."""

    @property
    def batch_episodes(self) -> int:
        return self.group_size * self.groups_per_batch


@dataclass(frozen=True)
class Step:
    """One optimiser batch, as the run's log would have it."""

    settled_at: float
    wait_s: float
    """From asking for a batch to having it."""
    train_s: float
    tokens: float
    """Of the episodes trained, prompts and observations included."""
    sampled_tokens: float
    ages: tuple[int, ...]
    """Of the episodes trained, in optimiser batches."""
    withheld: int


@dataclass
class Outcome:
    """What came of a simulated run."""

    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    admitted: int = 0
    dropped: int = 0
    lease_s: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    """Share of the time in which the busiest server of a kind worked; engines and judges: the mean of all."""
    running_mean: float = 0.0
    """Episodes under way, on average over time."""
    sampled_tokens: float = 0.0
    """By the engines, those of dropped and unfinished episodes included."""
    batch_mean: float = 0.0
    """Sequences in a working engine, on average over time."""
    paced: float = 0.0
    """Share of the time in which workers had room and admission did not let them start."""

    def figures(self, skip: int = 2) -> dict[str, float]:
        """Of the steps after the first `skip`, comparable with a run's log: see `trimmed`."""
        kept = self.steps[skip:]
        began = self.steps[skip - 1].settled_at if skip else 0.0
        seconds = np.diff([began, *(s.settled_at for s in kept)])
        ages = [a for s in kept for a in s.ages]
        return {
            "step_s": trimmed(seconds), "tokens_per_s": sum(s.tokens for s in kept) / (kept[-1].settled_at - began),
            "staleness": float(np.mean(ages)) if ages else 0.0, "dropped": self.dropped / max(1, self.admitted),
            "train_s": trimmed([s.train_s for s in kept]), "wait_s": trimmed([s.wait_s for s in kept]),
            "lease_s": float(np.mean(self.lease_s)),
        }  # fmt: skip


def trimmed(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle 80 %: an evaluation or a checkpoint in a few steps does not move it."""
    ordered = np.sort(np.asarray(values, dtype=float))
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())
