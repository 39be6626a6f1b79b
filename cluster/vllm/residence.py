"""Whether an engine has its device, as it takes turns with a learner on the same GPU.

    AWAKE --sleep--> ASLEEP --map--> MAPPED --loaded--> READY --wake--> AWAKE

What vLLM does (read in 0.32): `sleep(level=2, mode="keep")` holds its scheduler, takes every running request's cache blocks away (the
request goes back to the front of the queue with the tokens it has, and recomputes), and gives the memory of weights and cache back
without a copy; `wake_up(["weights"])` maps memory for the weights, whose contents are undefined until they are loaded;
`wake_up(["kv_cache"])` maps the rest, and then resumes the scheduler by itself. So the new version must be named before that.

Invariants: whoever slept samples again only after new weights were loaded completely; requests that arrive meanwhile are held, in
their order, and none is lost; an engine that never sleeps notices nothing of this. On CPU vLLM takes the same calls and gives no
memory back.
"""

from __future__ import annotations

from enum import StrEnum


class Stay(StrEnum):
    """Where an engine stands."""

    AWAKE = "awake"
    """It samples, or may be paused as any engine."""
    ASLEEP = "asleep"
    """It has neither weights nor cache on the device, and holds its requests."""
    MAPPED = "mapped"
    """There is memory for weights again, with nothing of worth in it."""
    READY = "ready"
    """New weights are loaded; it waits for the learner to leave."""


class TurnError(RuntimeError):
    """A step that would sample with weights that are not there. One line."""


class Residence:
    """The state of one engine. Pure: whoever owns it makes the calls to vLLM, and notes them here once they were made."""

    def __init__(self) -> None:
        self.stay = Stay.AWAKE

    @property
    def awake(self) -> bool:
        return self.stay is Stay.AWAKE

    def slept(self) -> None:
        """From anywhere: a learner that begins anew takes the device whatever the one before had reached."""
        self.stay = Stay.ASLEEP

    def mapped(self) -> None:
        if self.stay is Stay.ASLEEP:
            self.stay = Stay.MAPPED

    def loaded(self) -> None:
        """Weights were applied as a whole."""
        if self.stay is Stay.MAPPED:
            self.stay = Stay.READY

    def check_resume(self) -> bool:
        """Whether a resume is to reach the scheduler now; False: it waits for the turn, and there is something to wake. Raises TurnError
        without whole weights."""
        if self.stay in (Stay.ASLEEP, Stay.MAPPED):
            raise TurnError(f"the engine is {self.stay}: its weights were given back, and none were loaded since")
        return self.awake

    def woke(self) -> None:
        self.stay = Stay.AWAKE
