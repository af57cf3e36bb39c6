"""First contact: what `distillm` alone says, ``init``, and what a shell completes."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distillm.cli import app, complete
from distillm.config import load_run, read_yaml, recipes
from distillm.errors import ConfigError, DataError, DistillmError
from distillm.starting import stages, starting_yaml
from tiny import CHAT_TEMPLATE, save, tiny_model, tiny_tokenizer
from tiny_run import rows, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher that chats, and rows of one's own."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    save(tiny_model("llama", layers=3), tokenizer, tmp_path / "teacher")
    write_rows(tmp_path / "rows.jsonl", [{"question": r["instruction"], "answer": r["output"]} for r in rows(40)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_alone_it_says_how_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run()
    assert shown.exit_code == 0
    assert "distillm demo" in shown.output
    assert "distillm init" in shown.output


def test_much_that_is_there_is_said_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.yaml").write_text("student: {layers: 1}\n")
        Path(name).mkdir()
        for file in ("run.yaml", "metrics.jsonl"):
            Path(name, file).touch()
    said = run().output
    assert "left out" not in said
    assert all(f"watch {name}" in said and f"train {name}.yaml" in said for name in "abc")


def test_the_path_of_a_newcomer(here: Path) -> None:
    """Each command that is advised is given as it stands, to the end: a student that answers."""
    shown = run("init", "--teacher", "teacher", "--student", "1", "--data", "rows.jsonl", "--output", "mine")
    assert shown.exit_code == 0, shown.output
    assert load_run("run.yaml").data.fields == {"instruction": "question", "output": "answer"}
    advised = [line.split()[1:] for line in shown.output.splitlines() if line.strip().startswith("distillm ")]
    assert [words[0] for words in advised] == ["check", "train", "train", "train"]
    assert all(f"distillm {' '.join(words)}" in (here / "run.yaml").read_text() for words in advised)
    assert "check run.yaml" in run().output
    quick = ["train.steps=4", "optim.warmup_steps=0", "evaluation.seeds=[1]"]
    for words in advised:
        shown = run(*words, *quick)
        assert shown.exit_code in (0, 2 * (words[0] == "check")), shown.output
    shown = run()
    assert "mine has ended" in shown.output
    assert "mine-teacher has ended" in shown.output
    assert read_yaml("mine")["teacher"]["path"] == "mine-teacher/student"
    assert read_yaml("mine")["student"]["path"] == "mine-first/student"
    assert (here / "mine" / "eval" / "held_out-student.json").exists()
    answered = run("generate", "mine", "Say one two.", "--max-new-tokens", "3")
    assert answered.exit_code == 0, answered.output


def test_what_stands_in_the_file(here: Path) -> None:
    made, text = starting_yaml("teacher", "2", "rows.jsonl", method="kd", output="mine")
    assert made.data.template == "chat"
    assert made.method.name == "kd"
    assert made.data.test_size == 4
    assert made.generation.max_new_tokens >= 8
    assert all(line.strip() for line in text.splitlines())
    assert yaml.safe_load(text)["student"] == {"layers": 2}
    held = made.data.max_length
    assert made.data.max_prompt < held <= 256


@pytest.mark.parametrize(
    ("row", "task", "responses"),
    [
        ({"prompt": "Say.", "completion": "a"}, "instruction", "dataset"),
        ({"Instruction": "Say.", "Input": "b", "Output": "a"}, "instruction", "dataset"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat", "dataset"),
        ({"source": "a", "target": "b"}, "translation", "dataset"),
        ({"dialogue": "a", "summary": "b"}, "summarization", "dataset"),
        ({"text": "Say a."}, "instruction", "teacher"),
        ({"instruction": "Say a.", "output": None}, "instruction", "teacher"),
        ({"prompt": "Say a.", "source": "web"}, "instruction", "teacher"),
    ],
)
def test_columns_tell_the_task(row: dict[str, Any], task: str, responses: str, here: Path) -> None:
    write_rows(here / "own.jsonl", [row] * 20)
    made, _ = starting_yaml("teacher", "1", "own.jsonl", method="distillm", output="mine")
    assert made.data.task == task
    assert made.data.responses == responses


def test_columns_that_do_not_tell(here: Path) -> None:
    write_rows(here / "own.jsonl", [{"foo": "a", "bar": "b"}] * 20)
    with pytest.raises(DataError, match="foo, bar"):
        starting_yaml("teacher", "1", "own.jsonl", method="kd", output="mine")
    given = {"instruction": "bar", "output": "foo"}
    made, _ = starting_yaml("teacher", "1", "own.jsonl", method="kd", output="mine", fields=given)
    assert made.data.fields == given
    made, _ = starting_yaml("teacher", "1", "own.jsonl", method="kd", output="m", fields={"instruction": "foo"})
    assert made.data.responses == "teacher"


def test_a_column_that_is_not_there(here: Path) -> None:
    fields = {"instruction": "question", "output": "anser"}
    with pytest.raises(DataError, match=r"no column anser; .* did you mean 'answer'"):
        starting_yaml("teacher", "1", "rows.jsonl", method="kd", output="mine", fields=fields)
    with pytest.raises(ConfigError, match="--fields"):
        starting_yaml("teacher", "1", "samsum", method="kd", output="mine", fields={"document": "text"})


def test_a_teacher_by_its_name_chats_or_does_not(here: Path) -> None:
    for name, template in (("owner/gpt2-italian", "alpaca"), ("owner/gemma-2b-it", "chat"), ("it/base", "alpaca")):
        made, _ = starting_yaml(name, "1", "rows.jsonl", method="kd", output="mine")
        assert made.data.prompt == template


def test_what_is_advised_can_be_given_to_a_shell(here: Path) -> None:
    shown = run(
        "init", "my run.yaml", "--teacher", "teacher", "--student", "1", "--data", "rows.jsonl", "--output", "a b"
    )
    lines = [shlex.split(line) for line in shown.output.splitlines() if line.startswith("  distillm ")]
    assert lines[0] == ["distillm", "check", "my run.yaml"]
    assert lines[1][3:] == [
        "teacher=null", "student.path=teacher", "method.name=sft", "optim.lr=1e-4", "output=a b-teacher",
    ]  # fmt: skip
    taught = "teacher.path=a b-teacher/student"
    assert lines[2][3:] == [taught, "method.name=sft", "output=a b-first"]
    assert lines[3][3:] == [taught, "student.path=a b-first/student", "optim.lr=1e-4"]
    (here / "-x.yaml").write_text("student: {layers: 1}\n")
    (here / "folder.yaml").mkdir()
    (here / "gone.yaml").symlink_to("nowhere")
    shown = run()
    assert "check 'my run.yaml'" in shown.output
    assert "check ./-x.yaml" in shown.output


@pytest.mark.parametrize("text", ["a\x7fb", "a\x85b", "a\u2028b", "a\ufeffb", "caf\u00e9", "\U0001f600"])
def test_any_text_comes_back_from_yaml(text: str, here: Path) -> None:
    made, _ = starting_yaml("teacher", "1", "rows.jsonl", method="kd", output=text)
    assert made.output == text


def test_a_name_that_could_break_out_of_yaml(here: Path) -> None:
    name = 'a "b": {c}, # d.jsonl'
    write_rows(here / name, [{"prompt: {x}": "a", "output": "b"}] * 20)
    with pytest.raises(DataError):
        starting_yaml("teacher", "1", name, method="kd", output="mine")
    fields = {"instruction": "prompt: {x}", "output": "output"}
    made, _ = starting_yaml("teacher", "1", name, method="kd", output="o: {", fields=fields)
    assert (made.data.train, made.output) == (name, "o: {")
    assert made.data.fields["instruction"] == "prompt: {x}"


def test_hub_names_and_known_data_sets(here: Path) -> None:
    made, text = starting_yaml("owner/model-instruct", "owner/small", "samsum", method="distillm", output="mine")
    assert made.student.path == "owner/small"
    assert made.data.task == "summarization"
    assert made.data.template == "chat"
    assert "1.0e-4" in text


@pytest.mark.parametrize("words", [("--method", "skl"), ("--fields", "instruction"), ("--data", "none.jsonl")])
def test_bad_answers_write_nothing(words: tuple[str, str], here: Path) -> None:
    shown = run("init", "--teacher", "teacher", "--student", "1", "--data", "rows.jsonl", *words)
    assert isinstance(shown.exception, DistillmError)
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize("option", ["--teacher", "--student"])
def test_a_model_that_cannot_be_there_is_said_at_once(option: str, here: Path) -> None:
    given = {"--teacher": "teacher", "--student": "1", "--data": "rows.jsonl", option: "models/gone.gguf"}
    shown = run("init", *(word for pair in given.items() for word in pair))
    assert isinstance(shown.exception, ConfigError)
    assert f"{option} models/gone.gguf: there is no such" in str(shown.exception)


@pytest.mark.parametrize(
    ("student", "method", "answered", "counts"),
    [("1", "distillm", True, 3), ("owner/x", "kd", True, 2), ("1", "kd", False, 2), ("owner/x", "gkd", False, 1),
     ("1", "sft", True, 1)],
)  # fmt: skip
def test_the_way_depends_on_where_models_and_responses_come_from(
    student: str, method: str, answered: bool, counts: int, here: Path
) -> None:
    write_rows(here / "own.jsonl", [{"prompt": "Say."} | ({"answer": "a"} if answered else {})] * 20)
    made, _ = starting_yaml("teacher", student, "own.jsonl", method=method, output="o")
    commands = [command for _, command in stages(made, "run.yaml")]
    assert len(commands) == counts
    assert all(command.startswith("distillm train run.yaml") for command in commands)
    assert any("teacher=null" in command for command in commands) == (answered and method != "sft")


def test_a_file_that_is_there_is_left_alone(here: Path) -> None:
    (here / "run.yaml").write_text("mine")
    shown = run("init", "--teacher", "teacher", "--student", "1", "--data", "rows.jsonl")
    assert isinstance(shown.exception, ConfigError)
    assert (here / "run.yaml").read_text() == "mine"


def test_without_a_terminal_nothing_is_asked(here: Path) -> None:
    shown = run("init", "--teacher", "teacher")
    assert isinstance(shown.exception, ConfigError)
    assert "--student" in str(shown.exception)


def test_three_questions_on_a_terminal(here: Path) -> None:
    main, other = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "distillm", "init"]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment, cwd=here) as asked:
        os.close(other)
        os.write(main, b"teacher\n\nrows.jsonl\n")  # the second answer is the usual one
        said = b""
        while asked.poll() is None or said.count(b"distillm train") < 2:
            try:
                said += os.read(main, 4096)
            except OSError:
                break
        os.close(main)
    assert asked.returncode == 0, said.decode()
    assert load_run(str(here / "run.yaml")).student.layers == 8
    assert b"The teacher" in said


def test_settings_and_sources_are_completed(here: Path) -> None:
    assert "train.steps=" in complete.settings("train.st")
    assert set(complete.settings("method.name=dist")) == {"method.name=distillm", "method.name=distillm2"}
    assert complete.settings("train.shard=t") == ["train.shard=true"]
    assert complete.settings("nothing") == []
    (here / "run.yaml").touch()
    assert complete.sources("ru") == ["run.yaml"]
    assert complete.sources("teach") == ["teacher/"]
    assert complete.sources("./ru") == ["./run.yaml"]
    assert complete.sources(f"{here}/ru") == [f"{here}/run.yaml"]
    some = next(iter(recipes()))
    assert some in complete.sources(some[:4])


def test_a_shell_is_told(here: Path) -> None:
    asked = {"_DISTILLM_COMPLETE": "complete_bash", "COMP_WORDS": "distillm train x optim.l", "COMP_CWORD": "3"}
    code = "import sys; sys.argv[0] = 'distillm'; from distillm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False, cwd=here
    )
    assert done.stdout.split() == ["optim.lr="], done.stderr
    assert json.dumps(done.stderr) == '""'
