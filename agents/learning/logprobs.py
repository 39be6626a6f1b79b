"""Log-probabilities and entropies of tokens from hidden states, without a [tokens, vocab] matrix for the whole batch.

Invariants: at most `max_elements` float32 logits exist per block (a few such blocks at a time); gradients are exact;
results do not depend on the chunk size. The distribution is the one the sampler drew from: logits divided by the
sampling temperature of each token. Under autocast all three products (logits, and both gradients) are of its type, as autocast has it
for the first alone; what is summed up is float32. Axes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    temperature_N: Tensor,
    max_elements: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(logits / temperature), both [N], float32 (float64 for float64 input).

    Differentiable in hidden, weight and bias. When the logits fit one block, probabilities are kept for the backward
    pass; otherwise it recomputes them block by block.
    """
    num_vocab = weight_VD.shape[0]
    chunk = max(1, max_elements // num_vocab)
    keep = torch.is_grad_enabled() and len(target_N) <= chunk
    logprob_N, entropy_N = _TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, target_N, temperature_N, chunk, keep)
    return logprob_N, entropy_N


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits.div_(temperature[:, None].to(logits.dtype))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: Tensor,
        chunk: int, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtypes = (hidden.dtype, weight.dtype)
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype is torch.float32:
            hidden = hidden.to(torch.get_autocast_dtype(device))  # once, and not anew with each chunk and each pass
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        logprobs, entropies, normalisers, kept = [], [], [], []
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            logits = _scaled_logits(hidden[part], weight, bias, temperature[part])
            lse = logits.logsumexp(-1)
            logprobs.append(logits.gather(-1, target[part, None]).squeeze(-1) - lse)
            probs = (logits - lse[:, None]).exp_()
            entropies.append(lse - logits.mul_(probs).sum(-1))
            normalisers.append(lse)
            if keep:
                kept.append(probs)
        logprob, entropy, lse = _join(logprobs, hidden), _join(entropies, hidden), _join(normalisers, hidden)
        ctx.chunk, ctx.dtypes = chunk, dtypes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, temperature, lse, entropy, kept[0] if kept else None)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, temperature, lse, entropy, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=ctx.dtypes[0]) if needs_hidden else None
        # Sums over chunks are kept in at least float32.
        wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        grad_bias = (
            torch.zeros(len(weight), dtype=wide, device=weight.device) if needs_bias and bias is not None else None
        )
        for start in range(0, len(target) if grad_logprob is not None or grad_entropy is not None else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            if kept is not None:
                probs = kept
            else:
                logits = _scaled_logits(hidden[part], weight, bias, temperature[part])
                probs = logits.sub_(lse[part, None]).exp_()
            grad = torch.zeros_like(probs) if grad_logprob is None else probs * -grad_logprob[part, None]
            if grad_logprob is not None:
                grad.scatter_add_(-1, target[part, None], grad_logprob[part, None])
            if grad_entropy is not None:
                # dH/dz_j = -p_j (log p_j + H); p log p is 0 where p is 0
                log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
                grad -= grad_entropy[part, None] * probs * (log_probs + entropy[part, None])
            grad = grad.div_(temperature[part, None].to(grad.dtype)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=wide)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(ctx.dtypes[1]),
            None if grad_bias is None else grad_bias.to(ctx.dtypes[1]),
            None, None, None, None,
        )  # fmt: skip


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32, device=like.device)
