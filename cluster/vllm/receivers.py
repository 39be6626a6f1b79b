"""The engines' side of every transport, inside vLLM's worker processes.

vLLM makes one `Receiver` per worker; which way the weights come is said when it meets the trainer, so one engine can be
sent to by shared memory today and by a collective tomorrow.

Invariants:
- A segment that is refused leaves the weights as they were: it is verified whole before the model is touched.
- What comes by a collective is loaded as it comes. Until it is whole the model is of no use, and the state machine
  keeps the engine held.
- A group of an epoch that is over is closed before the next one is met, and weights of another epoch are refused.
- No wait is longer than its deadline. NCCL knows none: see `deadline.py`. A worker that hangs in it for good says so whatever it is asked,
  so that the fleet starts the engine again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from cluster.membership import EpochGuard
from cluster.vllm.buckets import StreamDigest, from_wire
from cluster.vllm.collective import ARRIVE_SHARE, CollectiveError, GlooGroup, arrive, receive
from cluster.vllm.deadline import Stuck, aborted_after, joined
from cluster.vllm.expected import expected_layout, optional_names
from cluster.vllm.ipc import from_plain
from cluster.vllm.reload import Reload
from cluster.vllm.segment import Manifest, SegmentError, SegmentReader, torch_dtype

BACKEND = "gumshoe"
"""The name under which vLLM knows `Receiver`."""

Fields = Mapping[str, Any]


class _Way(Protocol):
    """One transport. `checksum` is of the weights that the last `finish` made current."""

    checksum: str | None

    def meet(self, epoch: int, info: Fields) -> None: ...
    def start(self) -> None: ...
    def update(self, info: Fields) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...
    def shutdown(self) -> None: ...


class Receiver(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):
    """What vLLM calls; hands every call to the way that the trainer chose."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._parts = parts
        self._guard = EpochGuard()
        self._kind = ""
        self._way: _Way | None = None
        self.loaded_checksum: str | None = None
        """Of what is loaded now; None: still the checkpoint."""

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return init_dict

    def init_transfer_engine(self, init_info: Any) -> None:
        info = dict(init_info)
        kind, epoch = info.pop("kind", "segment"), info.pop("epoch", None)
        if epoch is not None:
            self._guard.enter(epoch)
        if kind != self._kind:
            self.shutdown()
            self._way = _WAYS[kind](*self._parts)
            self._kind = kind
        self._met.meet(epoch or 0, info)

    def start_weight_update(self) -> None:
        self._met.start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it synchronises the accelerator, which raises where there is none.
        info = dict(update_info)
        epoch = info.pop("epoch", None)
        if epoch is not None:
            self._guard.check(epoch)
        self._met.update(info)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Any) -> None:
        self._met.update(update_info)

    def finish_weight_update(self) -> None:
        self._met.finish()
        self.loaded_checksum = self._met.checksum

    def abort(self) -> None:
        """Leave an update that was started but not applied; vLLM has no call for it."""
        if self._way is not None:
            self._way.abort()

    def shutdown(self) -> None:
        if self._way is not None:
            self._way.shutdown()

    @property
    def _met(self) -> _Way:
        if self._way is None:
            raise SegmentError("init_weight_transfer_engine was not called")
        return self._way


class _Segments:
    """Maps a segment, verifies it, and loads it in one go."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        model_config = vllm_config.model_config
        self._layout = expected_layout(model_config.model, model_config.dtype)
        self._optional = optional_names(model_config.hf_config)
        self._reload = Reload(model, model_config)
        self._reader: SegmentReader | None = None
        self.checksum: str | None = None

    def meet(self, epoch: int, info: Fields) -> None:
        """Shared memory needs no meeting."""

    def start(self) -> None:
        self._drop()

    def update(self, info: Fields) -> None:
        self._drop()
        reader = SegmentReader(Manifest.from_dict(info["manifest"]))
        reader.verify_layout(self._layout, optional=self._optional)
        if info.get("verify_checksum"):
            reader.verify_checksum()
        self._reader = reader

    def finish(self) -> None:
        if self._reader is None:
            raise SegmentError("no segment was received")
        self._reload.begin()
        self._reload.load(self._reader.tensors())
        self._reload.finish()
        self.checksum = self._reader.manifest.checksum
        self._drop()

    def abort(self) -> None:
        self._drop()

    def shutdown(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Loads:
    """What the collective ways share: they load as the bytes come, and sum them up on the way."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        self.parts = (config, vllm_config, device, model)
        self.device = device
        self.parallel = vllm_config.parallel_config
        self.reload = Reload(model, vllm_config.model_config)
        self.digest = StreamDigest()

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = list(weights)
        for name, tensor in weights:
            self.digest.add(name, tensor)
        self.reload.load(weights)

    # `model.load_weights` as vLLM's own engines call it.
    load_weights = load

    def start(self) -> None:
        self.digest = StreamDigest()
        self.reload.begin()

    def finish(self) -> str:
        self.reload.finish()
        return self.digest.hexdigest()


