"""Packing: every trained token once, nobody sees a neighbour, and the same numbers as one at a time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from agents.learning.config import LearnerConfig, LossConfig
from agents.learning.learner import Learner
from agents.learning.loss import Tokens, clipped
from agents.learning.model import BLOCK, ModelError, PolicyModel, block_mask
from agents.learning.packing import count_totals, dummy, loss_coefficients, pack, used_length
from agents.sharding import shard
from agents.types import Sample
from tests.learning_tools import VOCAB, random_samples, step_samples, tiny_qwen3
from tests.reference_loop import reference_logprobs

LAYOUTS = ("padded", "packed", "shared")


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 12), episodes=st.integers(0, 2), seed=st.integers(0, 999), budget=st.integers(1, 200),
    layout=st.sampled_from(LAYOUTS), cost=st.sampled_from([0.0, 0.01]),
)  # fmt: skip
def test_every_trained_token_appears_once_within_the_budget(
    count: int, episodes: int, seed: int, budget: int, layout: str, cost: float
) -> None:
    samples = [*random_samples(count, seed), *step_samples(episodes, seed, 2, 3, 8, 4, 6, vocab=3)]
    seen: dict[int, list[int]] = {}
    for batch in pack(samples, budget, layout=layout, attention_cost=cost):
        longest = max(used_length(samples[i]) for i in batch.samples)
        assert batch.token_ids.numel() <= max(budget, longest)
        columns, mask = batch.token_ids.shape[1], batch.attention_mask()[:, 0]
        for source, target, index in zip(
            batch.source.tolist(), batch.target.tolist(), batch.sample_index.tolist(), strict=True
        ):
            sample, (row, column) = samples[index], divmod(source, columns)
            sees = mask[row, column].nonzero()[:, 0]  # the sample's own tokens before the trained one, and nothing else
            position = len(sees)
            assert batch.token_ids[row, sees].tolist() == sample.token_ids[:position].tolist()
            assert batch.position_ids[row, sees].tolist() == list(range(position))
            assert target == sample.token_ids[position]
            seen.setdefault(index, []).append(position)
    assert seen == {i: np.flatnonzero(s.mask).tolist() for i, s in enumerate(samples)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_one_at_a_time(layout: str, attention: str) -> None:
    samples = [*random_samples(4, seed=3, temperature=0.8), *step_samples(1, 3, 2, 3, 12, 8, 8)]
    plain, model = tiny_qwen3(attention=attention), PolicyModel(tiny_qwen3(attention=attention))
    total = torch.zeros(())
    expected = {}
    for i, s in enumerate(samples):
        logprobs = reference_logprobs(plain, s)[0][torch.tensor(s.mask[1:]) == 1]
        expected[i] = logprobs.detach()
        total = total + (logprobs * torch.tensor(s.advantages[s.mask == 1])).sum()
    total.backward()
    batches = pack(samples, 100, layout=layout)
    assert 1 < len(batches) < len(samples) and (sum(b.shared_tokens for b in batches) > 0) == (layout == "shared")
    for batch in batches:
        logprobs, _ = model(batch)
        for i in batch.samples:
            torch.testing.assert_close(logprobs[batch.sample_index == i].detach(), expected[i], atol=1e-5, rtol=1e-5)
        (logprobs * batch.advantages).sum().backward()
    for p, q in zip(plain.parameters(), model.hf.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5 * max(1.0, scale), rtol=1e-5)


MODEL = PolicyModel(tiny_qwen3().double())


@settings(max_examples=8, deadline=None)
@given(
    episodes=st.integers(1, 2), steps=st.integers(1, 3), k=st.integers(1, 4), lengths=st.tuples(*[st.integers(1, 9)] * 3),
    vocab=st.sampled_from([2, VOCAB]), budget=st.integers(20, 300), seed=st.integers(0, 999),
)  # fmt: skip
def test_sharing_changes_no_gradient(
    episodes: int, steps: int, k: int, lengths: tuple[int, int, int], vocab: int, budget: int, seed: int
) -> None:
    """With forks anywhere (two words make candidates that begin alike, or are alike), against rows of their own, in float64."""
    samples = step_samples(episodes, seed, steps, k, *lengths, vocab=vocab)
    coefficients = loss_coefficients(samples, "sequence_mean", 100, count_totals(samples))
    config = LossConfig(kl_coef=0.1, entropy_coef=0.01)
    found = []
    for layout in ("padded", "shared"):
        MODEL.zero_grad()
        parts = []
        for b in pack(samples, budget, layout=layout, coefficients=coefficients):
            logprobs, entropies = MODEL(b)
            tokens = Tokens(b.rollout_logprobs, b.advantages, b.sample_index, b.aux)
            loss = clipped(logprobs, entropies, tokens, config)[0] * b.coefficients
            loss.sum().backward()
            parts += [torch.stack([b.sample_index, b.target, b.versions, loss.detach()], dim=1)]
        rows = torch.cat(parts)
        found += [(rows[rows[:, 0].argsort(stable=True)], torch.cat([p.grad.flatten() for p in MODEL.parameters()]))]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


def test_a_step_with_sharing_is_the_step_without() -> None:
    """Through the learner, with a group that cannot learn: the same metrics, and tokens saved."""
    samples = [
        replace(s, advantages=s.advantages * (not s.group_id.endswith("#1")))
        for s in step_samples(2, 0, 3, 5, 24, 8, 24)
    ]
    found = {}
    for layout in ("padded", "auto"):
        config = LearnerConfig(layout=layout, adam_eps=1e-5)
        learner = Learner(tiny_qwen3(), config)
        metrics = [learner.step(samples), learner.step(samples)][1]
        found[layout] = {k: v for k, v in metrics.items() if not k.startswith("time/") and not k.endswith("_per_s")}
    saved, computed = (found["auto"].pop(f"learner/{n}_tokens") for n in ("shared", "computed"))
    assert found["padded"].pop("learner/shared_tokens") == 0
    assert saved > 2 * computed and found["padded"].pop("learner/computed_tokens") >= saved
    assert found["auto"] == pytest.approx(found["padded"], rel=1e-3, abs=1e-6)


def test_samples_join_where_it_pays_and_stay_as_they_were_elsewhere() -> None:
    def rows(samples: list[Sample], layout: str = "shared") -> list[list[int]]:
        return [sorted(b.samples) for b in pack(samples, 500, layout=layout, attention_cost=1 / 600)]

    alone = random_samples(4)
    # Long rollouts of one short prompt: the prompt saved is less than what the square of a common row would cost.
    long = step_samples(1, steps=1, k=2, prompt=10, candidate=200)
    for apart in (alone, long):
        assert rows(apart) == rows(apart, "padded")
    tree = step_samples(1, steps=2, k=4, prompt=100, candidate=10, observation=20)
    assert rows([*tree, *alone]) == [list(range(8)), [8, 9, 10, 11]]  # those alone need no mask, and get none


def test_layouts_a_model_cannot_have() -> None:
    model = PolicyModel(tiny_qwen3())
    assert model.layout("auto") == "shared" and model.layout("packed") == "packed"
    model.hf.config.layer_types = ["full_attention", "sliding_attention"]
    assert model.layout("auto") == "padded"
    with pytest.raises(ModelError, match=r"learner\.layout=auto"):
        model.layout("shared")


def test_flex_attention_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out on CPU, forward only: torch has no backward for it there, and its kernels are for GPUs."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def written_out(query: Any, key: Any, value: Any, training: bool = False, **kwargs: Any) -> Any:
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", written_out)
    samples = step_samples(1, steps=2, k=3, prompt=80, candidate=20, observation=30)
    model, flex = PolicyModel(tiny_qwen3()), PolicyModel(tiny_qwen3(attention="flex_attention"))
    assert flex.layout("auto") == "shared" and flex.attention_cost == 0
    batches = pack(samples, 500, layout="shared", attention_cost=flex.attention_cost)
    assert [b.packed for b in batches] == [True] and batches[0].token_ids.shape[1] > 128  # more than one block
    with torch.no_grad():
        torch.testing.assert_close(flex(batches[0]), model(batches[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("budget", [128, 900])
def test_blocks_are_those_of_the_whole_mask_and_the_mask_is_never_made(layout: str, budget: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    samples = step_samples(2, steps=3, k=3, prompt=60, candidate=20, observation=30)
    samples += random_samples(6, lengths=(10, 300))
    for batch in [*pack(samples, budget, layout=layout), dummy()]:
        with Largest() as made:
            found = block_mask(batch)
        rows, columns = batch.token_ids.shape
        assert made.elements <= max(rows * (columns + BLOCK), rows * (columns // BLOCK + 2) ** 2)
        wanted = create_block_mask(found.mask_mod, rows, None, columns, columns, device="cpu")
        assert found.shape == wanted.shape and found.BLOCK_SIZE == wanted.BLOCK_SIZE
        for kind in ("kv", "full_kv", "q", "full_q"):
            for table in ("num_blocks", "indices"):
                name = f"{kind}_{table}"
                ours, theirs = getattr(found, name), getattr(wanted, name)
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


class Largest(TorchDispatchMode):
    """Most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


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


