"""JSON schemas of judges' replies that more than one reward asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def keyed_schema(keys: Collection[str], of: Mapping[str, Any]) -> dict[str, Any]:
    """An object with exactly these keys, each of schema `of`."""
    return {
        "type": "object", "properties": {key: dict(of) for key in keys}, "required": list(keys), "additionalProperties": False,
    }  # fmt: skip
