"""The learner on several gloo ranks: what one rank computes, no rank with a whole model, checkpoints that load anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gumshoe
from agents.learning.checkpoint import verify_checkpoint
from agents.learning.model import check_model_dir
from tests.learning_tools import save_tiny, tiny_qwen3
from tests.support.learner_ranks import CONFIGS, CONTEXT, FOLDERS, REPLICAS, SAVED, WORLDS

Found = dict[str, Any]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which learners on 1, 2 and 3 ranks trained, saved and loaded; see `tests.support.learner_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(folder / "model")
    env = {**os.environ, **gumshoe.child_env(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(gumshoe.ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.learner_ranks", str(folder)], env=env, cwd=gumshoe.ROOT, timeout=600,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def read(folder: Path, name: str) -> Found:
    return dict(torch.load(folder / f"{name}.pt", weights_only=True))


def same_metrics(found: dict[str, float], wanted: dict[str, float], rel: float = 1e-5) -> None:
    """All that does not tell of time, or of how tokens were packed."""
    apart = ("time/", "learner/tokens_per_s", "learner/computed_tokens", "learner/shared_tokens")
    names = [n for n in wanted if not n.startswith(apart)]
    assert not {n for n in found if not n.startswith(apart)} ^ set(names)
    assert {n: found[n] for n in names} == pytest.approx({n: wanted[n] for n in names}, rel=rel, abs=1e-5)


def same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_ranks_equal_one(ranks: Path, world: int, name: str) -> None:
    """Loss, gradient norm, every other metric, and the gathered weights; each rank held its share of them only."""
    one, some = read(ranks, "train-1")[name], read(ranks, f"train-{world}")[name]
    for row, wanted in zip(some["metrics"], one["metrics"], strict=True):
        same_metrics(row, wanted)
    same_tensors(some["weights"], one["weights"])
    if one["critic"]:
        same_tensors(some["critic"], one["critic"])
    assert one["share"] == 1.0 and some["share"] < 1.25 / world


@pytest.mark.parametrize("name", REPLICAS)
def test_ranks_with_whole_copies_equal_one(ranks: Path, name: str) -> None:
    one, two = read(ranks, "train-1")[name], read(ranks, "train-2")[f"replicas {name}"]
    for row, wanted in zip(two["metrics"], one["metrics"], strict=True):
        same_metrics(row, wanted)
    same_tensors(two["weights"], one["weights"])


@pytest.mark.parametrize("name", CONTEXT)
def test_ranks_that_share_each_row_equal_one(ranks: Path, name: str) -> None:
    one, two = read(ranks, "train-1")[name], read(ranks, "train-2")[f"context {name}"]
    for row, wanted in zip(two["metrics"], one["metrics"], strict=True):
        same_metrics(row, wanted)
    same_tensors(two["weights"], one["weights"])


def test_mixed_precision_keeps_float32_weights_and_comes_near(ranks: Path) -> None:
    """That weights and gradients are float32 is asserted on the ranks."""
    exact = read(ranks, "train-1")["plain"]["metrics"][0]
    found = [read(ranks, f"train-{world}")["bfloat16"]["metrics"][0] for world in WORLDS]
    for row in found:
        assert row["loss"] == pytest.approx(exact["loss"], abs=0.1) and row["loss"] != exact["loss"]
        assert row["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_adapters_alone_amount_to_the_merged_weights(ranks: Path) -> None:
    """Of 3 ranks; fresh adapters were drawn as on one."""
    one, three = read(ranks, "train-1")["lora"], read(ranks, "train-3")["lora"]
    same_tensors(three["adapters"], one["adapters"])
    base = dict(tiny_qwen3().named_parameters())
    prefix, config = "base_model.model.", CONFIGS["lora"].lora
    names = {n.removeprefix(prefix).rpartition(".lora_")[0] for n in three["adapters"]}
    assert len(names) == 14 and len(three["adapters"]) == 28
    for name in names:
        a, b = (three["adapters"][f"{prefix}{name}.lora_{kind}.weight"] for kind in "AB")
        merged = base[f"{name}.weight"].detach() + config.alpha / config.rank * b @ a
        torch.testing.assert_close(three["weights"][f"{name}.weight"], merged, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("saved", FOLDERS)
def test_a_checkpoint_loads_on_any_number_of_ranks(ranks: Path, name: str, saved: str) -> None:
    """Weights, adapters, moments and critic: the next step is that of a learner which never stopped."""
    straight = read(ranks, "train-1")[name]
    for world in WORLDS:
        found = read(ranks, f"load-{world}")[f"{name}-{saved}"]
        same_metrics(found["next"], straight["next"], rel=1e-4)
        same_tensors(found["after"], straight["after"])


@pytest.mark.parametrize("name", SAVED)
def test_every_rank_writes_its_part(ranks: Path, name: str) -> None:
    folder = ranks / f"{name}-sharded-3"
    listed = verify_checkpoint(folder)["files"]
    shards = [n for n in listed if n.startswith("shards/")]
    weights = [n for n in listed if n.startswith("model-")]
    assert len(shards) == 3 and len(weights) >= 3
    sizes = [listed[n]["bytes"] for n in shards]
    assert max(sizes) < 1.5 * min(sizes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(weights)
    check_model_dir(folder)


def test_a_sharded_checkpoint_is_a_model_directory(ranks: Path) -> None:
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(str(ranks / "everything-sharded-2"), dtype=torch.float32)
    weights = read(ranks, "train-2")["everything"]["weights"]
    same_tensors({n: w.detach() for n, w in again.named_parameters()}, weights)


def test_a_disk_that_is_full_for_one_rank_fails_all_and_leaves_nothing(ranks: Path) -> None:
    first, second, *left = read(ranks, "train-2")["full disk"]
    assert first == second and "rank 1" in first and "No space left" in first and not left


def test_a_rank_that_cannot_gather_fails_all_with_its_words(ranks: Path) -> None:
    said = read(ranks, "train-2")["no gather"]
    assert len(said) == 6
    assert all(words == ["rank 1: CUDA out of memory"] * 2 for words in said.values()), said
