"""What runs inside vLLM's worker processes: our weight-transfer engine, digests, and a watch on the owner.

vLLM imports this module by its qualified name (`worker_extension_cls`) in every worker it spawns, before the
model is loaded. Importing it therefore registers the transfer engine where vLLM looks for it, and starts the
watch, so that no engine process outlives the process that owns it.

Invariants:
- The transfer engine touches the model only in `finish_weight_update`, and only after the whole segment was
  verified; a segment that is refused in `receive_weights` leaves the weights as they were.
- The layout a segment must have is that of the checkpoint the engine was started from, not what a trainer says.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from cluster.vllm.segment import Manifest, SegmentError, SegmentReader, TensorSpec, dtype_name, file_layout

BACKEND = "gumshoe_shm"
"""The name under which vLLM knows our transfer engine."""

OWNER_VARIABLE = "GUMSHOE_ENGINE_OWNER_PID"
"""Environment variable with the id of the process that owns the engine."""

_TIED_NAME = "lm_head.weight"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One whole segment."""

    manifest: dict[str, Any]
    """The trainer's `Manifest` as a dict."""
    verify_checksum: bool = False
    """Whether the worker hashes the bytes itself, inside the pause."""


class ShmTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads a mapped segment by vLLM's layer-wise reload.

    Layer-wise, because on CPU the linear layers are packed after loading and their plain parameters are gone.
    """

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    _reader: SegmentReader | None = None
    _layout: dict[str, TensorSpec] | None = None
    loaded_checksum: str | None = None
    """Manifest checksum of the segment that is loaded now; None: still the checkpoint."""

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._layout = expected_layout(self.model_config.model, self.model_config.dtype)

    def start_weight_update(self) -> None:
        self._drop_reader()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises the accelerator here, which raises where there is none; nothing has
        # been copied to a device at this point anyhow.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        if self._layout is None:
            raise SegmentError("init_weight_transfer_engine was not called")
        self._drop_reader()
        reader = SegmentReader(Manifest.from_dict(update_info.manifest))
        reader.verify_layout(self._layout, optional=optional_names(self.model_config.hf_config))
        if update_info.verify_checksum:
            reader.verify_checksum()
        self._reader = reader

    def finish_weight_update(self) -> None:
        if self._reader is None:
            raise SegmentError("no segment was received")
        reader = self._reader
        tied = bool(optional_names(self.model_config.hf_config))
        tied_modules = _tied_modules(self.model)
        with torch.no_grad():
            _forget_packed_experts(self.model)
            initialize_layerwise_reload(self.model)
            self.model.load_weights(
                (name, tensor) for name, tensor in reader.tensors() if not (tied and name == _TIED_NAME)
            )
            finalize_layerwise_reload(self.model, self.model_config)
            _renew_tied(tied_modules)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.loaded_checksum = reader.manifest.checksum
        self._drop_reader()

    def shutdown(self) -> None:
        self._drop_reader()

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class WorkerExtension:
    """Mixed into vLLM's worker class; its methods are called by `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any
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
        self.weight_transfer_engine.start_weight_update()
        self._weight_update_active = False

    def gumshoe_pids(self) -> list[int]:
        """This worker, and the engine core above it where that is another process."""
        return sorted({os.getpid(), *_core_pid()})


def expected_layout(model: str, engine_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names and shapes of the checkpoint's safetensors; floating types become the engine's own type."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SegmentError(f"{folder} holds no .safetensors file, so published weights cannot be checked")
    layout: dict[str, TensorSpec] = {}
    wanted = dtype_name(engine_dtype)
    for file in files:
        for name, spec in file_layout(file).items():
            floating = spec.dtype.startswith(("F", "BF"))
            layout[name] = TensorSpec(wanted if floating else spec.dtype, spec.shape)
    return layout


def optional_names(hf_config: Any) -> frozenset[str]:
    """A model with tied embeddings may or may not carry its output matrix a second time."""
    return frozenset({_TIED_NAME}) if getattr(hf_config, "tie_word_embeddings", False) else frozenset()


def _tied_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Pairs (owner, follower) of modules that share one weight, as embedding and output matrix do."""
    owners: dict[int, torch.nn.Module] = {}
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.numel():
            continue
        owner = owners.setdefault(id(weight), module)
        if owner is not module:
            pairs.append((owner, module))
    return pairs


def _renew_tied(pairs: list[tuple[torch.nn.Module, torch.nn.Module]]) -> None:
    """Give followers the owner's new weight and let them pack it again.

    The layer-wise reload works on layers that receive weights. A tied output matrix receives none, and on CPU it
    computes with a packed copy of its own, which would silently stay that of the old weights.
    """
    for owner, follower in pairs:
        follower.weight = owner.weight
        quant_method = getattr(follower, "quant_method", None)
        if quant_method is not None and owner.weight.device.type == "cpu":
            quant_method.process_weights_after_loading(follower)


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Let the layers of a mixture of experts pack what they are about to load as they did at the start.

    vLLM takes a layer that has its kernel for one whose weights need no packing any more. On CPU they do: the packed
    form of the old weights would be filled with plain new ones, which the kernel reads in another order.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        experts = getattr(module, "w13_weight", None)
        if method is not None and experts is not None and experts.device.type == "cpu":
            method.moe_kernel = None


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
        WeightTransferEngineFactory.register_engine(BACKEND, ShmTransferEngine)
    except ValueError:
        # Imported twice under one interpreter, as in a test process: the first registration stands.
        return
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is not None and int(owner) != os.getpid():
        threading.Thread(target=_watch, args=(int(owner), _core_pid()), name="gumshoe-owner-watch", daemon=True).start()


_register()
