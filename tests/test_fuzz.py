"""Broken settings, tasks and templates: each is used, or refused by an error that a user can mend, within a screen."""

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from command_line import distillm
from distillm.config import Run, load_run, make_run, recipes
from distillm.data import Task
from distillm.errors import ConfigError, DataError
from distillm.explain import leaves
from distillm.settings_text import DEEPEST, check, load_yaml
from distillm.tasks import load_task, tasks
from fuzzing import ODD_TEXTS, ODD_VALUES, check_message, fuzz, odd_texts, odd_values, outcome
from fuzzing import damaged as broken
from tiny import CHAT_TEMPLATE, tiny_tokenizer

KEYS = sorted({key for key, _ in leaves(Run)})
BASE: dict[str, Any] = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "rows.jsonl"}}
RECIPES = [path.read_bytes() for path in recipes().values()]
TASKS = [path.read_bytes() for path in tasks().values()]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
NAMED = {
    "brackets in brackets": "a: " + "[" * 5000,
    "closed brackets": "a: " + "[" * 3000 + "]" * 3000,
    "maps in maps": "{a: " * 3000,
    "a billion laughs": BOMB,
    "a list in itself": "data: &a [*a]",
    "a section in itself": "student: &s {path: *s}",
    "the whole in itself": "&a {student: *a}",
    "names of names of names": "a: [&a0 [x]"
    + "".join(f", &a{i} [*a{i - 1}]" for i in range(1, 3000))
    + "]\n? *a2999\n: 1\n",
    "no timestamp": "a: !!timestamp foo",
    "no number": "a: !!int ''",
    "no truth": "a: !!bool maybe",
    "no bytes": "a: !!binary '@'",
    "a number of 24,000 digits": "seed: 0x" + "f" * 20_000,
    "a number to the base 60": "seed: 1" + ":1" * 3000,
    "a key that is there twice": "student: {path: a}\nstudent: {path: b}\n",
    "half of a character": 'student: {path: "\\ud800"}',
    "a NUL": 'student: {path: "a\\0b"}',
    "code": "a: !!python/object/apply:os.system ['touch pwned']",
    "two documents": "a: 1\n---\nb: 2\n",
    "a merge of nothing": "a: {<<: 3}",
    "a line of 300,000 characters": "student: {path: [" + "a" * 300_000,
    "a key of 100,000 characters": "? " + "a" * 100_000 + "\n: 1\n",
    "3,000 unknown settings": "optim: {" + ", ".join(f"k{i}: 1" for i in range(3000)) + "}",
    "no text": "",
    "a list": "- a\n",
}


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", NAMED)
def test_settings_and_tasks_that_are_none_are_refused(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    path = write(folder / "named.yaml", NAMED[name])
    for load in (load_run, load_task):
        assert isinstance(outcome(lambda load=load: load(str(path))), ConfigError)
    said = distillm("train", path)
    assert said.code == 2
    check_message(said.err.removeprefix("error: "))
    assert not (folder / "pwned").exists()


@given(st.sampled_from(RECIPES), st.integers(0, 2**32))
@fuzz(400)
def test_a_recipe_with_something_broken_is_read_or_refused(folder: Path, recipe: bytes, seed: int):
    path = write(folder / "broken.yaml", broken(recipe, random.Random(seed)))
    outcome(lambda: load_run(str(path)))


@given(
    st.sampled_from(KEYS),
    odd_texts | odd_values.map(repr) | st.sampled_from([text for text in NAMED.values() if len(text) < 10_000]),
)
@fuzz(400)
def test_any_dotted_override_is_taken_or_refused(key: str, text: str):
    outcome(lambda: make_run(copy.deepcopy(BASE), [f"{key}={text}"]))


@given(odd_texts, odd_texts)
@fuzz(100)
def test_any_name_of_a_setting_is_refused(key: str, value: str):
    outcome(lambda: make_run(copy.deepcopy(BASE), [f"{key}={value}"]))
    outcome(lambda: make_run(copy.deepcopy(BASE), [f"{key}.{value}", f"data.{key}=1"]))


nested = st.recursive(
    odd_values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3)
)


