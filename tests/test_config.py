"""``Run``: what is refused is named, what is accepted reads back, and messages say what was meant."""

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.config import Run, as_yaml, changed, load_run, make_run, read_yaml, recipes
from distillm.divergences import DIVERGENCES
from distillm.errors import ConfigError
from distillm.explain import leaves
from distillm.methods import METHODS

KEYS = sorted({key for key, _ in leaves(Run)})
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS} - {""})


def smallest(**changes: Any) -> dict[str, Any]:
    return {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "rows.jsonl"}, **changes}


def refused(changes: dict[str, Any] | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_run(smallest(**(changes or {})), overrides)
    return str(caught.value)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["5e-4", "kd", "skew_kl", "cosine", "[1", "{{ a }}", "2024-13-45", "auto", "yes", "1:2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(KEYS + SECTIONS), values)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_any_override_is_accepted_or_refused_by_its_dotted_name(key: str, value: Any):
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    try:
        run = make_run(smallest(), [f"{key}={text}"])
    except ConfigError as error:
        named = str(error)
        # A value that another setting makes wrong is named with the section they share.
        assert key in named or key.rpartition(".")[2] in named
        assert len(named.splitlines()) <= 24
    else:
        assert as_yaml(make_run(yaml.safe_load(as_yaml(run)))) == as_yaml(run)


@given(st.text(max_size=30))
@settings(deadline=None, derandomize=True)
def test_any_text_is_an_override_or_a_configuration_error(text: str):
    with suppress(ConfigError):
        make_run(smallest(), [text])


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
@settings(deadline=None, derandomize=True)
def test_any_file_is_a_run_or_a_configuration_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_run(str(path))


@given(st.sampled_from(sorted(METHODS)), st.data())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_a_run_reads_back_from_its_yaml(tmp_path_factory: pytest.TempPathFactory, method: str, data: st.DataObject):
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
    names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,5}", fullmatch=True)
    sources = texts | st.fixed_dictionaries({"path": texts}, optional={"split": texts, "name": texts | st.none()})
    run = make_run(
        smallest(
            student=data.draw(
                st.sampled_from([{"path": "s"}, {"layers": 3}, {"layers": [0, 2]}, {"config": {"a": 1}}])
            ),
            data={
                "train": data.draw(sources),
                "test": data.draw(st.dictionaries(names, sources)),
                "template": "é\n{{ a }}",
            },
            method={"name": method},
            optim={
                "lr": data.draw(st.floats(1e-9, 1)),
                "final_lr": data.draw(st.none() | st.just(0.0)),
                "betas": [data.draw(st.floats(0, 0.999)), 0.5],
            },
            train={"max_grad_norm": data.draw(st.sampled_from([1.0, math.inf]))},
            evaluation={"seeds": data.draw(st.lists(st.integers(), min_size=1))},
            seed=data.draw(st.integers(0, 2**32 - 1)),
            provenance={"torch": "2.6", "models": {"teacher": None}},
        )
    )
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_text(as_yaml(run), encoding="utf-8")
    assert load_run(str(path)) == run
    assert changed(read_yaml(str(path)), run) == []


def test_changed_names_the_settings_that_differ():
    run = make_run(smallest())
    other = make_run(smallest(), ["optim.lr=0.1", "train.steps=3", "resume=auto"])
    assert changed(yaml.safe_load(as_yaml(run)), other) == ["optim.lr=0.1", "train.steps=3"]


def test_an_exponent_without_a_dot_is_a_number_in_a_file_and_on_the_command_line(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("student: {path: s}\nmethod: {name: sft}\ndata: {train: x}\noptim: {lr: 5e-4}\n")
    assert load_run(str(path)).optim.lr == 5e-4
    assert load_run(str(path), ["optim.lr=1e-5"]).optim.lr == 1e-5


@pytest.mark.parametrize(
    "text", ["Q: {{ instruction }}\nA:", "{% if input %}{{ input }}{% endif %}", "123", "- x", "no"]
)
def test_an_override_of_a_text_is_taken_as_it_is_typed(text: str):
    assert make_run(smallest(), [f"data.template={text}"]).data.template == text
    assert make_run(smallest(), [f"data.test.mine={text}"]).data.test == {"mine": text}


def test_an_override_reaches_into_a_section_that_a_run_left_empty():
    saved = yaml.safe_load(as_yaml(make_run({**smallest(method={"name": "sft"}), "teacher": None})))
    assert saved["teacher"] is None
    run = make_run(saved, ["teacher.path=t", "method={name: kd}"])
    assert run.teacher is not None
    assert run.teacher.path == "t"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.learning_rat=1"], ["optim.learning_rat: no such setting", "Allowed: lr, schedule"]),
        (["optim.shedule=linear"], ["optim.shedule: no such setting", "Did you mean schedule?"]),
        (["lr=1"], ["lr: no such setting", "Did you mean optim.lr?"]),
        (["train.lr=1"], ["train.lr: no such setting", "Did you mean optim.lr?"]),
        (
            ["method.name=distilm"],
            [
                "'distilm' is not a method",
                "Did you mean distillm?",
                "sft, seqkd, kd, imitkd, gkd, minillm, distillm, distillm2",
            ],
        ),
        (["method=kd"], ["method: must be a section", "{name: kd}", "given: 'kd'"]),
        (["method.name=null"], ["'None' is not a method", "sft, seqkd, kd, imitkd, gkd, minillm, distillm, distillm2"]),
        (["method.divergence=skl"], ["method.divergence: 'skl'", "Did you mean skew_kl?", "total_variation"]),
        (["method.divergence=srkl"], ["Did you mean skew_reverse_kl?"]),
        (["method.divergence=rkl"], ["Did you mean reverse_kl?"]),
        (["method.divergence=js"], ["Did you mean jsd?"]),
        (["method={name: sft, capacity: 3}"], ["method.capacity: no such setting of sft"]),
        (["method={name: kd, response_noise: 0.1}"], ["response_noise is in responses", "sampling is none"]),
        (["method={name: kd, capacity: 3}"], ["method: capacity belongs to replay", "sampling is none"]),
        (["method={name: gkd, tolerance: 3}"], ["tolerance belongs to an adaptive sampling", "sampling is mixed"]),
        (["method={name: kd, student_fraction: 1}"], ["student_fraction belongs to sampling=mixed"]),
        (["method={name: kd, off_policy: true}"], ["off_policy says nothing about sampling=none"]),
        (["method={name: imitkd, kd_weight: 0.5}"], ["kd_weight below 1 needs the dataset's rows"]),
        (["method={name: kd, temperature_squared: true}"], ["temperature_squared does nothing at temperature 1"]),
        (["method={name: minillm, replay_ratio: constant}"], ["replay_ratio belongs to off_policy=true"]),
        (["method={name: gkd, beta: 1.0}"], ["beta is 1.0, and the mixing weight of jsd is between 0 and 1"]),
        (["method={name: gkd, kd_weight: 0}"], ["kd_weight=0 leaves nothing to learn"]),
        (["teacher={adapter_off: true, dtype: bfloat16}"], ["dtype says nothing"]),
        (["data.teacher_system=x", "teacher=null", "method={name: sft}"], ["there is no teacher"]),
        (["data.teacher_system=x", "method.name=minillm"], ["set method.teacher_mix=0"]),
        (["method.name=minillm", "generation.temperature=0"], ["must be above 0 for minillm"]),
        (["teacher={adapter_off: true}"], ["teacher.adapter_off needs student.lora"]),
        (["teacher={adapter_off: true, path: x}"], ["give path or adapter_off, not both"]),
        (["student={layers: 2, lora: {merge: false}}"], ["lora.merge=false needs a base that others can load"]),
        (["optim.schedule=cos"], ["'cos' is not allowed", "Did you mean cosine?"]),
        (["optim=null"], ["optim: must be a section", "given: nothing"]),
        (["student.layers=many"], ["student.layers: must be a valid integer", "or must be a valid list", "'many'"]),
        (["data.fields.answer=output"], ["answer is not a field of the task (instruction, input, output)"]),
        (["data.train=null"], ["data.train: must be a valid string", "given: nothing"]),
        (["evaluation.seeds=[]"], ["evaluation.seeds: must have at least 1 item"]),
        (["evaluation.seeds=[a]"], ["evaluation.seeds.0: must be a valid integer"]),
        (["optim.lr=1", "optim.lr.x=1"], ["optim.lr.x: lr is not a section"]),
        (["method.name.x=1"], ["method.name"]),
        (["evaluation.seeds=[1]", "evaluation.seeds.0=3"], ["evaluation.seeds.0: seeds is not a section"]),
        (["optim.lr"], ["'optim.lr' is not an override; write key.path=value"]),
        (["=3"], ["is not an override"]),
        (["optim.lr=[1"], ["optim.lr=[1: the value is not YAML"]),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed_and_what_was_probably_meant(overrides: list[str], said: list[str]):
    message = refused(None, *overrides)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("method.alpha=1", "method: alpha is 1.0, and the skew of skew_kl is below 1"),
        ("method.alpha=-0.1", "greater than or equal to 0"),
        ("method.initial_probability=1.5", "method.initial_probability: must be less than or equal to 1"),
        ("optim.lr=0", "optim.lr: must be greater than 0"),
        ("optim.lr=.inf", "optim.lr: must be a finite number"),
        ("optim.lr=.nan", "optim.lr: must be a finite number"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1: must be less than 1"),
        ("train.steps=0", "train.steps: must be greater than 0"),
        ("train.steps=1.5", "train.steps: must be a valid integer"),
        ("train.steps=yes", "train.steps: must be a number; given: true"),
        ("generation.top_p=0", "generation.top_p: must be greater than 0"),
        ("generation.temperature=-1", "generation.temperature: must be greater than or equal to 0"),
        ("seed=-1", "seed: must be greater than or equal to 0"),
        ("seed=4294967296", "seed: must be less than 4294967296"),
        ("data.max_prompt=512", "max_prompt (512) must be below max_length (512)"),
        ("data.text_length=1", "data.text_length: must be greater than or equal to 2"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_limit(override: str, limit: str):
    assert limit in refused(None, override)


@pytest.mark.parametrize(
    ("student", "found"),
    [
        ({}, "none of them"),
        ({"path": "s", "layers": 3}, "path and layers"),
        ({"path": "s", "config": {"model_type": "llama"}, "layers": [0]}, "path and config and layers"),
    ],
)
def test_a_student_has_exactly_one_origin(student: dict[str, Any], found: str):
    assert f"give exactly one of path, config and layers (found {found})" in refused({"student": student})


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"method": {"name": "kd"}}, "method kd"),
        ({"method": {"name": "distillm"}}, "method distillm"),
        ({"method": {"name": "sft"}, "student": {"layers": 3}}, "student.layers"),
        ({"method": {"name": "sft"}, "data": {"train": "x", "responses": "teacher"}}, "data.responses=teacher"),
        ({"method": {"name": "sft"}, "validation": {"select": "divergence"}}, "validation.select=divergence"),
    ],
)
@pytest.mark.parametrize("teacher", [None, {}])
def test_whatever_needs_a_teacher_says_so(changes: dict[str, Any], who: str, teacher: Any):
    assert f"teacher.path is missing, and {who} needs a teacher" in refused({**changes, "teacher": teacher})


