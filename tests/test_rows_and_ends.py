"""The rows of a run: splits of saved folders, responses the teacher writes anew, and the token that ends a turn."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from command_line import done, refused
from distillm.assembly import make_accelerator
from distillm.config import Run, load_run
from distillm.errors import ConfigError
from distillm.loading import Models, load_models
from distillm.pipeline import distill
from distillm.project import build
from distillm.rows import end_of_response, load_rows, read_data
from distillm.vocabulary import turn_end
from tiny import CHAT_TEMPLATE, save, tiny_causal, tiny_tokenizer
from tiny_run import Heard, events, lines, materials, rows, scores, tiny_run, write_rows

TURN = "<turn>"
TURNS = CHAT_TEMPLATE.replace("{{ eos_token }}", TURN)
SHORT = {"train.steps": 1, "validation.every": 1, "data.text": None}


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved folder with two splits."""
    datasets.disable_progress_bars()
    path = tmp_path_factory.mktemp("saved") / "both"
    parts = {"train": rows(6), "held": rows(3, 20)}
    text = [{"text": "A river runs through the valley and turns the old mill."}]
    parts["text"] = [{"instruction": "", "output": "", **row} for row in text]
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(str(path))
    return str(path)


# ------------------------------------------------------------------------------------------------------ splits


def test_a_run_reads_the_splits_it_names(made: Path, saved: str, tmp_path: Path):
    parts = {name: {"path": saved, "split": name} for name in ("train", "held", "text")}
    changes = {"data.train": parts["train"], "data.validation": parts["held"], "data.text": parts["text"]}
    run = tiny_run(made, tmp_path / "run", changes | {"data.test": {"held": parts["held"]}})
    project = build(run)
    assert [e.id for e in project.train.examples] == [f"both-train:{i}" for i in range(6)]
    assert list(project.validation.prompts.values()) == [row["instruction"] for row in rows(3, 20)]
    assert project.tests["held"].references == {f"both-held:{i}": [row["output"]] for i, row in enumerate(rows(3, 20))}
    assert len(project.text) == 1 + (sum(len(e.tokens) for e in project.text) - 1) // 16


@pytest.mark.parametrize("key", ["train", "text"])
def test_a_split_that_does_not_apply_is_refused(made: Path, tmp_path: Path, key: str):
    given = {"path": str(made / ("train.jsonl" if key == "train" else "text.txt")), "split": "train"}
    with pytest.raises(ConfigError, match=r"split='train' does not apply, because .* is a file; leave split out"):
        read_data(tiny_run(made, tmp_path / "run", {f"data.{key}": given}))


# ----------------------------------------------------------------------------------------- the teacher's responses


def test_the_datasets_responses_do_not_count_where_the_teacher_writes_them(made: Path, tmp_path: Path):
    path = tmp_path / "asked.csv"
    long = "long " * 200
    path.write_text("instruction,output\n" + "".join(f"Say {i}.,{['', long][i % 2]}\n" for i in range(10)))
    run = tiny_run(
        made, tmp_path / "run", {"data.train": str(path), "data.validation": None, "data.responses": "teacher"}
    )
    heard = Heard()
    found = load_rows(run, read_data(run), load_models(run, make_accelerator(run), heard.note), heard.note)
    assert len(found.train.examples) + len(found.validation.examples) == 10
    assert not any(any(e.targets) for e in found.train.examples)
    assert not any(found.train.references.values())
    [said] = [note for note in heard.said if note.startswith(str(path))]
    assert "10 of 10 rows used: 10 without a response, for a model to write" in said
    assert "cut" not in said
    assert all(found.tests["numbers"].references.values()), "test rows keep their own"


# ------------------------------------------------------------------------------------------------ the end of a turn


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(TURN, normalized=False)]})
    return tokenizer


def models_of(tokenizer: Any, end_ids: tuple[int, ...]) -> Models:
    student: Any = None
    return Models(tokenizer, student, None, student, end_ids)


@pytest.mark.parametrize(
    ("template", "end_ids", "ends"),
    [
        (TURNS, (1, 300), 300),  # as Gemma: the turn ends with a token that only the generation configuration names
        (TURNS, (300, 1), 300),
        (TURNS, (1,), 1),  # a token that ends no generation is no end
        (CHAT_TEMPLATE, (1, 300), 1),  # the turn ends with the tokenizer's own end token
        (TURNS.replace("{{ '\\n' }}", "</s>"), (1, 300), 300),  # the first one counts
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", (1, 300), 1),  # nothing ends a turn
        ("{{ raise_exception('no') }}", (1, 300), 1),
        (None, (1, 300), 1),
    ],
)
def test_a_turn_ends_with_the_first_end_token_that_the_template_writes(
    template: str | None, end_ids: tuple[int, ...], ends: int
):
    tokenizer = chat_tokenizer(template)
    assert tokenizer.convert_tokens_to_ids(TURN) == 300
    assert turn_end(tokenizer, end_ids) == ends


def test_only_the_chat_template_ends_responses_its_own_way(made: Path, tmp_path: Path):
    models = models_of(chat_tokenizer(TURNS), (1, 300))
    data = tiny_run(made, tmp_path / "run").data
    ends = {t: end_of_response(data.model_copy(update={"template": t}), models) for t in ("chat", "alpaca", "{{ a }}")}
    assert ends == {"chat": 300, "alpaca": 1, "{{ a }}": 1}


