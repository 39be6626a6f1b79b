"""Text rules that all rooms share: answers, words, ids, citations, and the rubric graph.

Invariants: standard library only and quick to import; every function is pure, total on any string and linear in its
length; nothing here knows a tokenizer, a corpus or a judge.

Sources: answer normalisation as Search-R1 (`specs/search_r1.md` 5) in its order; citations, references and rubrics as
CaRR (`specs/carr.md` 1.3, 2.4, 3), with the flaws that the spec lists mended.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

# ----------------------------------------------------------------------------------------------------- answers

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case, delete punctuation (not replaced by a space), drop a/an/the, collapse spaces; in this order.

    On ASCII text exactly Search-R1's rule. Beyond ASCII, composed and decomposed letters are equal, and typographic
    punctuation is deleted like its ASCII kin, so that a curly apostrophe equals a straight one.
    """
    text = text.lower()
    if text.isascii():
        text = text.translate(_NO_PUNCTUATION)
    else:
        text = "".join(c for c in unicodedata.normalize("NFC", text) if not _is_punctuation(c))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """True when the prediction equals any alias after normalisation. Aliases that normalise to nothing never match."""
    predicted = normalize_answer(prediction)
    return bool(predicted) and any(normalize_answer(gold) == predicted for gold in golds)


def folded(text: str) -> str:
    """Text without width, case and outer spaces: equal where two texts differ in nothing else, signs included."""
    return unicodedata.normalize("NFKC", text).casefold().strip()


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Best word-overlap F1 over the aliases, in [0, 1], after normalisation."""
    return max((_f1(normalize_answer(prediction).split(), normalize_answer(g).split()) for g in golds), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation if char < "\x80" else unicodedata.category(char)[0] == "P"


_REFUSALS = frozenset(
    (
        "unknown", "not known", "none", "na", "nil", "no answer", "no answer found", "not found", "answer not found",
        "unanswerable", "undetermined", "undeterminable", "not answerable", "cannot answer", "cant answer", "cannot say",
        "cannot tell", "unable to answer", "not available", "not specified", "not stated", "not enough information",
        "not enough evidence", "insufficient information", "insufficient evidence", "no information",
        "未知", "不详", "不明", "无", "暂无", "无答案", "没有答案", "暂无答案", "信息不足", "资料不足", "证据不足",
    )
)  # fmt: skip
_REFUSAL_ZH = re.compile(
    r"(?:抱歉|很抱歉|对不起|不好意思|很遗憾|遗憾的是)?(?:我们|我)?(?:目前|暂时|现在)?(?:还|也|都)?(?:"
    r"(?:无法|不能|没能|未能|没法|难以)(?:从[^但可也或]{1,12})?(?:确定|确认|回答|判断|得知|获知|找到|查到|给出|提供|得出|知道|知晓|识别|推断|验证)"
    r"|(?:不知道|不清楚|不太清楚|不确定)(?=$|答案|问题|该|这|具体|确切|正确|是|谁|什么|哪|因为|没有|无法|资料|抱歉|大概|可能|也许|但)|(?:没有|没|未)(?:找到|查到|搜到|发现|足够)(?:的|任何|相关|可靠)*(?:答案|信息|资料|结果|证据|线索)"
    r"|(?:该|此|这个|这一|本)?(?:问题|题)(?:的)?(?:答案)?(?:无法|不能)(?:确定|回答|判断)|(?:该|此|问题的)?答案(?:未知|不详|不明|无法确定)"
    r")"
)
_HEDGE_ZH = re.compile(r"但|不过|可能|也许|或许|大概|应该|猜|推测|估计|最接近")
_TRADITIONAL = str.maketrans(
    "無確認斷給對現問題該這個應證據線結測關於遺沒還從發", "无确认断给对现问题该这个应证据线结测关于遗没还从发"
)
_REFUSAL = re.compile(
    r"(?:sorry |unfortunately |i am sorry |im sorry )*(?:but )?(?:"
    r"(?:i|we) (?:do not|dont) (?:know|have enough)"
    r"|(?:i|we) (?:cannot|can not|cant|could not|couldnt|was not able to|were not able to|am unable to|are unable to|was unable to)"
    r" (?:answer|determine|find|identify|tell|say|establish|verify|confirm|conclude)"
    r"|(?:answer|question|this|it)(?: to (?:this|question|this question))? (?:cannot|can not|cant|could not|couldnt) be"
    r" (?:answered|determined|found|identified|established|verified|known)"
    r"|(?:answer|question|this|it)(?: to (?:this|question|this question))? is (?:unknown|not known|unanswerable|not answerable|not found)"
    r"|(?:unable|not possible|impossible) to (?:answer|determine|find|identify|say|tell)"
    r"|(?:there is |there was )?(?:not enough|insufficient|no) (?:information|evidence|data)"
    r" (?:is|was|to|available|found|about|on|that|for|given|provided)"
    r"|no (?:answer|definitive answer) (?:exists|could be|can be|was|is)"
    r")\b"
)
_HEDGE = re.compile(r"\b(?:but|however|although|though|guess|probably|likely|perhaps|maybe|possibly|best estimate)\b")


def is_refusal(text: str) -> bool:
    """True when an exact answer says that there is none: `unknown`, `N/A`, `I cannot determine this`, `无法确定`.

    An empty text is no refusal, and neither is one that goes on to offer an answer (`I do not know, but maybe Paris`).
    """
    said = normalize_answer(text)
    if said == "na":
        return "Na" not in text  # sodium
    if said in _REFUSALS:
        return True
    chinese = "".join(said.split()).translate(_TRADITIONAL)
    if chinese in _REFUSALS:
        return True
    if begun := _REFUSAL_ZH.match(chinese):
        return len(chinese) <= 40 and not _HEDGE_ZH.search(chinese[begun.end() :])
    found = _REFUSAL.match(said)
    return bool(found) and len(said.split()) <= 40 and not _HEDGE.search(said[found.end() if found else 0 :])


# ------------------------------------------------------------------------------------------------------- words

_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts written without spaces: every kana and Han character is a word of its own."""


