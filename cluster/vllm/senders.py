"""The learner's side of the collective transports: one epoch's way out, on every rank.

Invariants:
- Every rank runs through the weights, whoever sends; gathering them is a collective of the learner's own. What fails in it is raised as
  it is, on all ranks (`agents.learning.agreement`), and is no broken transport.
- A group ends with its epoch: a new one gets a new sender. CUDA IPC has no group, and its buffer stays.
- vLLM is imported only by the way that needs it.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch

from agents.learning.agreement import GatherError, Word, heard, reason_of
from cluster.vllm import collective
from cluster.vllm.buckets import Bucket, StreamDigest, cut, largest, pack
from cluster.vllm.collective import GATHER_SHARE, CollectiveError, GlooGroup, Rendezvous, Sent
from cluster.vllm.deadline import aborted_after, joined
from cluster.vllm.ipc import export
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
        self._group = GlooGroup(store, 0, world_size, limit_s, self.endpoint["host"])

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

        began = time.monotonic()
        self._rendezvous.gather(epoch, world_size, GATHER_SHARE * limit_s, over)
        device = torch.accelerator.current_device_index()
        with failures("the NCCL group was not met"):
            self._communicator = joined(
                began + limit_s - time.monotonic(),
                lambda: uid_init_process_group(self._unique_id, 0, world_size, device),
            )

    def send(self, weights: Weights, layout: Layout, bucket_bytes: int, limit_s: float) -> Sent:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

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
    """CUDA IPC: each rank packs its weights into a buffer on its GPU, which the engines there map. For all epochs.

    All ranks send together, a piece at a time, and wait for each other after each; what fails on one of them fails on all.

    The buffer and its export live as long as the sender. torch counts who has let go of an export, and never frees a dropped buffer that
    not exactly one process has mapped: a pass that broke off before an engine mapped it, a GPU without an engine, or with two of them,
    would cost a buffer each time.
    """

    def __init__(
        self, rank: int, device: torch.device, everybody: Callable[[Any], list[Any]],
        export: Callable[[torch.Tensor], tuple[str, list[Any]]] = export,
    ) -> None:  # fmt: skip
        """`everybody`: what each of the learner's ranks says, in their order. `export`: a buffer's GPU and handle."""
        self._rank, self._device, self._everybody, self._export = rank, device, everybody, export
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._exported: tuple[str, list[Any]] = ("", [])

    def send(
        self, weights: Weights, layout: Layout, bucket_bytes: int, hand_out: Callable[[Mapping[str, Any]], None]
    ) -> Sent:
        """`hand_out`: of rank 0; one piece to all engines, returns when they have taken it. Raises CollectiveError on every rank, with
        the weights left where they were."""
        began, digest = time.perf_counter(), StreamDigest()
        given, buckets = iter(weights), cut(layout, bucket_bytes, dense=True)
        handles = dict(self._together(lambda: self._ready(largest(buckets))))
        for bucket in buckets:
            self._together(partial(self._fill, bucket, given, digest))
            piece = {**_in_words(bucket), "handles": handles}
            self._together(partial(hand_out, piece) if self._rank == 0 else lambda: None)
        if (left := next(given, None)) is not None:
            raise CollectiveError(f"the learner gathered {left[0]!r}, which was not announced")
        return Sent(digest.hexdigest(), sum(bucket.nbytes for bucket in buckets), time.perf_counter() - began)

    def _ready(self, nbytes: int) -> tuple[str, list[Any]]:
        if self._buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._buffer, self._exported = buffer, self._export(buffer)
        return self._exported

    def _fill(self, bucket: Bucket, weights: Iterator[tuple[str, torch.Tensor]], digest: StreamDigest) -> None:
        gathered = islice(weights, len(bucket.names))

        def summed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in gathered:
                digest.add(name, tensor)
                yield name, tensor

        try:
            pack(bucket, summed(), self._buffer)
        finally:
            for _ in (
                gathered
            ):  # gathering is a collective: a rank that fails does its part of this piece's, and then says so
                pass
        if self._device.type == "cuda":  # nothing orders the streams of two processes
            torch.cuda.current_stream(self._device).synchronize()

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What each rank's part of a work gives. Raises CollectiveError on all of them, with what went wrong on the first; GatherError where
        that was the gathering, which no other pass would mend."""
        try:
            word = Word(work())
        except GatherError:
            raise  # every rank has it
        except Exception as error:
            word = Word(None, reason_of(error))
        try:
            return heard(self._everybody(word))
        except GatherError:
            raise
        except RuntimeError as error:
            raise CollectiveError(f"the weights were not taken: {error}") from error


def _in_words(bucket: Bucket) -> dict[str, list[Any]]:
    """A bucket as vLLM's update info has it."""
    return {
        "names": list(bucket.names),
        "dtype_names": [str(torch_dtype(spec.dtype)).removeprefix("torch.") for spec in bucket.specs],
        "shapes": [list(spec.shape) for spec in bucket.specs],
        "tensor_sizes": [spec.nbytes for spec in bucket.specs],
    }


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """What vLLM and NCCL raise of their own is a broken collective: it is met anew, and no learner ends by it."""
    try:
        yield
    except (CollectiveError, GatherError):
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
    """vLLM's client protocol where the fleet already walks the engines through the phases: there is nothing to tell them."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Done at INIT, with an offset for each engine."""

    def start_weight_update(self) -> None:
        """Done at START."""

    def update_weights(self, update_info: Any) -> None:
        """Done at UPDATE."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done at FINISH."""
