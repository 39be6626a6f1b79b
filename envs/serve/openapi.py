"""The server described in OpenAPI 3.1, made of the schemas its routes check requests with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envs.serve.wire import STATUSES, Endpoint, Schema

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "additionalProperties": False,
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "output": {"type": "string", "description": "Of `/` alone: the same as a sentence for an agent."},
    },
}
_READ_ERRORS = (401, 403, 408, 413, 429, 500, 503)
_POST_ERRORS = (400, *_READ_ERRORS, 415, 422, 502, 504)


def describe(posts: Sequence[Endpoint], *, needs_token: bool) -> dict[str, Any]:
    """The document at `/openapi.json`."""
    paths: dict[str, Any] = {}
    for post in posts:
        paths[post.path] = {
            "post": {
                "operationId": post.name,
                "summary": post.about,
                "requestBody": {"required": True, "content": {"application/json": {"schema": post.takes}}},
                "responses": {**_good("application/json", post.gives, "The answer."), **_errors(_POST_ERRORS)},
            }
        }
    healthy: Schema = {
        "type": "object", "required": ["status", "backend", "documents", "fingerprint"],
        "properties": {"status": {"const": "ok"}, "backend": {"type": "string"}, "documents": {"type": "integer"},
                       "fingerprint": {"type": "string"}},
    }  # fmt: skip
    paths["/healthz"] = _get(
        "healthz", "Whether search works, by a search of its own.", "application/json", healthy, needs_token
    )
    paths["/metrics"] = _get("metrics", "Figures in Prometheus' text form.", "text/plain", {"type": "string"})
    paths["/openapi.json"] = _get("openapi", "This document.", "application/json", {"type": "object"})
    paths["/mcp"] = {
        "post": {
            "operationId": "mcp",
            "summary": "The Model Context Protocol (streamable HTTP, no sessions), with the tools `search` and `get_document`.",
            "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
            "responses": {
                **_good("application/json", {"type": "object"}, "A JSON-RPC answer."),
                "202": {"description": "A notification was taken."},
                **_errors(_READ_ERRORS),
                "default": {"description": "A JSON-RPC error, as the protocol has it."},
            },
        }
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Gumshoe", "version": "1", "description": "A corpus to search, for agents in training."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if needs_token:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described


def _get(name: str, about: str, media: str, schema: Schema, open_to_all: bool = False) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": about,
        "responses": {**_good(media, schema, about), **_errors(_READ_ERRORS)},
    }
    if open_to_all:
        operation["security"] = []
    return {"get": operation}


def _good(media: str, schema: Schema, about: str) -> dict[str, Any]:
    return {"200": {"description": about, "content": {media: {"schema": schema}}}}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(s): {"description": STATUSES[s], "content": body} for s in sorted(statuses)}
