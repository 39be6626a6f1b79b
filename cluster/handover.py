"""What publishing takes in the memory of learners and engines, by the transport that carries the weights, in bytes.

Invariants: plain arithmetic, nothing is started; bounds from above, as the buffers are made by vLLM's packed transfers
(`vllm.distributed.weight_transfer.packed_tensor`) and by `cluster.vllm.collective`. What is gathered, packed and received stays with
torch's allocator, stream by stream, so all of a pass counts as there at once. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.memory import Bytes, largest_tensor
from cluster.model import ModelShape


@dataclass(frozen=True)
class Handover:
    """What one pass over all weights adds."""

    sender: Bytes
    """On the device of a learner: of the one that sends, which holds most."""
    receiver: Bytes
    """On each device of an engine."""
    stays: Bytes = field(default_factory=dict)
    """On the device of a learner, from the first publish on."""
    host: Bytes = field(default_factory=dict)
    """In the memory of the machine, of one process on either side."""


def handover(
    transport: str, shape: ModelShape, *, bucket_bytes: int, itemsize: int, ranks: int, devices: int, adapters: int = 0
) -> Handover:
    """A publish by `transport` (`auto` is none), from `ranks` learners to engines of `devices` devices and `itemsize` bytes a value.
    `adapters`: how many parameters, where adapters alone go out. Raises ValueError for an unknown transport."""
    if adapters:  # files of some MiB, gathered one by one
        return Handover({"gathered adapters": 4.0 * adapters}, {"adapters": float(itemsize * adapters)})
    tensor = itemsize * sent_tensor(shape)
    copy = {"copy in the engine's type": float(tensor if itemsize != 4 else 0)}
    whole = {"gathered tensor": 4.0 * largest_tensor(shape) if ranks > 1 else 0.0} | copy
    layer, held = itemsize * reloaded_layer(shape), 0.0
    sends: Bytes = {}
    stays: Bytes = {}
    takes: Bytes = {}
    if transport == "ipc":
        # One buffer, as large as the largest piece, for all passes; an engine copies each piece out of it before it says that it has it.
        piece, held = max(bucket_bytes, tensor), layer
        takes, stays = {"copy of a piece": float(piece)}, {"buffer for IPC": float(piece)}
    elif transport == "nccl":
        # A piece ends with the tensor that makes it larger than a bucket. Of both slots: its tensors and the two of them joined.
        piece, held = bucket_bytes + tensor, layer
        sends, takes = {"pieces to send": 4.0 * piece}, {"pieces received": 2.0 * piece}
        whole.pop("copy in the engine's type")  # those are the tensors of a piece
    elif transport not in ("shm", "relay", "gloo"):  # with these, what waits to be loaded lies in the machine's memory
        raise ValueError(f"no transport {transport!r}")
    # A layer is made anew once all of its tensors are there, which wait until then: one alone, or the parts of a stack.
    takes |= {"layer made anew": max(tensor / devices, held + layer / devices)}
    host = {"buckets": 2.0 * max(bucket_bytes, tensor)} if transport == "gloo" else {}
    return Handover({k: v for k, v in (whole | sends).items() if v}, takes, stays, host)


def sent_tensor(shape: ModelShape) -> int:
    """Entries of the largest tensor that is published: a table of the vocabulary or a matrix of a layer, experts one by one."""
    inner = shape.inner // shape.experts_per_token if shape.experts_per_token else shape.inner
    return max(shape.vocab * shape.hidden, inner * shape.hidden, shape.query * shape.hidden)


def reloaded_layer(shape: ModelShape) -> int:
    """Entries of the largest layer that an engine makes of several tensors: gate and up, queries, keys and values, or all experts."""
    if shape.experts_per_token:
        return shape.layer_parameters
    return shape.hidden * max(2 * shape.inner, shape.query + 2 * shape.key)
