"""Foreign text before a judge reads it: what could steer the machinery is disarmed, and text that says nothing is not sent.

Generative judges pass texts without content, such as a lone colon or "Let's think step by step" (master keys: "One Token to Fool
LLM-as-a-Judge", 2025). An agent's text that holds no word but such openers is `unjudgeable` without asking anybody, and so scores 0.

Invariants: pure functions; `disarm` is idempotent and leaves what people write and read alone; `hollow` looks through width,
case, accents, invisible characters, punctuation, lookalikes and mark-up.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from agents.text import exact_match, folded

_LOOKALIKES = (
    "AАΑꓮ BВΒꓐ CСϹꓚ DꓓᎠ EЕΕꓰ FꓝϜ GꓖԌ HНΗꓧ IІΙӀꓲ JЈꓙ KКΚꓗ LꓡᏞ MМΜꓟ NΝꓠ OОΟՕꓳ PРΡꓑ QԚ RꓣᎡ SЅՏꓢ TТΤꓔ UՍꓴ VѴꓦ WԜꓪ XХΧꓫ YҮΥУꓬ ZΖꓜ"
    " aаαɑ bЬьƄƅ cсϲ dԁ eеεєҽ gɡցԍ hһհ iіιıɩ jјϳ kкκ lӏǀ mм nոпη oоοօσ pрρ qԛզ rгᴦ sѕ tтτ uυսцʋ vѵν wԝωѡ xхχ yуүγ"
)  # fmt: skip
_TWINS = str.maketrans({twin: letters[0] for letters in _LOOKALIKES.split() for twin in letters[1:]})
"""Letters of other scripts that look like Latin ones (after Unicode's confusables), each with what it looks like."""
_LATIN = re.compile(r"LATIN (?:SMALL |CAPITAL )?LETTER (?:[A-Z]+ )*([A-Z])(?: WITH .*)?")
"""Names of Latin letters in other shapes: small capitals, dotless, with a stroke."""
_DIGITS = tuple(str.maketrans("013457", f"o{one}east") for one in "il")
_APOSTROPHES = re.compile("[\u02b9-\u02df\u02ec-\u02ff\ua788-\ua78c]")
"""Modifier letters, of which some look like one."""
_BLANKS = "\u115f\u1160\u3164\uffa0\u2800"


def _words(text: str) -> list[str]:
    """Words without width, accents and invisible characters; letters set apart (`S o l u t i o n`) are a word."""
    apart = unicodedata.normalize("NFKD", _APOSTROPHES.sub("'", text))
    bare = "".join(c for c in apart if unicodedata.category(c) not in ("Mn", "Me", "Cf") and c not in _BLANKS)
    bare = unicodedata.normalize("NFC", bare)  # Hangul syllables come apart in NFKD
    bare = re.sub(r"(?i)\bstep \d{1,2}\b", "step", bare)
    words = re.findall(r"[^\W_]+", bare)
    if all(len(word) == 1 for word in words) and (len(words) > 3 or not bare.isascii()):
        words = re.findall(r"[^\W_]+", re.sub(r"(?<=\w)[\W_](?=\w)", "", bare))
    return words


OPENERS = frozenset(
    word.casefold()
    for word in _words(
        # words of which openers, headings and promises of an answer are made
        "a an and answer answering answers am as at be below by can careful carefully come conclude conclusion conclusions confidence consider"
        " correct correctly detail detailed details determine do exact explain explained explanation final finally find following follows for get"
        " give given going have here how i in indeed is it its let lets ll logic logically me my now of ok okay our overall problem problems proceed"
        " process properly provide provided question questions reason reasoned reasoning reference response result results s see so solution"
        " solutions solve solved solving step steps summary that the then therefore these think thinking this thought thoughts through thus to"
        " understand us using ve verdict verified verify we with work would you your approach sure certainly absolutely"
        # the same in other languages that models open with
        " aufgabe antwort denkprozess frage gedanken lösung lass lassen lösen lösungsweg schritt für uns wir"
        " el explicación la paso pensamiento pensemos por problema proceso razonamiento respuesta resolvamos resolver solución vamos"
        " analyse étape étapes par pensée problème raisonnement réponse résolvons pensamento pensar passo raciocínio resposta solução"
        " soluzione risposta spiegazione çözüm cevap lời giải الحل الجواب الإجابة"
        " ответ решение рассуждение мысли давайте решим шаг за шагом"
        " 答案 解 解答 解析 解决 解題 解题 思考 思路 思维 过程 過程 推理 步骤 让我们 我们 一步一步 一步步 地 最终 最終 回答 正解 解説"
        " かいせつ こたえ 考え方 説明 ステップ 해답 해설 풀이 정답 답 답변 생각 사고 과정"
    )
)
_LINKS: dict[str, list[str]] = {}
"""Openers that may stand one after the other without a space, by first letter: of scripts that need none, and long ones."""
for _word in OPENERS:
    if len(_word) > 3 or re.match(r"[\u3040-\u9fff\uac00-\ud7a3]", _word):
        _LINKS.setdefault(_word[0], []).append(_word)
_GLUE = ("by", "is", "the", "to", "of")
"""Short ones that may stand between them."""
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters, and invisible ones that reorder, hide or carry text. Joiners that scripts need (U+200C, U+200D) stay."""
_SPECIAL = re.compile(
    r"<(?=[|｜]|(?i:/?(?:s|bos|eos|pad|unk|sop|eop|think|tool_call|tool_response|unused\d+|(?:extra_id|special|reserved)_\d+"
    r"|(?:start|end|begin)_of_\w+|\w+_token|seed:\w+|\w+\|)>|</?sys>>|/?data\b))"
    r"|\[(?=(?i:/?(?:inst|bos|eos|pad|unk|think|args|img|audio|[gs]?mask)\])|/?[A-Z]+_[A-Z_]+\]|e~\[)|\](?=~!?b[\[\]])"
)
"""Beginnings of what servers' tokenisers may read as ends of turns (of Llama, Mistral, Gemma, T5 and so on), and of our own tags."""
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
    text = plain(text)
    if len(text) > 2 * _GLANCE and not all(map(_says_nothing, _words(text[:_GLANCE])[:-1])):
        return False
    words = _words(text)
    if len(words) == 1 and len(words[0]) == 1 and _latin(words[0]).isascii():
        return False
    return all(map(_says_nothing, words))


_TAG = re.compile(r"<!--[^<>]*>|<[/!?]?([A-Za-z][\w:.-]*)[^<>]*>")
_HTML = "a b br center code div em font hr i img input li mark ol p pre s small span strong sub sup u ul wbr"
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+.#-]*[ \t]*(?:\n(?=[^`~])|\Z)", re.MULTILINE)
_TARGET = re.compile(r"\]\([^()\s]*\)")
_NUMBERED = re.compile(r"^[ \t>*+#-]*\(?(?:\d{1,3}|[A-Za-z]|[ivx]{2,4})[.)][ \t]+(?=\S)", re.MULTILINE)
_TEX = re.compile(r"\\(?:begin|end|(?:text)?color)\s*\{[^{}]*\}|\\([A-Za-z]+)")
_SYMBOLS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega infty emptyset"
    " varnothing hbar ell"
)