@given(st.sampled_from(KEYS + [key.rpartition(".")[0] for key in KEYS if "." in key]), nested)
@fuzz(300)
def test_nested_settings_with_a_value_of_another_type_are_taken_or_refused(key: str, value: Any):
    found = copy.deepcopy(BASE)
    section: Any = found
    *above, last = key.split(".")
    for part in above:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[last] = value
    outcome(lambda: make_run(found))


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_may_be_named_as_a_file(text: str):
    outcome(lambda: load_run(text))
    outcome(lambda: load_task(text))
    for key in ("data.train", "data.task", "data.test.mine", "data.folder", "output", "student.path"):
        outcome(lambda key=key: make_run(copy.deepcopy(BASE), [f"{key}={text}"]))


def test_a_value_that_holds_itself_is_refused():
    inner: dict[str, Any] = {}
    inner["a"] = inner
    assert "a value holds itself" in str(outcome(lambda: make_run({**BASE, "provenance": inner})))


@pytest.mark.parametrize("one", ["[{}]", "{{a: {}}}"])
def test_nesting_is_counted_alike_where_it_is_read_and_where_it_is_looked_through(one: str):
    nested = ["1"]
    while len(nested) < DEEPEST + 2:
        nested.append(one.format(nested[-1]))
    for load in (load_yaml, lambda text: check(yaml.safe_load(text))):
        load(nested[DEEPEST])
        with pytest.raises(ValueError, match=f"nested deeper than {DEEPEST}"):
            load(nested[DEEPEST + 1])
    with pytest.raises(ValueError, match=f"nested deeper than {DEEPEST}"):  # before it is found to be unfinished
        load_yaml(nested[DEEPEST + 1].rstrip("]}"))


def test_a_key_that_is_there_twice_is_named_with_its_line(folder: Path):
    path = write(folder / "twice.yaml", "student: {path: s}\ndata: {train: x}\nstudent: {path: t}\n")
    message = str(outcome(lambda: load_run(str(path))))
    assert "the key 'student' is there twice" in message
    assert "line 3" in message


# ------------------------------------------------------------------------------------------------------------- tasks


@given(st.sampled_from(TASKS), st.integers(0, 2**32))
@fuzz(200)
def test_a_task_with_something_broken_is_read_or_refused(folder: Path, task: bytes, seed: int):
    path = write(folder / f"task{seed}.yaml", broken(task, random.Random(seed)))
    found = outcome(lambda: load_task(str(path)))
    path.unlink()
    assert isinstance(found, ConfigError) or found.fields


@given(st.sampled_from(TASKS), st.data())
@fuzz(150)
def test_a_task_with_a_value_of_another_type_is_read_or_refused(folder: Path, task: bytes, data: st.DataObject):
    found: dict[str, Any] = yaml.safe_load(task)
    found[data.draw(st.sampled_from(sorted(found)))] = data.draw(st.sampled_from(ODD_VALUES))
    path = write(folder / f"typed{data.draw(st.integers(0, 2**40))}.yaml", yaml.safe_dump(found))
    outcome(lambda: load_task(str(path)))


# --------------------------------------------------------------------------------------------------------- templates

PIECES = [
    "{{ instruction }}", "{{ input }}", "{{ x }}", "{{ ", " }}", "{% ", " %}", "{%- if instruction -%}", "{% endif %}",
    "{% else %}", "{% for a in instruction %}", "{% endfor %}", "{{ a }}", "{% set b = 3 %}", "{{ b / 0 }}",
    "{{ 1 ** b }}",
    "{{ instruction.__class__ }}", "{{ instruction | upper }}", "{{ instruction | nosuch }}",
    "{{ instruction * 10 ** 9 }}",
    "{{ ''.join(5) }}", "{{ range(10 ** 9) }}", "{{ instruction[0:b:0] }}", "{% raw %}", "{# ", " #}",
    "{% macro m() %}",
    "{% endmacro %}", "{{ m() }}", "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block c %}",
    "{% endblock %}", "{{ caller() }}", "{{ self }}", "{{ self.c() }}", "{{ '%9999999d' % 1 }}", "{{ [1, 2] | sum }}",
    "{{ instruction is mapping }}", "\x00", "\u2028", "é", "\n", "{{ none.a }}", "{{ loop.index }}",
    "{{ (1).__class__ }}",
    "{{ cycler(1) }}", "{{ dict(a=1).update(b=2) }}", "{{ namespace().a }}", "{{ 'a' | center(10 ** 9) }}",
    "{{ " + "(" * 200 + "1" + ")" * 200 + " }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"instruction": "Say one.", "output": "one"},
    {"instruction": "", "input": "x" * 3000, "output": "one"},
    {"instruction": "Say {{ x }}", "input": None, "output": ["one", "two"], "x": {"a": float("nan")}},
    {"instruction": 3, "output": None},
    {"question": "?"},
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.sampled_from(ROWS))
@fuzz(500)
def test_any_template_is_rendered_or_refused(template: str, row: dict[str, Any]):
    def rendered() -> str:
        return Task(template=template).prompt_text(row, row_id="train:0")

    found = outcome(rendered)
    assert isinstance(found, str | ConfigError | DataError)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), st.integers(0, 2**32))
