"""Reads pages of the live web for an agent that must not reach anything else.

Invariants:
- Only http(s) at its usual port, and only public addresses. The name is resolved here, every address it has is judged, and the
  connection goes to the very address that was judged, for each redirect anew; so neither a redirect nor a name that changes its
  mind leads inside. Proxies of the environment are not used: they would resolve for themselves.
- A body is read and unpacked piece by piece and never grows past `max_bytes`, whatever it was packed to.
- What is no text is refused; what is text is decoded, never executed. Decoding and reading of markup happen in a thread, by decoders
  whose time is linear, so no page holds up the event loop or gets round the time limit.
"""

from __future__ import annotations

import asyncio
import codecs
import ipaddress
import re
import socket
import ssl
import zlib
from dataclasses import dataclass, field
from functools import cached_property

import httpx

from agents.types import Document
from retrieval.errors import RetrievalError
from retrieval.sources import PAGES

_TYPES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown", "application/json")
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)
_LONG_BLANK = re.compile(r"[ \t]{200,}")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_CHARSETS = frozenset(
    """ascii utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be koi8-r koi8-u mac-roman tis-620 cp866 cp874
    shift_jis cp932 euc_jp euc_kr cp949 gb2312 gbk gb18030 big5 big5hkscs""".split()  # noqa: SIM905
) | {*(f"iso8859-{n}" for n in range(1, 17)), *(f"cp{n}" for n in range(1250, 1259))}
"""What pages are written in. Python knows others too, some of them of quadratic time (punycode) or no charsets at all."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""How a network without IPv4 names the addresses of it."""
_DOCUMENTATION = ipaddress.ip_network("3fff::/20")
"""Newer than the tables of Python 3.11."""
_NEVER = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "192.0.0.192", "100.100.100.200")))
"""Public by their number, but services of the cloud one runs in."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass
class ReaderConfig:
    """How pages are read."""

    timeout_s: float = 20.0
    """Longest read of one page, redirects and all."""
    max_bytes: int = 4 * 2**20
    """Longest body, unpacked; a longer one is refused."""
    max_redirects: int = 5
    """Most redirects that are followed."""
    ports: list[int] = field(default_factory=list)
    """Ports that may be used beside 80 of http and 443 of https."""
    concurrency: int = 16
    """Pages read at once."""
    user_agent: str = "gumshoe-reader/1"
    """How the reader names itself."""


class Refused(RetrievalError):
    """A page that may not or cannot be read. The message says why."""


class PageReader:
    """Reads pages. Safe for many tasks of one event loop."""

    def __init__(self, config: ReaderConfig | None = None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.config = config or ReaderConfig()
        self._transport = transport
        self._slots = asyncio.Semaphore(self.config.concurrency)

    async def read(self, url: str) -> Document:
        """The page as text, under the url it was asked by; `meta.url` is where it was found. Raises Refused."""
        try:
            async with self._slots, asyncio.timeout(self.config.timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise Refused(f"{_shown(url)} gave no page in {self.config.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, zlib.error, ValueError, AssertionError) as error:
            raise Refused(f"{_shown(url)} cannot be read ({type(error).__name__})") from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context(trust_env=False)

    async def _follow(self, url: str) -> Document:
        place = httpx.URL(url)
        # no connection outlives its page: a second host at the same address would share it unchecked
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            trust_env=False, limits=limits, timeout=self.config.timeout_s, verify=self._tls, transport=self._transport
        ) as client:
            for _ in range(self.config.max_redirects + 1):
                address = await self._judge(place)
                headers = {
                    "host": place.netloc.decode("ascii"), "user-agent": self.config.user_agent,
                    "accept": ", ".join(_TYPES), "accept-encoding": "gzip, identity",
                }  # fmt: skip
                pinned = place.copy_with(host=str(address), fragment=None)
                told = {"sni_hostname": place.raw_host.decode("ascii")}
                request = client.build_request("GET", pinned, headers=headers, extensions=told)
                response = await client.send(request, stream=True, follow_redirects=False)
                try:
                    if response.is_redirect and "location" in response.headers:
                        place = place.join(response.headers["location"])
                        continue
                    return await self._page(url, place, response)
                finally:
                    await response.aclose()
        raise Refused(f"{_shown(url)} leads through more than {self.config.max_redirects} redirects")

    async def _judge(self, place: httpx.URL) -> Address:
        """The address to connect to. Raises Refused for a place nobody may go to."""
        usual = {"http": 80, "https": 443}.get(place.scheme)
        if usual is None or not place.host:
            raise Refused(f"{_shown(str(place))} is no http(s) address")
        if place.userinfo:
            raise Refused(f"{_shown(str(place))} holds a user name; such addresses are not read")
        port = place.port or usual
        if port != usual and port not in self.config.ports:
            raise Refused(f"{_shown(str(place))} uses port {port}, which is not allowed")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                place.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM
            )
        except OSError:
            raise Refused(f"the host of {_shown(str(place))} is not known") from None
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if not addresses or not all(is_public(a) for a in addresses):
            raise Refused(f"{_shown(str(place))} is not on the public internet")
        return addresses[0]

    async def _page(self, url: str, place: httpx.URL, response: httpx.Response) -> Document:
        if not response.is_success:
            raise Refused(f"{_shown(url)} answers {response.status_code}")
        kind, _, rest = response.headers.get("content-type", "").partition(";")
        kind = kind.strip().lower()
        if kind not in _TYPES:
            raise Refused(f"{_shown(url)} is no text but {kind[:60] or 'of no known type'}")
        body = await self._body(url, response)
        html = kind in ("text/html", "application/xhtml+xml")
        charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE)
        text, title = await asyncio.to_thread(_text, body, charset[1] if charset else "", html)
        if len(_CONTROL.findall(text[:4096])) > 8:
            raise Refused(f"{_shown(url)} says it is text, but is not")
        return Document(url, title or str(place)[:200], text, {"url": str(place), "live": True})

    async def _body(self, url: str, response: httpx.Response) -> bytes:
        most, packing = self.config.max_bytes, response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("gzip", "x-gzip", "identity", ""):
            raise Refused(f"{_shown(url)} is packed as {packing[:30]}, which was not asked for")
        unpack = zlib.decompressobj(wbits=31) if "gzip" in packing else None
        body = bytearray()
        async for piece in response.aiter_raw(64 * 1024):
            body += unpack.decompress(piece, max_length=most + 1 - len(body)) if unpack else piece
            if len(body) > most:
                raise Refused(f"{_shown(url)} is longer than {most} bytes")
        return bytes(body)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, the ones it carries inside included."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(a) for a in (address.sixtofour, *(address.teredo or ())) if a is not None):
            return False
        if address.is_site_local or address in _DOCUMENTATION:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved and address not in _NEVER


def _text(body: bytes, charset: str, html: bool) -> tuple[str, str]:
    """Text and title of a body."""
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        charset = "utf-16"
    elif not charset and html and (found := _META_CHARSET.search(body[:2048])):
        charset = found[1].decode("ascii")
    try:
        known = codecs.lookup(charset or "utf-8-sig").name
    except (LookupError, ValueError):  # one that nobody knows, or that is no name
        known = ""
    text = body.decode(known if known in _CHARSETS else "utf-8", "replace")
    return PAGES[".html"](_LONG_BLANK.sub(" ", text)) if html else (text, "")


def _shown(url: str) -> str:
    return " ".join(url.split())[:200]