@settings(deadline=None)
@given(count=st.integers(0, 12), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_shards_are_a_partition(count: int, world: int, seed: int) -> None:
    samples = random_samples(count, seed)
    parts = [shard(samples, rank, world) for rank in range(world)]
    assert sorted(s.rollout_id for part in parts for s in part) == sorted(s.rollout_id for s in samples)
    loads = [sum(s.num_tokens for s in part) for part in parts]
    assert max(loads) - min(loads) <= 40  # the longest sample


@given(count=st.integers(0, 6), world=st.integers(1, 9), shared=st.booleans())
@settings(deadline=None, max_examples=30)
def test_steps_are_cut_into_a_partition_whatever_the_ranks(count: int, world: int, shared: bool) -> None:
    samples = step_samples(count, steps=2, k=3, prompt=20, candidate=6, observation=8)
    parts = [shard(samples, rank, world, shared=shared) for rank in range(world)]
    assert Counter(s.rollout_id for part in parts for s in part) == Counter(s.rollout_id for s in samples)
    assert all(parts) or len(samples) < world


def test_an_episodes_steps_stay_on_one_rank_where_prefixes_are_computed_once() -> None:
    """Apart they could not share. Rollouts that have little in common are spread, and so is everything where nothing is shared."""
    steps = step_samples(6, steps=3, k=4, prompt=60, candidate=10, observation=40)
    long = [replace(s, group_id="long", prefix_id="long", prefix_len=2) for s in random_samples(6, lengths=(30, 40))]
    ids = [{s.prefix_id for s in shard([*steps, *long], rank, 2, shared=True)} for rank in range(2)]
    assert ids[0] & ids[1] == {"long"} and len(ids[0] | ids[1]) == 7
    apart = [shard(steps, rank, 2) for rank in range(2)]
    loads = [sum(s.num_tokens for s in part) for part in apart]
    assert abs(loads[0] - loads[1]) <= max(s.num_tokens for s in steps), "the padded layout computes all tokens"


@pytest.mark.parametrize(("groups", "world"), [(4, 8), (1, 2), (3, 4)])
def test_groups_are_cut_where_ranks_would_stay_idle(groups: int, world: int) -> None:
    """Attempts at one task, 60 % of each the prompt."""
    (a,) = random_samples(1, lengths=(100, 100))
    mask = (np.arange(100) >= 60).astype(np.int8)
    a = replace(a, mask=mask, logprobs=-1.0 * mask, advantages=1.0 * mask, versions=mask - 1, aux={})
    samples = [
        replace(a, group_id=f"g{g}", rollout_id=f"g{g}/{i}", prefix_id=f"g{g}", prefix_len=60)
        for g in range(groups) for i in range(16)
    ]  # fmt: skip
    for shared in (False, True):
        sizes = [len(shard(samples, rank, world, shared=shared)) for rank in range(world)]
        assert sum(sizes) == 16 * groups and max(sizes) <= 16 * groups / world + 4


def test_sharding_needs_no_torch() -> None:
    code = "import sys, agents.sharding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
