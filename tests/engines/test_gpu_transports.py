"""NCCL and CUDA IPC as far as a machine without a GPU can go: every call into vLLM's own weight-transfer engines, with the moves of bytes
between processes replaced. What is left unproven is listed in `docs/publishing.md` and by `gumshoe doctor`.
"""

from __future__ import annotations

import base64
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from cluster.membership import StaleEpoch
from cluster.vllm import receivers, senders
from cluster.vllm.buckets import StreamDigest, learn_layout, to_wire
from cluster.vllm.collective import CollectiveError, Rendezvous
from cluster.vllm.deadline import Stuck, aborted_after
from cluster.vllm.ipc import to_plain
from cluster.vllm.receivers import Receiver
from cluster.vllm.segment import SegmentError

WEIGHTS = [(f"w{i}", torch.full((8, i + 1), float(i))) for i in range(4)]
HANDLE = (
    torch.Tensor, torch.Size([64]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"memory", 64, 0, False, b"count", 0, b"event", True,
)  # fmt: skip


class Model(torch.nn.Module):
    """Takes whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.got.update(weights)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Receiver, Model]:
    """The engine that vLLM makes in worker 1 of 2, around a model without layers."""
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(f"cluster.vllm.reload.{name}", lambda *_: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    parallel = SimpleNamespace(data_parallel_index=0, world_size=2, rank=1)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=False), dtype=torch.float32, model="")
    model = Model()
    config = SimpleNamespace(parallel_config=parallel, model_config=model_config)
    return Receiver(SimpleNamespace(backend="gumshoe"), config, torch.device("cpu"), model), model


def digest() -> str:
    found = StreamDigest()
    for name, tensor in WEIGHTS:
        found.add(name, tensor)
    return found.hexdigest()


def test_nccl_joins_by_a_shared_id_under_the_ranks_of_the_epoch_and_loads_what_vllm_hands_it(
    made: tuple[Receiver, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = made
    joined: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(receivers, "arrive", lambda info, epoch, rank, limit_s: joined.append((epoch, rank)))

    def join(unique_id: bytes, rank: int, world_size: int, device: int) -> Any:
        joined.append((unique_id, rank, world_size))
        return SimpleNamespace(destroy=lambda: joined.append("destroyed"))

    def consume(iterator: Any, post_unpack_func: Any, buffer_size_bytes: int, **_: Any) -> None:
        assert [(name, tuple(shape), dtype) for name, (shape, dtype) in iterator] == [
            (name, tuple(t.shape), t.dtype) for name, t in WEIGHTS
        ]
        assert buffer_size_bytes == 512
        post_unpack_func(WEIGHTS[:2])
        post_unpack_func(WEIGHTS[2:])

    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_common.uid_init_process_group", join)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
    info = {
        "kind": "nccl", "epoch": 4, "rank_offset": 3, "world_size": 5, "bucket_bytes": 512, "limit_s": 5.0, "host": "h", "port": 1,
        "unique_id": base64.b64encode(bytes(128)).decode(),
    }  # fmt: skip
    engine.init_transfer_engine(engine.parse_init_info(info))
    assert joined == [(4, 4), (bytes(128), 4, 5)], "worker 1 of an engine at offset 3 is rank 4"
    engine.start_weight_update()
    engine.update_weights({"epoch": 4, "layout": to_wire(learn_layout(WEIGHTS))})
    engine.finish_weight_update()
    assert list(model.got) == [name for name, _ in WEIGHTS] and engine.loaded_checksum == digest()
    with pytest.raises(StaleEpoch):
        engine.update_weights({"epoch": 3, "layout": {}})
    engine.init_transfer_engine({**info, "epoch": 5})
    assert "destroyed" in joined, "the group of the epoch before was left open"
    with pytest.raises(StaleEpoch):
        engine.init_transfer_engine(info)


def test_ipc_takes_piece_after_piece_and_lets_go_of_the_buffer_once_per_update(
    made: tuple[Receiver, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the learner's sender to vLLM's consumer; what is not here is the mapping itself."""
    engine, model = made
    buffers: list[torch.Tensor] = []
    mapped: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="gpu"))
    monkeypatch.setattr(
        "torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *args: mapped.append(args) or buffers[0]
    )

    def export(buffer: torch.Tensor) -> tuple[str, list[Any]]:
        buffers.append(buffer)
        return "gpu", to_plain(HANDLE)

    sender = senders.IpcSender(0, torch.device("cpu"), lambda word: [word], export)
    engine.init_transfer_engine({"kind": "ipc", "epoch": 1, "packed": True})
    for update in (1, 2):
        engine.start_weight_update()
        model.got.clear()
        handed: list[Any] = []

        def hand_out(piece: Any, handed: list[Any] = handed) -> None:
            handed.append(piece["names"])
            engine.update_weights({"epoch": 1, **piece})

        sent = sender.send(iter(WEIGHTS), learn_layout(WEIGHTS), 100, hand_out)
        engine.finish_weight_update()
        assert engine.loaded_checksum == digest() == sent.checksum and handed == [["w0", "w1"], ["w2"], ["w3"]]
        assert all(torch.equal(model.got[name], tensor) for name, tensor in WEIGHTS)
        assert len(mapped) == update and len(buffers) == 1
    assert all(tuple(args[:6]) == HANDLE[:6] and args[7:] == HANDLE[7:] for args in mapped), (
        "a handle was changed on its way"
    )

    def refuse(_: Any) -> None:
        raise RuntimeError("an engine is gone")

    gathered = iter(WEIGHTS)
    with pytest.raises(CollectiveError, match="an engine is gone"):
        sender.send(gathered, learn_layout(WEIGHTS), 100, refuse)
    assert len(list(gathered)) == 2, "what the pass has left is for its caller to run through"


