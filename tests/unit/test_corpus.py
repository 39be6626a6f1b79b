"""Reading corpora: both forms, broken lines, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.types import Document
from retrieval.corpus import CorpusReport, fingerprint, read_documents
from retrieval.errors import CorpusError
from tests.builders import write_documents

GOOD = '{"id": "a", "title": "A", "text": "first"}'


def put(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def load_documents(path: Path, malformed: str = "error") -> tuple[list[Document], CorpusReport]:
    report = CorpusReport()
    return list(read_documents(path, malformed=malformed, report=report)), report


def test_both_forms(tmp_path: Path) -> None:
    path = put(
        tmp_path / "c.jsonl",
        b"\xef\xbb\xbf" + GOOD.encode(),
        "",
        '{"id": 7, "contents": "\\"Hamlet\\"\\nA play.\\nBy Shakespeare."}',
        '{"id": 8, "contents": "One line only."}',
        '{"id": "u", "text": "no title", "url": "http://x", "meta": {"date": "2020-01-01"}}',
    )
    documents, report = load_documents(path)
    assert documents == [
        Document("a", "A", "first"),
        Document("7", '"Hamlet"', "A play.\nBy Shakespeare."),
        Document("8", "", "One line only."),
        Document("u", "", "no title", {"url": "http://x", "date": "2020-01-01"}),
    ]
    assert (report.documents, report.skipped, report.files) == (4, 0, [str(path)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "x"}', "field 'id' is missing"),
        ('{"id": true, "text": "x"}', "field 'id' is bool"),
        ('{"id": " ", "text": "x"}', "field 'id'"),
        ('{"id": "a\\nb", "text": "x"}', "printable"),
        ('{"id": "b"}', "field 'text' (or 'contents') is missing"),
        ('{"id": "b", "text": 3}', "field 'text' is int"),
        ('{"id": "b", "text": " "}', "empty"),
        ('{"id": "b", "text": "x", "meta": []}', "field 'meta' is list"),
        ('{"id": "b", "text": "\\ud800"}', "surrogate"),
        (b'{"id": "b", "text": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "not a JSON object"),
        (GOOD, "already used at"),
    ],
)
def test_a_broken_line_is_one_error_or_skipped(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = put(tmp_path / "c.jsonl", GOOD, line, '{"id": "z", "text": "last"}')
    with pytest.raises(CorpusError) as caught:
        list(read_documents(path))
    assert f"{path}:2: " in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)
    documents, report = load_documents(path, malformed="skip")
    assert [d.id for d in documents] == ["a", "z"]
    assert report.skipped == 1 and reason in report.problems[0]


def test_missing_empty_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        list(read_documents(tmp_path / "no.jsonl"))
    with pytest.raises(CorpusError, match="holds no documents"):
        list(read_documents(put(tmp_path / "empty.jsonl", "")))
    with pytest.raises(CorpusError, match="known form"):
        list(read_documents(put(tmp_path / "x.csv", "a")))
    with pytest.raises(CorpusError, match="all 1 lines were skipped"):
        list(read_documents(put(tmp_path / "bad.jsonl", "{"), malformed="skip"))
    with pytest.raises(ValueError, match="malformed='maybe'"):
        list(read_documents(tmp_path / "no.jsonl", malformed="maybe"))


def test_gzip_folder_and_truncated_gzip(tmp_path: Path) -> None:
    write_documents(tmp_path / "1.jsonl.gz", [Document(str(i), "t", "text " * 50) for i in range(200)])
    put(tmp_path / "2.jsonl", GOOD)
    assert len(list(read_documents(tmp_path))) == 201
    whole = (tmp_path / "1.jsonl.gz").read_bytes()
    (tmp_path / "1.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="cannot be read to its end"):
        list(read_documents(tmp_path))


texts = st.text(st.characters(codec="utf-8"), max_size=30)
documents = st.lists(
    st.builds(Document, st.from_regex(r"[\w:/.#-]{1,12}", fullmatch=True), texts, texts.map(lambda t: t + "x")),
    min_size=1, max_size=8, unique_by=lambda d: d.id,
)  # fmt: skip


@given(documents, st.randoms())
def test_written_documents_come_back_and_order_does_not_change_the_fingerprint(
    tmp_path_factory: pytest.TempPathFactory, docs: list[Document], random: object
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.gz"
    write_documents(path, docs)
    found, report = load_documents(path)
    assert found == docs and report.fingerprint == fingerprint(docs)
    random.shuffle(docs)  # type: ignore[attr-defined]
    assert fingerprint(docs) == report.fingerprint
    changed = [*docs[1:], Document(docs[0].id, docs[0].title, docs[0].text + "!")]
    assert fingerprint(changed) != report.fingerprint


@settings(deadline=None)  # it writes files
@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_one_line_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_bytes(data + b"\n" + GOOD.encode())
    report = CorpusReport()
    try:
        found = list(read_documents(path, malformed="skip", report=report))
    except CorpusError as error:
        assert "\n" not in str(error)
    else:
        assert found[-1].id == "a"
        json.dumps([d.text for d in found])
    (path.parent / "c.jsonl.gz").write_bytes(data)
    with pytest.raises(CorpusError):
        list(read_documents(path.parent / "c.jsonl.gz"))
