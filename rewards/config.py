"""Configuration of rewards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RewardConfig:
    """What a rollout is rewarded for. Judges have their own config (`rewards.judges.base.JudgeConfig`)."""

    name: str = "carr"
    """`outcome` (is the exact answer right) or `carr` (outcome, and citation rubrics beside it)."""
    outcome: str = "rule"
    """What an answer earns: `rule` (1 for a match with an alias after normalisation), `f1` (best word overlap with an alias, in
    [0, 1]; only with name `outcome`), or `judge` (1 when a judge finds it right)."""
    reward: str = "outcome"
    """`Verdict.reward`: `outcome`, or `mix` = (1 - rubric_ratio) * outcome + rubric_ratio * rubric, which is what the published
    reward server returns. Neither is C-GRPO's reward: the advantage `c_grpo` computes that over the group, from parts."""
    rubric_ratio: float = 0.3
    """carr: weight of the rubric part in the mix."""
    citations: str = "lenient"
    """carr: `lenient` takes `[n](target)` anywhere, `strict` only http(s) URLs directly followed by `]` or `,` (paper)."""
    max_cited_pages: int = 20
    """carr: cited pages that may give evidence, in order of citation; a guard against citing everything."""
    lazy_rubrics: bool = True
    """carr: judge rubrics only in groups with a correct rollout. C-GRPO's reward is the same and costs less. Without effect
    for the mix. Switch off for advantages that reward rubrics of wrong rollouts."""
    connectivity: bool = True
    """carr: only rubrics linked to `<E0>` count (paper); false is the ablation supported / all."""
    identification: bool = True
    """carr: rubrics are filled with the entities the answer names (paper); false is the ablation in which placeholders stay
    open, and a statement is supported when it holds for some entity."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for key, allowed in (
            ("name", ("outcome", "carr")),
            ("outcome", ("rule", "f1", "judge")),
            ("reward", ("outcome", "mix")),
            ("citations", ("lenient", "strict")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"reward.{key} {getattr(self, key)!r} is unknown; one of {', '.join(allowed)}")
        if not 0 <= self.rubric_ratio <= 1:
            raise ValueError(f"reward.rubric_ratio {self.rubric_ratio} is outside [0, 1]")
        if self.max_cited_pages < 1:
            raise ValueError(f"reward.max_cited_pages {self.max_cited_pages} is not positive")
        if self.name == "carr" and self.outcome == "f1":
            raise ValueError(
                "reward.outcome 'f1' is no right or wrong, which the rubrics of 'carr' need: set reward.outcome to 'rule' or"
                " 'judge', or reward.name to 'outcome'"
            )
        if self.name == "outcome" and self.reward == "mix":
            raise ValueError(
                "reward.reward 'mix' needs rubrics: set reward.name to 'carr', or reward.reward to 'outcome'"
            )

    @property
    def lazy(self) -> bool:
        return self.lazy_rubrics and self.reward == "outcome"
