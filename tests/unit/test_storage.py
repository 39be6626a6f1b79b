"""Storage without a cluster: an object store (here fsspec's `local://`, which nothing takes for a folder), copies per node, a run's mirror."""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import nodecache
from cluster.config import load_config
from cluster.errors import UserError
from cluster.machine import check_storage
from cluster.mirror import Mirror, mirrored, newest_checkpoint, newest_name, pull_checkpoint, push_checkpoint
from cluster.nodecache import Place, at_hand, fingerprint, furnish, put, ship, unpack
from cluster.nodes import Answer, Node
from cluster.preflight import check_settings
from cluster.rundir import open_run, storage_dir
from cluster.schema import RunConfig
from cluster.storage import ObjectStore, is_object_store, leave_token, prove_shared, read_probe, sees_token

NODES = [Node("a" * 8, "10.0.0.1", {}, {}), Node("b" * 8, "10.0.0.2", {}, {})]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, which is where a node's copies and an object store's runs lie."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GUMSHOE_CACHE", raising=False)
    monkeypatch.setattr(nodecache, "_held", {})
    return tmp_path / "home"


def seeing(root: Path) -> Callable[..., list[Answer]]:
    """Asks nodes that see `root` where this machine has its disk."""

    def ask(nodes: list[Node], work: Callable[[str], Any], path: str) -> list[Answer]:
        more = (0.0,) if work is read_probe else ()
        return [Answer(n, work(f"{root}{path}", *more)) for n in nodes]

    return ask


def folder(at: Path, **files: str) -> Path:
    for name, text in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    return at


