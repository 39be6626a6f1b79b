"""What publishing takes, by transport and by hand; and what others on a GPU hold beside samplers and learners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ROOT, load_config
from cluster.fitting import misfits
from cluster.handover import handover, reloaded_layer, sent_tensor
from cluster.layout import arranged, learner_place, moments, parse_gpus, seats
from cluster.model import ModelShape
from cluster.plan import layout_lines
from cluster.schema import RunConfig
from cluster.tenants import held_by, judge_share, option
from retrieval.manifest import Leg, Manifest, Run

BUCKET = 256 << 20
GIB = 1 << 30
SHARED = ["layout.kind=collocated"]


def shape(name: str) -> ModelShape:
    return ModelShape.of(json.loads((ROOT / "configs" / "shapes" / f"{name}.json").read_text()))


def config(*overrides: str, name: str = "carr_4b_grpo") -> RunConfig:
    return load_config(name, list(overrides), RunConfig)


def bytes_of(transport: str, name: str, **given: int) -> tuple[dict[str, float], dict[str, float]]:
    usual = {"bucket_bytes": BUCKET, "itemsize": 2, "ranks": 8, "devices": 1}
    found = handover(transport, shape(name), **(usual | given))
    return found.sender | found.stays, found.receiver


# ---------------------------------------------------------------------------------------------------- transports


def test_an_untied_8b_by_ipc_takes_twelve_bytes_for_each_entry_of_its_table() -> None:
    table = 151_936 * 4096  # 1.24 GB in 16 bits, more than a bucket: it travels alone
    sender, receiver = bytes_of("ipc", "qwen3_8b")
    assert sender == {"gathered tensor": 4 * table, "copy in the engine's type": 2 * table, "buffer for IPC": 2 * table}
    assert receiver == {"copy of a piece": 2 * table, "layer made anew": 2 * table}
    assert sum(sender.values()) + sum(receiver.values()) == 12 * table == 7_467_958_272
    # One learner holds the whole tensor already; two devices of an engine make half of a layer each, of whole pieces.
    sender, receiver = bytes_of("ipc", "qwen3_8b", ranks=1, devices=2)
    assert sum(sender.values()) == 4 * table and receiver["layer made anew"] == table
    found = handover("ipc", shape("qwen3_8b"), bucket_bytes=2 << 30, itemsize=2, ranks=8, devices=1)
    assert found.stays == {"buffer for IPC": 2 << 30}, "a bucket that is larger than any tensor"


def test_nccl_holds_two_slots_on_either_side() -> None:
    table = 151_936 * 4096
    sender, receiver = bytes_of("nccl", "qwen3_8b")
    piece = BUCKET + 2 * table  # it ends with the tensor that makes it larger than a bucket
    assert sender == {"gathered tensor": 4 * table, "pieces to send": 4 * piece}
    assert receiver == {"pieces received": 2 * piece, "layer made anew": 2 * table}
    small, _ = bytes_of("nccl", "qwen3_8b", bucket_bytes=64 << 20)
    assert sender["pieces to send"] - small["pieces to send"] == 4 * (192 << 20)


@pytest.mark.parametrize("transport", ["shm", "relay", "gloo"])
def test_what_lies_in_the_machines_memory_takes_a_layer_of_the_gpu(transport: str) -> None:
    table = 151_936 * 1024  # Qwen3-0.6B
    sender, receiver = bytes_of(transport, "qwen3_0_6b")
    assert sum(sender.values()) == 6 * table and receiver == {"layer made anew": 2 * table}
    host = handover(transport, shape("qwen3_0_6b"), bucket_bytes=BUCKET, itemsize=2, ranks=8, devices=1).host
    assert host == ({"buckets": 2 * 2 * table} if transport == "gloo" else {})


def test_experts_travel_one_by_one_and_wait_for_their_layer() -> None:
    sparse = shape("qwen3_30b_a3b")
    assert sent_tensor(sparse) == 151_936 * 2048, "a table is larger than one expert"
    assert reloaded_layer(sparse) == sparse.layer_parameters == 623_120_640 >= 128 * 3 * 2048 * 768
    _, receiver = bytes_of("ipc", "qwen3_30b_a3b", devices=2)
    assert receiver["layer made anew"] == 2 * 623_120_640 + 623_120_640
    sender, _ = bytes_of("ipc", "qwen3_30b_a3b")
    assert sender["gathered tensor"] == 4 * 2 * 623_120_640 // 3, (
        "gate and up of all experts are one tensor of the learner's"
    )


def test_adapters_alone_are_small_and_an_unknown_transport_is_none() -> None:
    found = handover("shm", shape("qwen3_8b"), bucket_bytes=BUCKET, itemsize=2, ranks=8, devices=1, adapters=1000)
    assert (sum(found.sender.values()), sum(found.receiver.values())) == (4000, 2000)
    with pytest.raises(ValueError, match="no transport 'auto'"):
        bytes_of("auto", "qwen3_8b")


def test_the_plan_counts_the_buffers_of_the_transport_that_the_run_would_take() -> None:
    model, table = shape("qwen3_8b"), 151_936 * 4096
    apart = config("fleet.num_engines=2", "train.num_workers=6")
    sampler, *_, learner = seats(apart, parse_gpus("8x80"))[0]
    found = {m.name: m for m in moments(apart, model, learner)}["publishing"]
    assert found.parts["learner's pieces to send"] == 4 * (BUCKET + 2 * table) / GIB
    found = {m.name: m for m in moments(apart, model, sampler)}["publishing"]
    assert (
        found.parts["sampler's pieces received"] == 2 * (BUCKET + 2 * table) / GIB
        and "sampler's KV cache" in found.parts
    )
    shared = arranged(config(*SHARED, "fleet.num_engines=8", "train.num_workers=8"))
    found = {m.name: m for m in moments(shared, model, seats(shared, parse_gpus("8x80"))[0][0])}["publishing"]
    added = sum(v for k, v in found.parts.items() if any(w in k for w in ("gathered", "copy", "buffer", "layer")))
    assert added == pytest.approx(12 * table / GIB) and "sampler's KV cache" not in found.parts
    for moment in moments(shared, model, seats(shared, parse_gpus("8x80"))[0][0]):
        assert moment.parts["learner's buffer for IPC"] == 2 * table / GIB, "one buffer serves all passes, and stays"


def test_an_engine_without_room_for_the_pieces_is_told_and_mended() -> None:
    full = config("engine.gpu_memory_utilization=0.98", "fleet.num_engines=4", "train.num_workers=4")
    (line,) = misfits(full, shape("qwen3_4b"), parse_gpus("8x80"))
    assert "a sampler takes" in line and "while publishing" in line
    mend = line.partition("; set ")[2]
    assert not misfits(config("fleet.num_engines=4", mend), shape("qwen3_4b"), parse_gpus("8x80"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*SHARED, "fleet.transport=nccl"], "NCCL takes a GPU once; set fleet.transport=ipc or auto"),
        (["fleet.transport=ipc"], "on a GPU that no learner rank uses; set fleet.transport=nccl or auto"),
        (["train.worker_gpus=0", "fleet.transport=nccl"], "the learner has no GPU; set fleet.transport=auto"),
    ],
)
def test_a_transport_that_the_run_would_refuse_is_refused_by_the_plan(overrides: list[str], said: str) -> None:
    lines = misfits(arranged(config(*overrides)), shape("qwen3_4b"), parse_gpus("8x80"))
    assert any(said in line for line in lines), lines


# ------------------------------------------------------------------------------------------------------ sharing


def test_halves_of_a_gpu_are_added_each_with_all_it_takes() -> None:
    """Two engines at half a GPU each take their share of the whole GPU twice, whatever Ray's books say."""
    two = config(
        "fleet.num_engines=2", "fleet.num_gpus=0.5", "train.num_workers=1", "engine.gpu_memory_utilization=0.6"
    )
    gpu = seats(two, parse_gpus("2x80"))[0][0]
    assert [t.name for t in gpu.tenants] == ["sampler-0", "sampler-1"]
    assert moments(two, shape("qwen3_4b"), gpu)[0].gib == pytest.approx(2 * 0.6 * 80)
    (line,) = misfits(two, shape("qwen3_4b"), parse_gpus("2x141"))
    assert "set engine.gpu_memory_utilization=0." in line
    mend = line.partition("; set ")[2]
    assert not misfits(config("fleet.num_engines=2", "fleet.num_gpus=0.5", "train.num_workers=1", mend), shape("qwen3_4b"), parse_gpus("2x141"))  # fmt: skip


