"""The learner: equal to a plain loop, restartable, and clear about bad input. Several ranks: `tests/engines/test_learner_ranks.py`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents.learning import attention
from agents.learning.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from agents.learning.config import LearnerConfig, LoraConfig, LossConfig, learning_rate
from agents.learning.learner import PHASES, Learner
from agents.learning.model import ModelError, PolicyModel, load_model
from agents.learning.packing import pack
from agents.learning.scorer import ReferenceScorer
from agents.learning.stopwatch import Stopwatch
from agents.learning.weights import Stacked
from tests.learning_tools import random_samples, save_tiny, tiny_qwen3
from tests.reference_loop import reference_optimizer, reference_step

# AdamW divides small gradients by their size, which would blow rounding errors up: a larger epsilon keeps comparisons sharp.
SMALL = LearnerConfig(max_tokens_per_microbatch=100, adam_eps=1e-5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_weights(learner: Learner, hf: Any, atol: float = 1e-5) -> None:
    plain = dict(hf.named_parameters())
    for name, weight in learner.weights():
        torch.testing.assert_close(
            weight, plain[name].detach(), atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "loss",
    [LossConfig(), LossConfig(mismatch="icepop", kl_coef=0.05), LossConfig(mismatch="none", entropy_coef=0.01)],
    ids=["tis", "icepop+kl", "entropy"],
)
def test_three_steps_equal_the_plain_loop(layout: str, loss: LossConfig) -> None:
    config = replace(SMALL, layout=layout, loss=loss, grad_clip=0.5, lr=1e-3)
    learner, plain = Learner(tiny_qwen3(), config), tiny_qwen3()
    optimizer = reference_optimizer(plain, config)
    for step in range(3):
        samples = random_samples(8, seed=step, temperature=0.9, ref_logprobs=1.0)
        samples[0] = replace(samples[0], advantages=np.zeros(samples[0].num_tokens))  # forward only
        samples[1] = replace(samples[1], weight=0.5)
        expected_loss, expected_norm = reference_step(plain, samples, config, optimizer)
        metrics = learner.step(samples)
        assert metrics["loss"] == pytest.approx(expected_loss, abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected_norm, rel=1e-4)
    same_weights(learner, plain)


def test_metrics_are_all_there() -> None:
    samples = random_samples(6)
    metrics = Learner(tiny_qwen3(), SMALL).step(samples)
    wanted = (
        "loss grad_norm lr entropy mismatch/kl_k3 mismatch/cut ratio/mean ratio/p99 ratio/max clip/share staleness/max"
    )
    assert not set(wanted.split()) - set(metrics)
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["learner/trained_tokens"] == sum(s.mask.sum() for s in samples)


def test_learning_raises_the_probability_of_what_paid() -> None:
    samples = random_samples(2, seed=5)
    good, bad = (replace(s, advantages=a * s.mask) for s, a in zip(samples, (1.0, -1.0), strict=True))
    learner = Learner(tiny_qwen3(), replace(SMALL, lr=1e-3, loss=LossConfig(mismatch="none")))
    before = [x.sum() for x in learner.score([good, bad])]
    for _ in range(5):
        learner.step([good, bad])
    after = [x.sum() for x in learner.score([good, bad])]
    assert after[0] > before[0] and after[1] < before[1]


def test_a_batch_without_spread_or_without_samples_moves_nothing_but_decay() -> None:
    learner = Learner(tiny_qwen3(), replace(SMALL, weight_decay=0.0))
    flat = [replace(s, advantages=np.zeros(s.num_tokens)) for s in random_samples(4)]
    for batch in (flat, []):
        metrics = learner.step(batch)
        assert metrics["loss"] == metrics["grad_norm"] == 0
    same_weights(learner, tiny_qwen3(), atol=0)
    assert learner.batches == 2


def test_forward_only_sequences_change_no_gradient() -> None:
    samples = random_samples(6)
    samples[2] = replace(samples[2], advantages=np.zeros(samples[2].num_tokens))
    found = [Learner(tiny_qwen3(), replace(SMALL, skip_zero_advantage=skip)).step(samples) for skip in (True, False)]
    for name in ("loss", "grad_norm", "entropy", "mismatch/kl_k3"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_minibatches_use_the_policy_that_the_batch_arrived_at() -> None:
    """Several optimiser steps per batch: rho leaves 1, and the sampler ratio is still that of the arriving policy."""
    samples = random_samples(8)
    config = replace(SMALL, minibatches=4, lr=1e-2)
    one, many = Learner(tiny_qwen3(), SMALL).step(samples), Learner(tiny_qwen3(), config).step(samples)
    assert many["ratio/mean"] == pytest.approx(one["ratio/mean"], rel=1e-4)
    assert many["clip/share"] > 0 and one["clip/share"] == 0


def test_not_finite_means_not_trained() -> None:
    learner = Learner(tiny_qwen3(), SMALL)
    samples = random_samples(3)
    broken = samples[0].advantages.copy()
    broken[samples[0].mask == 1] = np.inf
    metrics = learner.step([replace(samples[0], advantages=broken), *samples[1:]])
    assert metrics["skipped/nonfinite"] == 1
    same_weights(learner, tiny_qwen3(), atol=0)
    assert learner.step(samples)["skipped/nonfinite"] == 0


def test_greedy_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        Learner(tiny_qwen3(), SMALL).step(random_samples(1, temperature=0.0))


def test_gradient_checkpointing_changes_nothing() -> None:
    samples = random_samples(4)
    found = [Learner(tiny_qwen3(), replace(SMALL, gradient_checkpointing=g)).step(samples) for g in (True, False)]
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-5)


def test_learning_rate_schedules() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=2, schedule="linear", total_steps=6)
    assert [learning_rate(i, config) for i in range(7)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert learning_rate(99, LearnerConfig(lr=0.1)) == 0.1


def test_bfloat16_keeps_float32_weights() -> None:
    learner = Learner(tiny_qwen3(), replace(SMALL, dtype="bfloat16", lr=1e-5))
    samples = random_samples(4)
    exact = Learner(tiny_qwen3(), SMALL).step(samples)
    metrics = learner.step(samples)
    assert metrics["loss"] == pytest.approx(exact["loss"], abs=0.1)
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
    assert all(w.dtype is torch.bfloat16 for _, w in learner.weights(torch.bfloat16))


def test_lora_trains_adapters_and_publishes_merged_weights() -> None:
    config = replace(SMALL, lora=LoraConfig(rank=2, alpha=4.0), lr=1e-2)
    learner, plain = Learner(tiny_qwen3(), config), tiny_qwen3()
    same_weights(learner, plain, atol=0)  # a fresh adapter changes nothing
    samples = random_samples(4)
    learner.step(samples)
    published = dict(learner.weights())
    assert set(published) == set(dict(plain.named_parameters()))
    assert not torch.equal(published["model.layers.0.mlp.up_proj.weight"], plain.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(published["model.embed_tokens.weight"], plain.model.embed_tokens.weight)
    plain.load_state_dict(published, strict=False)
    batch = pack(samples, 4096)[0]
    torch.testing.assert_close(PolicyModel(plain)(batch)[0], learner.model(batch)[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="name no linear layer"):
        Learner(tiny_qwen3(), replace(SMALL, lora=LoraConfig(rank=2, targets=["nowhere"])))


def test_untied_head_is_published_and_tied_is_not() -> None:
    assert "lm_head.weight" in dict(Learner(tiny_qwen3(tied=False), SMALL).weights())
    assert "lm_head.weight" not in dict(Learner(tiny_qwen3(tied=True), SMALL).weights())


def test_reference_scorer_gives_kl_zero_to_itself() -> None:
    scored = ReferenceScorer(PolicyModel(tiny_qwen3()))(random_samples(4))
    metrics = Learner(tiny_qwen3(), replace(SMALL, loss=LossConfig(kl_coef=0.1))).step(scored)
    assert metrics["kl_ref"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("lora", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, lora: int) -> None:
    config = replace(SMALL, minibatches=2, lora=LoraConfig(rank=lora))
    straight = Learner(tiny_qwen3(), config)
    straight.step(random_samples(6, seed=0))
    save_checkpoint(tmp_path / "c", straight, extra={"version": [0, 1]})
    expected = straight.step(random_samples(6, seed=1))
    resumed = Learner(tiny_qwen3(), config)
    assert load_checkpoint(tmp_path / "c", resumed) == {"version": [0, 1]}
    found = resumed.step(random_samples(6, seed=1))
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    for (_, a), (_, b) in zip(straight.weights(), resumed.weights(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_is_a_model_directory(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    learner = Learner(load_model(source), SMALL)
    learner.step(random_samples(4))
    for _ in range(2):  # the second replaces the first
        save_checkpoint(tmp_path / "c", learner, tokenizer_dir=source)
    again = Learner(load_model(tmp_path / "c"), SMALL)
    for (_, a), (_, b) in zip(learner.weights(), again.weights(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "c" / "tokenizer.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_checkpoint_is_one_line_that_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    learner = Learner(tiny_qwen3(), SMALL)
    path = save_checkpoint(tmp_path / "c", learner)
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, learner)
    assert name in str(caught.value) and "earlier checkpoint" in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", Learner(tiny_qwen3(), replace(SMALL, lora=LoraConfig(rank=2))))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(path, Learner(tiny_qwen3(), replace(SMALL, lora=LoraConfig(rank=4))))


# ------------------------------------------------------------------------------------------------------ models


def test_bad_model_directories_are_one_clear_line(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert "no such model directory" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in message(tmp_path / "empty")
    damaged = save_tiny(tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in message(damaged) and "model.safetensors" in message(damaged)
    unfit = save_tiny(tmp_path / "unfit")
    (unfit / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 61, "content": "<x>"}]})
    )
    assert "tokenizer does not fit the model" in message(unfit)


def tiny_experts(kind: str) -> Any:
    """Tiny random models whose experts transformers holds stacked, and their checkpoints name in three ways."""
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    common = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**common, num_local_experts=3))
    if kind == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**common, num_local_experts=3))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, num_experts=3, moe_intermediate_size=24))


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("mixtral", "mlp.gate.weight", "block_sparse_moe.experts.0.w1.weight"),
        ("gpt_oss", "mlp.experts.0.gate_proj.weight", "mlp.experts.down_proj"),
    ],
)
def test_models_with_names_that_cannot_be_restored_are_refused(
    tmp_path: Path, kind: str, ours: str, theirs: str
) -> None:
    tiny_experts(kind).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, LearnerConfig(attention="eager"))
    line = str(caught.value)
    assert "\n" not in line and f"models of type {kind}" in line
    assert f"first model.layers.0.{ours} " in line and f"(there: model.layers.0.{theirs})" in line, line


def test_a_tied_head_in_the_file_and_parts_beside_the_model_are_no_matter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(save_tiny(tmp_path) / "model.safetensors")
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "mtp.layers.0.weight": torch.zeros(2)}
    save_file({**weights, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path)


def test_experts_are_stacked_when_asked_for_and_a_checkpoint_of_them_goes_on(tmp_path: Path) -> None:
    tiny_experts("qwen3_moe").save_pretrained(str(tmp_path / "m"))
    learner = Learner(load_model(tmp_path / "m"), SMALL)
    learner.step(random_samples(4))
    stacked, held = Stacked(dict(learner.weights())), dict(learner.model.hf.named_parameters())
    assert stacked.keys() == held.keys() and len(stacked) == len(held) and "no such name" not in stacked
    for name, weight in held.items():
        assert stacked.shape(name) == tuple(weight.shape) and torch.equal(stacked[name], weight)
    assert Stacked({n: w.to("meta") for n, w in learner.weights()}).shape(name) == stacked.shape(name)
    save_checkpoint(tmp_path / "c", learner)
    resumed = Learner(load_model(tmp_path / "m"), SMALL)
    load_checkpoint(tmp_path / "c", resumed)
    assert resumed.step(random_samples(4, seed=1))["loss"] == learner.step(random_samples(4, seed=1))["loss"]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_parts_of_a_step_add_up_to_it(minibatches: int) -> None:
    learner = Learner(tiny_qwen3(), replace(SMALL, minibatches=minibatches))
    began = time.perf_counter()
    metrics = learner.step(random_samples(6))
    wall = time.perf_counter() - began
    parts = {p: metrics[f"time/{p}_s"] for p in PHASES}
    assert all(v > 0 for v in parts.values())
    assert sum(parts.values()) == pytest.approx(metrics["time/train_s"], rel=1e-6)
    assert 0.9 * wall - 0.01 <= metrics["time/train_s"] <= wall


def test_a_step_reads_no_value_for_each_pass() -> None:
    """On a GPU each would wait until the device has done all that it was asked for. (Of rows without bounds transformers reads one itself.)"""
    attention.register()

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    counts, passes, samples = [], [], random_samples(6)
    for budget in (60, 4096):
        learner = Learner(tiny_qwen3(attention="varlen"), LearnerConfig(max_tokens_per_microbatch=budget))
        with Reads() as reads:
            learner.step(samples)
        counts.append(reads.count)
        passes.append(len(pack(samples, budget, layout=learner.layout)))
    assert passes[0] > passes[1] and counts[0] == counts[1]


def test_on_a_gpu_laps_are_events_that_nothing_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: a stand-in for its events shows that laps are only recorded, and read at the end."""
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")
            self.at = float(len(told))

        def synchronize(self) -> None:
            told.append("synchronize")

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for name in ("pack", "forward", "backward", "forward"):
        watch.lap(name)
    assert told == ["record"] * 5
    assert watch.seconds() == {"pack": 1.0, "forward": 2.0, "backward": 1.0}
    assert told[5:] == ["synchronize"]
