"""Bad input through the command line: a clear message, the documented exit code, no traceback, at most a screen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import distillm, refused
from tiny import save, tiny_causal, tiny_config, tiny_tokenizer
from tiny_run import lines, materials, rows, write_rows
from tiny_run import settings as tiny_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows, good and bad, and ``run.yaml``, whose run would be done in a second."""
    made = materials(tmp_path_factory.mktemp("made"))
    quick = {"train.steps": 1, "validation.every": 1, "data.text": None, "data.test": {}}
    (made / "run.yaml").write_text(yaml.safe_dump(tiny_settings(made, made / "run", quick)))
    (made / "empty.jsonl").touch()
    (made / "blank.jsonl").write_text("\n\n")
    (made / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a" "output": "b"}\n')
    (made / "list.jsonl").write_text('["instruction"]\n')
    (made / "latin.jsonl").write_bytes('{"instruction": "caf\u00e9", "output": "b"}\n'.encode("latin-1"))
    (made / "latin.yaml").write_bytes("student: caf\u00e9\n".encode("latin-1"))
    (made / "columns.csv").write_text("instruction,output\na,b\nc,d,e\n")
    (made / "table.parquet").write_bytes(b"no parquet")
    (made / "rows.xlsx").write_bytes(b"PK")
    write_rows(made / "other.jsonl", [{"question": "a", "answer": "b"}])
    write_rows(made / "number.jsonl", [{"instruction": "a", "output": 3}])
    write_rows(made / "silent.jsonl", [{"instruction": "a", "output": ""}] * 8)
    (made / "folder").mkdir()
    (made / "file").write_text("a file")
    return made


def train(made: Path, *overrides: object, code: int = 2) -> str:
    target = made / "refused"
    message = refused("train", made / "run.yaml", f"output={target}", *overrides, code=code)
    assert not (target / "run.yaml").exists(), "what was refused must not look like a run"
    return message


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.test.mine"])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("trains.jsonl", "there is no such file; did you mean train.jsonl"),
        ("empty.jsonl", "the file is empty"),
        ("blank.jsonl", "it holds no rows"),
        ("broken.jsonl", "broken.jsonl:2: not valid JSON: Expecting ',' delimiter at column 21"),
        ("list.jsonl", "list.jsonl:1: the line is an array, not an object"),
        ("latin.jsonl", "latin.jsonl:1: byte 21 of the line (0xe9) is not UTF-8"),
        ("number.jsonl", "number:0: the field 'output' is 3, not a text"),
        ("folder", "the folder was not written by datasets.save_to_disk"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(made: Path, key: str, file: str, said: str):
    message = train(made, f"{key}={made / file}")
    assert said in message
    assert Path(file).stem in message


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("columns.csv", "columns.csv:3: the row has 3 columns, the header 2 (instruction, output)"),
        ("table.parquet", "not a readable Parquet file"),
        ("rows.xlsx", "cannot read '.xlsx' files as rows; known are .jsonl, .json, .csv, .parquet"),
        ("nowhere/rows.jsonl", "there is no such file, nor a folder"),
    ],
)
def test_other_formats_are_checked_alike(made: Path, file: str, said: str):
    assert said in train(made, f"data.train={made / file}")


def test_a_missing_field_is_named_with_the_fields_there_are(made: Path):
    message = train(made, f"data.train={made / 'other.jsonl'}", "data.template=alpaca", "data.max_prompt=47")
    assert "other:0: the field 'instruction'" in message
    assert "the fields there are: question, answer" in message
    message = train(made, "data.fields.output=outputs")
    assert "no row has the field 'outputs'" in message
    assert "did you mean 'output'?" in message


def test_rows_without_a_response_need_someone_to_write_it(made: Path):
    write_rows(made / "prompts.jsonl", rows(12, output=False))
    assert "has no response. Give one in the data, or let the teacher write" in train(
        made, f"data.train={made / 'prompts.jsonl'}"
    )
    assert "no row is usable: 0 of 8 rows used: 8 left out because the response is empty" in train(
        made, f"data.train={made / 'silent.jsonl'}"
    )


def test_a_plain_text_corpus_is_checked_like_the_rows(made: Path):
    assert "there is no such file" in train(made, f"data.text={made / 'corpus.txt'}")
    assert "the file is empty" in train(made, f"data.text={made / 'empty.jsonl'}")
    assert "there is no field 'text'; the fields there are: instruction, output" in train(
        made, f"data.text={made / 'train.jsonl'}"
    )


