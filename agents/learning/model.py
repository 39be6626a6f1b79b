"""The policy as the learner holds it: a Hugging Face causal language model that returns log-probs of chosen tokens.

Invariants: weights are float32 (bfloat16 is arithmetic only, by autocast or FSDP's mixed precision), so small updates are
not lost; there is no dropout, so two passes agree; only safetensors are read, never pickles; published names and shapes
are those of the checkpoint, whatever the learner does inside (adapters, shards).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from agents.learning import attention
from agents.learning.agreement import in_step
from agents.learning.config import LearnerConfig
from agents.learning.context import Context
from agents.learning.logprobs import token_logprobs
from agents.learning.lora import LoraLinear, apply_lora, merge
from agents.learning.packing import MicroBatch
from agents.learning.weights import full, unstack

BLOCK = 128
"""Side of FlexAttention's blocks."""


class ModelError(ValueError):
    """A model directory cannot be used; the message is one line and says how to mend it."""


class PolicyModel(nn.Module):
    """A causal language model whose forward pass gives log-probs and entropies of the trained tokens of a micro-batch.

    The head runs inside `forward`, on gathered positions and in chunks, so that it works under FSDP and a
    [tokens, vocab] matrix never exists for the whole batch.
    """

    def __init__(self, hf: nn.Module, config: LearnerConfig | None = None, device: torch.device | None = None) -> None:
        """`device`: where the weights will be, when they are not anywhere yet."""
        super().__init__()
        config = config or LearnerConfig()
        self.hf = hf
        self.lora = config.lora
        self.logit_elements = config.logit_elements
        self.compute_dtype = _compute_dtype(config, device or self.device)
        self.autocast = self.compute_dtype is not torch.float32
        """Turned off when FSDP's mixed precision does the casting."""
        _drop_dropout(hf)
        if getattr(hf.config, "final_logit_softcapping", None):
            raise ModelError("models with final_logit_softcapping are not supported; choose a model without it")
        if config.lora.rank > 0:
            apply_lora(hf, config.lora, config.seed)
        if config.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        hf.train()
        self.value_head: nn.Linear | None = None
        """Of a critic: hidden state to value. float32 and never published; 0 at the start, so the same on every rank."""
        if config.critic.kind == "head":
            self.value_head = nn.Linear(hf.get_output_embeddings().weight.shape[1], 1, device=self.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def packs(self) -> bool:
        """True when the attention implementation takes sequences end to end by their bounds."""
        name = self.hf.config._attn_implementation or ""
        return name == attention.NAME or "flash" in name

    @property
    def shares(self) -> bool:
        """True when a row may hold a trie: the model takes positions, and all its layers a mask that says who sees whom."""
        takes_positions = "position_ids" in inspect.signature(self.hf.base_model.forward).parameters
        return takes_positions and not self.packs and self._layers <= {"full_attention"}

    @property
    def _layers(self) -> set[str]:
        """Kinds of layers, as transformers names them."""
        config = self.hf.config.get_text_config()
        sliding = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
        return set(getattr(config, "layer_types", None) or sliding)

    @property
    def flex(self) -> bool:
        """True when attention skips what a block mask rules out (FlexAttention, on GPUs)."""
        return self.hf.config._attn_implementation == "flex_attention"

    @property
    def attention_cost(self) -> float:
        """An entry of a dense L x L attention, in units of what the rest of a position costs: about 24 D^2 floating point
        operations in the weights of a layer of width D, and 4 D in each entry of its attention."""
        return 0.0 if self.flex else 1 / (6 * self.hf.config.get_text_config().hidden_size)

    def layout(self, name: str) -> str:
        """The layout of micro-batches that `learner.layout` means for this model. Raises ModelError for one it cannot have."""
        packs = self.packs and self._layers <= {"full_attention", "sliding_attention"}
        if name == "auto":
            return "packed" if packs else "shared" if self.shares else "padded"
        if name == "packed" and self.packs and not packs:
            raise ModelError("learner.layout=packed needs layers that are all attention: set learner.layout=auto")
        if name == "shared" and not self.shares:
            raise ModelError(
                "learner.layout=shared needs attention that takes any mask, and layers that all look back without a window:"
                " set learner.layout=auto"
            )
        return name

    def forward(
        self,
        batch: MicroBatch,
        *,
        logprobs: bool = True,
        values: bool = False,
        detach: bool = False,
        context: Context | None = None,
    ) -> tuple[Tensor, ...]:
        """Of the trained tokens, float32 [N] each: log-probs at the sampling temperature and entropies, then with `values`
        the value of the state before each token. `detach`: values send no gradient into the hidden states. `context`: the ranks
        that share the row of which `batch` is this one's part.
        """
        device = batch.token_ids.device
        precision: Any = torch.autocast(device.type, self.compute_dtype) if self.autocast else nullcontext()
        with precision:
            kwargs: dict[str, Any] = {}
            if self.packs and batch.bounds is not None:
                kwargs = {
                    "position_ids": batch.position_ids,
                    "cu_seq_lens_q": batch.bounds, "cu_seq_lens_k": batch.bounds,
                    "max_length_q": batch.longest, "max_length_k": batch.longest,
                    **({} if context is None else {"context": context}),
                }  # fmt: skip
            elif batch.packed:
                kwargs = {"position_ids": batch.position_ids, "attention_mask": self._mask(batch)}
            hidden = self.hf.base_model(input_ids=batch.token_ids, use_cache=False, **kwargs).last_hidden_state
            chosen = hidden.flatten(0, 1).index_select(0, batch.source)
            found: list[Tensor] = []
            if logprobs:
                head = self.hf.get_output_embeddings()
                bias = getattr(head, "bias", None)
                found += token_logprobs(
                    chosen, head.weight, bias, batch.target, batch.temperatures, self.logit_elements
                )
        if values and self.value_head is not None:
            states = chosen.detach() if detach else chosen
            found.append(self.value_head(states.float()).sum(-1))  # of one: FSDP warns of a view
        if not len(batch.target) and not detach:  # a dummy pass: hidden states must still have a gradient path
            found = [x + hidden.sum().float() * 0 for x in found]
        return tuple(found)

    def _mask(self, batch: MicroBatch) -> Any:
        """What attention takes for a mask: a BlockMask, or bool [B, 1, L, L]."""
        if self.flex:
            return block_mask(batch)
        mask, dtype = batch.attention_mask(), self.compute_dtype
        if self.hf.config._attn_implementation == "sdpa":
            return mask
        # Attention written out in full adds its mask to the scores.
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def block_mask(batch: MicroBatch) -> Any:
    """The micro-batch's mask as FlexAttention's BlockMask: blocks of 128 x 128 entries that nobody may see are not computed.

    Made from the least and the greatest end in each block of columns; torch's `create_block_mask` finds the same blocks by way of
    all L x L entries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = batch.ends
    rows, columns = ends.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < ends[b, kv])

    missing = -columns % BLOCK
    first = torch.arange(0, columns, BLOCK, device=ends.device)[:, None]  # of queries, down the table
    least, greatest = (pad(ends, (0, missing), value=v).view(rows, 1, -1, BLOCK) for v in (columns + BLOCK, 0))
    before = first > first.T
    # Below the diagonal a block's columns all come before its queries. On it every token sees itself, and the first not the second.
    full = before & (least.amin(-1)[:, :, None] >= first + BLOCK)
    partial = (before & (greatest.amax(-1)[:, :, None] > first) & ~full) | (first == first.T)
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(columns, columns)
    )


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Of a table of blocks, bool [..., queries, columns]: how many each row has, and which, in front of the others."""
    order = table.byte().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.to(torch.int32)


def load_model(
    path: str | Path, config: LearnerConfig | None = None, device: str | torch.device = "cpu"
) -> PolicyModel:
    """The policy of a model directory (config.json, *.safetensors, tokenizer.json).

    Raises ModelError, one line, when the directory is missing, a weight file is damaged or incomplete, the tokenizer has more
    tokens than the model has embeddings, or weights would be published under other names than the checkpoint's. Never touches
    the network and never runs code from the directory.
    """
    config = config or LearnerConfig()
    path = Path(path)
    check_model_dir(path)
    attention.register()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, attn_implementation=attention_name(config, torch.device(device)), local_files_only=True,
            use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"{path}: the model does not load: {first_line(error)}") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(f"{path}: {len(names)} weight(s) are missing, first {names[0]}; copy the whole model again")
    check_names(path, hf)
    hf.to(device)
    return PolicyModel(hf, config)


