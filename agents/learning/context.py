"""Context parallelism: one long row of tokens spread over ranks, each of which holds a run of its columns.

Everything but attention treats columns one by one. For attention the ranks trade columns for heads (Ulysses, 2309.14509): each
gets the whole row for a part of the heads, attends, and gives it back. Ranks of one context hold the same samples.

Invariants: attention and its gradients are exact; every trained token is in exactly one rank's part; gradients summed over
all ranks are those of one rank that holds the whole row; two exchanges per layer and direction, the same on every rank.
Axes: L columns of one rank, H heads, D width of a head, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from agents.learning.packing import MicroBatch

_PER_TOKEN = (
    "target",
    "sample_index",
    "rollout_logprobs",
    "advantages",
    "temperatures",
    "coefficients",
    "versions",
)


@dataclass(frozen=True)
class Context:
    """This rank's place among the `size` ranks that share rows."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def part(self, batch: MicroBatch) -> MicroBatch:
        """This rank's columns of a packed micro-batch, and the trained tokens they predict. `bounds` stay those of the whole row.

        The row is filled up to a multiple of the ranks with a sequence of its own that nobody trains.
        """
        if batch.bounds is None:
            raise ValueError("learner.context_parallel needs packed micro-batches: set learner.layout=auto")
        length = batch.token_ids.shape[1]
        fill = -length % self.size
        token_ids, position_ids, bounds = batch.token_ids, batch.position_ids, batch.bounds
        if fill:
            beside = torch.arange(fill, dtype=torch.long)[None]
            token_ids, position_ids = torch.cat([token_ids, 0 * beside], 1), torch.cat([position_ids, beside], 1)
            bounds = torch.cat([bounds, bounds[-1:] + fill])
        columns = (length + fill) // self.size
        start = self.rank * columns
        own = (batch.source >= start) & (batch.source < start + columns)
        return replace(
            batch,
            token_ids=token_ids[:, start : start + columns].contiguous(),
            position_ids=position_ids[:, start : start + columns].contiguous(),
            ends=torch.zeros(1, columns, dtype=torch.long),  # no mask is made of it
            bounds=bounds,
            longest=max(batch.longest, fill),
            source=batch.source[own] - start,
            aux={name: values[own] for name, values in batch.aux.items()},
            **{name: getattr(batch, name)[own] for name in _PER_TOKEN},
        )

    def to_heads(self, q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own columns of all heads to all columns of own heads, in one exchange."""
        if k_LHD.shape[1] % self.size:  # fewer key heads than ranks: several ranks get the same one
            k_LHD, v_LHD = (x.repeat_interleave(self.size // x.shape[1], dim=1) for x in (k_LHD, v_LHD))
        heads = [x.shape[1] // self.size for x in (q_LHD, k_LHD, v_LHD)]
        for_rank = [x.unflatten(1, (self.size, n)) for x, n in zip((q_LHD, k_LHD, v_LHD), heads, strict=True)]
        sent = torch.cat(for_rank, dim=2).transpose(0, 1)  # [rank, L, own heads of q, k and v, D]
        q, k, v = self._exchange(sent).flatten(0, 1).split(heads, dim=1)
        return q, k, v

    def to_columns(self, out_LHD: Tensor) -> Tensor:
        """The way back: all columns of own heads to own columns of all heads."""
        return self._exchange(out_LHD.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1, 2)

    def join(self, arrays: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        """Arrays of all ranks added up, in place of what each has: 0 where a token is another rank's."""
        if not arrays:
            return []
        flat = torch.from_numpy(np.concatenate(arrays)).to(device)
        dist.all_reduce(flat, group=self.group)
        return np.split(flat.cpu().numpy(), np.cumsum([len(a) for a in arrays])[:-1])

    def _exchange(self, parts: Tensor) -> Tensor:
        """parts [size, ...]: the i-th goes to rank i, whose own comes back in its place."""
        found: Tensor = _AllToAll.apply(parts, self.group)
        return found


class _AllToAll(torch.autograd.Function):
    """Its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grad.contiguous(), group=ctx.group)
        return received, None


def make_context(size: int, hf_config: Any) -> Context | None:
    """The context of this rank: neighbours by rank, `size` of them. None where no row is shared. All ranks call it together.

    Raises ValueError when ranks or heads cannot be divided so.
    """
    if size == 1:
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ValueError(
            f"learner.context_parallel={size} does not divide the {world} learner process(es): set train.num_workers to a multiple"
        )
    text = hf_config.get_text_config()
    heads, key_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size or (key_heads % size and size % key_heads):
        raise ValueError(
            f"learner.context_parallel={size} does not divide the model's {heads} attention heads ({key_heads} for keys):"
            " choose a divisor of both"
        )
    group, _ = dist.new_subgroups(group_size=size)
    return Context(group, dist.get_rank(group), size)
