"""The arithmetic of memory against known models: published parameter counts, cache bytes, and what torch's own tracker counts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agents.learning.config import CriticConfig, LearnerConfig, LoraConfig, LossConfig
from cluster.config import ROOT, load_config
from cluster.memory import adapter_parameters, engine_bytes, kv_bytes, learner_bytes, total
from cluster.model import ModelShape
from cluster.schema import RunConfig
from cluster.vllm.options import EngineConfig

SHAPES = ROOT / "configs" / "shapes"
TRACED = json.loads((ROOT / "benchmarks" / "results" / "learner_memory.json").read_text())["rows"]


def shape(name: str, **over: Any) -> ModelShape:
    return ModelShape.of(json.loads((SHAPES / f"{name}.json").read_text()) | over)


PUBLISHED = {  # parameters; those without embeddings as the model card rounds them, in billions; cache bytes of a token in 16 bits
    "qwen3_0_6b": (596_049_920, 0.44, 112 << 10),
    "qwen3_1_7b": (1_720_574_976, 1.4, 112 << 10),
    "qwen3_4b": (4_022_468_096, 3.6, 144 << 10),
    "qwen3_8b": (8_190_735_360, 6.95, 144 << 10),
    "qwen3_30b_a3b": (30_532_122_624, 29.9, 96 << 10),
    "qwen2_5_3b": (3_085_938_688, 2.77, 36 << 10),
    "qwen2_5_7b": (7_615_616_512, 6.53, 56 << 10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cache_are_those_of_the_published_models(name: str) -> None:
    parameters, body, cache = PUBLISHED[name]
    found = shape(name)
    tables = found.vocab * found.hidden * (1 if found.tied else 2)
    assert found.num_parameters == parameters
    assert (found.num_parameters - tables) / 1e9 == pytest.approx(body, rel=0.015)
    assert kv_bytes(found, 2) == cache == 2 * found.kv_values_per_token


def test_experts_are_counted_once_and_used_few_at_a_time() -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of which a token goes through."""
    found = shape("qwen3_30b_a3b")
    used = found.num_parameters - found.num_layers * 3 * found.hidden * 768 * (128 - found.experts_per_token)
    assert used / 1e9 == pytest.approx(3.3, abs=0.06) and found.inner == 8 * 768


def test_the_cache_is_cut_by_heads_and_no_further() -> None:
    found = shape("qwen2_5_3b")  # two heads of keys
    assert [kv_bytes(found, 2, devices) for devices in (1, 2, 4)] == [36864, 18432, 18432]
    sampler = engine_bytes(EngineConfig("", tensor_parallel=4), found, 2)
    assert sampler["weights"] == found.num_parameters / 2


@pytest.mark.parametrize(("ranks", "gib"), [(1, 16 * 8.19), (8, 2 * 8.19)])
def test_full_training_holds_sixteen_bytes_a_parameter(ranks: int, gib: float) -> None:
    found = learner_bytes(LearnerConfig(), shape("qwen3_8b"), ranks=ranks, tokens=1, on_gpu=True)
    assert total(found.held) / 1e9 == pytest.approx(gib, rel=1e-3)
    assert set(found.held) == {"weights", "gradients", "moments"}


def test_adapters_critic_and_reference_are_counted() -> None:
    small = shape("qwen2_5_3b")
    lora = LoraConfig(rank=16)
    # Rank 16 on all seven matrices: 36 x 16 x (2048+2048 + 2 (2048+256) + 2048+2048 + 3 (2048+11008)).
    assert adapter_parameters(lora, small) == 29_933_568
    adapted = learner_bytes(LearnerConfig(lora=lora), small, ranks=1, tokens=1, on_gpu=True).held
    assert adapted["weights"] == 4 * (small.num_parameters + 29_933_568) and adapted["moments"] == 8 * 29_933_568
    ppo = LearnerConfig(critic=CriticConfig(kind="model"), loss=LossConfig(kl_coef=0.001))
    held = learner_bytes(ppo, shape("qwen2_5_7b"), ranks=4, tokens=1, on_gpu=True).held
    head = 152064 * 3584  # of the value model, the other head is dropped
    assert held["value model"] == 16 * (7_615_616_512 - head) / 4 and held["reference"] == 4 * 7_615_616_512 / 4


@pytest.mark.parametrize(
    "row", TRACED, ids=lambda r: f"{r['shape']}-{r['arithmetic']}-{r['layers']}x{r['tokens']}-{r['checkpointing']}"
)
def test_activations_are_what_torch_counts(row: dict[str, Any]) -> None:
    """Peaks of a forward and backward pass by torch's memory tracker, weights and gradients aside (`benchmarks/learner_memory.py`)."""
    config = LearnerConfig(
        dtype="float32" if row["arithmetic"] == "float32" else "bfloat16",
        gradient_checkpointing=row["checkpointing"],
        layout="padded",
    )
    ranks = 2 if row["arithmetic"] == "sharded" else 1
    model = shape(row["shape"], num_hidden_layers=row["layers"], **row["over"])
    found = learner_bytes(config, model, ranks=ranks, tokens=row["tokens"], on_gpu=True)
    passes = found.passes
    ours = max(total({k: v for k, v in parts.items() if k != "gathered weights"}) for parts in passes)
    assert 0.94 <= ours / row["peak_bytes"] <= 1.13


def test_gradient_checkpointing_and_context_parallelism_save_what_they_should() -> None:
    model = shape("qwen3_4b")

    def activations(**given: Any) -> float:
        return learner_bytes(LearnerConfig(**given), model, ranks=4, tokens=64_000, on_gpu=True).step["activations"]

    plain, saved = activations(), activations(gradient_checkpointing=True)
    assert plain > 12 * saved
    assert activations(gradient_checkpointing=True, context_parallel=4) == pytest.approx(saved / 4, rel=0.01)
    dense = activations(gradient_checkpointing=True, attention="sdpa", max_tokens_per_microbatch=64_000)
    assert dense - saved == 3 * 64_000**2, "a dense mask, and the same as a number"
    flex = activations(gradient_checkpointing=True, attention="flex_attention", max_tokens_per_microbatch=64_000)
    assert flex - saved == 64 * 500**2, "a table of blocks of 128 x 128, not the mask itself"


def test_logits_never_outgrow_their_block() -> None:
    model = shape("qwen3_0_6b")
    small, large = (
        learner_bytes(
            LearnerConfig(logit_elements=n, gradient_checkpointing=True), model, ranks=1, tokens=4096, on_gpu=True
        )
        for n in (1 << 20, 1 << 29)
    )
    whole = 4096 * model.vocab
    assert max(p.get("logits", 0) for p in large.passes) - max(p.get("logits", 0) for p in small.passes) == 12 * (
        (1 << 29) - (1 << 20)
    )
    assert whole > 1 << 29


def test_dry_run_and_plan_share_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    from cluster import cli
    from cluster.sizes import learner_of, shares

    run = load_config("carr_4b_grpo", [], RunConfig)
    learner = shares(run, shape("qwen3_4b"))[1]
    assert learner.each_gib - learner.parts_gib["the process itself"] == pytest.approx(
        total(learner_of(run, shape("qwen3_4b")).training) / (1 << 30)
    )
    cli.main(["plan", "carr_4b_grpo"])
    said = capsys.readouterr().out
    assert f"learner     {learner.each_gib:.1f} GiB" in said and "describe those of the run by --gpus" in said