def attention_name(config: LearnerConfig, device: torch.device) -> str:
    """What `learner.attention` means on that device, as transformers names it."""
    if config.context_parallel > 1:
        return attention.NAME
    if config.attention != "auto":
        return config.attention
    return attention.NAME if attention.has_kernel(device) else "sdpa"


def check_model_dir(path: str | Path) -> None:
    """Raises ModelError for what is wrong with a model directory; reads headers only, no weights."""
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"{path}: no such model directory; give a folder with config.json and *.safetensors")
    model_config = _read_json(path / "config.json")
    if model_config is None:
        raise ModelError(f"{path}: config.json is missing; give a folder with config.json and *.safetensors")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path}: no *.safetensors file; convert the weights to safetensors, pickles are not read")
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                list(opened.keys())
        except Exception as error:  # safetensors raises its own class, and OSError
            raise ModelError(
                f"{file}: the weight file is damaged ({first_line(error)}); copy it again, or take an earlier checkpoint"
            ) from error
    rows = model_config.get("vocab_size") or (model_config.get("text_config") or {}).get("vocab_size")
    tokenizer = _read_json(path / "tokenizer.json")
    if tokenizer is not None and rows is not None:
        num_ids = _num_token_ids(tokenizer)
        if num_ids > rows:
            raise ModelError(
                f"{path}: tokenizer does not fit the model: it has ids up to {num_ids - 1}, the model {rows} embeddings;"
                " use the tokenizer the model was trained with"
            )


