"""What the synthetic world says, and how: relations, occupations, sentences, questions.

Everything that pages, questions and expert traces word is worded here, once. A fact reads `Badokiru's rival is Lomitave.` on pages and
in answers; a question counts its steps, `Step 1: rival. Step 2: mentor.`, so no text gives away a name in between.
"""

from __future__ import annotations

from collections.abc import Sequence

RELATIONS: tuple[str, ...] = (
    "rival", "mentor", "cousin", "sponsor", "tutor", "neighbour", "partner", "deputy",
    "patron", "guide", "debtor", "tenant", "keeper", "witness", "cook", "herald",
)  # fmt: skip
OCCUPATIONS: tuple[str, ...] = (
    "painter", "baker", "sailor", "weaver", "miller", "potter", "fisher", "mason",
    "tailor", "smith", "poet", "brewer", "farmer", "carver", "singer", "printer",
)  # fmt: skip
FACT = "{subject}'s %s is {object}."
UNKNOWN = "unknown"
MAX_HOPS = 4
QUESTION_ENDS: tuple[str, ...] = ("Who is at the end?", "Whose name is last?")


def fact_template(relation: str) -> str:
    """The sentence that states a fact, with `{subject}` and `{object}` to fill."""
    return FACT % relation


def fact(subject: str, relation: str, object: str) -> str:
    return fact_template(relation).format(subject=subject, object=object)


def lead(name: str, occupation: str) -> str:
    """The first sentence of a page; it tells nothing a question asks for."""
    return f"{name} is a {occupation}."


def page(name: str, occupation: str, facts: Sequence[tuple[str, str]], see_also: str) -> str:
    """A page's text: lead, one line of facts (relation, object), and a pointer to another name (empty: none)."""
    lines = [lead(name, occupation), " ".join(fact(name, relation, object) for relation, object in facts)]
    if see_also:
        lines.append(f"See also: {see_also}.")
    return "\n".join(line for line in lines if line)


def question(start: str, relations: Sequence[str], ending: str = QUESTION_ENDS[0]) -> str:
    """The question for the trail that starts at `start` and follows `relations`."""
    steps = " ".join(f"Step {i}: {relation}." for i, relation in enumerate(relations, start=1))
    return f"Start at {start}. {steps} {ending}"


def rubric(subject: str, relation: str, label: str) -> str:
    """The checkable single-hop statement of one step; `subject` is a name or a placeholder such as `<E1>`."""
    return f"<{label}> is the {relation} of {subject}."
