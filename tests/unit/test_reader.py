"""The page reader: where it never goes, and what it never reads."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.reader import PageReader, ReaderConfig, Refused, is_public
from tests.support.serving import served

PUBLIC = "93.184.215.14"
HTML = b"<html><head><title>A page</title><script>evil()</script></head><body><p>One &amp; two.</p></body></html>"


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A resolver of names in this dict; numbers are resolved as the system does."""
    known = {"page.example": [PUBLIC], "other.example": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c"]}
    real = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def getaddrinfo(self: Any, host: str, port: int, **more: Any) -> Any:
        if host in known:
            return [
                (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
                for a in known[host]
            ]
        if any(c.isalpha() for c in host.removeprefix("0x")) and ":" not in host and not host.startswith("0x"):
            raise socket.gaierror("no such name")
        return await real(self, host, port, **more)

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


class Web:
    """Answers by URL path, and notes where it was connected to."""

    def __init__(self, **pages: httpx.Response | Callable[[httpx.Request], httpx.Response]) -> None:
        self.pages = pages
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        page = self.pages[request.url.path.strip("/") or "root"]
        return page(request) if callable(page) else page

    def reader(self, **settings: Any) -> PageReader:
        return PageReader(ReaderConfig(**settings), transport=httpx.MockTransport(self))


def page(body: bytes = HTML, kind: str = "text/html; charset=utf-8", **headers: str) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": kind, **headers}, stream=httpx.ByteStream(body))


def to(url: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"location": url})


async def test_a_page_is_read_as_text() -> None:
    web = Web(root=page())
    found = await web.reader().read("https://page.example/?q=1#part")
    assert (found.id, found.title, found.text) == ("https://page.example/?q=1#part", "A page", "One & two.")
    assert found.meta == {"url": "https://page.example/?q=1#part", "live": True}


async def test_the_connection_goes_to_the_address_that_was_judged() -> None:
    web = Web(root=to("http://other.example/next"), next=page())
    found = await web.reader().read("https://page.example/")
    first, second = web.asked
    assert (first.url.host, first.headers["host"], first.extensions["sni_hostname"]) == (
        PUBLIC,
        "page.example",
        "page.example",
    )
    assert second.url.host == "2606:2800:21f:cb07:6820:80da:af6b:8b2c" and second.headers["host"] == "other.example"
    assert found.meta["url"] == "http://other.example/next"


INSIDE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0",
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "168.63.129.16", "192.0.0.192", "100.100.100.200",
    "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[fc00::1]", "[fd00:ec2::254]", "[fe80::1]", "[fec0::1]", "[feff::1]", "[3fff::1]", "[ff02::1]",
    "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]",
]  # fmt: skip


@pytest.mark.parametrize("host", INSIDE)
async def test_addresses_inside_are_refused(host: str) -> None:
    web = Web(root=page())
    with pytest.raises(Refused, match=r"public internet|not known|cannot be read"):
        await web.reader().read(f"http://{host}/")
    assert not web.asked


@pytest.mark.parametrize("host", INSIDE)
async def test_a_redirect_inside_is_refused(host: str) -> None:
    web = Web(root=to(f"http://{host}/secret"))
    with pytest.raises(Refused, match=r"public internet|not known|cannot be read"):
        await web.reader().read("https://page.example/")
    assert len(web.asked) == 1


async def test_a_name_that_means_inside_is_refused(names: dict[str, list[str]]) -> None:
    web = Web(root=page())
    names["inside.example"] = ["10.0.0.7"]
    names["both.example"] = [PUBLIC, "127.0.0.1"]
    for host in ("inside.example", "both.example"):
        with pytest.raises(Refused, match="public internet"):
            await web.reader().read(f"https://{host}/")
    assert not web.asked


async def test_a_name_that_changes_its_mind_is_judged_again(names: dict[str, list[str]]) -> None:
    def turn(request: httpx.Request) -> httpx.Response:
        names["page.example"] = ["127.0.0.1"]
        return to("/secret")

    web = Web(root=turn, secret=page())
    with pytest.raises(Refused, match="public internet"):
        await web.reader().read("http://page.example/")
    assert [r.url.host for r in web.asked] == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://page.example/", "gopher://page.example/", "http://", "//page.example", "page.example", "http:///x",
     "javascript:alert(1)", "http://me:secret@page.example/", "http://page.example:22/", "https://page.example:80/", "http://[bad/", "http://a b/", "\x00"],
)  # fmt: skip
async def test_other_addresses_are_refused(url: str) -> None:
    web = Web(root=page())
    with pytest.raises(Refused):
        await web.reader().read(url)
    assert not web.asked


async def test_ports_may_be_allowed() -> None:
    assert (await Web(root=page()).reader(ports=[8080]).read("http://page.example:8080/")).title == "A page"


