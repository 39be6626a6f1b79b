"""PPO: advantages from a critic, its loss, what it trains and when, and that a policy gets better by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import AdvantageConfig, to_samples
from agents.learning.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from agents.learning.config import CriticConfig, LearnerConfig, LoraConfig, LossConfig, learning_rate
from agents.learning.critic import value_loss
from agents.learning.gae import gae, with_advantages
from agents.learning.learner import Learner
from agents.learning.scorer import score_values
from agents.types import Group, Member, RecordError, Sample, Status, Task, Trajectory, Verdict
from cluster.config import load_config
from cluster.errors import UserError
from cluster.model import ModelShape
from cluster.preflight import check_settings
from cluster.schema import RunConfig
from cluster.sizes import saved_gib, shares
from tests.builders import a_group
from tests.learning_tools import ppo_learner, random_samples, rewarded, tiny_qwen3

CPU = torch.device("cpu")
CRITIC = CriticConfig(kind="head", lr=1e-2, gamma=0.9, lam=0.8)
SMALL = LearnerConfig(max_tokens_per_microbatch=100, adam_eps=1e-5, lr=1e-3, critic=CRITIC)
KINDS = ("head", "model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    own = {f"critic.{n}": w for n, w in learner.critic.trained.weights().items()}
    return {n: w.clone() for n, w in {**learner.trained.weights(), **own}.items()}


# ------------------------------------------------------------------------------------------------------- numbers


def test_gae_by_hand() -> None:
    """delta = (0 + 0.9 * 0.25 - 0.5, 1 - 0.25) = (-0.275, 0.75); A_1 = -0.275 + 0.72 * 0.75."""
    advantages, returns = gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), 0.9, 0.8)
    assert advantages == pytest.approx([0.265, 0.75]) and returns == pytest.approx([0.765, 1.0])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_the_sum_it_stands_for(seed: int, count: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    r, v = rng.normal(size=count), rng.normal(size=count)
    after = [*v[1:], 0.0]
    delta = [r[k] + gamma * after[k] - v[k] for k in range(count)]
    wanted = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, count)) for k in range(count)]
    advantages, returns = gae(r, v, gamma, lam)
    assert advantages == pytest.approx(wanted, abs=1e-9) and returns == pytest.approx(advantages + v)
    assert gae(r, v, 1.0, 1.0)[0] == pytest.approx([r[k:].sum() - v[k] for k in range(count)])


def test_observations_are_no_steps_and_whitening_is_over_trained_tokens() -> None:
    """A sample with observations between its turns has the advantages of one without."""
    config = replace(SMALL, critic=replace(CRITIC, whiten=False))
    [whole] = rewarded(1, seed=3)
    everywhere = np.arange(whole.num_tokens) * 0.1  # also where nothing is trained
    whole = replace(whole, aux={**whole.aux, "values": everywhere})
    keep = (whole.mask == 1) | (np.arange(whole.num_tokens) == 0)
    arrays = ("token_ids", "mask", "logprobs", "advantages", "versions", "temperatures")
    bare = replace(
        whole, **{n: getattr(whole, n)[keep] for n in arrays}, aux={n: a[keep] for n, a in whole.aux.items()}
    )
    assert bare.num_tokens < whole.num_tokens
    (one,), (other,) = with_advantages([whole], config, CPU)[0], with_advantages([bare], config, CPU)[0]
    assert one.advantages[whole.mask == 1] == pytest.approx(other.advantages[bare.mask == 1])
    assert not one.advantages[whole.mask == 0].any() and not one.aux["returns"][whole.mask == 0].any()

    both = [whole, replace(bare, rollout_id="b")]
    white, metrics = with_advantages(both, SMALL, CPU)
    flat = np.concatenate([s.advantages[s.mask == 1] for s in white])
    assert flat.mean() == pytest.approx(0, abs=1e-6) and flat.std(ddof=1) == pytest.approx(1, abs=1e-6)
    raw = np.concatenate([one.advantages[whole.mask == 1]] * 2)
    values = np.concatenate([s.aux["values"][s.mask == 1] for s in both])
    assert metrics["gae/advantage_std"] == pytest.approx(raw.std(ddof=1), rel=1e-5)
    assert metrics["value/explained_variance"] == pytest.approx(1 - raw.var() / (raw + values).var(), rel=1e-5)


def test_equal_advantages_whiten_to_zero_and_an_empty_batch_to_nothing() -> None:
    flat = [replace(s, aux={"rewards": 0.1 * s.mask, "values": 0.0 * s.mask}) for s in random_samples(3)]
    config = replace(SMALL, critic=replace(CRITIC, gamma=0.0))
    made, metrics = with_advantages(flat, config, CPU)
    assert max(abs(s.advantages).max() for s in made) < 1e-9 and metrics["value/explained_variance"] == 0.0
    assert with_advantages([], config, CPU)[0] == []


@pytest.mark.parametrize(("old", "pi_old"), [("learner", "prox_logprobs"), ("rollout", "")])
def test_kl_in_the_reward_is_charged_per_token_and_is_no_part_of_the_loss(old: str, pi_old: str) -> None:
    [sample] = rewarded(1, seed=2, ref_logprobs=1.0, prox_logprobs=1.0)
    sample = replace(sample, aux={**sample.aux, "values": 0.0 * sample.mask})
    loss = LossConfig(kl_coef=0.5, kl_in="reward", old=old)
    config = replace(SMALL, loss=loss, critic=replace(CRITIC, whiten=False, gamma=0.0))  # so an advantage is a reward
    (made,), metrics = with_advantages([sample], config, CPU)
    gap = (sample.aux[pi_old] if pi_old else sample.logprobs) - sample.aux["ref_logprobs"]
    wanted = (sample.aux["rewards"] - 0.5 * gap) * sample.mask
    assert made.advantages == pytest.approx(wanted, abs=1e-5)
    assert metrics["gae/kl_charged"] == pytest.approx((0.5 * gap)[sample.mask == 1].mean(), abs=1e-5)

    norms = []
    for kl_in in ("reward", "loss"):
        learner = ppo_learner("head", replace(SMALL, loss=replace(loss, kl_in=kl_in)))
        metrics = learner.step(rewarded(4, ref_logprobs=1.0))
        assert metrics["kl_ref"] > 0
        norms.append(metrics["loss"])
    assert norms[1] > norms[0] + 0.1


def test_value_loss_takes_the_worse_of_the_value_and_the_clipped_one() -> None:
    """Old value 0, clip 0.5. Towards the return beyond the clip: the clipped one counts, without gradient."""
    values = torch.tensor([0.3, 1.0, -1.0, 1.0], requires_grad=True)
    returns = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, clipped = value_loss(values, torch.zeros(4), returns, 0.5)
    assert loss.tolist() == pytest.approx([0.5 * 0.49, 0.5 * 0.25, 0.5 * 4.0, 0.5 * 1.0])
    assert clipped.tolist() == [False, True, False, False]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.7, 0.0, -2.0, 1.0])
    assert value_loss(values, torch.zeros(4), returns, 0.0)[0].tolist() == pytest.approx([0.245, 0.0, 2.0, 0.5])


# ------------------------------------------------------------------------------------------------- the learner


class Plain:
    """PPO the plain way: one sequence at a time, full logits, textbook formulas; two optimisers, as published."""

    def __init__(self, learner: Learner) -> None:
        self.config, self.shared = learner.config, learner.critic.shared
        self.policy, self.critic = tiny_qwen3(), tiny_qwen3(7).model
        self.head = torch.nn.Linear(32, 1)
        self.head.load_state_dict(learner.critic.model.value_head.state_dict())
        if self.shared:
            self.critic = self.policy.model
        own = list(self.head.parameters()) + ([] if self.shared else list(self.critic.parameters()))
        self.parts = [(list(self.policy.parameters()), self.config.lr), (own, self.config.critic.lr)]
        self.optimizers = [
            torch.optim.AdamW(
                [{"params": [p for p in ps if p.ndim > 1], "weight_decay": self.config.weight_decay},
                 {"params": [p for p in ps if p.ndim < 2], "weight_decay": 0.0}],
                lr=lr, betas=tuple(self.config.betas), eps=self.config.adam_eps,
            ) for ps, lr in self.parts
        ]  # fmt: skip

    def values(self, s: Sample) -> torch.Tensor:
        ids = torch.tensor(s.token_ids, dtype=torch.long)[None]
        hidden = self.critic(input_ids=ids, use_cache=False).last_hidden_state[0]
        return self.head(hidden)[:-1, 0][torch.tensor(s.mask[1:]) == 1]

    def logprobs(self, s: Sample) -> torch.Tensor:
        ids = torch.tensor(s.token_ids, dtype=torch.long)[None]
        table = torch.log_softmax(self.policy(input_ids=ids, use_cache=False).logits[0, :-1], -1)
        return table.gather(-1, ids[0, 1:, None])[:, 0][torch.tensor(s.mask[1:]) == 1]

    def step(self, samples: Sequence[Sample]) -> list[float]:
        """Value loss (mean), and both gradient norms."""
        c = self.config.critic
        with torch.no_grad():
            old = [self.values(s) for s in samples]
        made = [
            gae(s.aux["rewards"][s.mask == 1], v.numpy(), c.gamma, c.lam) for s, v in zip(samples, old, strict=True)
        ]
        everything = np.concatenate([a for a, _ in made])
        mean, std = everything.mean(), everything.std(ddof=1)
        for o in self.optimizers:
            o.zero_grad()
        total, value_total = 0.0, 0.0
        for s, (a, r), v_old in zip(samples, made, old, strict=True):
            logprobs, values, returns = self.logprobs(s), self.values(s), torch.tensor(r, dtype=torch.float32)
            advantages = torch.tensor((a - mean) / std, dtype=torch.float32)
            rho = (logprobs - logprobs.detach()).exp()  # one step per batch: pi_old is pi_theta
            near = v_old + (values - v_old).clamp(-c.clip, c.clip)
            value_total = value_total + 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
            total = total - (rho * advantages).sum()
        ((total + c.coef * value_total) / len(everything)).backward()
        norms = []
        for (ps, _), o in zip(self.parts, self.optimizers, strict=True):
            norms.append(
                float(torch.nn.utils.clip_grad_norm_([p for p in ps if p.grad is not None], self.config.grad_clip))
            )
            o.step()
        return [value_total.item() / len(everything), *norms]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "budget"), [("padded", 60), ("packed", 10_000), ("shared", 100)])
def test_steps_equal_plain_ppo_in_any_layout_and_budget(kind: str, layout: str, budget: int) -> None:
    config = replace(SMALL, layout=layout, max_tokens_per_microbatch=budget, loss=LossConfig(mismatch="none"))
    learner = ppo_learner(kind, config)
    plain = Plain(learner)
    for step in range(2):
        samples = rewarded(6, seed=step)
        wanted, found = plain.step(samples), learner.step(samples)
        names = ("value/loss", "grad_norm", "value/grad_norm")
        assert [found[n] for n in names] == pytest.approx(wanted, rel=1e-4)
    published = dict(learner.weights())
    assert not any("value_head" in name for name in published)
    for name, p in plain.policy.named_parameters():
        torch.testing.assert_close(published[name], p.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learner.critic.model.value_head.weight, plain.head.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_critic_moves_while_it_is_trained_alone(kind: str) -> None:
    learner = ppo_learner(
        kind, replace(SMALL, critic=replace(CRITIC, pretrain_steps=1, warmup_steps=2), warmup_steps=1)
    )
    seen = [weights_of(learner)]
    metrics = []
    for step in range(2):
        metrics.append(learner.step(rewarded(4, seed=step)))
        seen.append(weights_of(learner))
    moved = [{n.startswith("critic.") for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(seen)]
    assert moved == [{True}, {True, False}]
    assert [m["lr"] for m in metrics] == [0.0, 1e-3] and [m["value/lr"] for m in metrics] == pytest.approx([5e-3, 1e-2])
    assert metrics[0]["grad_norm"] == 0 and metrics[0]["value/grad_norm"] > 0
    linear = replace(learner.config, schedule="linear", warmup_steps=0, total_steps=5)
    assert [learning_rate(i, linear) for i in (0, 1, 3, 5)] == pytest.approx([0, 1e-3, 5e-4, 0])


def test_values_and_pi_old_are_those_the_batch_arrived_with() -> None:
    """Several optimiser steps a batch: values move away from the old ones, and clipping is measured from those."""
    config = replace(SMALL, minibatches=4, lr=1e-2, critic=replace(CRITIC, lr=0.1, clip=0.01))
    metrics = ppo_learner("head", config).step(rewarded(8))
    assert metrics["value/clip_share"] > 0 and metrics["clip/share"] > 0
    assert ppo_learner("head", replace(config, minibatches=1)).step(rewarded(8))["value/clip_share"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_train_nothing(kind: str) -> None:
    learner = ppo_learner(kind, SMALL)
    with torch.no_grad():
        learner.critic.model.value_head.bias.fill_(float("inf"))
    before = weights_of(learner)
    assert learner.step(rewarded(3))["skipped/nonfinite"] == 1
    assert all(torch.equal(w, before[n]) for n, w in weights_of(learner).items())


def test_a_fresh_critic_says_zero_and_scores_change_nothing() -> None:
    learner, samples = Learner(tiny_qwen3(), SMALL), rewarded(4)
    assert not any(v.any() for v in score_values(learner.model, samples))
    metrics = learner.step([])
    assert metrics["loss"] == metrics["grad_norm"] == metrics["value/grad_norm"] == 0


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("kind", "lora"), [("head", 0), ("model", 0), ("head", 2), ("model", 2)])
def test_resumed_ppo_equals_the_uninterrupted_one(tmp_path: Path, kind: str, lora: int) -> None:
    config = replace(SMALL, minibatches=2, lora=LoraConfig(rank=lora))
    straight = ppo_learner(kind, config)
    straight.step(rewarded(6))
    save_checkpoint(tmp_path / "c", straight)
    resumed = ppo_learner(kind, config)
    load_checkpoint(tmp_path / "c", resumed)
    expected, found = straight.step(rewarded(6, seed=1)), resumed.step(rewarded(6, seed=1))
    names = ("loss", "grad_norm", "value/loss", "value/grad_norm", "value/explained_variance", "value/lr")
    assert [found[n] for n in names] == [expected[n] for n in names]
    after = weights_of(resumed)
    assert all(torch.equal(w, after[n]) for n, w in weights_of(straight).items())


@pytest.mark.parametrize(("saved", "asked"), [("head", "none"), ("none", "head"), ("head", "model")])
def test_a_checkpoint_with_another_critic_is_refused_and_changes_nothing(
    tmp_path: Path, saved: str, asked: str
) -> None:
    bare = replace(SMALL, critic=CriticConfig())

    def make(kind: str) -> Learner:
        return Learner(tiny_qwen3(1), bare) if kind == "none" else ppo_learner(kind, SMALL)

    save_checkpoint(tmp_path / "c", make(saved))
    learner = make(asked)
    before = {n: w.clone() for n, w in learner.weights()}
    with pytest.raises(CheckpointError, match="critic") as caught:
        load_checkpoint(tmp_path / "c", learner)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(w, before[n]) for n, w in learner.weights())


# ---------------------------------------------------------------------------------------------------- rewards


def ppo_group(verdict: Verdict, first_turn: int = 0) -> Group:
    """One whole episode: prompt, policy turn (6), observation, policy turn (6)."""
    trajectory: Trajectory = a_group((0.0,)).members[0].trajectory
    return Group("g", Task("t", "?", ("x",)), (Member(trajectory.with_verdict(verdict), first_turn),))


def test_a_reward_stands_on_the_last_token_or_at_the_end_of_each_turn() -> None:
    group = ppo_group(Verdict(0.75, step_rewards=(0.5, 0.125)))
    [sample], stats = to_samples(group, AdvantageConfig("gae"))
    assert not sample.advantages.any() and stats.num_samples == 1 and not stats.zero_spread
    assert np.flatnonzero(sample.aux["rewards"]).tolist() == [23] and sample.aux["rewards"][23] == 0.75
    steps = AdvantageConfig("gae", step_rewards=True)
    [unjudged], _ = to_samples(ppo_group(Verdict(-1.0, status={"outcome": Status.unjudgeable})), steps)
    assert unjudged.aux["rewards"][23] == unjudged.aux["rewards"].sum() == -1.0
    [sample], _ = to_samples(group, steps)
    assert {int(i): float(sample.aux["rewards"][i]) for i in np.flatnonzero(sample.aux["rewards"])} == {
        11: 0.5,
        23: 0.125,
    }


@pytest.mark.parametrize(
    ("verdict", "first_turn", "says"),
    [
        (Verdict(1.0), 3, "candidate step"),
        (Verdict(1.0), 0, "0 for 2 turns"),
        (Verdict(1.0, step_rewards=(1.0,)), 0, "1 for 2 turns"),
    ],
)
def test_rewards_that_do_not_fit_the_turns_are_refused(verdict: Verdict, first_turn: int, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        to_samples(ppo_group(verdict, first_turn), AdvantageConfig("gae", step_rewards=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rewards": None}, "no aux 'rewards'.*advantage.name=gae"),
        ({"rewards": 1.0}, "a token outside the loss has a reward"),
        ({"loss": LossConfig(kl_coef=0.1, kl_in="reward")}, "no aux 'ref_logprobs'"),
    ],
)
def test_samples_a_critic_cannot_use_are_one_line(change: dict[str, Any], says: str) -> None:
    samples = rewarded(2)
    if "rewards" in change:
        aux = {} if change["rewards"] is None else {"rewards": np.ones(samples[1].num_tokens)}
        samples[1] = replace(samples[1], aux=aux)
    with pytest.raises(ValueError, match=says):
        ppo_learner("head", replace(SMALL, loss=change.get("loss", LossConfig()))).step(samples)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LearnerConfig(critic=CriticConfig(kind="tail")), "learner.critic.kind 'tail' is unknown"),
        (LearnerConfig(critic=CriticConfig(kind="head", gamma=1.5)), "learner.critic.gamma 1.5 is outside"),
        (LearnerConfig(critic=CriticConfig(kind="head", clip=-1.0)), "learner.critic.clip -1.0 is negative"),
        (LearnerConfig(critic=CriticConfig(pretrain_steps=1)), "there is no critic"),
        (LearnerConfig(loss=LossConfig(kl_coef=0.1, kl_in="reward")), "loss.kl_in=reward needs a critic"),
        (LearnerConfig(loss=LossConfig(kl_in="both")), "loss.kl_in 'both' is unknown"),
    ],
)
def test_settings_of_a_critic_out_of_range_are_one_line(config: LearnerConfig, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config.check()


def test_a_critic_and_its_advantage_go_together() -> None:
    for overrides in (["advantage.name=gae"], ["advantage.name=grpo", "learner.critic.kind=head"]):
        with pytest.raises(UserError, match=r"learner\.critic\.kind=.* do not go together"):
            check_settings(load_config("demo", overrides, RunConfig))
    fit = ["advantage.name=gae", "learner.critic.kind=model", "advantage.step_rewards=true"]
    check_settings(load_config("demo", fit, RunConfig))
    with pytest.raises(UserError, match=r"advantage\.step_rewards=true .* does not read shaper"):
        check_settings(load_config("demo", [*fit, "shaper.name=hapo"], RunConfig))
    for config, says in (
        (AdvantageConfig("gae", drop_zero_spread=True), "groups"),
        (AdvantageConfig(step_rewards=True), "for gae"),
    ):
        with pytest.raises(ValueError, match=says):
            config.check()
    with pytest.raises(ValueError, match="needs value model of its own"):
        Learner(tiny_qwen3(), replace(SMALL, critic=CriticConfig(kind="model")))
    with pytest.raises(ValueError, match="only a critic turns into advantages"):
        Learner(tiny_qwen3(), replace(SMALL, critic=CriticConfig())).step(rewarded(2))


def test_a_value_model_is_counted_in_memory_and_on_disk() -> None:
    shape = ModelShape("qwen2", 1 << 30, 64, 0)
    sizes = {
        kind: load_config("search_r1_3b_ppo", [f"learner.critic.kind={kind}"], RunConfig) for kind in ("head", "model")
    }
    learners = {kind: shares(config, shape)[1].parts_gib for kind, config in sizes.items()}
    trained = {"weights": 4 / 6, "gradients": 4 / 6, "moments": 8 / 6, "reference": 4 / 6}
    for kind, value_model in (("head", {}), ("model", {"value model": 16 / 6})):
        held = {name: learners[kind][name] for name in (trained | value_model)}
        assert held == pytest.approx(trained | value_model) and ("value model" in learners[kind]) == bool(value_model)
    assert saved_gib(sizes["model"], shape) == 2 * saved_gib(sizes["head"], shape) == 24.0


# --------------------------------------------------------------------------------------------------- learning


def played(learner: Learner, count: int, rng: np.random.Generator, version: int) -> list[Sample]:
    """Two turns of one token with an observation between them; an even token earns 0.5 on the spot."""
    ids = rng.integers(0, 61, (count, 5))
    logprobs = np.zeros((count, 5))
    with torch.no_grad():
        for at in (2, 4):  # what is behind `at` is not yet seen
            logits = learner.model.hf(input_ids=torch.tensor(ids[:, :at])).logits[:, -1]
            table = torch.log_softmax(logits, -1).numpy()
            ids[:, at] = [rng.choice(61, p=np.exp(row) / np.exp(row).sum()) for row in table.astype(np.float64)]
            logprobs[:, at] = np.take_along_axis(table, ids[:, at, None], 1)[:, 0]
    mask = np.array([0, 0, 1, 0, 1])
    return [
        Sample(
            ids[i], mask, logprobs[i], 0.0 * mask, np.where(mask, version, -1), np.ones(5), f"g{version}-{i}", f"r{version}-{i}",
            reward=0.0, aux={"rewards": 0.5 * (ids[i] % 2 == 0) * mask},
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_gets_better_at_a_bandit(kind: str) -> None:
    critic = CriticConfig(lr=1e-2, coef=0.5, pretrain_steps=1)
    learner = ppo_learner(kind, LearnerConfig(lr=1e-2, minibatches=4, weight_decay=0.0, critic=critic))
    rng, rewards = np.random.default_rng(0), []
    for step in range(12):
        samples = played(learner, 64, rng, step)
        rewards.append(np.mean([s.aux["rewards"].sum() for s in samples]))
        last = learner.step(samples)
    assert np.mean(rewards[:2]) < 0.65 and np.mean(rewards[-3:]) > 0.85
    assert last["skipped/nonfinite"] == 0 and last["ratio/max"] < 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_trained_alone_learns_the_returns(kind: str) -> None:
    critic = replace(CRITIC, pretrain_steps=99, clip=0.0)
    learner, samples = ppo_learner(kind, replace(SMALL, weight_decay=0.0, critic=critic)), rewarded(3)
    found = [learner.step(samples) for _ in range(20)]
    assert found[-1]["value/loss"] < 0.7 * found[0]["value/loss"]
    assert found[-1]["value/explained_variance"] > max(0.2, found[0]["value/explained_variance"])
