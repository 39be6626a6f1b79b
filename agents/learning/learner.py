"""The learner: a batch of samples in, one (or a few) optimiser steps, metrics out.

Invariants:
- The loss is normalised by counts over the whole batch and all ranks, so micro-batching, packing and the number of ranks
  change nothing but rounding.
- A batch whose loss or gradient is not finite changes no weight; the metrics say so.
- Blind to the algorithm: it reads `Sample`s only. With a critic (`agents.learning.critic`) it makes advantages of their aux `rewards`
  itself, once, when the batch arrives; clipping is measured from the values and log-probs of that moment.
- Imports neither Ray nor vLLM; several ranks meet through torch.distributed when it is initialised, each with its own part of the
  batch (`agents.sharding.shard`). Ranks of one context (`agents.learning.context`) come with the same part, and share its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agents.learning import packing
from agents.learning.config import LearnerConfig, learning_rate
from agents.learning.context import make_context
from agents.learning.critic import HEAD, Critic
from agents.learning.gae import with_advantages
from agents.learning.loss import LOSSES, Tokens, can_learn
from agents.learning.model import PolicyModel, adapters_for_publish, named_weights_for_publish
from agents.learning.optimiser import Trained, unfit
from agents.learning.scorer import score_logprobs, score_values, with_aux
from agents.learning.shard import (
    gather_values,
    is_sharded,
    max_over_ranks,
    settle,
    sum_over_ranks,
    union_over_ranks,
    world_size,
)
from agents.learning.sharded import read_shards, shard_shapes, whats
from agents.learning.stopwatch import Stopwatch
from agents.types import Sample

PHASES = ("pack", "forward", "backward", "optimiser")
"""What `time/train_s` is made of."""


class Learner:
    """Holds the policy, its optimiser and the schedule.

    `model`: a PolicyModel (plain, or sharded by `shard.apply_fsdp` before it comes here) or a Hugging Face causal
    model, which is wrapped. `critic`: the value model of `critic.kind=model`, likewise sharded or not. `group`: the process group of
    the learner's ranks; the default group when None.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        *,
        critic: PolicyModel | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        config.check()
        if config.loss.name not in LOSSES:
            raise ValueError(f"loss.name {config.loss.name!r} is unknown; one of {', '.join(sorted(LOSSES))}")
        if config.threads > 0:
            torch.set_num_threads(config.threads)
        self.model = model if isinstance(model, PolicyModel) else PolicyModel(model, config)
        self.config = config
        self.group = group
        self.batches = 0
        """Batches taken, skipped ones included. The driver's version counts the same thing."""
        self.generator = torch.Generator().manual_seed(config.seed)
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.trained = Trained(
            {name: p for name, p in named if not name.startswith(HEAD)},
            config,
            sharded=is_sharded(self.model),
            group=group,
        )
        self.critic = Critic(self.model, critic, config, group) if config.critic.kind != "none" else None
        self._watch = Stopwatch(self.model.device)
        self.layout = self.model.layout(config.layout)
        self.context = make_context(config.context_parallel, self.model.hf.config)
        self._counts = self.context is None or self.context.rank == 0
        """Whether this rank's samples are its own: of ranks that share them, the first counts them."""

    def step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Trains on this rank's part of a batch. Returns flat metrics, the same on every rank.

        All ranks call it together, also with an empty part. Raises ValueError for samples that cannot be trained on (a
        greedy token in the loss; aux that the loss needs and a sample lacks). `time/train_s` is this rank's wall time of the
        step, and pack, forward, backward and optimiser (with everything after the last backward pass) are its parts.
        """
        self._watch = Stopwatch(self.model.device)
        for s in samples:
            if (s.temperatures[s.mask == 1] <= 0).any():
                raise ValueError(f"sample {s.rollout_id} was sampled at temperature 0: train on sampled rollouts only")
        rate = learning_rate(self.batches, self.config)
        self.trained.set_rate(rate)
        samples, arrived = self._arrive(samples)
        records: list[dict[str, Tensor]] = []
        losses, norms, skipped, computed = [], [], 0, []
        for part in self._minibatches(samples):
            loss, found, counts = self._optimise(part, records)
            losses.append(loss)
            norms.append(found)
            computed.append(counts)
            skipped += not _finite(loss, *found)
        metrics = {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(n[0] for n in norms) / len(norms),
            "lr": rate,
            "skipped/nonfinite": float(skipped),
            **arrived,
        }
        if self.critic is not None:
            metrics["value/grad_norm"] = sum(n[1] for n in norms) / len(norms)
            metrics["value/lr"] = self.critic.rate(self.batches)
        self.batches += 1
        metrics.update(self._token_metrics(records))
        positions, shared = (float(sum(counts)) for counts in zip(*computed, strict=True))
        tokens, rows, positions, shared = sum_over_ranks(
            [sum(s.num_tokens for s in samples) * self._counts, len(samples) * self._counts, positions, shared],
            self.model.device,
            self.group,
        )
        self._watch.lap("optimiser")
        laps = self._watch.seconds()
        seconds = sum(laps.values())
        metrics.update(
            {
                "learner/samples": rows,
                "learner/tokens": tokens,
                "learner/computed_tokens": positions,
                "learner/shared_tokens": shared,
                "learner/tokens_per_s": tokens / seconds,
                "time/train_s": seconds,
                **{f"time/{phase}_s": laps.get(phase, 0.0) for phase in PHASES},
            }
        )
        return metrics

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) as the sampler's engine expects them. Every rank must exhaust it when sharded."""
        return named_weights_for_publish(self.model, dtype)

    def adapters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of the adapters alone, as PEFT names them; likewise."""
        return adapters_for_publish(self.model, dtype)

    def score(self, samples: Sequence[Sample]) -> list[Any]:
        """log-probs of the trained tokens under the current weights: per sample float32 [T], 0 elsewhere."""
        return score_logprobs(
            self.model, samples, self._budget, layout=self.layout, group=self.group, context=self.context
        )

    # ------------------------------------------------------------------------------------------------ one step

    @property
    def _budget(self) -> int:
        return self.config.max_tokens_per_microbatch

    def _arrive(self, samples: Sequence[Sample]) -> tuple[Sequence[Sample], dict[str, float]]:
        """Samples with what is measured once, under the weights the batch arrived at: pi_old, values and advantages from them."""
        config, critic = self.config, self.critic
        if critic is None and any("rewards" in s.aux for s in samples):
            raise ValueError(
                "samples carry aux 'rewards', which only a critic turns into advantages: set learner.critic.kind"
            )
        kl_in_reward = config.loss.kl_in == "reward" and config.loss.kl_coef > 0
        metrics: dict[str, float] = {}
        if config.loss.old == "learner" and (config.minibatches > 1 or kl_in_reward):
            samples = [with_aux(s, prox_logprobs=found) for s, found in zip(samples, self.score(samples), strict=True)]
            self._watch.lap("forward")
        if critic is not None:
            critic.trained.set_rate(critic.rate(self.batches))
            values = score_values(
                critic.model, samples, self._budget, layout=self.layout, group=self.group, context=self.context
            )
            valued = [with_aux(s, values=found) for s, found in zip(samples, values, strict=True)]
            samples, metrics = with_advantages(valued, config, self.model.device, self.group, self._counts)
            self._watch.lap("forward")
        return samples, metrics

    def _minibatches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        count = self.config.minibatches
        if count == 1:
            return [list(samples)]
        order = torch.randperm(len(samples), generator=self.generator).tolist()
        return [[samples[i] for i in order[k::count]] for k in range(count)]

    def _optimise(
        self, samples: Sequence[Sample], records: list[dict[str, Tensor]]
    ) -> tuple[float, list[float], tuple[float, float]]:
        """One optimiser step. Returns loss, gradient norms of policy and critic (all global), positions computed and tokens
        shared (here)."""
        config, device = self.config, self.model.device
        counts = packing.count_totals(samples if self._counts else [])
        totals = dict(zip(counts, sum_over_ranks(counts.values(), device, self.group), strict=True))
        coefficients = packing.loss_coefficients(samples, config.aggregation, config.constant_length, totals)
        moving: list[int] = []
        still: list[int] = []
        for i, s in enumerate(samples):
            learns = can_learn(config.loss, bool(s.advantages.any())) or not config.skip_zero_advantage
            (moving if learns or self.critic is not None else still).append(i)
        for trained in self._all_trained:
            trained.zero_grad()
        positions, shared = 0.0, 0.0
        summed = torch.zeros(1, dtype=torch.float64, device=device)  # read at the end: that waits for the device
        # Forward-only passes come first: a backward pass afterwards lets FSDP give back what they gathered.
        for chosen, backward in ((still, False), (moving, True)):
            batches = packing.pack(
                samples, self._budget, layout=self.layout, attention_cost=self.model.attention_cost,
                coefficients=coefficients, include=chosen,
            )  # fmt: skip
            self._watch.lap("pack")
            if is_sharded(self.model):
                most = int(max_over_ranks([len(batches)], device, self.group)[0])
                batches += [packing.dummy()] * (most - len(batches))
            for batch in batches:
                batch = batch if self.context is None else self.context.part(batch)
                value, record = self._pass(batch.to(device), backward)
                summed += value
                if batch.samples:
                    positions += batch.token_ids.numel()
                    shared += batch.shared_tokens * self._counts
                    records.append(record)
            if not (backward and self._policy_learns) and batches:
                settle(self.model)
        loss = sum_over_ranks(summed, device, self.group)[0]
        norms = [trained.gradient_norm() for trained in self._all_trained]
        if _finite(loss, *norms):
            for trained, norm in zip(self._all_trained, norms, strict=True):
                if trained is not self.trained or self._policy_learns:
                    trained.step(norm)
        self._watch.lap("optimiser")
        return loss, norms, (positions, shared)

    def _pass(self, batch: packing.MicroBatch, backward: bool) -> tuple[Tensor, dict[str, Tensor]]:
        critic, learns = self.critic, backward and self._policy_learns
        with_values = critic is not None and critic.shared
        with nullcontext() if learns or with_values else torch.no_grad():
            logprobs, entropies, *values = self.model(
                batch, values=with_values, detach=not learns, context=self.context
            )
            tokens = Tokens(batch.rollout_logprobs, batch.advantages, batch.sample_index, batch.aux)
            loss_N, stats = LOSSES[self.config.loss.name](logprobs, entropies, tokens, self.config.loss)
            loss = (loss_N * batch.coefficients).sum()
            if not len(batch.target):
                loss = logprobs.sum()  # 0, with a path to every weight
        self._watch.lap("forward")
        total = loss if learns else torch.zeros((), device=loss.device)
        if critic is not None and not critic.shared:
            if learns:
                self._backward(total, self.model)
            values = critic.model(batch, logprobs=False, values=True, context=self.context)
            total = torch.zeros((), device=loss.device)
            self._watch.lap("forward")
        if critic is not None:
            value_loss, told = critic.loss(values[0], batch)
            total, stats = total + value_loss, stats | told
        if backward:
            self._backward(total, self.model if critic is None else critic.model)
        stats = {name: values.detach() for name, values in stats.items()}
        stats["staleness"] = torch.where(batch.versions >= 0, self.batches - batch.versions, 0).float()
        return loss.detach(), stats

    def _backward(self, loss: Tensor, model: PolicyModel) -> None:
        # FSDP averages gradients over ranks; the coefficients already count all of them.
        (loss * world_size(self.group) if is_sharded(model) else loss).backward()
        self._watch.lap("backward")

    @property
    def _policy_learns(self) -> bool:
        """False in the first batches of a run that train its critic alone."""
        return self.batches >= self.config.critic.pretrain_steps

    @property
    def _owners(self) -> dict[str, Trained]:
        return {"policy": self.trained, **({} if self.critic is None else {"critic": self.critic.trained})}

    @property
    def _all_trained(self) -> list[Trained]:
        return list(self._owners.values())

    def _token_metrics(self, records: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Means over all trained tokens of all ranks, and quantiles of the sampler/learner ratio."""
        device = self.model.device
        none = torch.zeros(0, device=device)
        names = union_over_ranks({name for r in records for name in r} | {"ratio", "staleness"}, self.group)
        values = {n: torch.cat([r[n].float() for r in records if n in r] or [none]) for n in names}
        sums = sum_over_ranks(torch.stack([v.double().sum() for v in values.values()]), device, self.group)
        counts = sum_over_ranks([len(v) for v in values.values()], device, self.group)
        means = {n: total / count for n, total, count in zip(names, sums, counts, strict=True) if count}
        out = {n: m for n, m in means.items() if n not in ("ratio", "staleness")}
        out["learner/trained_tokens"] = counts[names.index("ratio")]
        ratios = gather_values(values["ratio"], self.group).sort().values
        if len(ratios):
            out["ratio/mean"] = means["ratio"]
            out["ratio/p99"] = float(ratios[int(0.99 * (len(ratios) - 1))])
            out["ratio/max"] = float(ratios[-1])
            oldest = [float(values["staleness"].max()) if len(values["staleness"]) else 0.0]
            out["staleness/mean"] = means["staleness"]
            out["staleness/max"] = max_over_ranks(oldest, device, self.group)[0]
        return out

    # ---------------------------------------------------------------------------------------------------- state

    def state_dict(self, *, weights: bool = True, keep: bool = True) -> dict[str, Any]:
        """All that a restart needs, as whole CPU tensors and plain values; loads on any number of ranks.

        `model` holds the trained parameters only (adapters under LoRA), and is left out without `weights`. Every rank calls it
        when sharded; one that only joins the gathering says `keep=False`, and drops each tensor as soon as it is whole.
        """

        return {
            **({"model": self.trained.weights(keep=keep)} if weights else {}),
            "optimizer": self.trained.moments(keep=keep),
            "batches": self.batches,
            "rng": {"torch": torch.get_rng_state(), "minibatches": self.generator.get_state()},
        }

    def held(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `state_dict` and the critic's have beside the policy's own weights, nothing gathered: tensors where they lie, by names
        that all ranks share, and plain values."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for owner, trained in self._owners.items():
            laid_out, plain[owner] = trained.held()
            tensors |= {f"{owner}/{name}": value for name, value in laid_out.items()}
            if owner != "policy" or self.config.lora.rank:
                tensors |= {f"{owner}/weight/{name}": p.detach() for name, p in trained.named.items()}
        rng = {"torch": torch.get_rng_state(), "minibatches": self.generator.get_state()}
        return tensors, {"held": plain, "batches": self.batches, "rng": rng}

    def read_held(self, plain: dict[str, Any], shards: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What `load_state_dict` takes, from what `held` gave. Every rank calls it. Raises ValueError when they do not fit."""
        shapes = shard_shapes(shards)
        states: dict[str, dict[str, Any]] = {}
        for owner, trained in self._owners.items():
            found = {}
            for what in whats(list(shapes), owner):
                for name, p in trained.named.items():
                    if (shape := shapes.get(f"{owner}/{what}/{name}")) != tuple(p.shape):
                        raise ValueError(unfit(name, p, shape))
                    found[f"{owner}/{what}/{name}"] = p.detach()
            laid_out = read_shards(shards, found, self.group)
            state: dict[str, Any] = {"optimizer": {name: dict(v) for name, v in plain["held"].get(owner, {}).items()}}
            for key, value in laid_out.items():
                _, what, name = key.split("/", 2)
                place = state.setdefault("model", {}) if what == "weight" else state["optimizer"].setdefault(name, {})
                place[name if what == "weight" else what] = value
            states[owner] = state
        state = states["policy"] | {"batches": plain["batches"], "rng": plain["rng"]}
        if self.config.lora.rank and "model" not in state:
            raise ValueError("the checkpoint has no adapters: use the learner.lora settings of the run that wrote it")
        return state, states.get("critic", {}) if "critic" in plain["held"] else None

    def load_state_dict(self, state: dict[str, Any], critic: dict[str, Any] | None = None) -> None:
        """Inverse of `state_dict`, and of the critic's own. Raises ValueError, nothing changed, when one does not fit this learner.

        Every rank calls it, and reads its own part of what is sharded.
        """
        if (critic is None) != (self.critic is None):
            raise ValueError(
                f"the checkpoint has {'no' if critic is None else 'a'} critic: resume with the learner.critic.kind of the run that wrote it"
            )
        saved = self.trained.check(state["model"])
        if self.critic is not None and critic is not None:
            self.critic.trained.load(self.critic.trained.check(critic["model"]), critic["optimizer"])
        self.trained.load(saved, state["optimizer"])
        self.batches = int(state["batches"])
        torch.set_rng_state(state["rng"]["torch"])
        self.generator.set_state(state["rng"]["minibatches"])


def _finite(*values: float) -> bool:
    return all(-float("inf") < v < float("inf") for v in values)
