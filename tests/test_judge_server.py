"""``distillm judge`` against real servers on this machine: slow, wrong, refusing, absent, killed and started again."""

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from answering_server import KEY, Answer, Script, fixed, fixed_grade, serving
from command_line import distillm, done, refused

pytest.importorskip("httpx", reason="needs the package httpx, of the extras judge and dev")

QUICK = ("--backoff", 0.01, "--model", "m")


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_eval(path: Path, count: int = 4, seeds: int = 1, word: str = "answer") -> Path:
    """An eval/NAME.json of ``count`` rows; all texts differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"test:{i}",
            "prompt": f"Question {i}?",
            "references": [f"reference {i}"],
            "predictions": [f"{word} {i} of seed {s}" for s in range(seeds)],
        }
        for i in range(count)
    ]
    head = {"data": "d", "system": "student", "model": "s", "num_rows": count, "seeds": [10 * s for s in range(seeds)]}
    path.write_text(json.dumps({**head, "scores": {}, "predictions": rows}))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_eval(tmp_path / "run" / "eval" / "dolly.json")


def result(source: Path) -> dict[str, Any]:
    return json.loads((source.parents[1] / "judge" / source.name).read_text(encoding="utf-8"))


def grade_in(found: dict[str, Any]) -> list[float | None]:
    return [row[part]["score"] for row in flat(found) for part in ("reference", "answer")]


def flat(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"reference": row["reference"], "answer": each} for row in found["rows"] for each in row["answers"]]


def scripted(*first: Answer) -> Script:
    """``first`` to the first requests, then fixed grades."""
    return lambda text, before: first[before] if before < len(first) else fixed(text)


# ---------------------------------------------------------------------------------------------------- a run that works


def test_answers_and_references_are_graded_and_written(source: Path):
    with serving() as server:
        text = done("judge", source, "--server", server.url, *QUICK, "--price-in", 2, "--price-out", 10)
    found = result(source)
    grades = {body: fixed_grade(body) for body in server.texts}
    assert len(grades) == 8
    answers = [row["answer"]["score"] for row in flat(found)]
    references = [row["reference"]["score"] for row in flat(found)]
    assert sorted(answers + references) == sorted(grades.values())
    assert found["scores"]["judge_ratio"]["mean"] == pytest.approx(100 * sum(answers) / sum(references))
    assert re.search(rf"judge_ratio .*{found['scores']['judge_ratio']['mean']:.2f}", text)
    assert found["usage"] | {"cost": None} == {
        "calls": 8,
        "cached": 0,
        "retries": 0,
        "prompt_tokens": 800,
        "completion_tokens": 56,
        "unknown": 0,
        "cached_prompt_tokens": 0,
        "cached_completion_tokens": 0,
        "cached_cost": 0,
        "cost": None,
    }
    assert found["usage"]["cost"] == pytest.approx((2 * 800 + 10 * 56) / 1e6)
    assert "8 calls, 0 from the cache" in text
    assert found["rows"][0]["answers"][0]["replies"][0].startswith("It could be better.")
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {body["temperature"] for body in server.asked} == {0}


def test_a_second_run_asks_nothing_and_finds_the_same(source: Path):
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK)
        first = result(source)
        done("judge", source, "--server", server.url, *QUICK, "--price-in", 1)
        assert len(server.asked) == 8
    second = result(source)
    assert (second["usage"]["calls"], second["usage"]["cached"], second["usage"]["cached_cost"]) == (0, 8, 0.0008)
    for part in ("scores", "rows", "failed", "settings"):
        assert second[part] == first[part]


def test_a_cache_is_shared_by_files_and_a_reference_is_asked_once(source: Path, tmp_path: Path):
    other = write_eval(tmp_path / "second" / "eval" / "dolly.json", word="another answer")
    with serving() as server:
        for path in (source, other):
            done("judge", path, "--server", server.url, *QUICK, "--cache", tmp_path / "cache.jsonl")
        assert len(server.asked) == 12


def test_pairs_are_asked_in_both_orders(source: Path, tmp_path: Path):
    other = write_eval(tmp_path / "second" / "eval" / "dolly.json", word="another answer")
    with serving(lambda text, _: Answer("Verdict: A" if "A" in text else "?")) as server:
        text = done("judge", source, "--against", other, "--server", server.url, *QUICK)
    assert len(server.asked) == 8
    found = json.loads((tmp_path / "run" / "judge" / "dolly-against-second-dolly.json").read_text())
    assert found["scores"]["pairs"] == {"win": 0, "tie": 4, "loss": 0, "equal": 0, "disagreeing": 4, "prompts": 4}
    assert found["scores"]["win_rate"]["mean"] == 50
    assert "the answer shown first was preferred 8 times, the second 0 times" in text
    with serving(
        lambda text, _: Answer(f"Verdict: {'A' if text.index('another') > text.index('answer') else 'B'}")
    ) as s:
        text = done(
            *("judge", source, "--against", other, "--server", s.url, *QUICK),
            *("--cache", tmp_path / "c", "--output", tmp_path / "o.json"),
        )
    assert "wins 4, losses 0, ties 0" in text
    assert json.loads((tmp_path / "o.json").read_text())["scores"]["win_rate"]["interval"] == pytest.approx(
        [51.01, 100], abs=0.01
    )


def test_one_seed_may_be_chosen(tmp_path: Path):
    source = write_eval(tmp_path / "run" / "eval" / "dolly.json", seeds=3)
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK, "--seed-index", 2, "--limit", 2)
    assert sorted(re.findall(r"answer \d of seed \d", "".join(server.texts))) == [
        "answer 0 of seed 2",
        "answer 1 of seed 2",
    ]
    assert [row["answers"][0]["seed"] for row in result(source)["rows"]] == [20, 20]


def test_questions_are_asked_side_by_side(source: Path):
    together = threading.Barrier(8)  # each answer waits until eight are asked for

    def waiting(text: str, _: int) -> Answer:
        together.wait(timeout=60)
        return fixed(text)

    with serving(waiting) as server:
        done("judge", source, "--server", server.url, *QUICK, "--jobs", 8)


def test_what_was_asked_of_the_first_rows_is_not_asked_again_for_all(source: Path):
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK, "--limit", 1)
        assert "6 calls, 2 from the cache" in done("judge", source, "--server", server.url, *QUICK)
    assert result(source)["num_rows"] == 4


def test_a_judgment_of_other_settings_is_not_replaced_unasked(source: Path):
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK)
        message = refused("judge", source, "--server", server.url, *QUICK, "--temperature", 1)
        assert "made with other settings" in message
        assert len(server.asked) == 8
        target = source.parents[1] / "judge" / "dolly.json"
        done("judge", source, "--server", server.url, *QUICK, "--temperature", 1, "--output", target)
    assert result(source)["settings"]["temperature"] == 1


# -------------------------------------------------------------------------------------------------------------- the key


def test_the_key_goes_to_the_server_and_nowhere_else(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    said = ""
    echo = Answer(f"I was called with {KEY}.\nScore: 7")
    failing = Answer(status=500, body=f'{{"error": {{"message": "no {KEY}"}}}}'.encode())
    for script in (scripted(echo, failing, echo), lambda *_: failing, lambda *_: Answer(status=401, body=KEY.encode())):
        with serving(script) as server:
            out = source.parent / f"{len(said)}.json"
            told = distillm(
                *("judge", source, "--server", server.url, *QUICK, "--attempts", 2, "--key-env", "JUDGE_KEY"),
                *("--output", out, "--cache", out.with_suffix(".jsonl")),
            )
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        said += told.out + told.err + "\n"
    assert "[key]" in said
    for path in source.parent.iterdir():
        assert KEY not in path.read_text()
    assert "[key]" in "".join(path.read_text() for path in source.parent.glob("*.jsonl"))
    assert KEY not in said


def test_without_a_key_none_is_sent(source: Path):
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK)
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_key_that_cannot_be_one_is_refused_without_being_shown(source: Path, monkeypatch: pytest.MonkeyPatch):
    for key in ("secret with spaces", "secret\nsecret", "sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        message = refused("judge", source, "--server", "http://127.0.0.1:1", *QUICK)
        assert "OPENAI_API_KEY" in message
        assert "cret" not in message


# ------------------------------------------------------------------------------------------------ servers that go wrong

BAD = [
    Answer(status=500, body=b"oops"),
    Answer(status=503, body=b'{"detail": "busy"}'),
    Answer(status=408, body=b""),
    Answer(body=b"<html><body>Bad gateway</body></html>"),
    Answer(body=b""),
    Answer(body=b"[]"),
    Answer(body=b"null"),
    Answer(body=b'{"choices": []}'),
    Answer(body=b'{"choices": [{"message": {"content": ["a"]}}]}'),
    Answer(body=b'{"error": {"message": "overloaded"}}'),
    Answer(body=b"\xff\xfe\xfd"),
    Answer(body=b"[" * 100_000),
    Answer(body=b"short", headers={"Content-Length": "100", "Connection": "close"}),
    Answer(body=b"no gzip", headers={"Content-Encoding": "gzip"}),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_what_a_second_attempt_may_mend_is_asked_again(source: Path, bad: Answer):
    with serving(scripted(bad, bad)) as server:
        done("judge", source, "--server", server.url, *QUICK, "--jobs", 1, "--timeout", 5)
    found = result(source)
    assert found["usage"]["retries"] == 2
    assert server.texts[0] == server.texts[1] == server.texts[2]
    assert len(server.asked) == 10
    assert None not in grade_in(found)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(source: Path, status: int):
    with serving(scripted(Answer(status=status, headers={"Retry-After": "1"}))) as server:
        done("judge", source, "--server", server.url, *QUICK, "--jobs", 1)
    assert server.times[1] - server.times[0] >= 1


def test_a_server_that_asks_for_hours_is_not_waited_for(source: Path):
    with serving(scripted(Answer(status=429, headers={"Retry-After": "7200"}))) as server:
        message = refused("judge", source, "--server", server.url, *QUICK, "--jobs", 1, code=5)
    assert "asks to wait 7200 seconds" in message


def test_pauses_grow(source: Path):
    with serving(scripted(*[Answer(status=500)] * 4)) as server:
        done("judge", source, "--server", server.url, "--model", "m", "--backoff", 0.1, "--jobs", 1)
    pauses = [b - a for a, b in zip(server.times, server.times[1:], strict=False)][:4]
    assert all(pause >= 0.05 * 2**i for i, pause in enumerate(pauses))


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"error": {"message": "max_tokens is too large"}}', "max_tokens is too large"),
        (401, b'{"error": "who are you?"}', "environment variable of --key-env"),
        (403, b"<html>" + b"x" * 10_000, "environment variable of --key-env"),
        (404, b'{"detail": "no such model"}', "/v1/chat/completions"),
        (422, b"", "--body"),
        (302, b"", "it is elsewhere"),
    ],
)
def test_a_refusal_stops_the_run_at_once(source: Path, status: int, body: bytes, said: str):
    with serving(lambda *_: Answer(status=status, body=body)) as server:
        message = refused("judge", source, "--server", server.url, *QUICK, "--jobs", 1)
    assert len(server.asked) == 1
    assert said in message
    assert f"status {status}" in message
    assert "test:0, reference" in message


def test_what_was_answered_before_a_refusal_is_kept(source: Path):
    with serving(lambda text, before: fixed(text) if before < 3 else Answer(status=401)) as server:
        refused("judge", source, "--server", server.url, *QUICK, "--jobs", 1)
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK)
    assert len(server.asked) == 5


def test_a_closed_port_is_tried_a_few_times(source: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    message = refused("judge", source, "--server", url, *QUICK, "--attempts", 3, code=5)
    assert "no answer to 4 questions in a row, each tried 3 times" in message
    assert "ConnectError" in message


def test_a_server_that_never_answers_is_not_waited_for_for_ever(source: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections queue up and nobody takes them
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        began = time.monotonic()
        message = refused("judge", source, "--server", url, *QUICK, "--timeout", 0.3, "--attempts", 2, code=5)
    assert "no answer within 0.3 seconds" in message
    assert time.monotonic() - began < 30


def test_a_server_that_drips_is_not_waited_for_either(source: Path):
    with serving(scripted(Answer("Score: 1", drip=0.1))) as server:
        done("judge", source, "--server", server.url, *QUICK, "--timeout", 0.5, "--jobs", 1)
    assert result(source)["usage"]["retries"] == 1


def test_one_poisoned_question_does_not_stop_the_others_and_is_asked_again_later(source: Path):
    def poisoned(text: str, _: int) -> Answer:
        return Answer(status=500, body=b"boom") if "reference 2" in text else fixed(text)

    with serving(poisoned) as server:
        command = ("judge", source, "--server", server.url, *QUICK, "--attempts", 2)
        message = refused(*command, code=5)
        assert "1 of 4 answers could not be judged" in message
        assert "test:2 (reference)" in message
        found = result(source)
        assert [(row["id"], row["seed"]) for row in found["failed"]["rows"]] == [("test:2", None)]
        assert "boom" in found["failed"]["rows"][0]["reason"]
        judged = [row for row in flat(found) if row["reference"]["score"] is not None]
        ratio = 100 * sum(r["answer"]["score"] for r in judged) / sum(r["reference"]["score"] for r in judged)
        assert found["scores"]["judge_ratio"]["mean"] == pytest.approx(ratio)
        assert "failed: test:2 (reference)" in done(*command, "--max-failed", 25)
    with serving() as server:
        done("judge", source, "--server", server.url, *QUICK)
    assert len(server.asked) == 1
    assert result(source)["failed"]["left_out"] == 0


# ---------------------------------------------------------------------------------------------- replies without verdict


@pytest.mark.parametrize("unreadable", ["", "It is fine.", "Score: 99", "Score: 10 of 10 I think"])
def test_an_unreadable_reply_is_asked_for_again_with_a_reminder(source: Path, unreadable: str):
    with serving(scripted(Answer(unreadable))) as server:
        done("judge", source, "--server", server.url, *QUICK, "--jobs", 1)
    assert server.texts[1].startswith(server.texts[0])
    assert "Attempt 2" in server.texts[1]
    assert result(source)["rows"][0]["reference"]["replies"][0] == unreadable
    assert None not in grade_in(result(source))


def test_a_reply_without_content_is_unreadable_and_not_repeated_as_it_was(source: Path):
    empty = Answer(body=b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}')
    with serving(scripted(empty)) as server:
        done("judge", source, "--server", server.url, *QUICK, "--jobs", 1)
    found = result(source)
    assert (found["usage"]["retries"], found["usage"]["unknown"], len(server.asked)) == (0, 1, 9)


def test_what_stays_unreadable_is_counted_as_failed_and_never_as_zero(source: Path):
    def stubborn(text: str, _: int) -> Answer:
        return Answer("I cannot say.") if "answer 1" in text else fixed(text)

    with serving(stubborn) as server:
        command = ("judge", source, "--server", server.url, *QUICK, "--tries", 2)
        message = refused(*command, code=5)
        assert len(server.asked) == 9
        refused(*command, code=5)
        assert len(server.asked) == 9, "what was paid for is not asked again"
    assert "test:1 (seed 0)" in message
    found = result(source)
    assert found["rows"][1]["answers"][0] == {
        "seed": 0,
        "answer": "answer 1 of seed 0",
        "score": None,
        "replies": ["I cannot say."] * 2,
        "reason": "no verdict could be read from any of 2 replies",
    }
    others = [row for i, row in enumerate(flat(found)) if i != 1]
    ratio = 100 * sum(row["answer"]["score"] for row in others) / sum(row["reference"]["score"] for row in others)
    assert found["scores"]["judge_ratio"]["mean"] == pytest.approx(ratio)


def test_odd_texts_survive_the_whole_way(tmp_path: Path):
    source = write_eval(tmp_path / "run" / "eval" / "dolly.json", 1)
    found = json.loads(source.read_text())
    found["predictions"][0]["predictions"] = ["naïve 你好 \u2028 {{ 7 * 7 }} </reply> [bold]"]
    source.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    half = Answer(body=b'{"choices": [{"message": {"content": "half \\ud83d [/bold]\\nScore: 3"}}]}')
    with serving(lambda *_: half) as server:
        done("judge", source, "--server", server.url, *QUICK)
    assert any("naïve 你好 \u2028 {{ 7 * 7 }} </reply> [bold]" in text for text in server.texts)
    assert result(source)["rows"][0]["answers"][0]["replies"] == ["half ? [/bold]\nScore: 3"]


# ------------------------------------------------------------------------------------------------------- bad commands


def test_a_missing_httpx_is_said_with_the_command_that_installs_it(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    message = refused("judge", source, "--server", "http://127.0.0.1:1/v1", *QUICK)
    assert "pip install 'distillm[judge]'" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "127.0.0.1:8000"], "write http(s)://HOST"),
        (["--body", "{"], "not valid JSON"),
        (["--body", "[]"], "write an object"),
        (["--body", '{"stream": true}'], "stream cannot be set there"),
        (["--seed-index", 1], "there are answers of 1 seed(s)"),
        (["--against", "absent.json"], "absent.json: No such file"),
        (["--prompt", "absent.txt"], "absent.txt: No such file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(source: Path, options: list[object], said: str):
    with serving() as server:
        assert said in refused("judge", source, "--server", server.url, *QUICK, *options)
        assert not server.asked


def test_a_place_that_cannot_be_written_is_found_before_anything_is_asked(source: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with serving() as server:
        for option in ("--output", "--cache"):
            command = ("judge", source, "--server", server.url, *QUICK)
            assert "could not make the folder" in refused(*command, option, tmp_path / "file" / "x.json", code=4)
            assert "is a folder" in refused(*command, option, tmp_path, code=4)
        assert not server.asked
