"""Document stores: order, atomic builds, read-only sharing."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agents.types import Document
from retrieval.corpus import fingerprint
from retrieval.docstore import DocStore
from retrieval.errors import StoreError

DOCS = [Document(f"d{i:04}", f"Title {i}", f"text é {i}", {"n": i} if i % 2 else {}) for i in range(1500)]


def test_documents_come_by_id_and_in_order(tmp_path: Path) -> None:
    store = DocStore.build(tmp_path / "s.sqlite", reversed(DOCS))
    assert len(store) == 1500 and list(store) == DOCS and list(store.run("d1499")) == DOCS[1499:]
    assert store.fingerprint == fingerprint(DOCS)
    assert store.get(["d0003", "nope", "d0001", "d0003"]) == [DOCS[3], None, DOCS[1], DOCS[3]]
    assert store.get([d.id for d in DOCS]) == DOCS
    assert store.get([]) == [] and store.get(["\ud800", "d0000"]) == [None, DOCS[0]]
    assert "d0003" in store and "nope" not in store and "\ud800" not in store


def test_any_text_is_stored_as_it_is(tmp_path: Path) -> None:
    odd = [
        Document("a b", "\x00", "x\x00y\U0001f600\r\n"),
        Document("东", "", "\ufeff"),
        Document("z" * 3000, "t", "", {"é": [None, 0.1]}),
    ]
    assert list(DocStore.build(tmp_path / "s.sqlite", odd)) == sorted(odd, key=lambda d: d.id)


def test_a_failed_build_leaves_the_old_store_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    DocStore.build(path, DOCS[:2]).close()

    def broken() -> Iterator[Document]:
        yield DOCS[5]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        DocStore.build(path, broken())
    with pytest.raises(StoreError, match="share an id"):
        DocStore.build(path, [DOCS[0], DOCS[0]])
    assert list(DocStore(path)) == DOCS[:2]
    assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"]


def test_missing_and_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        DocStore(tmp_path / "none.sqlite")
    (tmp_path / "bad.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="not a readable document store") as caught:
        DocStore(tmp_path / "bad.sqlite")
    assert "\n" not in str(caught.value)


def test_threads_and_pickles_share_a_store(tmp_path: Path) -> None:
    store = DocStore.build(tmp_path / "s p#?.sqlite", DOCS)
    copy = pickle.loads(pickle.dumps(store))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (store if i % 2 else copy).get([DOCS[i].id])[0], range(500)))
    assert found == DOCS[:500]
