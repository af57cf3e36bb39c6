"""What is shown and written: inert pages, terminals that nothing steers, no secrets, no file outside its folder."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table

from answering_server import KEY, Answer, serving
from command_line import Said, distillm, done, refused
from distillm.config import make_run
from distillm.display import Display, Terminal
from distillm.errors import ConfigError, DistillmError
from distillm.provenance import provenance
from distillm.screen import LINES, WIDTH, visible
from distillm.sweep import cells_of
from fabricated_run import CONFIG, evaluation, fabricate, samples, write_lines
from report_page import report
from tiny_run import lines, materials, rows, tiny_run, write_rows
from tiny_run import settings as tiny_settings

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</ScRiPt\n><img src=x onerror=alert(1)>",
    "<!--<script>", "-->", "]]>", "<![CDATA[<script>", "\" onmouseover=alert(1) x=\"",
    "' onfocus='alert(1)' autofocus '",
    "<a href=\"javascript:alert(1)\">x</a>", "javascript:alert(1)", "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>'>",
    "</title></style></textarea><script>alert(1)</script>", "\u2028alert(1)\u2029", "&lt;script&gt;", "&#60;script>",
    "<base href=http://evil.example>", "<meta http-equiv=refresh content=0>", "{{ 7 * 7 }}",
    "\\u003cscript\\u003e", "\x00<b>",
    "<b onclick=alert(1)>bold</b>", "%3Cscript%3E", "<form action=//evil.example><input name=q>",
    "<math><mtext></script>",
]  # fmt: skip
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def hostile_run(folder: Path, evil: str) -> Path:
    """A run in which every text that can come from data, settings, a model or a judge is ``evil``."""
    run = fabricate(folder, num_steps=30, every=10)
    config = {
        **CONFIG,
        "teacher": {"path": evil},
        "method": {"name": evil, evil: evil},
        "data": {"task": evil, evil: evil},
    }
    config["data"] |= {"train": evil, "test": {evil: evil}}
    config["provenance"] = {**CONFIG["provenance"], "command": evil, "machine": evil, "device": evil, "git": evil}
    (run / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    one = {"id": evil, "prompt": evil, "reference": evil, "teacher": evil, "student": evil}
    write_lines(run / "samples.jsonl", [{"step": 0, **one}, {"step": 30, **one}, *samples(1, 30)])
    with (run / "metrics.jsonl").open("a") as file:
        step = {"kind": "step", "step": 31, "loss": 1.0, "terms": {evil: 0.5, "distill": 0.5}, "batch": evil, evil: 1}
        time = {"kind": "time", "step": 31, "seconds": {evil: 3.0}, "flops": 1, "peak_bytes": 3}
        for entry in (step, time, {"kind": "event", "step": 31, "event": evil, "message": evil}):
            file.write(json.dumps(entry) + "\n")
        file.write("{" + evil + "\n")
    scored = {**evaluation(evil, 1.0, 1.0), "data": evil, "model": evil, "signatures": {evil: evil}}
    scored["decoding"] = {evil: evil, "temperature": evil}
    scored["scores"] |= {evil: {"mean": 1.0, "std": 0.0, "per_seed": [1.0]}}
    (run / "eval" / "evil.json").write_text(json.dumps(scored))
    (run / "eval" / "torn.json").write_text(evil)
    (run / "judge").mkdir()
    (run / "judge" / "evil.json").write_text(json.dumps({"scores": {evil: {"mean": 1.0}}, "rows": [one]}))
    return run


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_in_a_report_comes_alive(tmp_path: Path, evil: str):
    name = evil.replace("/", "|").replace("\x00", "")
    run, other = hostile_run(tmp_path / name, evil), fabricate(tmp_path / "other", num_steps=30, every=10)
    plain = [tag for tag, _ in report(other).elements]
    for runs in ([run], [run, other]):
        page = report(*runs)
        kinds = [attrs.get("type") for tag, attrs in page.elements if tag == "script"]
        assert kinds == [None, "application/json", "text/plain"]
        assert {tag for tag, _ in page.elements} <= {
            *plain,
            "details",
            "summary",
            "aside",
            "svg",  # the bars of where the time went
            "rect",
            "ul",
            "li",
            "h4",
            "h5",
            "em",
        }
        for tag, attrs in page.elements:
            assert not [key for key in attrs if key.startswith("on") or key in ("srcdoc", "action", "formaction")]
            assert attrs.get("href") in (None, "data:,", "#main"), tag
            assert "src" not in attrs
        assert "<!--" not in page.source
        (data,) = page.all("script", id="charts")
        assert not {"<", "\u2028", "\u2029"} & set(data)  # it cannot end the element that it is in
        names = [line["name"] for chart in page.charts.values() for line in chart["series"]]
        assert evil in names  # and reads back as it was


# ---------------------------------------------------------------------------------------------------------- terminals

STEERING = "\x1b[31mred\x1b[0m \x1b]8;;http://evil.example\x07link \x9b2J \x1b]52;c;cHduZWQ=\x07 \x07 a\x08b \x7f"


def on_a_terminal(*arguments: object) -> bytes:
    """All that a process says to a terminal."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "distillm", *map(str, arguments)]
    with subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=environment) as process:
        os.close(follower)
        said = b""
        try:
            while part := os.read(leader, 65536):
                said += part
        except OSError:  # how Linux says that the other side is gone
            pass
        process.wait(60)
    os.close(leader)
    return said