def test_learners_beside_engines_share_the_engines_node() -> None:
    run = arranged(config(*SHARED))
    assert run.placement.sampler.strategy == run.placement.learner.strategy == "strict_pack" and arranged(run) == run
    assert learner_place(run, {"n1"}).labels == {"ray.io/node-id": "n1"}
    split = config()
    assert arranged(split) is split and learner_place(split, {"n1"}) is split.placement.learner


# ------------------------------------------------------------------------------------------------------ others


def others(*overrides: str) -> RunConfig:
    return config("fleet.num_engines=1", "train.num_workers=1", *overrides)


JUDGE = ["judge.kind=vllm", "judge.model=/nowhere/judge", "reward.outcome=judge"]


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ([], 0.92),
        (["--gpu-memory-utilization", "0.4"], 0.4),
        (["--gpu_memory_utilization=0.5", "--max-model-len", "8"], 0.5),
    ],
)
def test_a_judge_takes_the_share_that_its_engine_is_told(arguments: list[str], share: float) -> None:
    assert judge_share(arguments) == share
    run = others(*JUDGE)
    run.judge.engine_args = arguments
    assert held_by(run, "judge", 80.0).gib == pytest.approx(share * 80)


def test_a_judge_whose_sizes_are_known_is_counted_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ROOT / "configs/shapes/qwen3_8b.json").read_text())
    run = others(*JUDGE, f"judge.model={tmp_path}", "judge.num_gpus=2")
    run.judge.engine_args = ["-tp", "2", "--kv-cache-memory-bytes", "8G"]
    model = shape("qwen3_8b")
    # 8,192 tokens of a step: four times the stream, and of each device half of queries, keys, values and the feed-forward part
    step = 2 * 8192 * (4 * 4096 + (2 * (4096 + 2 * 1024) + 3 * 12288) / 2)
    needed = (model.num_parameters + step) / GIB + 1
    assert held_by(run, "judge", 80.0).parts == {
        "judge's weights and step": pytest.approx(needed), "judge's KV cache": 8.0
    }  # fmt: skip
    names = [[t.name for t in g.tenants] for g in seats(run, parse_gpus("4x80"))[0]]
    assert names == [["sampler-0"], ["learner-0"], ["judge-0.0"], ["judge-0.1"]]
    run.judge.engine_args, run.judge.num_gpus = ["--gpu-memory-utilization", "0.1"], 1.0
    lines = misfits(run, shape("qwen3_0_6b"), parse_gpus("3x80"))
    assert [line.split(" takes ")[0] for line in lines] == [
        "a judge"
    ] and "--gpu-memory-utilization leaves it 8.0" in lines[0]


