"""Loading new weights into a model that vLLM runs, a piece at a time.

Layer-wise, because on CPU the linear layers are packed after loading and their plain parameters are gone. Invariants: a
layer keeps its old weights until all of its new ones are there; `abort` leaves a model that can be loaded again, and, if
nothing was loaded, one that computes as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cluster.vllm.expected import TIED_NAME, optional_names

_Pairs = list[tuple[torch.nn.Module, torch.nn.Module]]


class Reload:
    """One update of a model: `begin`, `load` as often as pieces come, then `finish` or `abort`."""

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._tied_head = bool(optional_names(model_config.hf_config))
        self._tied: _Pairs = []
        self._kernels: list[tuple[Any, Any]] = []
        self._active = self._loaded = False

    def begin(self) -> None:
        self.abort()
        self._tied = _tied_modules(self._model)
        self._kernels = _forget_packed_experts(self._model)
        with torch.no_grad():
            initialize_layerwise_reload(self._model)
        self._active, self._loaded = True, False

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Some of the checkpoint's tensors, by their names there. They may be kept until their layer is whole."""
        if not self._active:
            raise RuntimeError("weights came before the update was started")
        self._loaded = True
        kept = ((name, tensor) for name, tensor in weights if not (self._tied_head and name == TIED_NAME))
        with torch.no_grad(), disable_mtp_completeness_check():
            self._model.load_weights(kept)

    def finish(self) -> None:
        if not self._loaded:
            raise RuntimeError("no weights were received")
        self._close()

    def abort(self) -> None:
        if not self._active:
            return
        loaded = self._loaded
        self._close()
        if not loaded:
            for method, kernel in self._kernels:
                method.moe_kernel = kernel

    def _close(self) -> None:
        self._active = self._loaded = False
        with torch.no_grad():
            finalize_layerwise_reload(self._model, self._model_config)
            _renew_tied(self._tied)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


def _tied_modules(model: torch.nn.Module) -> _Pairs:
    """Pairs (owner, follower) of modules that share one weight, as embedding and output matrix do."""
    owners: dict[int, torch.nn.Module] = {}
    pairs: _Pairs = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.numel():
            continue
        owner = owners.setdefault(id(weight), module)
        if owner is not module:
            pairs.append((owner, module))
    return pairs


def _renew_tied(pairs: _Pairs) -> None:
    """Give followers the owner's new weight and let them pack it again.

    The layer-wise reload works on layers that receive weights. A tied output matrix receives none, and on CPU it
    computes with a packed copy of its own, which would silently stay that of the old weights.
    """
    for owner, follower in pairs:
        follower.weight = owner.weight
        quant_method = getattr(follower, "quant_method", None)
        if quant_method is not None and owner.weight.device.type == "cpu":
            quant_method.process_weights_after_loading(follower)


def _forget_packed_experts(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Let the layers of a mixture of experts pack what they are about to load as they did at the start. Returns what was forgotten.

    vLLM takes a layer that has its kernel for one whose weights need no packing any more. On CPU they do: the packed
    form of the old weights would be filled with plain new ones, which the kernel reads in another order.
    """
    forgotten = []
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        experts = getattr(module, "w13_weight", None)
        if method is not None and experts is not None and experts.device.type == "cpu":
            forgotten.append((method, getattr(method, "moe_kernel", None)))
            method.moe_kernel = None
    return forgotten
