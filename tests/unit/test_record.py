"""Recorded groups: what was written comes back in the order it was trained; what does not fit is refused in one line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents import plain
from agents.recordfile import RecordWriter, write_records
from agents.types import Group, RecordError
from cluster.record import Recorder, Recording, check_speech, recorded, recorded_batches
from tests.builders import a_group
from tests.runs import ROOT

GROUPS = [a_group(task=f"t{i}", group=f"t{i}/{i}", seed=i) for i in range(6)]


def record(run_dir: Path, groups: list[Group] = GROUPS) -> Path:
    recorder = Recorder(run_dir / "groups", {"run": "live"})
    for group in groups:
        recorder.write(group)
    recorder.close()
    return run_dir


def spoken(group: Group, **changes: str) -> Group:
    """The group, had it been played with another protocol, tokenizer or template."""
    members = tuple(
        replace(m, trajectory=replace(m.trajectory, identity=replace(m.trajectory.identity, **changes)))  # type: ignore[arg-type]
        for m in group.members
    )
    return replace(group, members=members)


def write_ledger(run_dir: Path, *moves: dict[str, Any]) -> None:
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(move) + "\n" for move in moves))


def trained(step: int, *leases: str) -> list[dict[str, Any]]:
    return [{"op": "ship", "step": step, "leases": list(leases)}, {"op": "settle", "step": step}]


def test_groups_come_back_in_order_over_the_parts_of_several_starts(tmp_path: Path) -> None:
    record(tmp_path, GROUPS[:2])
    record(tmp_path, GROUPS[2:])
    assert list(recorded(tmp_path)) == GROUPS == list(recorded(tmp_path / "groups"))
    assert sorted(p.name for p in (tmp_path / "groups").iterdir()) == [
        "manifest.json", "part-00000.msgpack.z", "part-00001.msgpack.z",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "groups" / "manifest.json").read_text())
    assert {
        "run": "live",
        "schema": 1,
        "protocol": "tools",
        "tokenizer": "tok",
        "template": "tmpl",
    }.items() <= manifest.items()


def test_threads_that_write_at_once_leave_whole_groups(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "groups")
    threads = [threading.Thread(target=recorder.write, args=(group,)) for group in GROUPS * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    assert sorted(g.id for g in recorded(tmp_path)) == sorted(g.id for g in GROUPS * 4)


def test_a_writer_killed_at_any_moment_costs_at_most_the_group_it_was_writing(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom cluster.record import Recorder\nfrom tests.builders import a_group\n"
        "recorder = Recorder(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    recorder.write(a_group((1.0, 0.0, 0.0, 1.0), task='t', group=str(i), tokens=2000))\n"
        "    print(i, flush=True)\n"
    )
    for life in range(3):
        command = [sys.executable, "-c", script, str(tmp_path / "groups")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 * life)
            os.kill(writer.pid, signal.SIGKILL)
            whole = 1 + len(writer.stdout.read().split())
        ids = [g.id for g in recorded(tmp_path)]
        assert ids.count("0") == life + 1  # each life counts from 0
        in_last_part = ids[::-1].index("0") + 1
        assert whole <= in_last_part <= whole + 1


def test_every_cut_of_the_last_part_costs_only_what_it_cuts(tmp_path: Path) -> None:
    record(tmp_path, GROUPS[:3])
    part = tmp_path / "groups" / "part-00000.msgpack.z"
    whole = part.read_bytes()
    for cut in range(0, len(whole), 37):
        part.write_bytes(whole[:cut])
        found = list(recorded(tmp_path))
        assert found == GROUPS[: len(found)] and len(found) < 3
        if found:
            assert [e.id for e in Recording(tmp_path).entries] == [g.id for g in found]


def test_a_disk_that_is_full_takes_back_the_torn_group(tmp_path: Path) -> None:
    record(tmp_path, GROUPS[:2])
    size = (tmp_path / "groups" / "part-00000.msgpack.z").stat().st_size
    recorder = Recorder(tmp_path / "groups")
    recorder.write(GROUPS[2])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            for group in GROUPS[3:]:
                recorder.write(group)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.write(GROUPS[5])  # there is room again
    recorder.close()
    assert [g.id for g in recorded(tmp_path)] in ([g.id for g in [*GROUPS[:n], GROUPS[5]]] for n in (3, 4, 5))


@pytest.mark.parametrize("name", ["protocol", "tokenizer", "template"])
def test_groups_that_speak_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    other = spoken(GROUPS[1], **{name: "other"})
    recorder = Recorder(tmp_path / "groups")
    recorder.write(GROUPS[0])
    with pytest.raises(RecordError, match=f"holds groups with {name} .* cannot be mixed with 'other'"):
        recorder.write(other)
    recorder.close()
    with pytest.raises(RecordError, match=name):
        Recorder(tmp_path / "groups").write(other)
    assert list(recorded(tmp_path)) == GROUPS[:1]


def test_another_run_is_not_mixed_into_a_recording(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(RecordError, match="holds groups with run 'live', which cannot be mixed with 'other'"):
        Recorder(tmp_path / "groups", {"run": "other"})


def test_the_ledger_gives_the_order_that_was_trained(tmp_path: Path) -> None:
    record(tmp_path)
    a, b, c, d, e, _ = (g.id for g in GROUPS)
    write_ledger(
        tmp_path,
        {"op": "admit", "lease": a, "n": 2, "task": "t0"},
        *trained(0, b, a),
        *trained(1, c),
        *trained(2, d),
        {"op": "enter", "incarnation": 1, "step": 1, "trained": 4, "keep": [c]},  # back to the checkpoint of step 1
        {"op": "ship", "step": 1, "leases": [d]},
        {"op": "lose", "reason": "buffer_lost", "batch": True},
        *trained(1, e),
        *trained(2, c),
        {"op": "ship", "step": 3, "leases": [a]},  # shipped, never trained
    )
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"op": "set')  # torn
    assert [(step, [g.id for g in groups]) for step, groups in recorded_batches(tmp_path)] == [
        (0, [b, a]), (1, [e]), (2, [c]),
    ]  # fmt: skip
    assert [g.id for g in recorded(tmp_path)] == [g.id for g in GROUPS]


def test_what_was_trained_before_recording_began_is_counted(tmp_path: Path) -> None:
    record(tmp_path)
    write_ledger(tmp_path, *trained(0, "lost/1"), *trained(1, GROUPS[1].id))
    recording = Recording(tmp_path)
    assert [e.id for e in recording.entries] == [GROUPS[1].id] and recording.missing == 1


def test_a_group_that_was_played_twice_counts_as_played_last(tmp_path: Path) -> None:
    record(tmp_path)
    again = a_group((0.0, 1.0), task="t1", group=GROUPS[1].id, seed=77)
    record(tmp_path, [again])
    found = Recording(tmp_path).entries
    assert [e.id for e in found] == [g.id for g in GROUPS] and found[1].frame.read(Group) == again


def test_only_the_speech_of_the_recording_may_replay_it(tmp_path: Path) -> None:
    class Speech:
        name, tokenizer_fingerprint, template_fingerprint = "tools", "tok", "tmpl"

    manifest = Recording(record(tmp_path)).manifest
    check_speech(manifest, Speech(), tmp_path)  # type: ignore[arg-type]
    for attribute, name in (
        ("name", "protocol"),
        ("tokenizer_fingerprint", "tokenizer"),
        ("template_fingerprint", "template"),
    ):
        other = Speech()
        setattr(other, attribute, "other")
        with pytest.raises(RecordError, match=f"recorded with {name} '.*', and this config has 'other'"):
            check_speech(manifest, other, tmp_path)  # type: ignore[arg-type]


def test_other_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(source: Path, match: str) -> None:
        with pytest.raises(RecordError, match=match) as error:
            Recording(source)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "there is no recording")
    refused(tmp_path, "holds no recorded groups")
    groups = tmp_path / "groups"
    groups.mkdir()
    for manifest, match in (
        ("{", "damaged manifest"),
        ('{"kind": "checkpoint"}', "no manifest of recorded groups"),
        ("[]", "no manifest of recorded groups"),
        ('{"kind": "gumshoe groups", "schema": 99}', "record schema 99 is not supported; this version reads schema 1"),
        ('{"kind": "gumshoe groups", "schema": 0}', "record schema 0 is not supported"),
        ('{"kind": "gumshoe groups", "schema": 1}', "is empty"),
    ):
        (groups / "manifest.json").write_text(manifest)
        refused(tmp_path, match)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match="has no manifest"):
        Recorder(tmp_path / "other")


def with_schema(group: Group, schema: Any) -> dict[str, Any]:
    values = plain.to_plain(group)
    for member in values["members"]:
        member["trajectory"]["identity"]["schema"] = schema
    return values


@pytest.mark.parametrize("schema", [0, 99])
def test_a_group_of_another_schema_is_refused_by_number_and_place(tmp_path: Path, schema: int) -> None:
    record(tmp_path)
    write_records(
        tmp_path / "groups" / "part-00001.msgpack.z", [plain.to_plain(GROUPS[0]), with_schema(GROUPS[1], schema)]
    )
    with pytest.raises(RecordError, match=rf"part-00001\.msgpack\.z:2: .*record schema {schema} is not supported"):
        list(recorded(tmp_path))
    with pytest.raises(RecordError, match=rf"part-00001\.msgpack\.z:2: .*record schema {schema} is not supported"):
        Recording(tmp_path).entries[1].frame.read(Group)


def test_a_field_that_an_older_writer_did_not_know_takes_its_default(tmp_path: Path) -> None:
    record(tmp_path, GROUPS[:1])
    older = plain.to_plain(GROUPS[1])
    del older["seconds"], older["task"]["nuggets"]
    for member in older["members"]:
        del member["trajectory"]["error"], member["trajectory"]["verdict"]["prompts"]
        del member["trajectory"]["identity"]["schema"], member["trajectory"]["identity"]["sampling"]["seed"]
    write_records(tmp_path / "groups" / "part-00001.msgpack.z", [older])
    assert list(recorded(tmp_path)) == GROUPS[:2]


def test_an_older_schema_is_brought_up_to_date_by_its_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_0(record: str, values: dict[str, Any]) -> dict[str, Any]:
        assert record == "Group"
        values["seconds"] = values.pop("times")
        for member in values["members"]:
            member["trajectory"]["identity"]["schema"] = 1
        return values

    old = with_schema(GROUPS[1], 0)
    old["times"] = old.pop("seconds")
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "manifest.json").write_text('{"kind": "gumshoe groups", "schema": 0}')
    with RecordWriter(tmp_path / "groups" / "part-00000.msgpack.z") as writer:
        writer.write(old)
    monkeypatch.setitem(plain.MIGRATIONS, 0, from_0)
    assert list(recorded(tmp_path)) == [GROUPS[1]]


def test_a_flipped_bit_is_named_by_file_and_frame(tmp_path: Path) -> None:
    record(tmp_path)
    part = tmp_path / "groups" / "part-00000.msgpack.z"
    entry = Recording(tmp_path).entries[3]
    data = bytearray(part.read_bytes())
    data[entry.frame.offset + entry.frame.length // 2] ^= 16
    part.write_bytes(data)
    with pytest.raises(RecordError, match=r"part-00000\.msgpack\.z:4: damaged record"):
        list(recorded(tmp_path))
    with pytest.raises(RecordError, match=r"part-00000\.msgpack\.z:4: damaged record"):
        Recording(tmp_path).entries[3].frame.read(Group)
