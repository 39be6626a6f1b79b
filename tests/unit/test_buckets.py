"""Weights cut into buckets, the digest of a stream, handles as plain values, and segments that land on another node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.vllm.buckets import StreamDigest, cut, from_wire, largest, learn_layout, pack, to_wire, unpack
from cluster.vllm.ipc import from_plain, to_plain
from cluster.vllm.relay import Landing, pieces
from cluster.vllm.segment import SegmentError, SegmentReader, ShmWriter, TensorSpec

MIXED = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.arange(5).to(torch.bfloat16),
    "nothing": torch.empty(0, 4),
    "one": torch.tensor(2.5),
    "wide": torch.randn(7, 9, generator=torch.Generator().manual_seed(0)),
}


def layout(*sizes: int) -> dict[str, TensorSpec]:
    return {f"w{i}": TensorSpec("U8", (size,)) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "cuts"),
    [
        ((), []),
        ((32, 32), [2]),  # fits exactly
        ((32, 33), [1, 1]),
        ((16, 200, 16), [1, 1, 1]),  # larger than a bucket: alone
        ((200,), [1]),
        ((64, 64), [1, 1]),
        ((0, 0), [2]),
        ((60, 0, 8), [2, 1]),  # every tensor starts at a multiple of 16
    ],
)
def test_where_buckets_of_64_bytes_are_cut(sizes: tuple[int, ...], cuts: list[int]) -> None:
    assert [len(bucket.names) for bucket in cut(layout(*sizes), 64)] == cuts


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 200), max_size=12), st.integers(1, 256))
def test_every_weight_lies_in_one_bucket_in_order_and_none_is_too_large(sizes: list[int], limit: int) -> None:
    wanted = layout(*sizes)
    buckets = cut(wanted, limit)
    assert [name for bucket in buckets for name in bucket.names] == list(wanted)
    for bucket in buckets:
        assert bucket.nbytes <= limit or len(bucket.names) == 1
        ends = [offset + spec.nbytes for offset, spec in zip(bucket.offsets, bucket.specs, strict=True)]
        assert all(end <= begin for end, begin in zip(ends, bucket.offsets[1:], strict=False)), "two overlap"
    assert largest(buckets) == max((bucket.nbytes for bucket in buckets), default=0)


@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_what_was_packed_unpacks_the_same_in_any_type(limit: int) -> None:
    wanted, weights, found = learn_layout(MIXED.items()), iter(MIXED.items()), {}
    assert from_wire(to_wire(wanted)) == wanted and list(from_wire(to_wire(wanted))) == list(wanted)
    for bucket in cut(wanted, limit):
        found.update(unpack(bucket, pack(bucket, weights)))
    assert list(found) == list(MIXED)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in MIXED.items())


@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_a_dense_bucket_has_no_gap_and_every_weight_in_it_begins_where_its_type_may(limit: int) -> None:
    wanted, weights, found = learn_layout(MIXED.items()), iter(MIXED.items()), {}
    buckets = cut(wanted, limit, dense=True)
    buffer = torch.empty(largest(buckets), dtype=torch.uint8)
    for bucket in buckets:
        packed = pack(bucket, weights, buffer)
        assert packed.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        # As vLLM takes it apart: by sizes alone.
        parts = packed.split([spec.nbytes for spec in bucket.specs])
        for name, spec, part in zip(bucket.names, bucket.specs, parts, strict=True):
            found[name] = part.view(MIXED[name].dtype).view(spec.shape).clone()
    assert list(found) == list(MIXED) and all(torch.equal(found[name], tensor) for name, tensor in MIXED.items())
    assert len(buckets) < len(MIXED) or limit == 1


def test_weights_that_were_not_announced_are_refused_by_name() -> None:
    (bucket,) = cut(learn_layout(MIXED.items()), 10_000)
    with pytest.raises(SegmentError, match="gathered 'one'"):
        pack(bucket, iter([("one", MIXED["one"])]))
    with pytest.raises(SegmentError, match="end before 'half'"):
        pack(bucket, iter([("flag", MIXED["flag"])]))
    with pytest.raises(SegmentError, match="not a layout"):
        from_wire({"names": ["a"], "dtypes": [], "shapes": []})


def digest(weights: dict[str, torch.Tensor]) -> str:
    found = StreamDigest()
    for name, tensor in weights.items():
        found.add(name, tensor)
    return found.hexdigest()


def test_a_digest_knows_every_byte_its_place_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(MIXED)
    assert digest({name: tensor.clone() for name, tensor in MIXED.items()}) == whole
    strided = MIXED["wide"].t().contiguous().t()
    assert not strided.is_contiguous() and digest({**MIXED, "wide": strided}) == whole
    swapped, flipped = MIXED["wide"].clone(), MIXED["wide"].clone()
    swapped[[0, 1]] = MIXED["wide"][[1, 0]]
    flipped.view(torch.uint8)[3, 5] ^= 1
    others = [
        {**MIXED, "wide": swapped},
        {**MIXED, "wide": flipped},
        {**MIXED, "wide": MIXED["wide"].view(9, 7)},
        {name: MIXED[name] for name in reversed(MIXED)},
        {("none" if name == "one" else name): tensor for name, tensor in MIXED.items()},
        {name: tensor for name, tensor in MIXED.items() if name != "nothing"},
        {},
    ]
    assert len({whole, *map(digest, others)}) == len(others) + 1
    monkeypatch.setattr("cluster.vllm.buckets._WORDS", 8)  # words that are folded at once
    big = torch.arange(32, dtype=torch.int64)
    moved = big.clone()
    moved[[5, 13]] = big[[13, 5]]
    assert digest({"w": big}) != digest({"w": moved})
    assert digest(MIXED) == whole, "a digest depends on how many words are folded at once"


HANDLE = (
    torch.Tensor, torch.Size([64]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"memory", 64, 0, False, b"count", 0, b"event", True,
)  # fmt: skip


def test_a_cuda_handle_travels_as_plain_values() -> None:
    plain = to_plain(HANDLE)
    assert all(value is None or isinstance(value, (bool, int, bytes, list)) for value in plain)
    assert from_plain(plain) == HANDLE
    with pytest.raises(ValueError, match="not one of a packed buffer"):
        to_plain((*HANDLE[:5], torch.float32, *HANDLE[6:]))
    with pytest.raises(ValueError, match="unknown torch"):
        to_plain((*HANDLE[:7], object(), *HANDLE[8:]))


def test_a_segment_lands_whole_on_another_node_or_not_at_all(tmp_path: Path) -> None:
    writer = ShmWriter(tmp_path / "here")
    there = tmp_path / "there"
    there.mkdir()
    landing = Landing(there)
    manifests = [writer.write([("w", torch.full((50,), float(i)))]) for i in range(2)]
    landed = landing.land(manifests[0], pieces(manifests[0], 100))
    assert Path(landed.path).parent == there and landed.checksum == manifests[0].checksum
    assert torch.equal(dict(SegmentReader(landed).tensors())["w"], torch.zeros(50))
    assert landing.land(manifests[0], iter(())) == landed, "the second engine of a node fetched it again"

    torn = [np.array(part) for part in pieces(manifests[1], 100)]
    torn[1][3] ^= 1
    for parts in (torn, torn[:-1]):
        with pytest.raises(SegmentError, match="landed at"):
            landing.land(manifests[1], iter(parts))
    assert [Path(landed.path)] == list(there.iterdir()), "something half-written was left"

    for i in range(3):
        again = writer.write([("w", torch.full((50,), 10.0 + i))])
        landing.land(again, pieces(again, 64))
    assert len(list(there.iterdir())) == 2
