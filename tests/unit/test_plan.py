"""The plan of a dry run: the figures of the demo by hand, what cannot be known, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import cli, sizes
from cluster.config import ROOT, load_config
from cluster.model import ModelShape
from cluster.plan import plan
from cluster.schema import RunConfig

SHAPES = ROOT / "configs" / "shapes"


def shape(name: str) -> ModelShape:
    return ModelShape.of(json.loads((SHAPES / f"{name}.json").read_text()))


def test_shapes_count_what_the_models_have() -> None:
    dense, sparse = shape("qwen3_4b"), shape("qwen3_30b_a3b")
    assert dense.architecture == "qwen3" and dense.num_parameters == pytest.approx(4.02e9, rel=0.01)
    assert sparse.architecture == "qwen3_moe" and sparse.num_parameters == pytest.approx(30.5e9, rel=0.01)
    assert dense.kv_values_per_token == 2 * 36 * 8 * 128


@pytest.mark.parametrize("moe", [False, True])
def test_a_shape_counts_the_parameters_of_a_real_model(moe: bool) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    common = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": not moe,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    config = Qwen3MoeConfig(**common, **experts) if moe else Qwen3Config(**common)
    counted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert ModelShape.of(config.to_dict()).num_parameters == counted


def test_the_demo_is_planned_and_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("machine", "plan"):
        monkeypatch.setattr(f"cluster.{module}.free_memory", lambda: 16 << 30)
    assert cli.main(["train", "demo", "--dry-run", f"storage_path={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "a step trains at most 40,960: 64 episodes (8 tasks x 8) of at most 640" in out
    assert "at most 1: 128 episodes" in out and "asks Ray    1 CPU\n" in out and "16.0 GiB free" in out
    assert "one every 35 steps, and sooner once 10 minutes have passed" in out
    assert "missing     nothing\nNothing was started.\n" in out
    assert list(tmp_path.iterdir()) == []


def test_steps_are_planned_by_their_candidates() -> None:
    given = [
        "sampling.sampler=steps",
        "reward.name=slate",
        "advantage.name=grpo",
        "reward.outcome=judge",
        "buffer.group_size=2",
    ]
    text = "\n".join(plan(load_config("demo", [*given, "sampling.max_turn_tokens=100"], RunConfig)).lines)
    assert (
        "a step trains at most 32,000: 16 episodes (8 tasks x 2) of at most 4 steps x 5 candidates x 100; 32,000 a learner"
        in text
    )
    assert (
        "judge       a batch asks at most 656 times: an episode 41, twice for each candidate, and once for its outcome"
        in text
    )


def test_memory_is_the_sum_of_its_parts() -> None:
    plain = ["learner.layout=padded"]  # without a mask over shared rows
    config = load_config("demo", ["fleet.num_engines=3", "ray.object_store_mb=1024", *plain], RunConfig)
    model = ModelShape("qwen3", 1 << 28, 64, 0)  # 1 GiB in float32
    sampler, learner = sizes.shares(config, model)
    assert sampler.each_gib == pytest.approx(1 + 0.25 + sizes.ENGINE_GIB)
    assert learner.each_gib == pytest.approx(4 + sizes.LEARNER_GIB)
    whole = 3 * sampler.each_gib + learner.each_gib + 2 * 1 + 3 + sizes.BASE_GIB + 1
    assert sizes.host_gib(config, model) == pytest.approx(whole)
    assert sizes.checkpoints_gib(config, model) == pytest.approx(3 * 3)


def test_learners_on_gpus_load_through_the_machines_memory() -> None:
    config, model = load_config("carr_30b_grpo", [], RunConfig), shape("qwen3_30b_a3b")
    assert (config.train.num_workers, config.ray.object_store_mb) == (6, 8192)
    experts = 4 * 2 * 623_120_640 // 3 / sizes.GIB  # the largest tensor: of the experts of a layer, gate and up
    assert sizes.loading_gib(config, model) == pytest.approx(6 * experts), (
        "of several learners none reads a whole model"
    )
    saved = 12 * model.num_parameters / sizes.GIB
    assert sizes.passing_gib(config, model) == pytest.approx(saved), "a checkpoint takes more than that"
    beside = 2 * sizes.ENGINE_GIB + 6 * sizes.LEARNER_GIB
    assert sizes.published_gib(config, model) == 0, "from GPU to GPU"
    assert sizes.host_gib(config, model) == pytest.approx(beside + saved + sizes.BASE_GIB + 8)
    config.fleet.transport = "shm"
    assert sizes.published_gib(config, model) == 2 * 2 * model.num_parameters / sizes.GIB
    config.fleet.transport = "gloo"
    table = 2 * 151_936 * 2048  # larger than a bucket of 256 MiB; two at a time in the learner and on both engines
    assert sizes.published_gib(config, model) == 3 * 2 * table / sizes.GIB
    config.fleet.transport = "auto"
    config.learner.sharded_checkpoints = True
    moments = 8 * model.num_parameters / sizes.GIB
    assert sizes.saving_gib(config, model) == pytest.approx(2 * moments), "each learner's own, copied from its GPU"
    config.train.num_workers = 1
    assert sizes.loading_gib(config, model) == pytest.approx(4 * model.num_parameters / sizes.GIB)


def test_gpus_hold_samplers_and_sharded_learners() -> None:
    config = load_config("carr_30b_grpo", [], RunConfig)
    sampler, learner = sizes.shares(config, shape("qwen3_30b_a3b"), 131.0)
    assert sampler.each_gib == pytest.approx(0.8 * 131.0)
    held = sum(learner.parts_gib[part] for part in ("weights", "gradients", "moments"))
    assert held == pytest.approx(16 * 30.53e9 / 6 / sizes.GIB, rel=1e-3) and learner.each_gib < 131.0
    assert sizes.needs(config) == {"CPU": 32, "GPU": 8}


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    made = plan(load_config("demo", [f"model.path={tmp_path}", f"storage_path={tmp_path}"], RunConfig))
    text = "\n".join(made.text)
    assert "of unknown size" in text and "unknown until config.json is there" in text
    assert any("holds no config.json" in line for line in made.missing)


def test_the_clock_of_checkpoints_is_named() -> None:
    def said(*overrides: str) -> str:
        lines = plan(load_config("demo", list(overrides), RunConfig)).lines
        return next(line for line in lines if line.startswith("disk")).split("written), ")[1]

    assert said("train.checkpoint_minutes=0") == "one every 35 steps"
    assert said("train.checkpoint_every=0", "train.checkpoint_minutes=7.5") == "one every 7.5 minutes"
    assert said("train.checkpoint_every=0", "train.checkpoint_minutes=0", "train.steps=9") == "one every 9 steps"


def test_a_run_to_go_on_with_must_be_there(tmp_path: Path) -> None:
    missing = plan(load_config("demo", [f"storage_path={tmp_path}", "resume=mien"], RunConfig))
    assert any(line.startswith("resume=mien: there is no run") for line in missing.missing)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").touch()
    here = plan(load_config("demo", [f"storage_path={tmp_path}", "resume=mine"], RunConfig))
    assert f"{tmp_path}/mine, which goes on, on a Ray of its own" in here.text[0]
    assert not any("resume" in line for line in here.missing)


def test_the_environment_names_the_ray_that_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    made = plan(load_config("demo", [], RunConfig))
    assert made.text[0].endswith("on the Ray at 127.0.0.1:1") and "free on the machine" not in "\n".join(made.lines)
    assert any("no Ray answers at 127.0.0.1:1" in line for line in made.missing)
    monkeypatch.setenv("RAY_ADDRESS", "ray://host:1")
    made = plan(load_config("demo", [], RunConfig))
    assert made.text[0].endswith("on the Ray at ray://host:1")
    assert any("is a Ray client address" in line for line in made.missing)
