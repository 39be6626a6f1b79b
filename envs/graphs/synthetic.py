"""The synthetic world as documents and triples: its facts, asked about by descriptions instead of by a start that is named."""

from __future__ import annotations

from collections.abc import Iterator

from envs.graphs.builder import Source
from envs.graphs.triples import Phrases, Relation, Triple, value
from envs.world import WorldConfig, build_world
from envs.world.language import RELATIONS, fact_template

_PEOPLE = {
    name: Relation(
        fact_template(name), f"Who is the {name} of {{subject}}?", f"Whose {name} is {{object}}?", fact_template(name)
    )
    for name in RELATIONS
}
_OCCUPATION = Relation(
    "{subject} is a {object}.", "What is the occupation of {subject}?", evidence="{subject} is a {object}.",
    uses=("describe",), weight=2.0, values=True,
)  # fmt: skip
PHRASES = Phrases("person", "people", {**_PEOPLE, "occupation": _OCCUPATION})


def synthetic_source(config: WorldConfig) -> Source:
    """The entities of a synthetic world. Raises ValueError for a config no world can satisfy."""
    world = build_world(config)

    def triples() -> Iterator[Triple]:
        for entity in world.entities.values():
            yield Triple(entity.name, "occupation", value(entity.occupation), entity.name)
            for relation, other in entity.facts:
                yield Triple(entity.name, relation, other, entity.name)

    return Source("synthetic", world.documents, triples(), PHRASES)
