"""Every shipped recipe builds its pipeline: tiny models of its architecture, real tokenizers where they are at hand."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

import distillm
from distillm.cli import app
from distillm.config import load_run, make_run, read_yaml, recipes
from distillm.method_settings import Distillation
from tiny import CHAT_TEMPLATE, save, tiny_model, tiny_tokenizer
from tiny_run import rows, write_rows

TOKENIZERS = Path(__file__).parents[2] / "shared" / "tokenizers"
KINDS = {"gpt2": "gpt2", "opt": "opt", "openllama2": "llama", "llama3.2": "llama", "qwen2.5": "qwen2"}
KINDS |= {"gemma2": "gemma2", "smollm2": "llama", "demo": "llama", "mt5": "t5", "t5": "t5"}
FAMILY = re.compile("|".join(re.escape(name) for name in KINDS))


def family_of(recipe: str) -> str:
    found = FAMILY.search(recipe)
    assert found, f"{recipe}: no family of models is known for it"
    return found.group()


def tokenizer_for(family: str) -> PreTrainedTokenizerBase:
    folder = TOKENIZERS / {"qwen2.5": "qwen2.5", "gpt2": "gpt2", "opt": "opt", "t5": "t5"}.get(family, "none")
    if not folder.is_dir():
        return tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    if family == "opt":  # its folder holds no settings; the model's own say that </s> is put in front
        ends = {f"{name}_token": "</s>" for name in ("bos", "eos", "unk")}
        tokenizer: Any = GPT2Tokenizer.from_pretrained(folder, **ends, pad_token="<pad>", add_bos_token=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def with_tiny_parts(recipe: str, folder: Path) -> dict[str, Any]:
    """The recipe's own settings, with models, rows and output from ``folder``."""
    settings, family = read_yaml(recipe), family_of(recipe)
    tokenizer = tokenizer_for(family)
    kind = KINDS[family]
    room = {"gpt2": {"n_positions": 2048}, "t5": {}}.get(kind, {"max_position_embeddings": 2048})
    layers = settings["student"].get("layers")
    depth = {list: lambda: max(layers) + 1, int: lambda: layers + 1}.get(type(layers), lambda: 2)()
    for name, seed, deep in (("teacher", 1, depth), ("student", 2, 1)):
        if settings.get(name, {}).get("path") is not None:
            # Padded, as real ones are: the tokenizer class of a family may add tokens of its own.
            model = tiny_model(kind, vocab_size=len(tokenizer) + 8, layers=deep, seed=seed, **room)
            save(model, tokenizer, folder / name)
            settings[name]["path"] = str(folder / name)
    made = {"train": rows(12), "validation": rows(4, 20), "test": rows(3, 40)}
    task = make_run(settings).data.spec
    if task.name != "instruction":  # the rows, as the recipe's data set has them
        settings["data"]["task"] = task.name
        asked = next(name for name in task.fields if name != task.response)
        made = {
            name: [
                {task.fields[asked]: row["instruction"], task.fields[str(task.response)]: row["output"]}
                for row in found
            ]
            for name, found in made.items()
        }
    for name, found in made.items():
        write_rows(folder / f"{name}.jsonl", found)
    data = settings["data"]
    data |= {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}
    data["test"] = {name: str(folder / "test.jsonl") for name in data["test"]}
    data |= {"responses_file": str(folder / "responses.jsonl")} if "responses_file" in data else {}
    if "text" in data:
        (folder / "text.txt").write_text("A river runs through the valley and turns the old mill. " * 60)
        data["text"] = str(folder / "text.txt")
    settings.setdefault("optim", {})["warmup_steps"] = 0  # a dozen rows make few steps
    return settings | {"output": str(folder / "run"), "device": "cpu"}


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_a_recipe_builds_its_pipeline(recipe: str, tmp_path: Path) -> None:
    settings = with_tiny_parts(recipe, tmp_path)
    settings["generation"] = settings.get("generation", {}) | {"max_new_tokens": 4}
    project = distillm.build(make_run(settings))
    assert project.state.total_steps > 0
    assert project.method.reads_teacher == (settings["method"]["name"] not in ("sft", "seqkd"))
    step = next(iter(distillm.steps(project)))
    assert step.loss > 0


def test_the_encoder_decoders_of_the_paper_are_all_there() -> None:
    for start, task in (("samsum-t5", "summarization"), ("iwslt2017-mt5", "translation")):
        for size in ("base", "small"):
            run = load_run(f"{start}-{size}-distillm")
            assert run.data.task == task
            assert run.teacher is not None
            for path in (run.teacher.path, run.student.path):  # made by recipes too
                assert path is not None
                assert load_run(path.split("/")[1]).method.name == "sft"
            text = recipes()[f"{start}-{size}-distillm"].read_text()
            sections = [
                line for line in text.splitlines() if line.startswith(("train:", "optim:", "generation:", "method:"))
            ]
            assert len(sections) == 4
            assert all("not published" in line for line in sections)


def test_the_published_experiments_are_all_there_with_their_settings() -> None:
    published = {
        "gpt2": ("skew_kl", 5e-4, 20),
        "gpt2-medium": ("skew_reverse_kl", 5e-4, 20),
        "gpt2-large": ("skew_reverse_kl", 1e-4, 10),
        "opt-125m": ("skew_reverse_kl", 5e-5, 20),
        "opt-350m": ("skew_reverse_kl", 5e-5, 20),
        "opt-1.3b": ("skew_reverse_kl", 5e-5, 10),
        "openllama2-3b": ("skew_reverse_kl", 5e-4, 10),
    }
    for name, (divergence, lr, epochs) in published.items():
        run = load_run(f"dolly-{name}-distillm")
        assert isinstance(run.method, Distillation)
        assert (run.method.divergence, run.optim.lr, run.train.epochs) == (divergence, lr, epochs)
        assert run.teacher is not None
        for path in (run.teacher.path, run.student.path):  # made by recipes too
            assert path is not None
            assert load_run(path.split("/")[1]).method.name == "sft"
        assert load_run(f"dolly-{name}-sft").train.epochs == 3
    run = load_run("dolly-openllama2-3b-distillm")
    assert isinstance(run.method, Distillation)
    assert (run.method.initial_probability, run.method.tolerance) == (0.2, 0.2)
    assert run.student.lora is not None
    assert (run.student.lora.r, run.student.lora.alpha, run.student.lora.dropout) == (16, 64, 0.1)
    teachers = {"gpt2-xl": (5e-5, 10), "opt-2.7b": (5e-5, 10), "openllama2-7b": (5e-4, 20)}
    found = {name: load_run(f"dolly-{name}-sft") for name in teachers}
    assert {name: (run.optim.lr, run.train.epochs) for name, run in found.items()} == teachers


def test_recipes_are_listed_with_a_line_each() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(recipes())
    assert all(len(line.split()) > 5 and len(line) < 150 for line in lines)
