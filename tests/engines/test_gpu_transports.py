"""NCCL and CUDA IPC as far as a machine without a GPU can go: every call into vLLM's own weight-transfer engines, with the moves of bytes
between processes replaced. What is left unproven is listed in `docs/publishing.md` and by `gumshoe doctor`.
"""

from __future__ import annotations

import base64
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, unpack_tensor

from cluster.membership import StaleEpoch
from cluster.vllm import receivers, senders
from cluster.vllm.buckets import StreamDigest, learn_layout, to_wire
from cluster.vllm.collective import CollectiveError, Rendezvous
from cluster.vllm.receivers import Receiver, aborted_after
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


def test_ipc_takes_piece_after_piece_and_lets_go_of_the_buffer_once(
    made: tuple[Receiver, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = made
    seen: list[Any] = []

    def consume(ipc_handle: Any, names: Any, tensor_sizes: Any, **_: Any) -> Any:
        seen.append((ipc_handle, tensor_sizes))
        return [(name, tensor) for name, tensor in WEIGHTS if name in names]

    monkeypatch.setattr(ipc_engine, "packed_ipc_consumer", consume)
    engine.init_transfer_engine({"kind": "ipc", "epoch": 1, "packed": True})
    engine.start_weight_update()
    for name, tensor in WEIGHTS:
        piece = {
            "names": [name],
            "dtype_names": ["float32"],
            "shapes": [list(tensor.shape)],
            "tensor_sizes": [tensor.nbytes],
        }
        engine.update_weights({"epoch": 1, **piece, "handles": {"gpu": senders.to_plain(HANDLE)}})
    engine.finish_weight_update()
    assert engine.loaded_checksum == digest() and len(model.got) == len(WEIGHTS)
    assert all(handle == {"gpu": HANDLE} for handle, _ in seen), "a handle was changed on its way"


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


@pytest.mark.parametrize("fails", [False, True])
def test_the_learner_sends_by_vllms_ipc_engine_and_runs_through_all_pieces_even_if_an_engine_refuses_one(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="gpu"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)

    def produce(iterator: Any, gpu_uuid: str, buffer_size_bytes: int, **_: Any) -> Any:
        assert gpu_uuid == "gpu" and buffer_size_bytes == max(t.nbytes for _, t in WEIGHTS), (
            "the largest tensor must fit"
        )
        for name, tensor in iterator:
            yield PackedIpcChunk([name], [list(tensor.shape)], ["float32"], [tensor.nbytes], {gpu_uuid: HANDLE})

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", produce)
    handed: list[Any] = []

    def hand_out(piece: Any) -> None:
        handed.append(piece["names"])
        if fails:
            raise RuntimeError("an engine is gone")

    gathered = iter(WEIGHTS)
    layout = learn_layout(WEIGHTS)
    if fails:
        with pytest.raises(CollectiveError, match="an engine is gone"):
            senders.IpcSender(0, hand_out).send(gathered, layout, 16, 5.0)
        assert len(handed) == 1
    else:
        sent = senders.IpcSender(0, hand_out).send(gathered, layout, 16, 5.0)
        assert sent.checksum == digest() and len(handed) == len(WEIGHTS)
    assert next(gathered, None) is None, "a rank left the pass"


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