def test_long_prompts_are_cut_counted_and_said(made: Path):
    write_rows(made / "long.jsonl", [*rows(10), {"instruction": "Say " + "seven " * 200, "output": "seven"}])
    said = distillm("train", made / "run.yaml", f"output={made / 'long'}", f"data.train={made / 'long.jsonl'}")
    assert said.code == 0
    assert "11 of 11 rows used: 1 with a cut prompt" in said.err
    said = distillm("generate", made / "student", "seven " * 400, "--max-new-tokens", 2)
    assert said.code == 0, said.err
    assert "prompts: 1 of 1 rows used: 1 with a cut prompt" in said.err


def test_a_limit_with_no_room_for_the_users_text_is_said(made: Path):
    message = train(made, "data.template=alpaca", "data.max_prompt=10")
    assert "no row is usable: 0 of 12 rows used: 12 dropped because the limit leaves no room" in message


def test_rows_longer_than_a_model_can_read_are_said(made: Path):
    write_rows(made / "huge.jsonl", [{"instruction": "seven " * 300, "output": "eight " * 300}] * 4)
    long = (f"data.train={made / 'huge.jsonl'}", "data.validation_size=1")
    assert "tokens, but the student reads at most 256; lower data.max_length" in train(
        made, *long, "data.max_prompt=200", "data.max_length=400"
    )
    assert "with max_new_tokens=400 is more than the 256 that the student reads" in train(
        made, "generation.max_new_tokens=400"
    )


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.leraning_rate=1", ["optim.leraning_rate: no such setting", "Allowed: lr"]),
        ("method.name=distilm", ["method.name: 'distilm' is not a method", "Did you mean distillm?"]),
        ("method.divergence=skl", ["method.divergence: 'skl' is not allowed", "Did you mean skew_kl?"]),
        ("method.alpha=1.5", ["method: alpha is 1.5, and the skew of skew_kl is below 1"]),
        ("teacher=null", ["teacher.path is missing, and method distillm needs a teacher"]),
        ("student={path: x, layers: 1}", ["give exactly one of path, config and layers (found path and layers)"]),
        ("optim.lr", ["'optim.lr' is not an override"]),
        ("tracker=wandb", ["tracker=wandb, but it is not installed: pip install wandb"]),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(made: Path, override: str, parts: list[str]):
    message = train(made, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.yaml", "there is no file and no recipe"),
        ("folder", "is a folder without a run.yaml"),
        ("latin.yaml", "is not YAML"),
        ("empty.jsonl", "holds no settings"),
        ("broken.jsonl", "is not YAML"),
    ],
)
def test_a_configuration_that_is_none_is_named(made: Path, source: str, said: str):
    assert said in refused("train", made / source)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ instruction", "template: line 1: unexpected end of template"),
        ("{% for x in %}", "template: line 1:"),
        ("{{ instruktion }}", "the template failed: 'instruktion' is undefined; the fields it can use are: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the template failed: access to attribute '__class__'"),
        ("{{ instruction.__init__.__globals__ }}", "unsafe"),
        ("{% set _ = fields.clear() %}", "the template failed"),
        ("{{ 10 ** 10 ** 10 if false else cycler.__init__ }}", "unsafe"),
        (
            "alpacca",
            "neither a known name (alpaca, chat) nor a Jinja template with {{ fields }}, given as text, not as a file",
        ),
        ("chat", "the tokenizer has no chat template"),
    ],
)
def test_a_template_that_is_broken_or_wants_out_of_its_sandbox_is_refused(made: Path, template: str, said: str):
    assert said in train(made, f"data.template={template}")
    assert said in refused("generate", made / "student", "Say one.", "--template", template)


# ------------------------------------------------------------------------------------------------------------ models


def test_different_tokenizers_are_refused_with_the_first_token_that_differs(made: Path):
    save(tiny_causal(vocab_size=290), tiny_tokenizer(290), made / "smaller")
    message = train(made, f"student={{path: {made / 'smaller'}}}")
    assert "teacher and student have different tokenizers: token 290 is " in message
    assert "missing for the student" in message


