"""A model served for a run: `vllm serve` as a child process on loopback, asked like any chat endpoint.

The server does what judges and chat agents need (chat template, tokenizer, tool calls, enforced JSON schemas) and our sampler engines leave
out on purpose. It belongs to an actor of its own (`cluster.judges.JudgeEngine`, `cluster.evaluation.engines.ChatEngine`).

Invariants: the port is reachable from this machine only and wants a key that is drawn anew for every child; requests cross machines as
calls of the actor. The child ends with its actor, however that ends; an actor whose child died ends too, with all that the child had started,
and Ray starts both again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import gumshoe
from cluster.vllm.launch import prepare_calm, root_cause
from cluster.vllm.options import EngineConfig

KEY = "GUMSHOE_SERVED_KEY"
"""Variable of the actor's process that holds the child's key."""
_GRACE_S = 10.0
_MEMORY = {"--gpu-memory-utilization", "--kv-cache-memory-bytes"}
"""Options by which a server is told how much memory to take."""


class ModelServer:
    """One child, and what its actor has to know of it."""

    def __init__(
        self,
        model: str,
        arguments: Sequence[str],
        *,
        num_gpus: float,
        start_s: float,
        what: str,
        mend: str,
        limit: str,
        error: type[Exception],
        command: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the child. `what`, `mend`, `limit`: how messages name the engine, the keys to correct, and that of `start_s`; `error`:
        what is raised when it does not come up."""
        self._what, self._mend, self._limit, self._error = f"the {what} for {model}", mend, limit, error
        self._start_s, self.began = start_s, time.time()
        os.environ[KEY] = secrets.token_hex(16)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        descriptor, log = tempfile.mkstemp(prefix="gumshoe-served-", suffix=".log")
        self.log = Path(log)
        options = [
            model, "--served-model-name", model, "--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning", *arguments,
        ]  # fmt: skip
        prepare_calm(EngineConfig(model))
        env = os.environ | gumshoe.child_env() | {"VLLM_API_KEY": os.environ[KEY]} | dict(variables or {})
        if not num_gpus:
            # A prompt with a seed that is cut into chunks would end the engine (`options.batched_tokens`).
            options.append("--no-enable-chunked-prefill")
            # Else vLLM would bind its threads to cores of its own choice, which other processes of the run use too.
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if not _MEMORY.intersection(option.split("=")[0] for option in arguments):
                # Else vLLM would ask for nine tenths of the machine's memory.
                env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        with os.fdopen(descriptor, "wb") as out:
            self.child = subprocess.Popen(
                [*(command or (sys.executable, "-m", "cluster.vllm.serve")), *options], stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, env=env, start_new_session=True,
            )  # fmt: skip
        self.ready = False
        self._up: asyncio.Task[None] | None = None

    def coming_up(self, check: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Done once `check` passes; raises the server's error, one line, when the child does not come up."""
        if self._up is None:
            self._up = asyncio.create_task(self._wait_up(check))
        return self._up

    def must_answer(self, check: Callable[[], Awaitable[None]]) -> bool:
        """Whether it can be asked now. An actor that Ray started again waits for its child; when that fails the next one has to try."""
        if not self.ready:
            up = self.coming_up(check)
            if up.done() and up.exception() is not None:
                os._exit(1)
        return self.ready

    def pulse(self) -> tuple[str, float, int]:
        """For the watchdog: it waits for its engine to start, then for nobody."""
        return ("", 0.0, os.getpid()) if self.ready else ("its engine to start", self.began, os.getpid())

    async def close(self) -> None:
        """Ends the child."""
        self.ready = False
        await asyncio.to_thread(self._end)

    async def _wait_up(self, check: Callable[[], Awaitable[None]]) -> None:
        ends_at = time.monotonic() + self._start_s
        problem: Exception | None = None
        while time.monotonic() < ends_at:
            if self.child.poll() is not None:
                why = root_cause(self.log) or f"exit status {self.child.returncode}"
                raise self._error(f"{self._what} did not start: {why}; mend {self._mend}")
            try:
                await check()  # refused without the key, so it is our child that answers
            except self._error as error:
                problem = error
                await asyncio.sleep(0.5)
                continue
            self.ready = True
            threading.Thread(target=self._follow, name="gumshoe-served-child", daemon=True).start()
            return
        await asyncio.to_thread(self._end)
        raise self._error(f"{self._what} was not up within {self._limit}={self._start_s:g}: {problem}")

    def _follow(self) -> None:
        """An actor without its engine is of no use; Ray starts a new one, which needs the memory that the old one's processes still hold."""
        self.child.wait()
        if self.ready:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            os._exit(1)

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(_GRACE_S)
        self.log.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
