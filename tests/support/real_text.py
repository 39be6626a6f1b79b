"""A user's own world from real text: the packages a Debian machine knows, as corpus, tasks, tokenizer and model shape.

`make_inputs(folder)` writes what a user would bring: `corpus.jsonl` (one package a document), `tasks.jsonl` and
`eval_tasks.jsonl` (questions over sections, maintainers and dependencies, with rubrics and gold documents), and `model/`, a
Hugging Face folder with a byte-level tokenizer of at least 100,000 entries, a chat template with tools and the `config.json` of
a small Qwen3. There are no weights: training starts from random ones.

Invariants: what a question asks for does not stand in the question; the gold documents hold the answer; training and held-out
questions are about different packages; the same packages and settings give the same files; inputs that are already there are
not made again.

The packages and their texts are those of `envs.graphs.debian`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from envs.graphs.debian import STATUS_FILE, Package, machine_packages, read_packages
from envs.graphs.triples import WorldError as InputsError

__all__ = [
    "STATUS_FILE",
    "InputsError",
    "Package",
    "choose",
    "leaks",
    "make_inputs",
    "parse_packages",
    "questions",
    "split",
    "text",
]

MAKER = 2
"""Grows when the same packages would give other files."""
VOCAB_SIZE = 100_352
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- if tools or system %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- ('\\n\\n' if system else '') + 'You can call these tools, one JSON schema a line:\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- '\\n</tools>\\nA call is a JSON object with the name and the arguments, for instance:\\n' }}
        {{- '<tool_call>\\n{"name": "search", "arguments": {"query": "text editor"}}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class Inputs:
    """The files of a folder that `make_inputs` filled."""

    corpus: Path
    tasks: Path
    eval_tasks: Path
    model: Path
    figures: Mapping[str, int]
    """How many documents, tasks, vocabulary entries, ..."""


def make_inputs(
    folder: str | Path,
    *,
    documents: int = 4000,
    tasks: int = 400,
    eval_tasks: int = 40,
    packages: Sequence[Package] | None = None,
) -> Inputs:
    """Fill `folder`, unless it already holds the same. `packages`: instead of what this machine knows.

    Raises InputsError: no package list on this machine, or one that is too small for any question.
    """
    folder = Path(folder)
    known = list(packages) if packages is not None else machine_packages()
    settings = [MAKER, VOCAB_SIZE, CHAT_TEMPLATE, documents, tasks, eval_tasks, [asdict(p) for p in known]]
    key = hashlib.sha256(json.dumps(settings, ensure_ascii=False).encode()).hexdigest()
    inputs = Inputs(folder / "corpus.jsonl", folder / "tasks.jsonl", folder / "eval_tasks.jsonl", folder / "model", {})
    made = folder / "made.json"
    if made.is_file():
        found = json.loads(made.read_text(encoding="utf-8"))
        if found["key"] == key:
            return replace(inputs, figures=found["figures"])
        made.unlink()
    corpus = choose(known, documents)
    train, held_out = split(questions(corpus, known), tasks, eval_tasks)
    if not train or not held_out:
        raise InputsError(
            f"{len(known)} packages give no questions to train and evaluate on; run `apt-get update` first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(inputs.corpus, ({"id": p.name, "title": title(p), "text": text(p)} for p in corpus))
    _write_lines(inputs.tasks, train)
    _write_lines(inputs.eval_tasks, held_out)
    learned = write_model(inputs.model, (f"{title(p)}\n{text(p)}" for p in known))
    figures = {
        "packages": len(known), "documents": len(corpus), "tasks": len(train), "eval_tasks": len(held_out),
        "two_hop_tasks": sum(t["meta"]["hops"] == 2 for t in train), "vocabulary": VOCAB_SIZE, "learned_entries": learned,
    }  # fmt: skip
    made.write_text(json.dumps({"key": key, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    return replace(inputs, figures=figures)


# ---------------------------------------------------------------------------------------------------- packages


def parse_packages(listing: str) -> Iterator[Package]:
    """The packages of a list in dpkg's format. Entries without a description are left out."""
    return read_packages(listing.splitlines())


def title(package: Package) -> str:
    return f"{package.name} ({package.section})" if package.section else package.name


def text(package: Package) -> str:
    """A package as a person would read about it."""
    return package.text


def choose(packages: Sequence[Package], limit: int) -> list[Package]:
    """At most `limit` packages, those with whole descriptions first, each with what it depends on while there is room."""
    by_name = {p.name: p for p in packages}
    chosen: dict[str, Package] = {}
    for package in sorted(packages, key=lambda p: (not p.details, _draw(p.name))):
        for name in (package.name, *package.needed):
            if len(chosen) < limit and name in by_name:
                chosen[name] = by_name[name]
    return [chosen[name] for name in sorted(chosen)]


# ------------------------------------------------------------------------------------------------------- tasks


def questions(corpus: Sequence[Package], known: Sequence[Package]) -> list[dict[str, Any]]:
    """Tasks over packages of the corpus; a package is spoken of by its summary, which no other package has."""
    by_name = {p.name: p for p in corpus}
    summaries = Counter(p.summary.lower() for p in known)
    found: list[dict[str, Any]] = []
    for package in corpus:
        if summaries[package.summary.lower()] > 1 or not 4 <= len(package.summary.split()) <= 11:
            continue
        found += [task for task in _about(package, by_name) if not leaks(task)]
    return found


