"""Settings of the verifier: what its replies earn, and how the examples it learns from are made."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMS = (
    "json", "csv", "python_list", "yaml", "markdown", "xml", "tsv", "numbered", "comma_separated", "pipe_separated", "keyed",
)  # fmt: skip
"""The ten forms in which labels are asked for in the publication, and ours: a JSON object by key, which judges are asked for."""


@dataclass
class VerifierConfig:
    """The reward `verifier` (arXiv 2510.14660, published code; confirmed)."""

    f1_weight: float = 0.35
    exact_weight: float = 0.35
    reasoning_weight: float = 0.20
    form_weight: float = 0.10
    absent: str = "one"
    """F1 of a label that is in neither gold nor reply: `one` (published; an all-wrong reply of a single label still has 1/3), or `skip`:
    the mean is over the labels that occur."""
    max_response: int = 4096
    """Most tokens of a reply."""
    overlong_buffer: int = 2048
    """The last so many tokens cost: min(-(L - (max_response - buffer)) / buffer * factor, 0) is added for a reply of L tokens; 0: none do."""
    overlong_factor: float = 1.0

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in ("f1_weight", "exact_weight", "reasoning_weight", "form_weight", "overlong_factor"):
            if getattr(self, name) < 0:
                raise ValueError(f"reward.verifier.{name} {getattr(self, name)} is negative")
        if self.absent not in ("one", "skip"):
            raise ValueError(f"reward.verifier.absent {self.absent!r} is unknown; one of one, skip")
        if not 0 <= self.overlong_buffer <= self.max_response:
            raise ValueError(
                f"reward.verifier.overlong_buffer {self.overlong_buffer} is outside 0 to max_response {self.max_response}"
            )


@dataclass
class ExamplesConfig:
    """From labelled passages to examples. The defaults are the publication's; no seed was published."""

    prompt: str = "nugget_verifier"
    """Prompt file in rewards/judges/prompts; its last paragraph asks for labels by key and gives way to another form."""
    forms: list[str] = field(default_factory=lambda: list(FORMS))
    """How labels are asked for, drawn per example."""
    per_call: int = 10
    """Nuggets of the largest example, at most 10."""
    keep: float = 0.1
    """Share of the augmented examples that is used; 0: only the passages as they were labelled."""
    thin_above: int = 5
    """An augmented example with more nuggets than this ..."""
    thin_share: float = 0.5
    """... of which more than this share is not_support ..."""
    thin_cut: float = 0.2
    """... loses this share of its not_support nuggets, rounded down."""
    reasons: bool = True
    """The reply to learn holds the teacher's reasons, where they can be told apart by key; the publication's holds labels only."""
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        unknown = sorted(set(self.forms) - set(FORMS))
        if unknown or not self.forms:
            raise ValueError(f"examples.forms {unknown or 'is empty'}; take some of {', '.join(FORMS)}")
        if not 1 <= self.per_call <= 10:
            raise ValueError(f"examples.per_call {self.per_call} is outside 1 to 10")
        for name in ("keep", "thin_share", "thin_cut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"examples.{name} {getattr(self, name)} is outside [0, 1]")