def test_what_comes_from_data_does_not_steer_a_terminal(tmp_path: Path):
    run = hostile_run(tmp_path / "run", STEERING)
    said = on_a_terminal("compare", run)
    assert b"\\x1b[31mred" in said
    for bad in (b"\x1b[31mred", b"\x1b]8;;", b"\x1b]52", b"\x9b2J".decode("latin-1").encode(), b"\x08", b"\x7f"):
        assert bad not in said, bad
    said = on_a_terminal("train", tmp_path / f"no {STEERING}.yaml")
    assert b"\\x1b[31mred" in said
    assert b"\x1b[31mred" not in said
    assert b"\x1b]" not in said


def test_notes_and_tables_are_shown_as_they_are_but_for_control_characters():
    stream = io.StringIO()
    terminal = Terminal()
    terminal.file, terminal._force_terminal, terminal._color_system = stream, True, None
    display = Display(terminal)
    display.note(f"[bold]x[/bold] [link=http://evil.example]y[/link] {STEERING}")
    table = Table("Name")
    table.add_row(STEERING)
    display.table(table)
    with display.phase(f"reading {STEERING}", 1) as advance:
        advance(1, STEERING)
    text = stream.getvalue()
    assert "[bold]x[/bold] [link=http://evil.example]y[/link]" in text
    assert text.count("\\x1b[31mred") >= 2
    assert "\x1b[31m" not in text
    assert "\x1b]" not in text


def test_an_answer_of_a_model_does_not_steer_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = materials(tmp_path)
    monkeypatch.setattr("distillm.commands.answers", lambda *_: [STEERING])
    said = done("generate", made / "student", "Say one.", "--max-new-tokens", 2)
    assert not CONTROLS.search(said)
    assert "\\x1b[31mred" in said


def test_errors_fit_a_screen_and_steer_nothing():
    error = DistillmError("\n".join([f"{STEERING} {'x' * 5000} the reason"] * 100))
    said = str(error).split("\n")
    assert len(said) == LINES
    assert all(len(line) <= WIDTH and line.endswith("the reason") for line in said if "left out" not in line)
    assert not CONTROLS.search("".join(said))
    assert visible(str(error)) == str(error)


# ------------------------------------------------------------------------------------------------------------ secrets


def everything(folder: Path, *said: Said) -> str:
    """All that was written and said."""
    written = [p.read_bytes().decode("utf-8", "replace") for p in folder.rglob("*") if p.is_file()]
    return "\n".join([*written, *(one.out + one.err for one in said)])


