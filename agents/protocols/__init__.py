"""How a policy speaks: protocols by name. Each is `Speech` over a tokenizer (`agents.interfaces`), made as `PROTOCOLS[name](tokenizer, config)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.interfaces import Speech
from agents.protocols.tags import Tags, TagsConfig
from agents.protocols.tools import Tools, ToolsConfig

PROTOCOLS: dict[str, Callable[[Any, Any], Speech]] = {"tools": Tools, "tags": Tags}

__all__ = ["PROTOCOLS", "Tags", "TagsConfig", "Tools", "ToolsConfig"]
