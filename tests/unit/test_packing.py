"""Packing: every trained token once, nobody sees a neighbour, and the same numbers as one at a time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.learning.model import PolicyModel
from agents.learning.packing import count_totals, loss_coefficients, pack, used_length
from agents.sharding import shard
from tests.learning_tools import random_samples, tiny_qwen3
from tests.reference_loop import reference_logprobs


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 12), seed=st.integers(0, 999), budget=st.integers(1, 200), packed=st.booleans())
def test_every_trained_token_appears_once_within_the_budget(count: int, seed: int, budget: int, packed: bool) -> None:
    samples = random_samples(count, seed)
    seen: dict[int, list[int]] = {}
    for batch in pack(samples, budget, packed=packed):
        assert batch.token_ids.numel() <= budget or len(batch.samples) == 1
        flat_ids, flat_segments = batch.token_ids.flatten(), batch.segment_ids.flatten()
        for source, target, index in zip(
            batch.source.tolist(), batch.target.tolist(), batch.sample_index.tolist(), strict=True
        ):
            position = int(batch.position_ids.flatten()[source])
            sample = samples[index]
            assert flat_ids[source] == sample.token_ids[position] and target == sample.token_ids[position + 1]
            assert batch.samples[int(flat_segments[source]) - 1] == index
            seen.setdefault(index, []).append(position + 1)
    assert seen == {i: np.flatnonzero(s.mask).tolist() for i, s in enumerate(samples)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_one_at_a_time(packed: bool, attention: str) -> None:
    samples = random_samples(7, seed=3, temperature=0.8)
    plain, model = tiny_qwen3(attention=attention), PolicyModel(tiny_qwen3(attention=attention))
    total = torch.zeros(())
    expected = {}
    for i, s in enumerate(samples):
        logprobs = reference_logprobs(plain, s)[0][torch.tensor(s.mask[1:]) == 1]
        expected[i] = logprobs.detach()
        total = total + (logprobs * torch.tensor(s.advantages[s.mask == 1])).sum()
    total.backward()
    batches = pack(samples, 100, packed=packed)
    assert 1 < len(batches) < len(samples)
    for batch in batches:
        logprobs, _ = model(batch)
        for i in batch.samples:
            torch.testing.assert_close(logprobs[batch.sample_index == i].detach(), expected[i], atol=1e-5, rtol=1e-5)
        (logprobs * batch.advantages).sum().backward()
    for p, q in zip(plain.parameters(), model.hf.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5 * max(1.0, scale), rtol=1e-5)


def test_nothing_behind_the_last_trained_token_is_computed() -> None:
    sample = random_samples(1, lengths=(30, 30))[0]
    assert used_length(sample) == np.flatnonzero(sample.mask)[-1]
    assert pack([sample], 4096)[0].token_ids.shape == (1, used_length(sample))


def test_aux_travels_with_its_tokens() -> None:
    samples = random_samples(3, ref_logprobs=1.0)
    batch = pack(samples, 4096)[0]
    for i, s in enumerate(samples):
        np.testing.assert_array_equal(
            batch.aux["ref_logprobs"][batch.sample_index == i].numpy(), s.aux["ref_logprobs"][s.mask == 1].astype("f4")
        )


def test_aggregations_by_hand() -> None:
    samples = random_samples(2, lengths=(10, 30))
    n, m = (int(s.mask.sum()) for s in samples)
    totals = count_totals(samples)
    token = loss_coefficients(samples, "token_mean", 100, totals)
    assert token[0][1] == pytest.approx(1 / (n + m)) and token[0][0] == 0
    sequence = loss_coefficients(samples, "sequence_mean", 100, totals)
    assert (sequence[0].sum(), sequence[1].sum()) == (pytest.approx(0.5), pytest.approx(0.5))
    constant = loss_coefficients(samples, "constant", 100, totals)
    assert constant[1].sum() == pytest.approx(m / 200)


@given(count=st.integers(0, 12), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_shards_are_a_partition(count: int, world: int, seed: int) -> None:
    samples = random_samples(count, seed)
    parts = [shard(samples, rank, world) for rank in range(world)]
    assert sorted(s.rollout_id for part in parts for s in part) == sorted(s.rollout_id for s in samples)
    loads = [sum(s.num_tokens for s in part) for part in parts]
    assert max(loads) - min(loads) <= 40  # the longest sample


def test_sharding_needs_no_torch() -> None:
    code = "import sys, agents.sharding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
