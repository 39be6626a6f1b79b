"""The checkpoint a run starts from: a folder that learner and engines both read.

A randomly initialised model is written to the run's folder first, so that both sides start from the same bytes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ROOT
from cluster.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip


@dataclass
class ModelConfig:
    """Which policy."""

    path: str = ""
    """Folder of a Hugging Face checkpoint; for `init: random`, a folder with at least `config.json`."""
    init: str = "pretrained"
    """`pretrained`: the weights of `path`; `random`: fresh weights of that architecture, by the run's seed."""
    tokenizer: str = ""
    """Folder of the tokenizer, when it is not `path`."""


def resolve(path: str) -> Path:
    """A path of the configuration: absolute, or relative to the working directory, or to the checkout."""
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given.resolve()
    return (ROOT / given).resolve()


def prepare_model(config: ModelConfig, run_dir: Path, seed: int) -> str:
    """The folder to start from, with weights and tokenizer together."""
    source = resolve(config.path)
    tokenizer = resolve(config.tokenizer) if config.tokenizer else source
    if config.init == "pretrained" and tokenizer == source:
        return str(source)
    target = run_dir / "model"
    target.mkdir(parents=True, exist_ok=True)
    if config.init == "random":
        _write_random(source, target, seed)
    elif config.init == "pretrained":
        for file in source.iterdir():
            if file.is_file():
                shutil.copy2(file, target / file.name)
    else:
        raise UserError(f"model.init is {config.init!r}; it must be `pretrained` or `random`")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy2(tokenizer / name, target / name)
    return str(target)


def _write_random(source: Path, target: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (target / "model.safetensors").exists():
        return
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    model.save_pretrained(target)
