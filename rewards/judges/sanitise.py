"""Foreign text before a judge reads it: what could steer the machinery is disarmed, and text that says nothing is not sent.

Generative judges pass texts without content, such as a lone colon or "Let's think step by step" (master keys: "One Token to Fool
LLM-as-a-Judge", 2025). An agent's text that holds no word but such openers is `unjudgeable` without asking anybody, and so scores 0.

Invariants: pure functions; `disarm` is idempotent and leaves what people write and read alone; `hollow` looks through width,
case, accents, invisible characters and punctuation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any


def _fold(text: str) -> str:
    """Without width, case, accents and invisible characters."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in apart if not unicodedata.combining(c) and unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFC", bare)  # Hangul syllables come apart in NFKD


OPENERS = frozenset(
    _fold(
        # words of which openers, headings and promises of an answer are made
        "a an and answer answering answers am as at be below by can careful carefully come conclude conclusion conclusions confidence consider"
        " correct correctly detail detailed details determine do exact explain explained explanation final finally find following follows for get"
        " give given going have here how i in indeed is it its let lets ll logic logically me my now of ok okay our overall problem problems proceed"
        " process properly provide provided question questions reason reasoned reasoning reference response result results s see so solution"
        " solutions solve solved solving step steps summary that the then therefore these think thinking this thought thoughts through thus to"
        " understand us using ve verdict verified verify we with work would you your"
        # the same in other languages that models open with
        " aufgabe antwort denkprozess frage gedanken lösung lass lassen lösen lösungsweg schritt für uns wir"
        " el explicación la paso pensamiento pensemos por problema proceso razonamiento respuesta resolvamos resolver solución vamos"
        " analyse étape étapes par pensée problème raisonnement réponse résolvons pensamento pensar passo raciocínio resposta solução"
        " ответ решение рассуждение мысли давайте решим шаг за шагом"
        " 答案 解 解答 解析 解决 解題 解题 思考 思路 思维 过程 過程 推理 步骤 让我们 我们 一步一步 一步步 地 最终 最終 回答 正解 解説"
        " かいせつ こたえ 考え方 説明 ステップ 해답 해설 풀이 정답 답 답변 생각 사고 과정"
    ).split()
)
_UNSPACED = sorted((word for word in OPENERS if re.match(r"[\u3040-\u9fff\uac00-\ud7a3]", word)), key=len, reverse=True)
"""Of scripts that write words without spaces."""
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters, and invisible ones that reorder, hide or carry text. Joiners that scripts need (U+200C, U+200D) stay."""
_SPECIAL = re.compile(
    r"<(?=[|｜]|(?i:/?(?:s|bos|eos|pad|unk|think|start_of_turn|end_of_turn|tool_call|tool_response)>|/?data\b))|\[(?=(?i:/?INST\]))"
)
"""Beginnings of what servers' tokenisers may read as ends of turns, and of our own tags."""
_GLANCE = 400
"""Characters of a long text that tell, nearly always, that it says something."""


def disarm(text: str) -> str:
    """The text for a judge's eyes: no lone surrogates, invisible or control characters; special tokens are pulled apart."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _UNSEEN.sub(lambda match: " " if match[0] < "\xa0" else "", text)
    return _SPECIAL.sub(r"\g<0> ", text)


def hollow(text: str) -> bool:
    """True when a text says nothing: it has no words, or only openers. A single letter or a number may be an answer."""
    if len(text) > 2 * _GLANCE and not all(map(_says_nothing, _words(text[:_GLANCE])[:-1])):
        return False
    words = _words(text)
    if len(words) == 1 and len(words[0]) == 1 and words[0].isascii():
        return False
    return all(map(_says_nothing, words))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"\bstep \d+", "step", _fold(text)))


def _says_nothing(word: str) -> bool:
    return word in OPENERS or _chain(word)


def _chain(word: str) -> bool:
    """Openers one after the other, in a script without spaces."""
    for opener in _UNSPACED:
        word = word.replace(opener, "")
    return not word


def hollow_field(agent_fields: Sequence[str], fields: Mapping[str, Any]) -> str:
    """The first of the agent's fields that holds text without content; all together when none holds any. Empty: all is well.

    An answer that equals a reference answer (field `answers`) is well, be it as wordless as it may.
    """
    texts = {name: str(fields.get(name) or "").strip() for name in agent_fields}
    references = fields.get("answers")
    if isinstance(references, list | tuple) and {str(r).strip() for r in references} & {t for t in texts.values() if t}:
        return ""
    for name, text in texts.items():
        if text and hollow(text):
            return name
    return ", ".join(texts) if texts and not any(texts.values()) else ""