class _Gloo:
    """Broadcast over TCP, through the CPU's memory: the collective that runs anywhere."""

    def __init__(self, *parts: Any) -> None:
        self._loads = _Loads(*parts)
        self._group: GlooGroup | None = None
        self._bucket_bytes = 0
        self.checksum: str | None = None

    def meet(self, epoch: int, info: Fields) -> None:
        self.shutdown()
        rank = info["rank_offset"] + worker_rank(self._loads.parallel)
        store = arrive(info, epoch, rank, info["limit_s"])
        self._group = GlooGroup(store, rank, info["world_size"], info["limit_s"], info["host"])
        self._bucket_bytes = info["bucket_bytes"]

    def start(self) -> None:
        self._loads.start()

    def update(self, info: Fields) -> None:
        if self._group is None:
            raise CollectiveError("this engine has met no group")
        try:
            receive(from_wire(info["layout"]), self._group, self._bucket_bytes, self._loads.load)
        except Exception:
            self.shutdown()  # the sender and the other ranks hear of it at once
            raise

    def finish(self) -> None:
        self.checksum = self._loads.finish()

    def abort(self) -> None:
        self.shutdown()
        self._loads.reload.abort()

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class _Nccl:
    """vLLM's own NCCL engine (packed and double-buffered broadcast), met under our epochs."""

    def __init__(self, *parts: Any) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self._loads = _Loads(*parts)
        self._engine: Any = NCCLWeightTransferEngine(*parts)
        self._engine.model = self._loads  # it calls nothing but `load_weights`
        self._limit_s = 0.0
        self._stuck = ""
        self.checksum: str | None = None

    def meet(self, epoch: int, info: Fields) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

        self.shutdown()
        began, self._limit_s = time.monotonic(), info["limit_s"]
        # NCCL waits for a missing rank without end, so everybody shows up here first.
        rank = info["rank_offset"] + worker_rank(self._loads.parallel)
        arrive(info, epoch, rank, ARRIVE_SHARE * self._limit_s)
        told = NCCLWeightTransferInitInfo(
            rank_offset=info["rank_offset"],
            world_size=info["world_size"],
            nccl_unique_id_b64=info["unique_id"],
            packed=True,
            packed_buffer_size_bytes=info["bucket_bytes"],
        )
        try:
            joined(began + self._limit_s - time.monotonic(), lambda: self._engine.init_transfer_engine(told))
        except Stuck as error:  # a peer was lost after it had shown up
            self._stuck = str(error)
            raise

    def start(self) -> None:
        self._loads.start()

    def update(self, info: Fields) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

        if self._engine.model_update_group is None:
            raise CollectiveError("this engine has met no group")
        update = NCCLWeightTransferUpdateInfo(**vllm_names(info["layout"]))
        with aborted_after(self._limit_s, self._engine.model_update_group):
            self._engine.receive_weights(update)
            torch.accelerator.synchronize()

    def finish(self) -> None:
        self.checksum = self._loads.finish()

    def abort(self) -> None:
        self.shutdown()
        self._loads.reload.abort()

    def shutdown(self) -> None:
        if self._stuck:
            raise Stuck(self._stuck)
        self._engine.shutdown()


class _Ipc:
    """vLLM's own CUDA IPC engine (packed): the trainer's buffer, mapped on the same GPU."""

    def __init__(self, *parts: Any) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

        self._loads = _Loads(*parts)
        self._engine: Any = IPCWeightTransferEngine(*parts)
        self._engine.model = self._loads
        self.checksum: str | None = None

    def meet(self, epoch: int, info: Fields) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo

        self._engine.init_transfer_engine(IPCWeightTransferInitInfo(packed=bool(info["packed"])))

    def start(self) -> None:
        self._loads.start()

    def update(self, info: Fields) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

        handles = {device: from_plain(fields) for device, fields in info["handles"].items()}
        sizes = list(info["tensor_sizes"])
        names = {"names": info["names"], "dtype_names": info["dtype_names"], "shapes": info["shapes"]}
        self._engine.receive_weights(IPCWeightTransferUpdateInfo(**names, ipc_handles=handles, tensor_sizes=sizes))

    def finish(self) -> None:
        self.checksum = self._loads.finish()
        self.shutdown()  # lets go of the trainer's buffer, once per update, as its count of users wants

    def abort(self) -> None:
        self.shutdown()
        self._loads.reload.abort()

    def shutdown(self) -> None:
        self._engine.shutdown()


_WAYS: dict[str, Any] = {"segment": _Segments, "gloo": _Gloo, "nccl": _Nccl, "ipc": _Ipc}


def worker_rank(parallel: Any) -> int:
    """This worker's number in its engine: what vLLM adds to the rank offset."""
    return int(parallel.data_parallel_index * parallel.world_size + parallel.rank)


def vllm_names(layout: Fields) -> dict[str, list[Any]]:
    """A layout (`buckets.to_wire`) in the words of vLLM's update infos."""
    dtypes = [str(torch_dtype(name)).removeprefix("torch.") for name in layout["dtypes"]]
    return {"names": list(layout["names"]), "dtype_names": dtypes, "shapes": [list(s) for s in layout["shapes"]]}
