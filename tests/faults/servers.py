"""Servers that hang, break off, and say what nobody can read: of the teacher's responses, and of a judge."""

import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from answering_server import Answer, Judge, Script, fixed, serving
from command_line import distillm
from distillm import client
from distillm.client import Client
from distillm.errors import ServerError
from distillm.pipeline import distill
from distillm.teacher import _digest
from distillm.types import Example
from faults.outcomes import ERROR_THEN_SAME, SAME, Ledger, Outcome
from test_completions import run_of, written
from test_judge_server import result, write_eval
from tiny_run import materials, rows, same_weights, weights, write_rows

SHORT = {"responses": 1, "judge": 1}
FULL = {"responses": 60, "judge": 40}
TIMEOUT = 0.15
FAULTS = ["hang", "reset", "close", "garbage", "500", "503", "429", "other JSON", "truncated", "torn", "empty", "drip"]


class BrokenOffError(Exception):
    """Ends a connection before there is an answer."""


class Faulty(Judge):
    """A server whose connections can be reset."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A socket that does not linger is closed by a reset.
        request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def harmed(fault: str, good: Answer, draw: random.Random) -> Answer:
    """What goes over the line in place of ``good``."""
    if fault == "reset":
        raise BrokenOffError
    body = json.dumps({"choices": [{"text": "lost", "message": {"content": "lost"}}]}).encode()
    odd = [b"null", b"[]", b'{"choices": []}', b'{"choices": [{"text": 3, "message": 4}]}', b'{"error": "busy"}']
    close = {"Connection": "close", "Content-Length": str(len(body) + 50)}
    later = {"Retry-After": draw.choice(["0", "soon", "-1", "0.01", "Mon, 01 Jan 99999 00:00:00 GMT"])}
    return {
        "hang": lambda: Answer(good.text, good.tokens, before=3 * TIMEOUT),
        "close": lambda: Answer(body=b"", headers=close),
        "garbage": lambda: Answer(body=draw.randbytes(draw.randint(1, 200))),
        "500": lambda: Answer(status=500, body=b"<html>oops</html>"),
        "503": lambda: Answer(status=503, body=b""),
        "429": lambda: Answer(status=429, body=b"{}", headers=later),
        "other JSON": lambda: Answer(body=draw.choice(odd)),
        "truncated": lambda: Answer(body=body, headers=close),
        "torn": lambda: Answer(body=body[: draw.randint(1, len(body) - 1)]),
        "empty": lambda: Answer(body=b""),
        "drip": lambda: Answer(body=body, drip=TIMEOUT / 10),
    }[fault]()


class Chaos:
    """Answers as ``good`` does, but for a part of the requests, which are harmed."""

    def __init__(self, good: Script, share: float, draw: random.Random):
        self.good, self.share, self.draw = good, share, draw
        self.lock = threading.Lock()

    def __call__(self, question: str, before: int) -> Answer:
        with self.lock:
            harm, fault = self.draw.random() < self.share, self.draw.choice(FAULTS)
            answer = self.good(question, before)
            return harmed(fault, answer, self.draw) if harm else answer


@contextmanager
def received() -> Iterator[Counter[str]]:
    """How often an answer to each request has come through: what the server sent may have come too late."""
    found: Counter[str] = Counter()
    original = Client.answer

    async def answer(self: Client[Any], body: Any, name: str) -> Any:
        said = await original(self, body, name)
        found[json.dumps(body.get("prompt", body))] += 1
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "answer", answer)
        yield found


def completion(question: str, _: int) -> Answer:
    """Tokens that are a function of the prompt, and its end."""
    draw = random.Random(question)
    return Answer("", [draw.randrange(3, 290) for _ in range(draw.randint(1, 3))] + [1])


def responses(bench: "Bench", folder: Path, draw: random.Random) -> Outcome:
    """SeqKD on a faulty server, given again until it is done; nothing that was kept is asked again."""
    jobs, outcome = draw.choice([1, 1, 4]), SAME
    chaos = Chaos(completion, draw.choice([0.1, 0.3, 0.6]), draw)
    server_settings = {"jobs": jobs, "timeout": TIMEOUT, "attempts": draw.choice([2, 4])}
    with serving(chaos, Faulty) as server, received() as answers:
        changes = {"data.train": str(bench.many), "data.responses_server": server_settings, "resume": "auto"}
        for _ in range(100):
            chaos.share *= 0.9  # a server that recovers, so that this ends
            kept, before = prompts_in(folder), len(server.asked)
            try:
                distill(run_of(bench.made, folder, server.url, changes))
            except ServerError as error:
                assert error.exit_code == 5
                assert "resume=auto goes on from there" in str(error)
                outcome = ERROR_THEN_SAME
            else:
                break
            finally:
                again = {digest(json.dumps(body["prompt"])) for body in server.asked[before:]} & kept
                assert not again, f"{len(again)} prompts were asked although their responses were kept"
                assert {digest(question) for question in answers} == prompts_in(folder), "an answer was not kept"
        else:
            raise AssertionError("it never ended")
    assert set(answers.values()) == {1}, "an answer that had come was asked for again"
    assert written(folder) == written(bench.trained)
    assert same_weights(weights(folder), weights(bench.trained))
    return outcome


def digest(question: str) -> str:
    """The name of a prompt in the file of responses."""
    prompt = json.loads(question)
    return _digest(Example("", [*prompt, 1], [False] * len(prompt) + [True]))


def prompts_in(folder: Path) -> set[str]:
    """The prompts whose responses are kept, by name."""
    path = folder / "responses.jsonl"
    found = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return {json.loads(line)["prompt"] for line in found}


def judge(bench: "Bench", folder: Path, draw: random.Random) -> Outcome:
    """A judge that is faulty, asked by the same command until it is done."""
    source, outcome = write_eval(folder / "run" / "eval" / "dolly.json", 12, 3), SAME
    jobs = draw.choice([1, 4])
    chaos = Chaos(fixed, draw.choice([0.1, 0.3, 0.6]), draw)
    with serving(chaos, Faulty) as server, received() as answers:
        options = ["--server", server.url, "--model", "m", "--jobs", jobs, "--timeout", TIMEOUT, "--backoff", 0.01]
        for _ in range(100):
            chaos.share *= 0.9
            said = distillm("judge", source, *options, "--attempts", 3, "--max-failed", 0)
            assert "Traceback" not in said.err
            assert said.code in (0, ServerError.exit_code), said.err
            if said.code == 0:
                break
            outcome = ERROR_THEN_SAME
        else:
            raise AssertionError("it never ended")
    assert set(answers.values()) == {1}, "a reply that had come was asked for again"
    found = result(source)
    assert {name: found[name] for name in ("scores", "rows", "failed")} == bench.judged
    return outcome


class Bench:
    """What comes of servers without faults."""

    def __init__(self, folder: Path):
        self.made = materials(folder / "made")
        self.many = write_rows(folder / "many.jsonl", rows(30, 50))
        with serving(completion, Faulty) as server:
            self.trained = distill(run_of(self.made, folder / "trained", server.url, {"data.train": str(self.many)}))
        source = write_eval(folder / "judged" / "eval" / "dolly.json", 12, 3)
        with serving(fixed, Faulty) as server:
            said = distillm("judge", source, "--server", server.url, "--model", "m")
            assert said.code == 0, said.err
        self.judged = {name: result(source)[name] for name in ("scores", "rows", "failed")}


def trouble(ledger: Ledger, folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Faulty servers of each kind as often as ``counts`` says."""
    bench = Bench(folder)
    acts = {"responses": ("a faulty server of responses", responses), "judge": ("a faulty judge", judge)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "LONGEST_PAUSE", 0.01)
        patch.delenv("OPENAI_API_KEY", raising=False)
        for name, (fault, act) in acts.items():
            for number in range(counts[name]):
                draw = random.Random(f"{seed}/{name}/{number}")
                place = folder / f"{name}-{number}"
                ledger.case(
                    fault,
                    lambda act=act, place=place, draw=draw: act(bench, place, draw),
                    f"seed {seed}, case {number}",
                )
