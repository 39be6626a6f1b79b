"""Low-rank adapters (LoRA, 2106.09685): y = W x + (alpha / rank) B A x, with W frozen.

Invariants: a fresh adapter changes nothing (B starts at 0); merging gives a plain weight of W's shape, so engines and
checkpoints need never see an adapter; parameter names keep the model's own, with `.base`, `.lora_a` and `.lora_b` behind them.
Where adapters alone are published they are named as PEFT names them, which engines read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from agents.learning.config import LoraConfig
from agents.learning.weights import local, place


class LoraLinear(nn.Module):
    """A linear layer with a frozen weight and a trainable low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + self.scale * low


def apply_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> int:
    """Puts adapters on the target layers, in place, and freezes everything else. Returns how many there are.

    Raises ValueError when no layer of the model has a target's name.
    """
    model.requires_grad_(False)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name in config.targets
    ]
    if not found:
        raise ValueError(f"learner.lora.targets {list(config.targets)} name no linear layer of this model")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, config.rank, config.alpha))
    start_lora(model, seed)
    return len(found)


@torch.no_grad()
def start_lora(model: nn.Module, seed: int) -> None:
    """Fresh adapters, the same whatever the ranks: each takes its part of what one rank would draw. Meta tensors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear) and not module.lora_a.is_meta:
            bound = math.sqrt(3.0 / module.lora_a.shape[1])  # variance 1 / in_features
            whole = torch.empty(module.lora_a.shape).uniform_(-bound, bound, generator=generator)
            offset, shape = place(module.lora_a)
            local(module.lora_a).copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])
            local(module.lora_b).zero_()


def merge(base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The plain weight [out, in] an adapted layer amounts to."""
    return base + scale * (lora_b @ lora_a)


def peft_config(config: LoraConfig, base_model: str = "") -> dict[str, Any]:
    """`adapter_config.json` of published adapters."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