def words(text: str) -> list[str]:
    """Words in any script, case-folded and compatibility-normalised (full-width letters equal plain ones)."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Vowel signs and accents belong to their word, but `\w` leaves them out; only those that occur are added.
    marks = "".join(sorted(c for c in set(text) if c > "\x7f" and unicodedata.category(c)[0] == "M"))
    return _word_pattern(marks).findall(text)


_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Burmese and Khmer, whose words are not told apart."""


def num_words(text: str) -> float:
    """Length of a text in words, whatever its script: two Han or kana characters are one, and so are five letters of `_UNSPACED`."""
    text = unicodedata.normalize("NFKC", text)
    spaced, han = re.subn(f"[{_SINGLE}]", " ", text)
    spaced, letters = re.subn(f"[{_UNSPACED}]", " ", spaced)
    return len(words(spaced)) + han / 2 + letters / 5


@lru_cache(maxsize=256)
def _word_pattern(marks: str) -> re.Pattern[str]:
    return re.compile(rf"[{_SINGLE}]|(?:(?![{_SINGLE}])[\w{re.escape(marks)}])+")


def ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """All runs of `n` consecutive words; empty when there are fewer than `n`."""
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n > 0 else set()


# --------------------------------------------------------------------------------------------------------- ids

_WRAPPERS = re.compile(r"(?:view-source:|(?:https?://)?r\.jina\.ai/(?=\S))\s*", re.IGNORECASE)
_SCHEME = re.compile(r"https?://(?=[^/?#\s])", re.IGNORECASE)
_WWW = re.compile(r"www\.(?=[^/?#\s])", re.IGNORECASE)


def canonical_id(text: str) -> str:
    """One key for every way to write a page: URLs lose jina prefix, view-source, scheme, www, fragment, trailing slash.

    The host is lower-cased, path and query are kept. A plain document id stays as it is (outer spaces aside).
    """
    key = text.strip()
    while len(key) <= 4096:
        found = _WRAPPERS.match(key)
        if found and found.end() < len(key):
            key = key[found.end() :]
            continue
        found = _SCHEME.match(key) or _WWW.match(key)
        if not found:
            return key
        key = key[found.end() :]
        host = re.match(r"[^/?#]*", key)
        end = host.end() if host else 0
        name = re.sub(r":(?:80|443)$", "", key[:end].lower())
        key = (name + key[end:].partition("#")[0]).rstrip("/").strip() or key
    return key