def plain(text: str) -> str:
    """Without mark-up: entities, tags, fences with their info strings, targets of links, numbers of a list, TeX commands."""
    text = unicodedata.normalize("NFKC", html.unescape(_UNSEEN.sub("", text)))
    closed = {*_HTML.split(), *re.findall(r"</([a-z][\w:.-]*)", text.lower())}  # `<vector>` alone is a word
    text = _TAG.sub(lambda m: m[0] if m[1] and m[1].lower() not in closed else " ", text)
    text = _NUMBERED.sub("", _TARGET.sub("]", _FENCE.sub("", text)))
    return _TEX.sub(lambda m: m[0] if m[1] and m[1].lower() in _SYMBOLS.split() else " ", text)


def _says_nothing(word: str) -> bool:
    return _opener(word) if len(word) < 100 else _opener.__wrapped__(word)  # long ones are not kept


@lru_cache(maxsize=4096)
def _opener(word: str) -> bool:
    latin = _latin(word)
    forms = {word, latin, latin.rstrip("0123456789") if len(latin) > 4 else latin}
    if len(word) > 3 and not word.isdecimal():
        forms |= {latin.translate(digits) for digits in _DIGITS}
    return any(form in OPENERS or _chain(form) for form in map(str.casefold, forms))


def _latin(word: str) -> str:
    """The Latin word that a word looks like, letter by letter; else the word."""
    if word.isascii():
        return word
    twin = "".join(_shape(c) for c in word.translate(_TWINS))
    return twin if twin.isascii() else word


def _shape(char: str) -> str:
    name = unicodedata.name(char, "") if char > "\x7f" else ""
    found = _LATIN.fullmatch(name)
    return char if not found else found[1] if "CAPITAL LETTER" in name else found[1].lower()


def _chain(word: str) -> bool:
    """Openers one after the other without a space."""
    ends = {0}
    for start in range(len(word)):
        if start in ends:
            links = (*_LINKS.get(word[start], ()), *(_GLUE if start else ()))
            ends.update(start + len(link) for link in links if word.startswith(link, start))
    return len(word) in ends


def hollow_field(agent_fields: Sequence[str], fields: Mapping[str, Any], allow: Sequence[str] = ()) -> str:
    """The first of the agent's fields that holds text without content; all together when none holds any. Empty: all is well.

    All is well, too, when one of them, or the field `answer`, equals a reference answer (fields `answers` and `to.reference`) or one of
    `allow`, be it as wordless as it may.
    """
    texts = {name: str(fields.get(name) or "").strip() for name in agent_fields}
    to = fields.get("to")
    golds = fields.get("answers") or (to.get("reference") if isinstance(to, Mapping) else None) or ()
    references = [*(map(str, golds) if isinstance(golds, list | tuple) else ()), *allow]
    said = {*texts.values(), str(fields.get("answer") or "").strip()} - {""} if references and texts else ()
    if any(exact_match(text, references) or folded(text) in map(folded, references) for text in said):
        return ""
    for name, text in texts.items():
        if text and hollow(text):
            return name
    return ", ".join(texts) if texts and not any(texts.values()) else ""
