"""The teacher's responses by a server: real HTTP, a real tiny teacher behind it, and servers that fail."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from answering_server import KEY, Answer, Judge, Script, serving
from command_line import done, refused
from distillm.client import Server
from distillm.completions import Completions
from distillm.config import as_yaml, make_run
from distillm.errors import ConfigError, Interrupted, ServerError
from distillm.generation import Sampling, truncated
from distillm.pipeline import distill
from distillm.sweep import cells_of
from distillm.types import Example
from rows import prompts
from tiny import tiny_tokenizer
from tiny_run import Heard, materials, settings

pytest.importorskip("httpx", reason="needs the package httpx, of the extras server and dev")

GREEDY = Sampling(6, temperature=0.0)
END = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def teacher(made: Path) -> Script:
    """Answers as a server that runs the teacher in ``made`` does, whether it is asked by tokens or by text."""
    model: Any = AutoModelForCausalLM.from_pretrained(made / "teacher").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(made / "teacher")
    lock = threading.Lock()

    def script(prompt: str, _: int) -> Answer:
        given = json.loads(prompt)
        ids = tokenizer(given)["input_ids"] if isinstance(given, str) else given
        with lock, torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        tokens = out[0, len(ids) :].tolist()
        cut = tokenizer.eos_token_id not in tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, tokens, finish="length" if cut else "stop")

    return script


def completions(server: Judge | str, **changes: Any) -> Completions:
    url = server if isinstance(server, str) else server.url
    asked = Server(url, jobs=3, timeout=5, attempts=3, backoff=0.01)
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "end_ids": [END], "end_id": END, "num_tokens": 300}
    return Completions(**{"server": asked, "model": "big"} | options | changes)


def run_of(made: Path, folder: Path, server: str | None, changes: dict[str, Any] | None = None) -> Any:
    """A short SeqKD run: by the server, without a teacher of its own, or by the teacher in ``made``."""
    plain = {"method": {"name": "seqkd"}, "data.text": None, "train.steps": 2, "validation.samples": 0}
    found = settings(made, folder, plain | (changes or {}))
    if server is not None:
        del found["teacher"]
        found["data"]["responses_server"] = {"url": server, "model": "big", "attempts": 2} | (
            found["data"].get("responses_server") or {}
        )
    return make_run(found)


def written(folder: Path) -> list[dict[str, Any]]:
    """What is in the file, in the order of the rows: a server's answers are kept as they come."""
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return sorted(rows, key=lambda row: (row["id"].split(":")[0], int(row["id"].split(":")[1])))


@pytest.mark.parametrize("way", ["tokens", "text"])
def test_a_server_with_the_teacher_writes_what_the_teacher_here_writes(made: Path, tmp_path: Path, way: str):
    here = distill(run_of(made, tmp_path / "here", None))
    with serving(teacher(made)) as server:
        there = distill(run_of(made, tmp_path / "there", server.url, {"data.responses_server": {"prompt": way}}))
        again = distill(run_of(made, tmp_path / "there", server.url, {
            "data.responses_server": {"prompt": way}, "resume": "auto", "train.steps": 3,
        }))  # fmt: skip
        assert len(server.asked) == len(written(here))
        assert set(server.paths) == {"/v1/completions"}
        assert {type(body["prompt"]) for body in server.asked} == {list if way == "tokens" else str}
    assert again == there
    assert [row["prompt"] for row in written(there)] == [row["prompt"] for row in written(here)]
    if way == "tokens":
        assert written(there) == written(here)
    else:  # the bytes of an untrained model are other tokens, and more, once they are text
        tokenizer: Any = AutoTokenizer.from_pretrained(made / "teacher")
        anew = [tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in written(here)]
        assert [row["tokens"][:4] for row in written(there)] == [tokens[:4] for tokens in anew]


