"""Settings that do not go together are refused, not ignored; a source of rows is a name or a section."""

from typing import Any

import pytest
import yaml

from distillm.config import as_yaml, changed, make_run
from distillm.data_settings import Source
from distillm.errors import ConfigError

SMALLEST = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "rows.jsonl"}}


def settings(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(SMALLEST | changes))


def refused(*overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_run(settings(**changes), overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_may_be_of_any_type_and_a_student_of_those_that_train(dtype: str):
    run = make_run(settings(teacher={"path": "t", "dtype": dtype}))
    assert run.teacher is not None
    assert run.teacher.dtype == dtype
    if dtype == "float16":
        assert "student.dtype: 'float16' is not allowed" in refused("student.dtype=float16")
    else:
        assert make_run(settings(), [f"student.dtype={dtype}"]).student.dtype == dtype


def test_a_constant_learning_rate_has_no_final_one():
    assert "final_lr belongs to cosine and linear" in refused("optim.schedule=constant", "optim.final_lr=1e-6")
    assert make_run(settings(), ["optim.schedule=constant"]).optim.final_lr is None
    saved = yaml.safe_load(as_yaml(make_run(settings(), ["optim.final_lr=1e-6"])))
    assert make_run(saved, ["optim.schedule=constant", "optim.final_lr=null"]).optim.schedule == "constant"


def test_the_learning_rate_does_not_end_above_its_peak():
    assert "final_lr (0.001) must be at most lr (0.0005)" in refused("optim.final_lr=1e-3")
    assert make_run(settings(), ["optim.lr=1e-9"]).optim.lr == 1e-9  # its default is no wish


def test_warm_up_ends_before_the_steps_do():
    assert "optim.warmup_steps (5) must be below train.steps (5)" in refused("optim.warmup_steps=5", "train.steps=5")
    assert make_run(settings(), ["optim.warmup_steps=4", "train.steps=5"]).optim.warmup_steps == 4


@pytest.mark.parametrize("origin", [{"layers": 2}, {"config": {"model_type": "llama"}}])
def test_what_only_a_loaded_student_reads_is_refused_for_another(origin: dict[str, Any]):
    assert "gguf_file is a file inside path" in refused(student=origin | {"gguf_file": "x.gguf"})


def test_a_student_of_layers_runs_the_teachers_code_or_none():
    layers = {"layers": 2, "trust_remote_code": True}
    assert "give teacher.trust_remote_code instead" in refused(student=layers)
    assert make_run(settings(student=layers | {"tokenizer": "own"})).student.trust_remote_code


@pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", "", "a b", "é", "a\nb", "-x"])
def test_a_test_set_is_named_as_a_file_can_be(name: str):
    message = refused(data={"train": "x", "test": {name: "rows.jsonl"}})
    assert f"data: test: {name!r} cannot name a file of scores" in message


@pytest.mark.parametrize("name", ["dolly", "dolly-2", "v1.5", "_", "2"])
def test_ordinary_names_of_test_sets_are_taken(name: str):
    assert make_run(settings(data={"train": "x", "test": {name: "y"}})).data.test == {name: "y"}


# ------------------------------------------------------------------------------------------------------ sources


def test_a_source_is_a_name_or_a_section_and_reads_back():
    part = {"path": "saved", "split": "train", "name": None}
    data = {"train": {"path": "saved", "split": "train"}, "test": {"a": "x.jsonl", "b": part}, "text": {"path": "t"}}
    run = make_run(settings(data=data))
    assert run.data.train == run.data.test["b"] == Source(path="saved", split="train")
    assert run.data.test["a"] == "x.jsonl"
    assert str(run.data.train) == "saved, split train"
    saved = yaml.safe_load(as_yaml(run))
    assert saved["data"]["train"] == part
    assert make_run(saved) == run
    assert changed(saved, run) == []


def test_overrides_reach_into_a_source_and_replace_it():
    split = {"train": {"path": "saved", "split": "train"}, "test": {"a": {"path": "saved", "split": "test"}}}
    run = make_run(settings(data=split), ["data.train.split=validation", "data.test.a.split=other"])
    assert run.data.train == Source(path="saved", split="validation")
    assert run.data.test == {"a": Source(path="saved", split="other")}
    again = make_run(settings(data=split), ["data.train=x.jsonl", "data.test.a={path: p, name: n}", "data.text=123"])
    assert again.data.train == "x.jsonl"
    assert again.data.test == {"a": Source(path="p", name="n")}
    assert again.data.text == "123"
    assert changed(yaml.safe_load(as_yaml(make_run(settings(data=split)))), run) == [
        "data.train.split=validation",
        "data.test.a.split=other",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": {"split": "x"}}, ["data.train.path: missing beside split"]),
        ({"train": {"path": "x", "splitt": "y"}}, ["data.train.splitt: no such setting. Did you mean split?"]),
        ({"train": {"path": 3}}, ["data.train.path: must be a valid string; given: 3"]),
        ({"train": 3}, ["data.train: must be a valid string or must be a section", "given: 3"]),
        ({"train": "x", "test": {"a": {"path": "x", "spli": "y"}}}, ["data.test.a.spli: no such setting"]),
        ({"train": "x", "test": {"a": ["x"]}}, ["data.test.a: must be a valid string or must be a section"]),
        (
            {"train": "x", "validation": {"path": None}},
            ["data.validation.path: must be a valid string; given: nothing"],
        ),
    ],
)
def test_a_mistake_inside_a_source_is_named_there(data: dict[str, Any], said: list[str]):
    message = refused(data=data)
    assert "1 setting cannot be used" in message
    for part in said:
        assert part in message
