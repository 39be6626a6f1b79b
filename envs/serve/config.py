"""Settings of the HTTP server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from envs.config import SandboxConfig


def _browser() -> SandboxConfig:
    """What CaRR's tool server does: ten results, 10,000 characters of a page, matches that may be fuzzy."""
    return SandboxConfig(default_k=10, max_k=100, max_calls=10_000, fuzzy_find=True)


@dataclass
class ServeConfig:
    """Where the server listens, and what one request, one client and one session may ask for."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback one needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token_env: str = "GUMSHOE_SERVE_TOKEN"
    """Environment variable that holds the token clients send as `Authorization: Bearer ...`; when it is set, they must."""
    topk: int = 3
    """Results of a query that names no number."""
    max_topk: int = 100
    """Most results of a query."""
    max_queries: int = 4096
    """Most queries of one request; they are searched in pieces."""
    max_urls: int = 256
    """Most pages of one request."""
    max_body_bytes: int = 8 * 2**20
    """Longest request body."""
    max_answer_chars: int = 64 * 2**20
    """Longest answer, in characters of documents."""
    read_timeout_s: float = 30.0
    """Longest wait for a request's body."""
    request_timeout_s: float = 120.0
    """Longest work on one request, all its queries together."""
    requests_per_s: float = 1000.0
    """Requests a client (an address) may send over time; 0 sets no limit."""
    burst: int = 4096
    """Requests a client may send at once."""
    max_in_flight: int = 4096
    """Most requests at work or waiting; more are told to come back."""
    max_sessions: int = 8192
    """Most sessions of the browser protocol that are open."""
    session_idle_s: float = 1800.0
    """After how many seconds without a call a session may be forgotten."""
    health_every_s: float = 5.0
    """How long the outcome of a self-query stands."""
    sandbox: SandboxConfig = field(default_factory=_browser)
    """The sessions of the browser protocol."""

    def __post_init__(self) -> None:
        for name in ("topk", "max_queries", "max_urls", "max_body_bytes", "max_answer_chars", "burst", "max_in_flight", "max_sessions"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"serve.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_topk < self.topk:
            raise ValueError(f"serve.max_topk is {self.max_topk}, below serve.topk {self.topk}")
        for name in ("read_timeout_s", "request_timeout_s", "session_idle_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"serve.{name} is {getattr(self, name)}; it must be positive")
        if self.requests_per_s < 0 or self.health_every_s < 0:
            raise ValueError("serve.requests_per_s and serve.health_every_s must be 0 or more")
        if not 0 <= self.port < 65536:
            raise ValueError(f"serve.port is {self.port}; it must be between 0 and 65535")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address always means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
