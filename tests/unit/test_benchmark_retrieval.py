"""The arithmetic of `benchmarks/retrieval.py`; what it measures takes hours and is not run here."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import retrieval


def test_goals_compare_with_the_same_work_of_the_bare_library() -> None:
    figures = {
        "debian/flat": {"library encode+search: q/s": 200.0, "library search: q/s": 9000.0, "served 64: q/s": 170.0},
        "debian/flat spread": {"served 64: q/s": 150.0},
        "debian/bm25": {"library encode+search: q/s": 1000.0, "http 64: q/s": 100.0},
        "router": {"overhead through an actor: p50 ms": 1.5},
    }
    assert retrieval.goals(figures) == {
        "debian/flat: served over library": 0.85, "debian/flat spread: served over library": 0.75,
        "debian/bm25: http over library": 0.1, "router overhead p50 ms, 16 clients": 1.5,
    }  # fmt: skip
    lines = list(retrieval.table(figures))
    assert len(lines) == 4 and "170.0" in lines[1]


def test_clients_ask_something_new_each_time_and_only_settled_time_counts() -> None:
    asked: list[str] = []

    async def ask(text: str) -> None:
        asked.append(text)
        await asyncio.sleep(0.01)

    found = asyncio.run(retrieval.load(ask, [f"q{i}" for i in range(10_000)], clients=4, seconds=0.4, first=0))
    assert len(set(asked)) == len(asked) and found["q/s"] * 0.4 < len(asked)
    assert found["p50 ms"] >= 10 and 20 < found["q/s"] <= 400


def test_help_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        retrieval.main(["--help"])
    assert ended.value.code == 0 and "--parts" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        retrieval.main(["--parts", "nonsense"])
    assert ended.value.code == 2
