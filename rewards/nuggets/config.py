"""Configuration of nuggets: how they are scored (`reward.nugget`), and how they are built (`gumshoe nuggets`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.judges.templates import load_prompt

SCORES = ("weighted", "strict_all", "all", "strict_vital", "vital")


@dataclass
class NuggetConfig:
    """The reward `nugget`."""

    score: str = "weighted"
    """What is rewarded: `weighted` (R, with the values and weights below), or one of TREC RAG's scores, which have values of their own:
    `strict_all`, `all`, `strict_vital` (TREC's main one), `vital`."""
    support: float = 1.0
    """V of the label support."""
    partial: float = 0.5
    """V of partial_support; 0 makes R strict."""
    not_support: float = 0.0
    """V of not_support: the message does not speak of it."""
    contradiction: float = 0.0
    """V of contradiction: the message says otherwise. Below 0 it costs, R may be negative, and what cannot be judged costs as much."""
    vital: float = 1.0
    """w of vital nuggets."""
    okay: float = 0.5
    """w of the others; 0: only vital ones count."""
    per_call: int = 10
    """Nuggets per judge call, at most 10."""
    block_chars: int = 8_000
    """Long form: characters of a message per judge call; a longer one is cut into blocks, between paragraphs where that is possible."""
    shuffles: int = 0
    """Further calls with the nuggets in other orders (as many as there are), as a check of the judge: the part `consistency`. Where orders
    disagree, the least supportive label counts."""
    short_form: str = "auto"
    """The answer as the only rubric: `auto` (of tasks without nuggets), `always`, or `never`."""
    prompt: str = "nugget_assign"
    """Prompt file (rewards/judges/prompts) that asks for the labels of a long form: `nugget_verifier` for a trained verifier."""
    exact: bool = True
    """Short form: an exact answer that matches an alias counts as support and no judge is asked ("EM + verifier")."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name, known in (("score", SCORES), ("short_form", ("auto", "always", "never"))):
            if getattr(self, name) not in known:
                raise ValueError(f"reward.nugget.{name} {getattr(self, name)!r} is unknown; one of {', '.join(known)}")
        if not -1 <= self.contradiction <= self.not_support <= self.partial <= self.support <= 1:
            raise ValueError(
                "reward.nugget: -1 <= contradiction <= not_support <= partial <= support <= 1 does not hold for"
                f" {self.contradiction}, {self.not_support}, {self.partial}, {self.support}"
            )
        if min(self.vital, self.okay) < 0 or self.vital + self.okay == 0:
            raise ValueError(
                f"reward.nugget: weights vital {self.vital} and okay {self.okay} must not be negative, nor both 0"
            )
        taken = set(re.findall(r"\{\{(\w+)\}\}", load_prompt(self.prompt).user))
        if not {"passage", "nuggets"} <= taken <= {"question", "passage", "nuggets"}:
            raise ValueError(
                f"reward.nugget.prompt {self.prompt!r} takes {', '.join(sorted(taken)) or 'nothing'}; give one that takes passage and nuggets,"
                " such as nugget_assign"
            )
        if not 1 <= self.per_call <= 10:
            raise ValueError(f"reward.nugget.per_call {self.per_call} is outside 1 to 10")
        if self.block_chars < 200:
            raise ValueError(f"reward.nugget.block_chars {self.block_chars} is below 200, which holds no paragraph")
        if self.shuffles < 0:
            raise ValueError(f"reward.nugget.shuffles {self.shuffles} is negative")


@dataclass
class BuildConfig:
    """How nuggets are built for a question: rounds of search, reading and merging until nothing new comes."""

    max_rounds: int = 6
    """Most rounds of search."""
    patience: int = 2
    """Rounds in a row without a new nugget after which it ends."""
    queries: int = 4
    """Most new queries of a round; the first round asks the question itself."""
    k: int = 10
    """Passages per query."""
    passage_chars: int = 4_000
    """Most characters of a passage; what is longer is cut and counted."""
    window: int = 10
    """Passages, nuggets or pairs per judge call."""
    max_nuggets: int = 30
    """It ends when there are so many."""
    keep: int = 20
    """Nuggets kept at the end, vital ones first."""
    max_words: int = 12
    """Length of a nugget that is asked for; twice as many words are refused (`agents.text.num_words`)."""
    near: float = 0.5
    """Share of common words (Jaccard) from which a pair is shown to the judge as perhaps the same."""
    verify: bool = True
    """Every new nugget must be supported by a passage that it is said to come from; one that is not is dropped."""
    compare: bool = True
    """Pairs of like nuggets are judged: the same, contradicting, or different. Without, only equal words are found."""
    max_calls: int = 200
    """Judge calls for a question; then it ends with what there is. Nothing is extracted that could not be verified within them. Rating
    importance comes on top."""
    concurrency: int = 4
    """Questions at a time."""

    def check(self) -> None:
        """Raises ValueError, one line, for a value outside its range."""
        for name in (
            "max_rounds", "patience", "queries", "k", "window", "max_nuggets", "keep", "max_words", "max_calls", "concurrency",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"build.{name} {getattr(self, name)} is not positive")
        if self.passage_chars < 200:
            raise ValueError(f"build.passage_chars {self.passage_chars} is below 200, which holds no passage")
        if not 0 < self.near <= 1:
            raise ValueError(f"build.near {self.near} is outside (0, 1]")
