"""The GPU learner's checks fail when what they check is broken, and only then."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import gpu_learner
from benchmarks.gpu_learner import Kind, judged
from cluster.gpu_check import Bench, Failed, NotRun

KINDS = [Kind("auto", judged=True), Kind("auto, checkpointing", judged=True), Kind("FSDP2", sharded=True)]
H100 = "NVIDIA H100 80GB HBM3"


def told(tokens_per_s: float, mfu: float | None) -> dict[str, Any]:
    return {"tokens_per_s": tokens_per_s, "mfu": mfu, "phases_s": {}}


OUT = {"why": "out of memory"}
BROKEN = {"why": "RuntimeError: no kernel", "broken": True}


def test_the_goal_is_asked_of_what_a_run_on_one_gpu_takes() -> None:
    fast = {"auto": told(100, 0.41), "auto, checkpointing": told(90, 0.37), "FSDP2": told(200, 0.8)}
    figures = judged(KINDS, fast, H100)
    assert (figures["best"], figures["fastest"], figures["mfu"]) == ("auto", "FSDP2", 0.41)
    with pytest.raises(Failed, match=r"MFU is 0.390 \(auto\)"):
        judged(KINDS, fast | {"auto": told(100, 0.39)}, H100)
    assert (
        judged(KINDS, fast | {"auto": OUT, "auto, checkpointing": told(90, 0.4)}, H100)["best"] == "auto, checkpointing"
    )


def test_a_kind_that_breaks_fails_the_check_however_fast_the_others_are() -> None:
    fast = {"auto": told(100, 0.5), "auto, checkpointing": OUT, "FSDP2": BROKEN}
    with pytest.raises(Failed, match="FSDP2: RuntimeError: no kernel") as caught:
        judged(KINDS, fast, H100)
    assert caught.value.figures["kinds"] == fast


def test_what_cannot_be_answered_is_no_pass() -> None:
    with pytest.raises(NotRun, match="fits its memory"):
        judged(KINDS, {"auto": OUT, "auto, checkpointing": OUT, "FSDP2": told(200, 0.8)}, H100)
    with pytest.raises(NotRun, match="peak of A card is not in"):
        judged(KINDS, {kind.name: told(100, None) for kind in KINDS}, "A card")
    with pytest.raises(Failed):
        judged(KINDS, {kind.name: told(100, math.nan) for kind in KINDS}, H100)


class Stub:
    """A learner whose steps say what they are told to."""

    layout = "packed"

    def __init__(self, *answers: Any) -> None:
        self.answers = iter(answers)

    def step(self, given: Any) -> dict[str, float]:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return {"loss": 1.0, "grad_norm": 1.0, "skipped/nonfinite": 0.0, "learner/computed_tokens": 1.0, **answer}


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([torch.OutOfMemoryError("CUDA out of memory")], {"why": "out of memory"}),
        ([RuntimeError("CUDA error: an illegal memory access")], {"why": "RuntimeError: CUDA error: an illegal memory access", "broken": True}),
        ([{}, {"loss": math.nan}], {"why": "FloatingPointError: loss nan, gradient norm 1.0", "broken": True}),
        ([{}, {"grad_norm": math.inf}], {"why": "FloatingPointError: loss 1.0, gradient norm inf", "broken": True}),
        ([{}, {"skipped/nonfinite": 1.0}], {"why": "FloatingPointError: loss 1.0, gradient norm 1.0", "broken": True}),
    ],
)  # fmt: skip
def test_only_a_full_memory_is_tolerated_and_a_step_that_is_skipped_breaks_a_kind(
    answers: list[Any], why: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(*answers)
    monkeypatch.setattr(gpu_learner, "_policy", lambda *_, **__: None)
    monkeypatch.setattr(gpu_learner, "_learner", lambda *_, **__: stub)
    monkeypatch.setattr("benchmarks.gpu_work.random_model", lambda *_: None)
    kind = Kind("auto", {"attention": "sdpa", "layout": "padded"})
    assert gpu_learner._timed(Bench("cpu"), {}, kind, []) == why


def test_a_size_notes_its_kinds_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_learner, "_timed", lambda bench, config, kind, given: told(len(kind.name), 0.5))
    noted: list[list[str]] = []
    bench = Bench("cpu", note=lambda figures: noted.append(list(figures["kinds"])))
    figures = gpu_learner.speed("0.6b")(bench)
    names = [kind.name for kind in gpu_learner.kinds(bench, "0.6b")]
    assert noted == [names[: i + 1] for i in range(len(names))] and list(figures["kinds"]) == names


@pytest.mark.parametrize("value", [math.nan, 0.011, -0.1])
def test_a_figure_that_is_no_number_or_outside_its_bounds_fails(value: float) -> None:
    with pytest.raises(Failed, match="kl is"):
        gpu_learner._hold({"kl": value}, {"kl": (0.0, 0.01)})
    gpu_learner._hold({"kl": 0.01}, {"kl": (0.0, 0.01)})


def test_the_worst_of_some_is_one_that_is_no_number() -> None:
    assert math.isnan(gpu_learner._worst([0.1, math.nan, 0.2])) and gpu_learner._worst([0.1, 0.2]) == 0.2
    assert gpu_learner._mean([torch.ones(3), torch.zeros(1)]) == 0.75
    assert math.isnan(gpu_learner._mean([torch.ones(3), torch.tensor([math.nan])]))


def test_the_kinds_that_are_judged_are_those_of_runs() -> None:
    """A run of one process has no FSDP2, and what it does not say is `auto`."""
    found = gpu_learner.kinds(Bench("cuda", H100), "1.7b")
    assert [k.name for k in found if k.judged] == ["auto", "auto, checkpointing"]
    assert all(not k.sharded and k.settings["layout"] == k.settings["attention"] == "auto" for k in found if k.judged)
