"""Layouts: who sits where, what does not fit and how it is mended, and turns on shared GPUs."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster import cli
from cluster import turns as turns_module
from cluster.actors import Actors
from cluster.config import ROOT, load_config
from cluster.errors import UserError
from cluster.fitting import misfits
from cluster.layout import Turns, arranged, check_layout, moments, one_node, parse_gpus, seats, turns_of
from cluster.model import ModelShape
from cluster.schema import RunConfig
from cluster.sizes import host_gib, learner_of, needs, offloaded_gib
from cluster.turns import Belongings, FleetTurns, LearnerTurns, find_device, shared_device
from cluster.vllm.residence import Residence, Stay, TurnError

QWEN_4B = ModelShape.of(json.loads((ROOT / "configs" / "shapes" / "qwen3_4b.json").read_text()))
QWEN_30B = ModelShape.of(json.loads((ROOT / "configs" / "shapes" / "qwen3_30b_a3b.json").read_text()))
SHARED = ["layout.kind=collocated"]


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(name, list(overrides), RunConfig)


def who(run: RunConfig, gpus: str) -> list[list[str]]:
    return [[t.name for t in g.tenants] for g in seats(run, parse_gpus(gpus))[0]]


# ------------------------------------------------------------------------------------------------------ seats


def test_one_config_sits_on_one_shared_gpu_on_two_and_on_many() -> None:
    one = ["fleet.num_engines=1", "train.num_workers=1"]
    assert who(config("carr_4b_grpo", *one, *SHARED), "80") == [["sampler-0", "learner-0"]]
    assert who(config("carr_4b_grpo", *one), "2x80") == [["sampler-0"], ["learner-0"]]
    many = config("carr_4b_grpo", "fleet.num_engines=2", "train.num_workers=3")
    assert who(many, "3x2x80") == [["sampler-0"], ["sampler-1"], ["learner-0"], ["learner-1"], ["learner-2"], []]


def test_an_engine_of_several_gpus_stays_on_one_node() -> None:
    run = config(
        "carr_4b_grpo", "engine.tensor_parallel=2", "fleet.num_gpus=2", "fleet.num_engines=2", "train.num_workers=2"
    )
    assert who(run, "2x3x80") == [
        ["sampler-0.0"], ["sampler-0.1"], ["learner-0"], ["sampler-1.0"], ["sampler-1.1"], ["learner-1"],
    ]  # fmt: skip
    assert seats(run, parse_gpus("6x1x80"))[1] == ["sampler-0", "sampler-1"]
    shared = config(
        "carr_4b_grpo",
        *SHARED,
        "engine.tensor_parallel=2",
        "fleet.num_gpus=2",
        "fleet.num_engines=1",
        "train.num_workers=2",
    )
    assert who(shared, "2x80") == [["sampler-0.0", "learner-0"], ["sampler-0.1", "learner-1"]]


@pytest.mark.parametrize(("text", "nodes"), [("80", [[80.0]]), ("2x4x40", [[40.0] * 4] * 2), ("8xH200", [[139.8] * 8])])
def test_gpus_are_described_in_words(text: str, nodes: list[list[float]]) -> None:
    assert parse_gpus(text) == nodes


@pytest.mark.parametrize("text", ["", "0x80", "8x", "8xz100", "-1", "8x0"])
def test_gpus_that_cannot_be_read_say_how_it_is_written(text: str) -> None:
    with pytest.raises(UserError, match="such as"):
        parse_gpus(text)


# -------------------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("name", "gpus", "overrides"),
    [
        ("carr_4b_grpo", "8x80", []), ("carr_30b_cgrpo", "8xh200", []), ("search_r1_7b_ppo", "8xh200", []),
        ("slate_3b", "4x80", []), ("carr_4b_grpo", "4x80", SHARED),
        ("search_r1_3b_grpo", "1x80", [*SHARED, "fleet.num_engines=1", "train.num_workers=1"]),
    ],
)  # fmt: skip
def test_recipes_fit_the_machines_they_are_written_for(name: str, gpus: str, overrides: list[str]) -> None:
    run = config(name, *overrides)
    shape = ModelShape.of(json.loads((ROOT / run.model.shape).read_text()))
    check_layout(run)
    assert misfits(run, shape, parse_gpus(gpus)) == []


@pytest.mark.parametrize(
    ("overrides", "gpus", "said", "mended"),
    [
        (["learner.gradient_checkpointing=false"], "8x80", "a learner takes", ["learner.gradient_checkpointing=true"]),
        ([], "8x40", "while training (activations", ["train.num_workers=8"]),
        (["engine.gpu_memory_utilization=0.2"], "8x80", "one sequence of 64000 tokens", ["engine.gpu_memory_utilization=0.85"]),
        ([*SHARED, "layout.offload=false", "engine.gpu_memory_utilization=0.9"], "4x80", "while sampling", ["layout.offload=true"]),
        ([*SHARED, "engine.gpu_memory_utilization=0.999"], "4x80", "while sampling", ["engine.gpu_memory_utilization=0.97"]),
        (["learner.max_tokens_per_microbatch=400000"], "8x80", "a learner takes", ["learner.max_tokens_per_microbatch=100000"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_a_change_that_is_enough(
    overrides: list[str], gpus: str, said: str, mended: list[str]
) -> None:
    found = misfits(config("carr_4b_grpo", *overrides), QWEN_4B, parse_gpus(gpus))
    assert len(found) == 1 and "\n" not in found[0] and said in found[0]
    assert found[0].partition("; set ")[2].partition(", on")[0] == " and ".join(mended)
    assert not misfits(
        config("carr_4b_grpo", *overrides, *mended),
        QWEN_4B,
        parse_gpus("16x40" if "num_workers" in mended[0] else gpus),
    )


def test_who_finds_no_gpu_is_said_once() -> None:
    (line,) = misfits(config("carr_4b_grpo"), QWEN_4B, parse_gpus("2x80"))
    assert (
        line.startswith("6 learners and samplers have no GPU to sit on (2 GPUs, first sampler-2);")
        and "collocated" in line
    )


def test_a_model_that_nothing_mends_asks_for_larger_cards() -> None:
    lines = misfits(config("carr_30b_grpo"), QWEN_30B, parse_gpus("8x8"))
    assert len(lines) == 2 and "set engine.tensor_parallel=" not in lines[0] and "use GPUs with more memory" in lines[0]


def test_the_plan_is_printed_and_its_status_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "carr_4b_grpo", "--gpus", "4x80", *SHARED]) == 0
    out = capsys.readouterr().out
    assert "gpu 0-3   sampler-0 .. sampler-3 with learner-0 .. learner-3" in out and "missing     nothing" in out
    assert "147,456 bytes" in out and "learner's moments 7.5 GiB" in out
    assert cli.main(["plan", "carr_4b_grpo", "--gpus", "8x40"]) == 2
    out = capsys.readouterr().out
    assert "training 44.6 (too much)" in out and "missing     a learner takes 44.6 GiB while training" in out
    assert cli.main(["plan", "demo"]) == 0


# ----------------------------------------------------------------------------------------------------- layout


def test_split_is_what_runs_were_before() -> None:
    run = config("carr_4b_grpo")
    assert arranged(run) is run and turns_of(run) is None and offloaded_gib(run, QWEN_4B) == 0
    assert turns_of(config("demo", *SHARED)) == Turns(on_gpu=False, offload=True)


def test_on_shared_gpus_the_engines_alone_ask_ray() -> None:
    run = arranged(config("carr_4b_grpo", *SHARED))
    assert needs(run)["GPU"] == 4 and run.train.worker_gpus == 0 and run.engine.sleeps and arranged(run) == run
    held = learner_of(run, QWEN_4B)
    assert sum(held.kept.values()) == sum(held.held.values()) - held.held["gradients"]
    away = offloaded_gib(run, QWEN_4B)
    assert away == pytest.approx(4 * 12 * QWEN_4B.num_parameters / 4 / (1 << 30))
    there = arranged(config("carr_4b_grpo", *SHARED, "layout.offload=false"))
    assert host_gib(run, QWEN_4B) - host_gib(there, QWEN_4B) == pytest.approx(away)


def test_each_moment_holds_one_of_the_two() -> None:
    run = arranged(config("carr_4b_grpo", *SHARED))
    sampling, training, publishing = moments(run, QWEN_4B, seats(run, parse_gpus("4x80"))[0][0])
    assert "sampler's KV cache" in sampling.parts and not any(p.startswith("learner's w") for p in sampling.parts)
    assert "learner's activations" in training.parts and {p for p in training.parts if p.startswith("sampler")} == {
        "sampler's process"
    }
    assert {"sampler's weights", "learner's weights"} <= set(
        publishing.parts
    ) and "learner's gradients" not in publishing.parts


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.kv_after_update=keep"], "set engine.kv_after_update=recompute"), (["train.num_workers=3"], "set train.num_workers=4"),
        (["fleet.num_gpus=0"], "set fleet.num_gpus=1"), (["fleet.num_gpus=0.5"], "set fleet.num_gpus=1"),
        (["fleet.min_engines=2"], "set fleet.min_engines=0"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_says_what_to_set(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_layout(config("carr_4b_grpo", *SHARED, *overrides))
    assert "\n" not in str(caught.value)


def test_a_learner_finds_the_gpu_of_its_engine() -> None:
    there = {"a": ["10", "2"], "b": ["0"]}
    assert [shared_device(there, "a", rank, 2) for rank in (0, 1)] == [2, 10]
    assert shared_device(there, "a", 1, 2, visible="2, 10") == 1
    for node, num, visible, said in (
        ("a", 1, None, "1 learners beside 2"),
        ("c", 1, None, "beside 0"),
        ("b", 1, "4,5", "share GPU 0"),
    ):
        with pytest.raises(UserError, match=said):
            shared_device(there, node, 0, num, visible)


# ------------------------------------------------------------------------------------------------------ turns


def test_a_learner_waits_for_an_engine_that_is_being_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended the learner may have ended the engine too; without end it waits for nobody."""
    answers = [{"a": ["0"]}, {"b": ["1"]}, {"a": ["0", "1"]}]
    fleet = SimpleNamespace(gpus=SimpleNamespace(remote=lambda: answers.pop(0)))
    context = SimpleNamespace(get_local_rank=lambda: 1, get_local_world_size=lambda: 2)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(turns_module, "_LOOK_S", 0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_device(fleet, context, lambda answer: answer) == torch.device("cuda", 1) and not answers
    monkeypatch.setattr(turns_module, "SEATED_S", 0.0)
    answers.append({"a": ["0"]})
    with pytest.raises(UserError, match="2 learners beside 1 such"):
        find_device(fleet, context, lambda answer: answer)


def test_an_engine_that_slept_samples_only_with_new_weights() -> None:
    engine = Residence()
    assert engine.check_resume()
    engine.slept()
    with pytest.raises(TurnError, match="none were loaded since"):
        engine.check_resume()
    engine.loaded()  # without memory for it, nothing was
    assert engine.stay is Stay.ASLEEP
    engine.mapped()
    with pytest.raises(TurnError):
        engine.check_resume()
    engine.loaded()
    assert not engine.check_resume(), "a publish does not resume it: the learner is still there"
    engine.slept()  # a learner that begins anew
    with pytest.raises(TurnError):
        engine.check_resume()
    engine.mapped(), engine.loaded(), engine.woke()
    assert engine.awake and engine.check_resume()


def test_engines_start_in_the_samplers_turn_alone(tmp_path: Path) -> None:
    async def play() -> list[str]:
        turns, told = FleetTurns(tmp_path / "turn"), []

        async def engine(name: str) -> None:
            async with turns.start():
                told.append(f"{name} starts")
                await asyncio.sleep(0.02)
                told.append(f"{name} is up")

        first = asyncio.create_task(engine("one"))
        await asyncio.sleep(0)
        await turns.to_learner()
        told.append("learner")
        second = asyncio.create_task(engine("two"))
        await asyncio.sleep(0.03)
        assert FleetTurns(tmp_path / "turn").samplers is False, "a fleet that is started again knows whose turn it is"
        turns.to_samplers()
        await asyncio.gather(first, second)
        assert FleetTurns(tmp_path / "turn").samplers
        return told

    assert asyncio.run(play()) == ["one starts", "one is up", "learner", "two starts", "two is up"]


def test_time_asleep_is_counted_from_where_one_asks() -> None:
    async def play() -> None:
        turns, began = FleetTurns(), time.time()
        await turns.to_learner()
        await asyncio.sleep(0.03)
        assert turns.slept_s(began) >= 0.03, "the turn that is under way counts"
        turns.to_samplers()
        after = time.time()
        slept_s = turns.slept_s(began)
        await asyncio.sleep(0.01)
        assert turns.slept_s(began) == slept_s and turns.slept_s(after) == pytest.approx(0, abs=1e-3)

    asyncio.run(play())


class Told:
    """A fleet that writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            def remote(_) -> str:
                self.calls.append(name)
                return name

        return Method()


class Moved(Belongings):
    """Belongings that write down how they move."""

    def __init__(self, told: list[str]) -> None:
        super().__init__([], [])
        self.told = told

    def drop_gradients(self) -> None:
        self.told.append("gradients dropped")

    def move(self, device: Any) -> None:
        self.told.append(f"all to {device}")


@pytest.mark.parametrize("offload", [True, False])
def test_the_learner_leaves_before_engines_take_their_cache(offload: bool) -> None:
    fleet = Told()
    turns = LearnerTurns(fleet, "cuda:1", rank=0, offload=offload, ask=lambda answer: answer)
    turns.learn()
    turns.own(Moved(fleet.calls))
    turns.learn(), turns.before_publish(), turns.sample()
    back, gone = (["all to cuda:1"], ["all to cpu"]) if offload else ([], [])
    whole = ["sleep", *back, "gradients dropped", *gone, "wake"]
    assert fleet.calls == ["sleep", *whole]
    with turns.turn():
        fleet.calls.append("published again")
    assert fleet.calls[1 + len(whole) :] == [*whole[: 2 + len(back)], "published again", *gone, "wake"]


def test_other_ranks_and_split_layouts_ask_nobody() -> None:
    fleet = Told()
    for given, rank in ((None, 0), (fleet, 1)):
        turns = LearnerTurns(given, "cpu", rank=rank, offload=True, ask=lambda answer: answer)
        turns.own(Belongings([], []))
        turns.learn(), turns.before_publish(), turns.sample()
    assert fleet.calls == []


def test_everything_a_learner_holds_moves_and_stays_what_the_optimiser_knows() -> None:
    """Shown by a type instead of a device, which `Tensor.to` takes as well: there is no second device here."""
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    tied[1].weight = tied[0].weight
    adam = torch.optim.AdamW(tied.parameters(), lr=0.1)
    tied(torch.ones(2, 3)).sum().backward()
    adam.step()
    known = [id(p) for p in tied.parameters()]
    mine, there = Belongings([tied], [adam]), torch.float64
    mine.drop_gradients()
    assert all(p.grad is None for p in tied.parameters())
    mine.move(there)  # type: ignore[arg-type]
    state = {(i, k): v.dtype for i, s in enumerate(adam.state.values()) for k, v in s.items()}
    assert {dtype for (_, k), dtype in state.items() if k != "step"} == {there}
    assert {dtype for (_, k), dtype in state.items() if k == "step"} == {torch.float32}, "the count of steps stays"
    assert {t.dtype for t in (*tied.parameters(), tied[2].running_mean)} == {there} and tied[1].weight is tied[0].weight
    assert [id(p) for p in tied.parameters()] == known == [id(p) for g in adam.param_groups for p in g["params"]]


def test_shares_of_a_gpu_at_the_same_time_are_added_and_shards_sit_on_gpus_too() -> None:
    halves = config(
        "carr_4b_grpo", "fleet.num_engines=1", "fleet.num_gpus=0.5", "train.num_workers=1", "train.worker_gpus=0.5",
        "engine.gpu_memory_utilization=0.5",
    )  # fmt: skip
    (gpu,), left = seats(halves, [[80.0]])
    training = next(m for m in moments(halves, QWEN_4B, gpu) if m.name == "training")
    assert not left and "sampler's weights" in training.named and training.gib > 80, "nobody sleeps in a split layout"
    assert any("while training" in line for line in misfits(halves, QWEN_4B, [[80.0]]))
    sharded = [
        "retrieval.kind=faiss",
        "retrieval.shards=2",
        "service.topology.shard_replicas=1",
        "service.topology.shard_gpus=1",
    ]
    assert who(config("carr_4b_grpo", "fleet.num_engines=1", "train.num_workers=1", *sharded), "4x80")[2:] == [
        ["shard-0"],
        ["shard-1"],
    ]


def test_learners_share_the_gpus_of_one_node() -> None:
    shared = config("carr_4b_grpo", *SHARED, "fleet.num_engines=4", "train.num_workers=4")
    assert not misfits(shared, QWEN_4B, parse_gpus("4x80"))
    (line,) = misfits(shared, QWEN_4B, parse_gpus("2x2x80"))
    assert "works on the GPUs of one node, and the engines sit on 2" in line
    assert not one_node(config("carr_4b_grpo"), {"a", "b"})


def test_the_loss_of_the_node_they_share_ends_the_run_at_once_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else learners, which are bound to it, wait until `train.batch_timeout_s`."""
    table = [{"NodeID": "a" * 32, "Alive": True}, {"NodeID": "b" * 32, "Alive": False}]
    monkeypatch.setattr("ray.nodes", lambda: table)
    two = config("carr_4b_grpo", *SHARED, "fleet.num_engines=2", "train.num_workers=2")
    one = SimpleNamespace(_config=two, _shared={"a" * 32}, _looked=-1e9)
    Actors._look_for_shared(one)  # type: ignore[arg-type]
    table[0]["Alive"] = False
    Actors._look_for_shared(one)  # type: ignore[arg-type] - it has just looked
    one._looked -= 60
    with pytest.raises(
        UserError, match=r"^node aaaaaaaa was lost, .* with resume=auto once a node with 2 free GPUs is"
    ):
        Actors._look_for_shared(one)  # type: ignore[arg-type]
    split = SimpleNamespace(_config=two, _shared=set(), _looked=-1e9)
    Actors._look_for_shared(split)  # type: ignore[arg-type] - engines find another place, and learners too
