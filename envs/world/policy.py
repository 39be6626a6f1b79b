"""The tiny policy: its tokenizer, chat template and model shape, as an ordinary Hugging Face folder.

`write_base(folder)` writes `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `config.json`; warm-up
adds `model.safetensors`. Nothing else in Gumshoe knows that this policy is special: `AutoTokenizer`, `AutoModelForCausalLM` and
vLLM read the folder like any other.

Invariants:
- Text of the world is cut into the fewest pieces, always the same way, and `decode(encode(text)) == text`.
- Every printable ASCII character is a piece, so foreign text is spelled out; what is left is `<unk>`.
- The vocabulary depends on nothing but this file and the world's word lists: same code, same ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import Unigram

from envs.world import language
from envs.world.names import FIRST_HALVES, SECOND_HALVES

POLICY_DIR = Path(__file__).resolve().parent / "policy"
"""The shipped checkpoint."""

PAD, START, END, UNK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"

# Qwen3's layout without its system prompt for tools: what the tools are has been learned in warm-up.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_CHAT = [
    "user\n",
    "assistant\n",
    "system\n",
    "user\n<tool_response>\n",
    "\n</tool_response>\n<tool_response>\n",
    "\n</tool_response>",
]
_CALLS = [
    "<think>\n", "\n</think>\n\n", '"}}\n</tool_call>',
    '<tool_call>\n{"name": "search", "arguments": {"query": "',
    '<tool_call>\n{"name": "open", "arguments": {"doc_id": "',
    '<tool_call>\n{"name": "find", "arguments": {"pattern": "',
]  # fmt: skip
_FINAL = ["## Explanation with Citations\n", "\n\n## Exact Answer\n", "## Exact Answer\n", ")]"] + [
    f" [[{i}](" for i in range(1, language.MAX_HOPS + 2)
]
_OBSERVATIONS = (
    [f"[{i}] Title: " for i in range(6)]
    + [f"\n[{i}] URL Source: " for i in range(6)]
    + [f"\n[{i}] Description: " for i in range(6)]
    + ["Title: ", "\nURL Source: ", "\n\n", "No results found.", "[Match 1]\n", "No matches found.", "Error: "]
)
_PROSE = (
    ["Start at ", " is a ", ". ", ".\n", "\nSee also: ", " of ", language.UNKNOWN]
    + [f"Step {i}: " for i in range(1, language.MAX_HOPS + 2)]
    + list(language.QUESTION_ENDS)
    + list(language.OCCUPATIONS)
    + list(language.RELATIONS)
    + [f"'s {relation} is " for relation in language.RELATIONS]
)


def pieces() -> list[str]:
    """The vocabulary in id order: special tokens, then texts of the world, then single characters."""
    characters = ["\n"] + [chr(code) for code in range(32, 127)]
    ordered = [
        PAD,
        START,
        END,
        UNK,
        *_CHAT,
        *_CALLS,
        *_FINAL,
        *_OBSERVATIONS,
        *_PROSE,
        *FIRST_HALVES,
        *SECOND_HALVES,
        *characters,
    ]
    return list(dict.fromkeys(ordered))


def make_tokenizer() -> Tokenizer:
    """A unigram tokenizer in which every piece costs the same and a bare character more, so the fewest pieces win."""
    vocabulary = [(piece, -1.0 if len(piece) > 1 else -8.0) for piece in pieces()]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=pieces().index(UNK), byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (PAD, START, END)])
    return tokenizer


def model_config(
    hidden_size: int = 128, num_layers: int = 4, num_heads: int = 4, head_dim: int = 64, intermediate_size: int = 256
) -> dict[str, Any]:
    """`config.json` of a Qwen3 model with this vocabulary, which is padded to a multiple of 64.

    Wide heads and slow rotations matter: copying a name means to find one of several hundred first halves at any distance, and
    only dimensions that hardly rotate can tell. With 32 dimensions and a base of 10,000 there were a dozen, and it was not learned.
    """
    ids = {text: i for i, text in enumerate(pieces())}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": -(-len(ids) // 64) * 64,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def write_base(folder: str | Path, **shape: int) -> Path:
    """Write tokenizer, chat template and `config.json` (no weights) to `folder`; `shape` overrides `model_config`'s defaults."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNK,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    _write(target / "tokenizer_config.json", settings)
    _write(target / "config.json", model_config(**shape))
    return target


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
