"""Reading corpora: every form, broken lines and bytes, fingerprints."""

from __future__ import annotations

import gzip
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from agents.types import Document
from retrieval import sources
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
    assert (report.documents, report.skipped, report.files) == (4, 0, 1)


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
        (GOOD, "already used by"),
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
    with pytest.raises(CorpusError, match="all 1 items were skipped"):
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


LINES = GOOD.encode() + b"\n" + b'{"id": "b", "contents": "B\\nsecond"}\r\n'
BOTH = [Document("a", "A", "first"), Document("b", "B", "second")]


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("c.jsonl", LINES),
        ("C.JSONL", b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n")),
        ("c.jsonl.gz", gzip.compress(LINES)),
        ("c.jsonl.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:])),
        ("c.jsonl.zst", zstandard.compress(LINES)),
        ("c.jsonl.zst", zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:])),
    ],
    ids=[
        "plain",
        "marked",
        "gz",
        "gz-in-parts",
        "zst",
        "zst-in-parts",
    ],  # packed bytes hold the time, and ids must be the same in every process
)
def test_json_lines_plain_and_packed(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    found, report = load_documents(tmp_path / name)
    assert found == BOTH and report.bytes_read == len(data)


def test_parquet_with_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    rows = [{"docid": 1, "body": "one", "url": "u", "stars": 2.5, "vector": [0.5] * 4, "raw": b"x"},
            {"docid": 2, "body": "two", "url": None, "stars": None, "vector": [], "raw": b""}]  # fmt: skip
    path.write_bytes(as_parquet(rows))
    columns = {"id": "docid", "text": "body"}
    found = list(read_documents(path, columns=columns))
    assert found == [Document("1", "", "one", {"url": "u", "stars": 2.5}), Document("2", "", "two")]
    with pytest.raises(CorpusError, match=r"c\.parquet:1: field 'id' is missing"):
        list(read_documents(path))
    with pytest.raises(CorpusError, match=r"field 'nobody' \(for 'text'\) is missing; there are body, docid"):
        list(read_documents(path, columns={**columns, "text": "nobody"}))
    with pytest.raises(CorpusError, match="columns names 'body'"):
        list(read_documents(path, columns={"body": "text"}))
    path.write_bytes(as_parquet([{**r, "body": "same"} for r in [*rows, rows[0]]], row_group_size=1))
    report = CorpusReport()
    assert len(list(read_documents(path, columns=columns, malformed="skip", report=report))) == 2
    assert report.problems == [
        f"{path}:3: document id '1' is already used by an earlier document; give each its own id"
    ]


def test_a_folder_of_pages(tmp_path: Path) -> None:
    pages = {
        "a.txt": "Plain\r\ntext.",
        "sub/b.md": "```\n# not this\n```\n\n## The *Title* ##\nBody.",
        "sub/c.HTML": "<html><head><title> My &amp;\n page </title><style>p{}</style><script>var x = '<p>no</p>';</script></head>"
        "<body><h1>Other</h1><p>One&nbsp;two <b>three</b>.<p>Next<br>line<ul><li>x</li></ul><!-- no --></body>",
        "d.htm": "<h2>Head<em>ing</em></h2>text",
        ".hidden/e.txt": "no",
        "f.csv": "no",
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found, report = load_documents(tmp_path)
    assert [(d.id, d.title, d.text) for d in found] == [
        ("a.txt", "a", "Plain\ntext."),
        ("d.htm", "Heading", "Heading\n\ntext"),
        ("sub/b.md", "The *Title*", pages["sub/b.md"]),
        ("sub/c.HTML", "My & page", "Other\n\nOne two three.\n\nNext\nline\n\nx"),
    ]
    assert report.files == 4
    put(tmp_path / "sub" / "records.jsonl", GOOD)
    assert [d.id for d in load_documents(tmp_path)[0]] == ["a"], "pages beside records are about the corpus, not of it"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("nul.txt", b"a\0b", "NUL bytes"),
        ("latin.md", "Größe".encode("latin-1"), "not UTF-8"),
        ("utf16.html", "<p>x".encode("utf-16"), "NUL bytes"),
        ("empty.txt", b"", "the document is not"),
    ],
)
def test_a_page_that_is_no_text_is_one_line(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text("good")
    if not data:  # a title is enough, and a file always has a name
        assert [d.id for d in load_documents(tmp_path)[0]] == [name, "z.txt"]
        return
    with pytest.raises(CorpusError) as caught:
        list(read_documents(tmp_path))
    assert str(tmp_path / name) in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)
    found, report = load_documents(tmp_path, malformed="skip")
    assert [d.id for d in found] == ["z.txt"] and report.skipped == 1


@pytest.mark.parametrize(
    ("page", "text", "title"),
    [
        ("a < b and c > d &lt;p&gt; &amp;amp; &#8364;&nosuch;", "a < b and c > d <p> &amp; €&nosuch;", ""),
        ("<p title='a > b' onclick=\"x('y')\">one<br/>two</p>", "one\ntwo", ""),
        ("<SCRIPT>if (a</b>c) '</p>'</SCRIPT >x<style>p{}</style>y<!-- <p>no -->z", "xyz", ""),
        ("<svg><title>no</title></svg><svg/>x<noscript>no</noscript><h3> A\n <i>b</i></h3>c", "x\n\nA b\n\nc", "A b"),
        ("<pre>  def f():\n    pass</pre><table><tr><td>1<td>2<tr><td>3</table>", "def f():\npass\n\n1 2\n3", ""),
        ("x<script>never closed <p>no", "x", ""),
        ("x<!-- never closed <p>no", "x", ""),
        ("<!DOCTYPE html><?xml version='1'?><title></title><title>T</title><h1>H</h1>", "H", "T"),
        ("<", "<", ""),
    ],
)
def test_html_by_hand(tmp_path: Path, page: str, text: str, title: str) -> None:
    assert sources._html(page) == (text, title)