def test_what_is_asked(made: Path):
    asked = prompts(3, 5)
    tokens = [[*reversed(p.prompt), END] for p in asked]
    with serving(lambda prompt, _: Answer("", [*reversed(json.loads(prompt)), END])) as server:
        found = completions(server)(asked, GREEDY)
        assert [e.response for e in found] == tokens
        assert [e.origin for e in found] == ["teacher", "teacher"]
        plain: dict[str, Any] = {"model": "big", "max_tokens": 6, "temperature": 0.0, "top_p": 1.0}
        plain |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        key = lambda body: len(body["prompt"])  # noqa: E731
        assert sorted(server.asked, key=key) == [plain | {"prompt": p.prompt} for p in asked]
        server.asked.clear()
        sampled = Sampling(6, temperature=0.7, top_k=5, top_p=0.9)
        extra = completions(server, extra={"min_p": 0.1, "return_token_ids": None})
        for _ in range(2):
            extra(asked, sampled, seed=3)
        first, second = (sorted(server.asked[at : at + 2], key=key) for at in (0, 2))
        assert first == second
        assert first[0]["seed"] != first[1]["seed"]
        assert {k: first[0][k] for k in ("temperature", "top_k", "top_p", "min_p")} == {
            "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        }  # fmt: skip
        assert "return_token_ids" not in first[0]
        extra(asked, sampled, seed=4)
        assert sorted(server.asked[4:], key=key)[0]["seed"] != first[0]["seed"]


@pytest.mark.parametrize(
    ("answer", "ends"),
    [
        (Answer("", [5, END, 7]), True),  # what comes after the end is not the response's
        (Answer("", [5, 6]), True),  # stopped by itself, by a server that keeps the end token to itself
        (Answer("", [5, 6], finish="length"), False),
        (Answer("", []), True),
        (Answer("hello"), True),
        (Answer("hello", finish="length"), False),
        (Answer(""), True),
        (Answer("hello hello hello"), False),  # more tokens here than were asked for
    ],
)
def test_a_response_ends_with_an_end_token_unless_it_was_cut(answer: Answer, ends: bool):
    with serving(lambda *_: answer) as server:
        [found] = completions(server)(prompts(3), GREEDY)
    assert truncated(found, [END]) is not ends
    assert found.response.count(END) == ends
    if answer.tokens is None:
        text = tiny_tokenizer().decode(found.response, skip_special_tokens=True)
        assert text == (answer.text if len(found.response) < GREEDY.max_new_tokens else answer.text[: len(text)])


def test_what_the_teacher_alone_reads_is_what_is_sent():
    row = Example("r", [9, 8, 7], [False] * 3, teacher_context=[4, 5])
    with serving(lambda *_: Answer("", [6, END])) as server:
        [found] = completions(server)([row], GREEDY)
    assert server.asked[0]["prompt"] == [4, 5]
    assert found.tokens == [9, 8, 7, 6, END]


def test_busy_servers_and_torn_answers_are_asked_again():
    failing = [Answer(status=503), Answer(body=b'{"choices": [{"text": 3}]}'), Answer(body=b"{")]
    with serving(lambda _, before: failing[before] if before < 2 else Answer("", [6, END])) as server:
        found = completions(server)(prompts(3), GREEDY)
        assert len(server.asked) == 3
    assert found[0].response == [6, END]


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (Answer(status=401), ConfigError, r"data\.responses_server\.key_env"),
        (Answer(status=404), ConfigError, r"data\.responses_server\.url end as it must"),
        (Answer(status=400, body=b'{"error": "no such field"}'), ConfigError, r"no such field\n.*prompt=text"),
        (Answer(status=500), ServerError, r"gave no answer in 3 attempts; the last time: status 500"),
        (Answer(body=b"[]"), ServerError, r"what came is no completion"),
        (Answer(body=b'{"choices": [{"text": "a", "token_ids": [true]}]}'), ServerError, r"no completion"),
        (Answer("", [300]), ConfigError, r"wrote token 300, .*do not share a tokenizer.*prompt=text"),
    ],
)
def test_a_server_that_cannot_be_used_says_what_to_do(answer: Answer, error: type[Exception], said: str):
    with serving(lambda *_: answer) as server, pytest.raises(error, match=f"(?s){said}"):
        completions(server)(prompts(3, 4, 5, 6), GREEDY)


def test_the_command_line_says_it_without_a_traceback(made: Path, tmp_path: Path):
    run = tmp_path / "run.yaml"
    with serving(lambda *_: Answer(status=422)) as server:
        run.write_text(as_yaml(run_of(made, tmp_path / "run", server.url)), encoding="utf-8")
        said = refused("train", run)
    assert "the server refuses, status 422" in said
    assert "Traceback" not in said


def test_what_was_written_before_the_server_went_is_kept(made: Path, tmp_path: Path):
    script, changes = teacher(made), {"data.responses_server": {"jobs": 1}, "generation.batch_size": 1}
    with (
        serving(lambda prompt, before: script(prompt, before) if before < 10 else Answer(status=400)) as server,
        pytest.raises(ConfigError, match="the server refuses"),
    ):
        distill(run_of(made, tmp_path / "run", server.url, changes))
    kept = written(tmp_path / "run")
    assert len(kept) == 10  # to the last answer
    with serving(script) as server:
        folder = distill(run_of(made, tmp_path / "run", server.url, changes | {"resume": "auto"}))
        assert len(server.asked) == 12 - 10
    assert written(folder)[:10] == kept


