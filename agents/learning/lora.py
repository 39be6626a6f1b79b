"""Low-rank adapters (LoRA, 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.

Invariants: a fresh adapter changes nothing (B starts at 0); merging gives a plain weight of W's shape, so engines and
checkpoints never see an adapter; parameter names keep the model's own, with `.base`, `.lora_a` and `.lora_b` behind them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from agents.learning.config import LoraConfig


class LoraLinear(nn.Module):
    """A linear layer with a frozen weight and a trainable low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        start = torch.empty(rank, base.in_features)
        bound = math.sqrt(3.0 / base.in_features)  # variance 1 / in_features
        self.lora_a = nn.Parameter(start.uniform_(-bound, bound, generator=generator).to(base.weight))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + self.scale * low


def apply_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> int:
    """Puts adapters on the target layers, in place, and freezes everything else. Returns how many there are.

    Raises ValueError when no layer of the model has a target's name.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name in config.targets
    ]
    if not found:
        raise ValueError(f"learner.lora.targets {list(config.targets)} name no linear layer of this model")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, config.rank, config.alpha, generator))
    return len(found)


def merge(base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The plain weight [out, in] an adapted layer amounts to."""
    return base + scale * (lora_b @ lora_a)
