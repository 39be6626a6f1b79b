"""What a learner and an engine hold in the memory of their device, part by part, in bytes.

Invariants: plain arithmetic on a `ModelShape` and the configuration, nothing is read or started. Counts of weights, gradients, moments
and keys and values are exact; activations follow what torch saves for the backward pass, operation by operation, and are checked
against its own memory tracker (`benchmarks/learner_memory.py`); what a library keeps for itself is rounded up. Nothing here was
measured on a GPU. Letters: D hidden, Q and K the widths of queries and keys, F inner, V vocabulary, L layers, N tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.model import ModelShape

if TYPE_CHECKING:
    from agents.learning.config import LearnerConfig, LoraConfig
    from cluster.vllm.options import EngineConfig

Bytes = dict[str, float]

GIB = 1 << 30
PROCESS_GIB = 1.0
"""Of a process on a GPU: CUDA's context, the communicator's buffers, and what the allocator cannot use."""
ASLEEP_GIB = 1.5
"""What an engine keeps on a GPU while it sleeps: its process, and captured graphs, which are not in the pool that is given back."""
ENGINE_TOKENS = 8192
"""Tokens of one engine step where `engine.max_num_batched_tokens` says nothing."""


@dataclass(frozen=True)
class LearnerBytes:
    """One learner process."""

    held: Bytes
    """Between optimiser steps: weights, gradients, moments, and models beside the policy."""
    step: Bytes
    """What the highest moment of an optimiser step adds."""
    kept: Bytes = field(default_factory=dict)
    """Of `held`, what stays where it is while samplers have the device and the learner does not give its memory back."""
    passes: tuple[Bytes, ...] = ()
    """What a forward and backward pass adds at its fullest moments: `step` is one of these, or the optimiser's."""

    @property
    def training(self) -> Bytes:
        return self.held | self.step


