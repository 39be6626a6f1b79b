"""Adapters on their way to engines: whole folders that PEFT's layout describes, and nothing damaged gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.learning.config import LearnerConfig, LoraConfig
from agents.learning.learner import Learner
from agents.learning.lora import peft_config
from cluster.config import load_config
from cluster.errors import UserError
from cluster.membership import Place, choose_for_adapters
from cluster.preflight import check_adapters
from cluster.schema import RunConfig
from cluster.vllm.adapters import (
    SETTINGS,
    WEIGHTS,
    AdapterWriter,
    adapter_options,
    verify_adapter,
)
from cluster.vllm.segment import Manifest, SegmentError
from tests.learning_tools import tiny_qwen3

LORA = LoraConfig(rank=2, alpha=4.0, publish="adapter")


def test_an_adapter_is_a_peft_folder_that_only_its_size_goes_out(tmp_path: Path) -> None:
    learner = Learner(tiny_qwen3(), LearnerConfig(lora=LORA))
    writer = AdapterWriter(tmp_path, peft_config(LORA, "the base"))
    manifest = Manifest.from_dict(writer.write(learner.adapters(torch.bfloat16)).to_dict())
    verify_adapter(manifest)
    folder = Path(manifest.path)
    tensors, settings = load_file(folder / WEIGHTS), json.loads((folder / SETTINGS).read_text())
    assert settings["r"] == 2 and settings["lora_alpha"] == 4 and settings["peft_type"] == "LORA"
    assert len(tensors) == manifest.num_tensors == 2 * 2 * len(LORA.targets)
    a, b = (tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{k}.weight"] for k in "AB")
    assert a.shape == (2, 32) and b.shape == (48, 2) and a.dtype is torch.bfloat16
    assert manifest.nbytes < 0.5 * sum(w.numel() * 2 for _, w in learner.weights())


def test_old_adapters_are_cleared_and_damage_is_one_line(tmp_path: Path) -> None:
    writer = AdapterWriter(tmp_path, {"r": 1})
    manifests = [writer.write([("a", torch.full((4,), float(i)))]) for i in range(3)]
    assert not Path(manifests[0].path).exists() and sorted(p.suffix for p in tmp_path.iterdir()) == [".adapter"] * 2
    with pytest.raises(SegmentError, match="cannot read adapters"):
        verify_adapter(manifests[0])
    verify_adapter(manifests[2])
    with pytest.raises(SegmentError, match="manifest says"):
        verify_adapter(replace(manifests[2], path=manifests[1].path))
    file = Path(manifests[2].path) / SETTINGS
    file.write_text(file.read_text().replace("1", "2"))
    with pytest.raises(SegmentError, match="checksum"):
        verify_adapter(manifests[2])
    writer.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(SegmentError, match=r"learner\.lora\.rank"):
        writer.write([])


def test_engines_make_room_for_the_next_size() -> None:
    assert adapter_options(0, ()) == {}
    assert (
        adapter_options(2, ["q_proj"])["max_lora_rank"] == 8 and adapter_options(64, ["q_proj"])["max_lora_rank"] == 64
    )
    with pytest.raises(SegmentError, match="publish=merged"):
        adapter_options(600, ["q_proj"])


def test_adapters_alone_need_a_rank() -> None:
    with pytest.raises(ValueError, match=r"learner\.lora\.rank"):
        LearnerConfig(lora=LoraConfig(publish="adapter")).check()
    with pytest.raises(ValueError, match="merged, adapter"):
        LearnerConfig(lora=LoraConfig(rank=1, publish="both")).check()


def test_a_run_says_which_layouts_and_transports_cannot_carry_adapters() -> None:
    adapters = ["learner.lora.publish=adapter", "learner.lora.rank=8"]
    check_adapters(load_config("demo", adapters, RunConfig))
    for more, said in (
        ("fleet.transport=gloo", "not by fleet.transport=gloo"),
        ("layout.kind=collocated", "layout.kind=collocated give them back"),
        ("learner.lora.rank=600", "more than engines take"),
    ):
        with pytest.raises(UserError, match=said):
            check_adapters(load_config("demo", [*adapters, more], RunConfig))


def test_adapters_travel_by_shared_memory_whatever_engines_run_on() -> None:
    learner, there = Place("a", ("gpu-0",)), {"one": Place("a", ("gpu-1",)), "two": Place("a", ("gpu-0",))}
    assert choose_for_adapters(learner, there) == "shm"
    with pytest.raises(UserError, match=r"1 of 3 engines \(far, ...\)"):
        choose_for_adapters(learner, {**there, "far": Place("b")})