@pytest.mark.parametrize("side", ["worker", "learner"])
def test_joining_nccl_has_an_end_and_a_worker_that_hangs_in_it_is_given_up(
    side: str, made: tuple[Receiver, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(
        "vllm.distributed.weight_transfer.nccl_common.uid_init_process_group", lambda *_, **__: never.wait()
    )
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    began = time.monotonic()
    if side == "learner":
        sender = senders.NcclSender.__new__(senders.NcclSender)
        sender._rendezvous = SimpleNamespace(gather=lambda *_: None)  # type: ignore[assignment]
        sender._unique_id = bytes(128)
        with pytest.raises(Stuck, match="not joined"):
            sender.join(1, 2, 0.2, lambda: False)
    else:
        engine, _ = made
        monkeypatch.setattr(receivers, "arrive", lambda *_: None)
        info = {
            "kind": "nccl", "epoch": 4, "rank_offset": 3, "world_size": 5, "bucket_bytes": 512, "limit_s": 0.2,
            "host": "h", "port": 1, "unique_id": base64.b64encode(bytes(128)).decode(),
        }  # fmt: skip
        with pytest.raises(Stuck, match="not joined"):
            engine.init_transfer_engine(info)
        for then in (engine.abort, lambda: engine.init_transfer_engine({**info, "epoch": 5})):
            with pytest.raises(CollectiveError, match="cannot be ended"):
                then()
    assert time.monotonic() - began < 5
    never.set()


@pytest.mark.parametrize("error", [RuntimeError("NCCL error: remote process exited"), ValueError("yielded 3")])
def test_what_nccl_reports_is_a_broken_collective(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", fails)
    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_common.uid_init_process_group", fails)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    sender = senders.NcclSender.__new__(senders.NcclSender)
    sender._rendezvous, sender._unique_id = SimpleNamespace(gather=lambda *_: None), bytes(128)  # type: ignore[assignment]
    with pytest.raises(CollectiveError, match=f"was not met: {error}"):
        sender.join(1, 2, 5.0, lambda: False)
    sender._communicator = SimpleNamespace(destroy=lambda: None)
    with pytest.raises(CollectiveError, match=f"the broadcast failed: {error}"):
        sender.send(iter(WEIGHTS), learn_layout(WEIGHTS), 512, 5.0)


def test_an_update_that_got_nothing_is_not_taken_for_one(made: tuple[Receiver, Model]) -> None:
    engine, _ = made
    with pytest.raises(SegmentError, match="was not called"):
        engine.start_weight_update()
    engine.init_transfer_engine({"kind": "ipc", "epoch": 1, "packed": True})
    engine.start_weight_update()
    with pytest.raises(RuntimeError, match="no weights were received"):
        engine.finish_weight_update()
    engine.abort()
    assert engine.loaded_checksum is None


def test_the_learner_sends_by_vllms_nccl_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def produce(iterator: Any, group: Any, buffer_size_bytes: int, **_: Any) -> None:
        assert group == "communicator" or group.mark == "communicator"
        assert buffer_size_bytes == 512
        sent.extend(name for name, _ in iterator)

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    sender = senders.NcclSender.__new__(senders.NcclSender)
    sender._communicator = SimpleNamespace(mark="communicator", destroy=lambda: sent.append("destroyed"))
    found = sender.send(iter(WEIGHTS), learn_layout(WEIGHTS), 512, 5.0)
    assert sent == [name for name, _ in WEIGHTS] and found.checksum == digest()
    sender.close()
    assert sent[-1] == "destroyed"
    with pytest.raises(CollectiveError, match="met nobody"):
        sender.send(iter(WEIGHTS), {}, 512, 5.0)
    assert isinstance(senders.Told(), VLLMWeightSyncClient)
    assert Rendezvous("127.0.0.1").endpoint["port"] > 0


def test_a_broadcast_that_hangs_is_aborted_at_its_deadline() -> None:
    ended: list[float] = []
    began = time.monotonic()

    def destroy() -> None:
        ended.append(time.monotonic() - began)

    with (
        pytest.raises(CollectiveError, match="did not end within"),
        aborted_after(0.1, SimpleNamespace(destroy=destroy)),
    ):
        while not ended:
            time.sleep(0.01)
        raise RuntimeError("ncclCommAbort")
    with aborted_after(5.0, SimpleNamespace(destroy=destroy)):
        pass
    assert len(ended) == 1


def test_vllm_still_unpacks_what_this_file_replaced() -> None:
    packed = torch.cat([t.reshape(-1).view(torch.uint8) for _, t in WEIGHTS])
    names, tensors = zip(*WEIGHTS, strict=True)
    found = unpack_tensor(
        packed, list(names), [list(t.shape) for t in tensors], [t.dtype for t in tensors], [t.nbytes for t in tensors]
    )
    assert all(torch.equal(tensor, wanted) for (_, tensor), wanted in zip(found, tensors, strict=True))