def named_weights_for_publish(model: PolicyModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) in the checkpoint's own names: adapters merged, shards gathered, experts one by one, a tied
    head left out.

    Under FSDP every rank must run through the whole iterator (each step gathers); what one of them raises is raised on all, as
    GatherError. Tensors are detached and share memory with the model where nothing had to be computed: copy before changing the model.
    """
    return in_step(_whole_weights(model, dtype), next(model.hf.parameters()))


def adapters_for_publish(model: PolicyModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of the adapters alone, as PEFT names them; likewise."""
    return in_step(_whole_adapters(model, dtype), next(model.hf.parameters()))


def _whole_weights(model: PolicyModel, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    adapted = {
        f"{name}.base.weight": module for name, module in model.hf.named_modules() if isinstance(module, LoraLinear)
    }
    for name, parameter in model.hf.named_parameters():  # yields shared parameters once
        if ".lora_" in name or _is_tied_head(model.hf, name):
            continue
        weight = full(parameter)
        if name in adapted:
            module = adapted[name]
            weight = merge(weight, full(module.lora_a), full(module.lora_b), module.scale)
        for own_name, part in unstack(name.replace(".base.", "."), weight):
            yield own_name, part if dtype is None else part.to(dtype)


def _whole_adapters(model: PolicyModel, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.hf.named_modules():
        if isinstance(module, LoraLinear):
            for kind, weight in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
                whole = full(weight)
                yield f"base_model.model.{name}.{kind}.weight", whole if dtype is None else whole.to(dtype)


def check_names(path: Path, hf: nn.Module) -> None:
    """Engines and checkpoints know weights by the names of the model directory; models whose naming we cannot restore are refused.

    What the directory has beyond the model (parts that are not trained) is no matter.
    """
    there: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            there.update(opened.keys())
    named = ((n, p.detach()) for n, p in hf.named_parameters() if not _is_tied_head(hf, n))
    ours = {own_name: None for name, weight in named for own_name, _ in unstack(name, weight)}
    strange = [name for name in ours if name not in there]
    if strange:
        beside = next(iter(sorted(n for n in there - ours.keys() if not _is_tied_head(hf, n))), "nothing like it")
        raise ModelError(
            f"{path}: models of type {hf.config.model_type} cannot be trained yet: {len(strange)} weight(s) would be published under "
            f"names that the model directory does not have, first {strange[0]} (there: {beside}); choose another architecture"
        )


def _is_tied_head(hf: nn.Module, name: str) -> bool:
    """A head that shares the embedding's weight has no name of its own, whether a file holds it or not."""
    return name == "lm_head.weight" and bool(getattr(hf.config, "tie_word_embeddings", False))


def _compute_dtype(config: LearnerConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def _drop_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not readable as JSON ({first_line(error)}); copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; copy it again")
    return value


def _num_token_ids(tokenizer: dict[str, Any]) -> int:
    """One more than the largest id of a tokenizer.json."""
    model = tokenizer.get("model") or {}
    vocab = model.get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [added["id"] for added in tokenizer.get("added_tokens") or [] if "id" in added]
    return max((i for i in ids if isinstance(i, int)), default=-1) + 1


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
