"""Tasks as data: the shipped ones, one's own, and what a run makes of them, from rows to scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import done, refused
from distillm.config import Run, as_yaml, make_run
from distillm.data import Task
from distillm.errors import ConfigError, DataError
from distillm.methods import METHODS
from distillm.pipeline import distill
from distillm.project import build, steps
from distillm.rows import task_of
from distillm.tasks import load_task, tasks
from distillm.types import last_turn
from tiny import CHAT_TEMPLATE, save, tiny_causal, tiny_model, tiny_tokenizer
from tiny_run import NUMBERS, Heard, events, lines, scores, settings, write_rows

TOKENIZER = tiny_tokenizer(chat_template=CHAT_TEMPLATE)

OWN = """
description: The headline of an article.
fields: {article: body, section: section, headline: title}
response: headline
optional: [section]
cut: [article]
template: plain
templates:
  plain: |
    {% if section %}{{ section }}: {% endif %}{{ article }}
    {{ style }} headline:
user: "Write a {{ style }} headline.\\n\\n{{ article }}"
variables: {style: short}
metrics: [rouge_1]
generation: {max_new_tokens: 7, top_k: 5}
evaluation: {temperature: 0.25}
"""


@pytest.fixture(name="own")
def _own(tmp_path: Path) -> Path:
    path = tmp_path / "headlines.yaml"
    path.write_text(OWN)
    return path


def run_of(data: dict[str, Any], **more: Any) -> Run:
    given = {"student": {"path": "s"}, "method": {"name": "sft"}, "data": {"train": "x.jsonl", **data}}
    return make_run(given | more)


# ------------------------------------------------------------------------------------------------------- shipped tasks


@pytest.mark.parametrize(
    ("task", "row", "template", "text"),
    [
        ("summarization", {"document": "A river."}, "", "summarize: A river.\nsummary:\n"),
        ("summarization", {"document": "A river."}, "t5", "summarize: A river."),
        ("summarization", {"document": "A river."}, "chat",
         "user: Summarize the following text.\n\nA river.\nassistant: "),
        ("translation", {"source": "A {{ river }}."}, "", "translate English to German: A {{ river }}.\nGerman:\n"),
        ("translation", {"source": "A river."}, "chat",
         "user: Translate the following text from English to German.\n\nA river.\nassistant: "),
        ("translation", {"source": "A river."}, "{{ source }} ({{ target_language }})", "A river. (German)"),
        ("chat", {"messages": [{"role": "user", "content": "Hello."}]}, "", "user: Hello.\nassistant: "),
    ],
)  # fmt: skip
def test_the_prompts_of_the_shipped_tasks(task: str, row: dict[str, Any], template: str, text: str):
    assert Task(load_task(task), template=template).prompt_text(row, TOKENIZER) == text


def test_variables_are_seen_by_every_template():
    variables = {"target_language": "French"}
    for template in ("plain", "t5", "chat", "{{ target_language }}{{ source }}"):
        task = Task(load_task("translation"), template=template, variables=variables)
        assert "French" in task.prompt_text({"source": "Hello."}, TOKENIZER)
        assert "German" not in task.prompt_text({"source": "Hello."}, TOKENIZER)


@pytest.mark.parametrize("task", ["summarization", "translation"])
def test_a_long_text_is_cut_inside_and_the_template_stays_whole(task: str):
    spec = load_task(task)
    asked, answer = spec.fields
    rows = [{asked: "Seven birds sat on the wire. " * 40, answer: "Birds."}]
    examples, report = Task(spec).examples(rows, TOKENIZER, max_prompt=60, max_length=90, end_id=1, source="x")
    assert report.cut_prompts == 1
    text = TOKENIZER.decode(examples[0].prompt)
    assert text.startswith(("summarize: Seven", "translate English to German: Seven"))
    assert text.endswith(("\nsummary:\n", "\nGerman:\n"))
    assert 50 < len(examples[0].prompt) <= 60


def test_every_shipped_task_says_what_it_is_and_is_scored():
    assert [*tasks()] == ["chat", "instruction", "summarization", "translation"]
    for name in tasks():
        spec = load_task(name)
        assert spec.name == name
        assert spec.description.endswith(".")
        assert spec.metrics
        assert Task(spec).spec is spec


# -------------------------------------------------------------------------------------------------------- one's own


def test_a_task_in_a_file_is_a_task_like_the_others(own: Path):
    run = run_of({"task": str(own), "variables": {"style": "long"}})
    task = task_of(run.data)
    row = {"body": "A river.", "section": "News", "title": "River"}
    assert task.prompt_text(row) == "News: A river.\nlong headline:\n"
    assert task.prompt_text({"body": "A river."}) == "A river.\nlong headline:\n"
    assert task.references(row) == ["River"]
    assert "long headline.\n\nA river." in Task(
        load_task(str(own)), template="chat", variables={"style": "long"}
    ).prompt_text(row, TOKENIZER)
    again = make_run(yaml.safe_load(as_yaml(run)))
    assert again == run


def test_a_run_decodes_as_its_task_says_unless_it_says_so_itself(own: Path):
    run = run_of({"task": str(own)})
    found = (run.generation.max_new_tokens, run.generation.top_k, run.generation.temperature)
    assert found == (7, 5, 1.0)
    assert run.evaluation.temperature == 0.25
    mine = {"generation": {"max_new_tokens": 9}, "evaluation": {"temperature": None}}
    run = run_of({"task": str(own)}, **mine)
    assert (run.generation.max_new_tokens, run.generation.top_k, run.evaluation.temperature) == (9, 5, None)
    plain = run_of({})
    assert plain.data.task == "instruction"
    assert (plain.generation.max_new_tokens, plain.evaluation.temperature) == (256, None)
    assert make_run(yaml.safe_load(as_yaml(run))) == run


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("response: headline", "respons: headline", "respons: no such setting. Did you mean response?"),
        ("response: headline", "", "give one of response and conversation"),
        ("response: headline", "response: titel", "response: titel is none of article, section, headline"),
        ("cut: [article]", "cut: [artcle]", "cut: artcle is none of article, section; did you mean 'article'?"),
        ("cut: [article]", "cut: [headline]", "cut: headline is none of article, section"),
        ("{{ article }}\n", "{{ artcle }}\n", "templates.plain: artcle is not known; it may use article, section"),
        ("{{ article }}\n", "{{ headline }}\n", "templates.plain: headline is what is learned, and must not be in the"),
        ("{{ article }}\n", "{{ article \n", "templates.plain: line 2: expected token"),
        ("template: plain", "template: plian", "template: 'plian' is neither a name (plain, chat) nor Jinja text"),
        ("user: \"", "user: \"{{ headline }}", "user: headline is what is learned"),
        ("{style: short}", "{article: short}", "variables: article is a field too"),
        ("[rouge_1]", "[rouge_9]", "metrics.0: 'rouge_9' is not allowed. Did you mean rouge_"),
        ("[rouge_1]", "[]", "metrics: must have at least 1 item"),
        ("max_new_tokens: 7", "max_new_token: 7", "generation.max_new_token: no such setting. Did you mean"),
        ("max_new_tokens: 7", "max_new_tokens: 0", "generation.max_new_tokens: must be greater than 0"),
        ("description", "name: x\ndescription", "a task is named by its file; leave name out"),
        (OWN, "- a", "holds no task"),
        (OWN, "{", "cannot be read as YAML"),
        ("response: headline", "conversation: headline", "a conversation is the only field, and its template is chat"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_said(own: Path, old: str, new: str, message: str):
    own.write_text(OWN.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_task(str(own))
    assert message in str(caught.value)
    assert "headlines.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "summarisation"}, r"no task and no file summarisation; .*did you mean 'summarization'"),
        ({"task": "summarization", "fields": {"input": "a"}}, r"input is not a field of the task \(document, summ"),
        ({"task": "translation", "variables": {"target_langage": "x"}}, "did you mean 'target_language'"),
        ({"variables": {"style": "x"}}, "variables: style is not one of the task; it has none"),
        ({"task": "translation", "variables": {"target_language": 3}}, r"target_language: must be a valid string"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_task_is_said(data: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run_of(data)


def test_a_template_of_ones_own_may_see_more_variables():
    run = run_of({"template": "{{ style }} {{ instruction }}", "variables": {"style": "Kindly:"}})
    assert task_of(run.data).prompt_text({"instruction": "go"}) == "Kindly: go"


# --------------------------------------------------------------------------------------------------------- whole runs


def made_for(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Short rows of a task."""
    pairs = [(NUMBERS[i % 10], NUMBERS[i // 10 % 10]) for i in range(first, first + count)]
    if task == "chat":
        said = [(f"Say {a}.", a, f"And {b}?", f"{a} {b}") for a, b in pairs]
        return [
            {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}
            for texts in said
        ]
    asked, *_, answer = load_task(task).fields
    return [{asked: f"Say {a} {b}.", answer: f"{a} and {b}"} for a, b in pairs]


@pytest.fixture(name="models", scope="module", params=["llama", "t5"])
def _models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    save(tiny_model(request.param, seed=1), TOKENIZER, made / "teacher")
    save(tiny_model(request.param, layers=1, seed=2), TOKENIZER, made / "student")
    return made


def settings_of(models: Path, folder: Path, task: str, method: str, **data: Any) -> dict[str, Any]:
    for name, count, first in (("train", 9, 0), ("valid", 3, 20), ("test", 2, 40)):
        write_rows(folder / f"{name}.jsonl", made_for(task, count, first))
    (folder / "teacher").symlink_to(models / "teacher")
    (folder / "student").symlink_to(models / "student")
    changes: dict[str, Any] = {"data.template": None, "data.text": None, "data.task": task, "train.steps": 3}
    changes |= {"data.max_prompt": 180, "data.max_length": 220, "validation.every": 3, "student.dropout": 0.0}
    found = settings(folder, folder / "run", changes | {f"data.{key}": value for key, value in data.items()})
    found["method"] = {"name": "sft"} if method == "sft" else found["method"] | {"initial_probability": 0.9}
    return found | {"teacher": None if method == "sft" else found["teacher"]}


@pytest.mark.parametrize("method", ["sft", "distillm"])
@pytest.mark.parametrize("task", [*tasks()])
def test_every_task_trains_and_is_scored_from_the_command_line(models: Path, tmp_path: Path, task: str, method: str):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings_of(models, tmp_path, task, method)))
    done("train", path)
    run = tmp_path / "run"
    assert len(lines(run / "metrics.jsonl", "step")) == 3
    saved = yaml.safe_load((run / "run.yaml").read_text())
    assert saved["data"]["task"] == task
    [scored] = [score for name, score in scores(run).items() if name.endswith("-student.json")]
    expected = {row["id"]: row["references"] for row in scored["predictions"]}
    assert expected == {"test:0": [expected_of(task, 40)], "test:1": [expected_of(task, 41)]}
    done("eval", run, "--data", tmp_path / "valid.jsonl", "--limit", 1)
    said = done("generate", run, "Say one.", "--max-new-tokens", 2)
    assert said.startswith("> Say one.\n")
    done("generate", run, "--file", tmp_path / "test.jsonl", "--max-new-tokens", 2, "--output", tmp_path / "out.jsonl")
    answers = lines(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "response"} for row in answers] == made_for(task, 2, 40)
    assert all(isinstance(row["response"], str) for row in answers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [*tasks()])