# --------------------------------------------------------------------------------------------------- citations


@dataclass(frozen=True)
class Citation:
    """One `[number](target)` of a message. `start` and `end` are character offsets of exactly that."""

    number: int
    target: str
    """URL or document id as written, without link title and angle brackets. Compare by `canonical_id`."""
    start: int
    end: int


_LENIENT = re.compile(r"\[{1,2}(\d{1,9})\]{1,2}\(((?:[^()\n]|\([^()\n]*\)){1,2048})\)")
_STRICT = re.compile(r"\[(\d{1,9})\]\(((?:view-source:)?https?://.{0,2048}?)\)(?=[\],])")
_TITLE = re.compile(r"""(?<!\s)\s+(?:"[^"]*"|'[^']*')\s*$""")
_ONE = r"\[{1,2}\d{1,9}\]{1,2}\((?:[^()\n]|\([^()\n]*\)){1,2048}\)"
_CITATION_GROUP = re.compile(rf"(?<![ \t])[ \t]*(?:\[[ \t]{{0,4}})?{_ONE}(?:[ \t]{{0,4}}[,;]?[ \t]{{0,4}}{_ONE})*\]?")
_LOOSE_SPACE = re.compile(r"(?<![ \t])[ \t]+(?=[.,;:!?](?:\s|$))")


def citations(message: str, strict: bool = False) -> list[Citation]:
    """Inline citations, in order. Reference lists are not cut here: see `cut_references`.

    Lenient: `[4](u)` anywhere, also `[[4](u)]`, `[[1](u1), [2](u2)]` and `[[4]](u)`; targets may be any document id.
    Strict: the paper's rule, which takes only http(s) URLs, each directly followed by `]` or `,`.
    """
    found = []
    for match in (_STRICT if strict else _LENIENT).finditer(message):
        target = match.group(2)
        if not strict:
            target = _TITLE.sub("", target).strip()
            target = target[1:-1].strip() if target.startswith("<") and target.endswith(">") else target
        if target:
            outer = 1 if match.group(0).startswith("[[") and "]](" not in match.group(0) else 0
            found.append(Citation(int(match.group(1)), target, match.start() + outer, match.end()))
    return found


_BRACKETS = re.compile(r"\[([^\[\]\n]{1,512})\](?!\()|【([^【】\n]{1,512})】")
_BRACKET_LEAD = re.compile(r"(?:doc(?:ument)?[ _]?id|doc(?:ument)?|id)[ \t]{0,4}[:=#][ \t]{0,4}", re.IGNORECASE)


def bracketed_ids(message: str, known: Collection[str] = ()) -> list[str]:
    """Document ids in `[..]` or `【..】`, in order: `[12]`, `[12, 40]`, `[docid: 12]`, `【12†L3】` (BrowseComp-Plus).

    An entry counts when it is a number, or one of the `known` ids: other words in brackets are no citations. The text of a Markdown
    link is none either.
    """
    keys = {canonical_id(doc_id) for doc_id in known}
    found = []
    for match in _BRACKETS.finditer(message):
        whole = (match.group(1) or match.group(2)).strip()
        for part in [whole] if canonical_id(whole) in keys else re.split(r"[,;，、]", whole):
            entry = part.partition("†")[0].strip()
            entry = entry if canonical_id(entry) in keys else _BRACKET_LEAD.sub("", entry, count=1).strip()
            if entry and (re.fullmatch(r"[0-9]{1,20}", entry) or canonical_id(entry) in keys):
                found.append(entry)
    return found


def cited_ids(message: str, known: Collection[str] = ()) -> list[str]:
    """What a message cites in either form, `[n](target)` or ids in brackets, each document once (by `canonical_id`), links first."""
    targets = [c.target for c in citations(message)] + bracketed_ids(_LENIENT.sub(" ", message), known)
    first: dict[str, str] = {}
    for target in targets:
        first.setdefault(canonical_id(target), target)
    return list(first.values())


def strip_citations(message: str) -> str:
    """The message without its inline citations; spaces before punctuation that they leave behind go too."""
    return _LOOSE_SPACE.sub("", _CITATION_GROUP.sub("", message))


# ---------------------------------------------------------------------------------------------------- sections

