"""What vLLM's worker processes get from us: the transfer engine, digests, and a watch on the owner.

vLLM imports this module by its qualified name (`worker_extension_cls`) in every worker it spawns, before the
model is loaded. Importing it therefore registers the transfer engine (`receivers.py`) where vLLM looks for it, and
starts the watch, so that no engine process outlives the process that owns it.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import threading
import time
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.vllm.receivers import BACKEND, Receiver

OWNER_VARIABLE = "GUMSHOE_ENGINE_OWNER_PID"
"""Environment variable with the id of the process that owns the engine."""


class WorkerExtension:
    """Mixed into vLLM's worker class; its methods are called by `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any
    vllm_config: Any
    device: torch.device
    _weight_update_active: bool

    def gumshoe_checksums(self) -> dict[str, Any]:
        """See `engine.Checksums` for what each entry means."""
        digest = hashlib.sha256()
        live_bytes = 0
        for name, tensor in sorted(_live_tensors(self.model_runner.get_model()).items()):
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            digest.update(raw)
            live_bytes += raw.nbytes
        return {
            "received": getattr(self.weight_transfer_engine, "loaded_checksum", None),
            "live": digest.hexdigest(),
            "live_bytes": live_bytes,
        }

    def gumshoe_abort_update(self) -> None:
        """Leave an update that was started but not applied; vLLM has no call for it."""
        self.weight_transfer_engine.reset_weight_update_target()
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.abort()
        self._weight_update_active = False

    def gumshoe_device(self) -> str:
        """The unique id of this worker's GPU; empty on CPU."""
        if self.device.type != "cuda":
            return ""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def gumshoe_pids(self) -> list[int]:
        """This worker, and the engine core above it where that is another process."""
        return sorted({os.getpid(), *_core_pid()})


def _live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param for name, param in model.named_parameters() if param.numel()}


def _core_pid() -> tuple[int, ...]:
    """The engine core when workers are its children, else nothing."""
    owner = os.environ.get(OWNER_VARIABLE)
    parent = os.getppid()
    return () if owner is None or parent in (int(owner), 1) else (parent,)


def _end_engine(core_pids: tuple[int, ...]) -> None:
    for pid in (*core_pids, os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _watch(owner: int, core_pids: tuple[int, ...]) -> None:
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(owner)
        except ProcessLookupError:
            _end_engine(core_pids)
            return
        except OSError:
            handle = -1
        if handle >= 0:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
            _end_engine(core_pids)
            return
    # Where the kernel has no process handles: ask twice a second.
    while True:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            _end_engine(core_pids)
            return
        time.sleep(0.5)


def _register() -> None:
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
    except ValueError:
        # Imported twice under one interpreter, as in a test process: the first registration stands.
        return
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None and int(owner) != os.getpid():
        threading.Thread(target=_watch, args=(int(owner), _core_pid()), name="gumshoe-owner-watch", daemon=True).start()


_register()