@pytest.mark.parametrize(
    "piece", ["<a ", "<!--", "<![CDATA[", "</", "<", "&", "<a b='", '<a "', "<?", "<!", "<b> </b>", "<p>", "<pre>\n"]
)
def test_the_time_for_a_page_is_linear_in_its_length(piece: str) -> None:
    def seconds(size: int) -> float:
        began = time.process_time()
        sources._html(piece * (size // len(piece)))
        return time.process_time() - began

    assert seconds(200_000) < 40 * seconds(20_000) + 1.0


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_lines_and_pages_beyond_the_limit_are_dropped_one_by_one(
    tmp_path: Path, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_ITEM", 1 << 20)
    monkeypatch.setattr(sources, "_READ", 1 << 16)
    huge = json.dumps({"id": "h", "text": "x" * (3 << 20)}).encode()
    almost = json.dumps({"id": "i", "text": "y" * ((1 << 20) - 100)}).encode()
    suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join([GOOD.encode(), huge, almost, huge, GOOD.replace('"a"', '"z"').encode()])))
    found, report = load_documents(path, malformed="skip")
    assert [d.id for d in found] == ["a", "i", "z"]
    assert [p.split(": ")[0] for p in report.problems] == [
        f"{path}:2",
        f"{path}:4",
    ] and "longer than 1 MiB" in report.problems[0]
    (tmp_path / "page.txt").write_bytes(b"x" * (2 << 20))
    with pytest.raises(CorpusError, match="longer than 1 MiB"):
        list(read_documents(tmp_path / "page.txt"))


FILES = {
    "c.jsonl": LINES,
    "c.jsonl.gz": gzip.compress(LINES * 40),
    "c.jsonl.zst": zstandard.compress(LINES * 40),
    "c.parquet": as_parquet([{"id": str(i), "text": f"text {i}"} for i in range(40)]),
}


@pytest.mark.parametrize("name", [n for n in FILES if n != "c.jsonl"])
def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path, name: str) -> None:
    for cut in (0, 1, len(FILES[name]) // 2, len(FILES[name]) - 1):
        (tmp_path / name).write_bytes(FILES[name][:cut])
        with pytest.raises(CorpusError, match=r"cannot be read to its end|no documents") as caught:
            list(read_documents(tmp_path / name, malformed="skip"))
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", [*FILES, "p.txt", "p.md", "p.html"])
@settings(deadline=None, max_examples=150)  # it writes files
@given(data=st.data())
def test_any_bytes_are_documents_or_one_line_errors(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    noise = data.draw(st.binary(max_size=200))
    whole = FILES.get(name, b"<p>text</p><!DOCTYPE x><![CDATA[y]]>&#x110000;<a b='")
    place = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("corpus") / name
    for content in (noise, whole[:place] + noise + whole[place:], whole[:place] + noise + whole[place + len(noise) :]):
        path.write_bytes(content)
        report = CorpusReport()
        try:
            found = list(read_documents(path, malformed="skip", report=report))
        except CorpusError as error:
            assert "\n" not in str(error)
        else:
            assert len(found) == report.documents > 0
            json.dumps([[d.id, d.title, d.text] for d in found], ensure_ascii=False).encode()


def test_a_packed_burst_is_unpacked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, longest, lines = tmp_path / "z.jsonl.zst", [0], sources._lines
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(b" " * (100 << 20) + b"\n" + GOOD.encode()))
    assert path.stat().st_size < 20_000

    def watched(chunks: Iterator[bytes]) -> Iterator[tuple[int, Any]]:
        return lines(longest.append(len(c)) or c for c in chunks)  # type: ignore[func-returns-value]

    monkeypatch.setattr(sources, "_lines", watched)
    documents, report = load_documents(path, malformed="skip")
    assert [d.id for d in documents] == ["a"] and report.skipped == 1
    assert max(longest) <= 9 << 20


def test_parquet_columns_of_categories_are_text(tmp_path: Path) -> None:
    table = pa.table({"id": ["1", "2"], "text": pa.array(["x", "y"]).dictionary_encode(), "n": [[1], [2]]})
    parquet.write_table(table, tmp_path / "c.parquet")
    assert load_documents(tmp_path / "c.parquet")[0] == [Document("1", "", "x"), Document("2", "", "y")]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "c.jsonl", GOOD)
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CorpusError, match=r"locked cannot be read: Permission denied; mend"):
        load_documents(tmp_path)


def test_ids_are_remembered_beyond_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval import corpus

    monkeypatch.setattr(corpus, "_NEWEST", 10)
    rows = [json.dumps({"id": str(i % 70), "text": f"text {i}"}) for i in range(100)]
    found, report = load_documents(put(tmp_path / "c.jsonl", *rows), malformed="skip")
    assert [d.id for d in found] == [str(i) for i in range(70)] and report.skipped == 30