def test_a_folder_that_another_node_does_not_see_is_refused_and_one_it_sees_is_not(tmp_path: Path) -> None:
    prove_shared(tmp_path, NODES, seeing(Path("/")))
    with pytest.raises(
        UserError, match=r"storage_path .* is not shared: node 10\.0\.0\.2 .* such as s3://bucket/runs"
    ) as caught:
        prove_shared(tmp_path, NODES, seeing(tmp_path / "elsewhere"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir()), "the probe is removed"
    with pytest.raises(UserError, match="no answer within 60 s"):
        prove_shared(tmp_path, NODES, lambda nodes, *_: [Answer(nodes[0], problem="no answer within 60 s")])
    prove_shared(tmp_path, NODES[:1], seeing(tmp_path / "elsewhere"))


def test_an_object_store_gives_back_what_was_put_in(tmp_path: Path) -> None:
    store = ObjectStore(f"local://{tmp_path}/bucket")
    assert store.sizes() == {} and store.read("a/b") is None
    made = folder(tmp_path / "made", **{"x": "1", "sub/y": "22", "last": "333"})
    store.upload(made, "there", ["last", "sub/y", "x"], last="last")
    assert store.sizes("there") == {"x": 1, "sub/y": 2, "last": 3}
    store.download("there", tmp_path / "back", store.sizes("there"))
    assert (tmp_path / "back" / "sub" / "y").read_text() == "22"
    store.delete("there")
    store.delete("there")
    assert store.sizes("there") == {}
    check_storage(f"local://{tmp_path}/bucket")
    assert not store.sizes(), "a check leaves nothing"
    with pytest.raises(UserError, match="nosuch://bucket cannot be opened"):
        check_storage("nosuch://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write local://"):
        check_storage(f"local://{tmp_path}/file/below")


class Flaky:
    """A filesystem of which one method fails; `write`: of its streams."""

    def __init__(self, real: Any, fails: str) -> None:
        self.real, self.fails = real, fails

    def __getattr__(self, method: str) -> Any:
        return self._fail if method == self.fails else getattr(self.real, method)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise OSError("the network went away")

    def open_output_stream(self, path: str) -> Any:
        if self.fails == "open_output_stream":
            self._fail()
        stream = self.real.open_output_stream(path)
        return Breaking(stream) if self.fails == "write" else stream


class Breaking:
    """A stream of pyarrow's that takes half of what it is given: closing it makes a file of that."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, chunk: bytes) -> None:
        self.stream.write(chunk[: len(chunk) // 2])
        raise OSError("the network went away")


@pytest.mark.parametrize("scheme", ["local", "memory"])
@pytest.mark.parametrize("fails", ["open_output_stream", "write", "move"])
def test_a_file_that_cannot_be_sent_whole_stays_what_it_was(tmp_path: Path, scheme: str, fails: str) -> None:
    store = ObjectStore(f"{scheme}://{tmp_path}/bucket")
    store.write("run/ledger.jsonl", b"old")
    store.write("run/ledger.jsonl", b"whole")
    folder(tmp_path / "run", **{"ledger.jsonl": "whole and more", "new": "n"})
    real, store.filesystem = store.filesystem, Flaky(store.filesystem, fails)
    for attempt in (
        lambda: store.write("run/ledger.jsonl", b"whole and more"),
        lambda: store.upload(tmp_path / "run", "run", ["ledger.jsonl"], replacing=True),
        lambda: store.upload(tmp_path / "run", "run", ["new"], last="new"),
    ):
        with pytest.raises(UserError, match="the network went away"):
            attempt()
        assert store.read("run/ledger.jsonl") == b"whole" and store.sizes("run") == {"ledger.jsonl": 5}
    store.filesystem = real
    store.upload(tmp_path / "run", "run", ["ledger.jsonl", "new"], replacing=True)
    assert store.read("run/ledger.jsonl") == b"whole and more" and store.sizes() == {
        "run/ledger.jsonl": 14,
        "run/new": 1,
    }


def test_a_store_that_cannot_move_copies_and_what_others_write_is_not_listed(tmp_path: Path) -> None:
    store = ObjectStore(f"local://{tmp_path}/bucket")
    store.filesystem = Flaky(store.filesystem, "move")
    store.filesystem._fail = no_move
    store.write("a", b"1")
    store.write("a", b"22")
    folder(tmp_path / "bucket", **{".part-b": "half"})
    assert store.read("a") == b"22" and store.sizes() == {"a": 2}
    assert {p.name for p in (tmp_path / "bucket").iterdir()} == {"a", ".part-b"}


def no_move(*_: str) -> None:
    raise NotImplementedError("Move of files without a hierarchical namespace")


def test_only_a_uri_that_is_no_file_is_an_object_store(tmp_path: Path) -> None:
    assert is_object_store("s3://bucket/runs") and not is_object_store("/runs") and not is_object_store("file:///runs")
    assert storage_dir("file:///shared/my%20runs") == Path("/shared/my runs")
    assert storage_dir("s3://a/b") == storage_dir("s3://a/b/") != storage_dir("s3://a/c")


def test_what_all_nodes_see_is_read_in_place_and_what_they_do_not_is_shipped(tmp_path: Path) -> None:
    model, storage = folder(tmp_path / "model", w="weights"), tmp_path / "storage"
    assert (
        ship(str(model), NODES[:1], str(storage))
        == at_hand(ship(str(model), NODES, str(storage), ask=seeing(Path("/"))))
        == str(model)
    )
    blind = seeing(tmp_path / "elsewhere")
    place = ship(str(model), NODES, str(storage), ask=blind)
    assert ship(place, NODES, str(storage)) == place and at_hand(place) == str(model), "the driver's node has it"
    store = ship(str(model), NODES, f"local://{tmp_path}/bucket", ask=blind)
    assert re.fullmatch(r"local://.*/bucket/shipped/model-\w{16}#key=model-\w{16}&.*", store)
    folder(model, w="WEIGHTS")
    changed = ship(str(model), NODES, f"local://{tmp_path}/bucket", ask=blind)
    assert Place.parse(changed).key != Place.parse(store).key
    model.rename(tmp_path / "gone")
    copy = Path(at_hand(place))
    assert (copy / "w").read_text() == "weights" and copy.parent == nodecache.cache_root()
    assert at_hand(place) == str(copy) and (Path(at_hand(changed)) / "w").read_text() == "WEIGHTS"


def test_a_cluster_that_was_joined_ships_to_nodes_that_are_not_there_yet(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", **{"tokenizer.json": "t", "model.safetensors": "weights"})
    place = ship(str(model), NODES[:1], str(tmp_path / "storage"), joined=True)
    assert at_hand(place) == str(model) and not (tmp_path / "storage").exists(), "nobody has asked for it"
    model.rename(tmp_path / "of another node")
    with pytest.raises(
        UserError, match=r"this node sees neither .*/model nor file://.*; mount one of them, or give storage_path as"
    ):
        at_hand(place)
    with pytest.raises(UserError, match=r"/model is gone, or was changed since the run began"):
        put(Place.parse(place))
    (tmp_path / "of another node").rename(model)
    put(Place.parse(place))  # as the node does that it came from, when it is asked
    model.rename(tmp_path / "of another node")
    assert {p.name for p in Path(at_hand(place, weights=False)).iterdir()} == {"tokenizer.json", ".gumshoe-whole"}
    assert (Path(at_hand(place)) / "model.safetensors").read_text() == "weights"


def test_nodes_that_see_an_index_have_a_copy_of_it(tmp_path: Path) -> None:
    index = folder(tmp_path / "index", w="x")
    place = ship(str(index), NODES, str(tmp_path / "storage"), copy=True, ask=seeing(Path("/")))
    assert at_hand(place) != str(index) and (Path(at_hand(place)) / "w").read_text() == "x"
    assert not (tmp_path / "storage").exists(), "it was copied from where it lies"


def test_nodes_are_furnished_before_anybody_there_needs_it(tmp_path: Path) -> None:
    index = folder(tmp_path / "index", w="x")
    place, asked = ship(str(index), NODES, str(tmp_path), copy=True, ask=seeing(Path("/"))), []

    def ask(nodes: list[Node], work: Callable[[str], Any], text: str, timeout_s: float) -> list[Answer]:
        asked.extend(n.name for n in nodes)
        return [Answer(nodes[0], work(text)), Answer(nodes[1], problem="no room")]

    furnish(str(index), NODES, ask=ask)
    assert not asked, "a plain path is seen by all"
    with pytest.raises(UserError, match=r"node 10\.0\.0\.2 \(bbbbbbbb\) cannot have index-\w{16}: no room"):
        furnish(place, NODES, ask=ask)
    assert asked == [n.name for n in NODES] and list(nodecache.cache_root().glob("index-*/w"))


def test_a_try_that_ended_goes_on_with_the_files_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = folder(tmp_path / "index", a="1", b="22", c="333")
    place, copied, copy = copied_place(index), list[str](), nodecache._copy

    def breaks(source: Path, target: Path, names: list[str]) -> None:
        copied.extend(names)
        copy(source, target, names[:2])
        if len(names) > 1:
            raise OSError("the network went away")

    monkeypatch.setattr(nodecache, "_copy", breaks)
    with pytest.raises(OSError, match="the network went away"):
        at_hand(place)
    assert not list(nodecache.cache_root().glob("index-1*/")), "no half copy"
    assert (Path(at_hand(place)) / "c").read_text() == "333" and copied == ["a", "b", "c", "c"]


def test_a_disk_without_room_and_a_sibling_without_end_are_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, root = copied_place(folder(tmp_path / "index", w="x" * 1000)), nodecache.cache_root()
    with monkeypatch.context() as full:
        full.setattr(nodecache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        with pytest.raises(
            UserError, match=r"no room for index-1.* in .*: it needs .* free; make room, or set GUMSHOE_CACHE"
        ):
            at_hand(place)
    with open(root / f".{Path(at_hand(place)).name}.unpack") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unpack(place, wait_s=0.1)  # there is nothing to wait for
        shutil.rmtree(at_hand(place))
        with pytest.raises(
            UserError, match=r"another process of this node has been unpacking index-1.* for more than 0\.1 s"
        ):
            unpack(place, wait_s=0.1)


def copied_place(of: Path) -> str:
    """One that nodes copy although they see it."""
    return str(Place("file:///nowhere", f"{of.name}-1-{fingerprint(str(of))[:16]}", str(of), copy=True))


def _take(place: str, cache: str, out: Any, over: Any) -> None:
    os.environ["GUMSHOE_CACHE"] = cache
    out.put((at_hand(place), (Path(at_hand(place)) / "w").stat().st_ino))
    over.wait(20)


def test_processes_of_a_node_unpack_once_and_share_the_copy(tmp_path: Path) -> None:
    folder(tmp_path / "index", w="x" * 100_000)
    place, context = copied_place(tmp_path / "index"), multiprocessing.get_context("fork")
    out, over = context.SimpleQueue(), context.Event()
    started = [context.Process(target=_take, args=(place, str(tmp_path / "cache"), out, over)) for _ in range(4)]
    for process in started:
        process.start()
    assert len({out.get() for _ in started}) == 1, "one file, whoever came first, and who has it keeps nobody waiting"
    over.set()
    for process in started:
        process.join()


def test_copies_in_use_stay_and_of_the_others_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodecache, "KEPT", 1)
    places = {name: copied_place(folder(tmp_path / name, w=name)) for name in ("a", "b", "c")}
    for place in places.values():
        at_hand(place)
    root = nodecache.cache_root()
    assert sorted(p.name[0] for p in root.iterdir() if p.is_dir()) == ["a", "b", "c"], "this process uses them"
    for lock in nodecache._held.values():
        lock.close()
    nodecache._held.clear()
    at_hand(places["c"])
    assert sorted(p.name[0] for p in root.iterdir() if p.is_dir()) == ["c"]


def test_a_node_knows_the_folder_of_a_run_from_another_of_its_name(tmp_path: Path) -> None:
    (here := tmp_path / "here").mkdir()
    (other := tmp_path / "other").mkdir()
    first = leave_token(here)
    assert sees_token(str(here), first) and not sees_token(str(tmp_path / "none"), first, 0.0)
    assert (
        not sees_token(str(other), first, 0.0)
        and leave_token(other) != first
        and not sees_token(str(other), first, 0.0)
    )


def test_a_run_is_copied_to_its_store_and_goes_on_from_there_elsewhere(tmp_path: Path, home: Path) -> None:
    uri = f"local://{tmp_path}/bucket"
    config = load_config("demo", [f"storage_path={uri}", "name=mine"], RunConfig)
    with open_run(config) as run:
        folder(
            run.path,
            **{"ledger.jsonl": "one\n", "index/big": "not copied", "checkpoints/step-000001/w": "goes by itself"},
        )
        assert run.uri == f"{uri}/mine" and run.path.is_relative_to(home)
    assert set(ObjectStore(uri).sizes("mine")) == {"config.yaml", "ledger.jsonl", "mirror.json"}
    with (
        pytest.raises(UserError, match=r"run 'mine' is in local://.* already; go on with it by resume=mine"),
        open_run(config),
    ):
        pass
    again = dataclasses.replace(config, resume="auto")
    folder(storage_dir(uri) / "mine", **{"ledger.jsonl": "one\ntwo\n"})
    with open_run(again) as run:
        assert run.resumed and (run.path / "ledger.jsonl").read_text() == "one\ntwo\n", (
            "the copy here is the one made last"
        )
    here = storage_dir(uri)
    here.rename(tmp_path / "another machine")
    with open_run(again) as run:
        assert run.resumed and (run.path / "ledger.jsonl").read_text() == "one\ntwo\n"
        folder(run.path, **{"ledger.jsonl": "one\ntwo\nthree\n"})
    here.rename(tmp_path / "the second")
    (tmp_path / "another machine").rename(here)
    with open_run(dataclasses.replace(config, resume="mine")) as run:
        assert (run.path / "ledger.jsonl").read_text() == "one\ntwo\nthree\n", "the run went on elsewhere"


def test_a_mirror_copies_what_has_changed(tmp_path: Path) -> None:
    mirror = Mirror(folder(tmp_path / "run", a="1", b="2"), f"local://{tmp_path}/bucket/run")
    assert (mirror.push(), mirror.push()) == (2, 0)
    folder(tmp_path / "run", a="11", **{".part-c": "half"})
    assert mirror.push() == 1 and ObjectStore(f"local://{tmp_path}/bucket").read("run/a") == b"11"


def test_a_file_that_vanishes_while_a_run_is_copied_was_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, upload = folder(tmp_path / "run", a="1", draft="2", z="3"), ObjectStore.upload

    def late(store: ObjectStore, *args: Any, **more: Any) -> None:
        (run / "draft").unlink(missing_ok=True)
        upload(store, *args, **more)

    monkeypatch.setattr(ObjectStore, "upload", late)
    mirror = Mirror(run, f"local://{tmp_path}/bucket/run")
    assert mirror.push() == 2 and mirror.push() == 0
    assert set(ObjectStore(f"local://{tmp_path}/bucket").sizes("run")) == {"a", "z", "mirror.json"}


def test_a_store_that_fails_at_the_end_hides_no_error_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("cannot write the store: it is full")

    run, uri = folder(tmp_path / "run", a="1"), f"local://{tmp_path}/bucket/run"
    upload = ObjectStore.upload
    for error in (ValueError("the run's own"), None):
        with pytest.raises(ValueError if error else UserError) as caught, mirrored(run, uri):
            monkeypatch.setattr(ObjectStore, "upload", full)
            folder(run, a=f"1{error}")
            if error:
                raise error
        assert str(caught.value) == (str(error) if error else "cannot write the store: it is full")
        monkeypatch.setattr(ObjectStore, "upload", upload)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"gumshoe: cannot write the store: it is full; the copy at {uri} lacks the end of this run"


def test_checkpoints_go_up_whole_the_newest_stay_and_the_newest_comes_back(tmp_path: Path) -> None:
    uri, mine = f"local://{tmp_path}/bucket/run/checkpoints", tmp_path / "mine"
    assert newest_checkpoint(uri) == ""
    pull_checkpoint(uri, mine, "")
    for step in (1, 2, 3):
        folder(mine / f"step-{step:06}" / "shards", s=f"part {step}")
        made = folder(mine / f"step-{step:06}", w=str(step), **{"manifest.json": "{}"})
        push_checkpoint(made, uri, keep=2)
    assert newest_checkpoint(uri) == f"{uri}/step-000003" and not ObjectStore(uri).sizes("step-000001")
    folder(tmp_path / "bucket" / "run" / "checkpoints" / "step-000004", w="no manifest: it is not whole")
    other = tmp_path / "other"
    other.mkdir()
    folder(other / "step-000003", w="of another learner", **{"manifest.json": "{ }"})
    folder(other / "step-000009", w="it never came into the store")
    pull_checkpoint(uri, other, newest_name(uri))
    assert (
        sorted(p.name for p in other.iterdir()) == ["step-000003", "unsent-step-000009"]
        and (other / "step-000003" / "w").read_text() == "3"
    )
    assert (other / "step-000003" / "shards" / "s").read_text() == "part 3"


@pytest.mark.parametrize("override", ["sandbox.journal.record=true", "learner.sharded_checkpoints=true"])
def test_what_several_nodes_would_write_together_needs_a_folder(override: str) -> None:
    given = ["train.num_workers=2", override]
    check_settings(load_config("demo", given, RunConfig))
    with pytest.raises(UserError, match="writes from several nodes into one folder"):
        check_settings(load_config("demo", [*given, "storage_path=s3://bucket/runs"], RunConfig))