def learner_bytes(config: LearnerConfig, shape: ModelShape, *, ranks: int, tokens: int, on_gpu: bool) -> LearnerBytes:
    """A learner of `ranks` processes. `tokens`: most that one pass computes (before context parallelism)."""
    ranks = max(1, ranks)
    adapters = adapter_parameters(config.lora, shape)
    trained = adapters or shape.num_parameters
    held: Bytes = {"weights": 4 * (shape.num_parameters + adapters) / ranks}
    held |= {"gradients": 4 * trained / ranks, "moments": 8 * trained / ranks}
    if config.critic.kind == "model":
        head = 0 if shape.tied else shape.vocab * shape.hidden
        whole = shape.num_parameters - head
        held["value model"] = (16 * adapters + 4 * whole if adapters else 16 * whole) / ranks
    if config.loss.kl_coef > 0:
        held["reference"] = 4 * shape.num_parameters / ranks
    one = _Pass(config, shape, ranks, max(1, tokens // config.context_parallel), bool(adapters), on_gpu)
    passes = (one.forward(), one.head(), one.backward(), one.end())
    # On GPUs AdamW works on all parameters at once, elsewhere on one after the other.
    at_once = trained if on_gpu else min(trained, largest_tensor(shape))
    step = max((*passes, {"optimiser's step": 4 * at_once / ranks}), key=total)
    kept = {k: v for k, v in held.items() if k != "gradients"}
    return LearnerBytes(held, {k: v for k, v in step.items() if v}, kept, passes)


@dataclass(frozen=True)
class _Pass:
    """A forward and backward pass over N tokens, at the moments when most memory can be taken."""

    config: LearnerConfig
    shape: ModelShape
    ranks: int
    tokens: int
    frozen: bool
    """Only adapters are trained: there are no gradients of weights."""
    on_gpu: bool

    @property
    def wide(self) -> bool:
        """float32 arithmetic."""
        return self.config.dtype == "float32" or (self.config.dtype == "auto" and not self.on_gpu)

    @property
    def autocast(self) -> bool:
        """bfloat16 by autocast, with float32 weights and residual stream; several processes have FSDP's mixed precision instead."""
        return not self.wide and self.ranks == 1

    def forward(self) -> Bytes:
        """As the forward pass ends: everything is saved, autocast still has its copies, and the head works on its logits."""
        return self._casts(whole=True) | self._gathered() | self._read(self._logits())

    def head(self) -> Bytes:
        """As the backward pass begins. With checkpointing nothing refers to autocast's copies any more."""
        casts = {} if self.config.gradient_checkpointing else self._casts(whole=True)
        gradient = 0 if self.frozen else (4 + self._word) * self.shape.vocab * self.shape.hidden
        return casts | self._gathered() | self._read(self._logits() + gradient)

    def _read(self, logits: float) -> Bytes:
        return {"activations": self._saved() + self.tokens * self._ends() + self._mask(), "logits": logits}

    def backward(self) -> Bytes:
        """In a layer: what is saved, what of this layer is computed anew, and gradients on their way."""
        again = self.tokens * self._layer() if self.config.gradient_checkpointing else 0
        flowing = self.tokens * self._word * (3 * self.shape.inner + self.shape.experts_per_token * self.shape.hidden)
        whole = not self.config.gradient_checkpointing
        if whole:  # the last norm's, which checkpointing does not know
            flowing += self.tokens * 10 * self.shape.hidden
        # A head that is the embedding: autograd keeps its gradient until the embedding's own has come.
        held = 4 * self.shape.vocab * self.shape.hidden * (self.shape.tied and not self.frozen and self.ranks == 1)
        return self._casts(whole=whole) | self._gathered(layers=True) | {
            "activations": self._saved() + again + flowing + self._mask(), "gradient of the head": held,
        }  # fmt: skip

    def end(self) -> Bytes:
        """When the gradient of the embedding arrives: nothing is saved any more."""
        if self.frozen:
            return {}
        table = self.shape.vocab * self.shape.hidden
        # A head that is the embedding gets two gradients, which are added to a third.
        sums = (3 if self.shape.tied else 1) * 4 * table
        return self._gathered() | {"gradients of the embedding": sums}

    def _ends(self) -> int:
        """Bytes that the last norm, and the hidden states that are chosen for the head, take for a token with their gradients."""
        return (36 if self.wide or self.autocast else 20) * self.shape.hidden

    @property
    def _word(self) -> int:
        return 4 if self.wide else 2

    def _saved(self) -> float:
        """Of all layers: everything, or with checkpointing their inputs alone."""
        if self.config.gradient_checkpointing:
            stream = 4 if self.wide or self.autocast else 2
            return self.tokens * self.shape.num_layers * stream * self.shape.hidden
        return self.tokens * self.shape.num_layers * self._layer()

    def _layer(self) -> float:
        """Bytes that one layer saves for a token.

        Each of two norms saves its input in float32, what it normalised, and the inputs of the matrices behind it (under autocast
        each of those five makes its own copy). Attention saves queries, keys, values (repeated to as many heads) and its output
        twice, and norms of queries and keys their inputs. The feed-forward part saves gate, its activation, up and their product.
        """
        s, word = self.shape, self._word
        norms = 26 if self.autocast else 16
        attention = 10 * s.query * word / 2
        if s.architecture.startswith("qwen3"):
            attention += (4 + word) * (s.query + s.key)
        experts = 0.0
        if s.experts_per_token:  # a token's copy for each of its experts, and what each makes of it
            experts = word * s.experts_per_token * 3 * s.hidden
        return norms * s.hidden + attention + 4 * word * s.inner + experts

    def _casts(self, *, whole: bool) -> Bytes:
        """bfloat16 copies that autocast makes of float32 weights."""
        if not self.autocast:
            return {}
        s = self.shape
        table = s.vocab * s.hidden * (1 if s.tied else 2)
        return {"weights in bfloat16": 2 * (s.num_parameters - table if whole else s.layer_parameters)}

    def _gathered(self, *, layers: bool = False) -> Bytes:
        """FSDP's: embedding and head for the whole pass with their gradient, and of layers one in use, one on its way and a buffer."""
        if self.ranks == 1:
            return {}
        s = self.shape
        root = s.vocab * s.hidden * (1 if s.tied else 2)
        gradients = 0 if self.frozen else self._word * root + (2 * self._word + 4) * s.layer_parameters * layers
        return {"gathered weights": self._word * (root + 3 * s.layer_parameters) + gradients}

    def _logits(self) -> float:
        """Blocks of logits and what is made of them, and the head in the logits' type."""
        s = self.shape
        block = min(self.config.logit_elements, self.tokens * s.vocab)
        table = s.vocab * s.hidden
        return 12 * block + (2 * table if self.autocast else 0)

    def _mask(self) -> float:
        """Attention that takes a dense mask: true or false of every pair, and the same as a number. FlexAttention has a table of blocks."""
        config = self.config
        if config.attention == "flex_attention" and config.layout != "padded":
            blocks = -(-min(self.tokens, config.max_tokens_per_microbatch) // 128)
            return 64.0 * blocks**2  # its four lists of blocks, and what they are sorted from
        dense = config.attention in ("sdpa", "eager") or (config.attention == "auto" and not self.on_gpu)
        if not dense or config.layout == "padded":
            return 0.0
        return (1 + self._word) * min(self.tokens, config.max_tokens_per_microbatch) ** 2


def adapter_parameters(lora: LoraConfig, shape: ModelShape) -> int:
    """Of LoRA on its target layers; 0 without adapters. Adapters on experts are not counted: there are none."""
    each = sum(inputs + outputs for name, inputs, outputs in shape.linear_in_out if name in lora.targets)
    return lora.rank * each * shape.num_layers


def largest_tensor(shape: ModelShape) -> int:
    """Entries of the largest weight: a table of the vocabulary, or the stacked experts of a layer."""
    stacked = 2 * shape.layer_parameters // 3 if shape.experts_per_token else 0
    return max(shape.vocab * shape.hidden, stacked)


def kv_bytes(shape: ModelShape, itemsize: int, devices: int = 1) -> int:
    """Keys and values of one token on one device of an engine. Beyond one head a device, heads are held several times."""
    if not shape.num_kv_heads:
        return shape.kv_values_per_token * itemsize // devices
    heads = max(1, shape.num_kv_heads // devices)
    return shape.kv_values_per_token // shape.num_kv_heads * heads * itemsize


def engine_bytes(engine: EngineConfig, shape: ModelShape, itemsize: int) -> Bytes:
    """What each device of an engine holds beside keys and values: weights, and the room for one step."""
    devices, tokens = engine.tensor_parallel, engine.max_num_batched_tokens or ENGINE_TOKENS
    layer = tokens * itemsize * (4 * shape.hidden + (2 * (shape.query + 2 * shape.key) + 3 * shape.inner) / devices)
    return {
        "weights": shape.num_parameters * itemsize / devices,
        "room for a step": layer + 12 * engine.max_num_seqs * shape.vocab + PROCESS_GIB * GIB,
    }


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())
