"""The corpus as an MCP server with two tools, `search` and `get_document`, by the official `mcp` package.

Invariants: what a caller does wrong, and what the search engine fails at, is a tool result marked as an error, one line, no trace;
tools keep nothing between calls, so any call may reach any server of the same corpus.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)

from agents.types import Query
from envs.passages import one_line, window
from envs.serve.config import ServeConfig
from envs.serve.wire import Schema, as_http, checker
from retrieval.errors import BadQuery
from retrieval.service import SearchService

_SNIPPET_CHARS = 2000
"""About the 512 tokens that searchers of this kind show."""
_READS = ToolAnnotations(read_only_hint=True, idempotent_hint=True)
Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def mcp_server(service: SearchService, config: ServeConfig) -> Server[Any]:
    """The server; its transport is whoever runs it."""
    text: Schema = {"type": "string"}
    found: Schema = {
        "type": "object", "required": ["docid", "score", "title", "text"],
        "properties": {"docid": text, "score": {"type": "number"}, "title": text, "text": text},
    }  # fmt: skip
    tools = [
        Tool(
            name="search", title="Search the corpus", annotations=_READS,
            description="Search the corpus. Gives the best documents: docid, score, title, and the passage that fits the query.",
            input_schema={
                "type": "object", "required": ["query"], "additionalProperties": False,
                "properties": {
                    "query": {"type": "string", "minLength": 1, "maxLength": service.config.max_query_chars},
                    "k": {"type": "integer", "minimum": 1, "maximum": config.max_topk, "default": config.topk},
                },
            },
            output_schema={"type": "object", "required": ["results"],
                           "properties": {"results": {"type": "array", "items": found}}},
        ),
        Tool(
            name="get_document", title="Read a document", annotations=_READS,
            description="The whole document of a docid that a search gave.",
            input_schema={
                "type": "object", "required": ["docid"], "additionalProperties": False,
                "properties": {"docid": {"type": "string", "minLength": 1, "maxLength": 8192}},
            },
            output_schema={"type": "object", "required": ["docid", "title", "text"],
                           "properties": {"docid": text, "title": text, "text": text}},
        ),
    ]  # fmt: skip

    async def search(arguments: dict[str, Any]) -> dict[str, Any]:
        query = arguments["query"]
        hits = (await service.search([Query(query, int(arguments.get("k", config.topk)))]))[0]
        documents = iter(await service.get([h.doc_id for h in hits if h.preview is None]))
        pairs = [(h, h.preview or next(documents)) for h in hits]

        def shown() -> list[dict[str, Any]]:
            return [
                {"docid": d.id, "score": h.score, "title": one_line(d.title),
                 "text": window(d.text if h.span is None else d.text[slice(*h.span)], query, _SNIPPET_CHARS)}
                for h, d in pairs if d is not None
            ]  # fmt: skip

        return {"results": await asyncio.to_thread(shown)}  # pages may be long, and others wait

    async def get_document(arguments: dict[str, Any]) -> dict[str, Any]:
        document = (await service.get([arguments["docid"]]))[0]
        if document is None:
            raise BadQuery(f"there is no document {arguments['docid'][:200]!r}; take a docid that a search gave")
        return {"docid": document.id, "title": one_line(document.title), "text": document.text}

    answers: dict[str, Answer] = {"search": search, "get_document": get_document}
    checks = {tool.name: checker(tool.input_schema) for tool in tools}

    async def list_tools(context: ServerRequestContext[Any], params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=tools)

    async def call_tool(context: ServerRequestContext[Any], params: CallToolRequestParams) -> CallToolResult:
        arguments = dict(params.arguments or {})
        if params.name not in answers:
            return _failed(f"there is no tool {params.name[:100]!r}; there are {', '.join(answers)}")
        if fault := checks[params.name](arguments):
            return _failed(fault)
        try:
            async with asyncio.timeout(config.request_timeout_s):
                value = await answers[params.name](arguments)
        except Exception as error:
            return _failed(as_http(error).message)
        said = json.dumps(value, ensure_ascii=False)
        return CallToolResult(content=[TextContent(type="text", text=said)], structured_content=value)

    return Server("gumshoe", version="1", instructions="Search a corpus and read its documents.",
                  on_list_tools=list_tools, on_call_tool=call_tool)  # fmt: skip


async def serve_stdio(service: SearchService, config: ServeConfig) -> None:
    """Serves one client over standard input and output, until it hangs up."""
    server = mcp_server(service, config)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def _failed(line: str) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=f"Error: {line}")], is_error=True)