def test_every_method_trains_on_every_task(models: Path, tmp_path: Path, task: str, method: str):
    given = settings_of(models, tmp_path, task, "distillm", test={})
    given |= {"method": {"name": method}, "train": given["train"] | {"steps": 2}}
    taken = list(steps(build(make_run(given))))
    assert len(taken) == 2
    assert all(step.loss == step.loss and step.grad_norm > 0 and step.tokens > 0 for step in taken)


def expected_of(task: str, number: int) -> str:
    a, b = NUMBERS[number % 10], NUMBERS[number // 10 % 10]
    return f"{a} {b}" if task == "chat" else f"{a} and {b}"


WRITERS = {"imitkd": {"student"}, "minillm": {"student"}, "distillm2": {"student", "teacher"}, "seqkd": {"teacher"}}


@pytest.mark.parametrize("method", WRITERS)
def test_students_and_teachers_answer_the_last_turn_of_a_chat(models: Path, tmp_path: Path, method: str):
    given = settings_of(models, tmp_path, "chat", method, test={})
    run = make_run(given | {"method": {"name": method}})
    project = build(run)
    whole = {row["messages"][0]["content"]: row["messages"] for row in made_for("chat", 9)}
    rows = [row for step in steps(project) for row in step.rows]
    assert rows
    assert {row.origin for row in rows} == WRITERS[method]
    assert all(last_turn(row) == row for row in rows)
    chat = TOKENIZER.apply_chat_template
    prompts = {chat(m[:-1], tokenize=False, add_generation_prompt=True) for m in whole.values()}
    assert {TOKENIZER.decode(row.prompt) for row in rows} <= prompts
    for row in project.validation.examples:
        assert len(last_turn(row).prompt) > len(row.prompt)  # both turns of the data are measured


def test_a_teacher_answers_chats_that_end_with_the_user(models: Path, tmp_path: Path):
    given = settings_of(models, tmp_path, "chat", "distillm", responses="teacher", test={})
    bare = [{"messages": row["messages"][:-1]} for row in made_for("chat", 9)]
    write_rows(tmp_path / "train.jsonl", bare[:5] + made_for("chat", 9)[5:])
    heard = Heard()
    folder = distill(make_run(given), heard)
    assert any("train.jsonl: 9 of 9 rows used: 9 without a response, for a model to write" in s for s in heard.said)
    assert len(lines(folder / "responses.jsonl")) == 1 + 9 + 3
    for sample in lines(folder / "samples.jsonl"):
        assert sample["prompt"].startswith("user: Say ")
        assert sample["prompt"].endswith("?")
        assert sample["reference"] == sample["teacher"].strip()
    assert not events(folder, "failed")
    write_rows(tmp_path / "train.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(DataError, match="train:0: message 0 is of role 'tool'"):
        build(make_run(given))


def test_chats_without_answers_and_teachers_that_read_more_are_refused(models: Path, tmp_path: Path):
    given = settings_of(models, tmp_path, "chat", "distillm")
    for key in ("teacher_system", "teacher_template"):
        with pytest.raises(ConfigError, match=f"{key}: in a chat the teacher reads what the student reads"):
            make_run(given | {"data": given["data"] | {key: "chat"}})
    bare = [{"messages": row["messages"][:-1]} for row in made_for("chat", 9)]
    write_rows(tmp_path / "train.jsonl", bare)
    with pytest.raises(DataError, match=r"train:\d has no response"):
        build(make_run(given))
    save(tiny_causal(seed=3), tiny_tokenizer(), tmp_path / "plain")
    message = refused("eval", tmp_path / "plain", "--data", tmp_path / "test.jsonl")
    assert "the field 'instruction' (for instruction) is missing" in message
    message = refused("eval", tmp_path / "plain", "--data", tmp_path / "test.jsonl", "--task", "chat")
    assert "the tokenizer has no chat template; task chat needs one" in message


def test_a_model_is_asked_for_the_task_that_is_named(models: Path, tmp_path: Path):
    settings_of(models, tmp_path, "translation", "sft")
    model, short = models / "student", ("--max-new-tokens", 2)
    done("eval", model, "--data", tmp_path / "test.jsonl", "--task", "translation", *short)
    said = done("generate", model, "Hello.", "--task", "translation", "--template", "plain", *short)
    assert said.startswith("> Hello.\n")
    message = refused("generate", model, "Hello.", "--task", "translating", *short)
    assert "no task and no file translating; the tasks are chat, " in message
    write_rows(tmp_path / "test.jsonl", made_for("chat", 2))
    done("generate", model, "--file", tmp_path / "test.jsonl", "--task", "chat", *short)


def test_a_known_data_set_alone_says_what_a_run_is(models: Path, tmp_path: Path):
    given = settings_of(models, tmp_path, "summarization", "sft", train="samsum", validation="samsum")
    given["data"] |= {"task": "", "test": {"own": "samsum"}, "folder": str(tmp_path)}
    (tmp_path / "samsum").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "samsum" / f"{name}.jsonl")
    folder = distill(make_run(given))
    assert {row["id"] for row in scores(folder)["own-student.json"]["predictions"]} == {
        "samsum-test:0",
        "samsum-test:1",
    }
    saved = yaml.safe_load((folder / "run.yaml").read_text())
    assert saved["data"]["task"] == "summarization"
    output = tmp_path / "scores.json"
    done("eval", folder, "--data", "samsum", "--limit", 1, "--output", output)
    assert json.loads(output.read_text())["num_rows"] == 1