def test_sft_needs_no_teacher():
    assert make_run(smallest(teacher=None, method={"name": "sft"})).teacher is None


def test_epochs_and_steps_exclude_each_other():
    assert "give epochs or steps, not both" in refused(None, "train.steps=3", "train.epochs=1")


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("parameter", ["alpha", "beta", "weight", "head_mass"])
def test_a_divergence_takes_its_own_parameters_only(divergence: str, parameter: str):
    settings = {"name": "distillm", "divergence": divergence, parameter: 0.3}
    owners = {"skew_kl": ["alpha"], "skew_reverse_kl": ["alpha"], "jsd": ["beta"], "symmetric_kl": ["weight"]}
    owners |= {"alpha_beta": ["alpha", "beta"], "adaptive_kl": ["head_mass"]}
    if parameter in owners.get(divergence, []):
        method: Any = make_run(smallest(method=settings)).method
        assert getattr(method, parameter) == 0.3
    else:
        assert f"not to {divergence}" in refused({"method": settings})


def test_every_method_and_divergence_of_the_library_can_be_named():
    for method in METHODS:
        assert make_run(smallest(method={"name": method})).method.name == method
    for divergence in DIVERGENCES:
        run = make_run(smallest(validation={"divergence": divergence}, method={"name": "kd", "divergence": divergence}))
        assert run.validation.divergence == divergence


