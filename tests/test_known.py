"""Data sets by name: read from local folders of their layout, and what is asked of the hub (which is not there)."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from command_line import done, refused
from distillm.config import make_run
from distillm.data import Task, known_rows, read_rows
from distillm.data_settings import Data, Source
from distillm.errors import ConfigError, DataError
from distillm.known import LANGUAGES, known
from distillm.listing import HEADER, dataset_rows
from distillm.rows import placed, read_data, read_source, task_of
from distillm.tasks import load_task, tasks
from tiny_run import rows, write_rows

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
COUNTS = {
    "dolly": {"train": 10_936, "validation": 1_000, "test": 500},
    "self_instruct": {"test": 242},
    "vicuna": {"test": 80},
    "super_natural_instructions": {"test": 1_694},
    "samsum": {"train": 14_732, "validation": 818, "test": 819},
    "iwslt2017": {"validation": 888, "test": 8_079},
    "multi30k": {"train": 29_000, "validation": 1_014, "test": 1_000},
    "multi30k_en_fr": {"train": 29_000, "validation": 1_014, "test": 1_000},
}


def data(train: Any = "samsum", **more: Any) -> Data:
    return make_run({"student": {"path": "s"}, "method": {"name": "sft"}, "data": {"train": train, **more}}).data


@pytest.fixture(name="asked")
def _asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of the hub; rows that it answers with are to be put into ``answers``."""
    import datasets

    asked = list[dict[str, Any]]()

    def load(path: str, name: str | None = None, split: str | None = None, **more: Any) -> Any:
        asked.append({"path": path, "name": name, "split": split, **more})
        return datasets.Dataset.from_list(ANSWERS.get(path, [{"document": "d", "summary": "s"}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


ANSWERS: dict[str, list[dict[str, Any]]] = {
    "databricks/databricks-dolly-15k": [{"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}],
    "knkarthick/samsum": [{"id": "1", "dialogue": "d", "summary": "s"}],
    "abisee/cnn_dailymail": [{"article": "a", "highlights": "h", "id": "1"}],
    "wmt/wmt16": [{"translation": {"de": "Hallo.", "en": "Hello."}}],
    "bentrevett/multi30k": [{"en": "Hello.", "de": "Hallo."}],
    "parquet": [{"translation": {"de": "Hallo.", "en": "Hello."}}],
    "Skylion007/openwebtext": [{"text": "A river."}],
}


# ----------------------------------------------------------------------------------------------------------- registry


def test_every_entry_is_of_a_task_and_fills_its_fields():
    for entry in known().values():
        if entry.task is None:
            assert entry.columns == {"text": "text"}
            continue
        spec = load_task(entry.task)
        assert entry.columns.keys() == spec.fields.keys()
        assert [*entry.columns][-1] == spec.response
        assert (entry.task == "translation") == bool(entry.pairs)
        for pair in entry.pairs:
            assert entry.variables(pair).keys() == spec.variables.keys()
        assert all("{" not in column for column in entry.columns_of(None).values())
    assert {language for e in known().values() for pair in e.pairs for language in pair.split("-")} == LANGUAGES.keys()


def test_the_table_in_the_docs_is_the_registry():
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    table = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    start = table.index(HEADER)
    assert table[start + 2 : start + 2 + len(known())] == [(f"`{name}`", *rest) for name, *rest in dataset_rows()]


def test_the_command_lists_them_all():
    said = done("datasets")
    assert all(name in said for name in [*known(), *(f"task {name}" for name in tasks())])


# -------------------------------------------------------------------------------------------------------- local folders


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    local = tmp_path / "data"
    made = {
        "samsum": {"train": [{"document": "d", "summary": "s"}] * 6, "valid": [{"dialogue": "d", "summary": "s"}] * 2},
        "iwslt2017/de-en": {"test": [{"source": "Hallo.", "target": "Hello."}]},
        "iwslt2017": {"train": [{"source": "Hello.", "target": "Hallo."}] * 6, "dev": [{"source": "a", "target": "b"}]},
        "multi30k_en_fr": {"test": [{"source": "Hello.", "target": "Salut."}]},
        "unnatural_instructions": {"test": [{"instruction": "i", "output": "w " * n} for n in (10, 11, 12)]},
        "openwebtext": {"train": [{"text": "A river runs through the valley."}]},
    }
    for name, parts in made.items():
        (local / name).mkdir(parents=True, exist_ok=True)
        for split, given in parts.items():
            write_rows(local / name / f"{split}.jsonl", given)
    return local


def test_a_local_folder_is_read_by_split_under_the_tasks_names(folder: Path):
    assert known_rows(known()["samsum"], split="train", folder=folder) == [{"document": "d", "summary": "s"}] * 6
    assert known_rows(known()["samsum"], split="validation", folder=folder) == [{"document": "d", "summary": "s"}] * 2
    with pytest.raises(DataError, match=r"samsum: it has no split 'test'; there are: train, valid"):
        known_rows(known()["samsum"], split="test", folder=folder)


def test_the_split_is_the_one_that_the_rows_are_for(folder: Path):
    run = make_run(
        {
            "student": {"path": "s"},
            "method": {"name": "sft"},
            "data": {
                "train": "iwslt2017",
                "validation": "iwslt2017",
                "test": {
                    "back": {"path": "iwslt2017", "name": "de-en"},
                    "again": {"path": "iwslt2017", "split": "dev"},
                },
                "folder": str(folder),
                "text": "openwebtext",
            },
        }
    )
    read = {(source.split, source.name): len(found) for source, found in read_data(run).items()}
    assert read == {("train", None): 6, ("validation", None): 1, ("test", "de-en"): 1, ("dev", None): 1}


def test_a_translation_brings_its_languages_and_the_run_keeps_them(folder: Path):
    found = data("multi30k_en_fr", folder=str(folder), test={"de": {"path": "iwslt2017", "name": "de-en"}})
    assert (found.task, found.variables) == ("translation", {"source_language": "English", "target_language": "French"})
    source = placed(found, found.test["de"], "test")
    [row] = read_source(found, source)
    assert task_of(found, source).prompt_text(row) == "translate German to English: Hallo.\nEnglish:\n"
    elsewhere = found.model_copy(update={"train": "mine.jsonl"})  # as `distillm eval` does
    assert "to French" in task_of(elsewhere, Source(path="mine.jsonl")).prompt_text({"source": "Hello."})


def test_rows_with_short_references_are_left_out_where_that_is_the_rule(folder: Path):
    found = known_rows(known()["unnatural_instructions"], split="test", folder=folder)
    assert [len(row["output"].split()) for row in found] == [11, 12]


def test_known_names_need_no_field_names_of_the_users(folder: Path):
    found = data("mine.jsonl", task="summarization", fields={"document": "text"}, folder=str(folder))
    assert task_of(found, Source(path="samsum", split="train")).fields == {"document": "document", "summary": "summary"}
    assert task_of(found, Source(path="mine.jsonl")).fields["document"] == "text"


def test_a_file_of_that_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert data("samsum").known_in("samsum") is not None
    write_rows(tmp_path / "samsum", rows(2))
    assert data("samsum").known_in("samsum") is None
    assert data("samsum").task == "instruction"


def test_any_folder_may_have_a_file_for_each_split(folder: Path):
    assert len(read_rows(folder / "samsum", split="train")) == 6
    assert len(read_rows(folder / "samsum", split="validation")) == 2
    with pytest.raises(DataError, match=r"not written by datasets.save_to_disk; name one of its files"):
        read_rows(folder / "samsum", split="test")


def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"iwslt2017: name='en-dee' does not apply; .*; did you mean 'en-de'\?"):
        data({"path": "iwslt2017", "name": "en-dee"})
    with pytest.raises(ConfigError, match=r"samsum: name='3.0.0' does not apply; it has but one form"):
        read_source(data(), Source(path="samsum", name="3.0.0"))
    with pytest.raises(DataError, match=r"openwebtext is plain text, for data.text"):
        read_source(data(), Source(path="openwebtext"))
    with pytest.raises(DataError, match=r"data\.folder: there is no folder"):
        read_source(data(folder=str(tmp_path / "none")), Source(path="samsum"))
    with pytest.raises(DataError, match=r"multi30k_en_fr: there is no folder .*, and no place on the hub is known"):
        known_rows(known()["multi30k_en_fr"], split="train", folder=tmp_path)
    message = refused("train", write_settings(tmp_path, folder))
    assert "unnatural_instructions: it has no split 'train'; there are: test" in message.replace("\n", "")


def write_settings(tmp_path: Path, folder: Path) -> Path:
    path = tmp_path / "run.yaml"
    given = {"train": "unnatural_instructions", "folder": str(folder)}
    path.write_text(json.dumps({"student": {"path": "s"}, "method": {"name": "sft"}, "data": given}))
    return path


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("name", "part", "wanted", "row"),
    [
        ("dolly", {"split": "train"}, {"path": "databricks/databricks-dolly-15k"},
         {"instruction": "i", "input": "c", "output": "r", "category": "open_qa"}),
        ("samsum", {"split": "train[:10]"}, {"path": "knkarthick/samsum", "split": "train[:10]"},
         {"id": "1", "document": "d", "summary": "s"}),
        ("cnn_dailymail", {"split": "test"}, {"path": "abisee/cnn_dailymail", "name": "3.0.0", "split": "test"},
         {"document": "a", "summary": "h", "id": "1"}),
        ("wmt16", {"split": "validation"}, {"path": "wmt/wmt16", "name": "de-en", "split": "validation"},
         {"source": "Hello.", "target": "Hallo."}),
        ("wmt16", {"split": "test", "name": "de-en"}, {"path": "wmt/wmt16", "name": "de-en", "split": "test"},
         {"source": "Hallo.", "target": "Hello."}),
        ("multi30k", {"split": "test"}, {"path": "bentrevett/multi30k", "name": None, "split": "test"},
         {"source": "Hello.", "target": "Hallo."}),
        ("iwslt2017", {"split": "test", "name": "de-en"}, {"path": "parquet", "split": "train",
         "data_files": "hf://datasets/IWSLT/iwslt2017@~parquet/iwslt2017-de-en/test/*.parquet"},
         {"source": "Hallo.", "target": "Hello."}),
        ("xsum", {"split": "test"}, {"path": "parquet",
         "data_files": "hf://datasets/EdinburghNLP/xsum@~parquet/default/test/*.parquet"},
         {"translation": {"de": "Hallo.", "en": "Hello."}}),
        ("vicuna", {"split": "test"}, {"path": "json", "data_files": "hf://datasets/MiniLLM/Vicuna/valid.jsonl"},
         {"document": "d", "summary": "s"}),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_hub_and_how_its_columns_are_called(
    asked: list[dict[str, Any]], tmp_path: Path, name: str, part: dict[str, str], wanted: dict[str, Any], row: Any
):
    assert known_rows(known()[name], folder=tmp_path, **part) == [row]
    assert {key: asked[0][key] for key in wanted} == wanted
    assert "trust_remote_code" not in asked[0]


def test_a_split_that_the_hub_does_not_have_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="dolly: the hub has no split 'test' of it; there are: train"):
        known_rows(known()["dolly"], split="test", folder=tmp_path)


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(COUNTS))
def test_each_set_beside_the_checkout_is_read_by_name(name: str):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    found = data(name, folder=str(DATA))
    assert found.task == known()[name].task
    for split, count in COUNTS[name].items():
        source = Source(path=name, split=split)
        read = read_source(found, source)
        assert len(read) == count
        task = task_of(found, source)
        empty = [row for row in read if not (task.user_text(row).strip() and task.references(row)[0].strip())]
        # One dialogue of SAMSum is empty in the original; such a row is dropped and counted.
        assert len(empty) == ((name, split) == ("samsum", "train"))


@pytest.mark.data
@pytest.mark.parametrize("name", ["samsum", "iwslt2017"])
def test_real_rows_become_examples_with_the_tokenizers_of_gpt2_and_t5(name: str):
    for kind in ("gpt2", "t5"):
        folder = DATA.parent / "tokenizers" / kind
        if not folder.is_dir() or not (DATA / name).is_dir():
            pytest.skip(f"{folder} or {DATA / name} is absent")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        found = data(name, folder=str(DATA))
        read = read_source(found, placed(found, name, "validation"))[:200]
        task: Task = task_of(found, placed(found, name, "validation"))
        end = tokenizer.eos_token_id
        examples, report = task.examples(read, tokenizer, max_prompt=400, max_length=512, end_id=end, source=name)
        assert report.used == len(read)
        for example, row in zip(examples, read, strict=True):
            text = tokenizer.decode(example.prompt)
            assert text.startswith({"samsum": "summarize: ", "iwslt2017": "translate English to German: "}[name])
            assert text.rstrip().endswith({"samsum": "summary:", "iwslt2017": "German:"}[name])
            assert example.tokens[-1] == end
            if kind == "gpt2":
                assert tokenizer.decode(example.response[:-1]) == task.references(row)[0]
