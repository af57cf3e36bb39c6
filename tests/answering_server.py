"""A server for tests, of chat completions and of completions: in a thread, answering as a test says, or as a process
that can be killed."""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distillm.judge.cache import key_of
from in_thread import in_thread

KEY = "sk-secret-0123456789abcdef"


@dataclass(frozen=True)
class Answer:
    """What goes over the line; ``body`` as it is, or a completion that says ``text`` and, if asked, ``tokens``."""

    text: str = ""
    tokens: list[int] | None = None
    status: int = 200
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    usage: Mapping[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 7})
    finish: str = "stop"
    scored: Mapping[str, Any] = field(default_factory=dict[str, Any])
    before: float = 0.0
    drip: float = 0.0


Script = Callable[[str, int], Answer]
"""From the question (a prompt as JSON) and how many requests came before, all taken together, to the answer."""


def fixed_grade(text: str) -> int:
    """1 to 10, a function of the question."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 + 1


def fixed(text: str, _: int = 0) -> Answer:
    """A grade, or for a pair a verdict, that is a function of the question."""
    grade = fixed_grade(text)
    verdict = f"Verdict: {['A', 'B', 'tie'][grade % 3]}" if "Verdict: tie" in text else f"Score: {grade}"
    return Answer(f"It could be better.\n\n{verdict}")


class Judge(ThreadingHTTPServer):
    """The server, with all it was asked in ``asked`` and the keys of what it has answered in ``log``."""

    daemon_threads = True
    request_queue_size = 64
    block_on_close = False

    def __init__(self, script: Script, port: int = 0, log: Path | None = None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.script = script
        self.log = log
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            before = len(server.asked)
            server.asked.append(body)
            server.headers.append(dict(self.headers.items()))
            server.paths.append(self.path)
            server.times.append(time.monotonic())
        chat = "messages" in body
        answer = server.script(body["messages"][0]["content"] if chat else json.dumps(body["prompt"]), before)
        time.sleep(answer.before)
        said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        choice = said | {"finish_reason": answer.finish} | dict(answer.scored)
        if body.get("return_token_ids") and answer.tokens is not None:
            choice["token_ids"] = answer.tokens
        usage = {} if answer.usage is None else {"usage": dict(answer.usage)}
        sent = json.dumps({"choices": [choice], **usage}).encode() if answer.body is None else answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(sent)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in [sent] if not answer.drip else [bytes([byte]) for byte in sent]:
            self.wfile.write(part)
            time.sleep(answer.drip)
        if server.log is not None:
            with server.lock, server.log.open("a") as log:
                log.write(key_of(body) + "\n")

    def log_message(self, *_: Any) -> None:
        pass


def serving(script: Script = fixed, kind: type[Judge] = Judge) -> AbstractContextManager[Judge]:
    """A server in a thread of this process."""
    return in_thread(kind(script))


if __name__ == "__main__":  # answering_server.py PORT LOG SECONDS-PER-ANSWER
    delay = float(sys.argv[3])

    def slowly(text: str, _: int) -> Answer:
        time.sleep(delay)
        return fixed(text)

    process = Judge(slowly, int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(f"{process.server_port}\n")
    sys.stdout.flush()
    process.serve_forever(poll_interval=0.02)