@fuzz(150)
def test_any_template_of_a_task_is_refused_or_rendered(folder: Path, template: str, seed: int):
    spec = {"fields": {"instruction": "instruction", "output": "output"}, "response": "output", "template": template}
    path = write(folder / f"own{seed}.yaml", yaml.safe_dump(spec))
    task = outcome(lambda: load_task(str(path)))
    path.unlink()
    if not isinstance(task, ConfigError):
        outcome(lambda: Task(task).prompt_text(ROWS[0], row_id="train:0"))


CHAT_PIECES = [
    "{% for message in messages %}", "{% endfor %}", "{{ message['role'] }}", "{{ message['content'] }}",
    "{{ message.content | trim }}", "{{ eos_token }}", "{{ raise_exception('no') }}", "{{ messages[9].content }}",
    "{{ 1 / 0 }}", "{{ [].a.b }}", "{{ messages.append(1) }}", "{% generation %}", "{% endgeneration %}", "{{ tools }}",
    "{{ strftime_now('%Y') }}", "{{ messages.__class__ }}", "{{ 3 + 'a' }}", "{{ int('x') }}",
    "{{ '' | list | first }}",
    "{% break %}", "assistant: ", "{% if add_generation_prompt %}", "{% endif %}", "\n",
]  # fmt: skip


@given(st.lists(st.sampled_from(CHAT_PIECES), min_size=1, max_size=8).map("".join))
@fuzz(150)
def test_any_chat_template_of_a_tokenizer_is_used_or_refused(template: str):
    TOKENIZER.chat_template = template
    chat = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}]}
    for task, row in ((Task(template="chat"), ROWS[0]), (Task(load_task("chat"), template="chat"), chat)):
        outcome(
            lambda task=task, row=row: task.examples(
                [row], TOKENIZER, max_prompt=60, max_length=90, end_id=1, source="train"
            )
        )


TOKENIZER = tiny_tokenizer(chat_template=CHAT_TEMPLATE)


# -------------------------------------------------------------------------------------------------- the command line


@given(st.sampled_from(RECIPES), st.integers(0, 2**32), st.sampled_from(KEYS), odd_texts)
@fuzz(60)
def test_the_command_line_ends_with_a_documented_code(folder: Path, recipe: bytes, seed: int, key: str, text: str):
    path = write(folder / "command.yaml", broken(recipe, random.Random(seed)))
    said = distillm("train", path, f"{key}={text}", f"output={folder / 'run'}", "data.train=nowhere.jsonl")
    assert said.code in (2, 4)
    check_message(said.err)


def test_a_path_that_the_system_refuses_is_said_with_the_code_for_files(folder: Path):
    for arguments in (("compare", "x" * 300), ("tokenizer", "rows.jsonl", "-o", "x" * 300)):
        said = distillm(*arguments)
        assert said.code == 4
        check_message(said.err)
        assert "File name too long" in said.err


@pytest.mark.parametrize("name", ["a billion laughs", "closed brackets", "no timestamp", "code"])
def test_a_process_of_its_own_ends_without_a_traceback(folder: Path, name: str):
    path = write(folder / "process.yaml", NAMED[name])
    arguments = [sys.executable, "-m", "distillm", "train", str(path), "output=" + "x" * 300]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    check_message(done.stderr)
    assert not (folder / "pwned").exists()