def test_different_padding_of_one_vocabulary_is_said_and_works(made: Path):
    save(tiny_causal(vocab_size=320, layers=1), tiny_tokenizer(), made / "padded")
    target = made / "aligned"
    said = distillm("train", made / "run.yaml", f"output={target}", f"student={{path: {made / 'padded'}}}")
    assert said.code == 0, said.err
    assert "vocabulary is padded to 300 entries and the student's to 320: the 300 they share are used" in said.err
    assert lines(target / "metrics.jsonl", "step")[0]["loss"] > 0


def test_a_model_with_fewer_entries_than_tokens_is_refused(made: Path):
    save(tiny_causal(vocab_size=280), tiny_tokenizer(), made / "short")
    assert "the student has 280 embeddings, fewer than the 300 tokens" in train(
        made, f"student={{path: {made / 'short'}}}"
    )


def test_a_model_folder_without_a_tokenizer_is_refused_with_ways_out(made: Path):
    save(tiny_causal(), None, made / "mute")
    for message in (
        train(made, f"student={{path: {made / 'mute'}}}"),
        refused("generate", made / "mute", "Say one."),
        refused("eval", made / "mute", "--data", made / "test.jsonl"),
        refused("shrink", made / "mute", made / "shrunk", "--layers", 1),
    ):
        assert "mute holds no tokenizer: copy tokenizer.json" in message
        assert "`distillm tokenizer`" in message
    assert not (made / "shrunk").exists()


def test_pickled_weights_are_refused_and_never_read(made: Path, tmp_path: Path):
    folder = save(None, tiny_tokenizer(), tmp_path / "pickled")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    # Unpickling this would make a file.
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / "ran"))
    for message in (train(made, f"teacher={{path: {folder}}}"), refused("generate", folder, "Say one.")):
        assert "are pickled (pytorch_model.bin), and unpickling can run any code" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("./nowhere", "there is no folder nowhere: give a model folder, a .gguf file, or a hub name"),
        ("/nowhere/model", "there is no folder /nowhere/model"),
        ("nobody/nothing", "there is no such folder here, and the hub cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_is_named(made: Path, path: str, said: str):
    assert said in train(made, f"teacher.path={path}")
    assert said in refused("generate", path, "Say one.")
    assert said in refused("shrink", path, made / "shrunk", "--layers", 1)


def test_a_file_or_folder_that_is_no_model_is_named(made: Path):
    assert "is a file: give the folder it is in" in train(made, f"teacher.path={made / 'file'}")
    save(None, tiny_tokenizer(), made / "only_tokenizer")
    assert "cannot load the model" in train(made, f"teacher.path={made / 'only_tokenizer'}")
    damaged = save(tiny_causal(), tiny_tokenizer(), made / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 64)
    assert "cannot load the model" in train(made, f"teacher.path={damaged}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, 'needs "model_type"'),
        ({"model_type": "lama"}, "model_type 'lama' is unknown"),
        ({"model_type": "llama", "hiden_size": 16}, "no setting 'hiden_size'; did you mean 'hidden_size'?"),
        ({"model_type": "llama", "hidden_size": "many"}, "cannot make"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, ""),
    ],
)
def test_a_student_that_cannot_be_built_says_why(made: Path, config: dict[str, Any], said: str):
    assert said in train(made, f"student={json.dumps({'config': config})}")


# --------------------------------------------------------------------------------------------------- where results go


def test_a_folder_that_holds_a_run_is_kept_unless_told_otherwise(made: Path):
    target = made / "kept"
    start = ("train", made / "run.yaml", f"output={target}")
    assert distillm(*start).code == 0
    before = (target / "metrics.jsonl").read_text()
    message = refused(*start)
    for part in ("already holds a run", "resume=auto", "overwrite=true", "output="):
        assert part in message
    assert (target / "metrics.jsonl").read_text() == before
    assert distillm(*start, "overwrite=true").code == 0


def test_folders_with_something_in_them_are_not_replaced(made: Path):
    (made / "mine").mkdir()
    (made / "mine" / "thesis.txt").write_text("years of work")
    for arguments in (
        ("shrink", made / "teacher", made / "mine", "--layers", 1),
        ("tokenizer", made / "train.jsonl", "-o", made / "mine", "--size", 280),
        ("shrink", made / "teacher", made / "file", "--layers", 1),
    ):
        assert "is there already and not empty; choose another folder, or delete it" in refused(*arguments)
    assert (made / "mine" / "thesis.txt").read_text() == "years of work"
    assert (made / "file").read_text() == "a file"


