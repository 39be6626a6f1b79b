"""What the learner can be told. Plain dataclasses with defaults for the tiny policy; recipes override them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LossConfig:
    """The policy loss. Names of the three policies it speaks of are defined in `agents.learning.loss`."""

    name: str = "clipped"
    """One of LOSSES."""
    clip_low: float = 0.2
    """rho is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """rho is clipped above at 1 + clip_high (clip-higher)."""
    dual_clip: float = 0.0
    """Bound c on the loss of tokens with a negative advantage: at most -A * c. 0 turns it off; 3 is usual."""
    old: str = "learner"
    """Proximal policy: `learner` (its weights when the batch arrived) or `rollout` (the sampler's own log-probs)."""
    mismatch: str = "tis"
    """Weight w for sampler/learner mismatch: `tis` (cut at tis_cap), `icepop` (dropped outside a window) or `none`."""
    tis_cap: float = 2.0
    """Largest w under tis."""
    icepop_low: float = 0.5
    """Tokens with w below this are dropped under icepop."""
    icepop_high: float = 2.0
    """Tokens with w above this are dropped under icepop."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy; needs aux `ref_logprobs` when above 0."""
    kl_in: str = "loss"
    """Where it is charged: `loss` (k3 estimator), or `reward` of each trained token (k1: log pi_old - log pi_ref), for a critic."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        _one_of("loss.old", self.old, ("learner", "rollout"))
        _one_of("loss.mismatch", self.mismatch, ("tis", "icepop", "none"))
        _one_of("loss.kl_in", self.kl_in, ("loss", "reward"))
        for name in ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} {getattr(self, name)} is negative")
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip {self.dual_clip} must be above 1, or 0 to turn it off")
        if self.tis_cap <= 0:
            raise ValueError(f"loss.tis_cap {self.tis_cap} is not positive")
        if not 0 <= self.icepop_low < self.icepop_high:
            raise ValueError(f"loss.icepop window [{self.icepop_low}, {self.icepop_high}] is empty")


@dataclass
class CriticConfig:
    """The value model of PPO, and how its values become advantages. Needs rewards per token: `advantage.name=gae`."""

    kind: str = "none"
    """`none`; `head` (a linear layer on the policy's hidden states) or `model` (its own model, started from the policy's weights)."""
    lr: float = 1e-5
    """Peak learning rate of the critic's own weights: of the head alone with `head`."""
    warmup_steps: int = 0
    """Batches over which that rate rises linearly from 0."""
    pretrain_steps: int = 0
    """First batches, in which the critic alone is trained and the policy stays as it is. Its own warm-up begins after them."""
    coef: float = 1.0
    """Weight of the value loss. With `head` it weighs the value loss against the policy's in the weights they share."""
    clip: float = 0.5
    """Values are clipped to this distance from those the batch arrived with; 0 turns it off."""
    gamma: float = 1.0
    """Discount from one policy token to the next."""
    lam: float = 1.0
    """Lambda of generalised advantage estimation."""
    whiten: bool = True
    """Advantages are shifted and scaled to mean 0 and variance 1 over the trained tokens of the whole batch."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        _one_of("learner.critic.kind", self.kind, ("none", "head", "model"))
        for name in ("lr", "warmup_steps", "pretrain_steps", "coef", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"learner.critic.{name} {getattr(self, name)} is negative")
        if self.kind == "none" and self.pretrain_steps:
            raise ValueError(
                "learner.critic.pretrain_steps is above 0, but there is no critic: set learner.critic.kind"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"learner.critic.{name} {getattr(self, name)} is outside [0, 1]")


@dataclass
class LoraConfig:
    """Low-rank adapters instead of full weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The adapter's product is scaled by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers that get an adapter, by the last part of their name."""
    publish: str = "merged"
    """What engines are sent: `merged`, all weights with the adapters in them; or `adapter`, the adapters alone, which engines add."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        _one_of("learner.lora.publish", self.publish, ("merged", "adapter"))
        if self.publish == "adapter" and self.rank == 0:
            raise ValueError("learner.lora.publish=adapter needs adapters: set learner.lora.rank above 0")


@dataclass
class LearnerConfig:
    """Optimiser, batching and precision of one learner."""

    lr: float = 3e-4
    """Peak learning rate. 3e-4 is stable for about 1 M parameters, 1e-3 is not; billions want about 1e-6."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """AdamW moment decays."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """AdamW decay of matrices; norms and biases are not decayed."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off (the norm is logged all the same)."""
    schedule: str = "constant"
    """Learning rate after warm-up: `constant`, or `linear` down to 0 at total_steps."""
    warmup_steps: int = 0
    """Batches over which the learning rate rises linearly from 0."""
    total_steps: int = 0
    """Batches of the run; needed by the linear schedule only."""
    minibatches: int = 1
    """Optimiser steps per batch. Above 1 the proximal log-probs are computed before the first step."""
    max_tokens_per_microbatch: int = 2048
    """Token budget, padding included, of a forward and backward pass; a longer sequence runs alone. Small fits CPU caches."""
    layout: str = "auto"
    """`padded` rows of like length; `packed`, sequences end to end that do not see each other; `shared`, what samples have in common
    from the start computed once, where that saves time. `auto`: packed with variable-length attention, else shared where the model
    allows."""
    aggregation: str = "token_mean"
    """`token_mean` over the whole batch, `sequence_mean` (mean over rollouts of token means) or `constant` (Dr.GRPO)."""
    constant_length: int = 1024
    """Token count that `aggregation=constant` divides each rollout's summed loss by."""
    skip_zero_advantage: bool = True
    """Sequences that cannot have a gradient run forward only (for the metrics). Changes no gradient."""
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: str = "auto"
    """Arithmetic: float32 or bfloat16; auto is float32 on CPU, bfloat16 on GPU. Weights and AdamW stay float32."""
    attention: str = "auto"
    """`varlen` (torch's own variable-length kernel), or an implementation as transformers names it: `sdpa`, `flash_attention_2`, `eager`,
    or `flex_attention`, which on a GPU does not compute what `shared` rows mask out. `auto`: sdpa on CPU, varlen on a GPU that has it."""
    context_parallel: int = 1
    """Learner processes that share each row of tokens, for sequences that one cannot hold; divides their number and the heads."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, about a third more time."""
    sharded_checkpoints: bool = False
    """Every learner process writes its own part of a checkpoint, and none gathers the optimiser's state. Needs a folder that all of
    them share."""
    logit_elements: int = 1 << 24
    """Most entries of one [tokens, vocab] float32 block; larger heads are computed in chunks."""
    threads: int = 0
    """CPU threads of torch in the learner's process; 0 leaves torch's own choice."""
    seed: int = 0
    """Seeds adapters and the order of minibatches."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        _one_of("learner.schedule", self.schedule, ("constant", "linear"))
        _one_of("learner.layout", self.layout, ("auto", "padded", "packed", "shared"))
        _one_of("learner.aggregation", self.aggregation, ("token_mean", "sequence_mean", "constant"))
        _one_of("learner.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.context_parallel > 1:
            _one_of("learner.layout with learner.context_parallel,", self.layout, ("auto", "packed"))
            _one_of("learner.attention with learner.context_parallel,", self.attention, ("auto", "varlen"))
        if self.lr < 0:
            raise ValueError(f"learner.lr {self.lr} is negative")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"learner.betas {list(self.betas)} must be two numbers in [0, 1)")
        if self.schedule == "linear" and self.total_steps <= self.warmup_steps + self.critic.pretrain_steps:
            raise ValueError(
                "learner.schedule=linear needs learner.total_steps above learner.warmup_steps (and critic.pretrain_steps)"
            )
        for name in (
            "minibatches",
            "max_tokens_per_microbatch",
            "constant_length",
            "logit_elements",
            "context_parallel",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"learner.{name} {getattr(self, name)} is not positive")
        self.loss.check()
        self.critic.check()
        self.lora.check()
        if self.loss.kl_in == "reward" and self.critic.kind == "none":
            raise ValueError("loss.kl_in=reward needs a critic: set learner.critic.kind, or loss.kl_in=loss")


def learning_rate(batch: int, config: LearnerConfig) -> float:
    """The policy's learning rate in the batch with this index (from 0): 0 while the critic alone is trained."""
    batch, steps = batch - config.critic.pretrain_steps, config.total_steps - config.critic.pretrain_steps
    if batch < 0:
        return 0.0
    if batch < config.warmup_steps:
        return config.lr * (batch + 1) / config.warmup_steps
    if config.schedule == "linear":
        left = (steps - batch) / (steps - config.warmup_steps)
        return config.lr * min(1.0, max(0.0, left))
    return config.lr


def _one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{where} {value!r} is unknown; one of {', '.join(known)}")
