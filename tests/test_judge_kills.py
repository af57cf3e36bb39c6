"""Judge and server as two processes, each killed half-way: what was answered is not asked again, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from answering_server import KEY, Answer, serving
from test_judge_server import write_eval

pytest.importorskip("httpx", reason="needs the package httpx, of the extras judge and dev")

HERE = Path(__file__).parent
ROWS, SEEDS = 12, 3
QUESTIONS = ROWS * (SEEDS + 1)
JOBS = 4
PATIENT = ("--attempts", "20", "--backoff", "0.1")


@contextmanager
def server(log: Path, port: int = 0, delay: float = 0.03) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server process that logs the questions it has answered; killed at the end, if not before."""
    command = [sys.executable, str(HERE / "answering_server.py"), str(port), str(log), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def judge(source: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A judge process; killed at the end, if it has not ended."""
    command = [sys.executable, "-m", "distillm", "judge", str(source), "--server", f"http://127.0.0.1:{port}/v1"]
    command += ["--model", "m", "--jobs", str(JOBS), *(options or PATIENT)]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    assert KEY not in out + err
    return out + err


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def answered(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def cached(source: Path) -> list[str]:
    path = source.parents[1] / "judge" / "dolly.cache.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["key"] for line in whole if line]


def written(source: Path) -> dict[str, Any]:
    folder = source.parents[1] / "judge"
    assert KEY not in "".join(path.read_text() for path in folder.iterdir())
    assert not list(folder.glob(".*")), "nothing half-written is left"
    found = json.loads((folder / "dolly.json").read_text())
    return {name: found[name] for name in ("scores", "rows", "failed", "num_rows", "settings")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_eval(tmp_path / "run" / "eval" / "dolly.json", ROWS, SEEDS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    source = write_eval(folder / "run" / "eval" / "dolly.json", ROWS, SEEDS)
    with server(folder / "log", delay=0) as (_, port), judge(source, port) as process:
        ended(process)
    assert len(answered(folder / "log")) == len(set(answered(folder / "log"))) == QUESTIONS
    found = written(source)
    assert found["failed"]["left_out"] == 0
    return found


def test_a_judge_waits_for_a_server_that_is_killed_and_started_again(
    source: Path, tmp_path: Path, uninterrupted: dict[str, Any]
):
    log = tmp_path / "log"
    with ExitStack() as stack:
        process, port = stack.enter_context(server(log))
        judging = stack.enter_context(judge(source, port))
        for share in (1 / 4, 1 / 2, 3 / 4):
            until(lambda share=share: len(answered(log)) >= share * QUESTIONS)
            process.kill()
            process.wait()
            assert judging.poll() is None
            time.sleep(0.3)
            process, _ = stack.enter_context(server(log, port))
        ended(judging)
    assert Counter(answered(log)).most_common(1)[0][1] == 1, "no question that was answered is asked again"
    assert set(answered(log)) <= set(cached(source))
    assert len(cached(source)) == QUESTIONS
    assert written(source) == uninterrupted


def test_a_judge_that_gave_up_goes_on_when_it_is_run_again(source: Path, tmp_path: Path, uninterrupted: dict[str, Any]):
    log = tmp_path / "log"
    impatient = ("--attempts", "2", "--backoff", "0.05")
    with server(log) as (process, port), judge(source, port, *impatient) as judging:
        until(lambda: len(answered(log)) >= QUESTIONS / 2)
        process.kill()
        said = ended(judging, code=5)
    assert "questions in a row" in said
    assert not (source.parents[1] / "judge" / "dolly.json").exists()
    kept = len(cached(source))
    assert set(answered(log)) <= set(cached(source))
    assert 0 < kept < QUESTIONS
    with server(log, port) as (_, port), judge(source, port, *impatient) as judging:
        said = ended(judging)
    assert f"{QUESTIONS - kept} calls, {kept} from the cache" in said
    assert Counter(answered(log)).most_common(1)[0][1] == 1
    assert written(source) == uninterrupted


def test_a_killed_judge_goes_on_when_it_is_run_again(source: Path, tmp_path: Path, uninterrupted: dict[str, Any]):
    log = tmp_path / "log"
    kills = 3
    with server(log) as (_, port):
        for kill in range(kills):
            with judge(source, port) as judging:
                until(lambda kill=kill: len(cached(source)) >= (kill + 1) * QUESTIONS / (kills + 1))
                judging.kill()
                judging.wait()
            time.sleep(0.2)  # the server ends what it was asked
        kept = len(cached(source))
        with judge(source, port) as judging:
            said = ended(judging)
    assert f"{QUESTIONS - kept} calls, {kept} from the cache" in said
    assert len(cached(source)) == len(set(cached(source))) == QUESTIONS, "no reply that came was asked for again"
    # What was under way at a kill is lost, and only that.
    assert len(answered(log)) - QUESTIONS <= kills * JOBS
    assert written(source) == uninterrupted


def test_a_torn_last_line_is_asked_again_and_no_other(source: Path, tmp_path: Path, uninterrupted: dict[str, Any]):
    log = tmp_path / "log"
    path = source.parents[1] / "judge" / "dolly.cache.jsonl"
    with server(log, delay=0) as (_, port):
        with judge(source, port) as judging:
            ended(judging)
        path.write_bytes(path.read_bytes()[:-20])
        for calls in (1, 0):
            with judge(source, port) as judging:
                said = ended(judging)
            assert f"{calls} calls, {QUESTIONS - calls} from the cache" in said
            assert "1 line(s) could not be read" in said
    assert written(source) == uninterrupted


def test_ctrl_c_keeps_all_that_was_answered(source: Path, tmp_path: Path, uninterrupted: dict[str, Any]):
    log = tmp_path / "log"
    with server(log, delay=0.1) as (_, port):
        with judge(source, port) as judging:
            until(lambda: len(cached(source)) >= QUESTIONS / 3)
            judging.send_signal(signal.SIGINT)
            said = ended(judging, code=130)
        assert "stopping after the requests under way" in said
        assert f"{len(cached(source))} replies are kept in" in said
        until(lambda: set(answered(log)) == set(cached(source)))  # the requests under way were waited for
        assert len(cached(source)) < QUESTIONS
        with judge(source, port) as judging:
            ended(judging)
    assert Counter(answered(log)).most_common(1)[0][1] == 1
    assert written(source) == uninterrupted


def test_a_second_ctrl_c_does_not_wait(source: Path):
    with serving(lambda *_: Answer(before=1000)) as silent, judge(source, silent.server_port) as judging:
        assert judging.stderr is not None
        until(lambda: len(silent.asked) == JOBS)
        judging.send_signal(signal.SIGINT)
        assert "press Ctrl-C again" in judging.stderr.readline()
        judging.send_signal(signal.SIGINT)
        assert f"stopped with {QUESTIONS} questions left" in ended(judging, code=130)


def test_ctrl_c_does_not_wait_for_a_pause_between_attempts(source: Path):
    busy = Answer(status=429, headers={"Retry-After": "500"})
    with serving(lambda *_: busy) as full, judge(source, full.server_port) as judging:
        until(lambda: len(full.asked) == JOBS)
        judging.send_signal(signal.SIGINT)
        ended(judging, code=130)
    assert len(full.asked) == JOBS