# Repeats are bounded, here and above, so that no text of an agent makes a pattern slow.
_OPEN = r"^[ \t]{0,3}(?P<hash>#{1,6}[ \t]{0,4})?(?P<bold>\*\*|__)?[ \t]{0,4}(?:\d{1,2}[.)][ \t]{0,4})?"
_REFERENCES = re.compile(
    _OPEN + r"references?[ \t]{0,4}:?[ \t]{0,4}(?:\*\*|__)?[ \t]{0,4}:?[ \t]{0,4}#{0,6}[ \t]{0,40}$",
    re.IGNORECASE | re.MULTILINE,
)
_EXACT = re.compile(
    _OPEN
    + r"exact[ \t]{1,4}answer[ \t]{0,4}(?P<colon>:)?[ \t]{0,4}(?P<close>\*\*|__)?[ \t]{0,4}(?P<colon2>:)?(?P<rest>[^\n]*)$",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(
    r"^[ \t]{0,3}(?:#{1,6}[ \t]+\S[^\n]*|(?:\*\*|__)[^\n*_]+(?:\*\*|__)[ \t]*:?[ \t]*)$", re.MULTILINE
)


def cut_references(message: str) -> str:
    """The message up to its last heading `References` (any level, bold or plain, any case): lists there do not cite."""
    starts = [match.start() for match in _REFERENCES.finditer(message)]
    return message[: starts[-1]].rstrip() if starts else message


def exact_answer(message: str) -> str:
    """Text of the last section `Exact Answer`, without citations; empty when there is none.

    Any heading level, bold or plain with a colon, any case; the answer may stand on the heading's own line.
    """
    last: re.Match[str] | None = None
    for match in _EXACT.finditer(message):
        marked = match["colon"] or match["colon2"] or (match["close"] and match["bold"])
        if marked or not match["rest"].strip("#*_ \t\r"):  # else a sentence that happens to begin with these words
            last = match
    if last is None:
        return ""
    rest = last["rest"].strip()
    if rest.strip("#*_ \t"):
        answer = rest.removesuffix("**").removesuffix("__") if last["bold"] and not last["close"] else rest
    else:
        body = message[last.end() :].lstrip()
        ends = [m.start() for m in (_REFERENCES.search(body), _later_heading(body)) if m]
        answer = body[: min(ends)] if ends else body
    return strip_citations(answer).strip()


_CONFIDENCE = re.compile(
    r"(?:confidence|置信度)[ \t]{0,4}(?:level|score|rating)?[ \t]{0,4}(?:\([^()\n]{0,20}\))?(?:[ \t]{0,4}between 0[ \t]?%? and 100[ \t]?%?)?"
    r"(?P<apart>[ \t*_:：=]{0,8}(?:(?<=[ \t])[-–—](?=[ \t]))?(?:\r?\n){0,2}[ \t*_]{0,8})"
    r"(?:(?:is|of|at|very|high|medium|moderate|low|about|around|approximately|approx\.|roughly|circa|ca\.|大约|约)[ \t,]{0,2}){0,3}"
    r"[~≈`\[({<\"'*$]{0,4}[ \t]{0,2}"
    r"(?P<number>[0-9]{1,3}(?P<decimals>\.[0-9]{1,9})?)(?![0-9.]*[0-9])[ \t]{0,4}(?:(?P<percent>\\?[%％])|/[ \t]?(?P<out_of>100|10|1)(?![0-9]))?",
    re.IGNORECASE,
)


def stated_confidence(message: str) -> float | None:
    """The last confidence a message states, in percent (0 to 100); None where it states none.

    `Confidence: 85%`, `**Confidence** 85`, `## Confidence` above `85`, `85/100`, `8/10`, `置信度：85%`, `about 80%`, `~85%`, `[85%]`. A decimal up to 1 without a sign is a
    share (`Confidence: 0.85`); a bare `1` is one percent. A number beyond 100 is no confidence, and neither is one that merely follows
    the word (`with confidence 3 of them`).
    """
    stated = None
    for match in _CONFIDENCE.finditer(message):
        value = float(match["number"])
        if match["out_of"]:
            value *= 100 / int(match["out_of"])
        elif match["decimals"] and not match["percent"] and value <= 1:
            value *= 100
        if value <= 100 and (match["apart"].strip(" \t") or match["percent"] or match["out_of"]):
            stated = value
    return stated


def _later_heading(body: str) -> re.Match[str] | None:
    """The next heading; a bold first line is the answer itself, not a heading."""
    for match in _HEADING.finditer(body):
        if match.start() > 0 or match.group(0).lstrip().startswith("#"):
            return match
    return None


# ----------------------------------------------------------------------------------------------------- rubrics

_PLACEHOLDER = re.compile(r"<(E(?:0|[1-9]\d{0,8}))>")
_BROKEN_PLACEHOLDER = re.compile(r"<\s*(?:e\s*\d+|answer|entity[^<>]*)\s*>", re.IGNORECASE)


def placeholders(rubric: str) -> list[str]:
    """Labels such as `E0` in order of first occurrence."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(rubric)))


def fill(rubric: str, values: Mapping[str, str | None]) -> str:
    """The rubric with every known placeholder replaced, in a single pass: a value is never filled again."""
    return _PLACEHOLDER.sub(lambda m: values.get(m.group(1)) or m.group(0), rubric)


def connected(rubrics_entities: Sequence[Collection[str]], supported: Collection[int], root: str = "E0") -> set[int]:
    """Indices of supported rubrics that are linked to `root` through shared entities (CaRR, step 3)."""
    by_entity: dict[str, list[int]] = {}
    for index in sorted(set(supported)):
        for entity in rubrics_entities[index]:
            by_entity.setdefault(entity, []).append(index)
    seen, reached, queue = {root}, set[int](), deque([root])
    while queue:
        for index in by_entity.get(queue.popleft(), ()):
            reached.add(index)
            fresh = [e for e in rubrics_entities[index] if e not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return reached


def validate_rubrics(rubrics: Sequence[str], answers: Sequence[str] = ()) -> list[str]:
    """What is wrong with a task's rubrics, one line each; empty when they can be used.

    Checks that each has a well-formed placeholder, none repeats, `<E0>` occurs, all are linked to it, and none holds
    one of the `answers` (the gold answer and its aliases).
    """
    if not rubrics:
        return ["there are no rubrics"]
    problems: list[str] = []
    seen: dict[str, int] = {}
    entities = [set(placeholders(rubric)) for rubric in rubrics]
    golds = [(answer, words(answer)) for answer in answers]
    for index, rubric in enumerate(rubrics):
        name = f"rubric {index} ({rubric!r})"
        if not entities[index]:
            problems.append(f"{name} has no placeholder such as <E0>")
        broken = [m.group(0) for m in _BROKEN_PLACEHOLDER.finditer(rubric) if not _PLACEHOLDER.fullmatch(m.group(0))]
        if broken:
            problems.append(f"{name} has a malformed placeholder {broken[0]}")
        key = " ".join(rubric.lower().split())
        if key in seen:
            problems.append(f"{name} repeats rubric {seen[key]}")
        seen.setdefault(key, index)
        said = words(rubric)
        leaked = next((answer for answer, gold in golds if gold and tuple(gold) in ngrams(said, len(gold))), None)
        if leaked is not None:
            problems.append(f"{name} gives away the answer {leaked!r}")
    if not any("E0" in found for found in entities):
        problems.append("no rubric names <E0>, the answer")
    else:
        linked = connected(entities, range(len(rubrics)))
        problems += [
            f"rubric {i} ({rubrics[i]!r}) is not linked to <E0>"
            for i in range(len(rubrics))
            if entities[i] and i not in linked
        ]
    return problems


# ---------------------------------------------------------------------------------------------- text of others

_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,64}\|>|<｜[^｜<>\n]{1,64}｜>"
    r"|</?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think|tool_call|tool_calls|tool_response)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>|\[gMASK\]|<sop>"
)
"""How chat templates in use spell the borders of their messages; servers read such spellings wherever they stand."""


def broken_up(text: str, pattern: re.Pattern[str] = _CONTROL) -> str:
    """The text with a space after the first sign of every match, so that no spelling of a control token is left in it.

    The default knows the spellings in common use; who has the tokenizer knows them all.
    """
    return pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def encodable(text: str) -> str:
    """The text with every half of a character (a lone surrogate, which UTF-8 cannot hold) replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")