def test_several_mistakes_are_all_named_up_to_a_dozen():
    message = refused({"optim": {f"x{i}": i for i in range(40)}}, "seed=-1")
    assert "41 settings cannot be used" in message
    assert message.endswith("and 29 more")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no settings"),
        (b"# only a remark\n", "holds no settings"),
        (b"- student\n- teacher\n", "holds no settings"),
        (b"student: {path: [", "is not YAML"),
        (b"student: caf\xe9\n", "is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"a: 2024-13-45\n", "is not YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_said_to(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_run(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_suggests_the_recipe_or_file_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"Did you mean dolly-gpt2-distillm\?"):
        load_run("dolly-gpt2-distilm")
    with pytest.raises(ConfigError, match=r"Did you mean mine\.yaml\?"):
        load_run("mine.yml")
    with pytest.raises(ConfigError, match=r"is a folder without a run\.yaml"):
        load_run(str(tmp_path))


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_a_run_and_says_what_it_is_in_its_first_line(name: str):
    run = load_run(name)
    assert run.method.name in METHODS
    assert recipes()[name].read_text(encoding="utf-8").startswith("# ")


def test_recipes_named_in_messages_are_there():
    assert "demo" in recipes()


def test_the_schema_describes_every_setting():
    schema = Run.model_json_schema()
    described = json.dumps(schema)
    for section in [schema, *schema["$defs"].values()]:
        for name, setting in section["properties"].items():
            meant = schema["$defs"][setting["$ref"].rpartition("/")[2]] if "$ref" in setting else setting
            assert setting.get("description") or meant.get("description"), name
        assert section["additionalProperties"] is False
    for key in KEYS:
        assert f'"{key.rpartition(".")[2]}"' in described


def test_a_folder_that_holds_no_run_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_yaml("demo")["output"] == "demo/distillm"


def test_a_change_of_method_begins_from_the_defaults_of_the_new_one() -> None:
    started = smallest(teacher={"path": "t"}, method={"name": "distillm", "divergence": "jsd", "capacity": 50})
    other = make_run(copy.deepcopy(started), ["method.name=kd", "method.kd_weight=0.5"]).method
    assert (other.name, other.divergence, other.kd_weight) == ("kd", "forward_kl", 0.5)  # type: ignore[union-attr]
    same = make_run(copy.deepcopy(started), ["method.name=distillm"]).method
    assert (same.divergence, same.capacity) == ("jsd", 50)  # type: ignore[union-attr]


def test_a_bare_off_is_off_though_yaml_reads_it_as_false() -> None:
    given: dict[str, Any] = {
        "teacher": {"path": "teacher"},
        "student": {"path": "student"},
        "data": {"train": "rows.jsonl"},
    }
    teacher = make_run(given, ["teacher.cache=off"]).teacher
    assert teacher is not None
    assert teacher.cache == "off"
    assert "off" in as_yaml(make_run(given, ["teacher.cache=off"]))
    assert make_run(yaml.safe_load(as_yaml(make_run(given, ["teacher.cache=off"])))).teacher == teacher


def test_a_setting_on_the_command_line_takes_the_place_of_its_rival() -> None:
    given = {"teacher": {"path": "t"}, "student": {"layers": 2}, "data": {"train": "x"}, "train": {"epochs": 3}}
    run = make_run(copy.deepcopy(given), ["train.steps=7", "student.path=s"])
    assert (run.train.steps, run.train.epochs) == (7, None)
    assert (run.student.path, run.student.layers) == ("s", None)
    back = make_run(copy.deepcopy(given) | {"train": {"steps": 7}}, ["train.epochs=2"])
    assert (back.train.steps, back.train.epochs) == (None, 2)
    for overrides in (["train.steps=7", "train.epochs=2"], ["train.epochs=2", "train.steps=7"]):
        with pytest.raises(ConfigError, match="not both"):
            make_run(copy.deepcopy(given), overrides)
    assert make_run(copy.deepcopy(given), ["train.steps=null"]).train.epochs == 3
