"""A recorded run, replayed: the same algorithm gives the same losses, another one others, and no sampler is started."""

import json
from pathlib import Path

import pytest

from cluster.record import Recording, recorded
from tests.runs import SMALL, below, finished, gumshoe, rows, wait_for

STEPS = 6


def train(tmp_path: Path, name: str, *more: str) -> tuple[Path, set[str]]:
    """A small run to its end; returns its folder and the titles of all its processes seen on the way."""
    log, run_dir, seen = tmp_path / f"{name}.log", tmp_path / name, set[str]()
    command = (
        "train", "configs/demo.yaml", f"name={name}", f"storage_path={tmp_path}", *SMALL, f"train.steps={STEPS}",
        "buffer.max_staleness=0", *more,
    )  # fmt: skip
    with gumshoe(*command, log=log) as process:

        def look() -> bool:
            seen.update(below(process.pid).values())
            return process.poll() is not None

        wait_for(look, process, log, 180)
        finished(process, log, 1)
    return run_dir, seen


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir, "train")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir, seen = train(tmp_path_factory.mktemp("live"), "live", "--record")
    assert any("VLLM" in title for title in seen), "what the replay must not show would not be seen"
    return run_dir


def test_a_live_run_records_every_group_it_trains(live: Path) -> None:
    recording = Recording(live)
    assert recording.missing == 0 and len(recording) == 2 * STEPS
    assert [entry.step for entry in recording.entries] == [step for step in range(STEPS) for _ in range(2)]
    assert all(v is not None for group in recorded(live) for v in group.verdicts)
    assert recording.manifest["protocol"] == next(recorded(live)).members[0].trajectory.identity.protocol


def test_the_same_algorithm_gives_the_same_losses_and_another_one_others(live: Path, tmp_path: Path) -> None:
    same, seen = train(tmp_path, "same", "--replay", str(live))
    assert losses(same) == pytest.approx(losses(live), abs=1e-5)
    assert any(loss != 0 for loss in losses(live))
    for title in seen:
        assert not any(word in title for word in ("VLLM", "Sampler", "Rollout", "Retrieval", "Reward", "Fleet")), title
    assert any("Replay" in title for title in seen)

    summary = json.loads((same / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["ledger"]["trained"] == 8 * STEPS and summary["checkpoint"]
    assert all(row["staleness/max"] == 0 for row in rows(same, "train"))
    assert (same / "report.html").exists()

    other, _ = train(tmp_path, "other", "--replay", str(live), "advantage.name=dr_grpo")
    assert losses(other) != pytest.approx(losses(live), abs=1e-5)


def test_a_replay_that_cannot_be_is_refused_before_anything_is_written(live: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    common = ("train", "configs/demo.yaml", "name=no", f"storage_path={tmp_path}", *SMALL)
    for more, says in (
        (("--replay", str(tmp_path / "none")), "there is no recording"),
        (("--replay", str(live), "protocol.name=tags"), "recorded with protocol 'tools', and this config has 'tags'"),
        (("--replay", str(live), "buffer.groups_per_batch=100"), "is less than one batch"),
        (("--replay", str(live), f"storage_path={live.parent}", "name=live"), "give it another name="),
    ):
        log.unlink(missing_ok=True)
        with gumshoe(*common, *more, log=log) as process:
            assert process.wait(60) == 2
        text = log.read_text()
        assert says in text and text.count("\n") == 1, text
    assert not (tmp_path / "no").exists() and (live / "groups").is_dir()
