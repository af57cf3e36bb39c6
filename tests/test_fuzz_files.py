"""Broken data files: each is read, or refused by an error that names it, within a screen."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from command_line import distillm
from distillm.data import Task, read_rows
from distillm.errors import DataError, ModelError
from distillm.judge.scoring import read_answers
from distillm.models import load_model, load_tokenizer
from distillm.report import compare_table, with_differences, write_report
from fabricated_run import fabricate
from fuzzing import ODD_TEXTS, check_message, fuzz, odd_values, outcome
from fuzzing import damaged as broken
from tiny import save, tiny_causal, tiny_tokenizer

ROWS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two, three", '"four"\nfive')]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
CSV = b'instruction,input,output\nSay one.,,one\r\n"Say ""two"".",,"two, three"\n"Say\nfour",\xc3\xa9,4\n'
TOKENIZER = tiny_tokenizer()
HUGE = b"9" * 5000
NAMED: dict[str, bytes] = {
    "deep.jsonl": b'{"a": ' + b"[" * 100_000,
    "closed.jsonl": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep.json": b"[" * 100_000,
    "huge.jsonl": b'{"a": ' + HUGE + b"}",
    "huge.json": b"[" + HUGE + b"]",
    "half.jsonl": b'{"instruction": "\\ud800", "output": "x"}',
    "half.json": b'[{"instruction": "\\uDFFF", "output": "x"}]',
    "utf16.jsonl": '{"a": 1}'.encode("utf-16"),
    "utf32.csv": "a,b\n1,2\n".encode("utf-32"),
    "latin.csv": "a\ncaf\u00e9\n".encode("latin-1"),
    "surrogate.jsonl": b'{"a": "\xed\xa0\x80"}',
    "nul.json": b"\x00" * 1000,
    "empty.csv": b"",
    "bom.csv": b"\xef\xbb\xbf",
    "header.csv": b"a,b\n",
    "wide.csv": b",".join(b"h%d" % i for i in range(5000)) + b"\n1\n",
    "name.csv": b'"' + b"x" * 50_000 + b'",\n1,2\n',
    "open.csv": b'a,b\n"x\ny\n',
    "mac.csv": b"a,b\r1,2\r",
    "table.tsv": b"a\tb\n1\t2\n",
    "list.json": b"[[]]",
    "number.jsonl": b"3\n",
    "key.jsonl": b'{"' + b"k" * 100_000 + b'": 1',
    "no.parquet": b"PAR1" + b"\x00" * 100 + b"PAR1",
}


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read(path: Path, content: bytes) -> Any:
    """The rows of ``content`` as examples, or the error."""
    path.write_bytes(content)

    def used() -> list[dict[str, Any]]:
        rows = read_rows(path)
        Task().examples(rows, TOKENIZER, max_prompt=300, max_length=400, end_id=1, source=path.stem)
        return rows

    found = outcome(used)
    assert not isinstance(found, Exception) or path.stem in str(found)
    return found


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_none_is_refused(folder: Path, name: str):
    assert isinstance(read(folder / name, NAMED[name]), DataError)
    said = distillm("tokenizer", folder / name, "-o", folder / "new", "--size", 280)
    assert said.code == 2
    check_message(said.err)


@given(st.integers(0, 2**32))
@fuzz(350)
def test_json_lines_with_something_broken_are_read_or_refused(folder: Path, seed: int):
    read(folder / "rows.jsonl", broken(LINES, random.Random(seed)))


@given(st.integers(0, 2**32))
@fuzz(200)
def test_json_with_something_broken_is_read_or_refused(folder: Path, seed: int):
    read(folder / "array.json", broken(ARRAY, random.Random(seed)))


@given(st.integers(0, 2**32))
@fuzz(250)
def test_csv_with_something_broken_is_read_or_refused(folder: Path, seed: int):
    read(folder / "table.csv", broken(CSV, random.Random(seed)))


@given(st.sampled_from(["instruction", "input", "output", "", "other"]), odd_values | st.lists(odd_values, max_size=3))
@fuzz(200)
def test_a_row_with_a_value_of_another_type_is_used_or_refused(folder: Path, key: str, value: Any):
    row: dict[Any, Any] = {"instruction": "Say one.", "output": "one"} | {key: value}
    try:
        content = json.dumps(row).encode()
    except (ValueError, TypeError):  # a number or key that Python itself does not write
        content = b'{"instruction": %s}' % HUGE
    read(folder / "typed.jsonl", content)


def table(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


PARQUET = table(instruction=["Say one.", "Say two."], output=["one", "two"])


@given(st.integers(0, 2**32))
@fuzz(80)
def test_parquet_with_something_broken_is_read_or_refused(folder: Path, seed: int):
    read(folder / "table.parquet", broken(PARQUET, random.Random(seed)))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**60], pa.timestamp("us")),
        pa.array([2**62], pa.date64()),
        pa.array([2**62], pa.duration("s")),
        pa.array([2**61 + 1], pa.timestamp("ns")),
        pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
        pa.array([{"a": [1, None]}]),
        pa.array([None], pa.null()),
        pa.array(["one"]).dictionary_encode(),
        pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_values_of_any_type_are_read_or_refused(folder: Path, values: Any):
    read(folder / "values.parquet", table(instruction=["Say one."], output=["one"], other=values))
    read(folder / "values.parquet", table(instruction=values, output=values))


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_may_be_named_as_data(text: str):
    for name in (text, f"{text}.jsonl", f"{text}/x.csv"):
        assert isinstance(outcome(lambda name=name: read_rows(name)), Exception)


def test_a_cell_may_be_longer_than_csvs_own_limit(folder: Path):
    (folder / "long.csv").write_text("instruction,output\n" + "x " * 100_000 + ",y\n")
    assert len(read_rows(folder / "long.csv")[0]["instruction"]) == 200_000


def test_whole_characters_written_as_two_halves_are_read(folder: Path):
    rows = read(folder / "pair.jsonl", b'{"instruction": "\\ud83e\\udd8a", "output": "x"}')
    assert rows[0]["instruction"] == "\U0001f98a"


@pytest.mark.parametrize("name", ["closed.jsonl", "half.jsonl", "open.csv", "no.parquet"])
def test_a_process_of_its_own_ends_without_a_traceback(folder: Path, name: str):
    (folder / name).write_bytes(NAMED[name])
    arguments = [sys.executable, "-m", "distillm", "tokenizer", name, "-o", "new"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    check_message(done.stderr)


# ------------------------------------------------------------------------------------------------------- runs, models


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "run", num_steps=10, every=5, num_samples=1)


@given(
    st.sampled_from(["run.yaml", "metrics.jsonl", "samples.jsonl", "eval/kitchen-student.json"]), st.integers(0, 2**32)
)
@fuzz(150)
def test_a_run_folder_with_something_broken_is_shown_or_refused(run: Path, name: str, seed: int):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(broken(whole, random.Random(seed)))
    try:
        outcome(lambda: with_differences(compare_table([run]), "before"))
        if seed % 5 == 0:
            outcome(lambda: write_report([run], run.parent / "report.html"))
        if name.startswith("eval"):
            outcome(lambda: read_answers(run / name))
    finally:
        (run / name).write_bytes(whole)


@given(
    st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    st.integers(0, 2**32),
)
@fuzz(100)
def test_a_model_folder_with_something_broken_is_loaded_or_refused(model: Path, name: str, seed: int):
    whole = (model / name).read_bytes()
    (model / name).write_bytes(broken(whole, random.Random(seed)))
    try:
        outcome(lambda: load_tokenizer(model))
        if name != "tokenizer.json":
            outcome(lambda: load_model(model, device="cpu"))
    finally:
        (model / name).write_bytes(whole)


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_causal(), TOKENIZER, tmp_path_factory.mktemp("models") / "model")


def test_a_torn_tokenizer_is_a_model_error(model: Path):
    whole = (model / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(model)
    (model / "tokenizer.json").write_bytes(whole)