def test_a_judge_on_the_other_half_of_an_engines_gpu_is_added() -> None:
    half = others(*JUDGE, "judge.num_gpus=0.5", "fleet.num_gpus=0.5", "engine.gpu_memory_utilization=0.5")
    (gpu, *_), _ = seats(half, parse_gpus("2x80"))
    assert [t.role for t in gpu.tenants] == ["sampler", "judge"]
    assert moments(half, shape("qwen3_4b"), gpu)[0].gib == pytest.approx((0.5 + 0.92) * 80)
    assert any(
        "a judge and a sampler on one GPU take" in line for line in misfits(half, shape("qwen3_4b"), parse_gpus("2x80"))
    )
    half.judge.engine_args = ["--gpu-memory-utilization", "0.4"]
    assert not any("judge" in line for line in misfits(half, shape("qwen3_4b"), parse_gpus("2x80")))


def test_an_encoder_is_its_weights_and_a_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 384, "intermediate_size": 1536, "dtype": "float32"})
    )
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 4096)
    run = others("retrieval.kind=faiss", "retrieval.encoder.kind=hf", f"retrieval.encoder.model={tmp_path}")
    held = held_by(run, "encoder", 80.0)
    assert held.parts == {
        "encoder's weights": 2048 / GIB, "encoder's pass": 2 * 16384 * (8 * 384 + 3 * 1536) / GIB + 1
    }  # fmt: skip
    assert held_by(others("retrieval.kind=faiss"), "encoder", 80.0).parts == {}, "the hashing encoder stays on the CPU"


def sharded(tmp_path: Path, *more: str) -> RunConfig:
    return others(
        "retrieval.kind=faiss", "retrieval.shards=2", "retrieval.faiss.device=gpu", "service.topology.shard_replicas=1",
        "service.topology.shard_gpus=1", "world.kind=jsonl", f"world.jsonl.index={tmp_path}", *more,
    )  # fmt: skip


def test_shards_of_an_index_that_is_there_are_counted_and_others_are_not_guessed(tmp_path: Path) -> None:
    run = sharded(tmp_path)
    nodes = parse_gpus("4x80")
    assert held_by(run, "shard", 80.0).unknown
    lines = layout_lines(run, shape("qwen3_4b"), nodes)
    assert any("shard-0 .. shard-1" in line and "not counted" in line for line in lines)
    assert any(line.startswith("not counted shard: the index") and line.endswith("is not known") for line in lines)
    runs = (Run("faiss/000", 0, 600_000), Run("faiss/001", 600_000, 400_000))
    Manifest("c", 1, 1_000_000, {}, {"dim": 768}, {"faiss": Leg({}, runs)}).write(tmp_path)
    held = held_by(run, "shard", 80.0)
    # flat, half precision: 2 bytes a number of the larger shard, and FAISS' scratch of 1.5 GiB
    assert held.parts["shard's index"] == pytest.approx(600_000 * 768 * 2 / GIB + 1.5)
    (serving,) = moments(run, shape("qwen3_4b"), seats(run, nodes)[0][2])
    assert serving.name == "serving" and serving.gib == pytest.approx(held.gib)
    assert not any("not counted" in line for line in layout_lines(run, shape("qwen3_4b"), nodes))
    run.retrieval.faiss.device = "cpu"
    assert held_by(run, "shard", 80.0).parts == {}


def test_options_are_read_as_the_command_line_has_them() -> None:
    given: list[Any] = ["--a-b=1", "-tp", "2", "--a_b", "3", "--last"]
    assert option(given, "--a-b") == "3" and option(given, "--tensor-parallel-size", "-tp") == "2"
    assert option(given, "--last") is None and option([], "--a-b") is None
