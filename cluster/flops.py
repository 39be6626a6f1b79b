"""Floating-point operations of a training step, and the most that cards can do: together, model FLOPs utilisation (MFU).

Invariants: plain arithmetic on a `config.json`, standard library only; only what the mathematics of the model needs is counted
(nothing for padding, recomputed layers or chunks of the head computed twice, half of a causal attention), so MFU can only be
understated by what an implementation does on top. A card that is not in the table has no peak, and then there is no MFU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PEAK_TFLOPS = {
    "A10": 125.0, "A30": 165.0, "A40": 149.7, "A100": 312.0, "RTX A6000": 154.8,
    "L4": 121.0, "L40": 181.0, "L40S": 362.0, "RTX 3090": 71.0, "RTX 4090": 165.2,
    "H20": 148.0, "H100": 989.4, "H100 NVL": 835.0, "H100 PCIE": 756.0, "H800": 989.4, "GH200": 989.4,
    "H200": 989.4, "H200 NVL": 835.0, "B200": 2250.0,
}  # fmt: skip
"""Dense bfloat16 matrix products with float32 sums, 10^12 operations per second, of the vendor's data sheets (where one gives the rate
with structured sparsity alone, half of it). What a card reaches in practice is less."""


def peak_tflops(card: str) -> float | None:
    """The peak of a card by its driver's name, such as `NVIDIA H100 80GB HBM3`; None when it is not in the table."""
    words = " ".join(re.split(r"[\s-]+", card.upper()))
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", words)]
    if "PCIE" in words and "H100" in words:
        found.append("H100 PCIE")  # the name has its memory in between: H100 80GB PCIe
    return PEAK_TFLOPS[max(found, key=len)] if found else None


@dataclass(frozen=True)
class Decoder:
    """What a dense decoder (Qwen2, Qwen3, Llama) multiplies by, from its configuration."""

    body_weights: int
    """Entries of the matrices of all layers: every token passes through them. The embedding is a look-up and counts nothing."""
    head_weights: int
    """Entries of the output head: only tokens whose log-probability is wanted pass through it, tied or not."""
    attention_width: int
    """Layers x heads x head dimension."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Decoder:
        """From a `config.json`. Raises ValueError for experts, whose count per token this arithmetic does not know."""
        text: Mapping[str, Any] = config.get("text_config") or config
        if text.get("num_experts") or text.get("n_routed_experts") or text.get("num_local_experts"):
            raise ValueError("operations of a mixture of experts are not counted here; give a dense decoder")
        hidden, layers, heads = (int(text[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        head_dim = int(text.get("head_dim") or hidden // heads)
        kv_heads = int(text.get("num_key_value_heads") or heads)
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            layers * (attention + 3 * hidden * int(text["intermediate_size"])),
            hidden * int(text["vocab_size"]),
            layers * heads * head_dim,
        )

    def training_flops(self, lengths: Iterable[int], trained_tokens: int) -> float:
        """Of one forward and backward pass over sequences of these lengths, of whose tokens `trained_tokens` have a loss.

        A product with a matrix of N entries takes 2 N operations per token forwards and 4 N backwards: 6 N. Scores and
        weighted values take 4 D per pair of tokens forwards (D: `attention_width`) and twice that backwards; a causal
        sequence of T tokens has T^2 / 2 pairs, so 6 D T^2.
        """
        lengths = list(lengths)
        products = self.body_weights * sum(lengths) + self.head_weights * trained_tokens
        return 6.0 * products + 6.0 * self.attention_width * sum(t * t for t in lengths)


def mfu(flops: float, seconds: float, card: str, num_cards: int = 1) -> float | None:
    """Share of the peak that was used; None when the card's peak is not known."""
    peak = peak_tflops(card)
    return None if peak is None else flops / (seconds * peak * 1e12 * num_cards)
