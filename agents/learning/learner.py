"""The learner: a batch of samples in, one (or a few) optimiser steps, metrics out.

Invariants:
- The loss is normalised by counts over the whole batch and all ranks, so micro-batching, packing and the number of ranks
  change nothing but rounding.
- A batch whose loss or gradient is not finite changes no weight; the metrics say so.
- Blind to the algorithm: it reads `Sample`s only. Imports neither Ray nor vLLM; several ranks meet through
  torch.distributed when it is initialised, each with its own part of the batch (`agents.sharding.shard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from agents.learning import packing
from agents.learning.config import LearnerConfig, learning_rate
from agents.learning.loss import LOSSES, Tokens, can_learn
from agents.learning.model import PolicyModel, Stacked, full, named_weights_for_publish
from agents.learning.scorer import score_logprobs, with_aux
from agents.learning.shard import (
    gather_values,
    is_sharded,
    max_over_ranks,
    settle,
    sum_gradients,
    sum_over_ranks,
    union_over_ranks,
    world_size,
)
from agents.learning.stopwatch import Stopwatch
from agents.types import Sample

PHASES = ("pack", "forward", "backward", "optimiser")
"""What `time/train_s` is made of."""


class Learner:
    """Holds the policy, its optimiser and the schedule.

    `model`: a PolicyModel (plain, or sharded by `shard.apply_fsdp` before it comes here) or a Hugging Face causal
    model, which is wrapped. `group`: the process group of the learner's ranks; the default group when None.
    """

    def __init__(self, model: nn.Module, config: LearnerConfig, *, group: dist.ProcessGroup | None = None) -> None:
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
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        decayed = [p for p in self._named.values() if p.ndim >= 2]
        kept = [p for p in self._named.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.adam_eps,
        )
        self._watch = Stopwatch(self.model.device)
        self.packed = config.layout == "packed" or (config.layout == "auto" and self.model.packs)

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
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        parts = self._minibatches(samples)
        if len(parts) > 1 and self.config.loss.old == "learner":
            logprobs = score_logprobs(self.model, samples, self._budget, packed=self.packed, group=self.group)
            prox = {id(s): values for s, values in zip(samples, logprobs, strict=True)}
            parts = [[with_aux(s, prox_logprobs=prox[id(s)]) for s in part] for part in parts]
            self._watch.lap("forward")
        records: list[dict[str, Tensor]] = []
        losses, norms, skipped, padded = [], [], 0, 0.0
        for part in parts:
            loss, norm, computed = self._optimise(part, records)
            losses.append(loss)
            norms.append(norm)
            padded += computed
            skipped += not _finite(loss, norm)
        self.batches += 1
        metrics = {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": rate,
            "skipped/nonfinite": float(skipped),
        }
        metrics.update(self._token_metrics(records))
        tokens, rows, positions = sum_over_ranks(
            [sum(s.num_tokens for s in samples), len(samples), padded], self.model.device, self.group
        )
        self._watch.lap("optimiser")
        laps = self._watch.seconds()
        seconds = sum(laps.values())
        metrics.update(
            {
                "learner/samples": rows,
                "learner/tokens": tokens,
                "learner/computed_tokens": positions,
                "learner/tokens_per_s": tokens / seconds,
                "time/train_s": seconds,
                **{f"time/{phase}_s": laps.get(phase, 0.0) for phase in PHASES},
            }
        )
        return metrics

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) as the sampler's engine expects them. Every rank must exhaust it when sharded."""
        return named_weights_for_publish(self.model, dtype)

    def score(self, samples: Sequence[Sample]) -> list[Any]:
        """log-probs of the trained tokens under the current weights: per sample float32 [T], 0 elsewhere."""
        return score_logprobs(self.model, samples, self._budget, packed=self.packed, group=self.group)

    # ------------------------------------------------------------------------------------------------ one step

    @property
    def _budget(self) -> int:
        return self.config.max_tokens_per_microbatch

    def _minibatches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        count = self.config.minibatches
        if count == 1:
            return [list(samples)]
        order = torch.randperm(len(samples), generator=self.generator).tolist()
        return [[samples[i] for i in order[k::count]] for k in range(count)]

    def _optimise(self, samples: Sequence[Sample], records: list[dict[str, Tensor]]) -> tuple[float, float, float]:
        """One optimiser step. Returns loss, gradient norm (both global) and positions computed (here)."""
        config, device = self.config, self.model.device
        counts = packing.count_totals(samples)
        totals = dict(zip(counts, sum_over_ranks(counts.values(), device, self.group), strict=True))
        coefficients = packing.loss_coefficients(samples, config.aggregation, config.constant_length, totals)
        moving: list[int] = []
        still: list[int] = []
        for i, s in enumerate(samples):
            learns = can_learn(config.loss, bool(s.advantages.any())) or not config.skip_zero_advantage
            (moving if learns else still).append(i)
        self.optimizer.zero_grad(set_to_none=False)
        loss, positions = 0.0, 0.0
        # Forward-only passes come first: a backward pass afterwards lets FSDP give back what they gathered.
        for chosen, backward in ((still, False), (moving, True)):
            batches = packing.pack(samples, self._budget, packed=self.packed, coefficients=coefficients, include=chosen)
            self._watch.lap("pack")
            if is_sharded(self.model):
                most = int(max_over_ranks([len(batches)], device, self.group)[0])
                batches += [packing.dummy()] * (most - len(batches))
            for batch in batches:
                value, record = self._pass(batch.to(device), backward)
                loss += value
                if batch.samples:
                    positions += batch.token_ids.numel()
                    records.append(record)
            if not backward and batches:
                settle(self.model)
        loss = sum_over_ranks([loss], device, self.group)[0]
        norm = self._gradient_norm()
        if _finite(loss, norm):
            if config.grad_clip > 0 and norm > config.grad_clip:
                for p in self._named.values():
                    if p.grad is not None:
                        p.grad.mul_(config.grad_clip / (norm + 1e-6))
            self.optimizer.step()
        self._watch.lap("optimiser")
        return loss, norm, positions

    def _pass(self, batch: packing.MicroBatch, backward: bool) -> tuple[float, dict[str, Tensor]]:
        with nullcontext() if backward else torch.no_grad():
            logprobs, entropies = self.model(batch)
            tokens = Tokens(batch.rollout_logprobs, batch.advantages, batch.sample_index, batch.aux)
            loss_N, stats = LOSSES[self.config.loss.name](logprobs, entropies, tokens, self.config.loss)
            loss = (loss_N * batch.coefficients).sum()
            if not len(batch.target):
                loss = logprobs.sum()  # 0, with a path to every weight
        self._watch.lap("forward")
        if backward:
            # FSDP averages gradients over ranks; the coefficients already count all of them.
            (loss * world_size(self.group) if is_sharded(self.model) else loss).backward()
            self._watch.lap("backward")
        stats = {name: values.detach() for name, values in stats.items()}
        stats["staleness"] = torch.where(batch.versions >= 0, self.batches - batch.versions, 0).float()
        return float(loss.detach()), stats

    def _gradient_norm(self) -> float:
        for p in self._named.values():
            if p.grad is None:  # nothing here had a gradient: the optimiser must still see a zero, on every rank
                p.grad = torch.zeros_like(p)
        if not is_sharded(self.model):
            sum_gradients(self._named.values(), self.group)
        norm = nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _token_metrics(self, records: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Means over all trained tokens of all ranks, and quantiles of the sampler/learner ratio."""
        device = self.model.device
        none = torch.zeros(0, device=device)
        names = union_over_ranks({name for r in records for name in r} | {"ratio", "staleness"}, self.group)
        values = {n: torch.cat([r[n].float() for r in records if n in r] or [none]) for n in names}
        sums = sum_over_ranks([float(v.double().sum()) for v in values.values()], device, self.group)
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

        def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
            gathered = ((name, full(tensor)) for name, tensor in tensors)
            return {name: whole.to("cpu", copy=True) for name, whole in gathered if keep}

        return {
            **({"model": copies(self._named.items())} if weights else {}),
            "optimizer": {
                name: copies(self.optimizer.state[p].items())
                for name, p in self._named.items()
                if p in self.optimizer.state
            },
            "batches": self.batches,
            "rng": {"torch": torch.get_rng_state(), "minibatches": self.generator.get_state()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError when the parameters do not fit this model.

        Every rank calls it; of what is sharded the first rank alone reads the values, one tensor at a time.
        """
        saved = state["model"] if isinstance(state["model"], Stacked) else Stacked(state["model"])
        for name, p in self._named.items():
            if name not in saved or saved.shape(name) != tuple(p.shape):
                found = saved.shape(name) if name in saved else "nothing"
                raise ValueError(
                    f"the checkpoint does not fit the model: {name} is {tuple(p.shape)} here, {found} there; use the same"
                    " model and learner.lora settings as the run that wrote it"
                )
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(_like(saved[name] if _is_first(p) else torch.empty(p.shape), p))
                kept = state["optimizer"].get(name)
                self.optimizer.state.pop(p, None)
                if kept is not None:
                    self.optimizer.state[p] = {
                        k: _like(v, p) if v.shape == p.shape and v.ndim else v.clone() for k, v in kept.items()
                    }
        self.batches = int(state["batches"])
        torch.set_rng_state(state["rng"]["torch"])
        self.generator.set_state(state["rng"]["minibatches"])


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is laid out. Shards come from the first rank's copy; that of others is not read."""
    if isinstance(parameter, DTensor):
        here = whole.to(parameter.device) if _is_first(parameter) else torch.empty_like(whole, device=parameter.device)
        return distribute_tensor(here, parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device, copy=True)


def _is_first(parameter: Tensor) -> bool:
    return not isinstance(parameter, DTensor) or parameter.device_mesh.get_local_rank() == 0


def _finite(*values: float) -> bool:
    return all(-float("inf") < v < float("inf") for v in values)