def test_the_user_does_not_wait_for_a_server_that_hangs():
    stop = threading.Event()

    def progress(_: int) -> None:
        if stop.is_set():
            raise Interrupted("stopped")

    began = time.monotonic()
    with serving(lambda *_: Answer("", [6, END], before=3)) as server:
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Interrupted):
            completions(server)(prompts(3, 4), GREEDY, progress=progress)
    assert time.monotonic() - began < 2.5


def test_the_key_is_sent_and_never_written(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", KEY)
    display = Heard()
    with serving(teacher(made)) as server:
        folder = distill(
            run_of(made, tmp_path / "run", server.url, {"data.responses_server": {"key_env": "MY_KEY"}}), display
        )
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert not any(KEY in text for text in display.said)
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "kd"}}, r"teacher\.path is missing, and method kd needs"),
        ({"data.responses_server": {"body": {"stream": True}}}, r"body: stream cannot be set there"),
        ({"data.responses_server": {"body": {"temperature": 0.5}}}, r"body: temperature cannot be set there"),
        ({"method": {"name": "kd"}, "data.responses": "teacher"}, r"teacher\.path is missing, and method kd needs"),
        ({"data.responses_server": {"jobs": 0}}, r"jobs"),
        ({"data.responses_server": {"keys": "a"}}, r"keys"),
    ],
)
def test_settings_that_do_not_fit_are_refused(made: Path, tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        run_of(made, tmp_path / "run", "http://127.0.0.1:1/v1", changes)


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000/v1", "http://user:secret@host/v1", "http://host/v1?key=1", "http://h:port/v1", "http://[::1/v1"],
)
def test_an_address_that_is_none_is_said_before_any_work(made: Path, tmp_path: Path, url: str):
    with pytest.raises(ConfigError, match=r"data\.responses_server(: url|\.url).*(write http|is no address)") as caught:
        distill(run_of(made, tmp_path / "run", url))
    assert "secret" not in str(caught.value)


def test_a_model_with_another_tokenizer_is_found_out_by_its_text():
    with serving(lambda *_: Answer("what its tokens mean there", [5, 6, END])) as server:
        kept: list[Example] = []
        with pytest.raises(ConfigError, match=r"does not have the student's tokenizer.*prompt=text"):
            completions(server)(prompts(*range(3, 13)), GREEDY, keep=kept.extend)
        assert kept == []
        [found] = completions(server, prompt="text")(prompts(3), GREEDY)  # where it does not matter
    assert found.response[:2] != [5, 6]


def test_it_is_asked_where_something_runs_already():
    async def notebook(server: Judge) -> list[Example]:
        return completions(server)(prompts(3), GREEDY)

    with serving(lambda *_: Answer("", [6, END])) as server:
        [found] = asyncio.run(notebook(server))
    assert found.response == [6, END]


def test_a_server_that_no_method_needs_is_not_asked(made: Path, tmp_path: Path):
    display = Heard()
    with serving(teacher(made)) as server:
        distill(run_of(made, tmp_path / "run", server.url, {"method": {"name": "sft"}}), display)
        assert server.asked == []
    assert any("responses_server is not asked: method sft" in text for text in display.said)


def test_what_the_server_reads_in_place_of_the_students_prompt(made: Path, tmp_path: Path):
    with serving(teacher(made)) as server:
        changes = {
            "data.responses_server": {"prompt": "text"},
            "data.teacher_template": "Be brief. {{ instruction }}\n",
        }
        distill(run_of(made, tmp_path / "run", server.url, changes))
        assert all(body["prompt"].startswith("Be brief. Say ") for body in server.asked)


def test_a_finished_run_answers_prompts_without_the_server(made: Path, tmp_path: Path):
    with serving(teacher(made)) as server:
        folder = distill(run_of(made, tmp_path / "run", server.url))
    assert done("generate", folder, "Say one two.", "--max-new-tokens", 2) is not None


def test_a_sweep_keeps_the_responses_of_each_served_model_apart(made: Path, tmp_path: Path):
    wanted = tmp_path / "base.yaml"
    with serving(teacher(made)) as server:
        wanted.write_text(as_yaml(run_of(made, tmp_path / "sweep", server.url)), encoding="utf-8")
        cells = cells_of(str(wanted), ["data.responses_server.model=a,b", "seed=1,2"])
    files = [str(cell.run.data.responses_file) for cell in cells]
    assert len(set(files)) == 2
    assert len(files) == 4


def test_fine_tuning_on_a_servers_responses_needs_no_teacher(made: Path, tmp_path: Path):
    with serving(teacher(made)) as server:
        changes = {"method": {"name": "sft"}, "data.responses": "teacher"}
        folder = distill(run_of(made, tmp_path / "run", server.url, changes))
    assert len(written(folder)) == 12 + 4
    assert (folder / "student" / "model.safetensors").is_file()
