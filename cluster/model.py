"""The checkpoint a run starts from: a folder that learner and engines both read, and what its configuration says of sizes.

A randomly initialised model is written to the run's folder first, so that both sides start from the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    shape: str = ""
    """A `config.json` to plan with while `path` is not there: `--dry-run` knows sizes by it, and no run reads it."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, from its configuration alone. Exact for the dense and sparse Qwen families, Llama and Mistral."""

    architecture: str
    """transformers' `model_type`."""
    num_parameters: int
    kv_values_per_token: int
    """Keys and values of all layers for one token."""
    max_positions: int
    """Longest sequence; 0: the configuration does not say."""
    num_layers: int = 0
    hidden: int = 0
    """Width of the residual stream."""
    query: int = 0
    """Width of all query heads together."""
    key: int = 0
    """Width of the keys of a layer, which is that of its values."""
    num_kv_heads: int = 0
    inner: int = 0
    """Width within the feed-forward part, of all experts that one token goes through together."""
    experts_per_token: int = 0
    """0: dense."""
    vocab: int = 0
    tied: bool = False
    """Whether the head is the embedding."""
    layer_parameters: int = 0
    """Of the largest layer."""
    linear_in_out: tuple[tuple[str, int, int], ...] = ()
    """(name, inputs, outputs) of the linear layers that an adapter may sit on, of one layer; those of experts are not among them."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape of a `config.json`."""
        text: Mapping[str, Any] = config.get("text_config") or config
        kind = str(text.get("model_type") or config.get("model_type") or "unknown")

        def number(*keys: str, default: int = 0) -> int:
            return next((text[k] for k in keys if isinstance(text.get(k), int)), default)

        hidden, layers, vocab = number("hidden_size"), number("num_hidden_layers"), number("vocab_size")
        heads = number("num_attention_heads", default=1)
        head_dim = number("head_dim") or hidden // max(1, heads)
        kv_heads = number("num_key_value_heads", default=heads)
        query, key = heads * head_dim, kv_heads * head_dim
        width = number("intermediate_size", default=4 * hidden)
        experts = number("num_experts", "n_routed_experts", "num_local_experts")
        narrow = number("moe_intermediate_size", "intermediate_size")
        shared = number("shared_expert_intermediate_size")
        chosen = number("num_experts_per_tok", default=1) if experts else 0
        # The gate of a shared expert is a vector beside its three matrices.
        sparse = experts * (3 * hidden * narrow + hidden) + 3 * hidden * shared + (hidden if shared else 0)
        every, plain = number("decoder_sparse_step", default=1) or 1, text.get("mlp_only_layers") or ()
        num_sparse = sum(bool(experts) and i not in plain and (i + 1) % every == 0 for i in range(layers))
        # Biases of queries, keys and values: Qwen2 has them and its configuration does not say so.
        biased = kind.startswith("qwen2") or bool(text.get("attention_bias"))
        biases = (query + 2 * key if biased else 0) + (hidden if text.get("attention_bias") else 0)
        norms = 2 * hidden + (2 * head_dim if kind.startswith("qwen3") else 0)
        attention = hidden * (2 * query + 2 * key) + biases + norms
        dense = 3 * hidden * width
        tied = bool(text.get("tie_word_embeddings"))
        linear: tuple[tuple[str, int, int], ...] = (
            ("q_proj", hidden, query),
            ("k_proj", hidden, key),
            ("v_proj", hidden, key),
            ("o_proj", query, hidden),
        )
        if not experts:
            linear += (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden))
        return cls(
            kind,
            layers * attention
            + num_sparse * sparse
            + (layers - num_sparse) * dense
            + vocab * hidden * (2 - tied)
            + hidden,
            2 * layers * key,
            number("max_position_embeddings"),
            num_layers=layers,
            hidden=hidden,
            query=query,
            key=key,
            num_kv_heads=kv_heads,
            inner=max(chosen * narrow + shared if num_sparse else 0, width if num_sparse < layers else 0),
            experts_per_token=chosen if num_sparse else 0,
            vocab=vocab,
            tied=tied,
            layer_parameters=attention
            + (max(sparse, dense) if 0 < num_sparse < layers else sparse if num_sparse else dense),
            linear_in_out=linear,
        )


def model_shape(config: ModelConfig) -> ModelShape | None:
    """The shape of the policy, or, while its folder is not there, the one to plan with; None when neither is known."""
    for path in (resolve(config.path) / "config.json" if config.path else None, resolve(config.shape)):
        if path is not None and path.is_file():
            try:
                return ModelShape.of(read_json(path, "the configuration of the model"))
            except UserError:
                return None  # what is wrong with it, the check of the model says
    return None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name} ({what}); give a whole Hugging Face folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} ({what}) cannot be read: {error}; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} ({what}) is not a JSON object; copy it again")
    return found


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
