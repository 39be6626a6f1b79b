"""Names of the synthetic world: pronounceable words of two halves, such as `Bado` + `kiru`.

Invariants:
- The halves are fixed lists, the same in every world; a world's names are pairs of them, drawn anew by its seed.
- A pair belongs to exactly one split, by its indices alone. So names of train and held-out worlds never meet, while every
  half of a held-out name has been seen in training.
- A world uses each first half once as long as there are enough of them, so a first half points to one name.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
NUM_HALVES = 320
SPLITS = ("train", "heldout")


def _make_halves(seed: int) -> tuple[str, ...]:
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    words = [a + b for a in syllables for b in syllables if a != b]
    random.Random(seed).shuffle(words)
    return tuple(sorted(words[:NUM_HALVES]))


FIRST_HALVES: tuple[str, ...] = tuple(word.capitalize() for word in _make_halves(11))
SECOND_HALVES: tuple[str, ...] = _make_halves(23)


def split_of(first: int, second: int) -> str:
    """The split a pair of half indices belongs to: one pair in eight is held out, without a pattern a policy could learn."""
    return "heldout" if zlib.crc32(f"{first} {second}".encode()) % 8 == 0 else "train"


def draw_names(rng: random.Random, split: str, num_names: int) -> list[str]:
    """`num_names` different names of one split. Raises ValueError when the split has not that many."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if num_names > NUM_HALVES * NUM_HALVES // 16:
        raise ValueError(f"{num_names} names were asked for; a world has at most {NUM_HALVES * NUM_HALVES // 16}")
    taken: set[str] = set()
    stream = _first_halves(rng)
    while len(taken) < num_names:
        first = next(stream)
        second = rng.randrange(NUM_HALVES)
        while split_of(first, second) != split:
            second = rng.randrange(NUM_HALVES)
        taken.add(FIRST_HALVES[first] + SECOND_HALVES[second])
    names = sorted(taken)
    rng.shuffle(names)
    return names


def near_name(rng: random.Random, name: str, split: str, taken: set[str]) -> str:
    """A name that is easily confused with `name`: same second half, other first half, same split, not in `taken`."""
    second = SECOND_HALVES.index(name[4:])
    used = {word[:4] for word in taken}
    choices = [i for i in range(NUM_HALVES) if split_of(i, second) == split]
    rng.shuffle(choices)
    choices.sort(key=lambda i: FIRST_HALVES[i] in used)  # unused first halves come first
    for first in choices:
        found = FIRST_HALVES[first] + name[4:]
        if found not in taken:
            return found
    raise ValueError(f"no name near {name!r} is left")


def _first_halves(rng: random.Random) -> Iterator[int]:
    while True:
        order = list(range(NUM_HALVES))
        rng.shuffle(order)
        yield from order
