"""FSDP2 over a device mesh (gloo on CPU, NCCL on GPU), and the few collectives the learner needs.

Invariant: each function is the identity when torch.distributed is not initialised, so one process needs no special case.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from agents.learning.agreement import world_size as world_size
from agents.learning.model import PolicyModel


def default_mesh(device: torch.device) -> DeviceMesh:
    """A one-dimensional mesh over all ranks."""
    return init_device_mesh(device.type, (world_size(),))


def apply_fsdp(model: PolicyModel, mesh: DeviceMesh | None = None, device: torch.device | None = None) -> PolicyModel:
    """Shards the policy in place: each layer a unit, embeddings and head with the root. Every rank calls it.

    All ranks must hold the same weights, or none yet (`agents.learning.loading`, which says the `device`). bfloat16 arithmetic becomes
    FSDP's mixed precision: weights and their optimiser stay float32, are gathered in bfloat16, and gradients are reduced in float32.
    """
    mesh = mesh or default_mesh(device or model.device)
    policy = MixedPrecisionPolicy()
    if model.compute_dtype is not torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        model.autocast = False
    for layer in model.hf.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if model.value_head is not None:
        fully_shard(model.value_head, mesh=mesh)  # values stay float32
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def settle(model: torch.nn.Module) -> None:
    """After a forward pass without a backward one: gives back gathered weights, which an optimiser step would outdate."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def sum_over_ranks(
    values: Iterable[float] | Tensor, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[float]:
    """Element-wise float64 sums over ranks. A tensor may lie on the device already."""
    return _reduce(values, dist.ReduceOp.SUM, device, group)


def max_over_ranks(
    values: Iterable[float], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[float]:
    """Element-wise maxima over ranks."""
    return _reduce(values, dist.ReduceOp.MAX, device, group)


def union_over_ranks(names: Iterable[str], group: dist.ProcessGroup | None = None) -> list[str]:
    """Names that any rank has, sorted, so that all ranks reduce the same values in the same order."""
    found = set(names)
    if world_size(group) > 1:
        gathered: list[list[str]] = [[] for _ in range(world_size(group))]
        dist.all_gather_object(gathered, sorted(found), group=group)
        found.update(name for names_of_rank in gathered for name in names_of_rank)
    return sorted(found)


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Adds the gradients of unsharded replicas over ranks, in one buffer."""
    if world_size(group) == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        buffer = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(buffer, group=group)
        for grad, summed in zip(grads, buffer.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def gather_values(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """One-dimensional tensors of all ranks, end to end; lengths may differ."""
    if world_size(group) == 1:
        return values
    lengths = [int(n) for n in sum_over_ranks(_one_hot(len(values), group), values.device, group)]
    padded = torch.zeros(max(lengths), dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([g[:n] for g, n in zip(gathered, lengths, strict=True)])


def _one_hot(value: float, group: dist.ProcessGroup | None) -> list[float]:
    return [value if rank == dist.get_rank(group) else 0.0 for rank in range(world_size(group))]


def _reduce(
    values: Iterable[float] | Tensor, op: dist.ReduceOp, device: torch.device, group: dist.ProcessGroup | None
) -> list[float]:
    if isinstance(values, Tensor):
        tensor = values.to(device, torch.float64, copy=True)
    else:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    found: list[float] = tensor.tolist()  # the device is waited for once
    return found
