"""What goes over the wire: endpoints that take and give JSON objects, and errors of one typed form.

Invariants: a request is checked against the very schema that `/openapi.json` shows; whatever goes wrong is answered with
`{"error": {"type", "message"}}`, a line without a trace of the code; what nobody foresaw is logged here and only called by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import Response

from retrieval.errors import BadQuery, Closed, DeadlineExceeded, Overloaded, RetrievalError

log = logging.getLogger("gumshoe.serve")
Schema = dict[str, Any]
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BadQuery, 400), (Overloaded, 503), (Closed, 503), (DeadlineExceeded, 504), (TimeoutError, 504), (RetrievalError, 502)
)  # fmt: skip
STATUSES = {
    400: "The body is no JSON object, or asks for what cannot be served.",
    401: "The token is missing or wrong.",
    403: "The server was called by a name that is not its own.",
    404: "There is no such route.",
    405: "The route has no such method.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not `application/json`.",
    422: "The body does not have the form this route takes.",
    429: "Too many requests of this client; `Retry-After` says when to come back.",
    500: "A fault of the server; its log says more.",
    502: "The search engine failed.",
    503: "Too much to do at the moment, or no answer yet; `Retry-After` says when to come back.",
    504: "Time ran out before there was an answer.",
}


class HttpError(Exception):
    """A request that ends here, with what its client is told."""

    def __init__(self, status: int, type: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.retry_after_s = status, type, message, retry_after_s


@dataclass(frozen=True)
class Endpoint:
    """A POST route: JSON object in, JSON object out."""

    path: str
    name: str
    about: str
    takes: Schema
    gives: Schema
    answer: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
    """Called with a body that satisfies `takes`. Raises retrieval errors or HttpError."""

    @cached_property
    def _fault(self) -> Callable[[Any], str]:
        return checker(self.takes)

    async def __call__(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HttpError(415, "UnsupportedMediaType", "the body must be sent as application/json")
        body = json_object(await request.body())
        if fault := self._fault(body):
            raise HttpError(422, "BadRequest", fault)
        return json_response(await self.answer(body))


def checker(schema: Schema) -> Callable[[Any], str]:
    """A function that says, on a line, what of a value does not fit a schema; empty when all does."""
    validator = Draft202012Validator(schema)

    def fault(value: Any) -> str:
        found = best_match(validator.iter_errors(value))
        return f"{found.json_path}: {found.message}"[:300] if found else ""

    return fault


def json_object(body: bytes) -> dict[str, Any]:
    """The object a body holds. Raises HttpError: 400 for anything else, 422 for text that is not Unicode."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:  # escapes may spell halves of characters, which no store and no answer can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise HttpError(422, "BadRequest", "the body holds half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise HttpError(400, "BadRequest", f"the body is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise HttpError(400, "BadRequest", f"the body must be a JSON object, it is a {type(value).__name__}")
    return value


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    return Response(body, status, dict(headers or {}), "application/json")


def error_response(error: BaseException, path: str = "") -> Response:
    """The typed answer to an error. CaRR's client fails without `output`, so its route has that in errors too."""
    known = as_http(error)
    value: dict[str, Any] = {"error": {"type": known.type, "message": known.message}}
    if path == "/":
        value["output"] = f"Error: the tool failed ({known.message})"
    headers = {"retry-after": str(known.retry_after_s)} if known.retry_after_s else {}
    if known.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(value, known.status, headers)


def as_http(error: BaseException) -> HttpError:
    """What a client is told of an error. Logs the ones nobody foresaw."""
    if isinstance(error, HttpError):
        return error
    for kind, status in _STATUS:
        if isinstance(error, kind):
            line = " ".join(str(error).split())[:500] or "no answer in time"
            name = "DeadlineExceeded" if status == 504 else type(error).__name__
            return HttpError(status, name, line, retry_after_s=1 if status == 503 else 0)
    log.error("a request failed", exc_info=error)
    return HttpError(500, "InternalError", "the server failed; its log says more")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
