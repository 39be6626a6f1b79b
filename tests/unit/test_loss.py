"""The policy loss and the chunked log-probs, against hand-computed values and autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from agents.learning.config import LearnerConfig, LossConfig
from agents.learning.learner import Learner
from agents.learning.logprobs import token_logprobs
from agents.learning.loss import Tokens, clipped, k3
from agents.learning.model import PolicyModel
from agents.learning.packing import pack
from tests.learning_tools import random_samples, tiny_qwen3
from tests.reference_loop import reference_logprobs


def one(
    advantage: float, rho: float = 1.0, ratio: float = 1.0, config: LossConfig | None = None, **aux: float
) -> tuple[float, float, dict[str, float]]:
    """Loss of one token and its derivative by log pi_theta, for rho = pi_theta/pi_old and ratio = pi_old/pi_rollout."""
    old = -2.0
    logprob = torch.tensor([old + math.log(rho)], requires_grad=True)
    arrays = {name: torch.tensor([value]) for name, value in aux.items()}
    tokens = Tokens(
        torch.tensor([old - math.log(ratio)]),
        torch.tensor([advantage]),
        torch.zeros(1, dtype=torch.long),
        {"prox_logprobs": torch.tensor([old]), **arrays},
    )
    loss, stats = clipped(logprob, torch.tensor([1.0]), tokens, config or LossConfig(mismatch="none"))
    loss.sum().backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item(), {k: v.item() for k, v in stats.items()}


@pytest.mark.parametrize(
    ("advantage", "rho", "loss", "grad", "clip"),
    [
        (1.0, 1.0, -1.0, -1.0, 0),
        (1.0, 1.5, -1.28, 0.0, 1),  # clip-higher
        (-1.0, 1.5, 1.5, 1.5, 0),
        (-1.0, 0.5, 0.8, 0.0, 1),
        (1.0, 0.5, -0.5, -0.5, 0),
        (0.0, 1.7, 0.0, 0.0, 0),
    ],
)
def test_clipping_by_hand(advantage: float, rho: float, loss: float, grad: float, clip: int) -> None:
    found, slope, stats = one(advantage, rho)
    assert (found, slope) == (pytest.approx(loss), pytest.approx(grad))
    assert stats["clip/share"] == clip


def test_dual_clip_bounds_the_pull_away() -> None:
    assert one(-1.0, 4.0, config=LossConfig(mismatch="none", dual_clip=3.0))[:2] == (pytest.approx(3.0), 0.0)


@pytest.mark.parametrize(
    ("mismatch", "ratio", "weight", "cut"),
    [
        ("none", 3.0, 1.0, 0),
        ("tis", 1.5, 1.5, 0),
        ("tis", 3.0, 2.0, 1),
        ("tis", 0.01, 0.01, 0),
        ("icepop", 1.9, 1.9, 0),
        ("icepop", 2.1, 0.0, 1),
        ("icepop", 0.4, 0.0, 1),
    ],
)
def test_mismatch_weights(mismatch: str, ratio: float, weight: float, cut: int) -> None:
    loss, grad, stats = one(1.0, ratio=ratio, config=LossConfig(mismatch=mismatch))
    assert (loss, grad) == (pytest.approx(-weight, rel=1e-5), pytest.approx(-weight, rel=1e-5))
    assert stats["ratio"] == pytest.approx(ratio, rel=1e-5)
    assert stats["mismatch/cut"] == cut
    assert stats["mismatch/kl_k3"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)


def test_kl_to_the_reference_by_hand() -> None:
    # log pi_theta = -2, log pi_ref = -2.5: k3 = e^-0.5 - 1 + 0.5, slope 1 - e^-0.5
    loss, grad, stats = one(0.0, config=LossConfig(mismatch="none", kl_coef=0.1), ref_logprobs=-2.5)
    assert stats["kl_ref"] == pytest.approx(math.exp(-0.5) - 0.5)
    assert (loss, grad) == (pytest.approx(0.1 * (math.exp(-0.5) - 0.5)), pytest.approx(0.1 * (1 - math.exp(-0.5))))
    with pytest.raises(ValueError, match="ref_logprobs"):
        one(0.0, config=LossConfig(kl_coef=0.1))


def test_rollout_as_proximal_policy() -> None:
    loss, _, stats = one(1.0, rho=1.0, ratio=1.2, config=LossConfig(old="rollout"))
    assert loss == pytest.approx(-1.2) and stats["ratio"] == pytest.approx(1.2)


@given(st.floats(-15, 15))
def test_k3_is_never_negative(log_ratio: float) -> None:
    assert k3(torch.tensor(log_ratio, dtype=torch.float64)).item() >= 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), mismatch=st.sampled_from(["tis", "icepop", "none"]))
def test_only_trained_tokens_have_a_gradient(seed: int, mismatch: str) -> None:
    """Gradient at the logits: exactly 0 at every position that predicts an observation, and where the advantage is 0."""
    generator = torch.Generator().manual_seed(seed)
    sample = random_samples(1, seed)[0]
    batch = pack([sample], 4096)[0]
    logits = torch.randn(batch.token_ids.numel(), 61, generator=generator, requires_grad=True)
    advantages = batch.advantages * (torch.rand(len(batch.target), generator=generator) < 0.5)
    eye = torch.eye(61)
    logprobs, entropies = token_logprobs(
        logits.index_select(0, batch.source), eye, None, batch.target, batch.temperatures
    )
    tokens = Tokens(batch.rollout_logprobs, advantages, batch.sample_index)
    loss, _ = clipped(logprobs, entropies, tokens, LossConfig(mismatch=mismatch))
    loss.sum().backward()
    assert logits.grad is not None
    # One sample begins at position 0, and each position predicts the next token: this is read from the mask alone.
    predicting = np.flatnonzero(sample.mask) - 1
    pushed = torch.zeros(len(logits), dtype=torch.bool)
    pushed[torch.from_numpy(predicting)] = advantages != 0
    assert not logits.grad[~pushed].any()
    if mismatch == "none":
        assert logits.grad[pushed].any(1).all()


def test_logprobs_are_exact_for_any_chunk() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target, temperature = torch.randint(0, 7, (11,)), torch.rand(11, dtype=torch.float64) + 0.5
    table = torch.log_softmax((hidden @ weight.T + bias) / temperature[:, None], -1)
    for elements in (1, 21, 1 << 20):  # one token a chunk, three, all
        logprobs, entropies = token_logprobs(hidden, weight, bias, target, temperature, elements)
        torch.testing.assert_close(logprobs, table.gather(1, target[:, None])[:, 0])
        torch.testing.assert_close(entropies, -(table.exp() * table).sum(1))
        assert torch.autograd.gradcheck(
            lambda h, w, b, n=elements: token_logprobs(h, w, b, target, temperature, n), (hidden, weight, bias)
        )


@pytest.mark.parametrize(
    "elements", [80, 1 << 20]
)  # two tokens a chunk, computed anew; all at once, probabilities kept
def test_under_autocast_all_products_are_in_its_type_and_gradients_are_those_of_float32_but_for_rounding(
    elements: int,
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(12, 16), torch.randn(40, 16), torch.randn(40)
    target, temperature = torch.randint(0, 40, (12,)), torch.full((12,), 0.7)
    found = []
    for autocast in (False, True):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with Products() as products:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logprobs, entropies = token_logprobs(*inputs, target, temperature, elements)
            (logprobs.sum() + 0.1 * entropies.sum()).backward()
        assert set(products.dtypes) == {torch.bfloat16 if autocast else torch.float32}
        assert products.casts == (autocast and 1), "the head is cast anew with each chunk, or each pass"
        assert logprobs.dtype == entropies.dtype == torch.float32
        assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)
        found.append([logprobs.detach(), entropies.detach(), *(x.grad for x in inputs)])
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


class Products(TorchDispatchMode):
    """Types of what is multiplied, and how often a matrix of 40 rows is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.dtypes += [x.dtype for x in args if isinstance(x, torch.Tensor)]
        if "_to_copy" in str(func) and out.shape == (40, 16) and out.dtype is torch.bfloat16:
            self.casts += 1
        return out


