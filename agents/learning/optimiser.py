"""A set of parameters that is trained together: its AdamW, the norm of its gradient, its state.

Invariants: matrices are decayed, norms and biases are not; a parameter without a gradient counts as one with gradient 0, on every
rank; gradients of replicas are summed over ranks before they are measured; what is saved are whole CPU tensors by name, which load
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agents.learning.config import LearnerConfig
from agents.learning.shard import sum_gradients
from agents.learning.weights import Stacked, full, local, place


class Trained:
    """The parameters `named` and their optimiser. `sharded`: FSDP reduces their gradients. All ranks call its methods together."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        config: LearnerConfig,
        *,
        sharded: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.named = dict(named)
        self._sharded, self._group, self._clip = sharded, group, config.grad_clip
        decayed = [p for p in self.named.values() if p.ndim >= 2]
        kept = [p for p in self.named.values() if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.adam_eps,
        )

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """For whoever moves its state between devices."""
        return self._adam

    def set_rate(self, rate: float) -> None:
        for settings in self._adam.param_groups:
            settings["lr"] = rate

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=False)

    def gradient_norm(self) -> float:
        """Of the whole gradient, over all ranks. To be called once, after the last backward pass."""
        for p in self.named.values():
            if p.grad is None:  # nothing here had a gradient: the optimiser must still see a zero, on every rank
                p.grad = torch.zeros_like(p)
        if not self._sharded:
            sum_gradients(self.named.values(), self._group)
        norm = nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, norm: float) -> None:
        """One optimiser step; a gradient of more than `grad_clip` is scaled down to it."""
        if self._clip > 0 and norm > self._clip:
            for p in self.named.values():
                if p.grad is not None:
                    p.grad.mul_(self._clip / (norm + 1e-6))
        self._adam.step()

    # ---------------------------------------------------------------------------------------------------- state

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The parameters. A rank that only joins the gathering says `keep=False`, and drops each as soon as it is whole."""
        return _copies(self.named.items(), keep)

    def moments(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state, by parameter."""
        state = self._adam.state
        return {name: _copies(state[p].items(), keep) for name, p in self.named.items() if p in state}

    def check(self, saved: Mapping[str, Tensor] | Stacked) -> Stacked:
        """The saved parameters, ready to be loaded. Raises ValueError when they do not fit."""
        saved = saved if isinstance(saved, Stacked) else Stacked(saved)
        for name, p in self.named.items():
            if name not in saved or saved.shape(name) != tuple(p.shape):
                raise ValueError(unfit(name, p, saved.shape(name) if name in saved else None))
        return saved

    @torch.no_grad()
    def load(self, saved: Stacked, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of `weights` and `moments`: each rank reads its own part. Tensors laid out as the parameter are taken as they are."""
        for name, p in self.named.items():
            local(p).copy_(saved.block(name, *place(p)))
            kept = moments.get(name)
            self._adam.state.pop(p, None)
            if kept is not None:
                self._adam.state[p] = {k: _like(v, p) if v.shape == p.shape else v.clone() for k, v in kept.items()}

    def held(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """The optimiser's state where it lies, nothing gathered: tensors laid out as their parameter, by `<what>/<parameter>`, and what
        is no such tensor, by parameter and what."""
        laid_out: dict[str, Tensor] = {}
        beside: dict[str, dict[str, Tensor]] = {}
        for name, p in self.named.items():
            for what, value in self._adam.state.get(p, {}).items():
                if value.shape == p.shape:
                    laid_out[f"{what}/{name}"] = value
                else:
                    beside.setdefault(name, {})[what] = value.cpu()
        return laid_out, beside


def unfit(name: str, parameter: Tensor, found: tuple[int, ...] | None) -> str:
    """The line about a saved parameter of another shape, or that is not there."""
    return (
        f"the checkpoint does not fit the model: {name} is {tuple(parameter.shape)} here, {found or 'nothing'} there; use the same model"
        " and the same learner.lora and learner.critic settings as the run that wrote it"
    )


def _copies(tensors: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Tensor]:
    gathered = ((name, full(tensor)) for name, tensor in tensors)
    return {name: whole.to("cpu", copy=True) for name, whole in gathered if keep}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is laid out, of which this rank reads its part; one that is laid out so already is kept."""
    if isinstance(value, DTensor):
        return value
    laid_out = torch.empty_like(parameter, requires_grad=False)
    offset, shape = place(parameter)
    local(laid_out).copy_(value[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])
    return laid_out
