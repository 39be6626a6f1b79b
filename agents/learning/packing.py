"""From samples to micro-batches under a token budget.

Invariants: every trained token of every sample appears in exactly one micro-batch; a token sees exactly the tokens before
it in its own sample; nothing behind a sample's last trained token is computed; the result depends only on the samples and
the budget. Trained tokens are listed flat (axis N): `source` says which position predicts each, so hidden states, not
logits, are gathered, and no layout needs another loss.

Three layouts. `padded`: rows of like length, padding on the right, where a causal mask alone keeps samples apart (no mask
tensor: the fast attention path on CPU). `packed`: sequences end to end in one row, positions restarting, behind a block
mask (dense for sdpa; variable-length kernels read `bounds`). `shared`: samples that begin with the same tokens are one
row, which holds their trie in depth-first order: shared tokens stand there once, positions go on from a token's parent,
and every token sees its ancestors only. One position may then predict the next token of several samples.

Samples share by their longest common prefix, whatever their `prefix_id`: equal tokens from the start are all that equal
hidden states need, the candidates of a later step share with those of an earlier one beyond their own group's prefix, and
whether a token is trained in one sample and given in another is no matter. Axes: B rows, L columns, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

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
    """int64 [B, L]: the token's index in its sample"""
    ends: Tensor
    """int64 [B, L]: column behind the last one that may look at this token; those from its own column to there do"""
    packed: bool
    """False: one sequence per row, right-padded, so plain causal attention is right without a mask."""
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
    bounds: Tensor | None = None
    """int32 [S + 1]: where the S sequences of a row that holds them end to end begin, and its end; None in other layouts"""
    longest: int = 0
    """Tokens of the longest of them"""
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [N] each"""
    samples: tuple[int, ...] = ()
    """Indices, into the list that was packed, of the sequences here."""
    shared_tokens: int = 0
    """Tokens that are not computed because another sample's are the same."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        moved["aux"] = {k: v.to(device) for k, v in self.aux.items()}
        return MicroBatch(**moved)

    def attention_mask(self) -> Tensor:
        """bool [B, 1, L, L], True = may look. Where not `packed`, causal attention comes to the same for all that is trained."""
        column = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return ((column <= column[:, None]) & (column[:, None] < self.ends[:, None]))[:, None]


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    layout: str = "padded",
    attention_cost: float = 0.0,
    coefficients: Sequence[np.ndarray] | None = None,
    include: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens each, padding included; a longer sequence gets one of its own.

    `layout`: padded, packed or shared. `attention_cost`: that of one entry of a row's L x L attention, in units of what the
    rest of a position costs; `shared` joins samples only where it saves more than it adds (see `_trees`), and packs those that
    stay alone as `padded` does. `coefficients`: per sample, float [T] (see `loss_coefficients`); 1 on trained tokens when
    absent. `include`: indices of the samples to pack; all by default. Samples without trained tokens are left out. Longest
    first, so that memory peaks early.
    """
    chosen = range(len(samples)) if include is None else include
    lengths = {i: length for i in chosen if (length := used_length(samples[i]))}
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    if layout == "packed":
        bins: list[list[_Row]] = []
        for i in order:  # first fit over lengths in falling order: within 11/9 of the fewest bins
            row = next((b[0] for b in bins if b[0].length + lengths[i] <= max_tokens), None)
            if row is None:
                bins.append([_Row([i], [0], lengths[i])])
            else:
                row.join(_Row([i], [0], lengths[i]), 0)
    else:
        rows = [_Row([i], [0], lengths[i]) for i in order]
        if layout == "shared":
            rows = sorted(_trees(samples, lengths, max_tokens, attention_cost), key=lambda r: (-r.length, r.members))
        # Samples alone need no mask, and keep to themselves for attention's fast path.
        bins = _fill([r for r in rows if len(r.members) > 1], max_tokens)
        bins += _fill([r for r in rows if len(r.members) == 1], max_tokens)
    return [_micro_batch(samples, rows, lengths, coefficients, bounded=layout == "packed") for rows in bins]


@dataclass
class _Row:
    """Samples in one row, each behind the one before it."""

    members: list[int]
    shared: list[int]
    """Per member: how many of its first tokens are those of the member before, and are not computed again"""
    length: int
    """Tokens that the row computes"""

    def join(self, other: _Row, shared: int) -> None:
        """Puts another row behind this one; its first member shares so many tokens with the last one here."""
        self.shared += [shared, *other.shared[1:]]
        self.members += other.members
        self.length += other.length - shared


def _fill(rows: Sequence[_Row], max_tokens: int) -> list[list[_Row]]:
    """Rows of falling length to micro-batches."""
    bins: list[list[_Row]] = []
    for row in rows:
        if bins and (len(bins[-1]) + 1) * bins[-1][0].length <= max_tokens:
            bins[-1].append(row)
        else:
            bins.append([row])
    return bins


def _trees(samples: Sequence[Sample], lengths: Mapping[int, int], max_tokens: int, attention_cost: float) -> list[_Row]:
    """Rows of one sample each, joined to tries where that is cheaper.

    Sorted by their tokens, neighbours share most, and every subtree of the trie is a run of neighbours. Runs are joined from
    the deepest fork upwards, as long as a row of L tokens that costs L + attention_cost * L^2 (half the square for a
    sample alone, whose attention is causal) gets no dearer than the two it is made of, and fits the budget.
    """
    tokens = {i: samples[i].token_ids[: lengths[i]] for i in lengths}
    order = sorted(tokens, key=lambda i: tokens[i].astype(">i4").tobytes())  # big-endian bytes sort as the ids do
    shared = [_common(tokens[a], tokens[b]) for a, b in pairwise(order)]
    rows = [_Row([i], [0], lengths[i]) for i in order]  # at each place the row that its sample is in

    def cost(length: int, alone: bool) -> float:
        return length * (1 + attention_cost * length * (0.5 if alone else 1.0))

    for place in sorted(range(len(shared)), key=lambda p: -shared[p]):
        a, b = rows[place], rows[place + 1]
        length = a.length + b.length - shared[place]
        apart = sum(cost(row.length, len(row.members) == 1) for row in (a, b))
        if length <= max(max_tokens, a.length, b.length) and cost(length, False) < apart:
            a.join(b, shared[place])
            rows[place + 1 : place + 1 + len(b.members)] = [a] * len(b.members)
    return list({id(row): row for row in rows}.values())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


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
        ends=zeros + 1,
        packed=False,
        source=none,
        target=none,
        sample_index=none,
        rollout_logprobs=nothing,
        advantages=nothing,
        temperatures=nothing,
        coefficients=nothing,
        versions=none,
        bounds=torch.tensor([0, 1], dtype=torch.int32),
        longest=1,
        aux={"ref_logprobs": nothing, "prox_logprobs": nothing},
    )


def _micro_batch(
    samples: Sequence[Sample],
    rows: Sequence[_Row],
    lengths: Mapping[int, int],
    coefficients: Sequence[np.ndarray] | None,
    *,
    bounded: bool,
) -> MicroBatch:
    columns = max(r.length for r in rows)
    token_ids, position_ids = (np.zeros((len(rows), columns), dtype=np.int64) for _ in range(2))
    ends = np.full((len(rows), columns), columns, dtype=np.int64)
    flat: dict[str, list[np.ndarray]] = {}
    members = [i for r in rows for i in r.members]
    aux_names = sorted(set.intersection(*(set(samples[i].aux) for i in members)))
    for row, r in enumerate(rows):
        path = np.zeros(0, dtype=np.int64)  # the columns of a sample's tokens, of the one before at first
        column = 0
        for i, shared in zip(r.members, r.shared, strict=True):
            sample, length = samples[i], lengths[i]
            ends[row, path[shared:]] = column
            own = np.arange(column, column + length - shared)
            token_ids[row, own] = sample.token_ids[shared:length]
            position_ids[row, own] = np.arange(shared, length)
            path = np.concatenate([path[:shared], own])
            column += len(own)
            trained = np.flatnonzero(sample.mask)
            coefficient = sample.mask if coefficients is None else coefficients[i]
            for name, values in (
                ("source", row * columns + path[trained - 1]),
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
        ends[row, path] = column
    tensors = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in flat.items()}
    aux = {name: tensors.pop(f"aux:{name}") for name in aux_names}
    return MicroBatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(ends),
        packed=any(len(r.members) > 1 for r in rows),
        aux=aux,
        bounds=_bounds([lengths[i] for i in members]) if bounded else None,
        longest=max(lengths[i] for i in members),
        samples=tuple(members),
        shared_tokens=sum(sum(r.shared) for r in rows),
        **tensors,
    )


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