async def test_over_real_connections(names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over sockets, with the loopback taken for public: by name, through a redirect, packed."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            told = dict(scope["headers"])
            start: dict[str, Any] = {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/plain"), (b"content-encoding", b"gzip")],
            }
            if scope["path"] == "/":
                start |= {"status": 302, "headers": [(b"location", b"/there")]}
            await send(start)
            await send({"type": "http.response.body", "body": gzip.compress(b"called " + told[b"host"])})

    monkeypatch.setattr("retrieval.reader.is_public", lambda address: str(address) == "127.0.0.1")
    names["page.example"] = ["127.0.0.1"]
    with served(app, lifespan="off") as url:
        port = httpx.URL(url).port
        assert port
        found = await PageReader(ReaderConfig(ports=[port])).read(f"http://page.example:{port}/")
    assert found.text == f"called page.example:{port}" and found.meta["url"] == f"http://page.example:{port}/there"


async def test_redirects_are_bounded() -> None:
    web = Web(root=to("/"))
    with pytest.raises(Refused, match="more than 3 redirects"):
        await web.reader(max_redirects=3).read("https://page.example/")
    assert len(web.asked) == 4


async def test_a_long_body_is_refused_while_it_comes() -> None:
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal sent
            while True:
                sent += 1
                yield b"x" * 10_000

    endless = httpx.Response(200, headers={"content-type": "text/plain"}, stream=Endless())
    with pytest.raises(Refused, match="longer than 100000 bytes"):
        await Web(root=endless).reader(max_bytes=100_000).read("https://page.example/")
    assert sent < 30


@pytest.mark.parametrize("layers", [1, 2])
async def test_a_bomb_is_refused_before_it_is_unpacked(layers: int) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    packed = page(bomb, "text/plain", **{"content-encoding": ", ".join(["gzip"] * layers)})
    with pytest.raises(Refused, match=r"longer than|was not asked for"):
        await Web(root=packed).reader(max_bytes=1_000_000).read("https://page.example/")


async def test_packed_pages_are_read_and_broken_ones_refused() -> None:
    web = Web(root=page(gzip.compress(HTML), **{"content-encoding": "gzip"}))
    assert (await web.reader().read("https://page.example/")).text == "One & two."
    for packing, body in [("br", HTML), ("zstd", HTML), ("deflate", zlib.compress(HTML)), ("gzip", b"no gzip at all")]:
        with pytest.raises(Refused):
            await Web(root=page(body, **{"content-encoding": packing})).reader().read("https://page.example/")


@pytest.mark.parametrize(
    "kind", ["application/pdf", "image/png", "application/octet-stream", "text/css", "video/mp4", "", "multipart/x"]
)
async def test_what_is_no_text_is_refused(kind: str) -> None:
    with pytest.raises(Refused, match="is no text"):
        await Web(root=page(b"%PDF-1.7", kind)).reader().read("https://page.example/")


async def test_what_only_says_it_is_text_is_refused() -> None:
    with pytest.raises(Refused, match="but is not"):
        await Web(root=page(bytes(range(256)) * 4, "text/plain")).reader().read("https://page.example/")


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("é".encode("latin-1"), "text/plain; charset=ISO-8859-1", "é"),
        ("é".encode(), "text/plain", "é"),
        ("é".encode(), 'text/plain; charset="utf-8"', "é"),
        ("\ufeffé".encode(), "text/plain", "é"),
        ("é".encode("utf-16"), "text/plain", "é"),
        (b"<meta charset='windows-1252'><p>\x80</p>", "text/html", "€"),
        ("é".encode(), "text/plain; charset=no-such", "é"),
        ("é".encode(), "text/plain; charset=zip", "é"),
        (b"a\xffb", "text/plain; charset=utf-8", "a\ufffdb"),
        (b"+2AA-", "text/plain; charset=utf-7", "+2AA-"),
        ("日本".encode("shift_jis"), "text/plain; charset=Shift_JIS", "日本"),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
    ],
)
async def test_charsets(body: bytes, kind: str, text: str) -> None:
    assert (await Web(root=page(body, kind)).reader().read("https://page.example/")).text == text


async def test_no_page_makes_the_reader_slow() -> None:
    """Both took minutes: a charset whose decoder is quadratic, and a title that nothing closes."""
    body = b"a-" + b"b9" * 500_000
    assert (await Web(root=page(body, "text/plain; charset=punycode")).reader().read("https://page.example/")).text
    endless = page(b"<title>" + b"ab<b>" * 100_000)
    assert len((await Web(root=endless).reader().read("https://page.example/")).title) <= 2000


async def test_errors_and_silence_are_refusals() -> None:
    with pytest.raises(Refused, match="answers 404"):
        await Web(root=httpx.Response(404)).reader().read("https://page.example/")

    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(Refused, match=r"no page in 0\.05 s"):
        await PageReader(ReaderConfig(timeout_s=0.05), httpx.MockTransport(silent)).read("https://page.example/")

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("rubbish")

    with pytest.raises(Refused, match="RemoteProtocolError"):
        await Web(root=broken).reader().read("https://page.example/")


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_judged_like_itself(address: ipaddress.IPv4Address) -> None:
    packed = int(address)
    for outer in (
        f"::ffff:{address}",
        str(ipaddress.IPv6Address((0x64FF9B << 96) | packed)),
        str(ipaddress.IPv6Address((0x2002 << 112) | packed << 80)),
    ):
        assert not is_public(ipaddress.ip_address(outer)) or is_public(address)
    for outer in (f"::ffff:{address}", str(ipaddress.IPv6Address((0x64FF9B << 96) | packed))):
        assert is_public(ipaddress.ip_address(outer)) == is_public(address)
    if is_public(address):
        assert address.is_global and not address.is_multicast
