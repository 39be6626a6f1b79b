"""Settings of the sandbox."""

from __future__ import annotations

from dataclasses import dataclass

SNIPPET_MODES = ("lead", "window")
LEAK_GUARDS = ("off", "question")


@dataclass
class SandboxConfig:
    """What one trajectory may do, and how results read. A limit of 0 means none."""

    max_searches: int = 0
    """Most searches that are answered."""
    max_opens: int = 0
    """Most opens that are answered."""
    max_finds: int = 0
    """Most finds that are answered."""
    max_calls: int = 100
    """Most calls of any kind, mistaken ones included."""
    max_observation_tokens: int = 0
    """Most tokens of observations in one trajectory, as the injected counter counts (without one: characters / 4)."""
    wall_time_s: float = 0.0
    """Most seconds from the start of the session to the start of a call."""
    default_k: int = 5
    """Results of a search that names no k."""
    max_k: int = 10
    """Most results of a search; more are cut to this."""
    snippet_mode: str = "window"
    """`lead`: the start of the text. `window`: the passage around the query's words."""
    snippet_chars: int = 300
    """Longest snippet."""
    page_chars: int = 10_000
    """Characters of one page of an opened document."""
    max_observation_chars: int = 20_000
    """Longest observation; whole results, text or matches beyond it are left out."""
    max_query_chars: int = 1_000
    """Longest query or pattern."""
    find_context_chars: int = 200
    """Characters shown on each side of a match."""
    max_matches: int = 20
    """Most matches a find shows."""
    fuzzy_find: bool = False
    """Let find fall back to windows that share 0.8 of the pattern's words."""
    leak_guard: str = "off"
    """`question`: pages that share 13 words in a row with the question (or hold a shorter one) are not shown."""
    call_timeout_s: float = 30.0
    """Longest single attempt of a call."""
    retries: int = 2
    """Further attempts after one that failed through no fault of the agent."""
    retry_wait_s: float = 0.2
    """Pause before the first further attempt; doubles each time."""

    def __post_init__(self) -> None:
        if self.snippet_mode not in SNIPPET_MODES:
            raise ValueError(f"snippet_mode {self.snippet_mode!r} is not one of {', '.join(SNIPPET_MODES)}")
        if self.leak_guard not in LEAK_GUARDS:
            raise ValueError(f"leak_guard {self.leak_guard!r} is not one of {', '.join(LEAK_GUARDS)}")
        for name in ("default_k", "max_k", "snippet_chars", "page_chars", "max_query_chars", "max_matches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_observation_chars < 200:
            raise ValueError(f"max_observation_chars is {self.max_observation_chars}; it must be at least 200")
        if self.default_k > self.max_k:
            raise ValueError(f"default_k {self.default_k} is above max_k {self.max_k}")
        if self.call_timeout_s <= 0:
            raise ValueError(f"call_timeout_s is {self.call_timeout_s}; it must be positive")
