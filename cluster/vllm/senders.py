"""The learner's side of the collective transports: one epoch's way out, on every rank.

Invariants:
- Every rank runs through the weights, whoever sends; gathering them is a collective of the learner's own.
- Nothing here outlives its epoch: a new one gets a new sender.
- vLLM is imported only by the ways that need a GPU.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from cluster.vllm import collective
from cluster.vllm.buckets import StreamDigest, largest
from cluster.vllm.collective import CollectiveError, GlooGroup, Rendezvous, Sent
from cluster.vllm.ipc import to_plain
from cluster.vllm.segment import Layout, torch_dtype

Weights = Iterable[tuple[str, torch.Tensor]]


class Sender(Protocol):
    """The way out of rank 0 in one epoch."""

    endpoint: Mapping[str, Any]
    """What the engines need to know to meet."""

    def join(self, epoch: int, world_size: int, limit_s: float, over: Callable[[], bool]) -> None:
        """Meets all workers. `over` says that waiting is no use. Raises CollectiveError."""
        ...

    def send(self, weights: Weights, layout: Layout, bucket_bytes: int, limit_s: float) -> Sent: ...
    def close(self) -> None: ...


class GlooSender:
    """Over TCP, from the CPU's memory."""

    def __init__(self, host: str) -> None:
        self._rendezvous = Rendezvous(host)
        self.endpoint: Mapping[str, Any] = self._rendezvous.endpoint
        self._group: GlooGroup | None = None

    def join(self, epoch: int, world_size: int, limit_s: float, over: Callable[[], bool]) -> None:
        store = self._rendezvous.gather(epoch, world_size, limit_s, over)
        self._group = GlooGroup(store, 0, world_size, limit_s)

    def send(self, weights: Weights, layout: Layout, bucket_bytes: int, limit_s: float) -> Sent:
        if self._group is None:
            raise CollectiveError("the learner has met nobody")
        return collective.send(weights, layout, self._group, bucket_bytes)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class NcclSender:
    """vLLM's NCCL trainer engine: while one bucket is broadcast, the next is gathered and packed on another stream."""

    def __init__(self, host: str) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._rendezvous = Rendezvous(host)
        # Made here and told to everybody: NCCL's own meeting by address would wait for a missing rank without end.
        self._unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        self.endpoint: Mapping[str, Any] = {
            **self._rendezvous.endpoint,
            "unique_id": base64.b64encode(self._unique_id).decode(),
        }
        self._communicator: Any = None

    def join(self, epoch: int, world_size: int, limit_s: float, over: Callable[[], bool]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        self._rendezvous.gather(epoch, world_size, limit_s, over)
        device = torch.accelerator.current_device_index()
        with failures("the NCCL group was not met"):
            self._communicator = uid_init_process_group(self._unique_id, 0, world_size, device)

    def send(self, weights: Weights, layout: Layout, bucket_bytes: int, limit_s: float) -> Sent:
        import time

        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        from cluster.vllm.receivers import aborted_after

        if self._communicator is None:
            raise CollectiveError("the learner has met nobody")
        began, source = time.perf_counter(), Source(weights, layout)
        engine = NCCLTrainerWeightTransferEngine(
            client=Told(), source=source, packed=True, packed_buffer_size_bytes=bucket_bytes
        )
        engine.model_update_group = self._communicator
        with failures("the broadcast failed"), aborted_after(limit_s, self._communicator):
            engine.send_weights()
        return Sent(source.digest.hexdigest(), source.nbytes, time.perf_counter() - began)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


class IpcSender:
    """vLLM's CUDA IPC trainer engine: each rank gathers into a buffer on its GPU, which the engine there maps.

    All ranks send together, a piece at a time, and wait for each other after each. So a failure must not end the pass:
    `hand_out` of rank 0 fails once, and what comes after is dropped.
    """

    endpoint: Mapping[str, Any] = {}

    def __init__(self, rank: int, hand_out: Callable[[Mapping[str, Any]], None]) -> None:
        self._rank = rank
        self._hand_out = hand_out

    def join(self, epoch: int, world_size: int, limit_s: float, over: Callable[[], bool]) -> None:
        """Handles need no meeting."""

    def send(self, weights: Weights, layout: Layout, bucket_bytes: int, limit_s: float) -> Sent:
        import time

        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

        began, source, client = time.perf_counter(), Source(weights, layout), Told(self._hand_out)
        engine = IPCTrainerWeightTransferEngine(
            client=client,
            source=source,
            is_sender=self._rank == 0,
            packed=True,
            packed_buffer_size_bytes=largest(layout, bucket_bytes),
        )
        with failures("the weights were not laid down"):
            engine.send_weights()
        if client.failure is not None:
            raise CollectiveError(f"an engine did not take the weights: {client.failure}") from client.failure
        return Sent(source.digest.hexdigest(), source.nbytes, time.perf_counter() - began)

    def close(self) -> None:
        """Buffers end with each pass."""


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """What vLLM and NCCL raise of their own is a broken collective: it is met anew, and no learner ends by it."""
    try:
        yield
    except CollectiveError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CollectiveError(f"{what}: {' '.join(str(error).split())[:200]}") from error


class Source:
    """The learner's weights as vLLM's trainer engines want them (its `WeightSource`): announced, then one by one."""

    def __init__(self, weights: Weights, layout: Layout) -> None:
        self._weights = weights
        self._layout = layout
        self.digest = StreamDigest()
        self.nbytes = 0

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, torch_dtype(spec.dtype), spec.shape) for name, spec in self._layout.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.digest.add(name, tensor)
            self.nbytes += tensor.numel() * tensor.element_size()
            yield name, tensor.contiguous()


class Told:
    """vLLM's client protocol where the fleet already walks the engines through the phases: only pieces are passed on."""

    def __init__(self, hand_out: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._hand_out = hand_out
        self.failure: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Done at INIT, with an offset for each engine."""

    def start_weight_update(self) -> None:
        """Done at START."""

    def update_weights(self, update_info: Any) -> None:
        if self._hand_out is None or self.failure is not None:
            return
        info = dict(update_info)
        handles = {device: to_plain(arguments) for device, arguments in info["ipc_handles"].items()}
        names = {key: info[key] for key in ("names", "dtype_names", "shapes", "tensor_sizes")}
        try:
            self._hand_out({**names, "handles": handles})
        except Exception as error:
            self.failure = error

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done at FINISH."""