def test_large_vocabularies_stay_in_chunks() -> None:
    """Peak of what autograd keeps does not hold a [tokens, vocab] block."""
    kept: list[int] = []
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        logprobs, _ = token_logprobs(hidden, weight, None, torch.zeros(64, dtype=torch.long), torch.ones(64), 8000)
    logprobs.sum().backward()
    assert max(kept) < 64 * 1000


def test_temperature_is_the_samplers() -> None:
    """A cooler sample is scored under the cooler distribution."""
    model = PolicyModel(tiny_qwen3())
    warm, cool = (random_samples(1, temperature=t)[0] for t in (1.0, 0.5))
    for sample in (warm, cool):
        expected = reference_logprobs(tiny_qwen3(), sample)[0][torch.tensor(sample.mask[1:]) == 1]
        torch.testing.assert_close(model(pack([sample], 4096)[0])[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*(model(pack([s], 4096)[0])[0] for s in (warm, cool)))


def test_bad_loss_settings_are_one_clear_line() -> None:
    for config, words in (
        (LossConfig(mismatch="clip"), "loss.mismatch 'clip' is unknown; one of tis, icepop, none"),
        (LossConfig(name="ppo"), "loss.name 'ppo' is unknown; one of clipped"),
        (LossConfig(icepop_low=3.0), "icepop window"),
    ):
        with pytest.raises(ValueError, match=words):
            Learner(tiny_qwen3(), LearnerConfig(loss=config))
