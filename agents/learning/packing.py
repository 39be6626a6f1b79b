"""From samples to micro-batches under a token budget.

Invariants: every trained token of every sample appears in exactly one micro-batch; a token sees exactly the tokens before
it in its own sample; nothing behind a sample's last trained token is computed; the result depends only on the samples and
the budget. Trained tokens are listed flat (axis N): `source` says which position predicts each, so hidden states, not
logits, are gathered, and layouts that share prefixes or run packed kernels need no other loss.

Two layouts. `padded`: rows of like length, padding on the right, where a causal mask alone keeps samples apart (no mask
tensor: the fast attention path on CPU). `packed`: sequences end to end in one row, positions restarting, behind a block
mask (dense for sdpa; variable-length kernels read `position_ids`). Axes: B rows, L columns, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agents.types import Sample


@dataclass(frozen=True)
class MicroBatch:
    """One forward (and backward) pass."""

    token_ids: Tensor
    """int64 [B, L]; 0 where padded"""
    position_ids: Tensor
    """int64 [B, L], restarting at 0 with every segment"""
    segment_ids: Tensor
    """int64 [B, L]: 1, 2, ... per sequence within the micro-batch, 0 = padding"""
    packed: bool
    """False: one sequence per row, right-padded, so plain causal attention is right."""
    source: Tensor
    """int64 [N]: flat index into B*L of the position that predicts the token"""
    target: Tensor
    """int64 [N]: the token itself"""
    sample_index: Tensor
    """int64 [N]: which of `samples` the token belongs to"""
    rollout_logprobs: Tensor
    """float32 [N]"""
    advantages: Tensor
    """float32 [N]"""
    temperatures: Tensor
    """float32 [N]"""
    coefficients: Tensor
    """float32 [N]: factor of the token's loss, from the aggregation and the sample's weight"""
    versions: Tensor
    """int64 [N]"""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [N] each"""
    samples: tuple[int, ...] = ()
    """Indices, into the list that was packed, of the sequences here (segment 1 is the first)."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return int((self.segment_ids > 0).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        moved["aux"] = {k: v.to(device) for k, v in self.aux.items()}
        return MicroBatch(**moved)

    def attention_mask(self) -> Tensor | None:
        """bool [B, 1, L, L], True = may look; None for the padded layout, where causal attention suffices."""
        if not self.packed:
            return None
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        length = self.token_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.token_ids.device).tril()
        return (same & causal)[:, None]


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    packed: bool = False,
    coefficients: Sequence[np.ndarray] | None = None,
    include: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens each, padding included; a longer sequence gets one of its own.

    `coefficients`: per sample, float [T] (see `loss_coefficients`); 1 on trained tokens when absent. `include`: indices of the
    samples to pack; all by default. Samples without trained tokens are left out. Longest first, so that memory peaks early.
    """
    chosen = range(len(samples)) if include is None else include
    lengths = {i: used_length(samples[i]) for i in chosen}
    order = sorted((i for i in lengths if lengths[i] > 0), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    if packed:
        room: list[int] = []  # first fit over lengths in falling order: within 11/9 of the fewest bins
        for i in order:
            slot = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
            if slot is None:
                bins.append([i])
                room.append(max_tokens - lengths[i])
            else:
                bins[slot].append(i)
                room[slot] -= lengths[i]
    else:
        for i in order:
            if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= max_tokens:
                bins[-1].append(i)
            else:
                bins.append([i])
    return [_micro_batch(samples, members, lengths, packed, coefficients) for members in bins]


def used_length(sample: Sample) -> int:
    """Tokens that must be fed: all before the last trained one. 0 when nothing is trained."""
    trained = np.flatnonzero(sample.mask)
    return int(trained[-1]) if len(trained) else 0


def loss_coefficients(
    samples: Sequence[Sample], aggregation: str, constant_length: int, totals: Mapping[str, float]
) -> list[np.ndarray]:
    """Per sample float64 [T]: what each trained token's loss is multiplied by before everything is summed.

    `totals` are those of `count_totals`, summed over all ranks, so that the sum over ranks is the global mean. Samples that
    share a rollout id count as one sequence. A sample's `weight` scales its loss, not the normaliser.
    """
    rollout_tokens: dict[str, int] = {}
    for s in samples:
        rollout_tokens[s.rollout_id] = rollout_tokens.get(s.rollout_id, 0) + int(s.mask.sum())
    out = []
    for s in samples:
        if aggregation == "token_mean":
            scale = 1.0 / max(totals["tokens"], 1.0)
        elif aggregation == "sequence_mean":
            scale = 1.0 / (max(rollout_tokens[s.rollout_id], 1) * max(totals["rollouts"], 1.0))
        elif aggregation == "constant":
            scale = 1.0 / (constant_length * max(totals["rollouts"], 1.0))
        else:
            raise ValueError(
                f"learner.aggregation {aggregation!r} is unknown; one of token_mean, sequence_mean, constant"
            )
        out.append(s.mask * (scale * s.weight))
    return out


def count_totals(samples: Sequence[Sample]) -> dict[str, float]:
    """Trained tokens, and rollouts that have any."""
    trained = [s for s in samples if s.mask.any()]
    return {
        "tokens": float(sum(int(s.mask.sum()) for s in trained)),
        "rollouts": float(len({s.rollout_id for s in trained})),
    }


def dummy() -> MicroBatch:
    """A pass without trained tokens: keeps the collectives of sharded ranks in step when one has fewer micro-batches."""
    zeros, none, nothing = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    return MicroBatch(
        token_ids=zeros,
        position_ids=zeros,
        segment_ids=zeros,
        packed=False,
        source=none,
        target=none,
        sample_index=none,
        rollout_logprobs=nothing,
        advantages=nothing,
        temperatures=nothing,
        coefficients=nothing,
        versions=none,
        aux={"ref_logprobs": nothing, "prox_logprobs": nothing},
    )


def _micro_batch(
    samples: Sequence[Sample],
    members: Sequence[int],
    lengths: Mapping[int, int],
    packed: bool,
    coefficients: Sequence[np.ndarray] | None,
) -> MicroBatch:
    rows = 1 if packed else len(members)
    columns = sum(lengths[i] for i in members) if packed else max(lengths[i] for i in members)
    token_ids, position_ids, segment_ids = (np.zeros((rows, columns), dtype=np.int64) for _ in range(3))
    flat: dict[str, list[np.ndarray]] = {}
    aux_names = sorted(set.intersection(*(set(samples[i].aux) for i in members)))
    start = 0  # flat index of the sequence's first token
    for segment, i in enumerate(members, start=1):
        sample, length = samples[i], lengths[i]
        row, column = divmod(start, columns)
        part = slice(column, column + length)
        token_ids[row, part] = sample.token_ids[:length]
        position_ids[row, part] = np.arange(length)
        segment_ids[row, part] = segment
        trained = np.flatnonzero(sample.mask)
        coefficient = sample.mask if coefficients is None else coefficients[i]
        for name, values in (
            ("source", start + trained - 1),
            ("target", sample.token_ids[trained].astype(np.int64)),
            ("sample_index", np.full(len(trained), i)),
            ("rollout_logprobs", sample.logprobs[trained]),
            ("advantages", sample.advantages[trained]),
            ("temperatures", sample.temperatures[trained]),
            ("coefficients", np.asarray(coefficient)[trained].astype(np.float32)),
            ("versions", sample.versions[trained].astype(np.int64)),
            *((f"aux:{name}", np.asarray(sample.aux[name], dtype=np.float32)[trained]) for name in aux_names),
        ):
            flat.setdefault(name, []).append(values)
        start += length if packed else columns
    tensors = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items()}
    aux = {name: tensors.pop(f"aux:{name}") for name in aux_names}
    return MicroBatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
        packed,
        aux=aux,
        samples=tuple(members),
        **tensors,
    )
