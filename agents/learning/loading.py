"""A model directory onto several ranks, of which none ever holds a whole model.

The model is made without memory (on torch's meta device), cut up by FSDP2, and only then given storage; each rank reads its own
rows of every weight from the mapped files. Invariant: what comes out is what `load_model` and `apply_fsdp` make, weight by weight, on
any number of ranks, with adapters and value heads that start as on one rank.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from agents.learning import attention
from agents.learning.config import CriticConfig, LearnerConfig
from agents.learning.critic import as_critic
from agents.learning.lora import start_lora
from agents.learning.model import ModelError, PolicyModel, attention_name, check_model_dir, check_names, first_line
from agents.learning.shard import apply_fsdp
from agents.learning.weights import local, open_weights, place


def load_sharded(
    path: str | Path,
    config: LearnerConfig | None = None,
    device: str | torch.device = "cpu",
    *,
    critic: bool = False,
    mesh: DeviceMesh | None = None,
) -> PolicyModel:
    """`apply_fsdp(load_model(...))`, or with `critic` the same of `load_critic`. Every rank calls it and must see the folder.

    Raises ModelError as `load_model` does, and for a model whose tables (buffers) are neither in its files nor known how to make.
    """
    config, path, device = config or LearnerConfig(), Path(path), torch.device(device)
    if critic:
        config = replace(config, critic=CriticConfig(kind="head"))
    check_model_dir(path)
    hf = _without_memory(path, config, device)
    check_names(path, hf)
    model = PolicyModel(hf, config, device)
    if critic:
        as_critic(model)
    apply_fsdp(model, mesh, device)
    _give_memory(model, device)
    _read(path, model)
    start_lora(model, config.seed)
    if model.value_head is not None:
        for p in model.value_head.parameters():
            local(p).zero_()
    return model


def _without_memory(path: Path, config: LearnerConfig, device: torch.device) -> Any:
    attention.register()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings,
                dtype=torch.float32,
                attn_implementation=attention_name(config, device),
                trust_remote_code=False,
            )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"{path}: the model does not load: {first_line(error)}") from error


def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Storage for what this rank holds. Weights that modules share stay shared, which `Module.to_empty` would end."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
        for name, table in module._buffers.items():
            if table is not None and table.is_meta:
                empty = torch.empty_like(table, device=device)
                module._buffers[name] = empty.fill_(math.nan) if empty.is_floating_point() else empty.fill_(-1)


@torch.no_grad()
def _read(path: Path, model: PolicyModel) -> None:
    """This rank's rows of every weight, and every table. Adapters are in no file."""
    with ExitStack() as stack:
        files = open_weights(path, stack)
        for name, p in model.hf.named_parameters():
            if ".lora_" in name:
                continue
            name = name.replace(".base.", ".")
            if files.shape(name) != tuple(p.shape):
                raise ModelError(
                    f"{path}: {name} is {files.shape(name)} in the file, config.json says {tuple(p.shape)}; copy the whole model again"
                )
            local(p).copy_(files.block(name, *place(p)))
        for name, module in model.hf.named_modules():
            tables = {n: b for n, b in module.named_buffers(recurse=False) if b is not None}
            for kind, table in tables.items():
                if f"{name}.{kind}" in files:
                    table.copy_(files[f"{name}.{kind}"])
            if any(_unset(t) for t in tables.values()) and not list(module.parameters(recurse=False)):
                model.hf._init_weights(module)  # transformers' own way to make positions and the like
            strange = next((n for n, t in tables.items() if _unset(t)), None)
            if strange is not None:
                raise ModelError(
                    f"{path}: models of type {model.hf.config.model_type} cannot be loaded in parts: nothing says what {name}.{strange}"
                    " is; set train.num_workers=1, or choose another architecture"
                )


def _unset(table: torch.Tensor) -> bool:
    return table.numel() > 0 and bool((table.isnan() if table.is_floating_point() else table == -1).all())
