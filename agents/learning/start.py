"""A start from which a small transformer already copies: an induction head, written into fresh weights.

To read a name from a page means: find where its first half stood before and say what followed. That takes two heads in two layers
(Olsson et al. 2022), and a model of a million parameters with several hundred names finds them late or never. So the start has them:
layer 0 passes each token's predecessor on, layer 1 looks for the current token among those predecessors and passes on what it finds.
Everything else starts at random, and all of it is trained.

Works for Qwen3-like models: RMS norms on queries and keys, rotary positions, as many key heads as query heads, no biases.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_CONSTANT = 0.3
"""Value of the embedding's first dimension for every token, from which a head can make a constant query. Shifts all logits alike."""
_NUM_POSITION_PAIRS = 3
"""Rotary pairs, fastest first, that tell the predecessor from other tokens."""
_REACH = 300
"""Content is matched in rotary pairs that turn by less than a radian within this many tokens."""


@torch.no_grad()
def induction_start(model: Any, gain: float = 2.0) -> None:
    """Write two predecessor heads into layer 0 and two matching heads into layer 1. `gain` is the start of query and key norms.

    Raises ValueError for a model without the parts this needs.
    """
    layers, config = model.base_model.layers, model.config
    D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
    if (
        len(layers) < 2
        or H < 2
        or config.num_key_value_heads != H
        or 2 * d < D
        or not hasattr(layers[0].self_attn, "q_norm")
    ):
        raise ValueError(
            "induction_start needs 2 layers, 2 heads, a key head per query head, query and key norms, and heads of half the width"
        )
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0.0, 1.0 / math.sqrt(D))
    embedding[:, 0] = _CONSTANT
    # One rotation of the content dimensions keeps what layer 0 writes apart from the token's own embedding.
    mix = torch.zeros(D, D)
    mix[1:, 1:] = torch.linalg.qr(torch.randn(D - 1, D - 1))[0]
    inverse_frequency = model.base_model.rotary_emb.inv_freq.float().cpu()
    first, second = layers[0].self_attn, layers[1].self_attn
    for layer in layers:
        layer.self_attn.q_norm.weight.fill_(gain)
        layer.self_attn.k_norm.weight.fill_(gain)
        layer.mlp.down_proj.weight.mul_(0.3)
        for h in range(H):
            # Elsewhere too, keys like queries and outputs like transposed values favour copying (Trockman & Kolter 2023).
            rows = slice(h * d, (h + 1) * d)
            layer.self_attn.k_proj.weight[rows] = layer.self_attn.q_proj.weight[rows]
            layer.self_attn.o_proj.weight[:, rows] = 0.1 * layer.self_attn.v_proj.weight[rows].T
    for h, (rows, basis) in enumerate(_halves(D, d)):
        first.q_proj.weight[rows] *= 0.1
        first.k_proj.weight[rows] *= 0.1
        for pair in range(_NUM_POSITION_PAIRS):
            turn = float(inverse_frequency[pair])
            first.q_proj.weight[h * d + pair, 0] = 1.0
            first.k_proj.weight[h * d + pair, 0] = math.cos(turn)
            first.k_proj.weight[h * d + pair + d // 2, 0] = math.sin(turn)
        first.v_proj.weight[rows] = basis
        first.o_proj.weight[:, rows] = 0.15 * mix @ basis.T
    slow = torch.nonzero(inverse_frequency * _REACH < 1.0)[:, 0]
    for rows, basis in _halves(D, d):
        content = torch.zeros(d, D)
        chosen = torch.cat([slow, slow + d // 2])
        content[chosen, 1:] = torch.randn(len(chosen), D - 1) / math.sqrt(D)
        second.q_proj.weight[rows] = content
        second.k_proj.weight[rows] = content @ mix.T
        second.v_proj.weight[rows] = basis
        second.o_proj.weight[:, rows] = 0.15 * basis.T


def _halves(D: int, d: int) -> list[tuple[slice, torch.Tensor]]:
    """Rows of heads 0 and 1, and a basis [d, D] of one half of the content dimensions for each; the constant is left out."""
    basis = torch.zeros(2 * d, D)
    basis[: D - 1, 1:] = torch.linalg.qr(torch.randn(D - 1, D - 1))[0]
    return [(slice(h * d, (h + 1) * d), basis[h * d : (h + 1) * d]) for h in range(2)]
