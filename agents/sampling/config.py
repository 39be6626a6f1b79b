"""Settings of episode samplers."""

from __future__ import annotations

from dataclasses import dataclass

MALFORMED = ("stop", "retry")
ON_LENGTH = ("malformed", "final")


@dataclass
class SamplingConfig:
    """How turns are sampled, and the limits of an episode."""

    temperature: float = 1.0
    """Sampling temperature in training."""
    top_p: float = 1.0
    """Nucleus sampling; must stay 1 (none): see `check`."""
    top_k: int = -1
    """Most likely tokens to sample from; must stay -1 (all): see `check`."""
    max_turn_tokens: int = 1024
    """Most tokens of one policy turn."""
    max_context: int = 4096
    """Most tokens of an episode, prompt and observations included; not above the engine's own limit."""
    max_turns: int = 16
    """Most policy turns."""
    malformed: str = "stop"
    """`stop`: a malformed turn ends the episode (training). `retry`: the policy is told and goes on (evaluation)."""
    max_malformed: int = 3
    """With `retry`: this many malformed turns in a row end the episode."""
    on_length: str = "malformed"
    """A turn that reaches its token limit without calling a tool is `malformed`, or taken as the `final` message."""

    def __post_init__(self) -> None:
        if self.malformed not in MALFORMED:
            raise ValueError(f"malformed {self.malformed!r} is not one of {', '.join(MALFORMED)}")
        if self.on_length not in ON_LENGTH:
            raise ValueError(f"on_length {self.on_length!r} is not one of {', '.join(ON_LENGTH)}")
        if self.temperature <= 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; training needs a temperature above 0")
        for name in ("max_turn_tokens", "max_context", "max_turns", "max_malformed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def check(self) -> None:
        """Raises ValueError, one line, for truncated sampling, evaluations included: they are played by the same samplers."""
        for name, off in (("top_p", 1.0), ("top_k", -1)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"sampling.{name} is {getattr(self, name)}: the sampler would renormalise over the tokens that are left and the"
                    f" learner would not, so their ratio would be biased (no mask is replayed); set sampling.{name}={off:g}"
                )
