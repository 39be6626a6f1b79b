"""Attention over sequences that lie end to end in one row: every token looks back in its own sequence, and no pair that must
not see each other is computed.

Registered with transformers under the name `varlen`. On a GPU in 16 bits it is torch's own variable-length flash kernel, which
needs no other package; elsewhere each sequence goes through `scaled_dot_product_attention` by itself, causal and without a mask.
Models hand on transformers' own keywords for it (`cu_seq_lens_q`, `max_length_q`), so its flash kernels take the same micro-batches.

With `context` (see `agents.learning.context`) the row's columns are spread over ranks; each rank then computes a part of the
heads over the whole row. Invariant: what this file returns depends on nothing but queries, keys, values and the bounds.
Axes: L columns of a row, H heads, D width of a head, S sequences.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from agents.learning.context import Context

NAME = "varlen"
_UNKNOWN = ("s_aux", "softcap", "position_bias")
"""Keywords by which models ask for more than plain attention."""


def register() -> None:
    """Makes `attn_implementation="varlen"` known to transformers. It takes no mask, so none is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)


def has_kernel(device: torch.device) -> bool:
    """Whether the flash kernel for variable lengths is there: torch has it, and the GPU is an Ampere or newer."""
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    context: Context | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, L, D], key and value [B, H_kv, L, D]; returns [B, L, H, D].

    `cu_seq_lens_q`: int32 [S + 1], where the sequences of the one row begin, and its end; None: each row is one sequence.
    `max_length_q`: the longest. Raises ValueError for what a plain causal attention does not know.
    """
    asked = next((name for name in _UNKNOWN if kwargs.get(name) is not None), None)
    if asked is not None or attention_mask is not None:
        raise ValueError(
            f"learner.attention={NAME} knows no {asked or 'attention mask'}, which this model needs: set learner.attention=sdpa"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # norms leave float32 behind, which no kernel takes beside bfloat16 values
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    window = sliding_window or 0
    if cu_seq_lens_q is None:
        return _causal(query, key, value, scaling, window).transpose(1, 2), None
    if query.shape[0] != 1:
        raise ValueError(f"{query.shape[0]} rows with bounds of sequences: packed micro-batches have one row")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, H, D]
    if context is not None:
        q, k, v = context.to_heads(q, k, v)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and has_kernel(q.device):
        out = _flash(q, k, v, cu_seq_lens_q, max_length_q or q.shape[0], scaling, window)
    else:
        out = _one_by_one(q, k, v, cu_seq_lens_q, scaling, window)
    if context is not None:
        out = context.to_columns(out)
    return out[None], None


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scaling: float | None, window: int) -> Tensor:
    parts = []
    for start, stop in pairwise(bounds.tolist()):
        q_1HLD, k_1HLD, v_1HLD = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(_causal(q_1HLD, k_1HLD, v_1HLD, scaling, window)[0].transpose(0, 1))
    return torch.cat(parts)


def _causal(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scaling: float | None, window: int) -> Tensor:
    length, grouped = q_BHLD.shape[2], q_BHLD.shape[1] != k_BHLD.shape[1]
    if not window or window >= length:
        return scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True, scale=scaling, enable_gqa=grouped)
    column = torch.arange(length, device=q_BHLD.device)
    back = column[:, None] - column
    return scaled_dot_product_attention(
        q_BHLD, k_BHLD, v_BHLD, attn_mask=(back >= 0) & (back < window), scale=scaling, enable_gqa=grouped
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int) -> Tensor:
    """torch's kernel; its keywords came one after another (torch 2.11 to 2.13)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scaling} if scaling is not None else {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window:
        raise ValueError(
            "this torch has no sliding window in its variable-length attention: set learner.attention=sdpa"
        )
    else:
        options["is_causal"] = True
    found: Tensor = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest, **options
    )
    return found
