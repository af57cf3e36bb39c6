"""Every command does what it says, on tiny models."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import distillm, done
from distillm import __version__
from distillm.cli import EXIT_CODES
from distillm.config import recipes
from tiny import CHAT_TEMPLATE, save, tiny_causal, tiny_tokenizer
from tiny_run import lines, materials, rows, scores, write_rows
from tiny_run import settings as tiny_settings


def said_by_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distillm", *map(str, arguments)]
    # As a user's shell has it: what the tests quieten is not quiet there.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    # As many threads as the tests have: the last bits of a product may depend on them.
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def run_yaml(made: Path) -> Path:
    """A short run whose students answer with texts that score: the references are what the student tends to say."""
    path = made / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(made, made / "run", {"train.steps": 3, "validation.every": 2})))
    return path


@pytest.fixture(scope="module")
def trained(run_yaml: Path) -> subprocess.CompletedProcess[str]:
    return said_by_a_process("train", run_yaml, "optim.lr=2e-3")


@pytest.fixture
def run(made: Path, trained: subprocess.CompletedProcess[str]) -> Path:
    assert trained.returncode == 0, trained.stderr
    return made / "run"


# ---------------------------------------------------------------------------------------------------------- training


def test_train_writes_a_whole_run_folder_with_the_overrides_in_it(run: Path):
    assert {p.name for p in run.iterdir()} >= {
        *("run.yaml", "metrics.jsonl", "samples.jsonl", "tokens.jsonl", "eval", "checkpoints", "student", "report.html")
    }
    saved = yaml.safe_load((run / "run.yaml").read_text())
    assert saved["optim"]["lr"] == 2e-3
    assert saved["provenance"]["command"].startswith("distillm train ")
    assert len(lines(run / "metrics.jsonl", "step")) == 3


def test_train_shows_only_what_is_meant_for_the_user(trained: subprocess.CompletedProcess[str], run: Path):
    known = (
        r"loading the teacher .*|.*: \d+ of \d+ rows used.*|score the .* on numbers \d+/\d+ .*|train 3/3  loss .*|"
        r"validation after step \d+: cross_entropy .*  divergence .*|the best validation was after step .*|"
        r"WARNING: by cross_entropy the student is no better .*|  sample  .*|"
        r"student: .*|report: .*|ask it: .*|teacher cache: in memory .*|"
    )
    for line in trained.stderr.splitlines():
        assert re.fullmatch(known, line), line
    assert "ROUGE-L" in trained.stdout
    assert f"Run: {run.name}" in trained.stdout


def test_a_trained_student_loads_with_transformers_alone(run: Path):
    script = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(run / "student")!r})
tokenizer = AutoTokenizer.from_pretrained({str(run / "student")!r})
assert "distillm" not in sys.modules
out = model.generate(**tokenizer("Say one two.", return_tensors="pt"), max_new_tokens=4)
assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
print(out.shape[1])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 4


def test_train_goes_on_in_a_run_folder_where_it_is_told_to(run: Path, tmp_path: Path):
    target = tmp_path / "again"
    done("train", run, f"output={target}", "train.steps=2", "overwrite=true")
    done("train", target, "resume=auto", "train.steps=3")
    assert [entry["step"] for entry in lines(target / "metrics.jsonl", "step")] == [1, 2, 3]


def test_another_method_runs_on_the_same_settings(run_yaml: Path, tmp_path: Path):
    for method in ("sft", "kd"):
        target = tmp_path / method
        done("train", run_yaml, f"method={{name: {method}}}", f"output={target}", "train.steps=1", "data.test={}")
        assert lines(target / "metrics.jsonl", "step")[0]["batch"] == "dataset"
        assert not scores(target)


def test_help_of_train_shows_commands_to_start_from():
    text = done("train", "--help")
    for part in ("distillm train run.yaml", "optim.lr=1e-4", "resume=auto", "distillm schema", "distillm recipes"):
        assert part in text


# -------------------------------------------------------------------------------------------------------- evaluation


def test_eval_of_a_run_gives_exactly_the_scores_the_run_wrote(made: Path, run: Path, tmp_path: Path):
    output = tmp_path / "scores.json"
    text = done("eval", run, "--data", made / "test.jsonl", "--device", "cpu", "--output", output)
    written = scores(run)["numbers-student.json"]
    again = json.loads(output.read_text())
    for key in ("num_rows", "seeds", "decoding", "scores", "predictions"):
        assert again[key] == written[key], key
    assert {"rouge_l", "exact_match", "response_tokens", "truncated", "divergence"} <= again["scores"].keys()
    for name, score in again["scores"].items():
        assert re.search(rf"{name} .*{score['mean']:.2f}", text)
    answers, tokens = again["num_rows"] * len(again["seeds"]), again["speed"]["tokens"]
    assert tokens == pytest.approx(answers * again["scores"]["response_tokens"]["mean"])
    assert f"decoding: {tokens / again['speed']['seconds']:.0f} tokens/s" in text


def test_eval_of_a_run_does_not_depend_on_its_batch_size(made: Path, run: Path, tmp_path: Path):
    output, data = tmp_path / "one.json", made / "test.jsonl"
    done("eval", run, "--data", data, "--batch-size=1", "--device=cpu", "--output", output)
    again = json.loads(output.read_text())
    assert again["predictions"] == scores(run)["numbers-student.json"]["predictions"]


def test_eval_of_a_run_keeps_its_scores_in_the_run_unless_told_otherwise(made: Path, run: Path):
    write_rows(made / "other.jsonl", rows(2, 60))
    done("eval", run, "--data", made / "other.jsonl", "--seeds", "5", "--temperature", 0)
    found = scores(run)["other-student.json"]
    assert (found["num_rows"], found["seeds"], found["decoding"]["temperature"]) == (2, [5], 0.0)


def test_eval_of_a_model_takes_its_settings_from_the_command_line(made: Path, tmp_path: Path):
    output = tmp_path / "new" / "scores.json"
    template = ("--template", "Q: {{ instruction }}\nA: ")
    decoding = ("--max-new-tokens", 3, "--limit", 2, "--seeds", "7,8")
    done("eval", made / "student", "--data", made / "test.jsonl", *template, *decoding, "--output", output)
    found = json.loads(output.read_text())
    assert found["decoding"]["max_new_tokens"] == 3
    assert (found["num_rows"], found["seeds"]) == (2, [7, 8])
    assert "divergence" not in found["scores"]
    done(
        *("eval", made / "student", "--data", made / "test.jsonl", *template, *decoding, "--output", output),
        *("--teacher", made / "student"),
    )
    assert json.loads(output.read_text())["scores"]["divergence"]["mean"] == pytest.approx(0, abs=1e-6)


texts = st.text(max_size=40) | st.lists(
    st.sampled_from("the fox sleeps naïve 你好 runs running ran ."), max_size=8
).map(" ".join)


@given(
    st.integers(1, 2).flatmap(
        lambda seeds: st.lists(
            st.fixed_dictionaries(
                {
                    "predictions": st.lists(texts, min_size=seeds, max_size=seeds),
                    "references": st.lists(texts, min_size=1, max_size=3),
                }
            ),
            min_size=1,
            max_size=5,
        )
    )
)
@example([{"predictions": ["naïve cats ran 你好"], "references": ["a naïve cat runs 你好", "cats running"]}])
@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rouge_l_of_predictions_is_that_of_rouge_score(tmp_path: Path, data: list[dict[str, Any]]):
    path, output = tmp_path / "predictions.jsonl", tmp_path / "scores.json"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data), encoding="utf-8")
    done("eval", "--predictions", path, "--output", output)
    found = json.loads(output.read_text(encoding="utf-8"))["scores"]["rouge_l"]["per_seed"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for i, value in enumerate(found):
        best = [
            max(scorer.score(reference, row["predictions"][i])["rougeL"].fmeasure for reference in row["references"])
            for row in data
        ]
        assert value == pytest.approx(100 * sum(best) / len(best), abs=1e-9)


def test_predictions_may_be_single_texts_under_other_names(tmp_path: Path):
    path = write_rows(
        tmp_path / "p.jsonl", [{"prediction": "a b", "output": "a b"}, {"prediction": "c", "output": "d"}]
    )
    assert re.search(r"rouge_l .*50\.00", done("eval", "--predictions", path))


# -------------------------------------------------------------------------------------------------------- generation


def test_generate_prints_an_answer_under_each_prompt(made: Path):
    text = done(
        "generate", made / "student", "Say one.", "Say two.", "--max-new-tokens", 3, "--template", "{{ instruction }}"
    )
    assert re.match(r"> Say one\.\n.*\n\n> Say two\.\n", text, re.DOTALL)


def test_generate_reads_and_writes_files_and_keeps_every_field(made: Path, tmp_path: Path):
    asked = [{"instruction": "Say one.", "output": "", "key": 7}, {"instruction": "Say two.", "key": 8}]
    path, output = write_rows(tmp_path / "asked.jsonl", asked), tmp_path / "deep" / "answers.jsonl"
    done(
        "generate",
        made / "student",
        "--file",
        path,
        "--output",
        output,
        "--max-new-tokens",
        3,
        "--template",
        "chat{{ key }}",
    )
    answers = lines(output)
    assert [{k: v for k, v in row.items() if k != "response"} for row in answers] == asked
    assert all(isinstance(row["response"], str) for row in answers)


def test_an_answer_in_the_file_is_never_shown_to_the_model(made: Path, tmp_path: Path):
    shown = [
        write_rows(tmp_path / f"{i}.jsonl", [{"instruction": "Say.", "output": out}]) for i, out in enumerate("ab")
    ]
    answers = [done("generate", made / "student", "--file", path, "--max-new-tokens", 5) for path in shown]
    assert answers[0] == answers[1]


def test_the_seed_of_generate_counts_where_it_samples(made: Path):
    def answer(*options: object) -> str:
        return done("generate", made / "student", "Say one.", "--max-new-tokens", 8, *options)

    assert answer("--temperature", 1, "--seed", 1) == answer("--temperature", 1, "--seed", 1)
    assert answer("--temperature", 1, "--seed", 1) != answer("--temperature", 1, "--seed", 2)
    assert answer("--seed", 1) == answer("--seed", 2)  # greedy


def test_generate_from_a_run_reads_its_template_and_fields_and_leaves_the_teacher_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mapped = tmp_path / "mapped"
    mapped.mkdir()
    (mapped / "student").symlink_to(run / "student")
    saved = yaml.safe_load((run / "run.yaml").read_text())
    saved["data"] |= {
        "fields": {"instruction": "question", "output": "answer"},
        "template": "alpaca",
        "max_prompt": 120,
    }
    saved["data"]["max_length"] = 200
    saved["teacher"]["path"] = str(tmp_path / "gone")
    (mapped / "run.yaml").write_text(yaml.safe_dump(saved))
    path = write_rows(tmp_path / "q.jsonl", [{"question": "Say one.", "answer": "one"}])
    by_file, by_prompt = done("generate", mapped, "--file", path), done("generate", mapped, "Say one.")
    assert by_file == by_prompt
    assert by_file.startswith("> Say one.\n")
    assert by_file != done("generate", mapped, "Say one.", "--template", "{{ question }}")


def test_a_chat_model_is_asked_by_its_own_template_unless_told_otherwise(tmp_path: Path, made: Path):
    chat = save(tiny_causal(seed=5), tiny_tokenizer(chat_template=CHAT_TEMPLATE), tmp_path / "chat")
    default = done("generate", chat, "Say one.", "--max-new-tokens", 6)
    assert default == done("generate", chat, "Say one.", "--max-new-tokens", 6, "--template", "chat")
    assert default != done("generate", chat, "Say one.", "--max-new-tokens", 6, "--template", "alpaca")
    options = ("--data", made / "test.jsonl", "--max-new-tokens", 4, "--seeds", "1", "--output")
    done("eval", chat, *options, tmp_path / "default.json")
    done("eval", chat, *options, tmp_path / "chat.json", "--template", "chat")
    default, named = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("default", "chat"))
    assert default["scores"] == named["scores"]
    assert default["predictions"] == named["predictions"]


# --------------------------------------------------------------------------------------------------- runs side by side


def test_compare_prints_a_table_that_fits_and_writes_markdown_and_csv(run: Path, tmp_path: Path):
    text = done("compare", run, "--output", tmp_path / "t.md")
    for part in ("before", "student", "teacher", "ROUGE-L", "Divergence", "Run: run", "Method: distillm", "Steps: 3"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 200
    done("compare", run, run, "-o", tmp_path / "t.csv")
    table = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert {row["system"] for row in table} >= {"before", "student", "teacher"}
    assert (tmp_path / "t.md").read_text().count("\n") >= 5


def test_names_with_brackets_are_shown_as_they_are(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "[bold]a[red]", ignore=shutil.ignore_patterns("student", "checkpoints"))
    assert "Run: [bold]a[red]" in done("compare", tmp_path / "[bold]a[red]")


def test_report_writes_one_page_where_it_is_told_to(run: Path, tmp_path: Path):
    target = tmp_path / "page.html"
    assert done("report", run, "-o", target).strip() == str(target)
    assert target.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    before = (run / "report.html").stat().st_mtime_ns
    assert done("report", run).strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_mtime_ns > before


# ------------------------------------------------------------------------------------------------- shrink, tokenizer


@pytest.mark.parametrize(("layers", "kept"), [("2", [0, 3]), ("1", [0]), ("0,1", [0, 1]), ("1,3", [1, 3])])
def test_shrink_writes_an_ordinary_model_folder_of_the_layers_asked_for(tmp_path: Path, layers: str, kept: list[int]):
    teacher = save(tiny_causal(layers=4, seed=1), tiny_tokenizer(), tmp_path / "teacher")
    said = distillm("shrink", teacher, tmp_path / "student", "--layers", layers)
    assert (said.code, said.err) == (0, "")
    assert f"{len(kept)} layers" in said.out
    student: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == len(kept)
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("a")["input_ids"]
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    for i, layer in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert new[name.format(i)].equal(old[name.format(layer)])


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_tokenizer_learns_from_texts_and_rows_alike(made: Path, tmp_path: Path, model: str):
    size = {"bpe": 280, "unigram": 60}[model]
    text = done(
        "tokenizer", made / "train.jsonl", made / "text.txt", "-o", tmp_path / "t", "--size", size, "--model", model
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert f"{len(tokenizer)} tokens" in text
    assert len(tokenizer) <= size
    assert tokenizer.decode(tokenizer("Say one two.", add_special_tokens=False)["input_ids"]).strip() == "Say one two."


def test_a_student_from_scratch_learns_with_a_tokenizer_of_ones_own(made: Path, run_yaml: Path, tmp_path: Path):
    done("tokenizer", made / "train.jsonl", "-o", tmp_path / "t", "--size", 280)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"model_type": "llama", **sizes, **heads}
    student = f"student={json.dumps({'tokenizer': str(tmp_path / 't'), 'config': config})}"
    done(
        *("train", run_yaml, student, "teacher=null", "method={name: sft}", "data.text=null"),
        *(f"output={tmp_path / 'run'}", "train.steps=2", "data.test={}"),
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "student")) == 280


# ---------------------------------------------------------------------------------------- recipes, schema, and the rest


def test_recipes_are_listed_and_shown_as_they_are_shipped():
    listed = done("recipes")
    for name, path in recipes().items():
        assert name in listed
        assert done("recipes", "show", name) == path.read_text(encoding="utf-8")


def test_schema_is_json_that_knows_every_section():
    schema = json.loads(done("schema"))
    assert {"student", "teacher", "data", "method", "optim", "train", "output"} <= schema["properties"].keys()


def test_version_and_help():
    assert done("--version") == f"distillm {__version__}\n"
    text = " ".join(done("--help").split())
    assert " ".join(EXIT_CODES.split()) in text
    for command in (
        "train",
        "eval",
        "generate",
        "compare",
        "report",
        "shrink",
        "tokenizer",
        "recipes",
        "demo",
        "schema",
    ):
        assert command in text
        assert len(done(command, "--help").splitlines()) > 5


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["train", "--nonsense"], ["shrink", "a", "b"]])
def test_a_wrong_command_ends_with_2(arguments: list[str]):
    said = distillm(*arguments)
    assert said.code == 2
    assert "Error" in said.err