def _about(package: Package, by_name: Mapping[str, Package]) -> Iterator[dict[str, Any]]:
    who = f'described as "{package.summary}"'
    first = f"<E1> is the package {who}."
    yield _task(package, "name", 1, f"Which Debian package is {who}?", package.name, [f"<E0> is the package {who}."])
    if package.section:
        asks = f"To which section of the archive does the Debian package {who} belong?"
        yield _task(package, "section", 1, asks, package.section, [first, "<E1> belongs to the section <E0>."])
    if package.maintainer:
        asks = f"Who maintains the Debian package {who}?"
        yield _task(package, "maintainer", 1, asks, package.maintainer, [first, "<E1> is maintained by <E0>."])
    needed = [by_name[n] for n in package.needed if n in by_name]
    if not needed or len(needed) != len(package.depends):
        return  # with alternatives, or with packages outside the corpus, the answer might not be the only one
    if len(needed) == 1:
        chain = [first, "<E1> depends on <E2>."]
        asks = f"The Debian package {who} depends on one package only. "
        if needed[0].section:
            rubrics = [*chain, "<E2> belongs to the section <E0>."]
            yield _task(
                package,
                "section-of-needed",
                2,
                asks + "To which section does that one belong?",
                needed[0].section,
                rubrics,
                needed[0],
            )
        if needed[0].maintainer:
            rubrics = [*chain, "<E2> is maintained by <E0>."]
            yield _task(
                package,
                "maintainer-of-needed",
                2,
                asks + "Who maintains that one?",
                needed[0].maintainer,
                rubrics,
                needed[0],
            )
        return
    for section, count in sorted(Counter(p.section for p in needed).items()):
        if count == 1 and section:
            other = next(p for p in needed if p.section == section)
            asks = (
                f"Among the packages that the Debian package {who} depends on, which belongs to the section {section}?"
            )
            rubrics = [first, "<E1> depends on <E0>.", f"<E0> belongs to the section {section}."]
            yield _task(package, f"needed-in-{section}", 2, asks, other.name, rubrics, other)


def _task(
    package: Package, kind: str, hops: int, question: str, answer: str, rubrics: list[str], *others: Package
) -> dict[str, Any]:
    return {
        "id": f"{package.name}/{kind}", "question": question, "answers": [answer], "rubrics": rubrics,
        "gold_docs": [package.name, *(p.name for p in others)], "source": "debian", "meta": {"hops": hops, "about": package.name},
    }  # fmt: skip


def leaks(task: Mapping[str, Any]) -> bool:
    """True when the question holds its answer, or the name of a package that has to be found."""
    words = f" {_plain(task['question'])} "
    return any(f" {_plain(hidden)} " in words for hidden in (*task["answers"], *task["gold_docs"]))


def split(
    tasks: Sequence[dict[str, Any]], train: int, held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tasks to train and to evaluate on: about different packages, one- and two-hop in turn, in an order fixed by their ids."""
    about = sorted({t["meta"]["about"] for t in tasks}, key=_draw)
    reserved = set(about[: max(1, min(held_out, len(about) // 4))])

    def pick(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
        ordered = sorted(rows, key=lambda t: _draw(t["id"]))
        kinds = [[t for t in ordered if t["meta"]["hops"] == hops] for hops in (1, 2)]
        turns = [(i, t) for kind in kinds for i, t in enumerate(kind)]
        return [t for _, t in sorted(turns, key=lambda turn: turn[0])][:most]

    return (
        pick((t for t in tasks if t["meta"]["about"] not in reserved), train),
        pick((t for t in tasks if t["meta"]["about"] in reserved), held_out),
    )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _draw(text: str) -> str:
    """A fixed shuffle."""
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- model


def write_model(folder: Path, texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> int:
    """Tokenizer, chat template and shape of a small Qwen3, without weights. Returns how many entries the text gave."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import __version__ as transformers_version

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    room = vocab_size - len(SPECIAL) - len(MARKERS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # One occurrence is enough: what is wanted is a large vocabulary of real strings, not a good compression.
    trainer = trainers.BpeTrainer(vocab_size=room, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    with _one_thread():
        tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab_size()
    if (
        learned < room
    ):  # entries no text is ever encoded to; as ordinary entries they cost nothing when the file is read
        definition = json.loads(tokenizer.to_str())
        definition["model"]["vocab"].update({f"<reserved_{i}>": i for i in range(learned, room)})
        tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 4096, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    shape = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 128, "hidden_act": "silu", "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": True, "use_cache": True, "dtype": "float32", "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"), "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "transformers_version": transformers_version,  # without it, readers warn of an old fault in others' tokenizers
    }  # fmt: skip
    for name, values in (("tokenizer_config.json", settings), ("config.json", shape)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return learned


class _one_thread:
    """The trainer takes every core it finds; with one it is as fast here, and leaves the others alone."""

    def __enter__(self) -> None:
        self._before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = self._before


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make corpus, tasks, tokenizer and model shape from this machine's packages."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=4000)
    arguments = parser.parse_args(argv)
    try:
        inputs = make_inputs(arguments.folder, documents=arguments.documents)
    except InputsError as error:
        print(f"real_text: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dict(inputs.figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
