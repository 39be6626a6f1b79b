"""A judge without a model: an OpenAI-compatible chat endpoint on loopback that answers Gumshoe's judge prompts by simple rules.

`with ChatServer() as server: ... server.url ...`, or as a process: `python -m tests.support.chat_server --port 8000`.

It reads the data blocks of the prompt, as a model would, and nothing else: no oracle, no gold entities beyond the reference
answers that the prompt shows. Its rules, all on words after lower-casing and without punctuation:
- outcome: the answer is the marked one if it is short, else the section "Exact Answer", else the message itself when it is short;
  it is right when it equals a reference answer.
- carr_identify: <E0> is that answer; any other label is whatever word the message puts in the label's place in a statement.
- control: any two texts mean the same.
- carr_support: a statement holds when every word of it, save for common verbs, stands on one of the pages.
A request it does not know is answered with status 400. What it was asked is counted by prompt in `asked` and at `/stats`.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "local"
LONGEST_ANSWER = 12
"""Words; more is no short answer, nor is a text of more than 100 characters."""
GLUE = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was of to by on in and or package packages described as belongs belong section maintained depends",
    )
)
_BLOCK = re.compile(r'<data field="(\w+)" id="(\w+)">\n(.*?)\n</data id="\2">', re.DOTALL)


class Unknown(ValueError):
    """Not a request this judge understands."""


Verdict = tuple[str, dict[str, Any]]
"""Reasons, and the verdict they lead to."""


def judge(prompt: str) -> tuple[str, Verdict]:
    """The prompt's kind and the verdict, from the prompt's text alone. Raises Unknown."""
    fields = {name: text for name, _, text in _BLOCK.findall(prompt)}
    for kind, needs, rule in RULES:
        if needs <= fields.keys():
            return kind, rule(fields)
    raise Unknown(f"no judge prompt that holds the fields {', '.join(sorted(fields)) or '(none)'}")


def outcome(fields: Mapping[str, str]) -> Verdict:
    found = final_answer(fields["message"], fields["answer"])
    references = numbered(fields["answers"])
    if found is None:
        return "The message commits to no short answer.", {"extracted_answer": None, "correct": False}
    right = plain(found) in {plain(a) for a in references}
    reasons = (
        f"The message answers {found!r}, which {'equals' if right else 'is not'} {' or '.join(map(repr, references))}."
    )
    return reasons, {"extracted_answer": found, "correct": right}


def identify(fields: Mapping[str, str]) -> Verdict:
    labels = numbered(fields["labels"])
    found: dict[str, str | None] = dict.fromkeys(labels)
    for label in labels:
        named = {
            name for rubric in numbered(fields["rubrics"]) for name in _in_place_of(label, rubric, fields["message"])
        }
        if len(named) == 1:  # two names for one label: not stated without ambiguity
            found[label] = named.pop()
    if "E0" in found:
        found["E0"] = final_answer(fields["message"], "") or found["E0"]
    named_all = [f"{label} is {name!r}" for label, name in found.items() if name]
    return f"The message says: {'; '.join(named_all) or 'no label is named'}.", found


def support(fields: Mapping[str, str]) -> Verdict:
    pages = [set(plain(page).split()) for page in re.split(r"^\[Page ", fields["pages"], flags=re.MULTILINE)]
    statements = [line.partition(": ") for line in fields["statements"].splitlines() if re.match(r"S\d+: ", line)]
    needed = {key: set(plain(text).split()) - GLUE for key, _, text in statements}
    holds = {key: bool(words) and any(words <= page for page in pages) for key, words in needed.items()}
    missing = {k: min((sorted(words - page) for page in pages), key=len) for k, words in needed.items() if not holds[k]}
    reasons = [f"{key}: no page has {', '.join(words) or 'anything of it'}" for key, words in missing.items()]
    return f"{'; '.join(reasons) or 'All statements stand on a page'}.", holds


def control(fields: Mapping[str, str]) -> Verdict:
    return "Both texts were read.", {"same": True}


RULES: tuple[tuple[str, frozenset[str], Callable[[Mapping[str, str]], Verdict]], ...] = (
    ("outcome", frozenset({"question", "message", "answer", "answers"}), outcome),
    ("carr_identify", frozenset({"rubrics", "labels", "message"}), identify),
    ("carr_support", frozenset({"statements", "pages"}), support),
    ("control", frozenset({"first", "second"}), control),
)


def final_answer(message: str, marked: str) -> str | None:
    """The short answer a message commits to, or None."""
    section = re.search(r"^\W*exact answer\W*$\s*(.+)", message, re.IGNORECASE | re.MULTILINE)
    for candidate in (marked, section[1] if section else "", message):
        if 0 < len(plain(candidate).split()) <= LONGEST_ANSWER and len(candidate) <= 100:
            return candidate.strip().strip("*_` ")
    return None


def _in_place_of(label: str, rubric: str, message: str) -> list[str]:
    """What stands in the message where the label stands in the rubric; other labels may be anything."""
    if f"<{label}>" not in rubric:
        return []
    parts = [_part(piece, label) for piece in re.split(r"(<E\d+>)", rubric.strip().rstrip("."))]
    return [re.sub(r"^\W+|\W+$", "", match[1]) for match in re.finditer("".join(parts), message, re.IGNORECASE)]


def _part(piece: str, label: str) -> str:
    if piece == f"<{label}>":
        return r"(\S+)"
    return r"\S+" if re.fullmatch(r"<E\d+>", piece) else r"\s+".join(re.escape(w) for w in re.split(r"\s+", piece))


def numbered(text: str) -> list[str]:
    """The entries of a numbered list."""
    return [m[1].strip() for m in re.finditer(r"^\d+\. (.*)$", text, re.MULTILINE)]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


class ChatServer:
    """The endpoint in a thread of this process; ends with the block. Port 0 takes a free one."""

    def __init__(self, port: int = 0, model: str = MODEL) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self, model))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="chat-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def asked(self) -> dict[str, int]:
        """Requests by prompt; `refused` are those with status 400."""
        with self._lock:
            return dict(self._counts)

    def count(self, kind: str) -> None:
        with self._lock:
            self._counts[kind] += 1

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def join(self) -> None:
        """Until the process is interrupted."""
        self._thread.join()


def _handler(owner: ChatServer, model: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "local"}]})
            elif self.path == "/stats":
                self._send(200, owner.asked)
            else:
                self._fail(404, f"there is no {self.path}")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/v1/chat/completions":
                return self._fail(404, f"there is no {self.path}")
            try:
                request = json.loads(body)
                prompt = "\n\n".join(str(m["content"]) for m in request["messages"])
                kind, (reasons, verdict) = judge(prompt)
                form = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
                wrapped = form is None or "verdict" in form.get("properties", {})
                reply = {"reasons": reasons, "verdict": verdict} if wrapped else verdict
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                owner.count("refused")
                return self._fail(400, str(error))
            owner.count(kind)
            text = json.dumps(reply, ensure_ascii=False)
            used = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
            message = {"role": "assistant", "content": text}
            self._send(200, {
                "id": f"chatcmpl-{sum(owner.asked.values())}", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                "usage": used | {"total_tokens": sum(used.values())},
            })  # fmt: skip

        def _fail(self, status: int, message: str) -> None:
            self._send(status, {"error": {"message": message, "type": "invalid_request_error"}})

        def _send(self, status: int, value: Any) -> None:
            body = json.dumps(value, ensure_ascii=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A local judge behind the OpenAI chat interface; it judges by rules.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--served-model-name", default=MODEL, help="as `vllm serve` has it, whose other arguments do nothing"
    )
    arguments, _ = parser.parse_known_args(argv)
    with ChatServer(arguments.port, arguments.served_model_name) as server:
        print(f"{server.url} (model {arguments.served_model_name}); /stats counts requests", flush=True)
        try:
            server.join()
        except KeyboardInterrupt:
            print(json.dumps(server.asked))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
