"""Spans: whole rows, a bounded file, and sums that are right."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.report.gantt import rows_of
from agents.report.spans import Span, covered_s, parse, stretches, uses
from cluster.spans import SpanLog, read_spans, seconds_by

ROW = {
    "actor": "learner",
    "phase": "train",
    "began": 1.0,
    "ended": 3.5,
    "step": 2,
    "seconds": {"pack": 0.5},
    "kind": "span",
}
SPANS = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 10)).map(lambda t: Span("a", "p", t[0], t[0] + t[1])), max_size=30
)


def test_rows_are_on_disk_at_once_and_go_on_after_a_crash(tmp_path: Path) -> None:
    log = SpanLog(tmp_path)
    log.write([ROW, {**ROW, "step": 3, "seconds": None}])
    assert read_spans(tmp_path) == [
        Span("learner", "train", 1.0, 3.5, 2, {"pack": 0.5}),
        Span("learner", "train", 1.0, 3.5, 3),
    ]
    log.close()
    with open(tmp_path / "spans.jsonl", "a") as file:
        file.write('{"actor": "learner", "ph')  # a writer that was killed
    assert len(read_spans(tmp_path)) == 2
    with SpanLog(tmp_path) as again:
        again.write([{**ROW, "began": 0.5}])
    assert [s.began for s in read_spans(tmp_path)] == [0.5, 1.0, 1.0]
    assert read_spans(tmp_path / "nowhere") == []


def test_the_file_stays_below_its_bound(tmp_path: Path) -> None:
    with SpanLog(tmp_path, max_bytes=4000) as log:
        for step in range(500):
            log.write([{**ROW, "step": step}])
            assert (tmp_path / "spans.jsonl").stat().st_size <= 4000
    steps = [s.step for s in read_spans(tmp_path)]
    assert len(steps) >= 10 and steps == list(range(steps[0], 500))


class Full:
    """A file on a full disk: takes a few bytes of what it is given, then nothing."""

    def __init__(self, file: Any, room: int = 0) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if self._room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self._room = data[: self._room], 0
        return int(self._file.write(taken))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_full_disk_costs_spans_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SpanLog(tmp_path, max_bytes=2000)
    for step in range(10):
        log.write([{**ROW, "step": step}])
    whole, free = (tmp_path / "spans.jsonl").read_bytes(), log._file
    for room in (0, 20):  # what was written of a row is taken back
        log._file = Full(free, room)  # type: ignore[assignment]
        log.write([ROW])
        assert (tmp_path / "spans.jsonl").read_bytes() == whole
    log._file = free
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Full(None).write)  # no room for the newer half either
        for _ in range(50):
            log.write([ROW])
    assert whole in (tmp_path / "spans.jsonl").read_bytes() and (tmp_path / "spans.jsonl").stat().st_size <= 2000
    log.write([{**ROW, "step": 77}])  # there is room again
    assert [s.step for s in read_spans(tmp_path)].count(77) == 1 and not list(tmp_path.glob("*.part"))
    log.close()
    log.write([ROW])
    log.close()
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "null", '{"actor": "a"}', '{"actor":"a","phase":"p","began":2,"ended":1,"step":0}',
             '{"actor":"a","phase":"p","began":NaN,"ended":1,"step":0}', '{"actor":"a","phase":"p","began":0,"ended":1,"step":0,"seconds":[1]}',
             '{"actor":"a","phase":"p","began":0,"ended":1,"step":Infinity}', '{"actor":"a","phase":"p","began":0,"ended":1e20,"step":0}',
             '{"actor":"a","phase":"p","began":0,"ended":1,"step":0,"seconds":{"x":NaN}}', '{"actor":"a","phase":"p","began":1' + "0" * 400 + ',"ended":1,"step":0}'],
)  # fmt: skip
def test_a_foreign_line_is_no_span(line: str) -> None:
    assert parse(line) is None


def test_sums() -> None:
    spans = [
        Span("learner", "train", 0.0, 2.0, 1, {"forward": 0.5}),
        Span("rollout-10", "rollout", 0.0, 3.0, 1, {"generate": 9.0}),
        Span("rollout-2", "rollout", 1.0, 4.0, 1),
        Span("rollout-2", "rollout", 2.0, 6.0, 1),
    ]
    sums = seconds_by(spans)
    assert sums == {
        (1, "learner", "train"): 2.0, (1, "learner", "train/forward"): 0.5, (1, "rollout-10", "rollout"): 3.0,
        (1, "rollout-10", "rollout/generate"): 9.0, (1, "rollout-2", "rollout"): 7.0,
    }  # fmt: skip
    found = uses(spans)
    assert [u.actor for u in found] == ["learner", "rollout-2", "rollout-10"]
    assert (found[1].total_s, found[1].busy_s, found[1].count) == (7.0, 5.0, 2)


@given(SPANS, st.floats(0, 5))
def test_stretches_cover_each_span_once(spans: list[Span], gap: float) -> None:
    found = stretches(spans, gap)
    assert all(a[1] + gap < b[0] for a, b in itertools.pairwise(found))
    assert all(any(b <= s.began and s.ended <= e for b, e in found) for s in spans)
    assert covered_s(spans) <= sum(s.took_s for s in spans) + 1e-6


@given(SPANS)
def test_rows_of_the_timeline_hold_every_span_without_overlap(spans: list[Span]) -> None:
    rows = rows_of(spans)
    assert sorted(map(id, spans)) == sorted(id(s) for row in rows for s in row)
    for row in rows:
        assert all(a.ended <= b.began + 1e-3 for a, b in itertools.pairwise(row))