def test_a_key_is_in_no_file_log_or_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = materials(tmp_path / "made")
    for name in ("SERVER_KEY", "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    path = tmp_path / "made" / "run.yaml"
    with serving(lambda *_: Answer(f"one and {KEY}")) as server:
        asked = {"url": server.url, "model": "m", "prompt": "text", "key_env": "SERVER_KEY"}
        changes = {
            "method": {"name": "seqkd"},
            "data.responses_server": asked,
            "data.text": None,
            "tracker": "tensorboard",
        }
        path.write_text(yaml.safe_dump(tiny_settings(made, tmp_path / "run", changes)))
        trained = distillm("train", path)
        assert trained.code == 0, trained.err
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
        assert server.headers
    assert list((tmp_path / "run").rglob("events.out.*"))
    with serving(lambda *_: Answer(f"Score: 7 {KEY}\n\nScore: 7")) as server:
        judged = distillm("judge", tmp_path / "run/eval/numbers-student.json", "--server", server.url, "--model", "m")
        assert judged.code == 0, judged.err
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    with serving(lambda *_: Answer(status=400, body=f"bad key {KEY}".encode())) as server:
        failed = distillm("train", path, f"data.responses_server.url={server.url}", f"output={tmp_path / 'failed'}")
        assert failed.code == 2
    found = everything(tmp_path, trained, judged, failed)
    assert KEY not in found
    assert "[key]" in found
    assert "SERVER_KEY" in found


@pytest.mark.parametrize("method", ["seqkd", "distillm"])
@pytest.mark.parametrize(
    "override",
    [
        "data.responses_server.url=http://user:hunter2@127.0.0.1:9/v1",
        "data.responses_server.url=http://127.0.0.1:9/v1?api_key=hunter2",
        "data.responses_server.body={api_key: hunter2}",
        "data.responses_server.body={headers: {Authorization: Bearer hunter2}}",
        "data.responses_server.body={extra: [{X-Api-Key: hunter2}]}",
    ],
)
def test_settings_that_hold_a_secret_are_refused_and_written_nowhere(tmp_path: Path, method: str, override: str):
    made = materials(tmp_path / "made")
    path = tmp_path / "made" / "run.yaml"
    server = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    changes = {"method": {"name": method}, "data.responses_server": server, "train.steps": 1}
    path.write_text(yaml.safe_dump(tiny_settings(made, tmp_path / "run", changes)))
    said = distillm("train", path, override)
    assert said.code == 2
    assert "key_env" in said.err
    assert "hunter2" not in everything(tmp_path, said)
    assert not (tmp_path / "run").exists()


def test_fields_that_only_sound_alike_are_no_secrets(tmp_path: Path):
    body = {"stop_token_ids": [1], "return_token_ids": None, "skip_special_tokens": True, "logit_bias": {"50256": -100}}
    server = {"url": "http://127.0.0.1:9/v1", "model": "m", "body": body}
    given = tiny_settings(tmp_path, tmp_path / "run", {"data.responses_server": server})
    assert make_run(given).data.responses_server is not None


def test_the_judge_takes_no_secret_on_its_command_line(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(evaluation("student", 1.0, 1.0)))
    base = ("judge", tmp_path / "a.json", "--model", "m", "--server")
    for options in (
        ("http://user:hunter2@127.0.0.1:9/v1",),
        ("http://127.0.0.1:9/v1?key=hunter2",),
        ("http://127.0.0.1:9/v1", "--body", '{"api_key": "hunter2"}'),
    ):
        said = refused(*base, *options)
        assert "hunter2" not in everything(tmp_path) + said


def test_the_command_that_is_kept_has_no_credentials(monkeypatch: pytest.MonkeyPatch):
    import torch

    command = "distillm train run.yaml data.train=https://user:hunter2@example.org/rows.jsonl"
    kept = provenance({}, torch.device("cpu"), command)["command"]
    assert kept == "distillm train run.yaml data.train=https://...@example.org/rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["script.py", "ftp://user:hunter2@example.org"])
    assert "hunter2" not in provenance({}, torch.device("cpu"), None)["command"]


def test_messages_have_no_credentials(tmp_path: Path):
    for name in ("https://user:hunter2@example.org/rows.jsonl", "https://user:hunter2@example.org/x"):
        said = refused("tokenizer", name, "-o", tmp_path / "new")
        assert "hunter2" not in said
        assert "example.org" in said


# --------------------------------------------------------------------------------------------------------------- paths

NAMES = [
    "../../x",
    "/x",
    "a/b",
    "..",
    ".",
    "",
    ".hidden",
    "-rf",
    "--help",
    "a\\b",
    "a b",
    "x" * 300,
    "é",
    "a\nb",
    "con:",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_test_sets_name_cannot_leave_the_run_folder(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="cannot name a file of scores"):
        tiny_run(tmp_path, tmp_path / "run", {"data.test": {name: "x.jsonl"}})


@pytest.mark.parametrize("name", NAMES)
def test_a_sweeps_folders_stay_in_its_own(tmp_path: Path, name: str):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path, tmp_path / "sweep")))
    value = name.replace("\n", " ")
    cells = cells_of(str(path), [f"data.system={value},{value}2", "data.template=chat"])
    for cell in cells:
        folder = Path(cell.run.output)
        assert folder.parent == tmp_path / "sweep"
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,130}", folder.name)


def test_odd_names_in_data_write_nothing_outside_the_run(tmp_path: Path):
    made = materials(tmp_path / "made")
    odd = [row | {"id": "../../../pwned", "file": "/pwned", "name": "\x1b[31m"} for row in rows(6)]
    write_rows(made / "-- ..\x1b[31m.jsonl", odd)
    source = str(made / "-- ..\x1b[31m.jsonl")
    changes = {"data.train": source, "data.validation": source, "data.test": {"con": source}, "train.steps": 2}
    path = made / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(made, tmp_path / "out" / "run", changes)))
    before = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents}
    said = distillm("train", path)
    assert said.code == 0, said.err
    assert not CONTROLS.search(said.err + said.out)
    after = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents}
    assert after - before <= {tmp_path / "out"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["run"]
    ids = [row["id"] for row in json.loads((tmp_path / "out/run/eval/con-student.json").read_text())["predictions"]]
    assert len(ids) == 6
    assert not list(tmp_path.parent.glob("*pwned*"))
    assert lines(tmp_path / "out/run/samples.jsonl")


@pytest.mark.parametrize("name", ["../../x=", "/x=", "-x=", "=", "..=", "x" * 300 + "="])
def test_scores_stay_in_the_run_whatever_they_are_called(tmp_path: Path, name: str):
    made = materials(tmp_path / "made")
    run = tmp_path / "out" / "run"
    done("train", _quick(made, run))
    there = {p for p in tmp_path.rglob("*") if run not in p.parents}
    said = distillm("eval", run, "--data", f"{name}{made / 'test.jsonl'}", "--limit", 1)
    assert said.code in (2, 4), said.err
    assert {p for p in tmp_path.rglob("*") if run not in p.parents} == there


def _quick(made: Path, run: Path) -> Path:
    changes: dict[str, Any] = {"train.steps": 1, "validation.every": 1, "data.text": None, "data.test": {}}
    path = made / "quick.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(made, run, changes)))
    return path
