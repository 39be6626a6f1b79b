"""`gumshoe serve`: a corpus over HTTP (or to one MCP client over standard input and output), in one process.

Invariants: nothing listens before the config was checked and a search of its own succeeded; a second server on a port is refused in
one line; SIGTERM and SIGINT let requests at work finish, then end with status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import build_config, load_config, parse_overrides
from cluster.errors import UserError
from envs.serve.config import ServeConfig
from retrieval.backend import open_backend
from retrieval.config import BackendConfig, legs_of
from retrieval.service import SearchService, ServiceConfig

_DRAIN_S = 10
_BACKLOG = 2048


@dataclass
class ServeRun:
    """What to serve, and how."""

    index: str = ""
    """Folder of an index; none for `retrieval.kind` remote and live."""
    retrieval: BackendConfig = field(default_factory=BackendConfig)
    """The backend."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """Its batching, caches and limits."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """The server."""


def load_run(target: str, overrides: Sequence[str]) -> ServeRun:
    """The settings for an index folder, or of a config file. Raises UserError in one line."""
    folder = Path(target).expanduser()
    if folder.is_dir():
        if not (folder / "manifest.json").is_file():
            raise UserError(
                f"{target} holds no index (no manifest.json); make one with `gumshoe index CORPUS --out {target}`"
            )
        sources = [(target, {"index": str(folder), "retrieval": {"kind": "auto"}})]
        run = build_config([*sources, parse_overrides(overrides)], ServeRun)
    else:
        run = load_config(target, overrides, ServeRun)
    if (run.retrieval.kind == "auto" or legs_of(run.retrieval)) and not run.index:
        raise UserError(f"{target}: retrieval.kind {run.retrieval.kind} needs the folder of its index; give index=DIR")
    if (asked := run.service.topology) and (asked.encoders or asked.shard_replicas or asked.stores):
        raise UserError(
            f"{target}: service.topology is for runs with Ray, and this server is one process; leave it out"
        )
    return run


def serve(
    target: str, overrides: Sequence[str] = (), *, host: str = "", port: int | None = None, stdio: bool = False
) -> int:
    """Serves until told to stop. Returns the exit status."""
    given = [f"serve.host={host}"] * bool(host) + ([f"serve.port={port}"] if port is not None else [])
    run = load_run(target, [*overrides, *given])
    asyncio.run(_stdio(run) if stdio else _http(run))
    return 0


async def _open(run: ServeRun) -> SearchService:
    """The service, once a search of it has succeeded."""
    service = SearchService(
        open_backend(run.retrieval, Path(run.index).expanduser() if run.index else None), run.service
    )
    try:
        await service.check()
    except BaseException:
        await service.close()
        raise
    return service


async def _stdio(run: ServeRun) -> None:
    from envs.serve.mcp_tools import serve_stdio

    service = await _open(run)
    try:
        await serve_stdio(service, run.serve)
    finally:
        await service.close()


async def _http(run: ServeRun) -> None:
    from envs.serve.app import make_app
    from envs.serve.limits import token_of

    config = run.serve
    token = token_of(config)  # before the index, which may take a while
    with _bound(config) as listener:
        service = await _open(run)
        try:
            with _refusing(config):
                listener.listen(_BACKLOG)  # of two that were starting on one port, only one gets here
        except BaseException:
            await service.close()
            raise
        server = _server(make_app(service, config))
        info = service.info()
        place = f"[{config.host}]" if ":" in config.host else config.host
        print(
            f"serving {info.num_docs:,} documents ({info.name}) at http://{place}:{listener.getsockname()[1]} "
            f"({'with a token' if token else 'this machine only'}); routes: /openapi.json",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        await server.serve(sockets=[listener])


def _bound(config: ServeConfig) -> socket.socket:
    """A socket that has its port, and does not listen yet."""
    made = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart would wait for old connections
    try:
        with _refusing(config):
            made.bind((config.host, config.port))
        return made
    except BaseException:
        made.close()
        raise


@contextlib.contextmanager
def _refusing(config: ServeConfig) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror or error}); choose another with --port"
        ) from None


def _server(app: Any) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn raises the signal again once it has stopped; here a stop that was asked for is a good end."""

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    # a proxy's word about who is calling is not taken: it would get round the limit of requests
    return Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, proxy_headers=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=_DRAIN_S, ws="none",
        )
    )  # fmt: skip