def test_output_that_cannot_be_written_ends_with_4_before_the_work(made: Path):
    under_a_file = made / "file" / "x"
    assert "could not make the run folder" in refused("train", made / "run.yaml", f"output={under_a_file}", code=4)
    data = ("--data", made / "test.jsonl", "--template", "{{ instruction }}")
    for output in (under_a_file / "scores.json", made / "folder"):
        message = refused("eval", made / "student", *data, "--output", output, code=4)
        assert "rows used" not in message
        assert "rows used" not in refused("generate", made / "student", "Say.", "--output", output, code=4)
    refused("shrink", made / "teacher", under_a_file, "--layers", 1, code=4)
    refused("tokenizer", made / "train.jsonl", "-o", under_a_file, "--size", 280, code=4)


def test_runs_that_are_none_are_named(made: Path):
    for command in ("compare", "report"):
        assert "is not a run folder" in refused(command, made / "folder")
        assert "does not exist" in refused(command, made / "nowhere")


# --------------------------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval"], "give a run or model and --data FILE, or --predictions FILE"),
        (["eval", "M"], "give a run or model and --data FILE"),
        (["eval", "M", "--data", "R", "--seeds", "1,x"], "--seeds 1,x: write whole numbers with commas"),
        (["eval", "--predictions", "R", "--limit", "3"], "of the other options only --output"),
        (["generate", "M"], "give either one or more prompts, or --file FILE"),
        (["generate", "M", "Say.", "--file", "R"], "give either one or more prompts, or --file FILE"),
        (["generate", "M", ""], "no row is usable"),
        (["shrink", "M", "new", "--layers", "x"], "--layers x: write whole numbers with commas"),
        (["shrink", "M", "new", "--layers", "9"], "cannot keep 9 layers: the teacher has 1"),
        (["shrink", "M", "new", "--layers", "1,0"], "give different indices in ascending order"),
        (["tokenizer", "R", "-o", "new", "--model", "wordpiece"], "--model wordpiece: give bpe or unigram"),
        (["tokenizer", "R", "-o", "new", "--size", "100"], "a bpe tokenizer of 100 tokens is too small"),
        (["tokenizer", "E", "-o", "new"], "the file is empty"),
        (["recipes", "show", "demos"], "Did you mean demo?"),
        (["compare", "RUN", "-o", "x.txt"], "the ending says the format; write .md or .csv"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(made: Path, arguments: list[str], said: str):
    stands = {"M": made / "student", "R": made / "test.jsonl", "E": made / "empty.jsonl", "new": made / "new"}
    assert said in refused(*(stands.get(argument, argument) for argument in arguments))
    assert not (made / "new").exists()


def test_predictions_that_cannot_be_scored_are_named(made: Path):
    assert "other.jsonl, row 0: no prediction. Fields there: question, answer" in refused(
        "eval", "--predictions", made / "other.jsonl"
    )
    assert "broken.jsonl:2: not valid JSON" in refused("eval", "--predictions", made / "broken.jsonl")


def test_rows_without_a_reference_cannot_be_scored(made: Path):
    write_rows(made / "bare.jsonl", rows(2, output=False))
    data = ("--data", made / "bare.jsonl", "--template", "{{ instruction }}")
    said = "bare:0 has no reference to score against: no field 'output'"
    assert said in refused("eval", made / "student", *data)


def test_an_unfinished_run_says_how_to_go_on(made: Path):
    (made / "unfinished").mkdir()
    (made / "unfinished" / "run.yaml").write_text((made / "run.yaml").read_text())
    for arguments in (("generate", made / "unfinished", "Say."), ("eval", made / "unfinished", "--data", "x.jsonl")):
        assert "has no student yet: the run has not ended. Go on with it by resume=auto" in refused(*arguments)


def test_an_interrupt_ends_with_130(made: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distillm.pipeline.distill", interrupt)
    said = distillm("train", made / "run.yaml")
    assert (said.code, said.out, said.err) == (130, "", "")


def test_a_defect_is_not_hidden(made: Path, monkeypatch: pytest.MonkeyPatch):
    def defect(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("distillm.pipeline.distill", defect)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        distillm("train", made / "run.yaml")


def test_too_little_memory_names_the_setting_that_helps(made: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate a lot")

    monkeypatch.setattr("distillm.pipeline.distill", full)
    message = refused("train", made / "run.yaml")
    assert all(f"{section}batch_size" in message for section in ("train.micro_", "generation.", "evaluation."))
