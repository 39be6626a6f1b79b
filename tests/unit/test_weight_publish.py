"""The weight segment as a file, and the publish state machine with engines that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.vllm.segment import Manifest, SegmentError, SegmentReader, ShmWriter, TensorSpec, file_layout
from cluster.vllm.transfer import PHASES, Deadlines, Phase, ShmTransport, publish


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"b": torch.full((3, 5), value), "a": torch.arange(4).to(torch.bfloat16), "s": torch.tensor(value)}


def test_a_segment_is_a_safetensors_file_and_reads_back(tmp_path: Path) -> None:
    manifest = ShmWriter(tmp_path).write(weights(2.0).items())
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    reader = SegmentReader(manifest)
    reader.verify_checksum()
    reader.verify_layout(file_layout(manifest.path))
    loaded = load_file(manifest.path)
    for name, tensor in reader.tensors():
        assert torch.equal(tensor, weights(2.0)[name]) and torch.equal(tensor, loaded[name])


def test_only_two_segments_stay_and_a_mapped_one_keeps_its_bytes(tmp_path: Path) -> None:
    writer = ShmWriter(tmp_path)
    reader = SegmentReader(writer.write(weights(0.0).items()))
    for value in (1.0, 2.0, 3.0):
        writer.write(weights(value).items())
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(dict(reader.tensors())["b"], weights(0.0)["b"])
    writer.close()
    assert not tmp_path.exists()


def test_what_a_reader_does_to_its_tensors_stays_with_it(tmp_path: Path) -> None:
    manifest = ShmWriter(tmp_path).write(weights(1.0).items())
    dict(SegmentReader(manifest).tensors())["b"].fill_(9.0)
    SegmentReader(manifest).verify_checksum()


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"b": TensorSpec("F32", (3, 5)), "a": TensorSpec("BF16", (4,))}, "has unknown 's'"),
        ({"b": TensorSpec("F32", (5, 3)), "a": TensorSpec("BF16", (4,)), "s": TensorSpec("F32", ())}, "shape"),
        ({"b": TensorSpec("F32", (3, 5)), "a": TensorSpec("F32", (4,)), "s": TensorSpec("F32", ())}, "takes F32"),
    ],
)
def test_a_layout_that_differs_is_named(tmp_path: Path, layout: dict[str, TensorSpec], says: str) -> None:
    reader = SegmentReader(ShmWriter(tmp_path).write(weights(1.0).items()))
    with pytest.raises(SegmentError, match=says):
        reader.verify_layout(layout)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    manifest = ShmWriter(tmp_path).write(weights(1.0).items())
    whole = Path(manifest.path).read_bytes()
    Path(manifest.path).write_bytes(whole[:-8])
    with pytest.raises(SegmentError, match="its manifest says"):
        SegmentReader(manifest)
    with pytest.raises(SegmentError, match="inside the file"):
        file_layout(manifest.path)


class Engine:
    """Records the calls; fails or hangs in the phase it is told to."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.calls: list[str] = []
        self._fails, self._hangs = fails, hangs

    def __getattr__(self, name: str) -> Any:
        async def call(*_: Any) -> None:
            self.calls.append(name)
            if name == self._fails:
                raise RuntimeError(f"{name} broke")
            if name == self._hangs:
                await asyncio.sleep(60)

        return call


ALL = [
    "init_weight_transfer",
    "stage_weights",
    "pause",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "set_version",
    "resume",
]
QUICK = Deadlines(*(0.05 for _ in PHASES))
MANIFEST = Manifest("somewhere", 1, "0", 1)


async def test_one_failure_leaves_the_other_engine_alone() -> None:
    engines = {"good": Engine(), "bad": Engine(hangs="pause")}
    report = await publish(engines, ShmTransport(MANIFEST), "v", QUICK)
    assert engines["good"].calls == ALL
    assert report.failed == ("bad",) and report.results["bad"].serving == "old"
    assert engines["bad"].calls[-1] == "resume"


@pytest.mark.parametrize("phase", ["start_weight_update", "update_weights"])
async def test_before_anything_is_applied_the_old_weights_go_on(phase: str) -> None:
    engine = Engine(fails=phase)
    result = (await publish({"e": engine}, ShmTransport(MANIFEST), "v", QUICK)).results["e"]
    assert result.serving == "old" and result.reason == f"{phase} broke"
    assert engine.calls[-2:] == ["abort_weight_update", "resume"]


@pytest.mark.parametrize("phase", ["finish_weight_update", "set_version"])
async def test_half_applied_or_unlabelled_weights_are_never_resumed(phase: str) -> None:
    engine = Engine(hangs=phase)
    result = (await publish({"e": engine}, ShmTransport(MANIFEST), "v", QUICK)).results["e"]
    assert result.serving == "unknown" and not result.ok and "within 0.05 s" in result.reason
    assert "resume" not in engine.calls


class Broadcast:
    """A collective backend, as NCCL is: all engines or none, and unsafe as soon as data moves."""

    collective = True
    unsafe_from = Phase.UPDATE

    def __init__(self, resendable: bool = False) -> None:
        self.sent = 0
        self.resendable = resendable

    def init_info(self, index: int, num_engines: int) -> Mapping[str, Any]:
        return {"rank_offset": 1 + index, "world_size": 1 + num_engines}

    def stage_info(self, index: int) -> Mapping[str, Any]:
        return {}

    async def updates(self, index: int) -> AsyncGenerator[Mapping[str, Any], None]:
        yield {}

    async def send(self) -> None:
        self.sent += 1


async def test_a_collective_sends_once_and_only_if_all_are_ready() -> None:
    transport = Broadcast()
    assert (await publish({"a": Engine(), "b": Engine()}, transport, "v", QUICK)).ok and transport.sent == 1
    engines = {"a": Engine(), "b": Engine(fails="start_weight_update")}
    report = await publish(engines, transport, "v", QUICK)
    assert transport.sent == 1
    assert {result.serving for result in report.results.values()} == {"old"}
    assert "another engine failed in start" in report.results["a"].reason
    assert report.results["b"].own_fault and not report.results["a"].own_fault


async def test_a_collective_that_breaks_while_sending_leaves_nobody_trusted() -> None:
    engines = {"a": Engine(), "b": Engine(hangs="update_weights")}
    report = await publish(engines, Broadcast(), "v", QUICK)
    assert {result.serving for result in report.results.values()} == {"unknown"}
    assert all("resume" not in engine.calls for engine in engines.values())


async def test_after_a_broken_collective_who_answers_is_held_for_the_next_and_who_does_not_is_given_up() -> None:
    engines = {"a": Engine(fails="update_weights"), "b": Engine(hangs="update_weights"), "c": Engine()}

    async def deaf(*_: Any) -> None:
        raise RuntimeError("the process has died")

    engines["b"].abort_weight_update = deaf
    report = await publish(engines, Broadcast(resendable=True), "v", QUICK)
    assert {name: result.serving for name, result in report.results.items()} == {
        "a": "held",
        "b": "unknown",
        "c": "held",
    }
    assert all("resume" not in engine.calls for engine in engines.values()), "half-new weights sampled"
    assert not report.results["c"].own_fault
    again = await publish({"a": Engine(), "c": Engine()}, Broadcast(resendable=True), "v", QUICK)
    assert again.ok
