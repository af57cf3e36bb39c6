"""Every student has a model card: true to its run, read back by the hub's own code, private, and inert."""

import contextlib
import getpass
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from distillm import pipeline
from distillm.card import card_of, code, hub_names, is_hub_name, last_part, write_card
from distillm.errors import Interrupted
from distillm.pipeline import distill
from distillm.report import read_run
from fabricated_run import CONFIG, fabricate
from test_security_output import HOSTILE, hostile_run
from tiny_run import lines, materials, tiny_run

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("llama", {}),
    "adapter": ("llama", {"student.lora": {"r": 2, "merge": False}, "student.dropout": None}),
    "merged": ("llama", {"student.lora": {"r": 2}, "student.dropout": None}),
    "layers": ("llama", {"student": {"layers": [0]}}),
    "config": ("llama", {"method": {"name": "sft"}, "teacher": None, "student.path": None,
                         "student.tokenizer": "TEACHER", "student.config": {
                             "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "num_key_value_heads": 2}}),
    "seq2seq": ("bart", {"data.text": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of student."""
    home = tmp_path_factory.mktemp("students")
    made: dict[str, Path] = {}
    for kind in ("llama", "bart"):
        (home / kind).mkdir()
        made[kind] = materials(home / kind, kind)
    found: dict[str, Path] = {}
    for name, (kind, changes) in KINDS.items():
        given = {key: str(made[kind] / "teacher") if value == "TEACHER" else value for key, value in changes.items()}
        short = {"train.steps": 2, "validation.every": 2, "evaluation.seeds": [1, 2]}
        found[name] = distill(tiny_run(made[kind], home / f"run-{name}", short | given))
    return found


def card(run: Path) -> ModelCard:
    return ModelCard.load(run / "student" / "README.md")


def numbers(run: Path, system: str) -> dict[str, Any]:
    return json.loads((run / "eval" / f"numbers-{system}.json").read_text(encoding="utf-8"))["scores"]


@pytest.mark.parametrize("name", KINDS)
def test_the_metadata_come_back_as_they_were_written(students: dict[str, Path], name: str):
    found = card(students[name])
    text = (students[name] / "student" / "README.md").read_text(encoding="utf-8")
    assert str(found) == text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == ("peft" if name == "adapter" else "transformers")
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"][0] == "distillm"
    assert ("knowledge-distillation" in metadata["tags"]) == (name != "config")
    assert not metadata.keys() & {"license", "language", "base_model", "datasets"}  # nothing of it is known
    assert found.data.eval_results is not None
    means = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert means == {name: score["mean"] for name, score in numbers(students[name], "student").items()}
    spread = {result.metric_type: result.metric_args for result in found.data.eval_results}
    assert spread["response_tokens"] == {
        "std": numbers(students[name], "student")["response_tokens"]["std"], "seeds": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_lines_about_its_use_run_as_they_are(students: dict[str, Path], name: str):
    (block,) = re.findall(r"```python\n(.*?)```", card(students[name]).text, re.DOTALL)
    assert ("needs peft" in block) == (name == "adapter")
    assert ("AutoModelForSeq2SeqLM" in block) == (name == "seq2seq")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(block.replace("OWNER/NAME", str(students[name] / "student")).replace('"..."', '"Q: Say one.\\nA: "'))
    assert said.getvalue().endswith("\n")


def test_it_says_what_the_run_was(students: dict[str, Path]):
    text = card(students["whole"]).text
    assert "a student of `teacher`" in text
    assert "Compression 2.00 to 1: the student has 50.0 % of the parameters." in text
    assert "Trained for 2 steps of 3 rows." in text
    assert "- `method.initial_probability`: `0.7`" in text
    assert "method.alpha" not in text  # the default
    assert "- Trained on: `train.jsonl`, 12 rows" in text
    assert "```text\nQ: {{ instruction }}\nA: \n```" in text
    whole = numbers(students["whole"], "student")["divergence"]["mean"]
    before = numbers(students["whole"], "before")["divergence"]["mean"]
    assert f"| `Divergence (nats/token)` | {before:.3f} | {whole:.3f} | – |" in text
    assert "fine-tuned without a teacher" in card(students["config"]).text
    assert "random weights, as a `llama`" in card(students["config"]).text
    assert "It began with the layers `0` of the teacher." in card(students["layers"]).text
    assert "licences of the teacher and the data." in card(students["layers"]).text
    assert "licences of the data." in card(students["config"]).text
    assert "licences of the model it began as, the teacher and the data." in card(students["whole"]).text
    assert "holds a LoRA adapter alone" in card(students["adapter"]).text
    assert "merged into the weights" in card(students["merged"]).text


@pytest.mark.parametrize("name", KINDS)
def test_it_holds_no_text_of_a_row_and_no_place_of_this_machine(students: dict[str, Path], name: str):
    text = (students[name] / "student" / "README.md").read_text(encoding="utf-8")
    run = students[name]
    assert card_of(read_run(run)) == text
    assert read_run(run).provenance["hub"] == []
    assert str(run.parent) not in text
    assert run.parent.name not in text
    for row in lines(run / "samples.jsonl"):
        assert row["prompt"] not in text
        assert row["reference"] not in text


# ---------------------------------------------------------------------------------------------------- from its config


def configured(folder: Path, **sections: Any) -> str:
    """The card of a fabricated run whose configuration is changed by ``sections``."""
    run = fabricate(folder, num_steps=20, every=10)
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for name, values in sections.items():
        config[name] = None if values is None else {**config.get(name, {}), **values}
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    return card_of(read_run(run))


def metadata(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_what_the_hub_knows_is_linked_and_local_folders_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    found = metadata(
        configured(tmp_path / "a", student={"path": "org/small"}, data={"train": "dolly", "text": "org/txt"})
    )
    assert (found["base_model"], found["base_model_relation"]) == ("org/small", "finetune")
    assert found["datasets"] == ["databricks/databricks-dolly-15k", "org/txt"]
    adapter = configured(tmp_path / "b", student={"path": "org/small", "lora": {"r": 8, "merge": False}})
    assert metadata(adapter)["base_model_relation"] == "adapter"
    shrunk = configured(tmp_path / "c", student={"path": None, "layers": 4}, teacher={"path": "org/big"})
    assert metadata(shrunk)["base_model"] == "org/big"
    assert "It began with `4` layers, evenly spaced, of the teacher." in shrunk
    assert metadata(shrunk)["model-index"][0]["name"] == "big-4-layers-distillm"
    local = metadata(configured(tmp_path / "d", student={"path": "models/mine"}))
    assert "base_model" not in local
    assert "datasets" not in local
    for path in ("/abs/x", "./x", "~/x", "../x", "a/b/c", "x.gguf", "data.jsonl", "models/mine", "C:\\x\\y", "a--b/c"):
        assert not is_hub_name(path)
    assert [last_part(p) for p in ("org/x", "/home/a/x/", "C:\\u\\x.gguf", "x")] == ["x", "x", "x.gguf", "x"]


def test_a_run_records_what_was_the_hubs_so_that_its_card_is_the_same_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "dolly").mkdir()
    config: dict[str, Any] = {
        "student": {"path": "models/mine"},
        "teacher": {"path": "org/big"},
        "data": {"train": "dolly", "validation": "v.jsonl", "test": {"a": {"path": "org/set", "split": "test"}}},
    }
    assert hub_names(config) == ["dolly", "org/big", "org/set"]
    recorded = {**CONFIG["provenance"], "hub": hub_names(config)}
    here = configured(tmp_path / "a", **config, provenance=recorded)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "base_model" not in metadata(here)
    assert "It began as `mine`." in here
    assert metadata(here)["datasets"] == ["databricks/databricks-dolly-15k"]
    assert card_of(read_run(tmp_path / "a")) == here


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"path": None, "cached": "0123456789abcdef"}}, "states of all rows were kept (`0123456789ab"),
        ({"teacher": {"path": None, "server": {"url": "http://10.0.0.1/v1", "model": "/srv/big"}}}, "`big`, on a serv"),
        ({"teacher": {"path": None, "adapter_off": True}}, "the student itself without its adapter"),
        ({"teacher": None, "method": {"name": "seqkd"}, "data": {"responses_server": {"model": "org/big"}}},
         "`org/big`, on a server"),
        ({"method": {"name": "sft"}}, "fine-tuned without a teacher"),
        ({"method": {"name": "sft"}, "data": {"responses": "teacher"}}, "a student of `models/SmolLM2-135M-Instruct`"),
    ],
)  # fmt: skip
def test_the_teacher_wherever_it_is(tmp_path: Path, sections: dict[str, Any], said: str):
    text = configured(tmp_path / "run", **sections)
    assert said in text
    assert "10.0.0.1" not in text


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("distillm train run.yaml method.alpha=0.2 seed=3", "distillm train run.yaml method.alpha=0.2 seed=3"),
        ("distillm train /home/ali ce/run.yaml output=/home/ali ce/x seed=1", "distillm train ... run.yaml ... seed=1"),
        ("distillm train dolly-gpt2-distillm data.train=/srv/x.jsonl", "distillm train dolly-gpt2-distillm ..."),
        (["distillm", "train", "C:\\Users\\alice\\run.yaml", "data.system=be nice"], "distillm train run.yaml ..."),
    ],
)  # fmt: skip
def test_the_command_names_no_place_and_no_person(tmp_path: Path, command: Any, shown: str):
    text = configured(tmp_path / "run", provenance={**CONFIG["provenance"], "command": command})
    assert f"- Command: `{shown}`\n" in text
    assert not re.search(r"home|alice|ali |srv|Users", text)
    assert getpass.getuser() not in shown


# ------------------------------------------------------------------------------------------------------------ hostile


def test_rows_that_were_held_out_are_told(tmp_path: Path):
    rows = {"provenance": {"rows": {"train": 30, "validation": 5}}}
    text = configured(tmp_path / "run", data={"train": "a.jsonl", "validation": None, "test_size": 5}, **rows)
    assert "- Trained on: `a.jsonl`, 30 rows\n- Chosen by: 5 more rows of the same\n" in text
    assert "- The test set `held_out`: rows of the same, which were not trained on" in text
    text = configured(tmp_path / "other", data={"train": "a.jsonl", "validation": "b.jsonl"}, **rows)
    assert "Chosen by: `b.jsonl`, 5 rows" in text
    assert "held_out" not in text


def test_a_student_chosen_by_another_figure_is_not_that_of_the_best_before(tmp_path: Path):
    folder = tmp_path / "run"
    assert "The weights are those of step" in configured(folder)
    event = {
        "kind": "event",
        "step": 20,
        "event": "resumed",
        "message": "with changed settings: validation.select=rouge_l",
    }
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    assert "The weights are those of step" not in card_of(read_run(folder))


def structure(text: str) -> list[tuple[str, str, int]]:
    """What a reader of Markdown makes of the card, without the words."""
    body = ModelCard(text).text
    found: list[tuple[str, str, int]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        found.append((token.type, token.tag, token.level))
        found += [(child.type, child.tag, child.level) for child in token.children or []]
    return found


MARKDOWN = [
    "---", "\n---\nlicense: mit\n---\n", "`x` | y |\n# Z", "```\n# Z\n```", "[a](b)", "<http://evil.example>",
    "a: &b !!python/object", "\\", "\\|",
]  # fmt: skip


@pytest.mark.parametrize("evil", [*(evil for evil in HOSTILE if "\0" not in evil), *MARKDOWN])
def test_nothing_in_a_name_steers_the_card(tmp_path: Path, evil: str):
    texts: list[str] = []
    for folder, word in (("plain", "W~x"), ("evil", evil)):
        run = hostile_run(tmp_path / folder, word)
        config = yaml.safe_load((run / "run.yaml").read_text())
        config["data"] |= {
            "template": f"Q {word}",
            "system": word,
            "text": word,
            "validation": {"path": word, "split": word},
        }
        config["student"] = {"path": f"x/y/{word}", "lora": {"targets": [word], "merge": True}}
        config["optim"] = {"lr": word}
        config["provenance"]["models"]["student"] = {"parameters": 5, "layers": word, "width": word}
        config["provenance"]["rows"] = {"train": word}
        (run / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        path = write_card(run)
        texts.append(path.read_text(encoding="utf-8"))
        assert str(ModelCard.load(path)) == texts[-1]
    plain, found = texts
    assert structure(found) == structure(plain)
    kinds = {kind for kind, _, _ in structure(found)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}
    data = metadata(found)
    assert data.keys() <= {"library_name", "pipeline_tag", "tags", "model-index", "datasets"}
    assert all(re.fullmatch(r"[\w.-]+", tag) for tag in data["tags"])
    assert re.fullmatch(r"[\w.()/% -]+", data["model-index"][0]["name"])
    assert data["model-index"][0]["results"][0]["task"] == {"type": "text-generation"}


def test_code_is_never_empty_and_never_ends_early():
    assert code("a`b|c\\d") == "`a'b/c/d`"
    assert code(" \n ") == "`–`"
    assert code("x" * 500) == "`" + "x" * 119 + "…`"
    assert code("a\x1b[31m\u202e") == "`a/x1b[31m/u202e`"


# ---------------------------------------------------------------------------------------------------- never a stale one


def test_a_resumed_run_has_a_new_card_and_an_unscored_student_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = materials(tmp_path)
    short: dict[str, Any] = {"train.steps": 2, "validation.every": 2, "validation.select": "cross_entropy"}
    run = distill(tiny_run(made, tmp_path / "run", short))
    path = run / "student" / "README.md"
    assert "Trained for 2 steps" in path.read_text(encoding="utf-8")
    longer = tiny_run(made, run, short | {"train.steps": 4, "resume": "auto"})
    scored = pipeline._score_tests

    def stopped(*_: Any) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr(pipeline, "_score_tests", stopped)
    with pytest.raises(Interrupted):
        distill(longer)
    assert (run / "student" / "model.safetensors").exists()
    assert not path.exists()  # the student is a new one, and what is known of the old one says nothing
    monkeypatch.setattr(pipeline, "_score_tests", scored)
    distill(longer)
    text = path.read_text(encoding="utf-8")
    assert "Trained for 4 steps" in text
    path.write_text("damaged", encoding="utf-8")
    distill(longer)  # nothing is left to be done but what a run ends with
    assert path.read_text(encoding="utf-8") == text
    assert not list((run / "student").glob(".*"))