def test_a_chat_student_learns_the_turns_end_and_stops_there(tmp_path: Path):
    tokenizer = chat_tokenizer(TURNS)
    made = materials(tmp_path)
    student = tiny_causal(vocab_size=301, seed=2)
    student.generation_config.eos_token_id = [1, 300]
    save(student, tokenizer, made / "student")
    write_rows(made / "train.jsonl", [{"instruction": "Say one.", "output": "one"}] * 12)
    changes = {"data.template": "chat", "data.text": None, "data.test": {}, "method": {"name": "sft"}, "teacher": None}
    changes |= {"data.validation": None, "optim.lr": 0.02, "train.steps": 30, "student.dropout": None}
    run = tiny_run(made, tmp_path / "run", changes)
    project = build(run)
    assert {e.tokens[-1] for e in project.train.examples} == {300}
    folder = distill(run)
    options = ("--output", tmp_path / "answer.jsonl", "--max-new-tokens", 40)
    done("generate", folder, "Say one.", *options)
    [answer] = lines(tmp_path / "answer.jsonl")
    assert answer["response"] == "one"


# ---------------------------------------------------------------------------------- a run on another machine, and again


@pytest.fixture(name="run", scope="module")
def _run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_run(made, tmp_path_factory.mktemp("runs") / "run", SHORT | {"evaluation.seeds": [1]}))


def test_eval_and_generate_need_neither_the_device_nor_the_tracker_of_the_run(made: Path, run: Path, tmp_path: Path):
    saved = yaml.safe_load((run / "run.yaml").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "student").symlink_to(run / "student")
    (elsewhere / "run.yaml").write_text(yaml.safe_dump(saved | {"device": "mps", "tracker": "wandb"}))
    done("generate", elsewhere, "Say one.", "--device", "cpu")
    done("eval", elsewhere, "--data", made / "test.jsonl", "--limit", 1, "--device", "cpu")
    assert "'gpu' is not allowed" in refused("generate", elsewhere, "Say one.", "--device", "gpu")


def test_eval_does_not_replace_scores_unless_told_to(made: Path, run: Path):
    data = write_rows(made / "again.jsonl", rows(1))
    done("eval", run, "--data", data)
    target = run / "eval" / "again-student.json"
    before = target.read_bytes()
    message = refused("eval", run, "--data", data, "--temperature", 0)
    assert f"{target} holds scores already; give --output" in message
    assert target.read_bytes() == before
    done("eval", run, "--data", data, "--temperature", 0, "--output", target)
    assert scores(run)["again-student.json"]["decoding"]["temperature"] == 0


def test_a_recipe_is_not_written_into_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[Run]()
    monkeypatch.setattr("distillm.pipeline.distill", lambda run, *_: asked.append(run) or tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    done("train", "demo")
    Path("mine").mkdir()
    Path("mine", "run.yaml").write_text("student: {path: s}\nteacher: {path: t}\ndata: {train: x}\noutput: other\n")
    done("train", "mine")
    done("train", "mine", "output=third")
    assert [run.output for run in asked] == ["demo/distillm", "mine", "third"]


def test_a_run_notes_what_open_settings_came_to_and_goes_on_as_it_was_asked(made: Path, tmp_path: Path):
    open_ = {"train.steps": None, "train.epochs": 2, "validation.every": None, "checkpoint.every": None}
    run = tiny_run(made, tmp_path / "run", SHORT | open_ | {"data.test": {}, "method": {"name": "sft"}})
    folder = distill(run)
    saved = yaml.safe_load((folder / "run.yaml").read_text())
    resolved = {"train.steps": 8, "validation.every": 4, "checkpoint.every": 4, "evaluation.temperature": 1.0}
    assert saved["provenance"]["resolved"] == resolved | {"teacher.cache": "memory"}
    distill(run.model_copy(update={"resume": "auto"}))
    distill(load_run(str(folder / "run.yaml"), ["resume=auto"]))
    assert [event["message"] for event in events(folder, "resumed")] == ["from step-00000008"] * 2


def test_warm_up_ends_before_the_epochs_do(made: Path, tmp_path: Path):
    changes = {"train.steps": None, "optim.warmup_steps": 4, "data.text": None}
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps \(4\) must be below the 4 steps of train\.epochs=1"):
        build(tiny_run(made, tmp_path / "run", changes))


def test_another_place_of_a_test_set_drops_its_scores_alone(made: Path, saved: str, tmp_path: Path):
    held = {"path": saved, "split": "held"}
    tests = {"a": held, "a-2": held}
    changes = SHORT | {"data.test": tests, "evaluation.seeds": [1], "evaluation.compare": []}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    marked = {name: json.dumps(score | {"marked": True}) for name, score in scores(folder).items()}
    for name, text in marked.items():
        (folder / "eval" / name).write_text(text)
    distill(load_run(str(folder / "run.yaml"), ["data.test.a.split=train", "resume=auto"]))
    found = scores(folder)
    assert {name: score.get("marked", False) for name, score in found.items()} == {
        "a-student.json": False,
        "a-2-student.json": True,
    }
    assert found["a-student.json"]["num_rows"] == 6


def test_prompts_alone_need_no_name_for_their_output(made: Path, tmp_path: Path):
    asked = [{"question": row["instruction"]} for row in rows(6, output=False)]
    source = str(write_rows(tmp_path / "asked.jsonl", asked))
    changes = {**SHORT, "data.train": source, "data.validation": source, "data.test": {"asked": source}}
    fields = {"instruction": "question", "output": "answer"}
    named = {"data.fields": fields, "data.template": "Q: {{ question }}\nA: ", "data.responses": "teacher"}
    display = Heard()
    project = build(tiny_run(made, tmp_path / "run", changes | named), display)
    assert {e.origin for e in (*project.train.examples, *project.tests["asked"].examples)} == {"teacher"}
    assert all(project.tests["asked"].references[e.id] for e in project.tests["asked"].examples)
    assert any("of the teacher's 18 responses are cut at generation.max_new_tokens=4" in text for text in display.said)
