import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from distillm.data import all_texts, read_rows, text_examples
from distillm.errors import ConfigError, DataError
from tiny import EOS, tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids(EOS)
ROWS: list[dict[str, Any]] = [{"a": 'x, "y"\nz', "b": "ü\u2028\u0085ß"}, {"a": "", "b": "2"}]


# Reading


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def write_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import csv

    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    path = folder / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv, write_parquet, write_saved])
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[..., Path]) -> None:
    assert read_rows(write(tmp_path, ROWS)) == ROWS


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv])
def test_byte_order_mark_and_carriage_returns(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"a": "1", "b": "\u2028"}, {"a": "2", "b": "é"}]
    path = write(tmp_path, rows)
    lines = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n")
    assert read_rows(str(path)) == rows


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.dictionaries(st.text(min_size=1, max_size=4), st.text() | st.none() | st.lists(st.text()), min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_any_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"\n".join(json.dumps(r, ensure_ascii=False).encode() for r in rows))
    assert read_rows(path) == rows


def test_json_may_hold_lines_and_lines_may_be_blank(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": "1"}\n\n  \n{"a": "2"}', encoding="utf-8")
    assert read_rows(path) == [{"a": "1"}, {"a": "2"}]


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"a": "1"}, {"a": "2"}])
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "two", split="test") == [{"a": "2"}]
    with pytest.raises(DataError, match="choose a split; there are: train, test"):
        read_rows(tmp_path / "two")
    with pytest.raises(DataError, match="no split 'valid'; there are: train, test"):
        read_rows(tmp_path / "two", split="valid")
    data.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match="no split 'test', only one dataset"):
        read_rows(tmp_path / "one", split="test")


def test_a_name_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, name: str | None, split: str | None) -> Any:
        asked.append((path, name, split))
        data = datasets.Dataset.from_list([{"a": "1"}])
        return data if split else datasets.DatasetDict(train=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("owner/some-data", split="train[:1]", name="plain") == [{"a": "1"}]
    assert read_rows("some-data") == [{"a": "1"}]
    assert asked == [("owner/some-data", "plain", "train[:1]"), ("some-data", None, None)]


def test_a_name_that_cannot_be_loaded() -> None:
    with pytest.raises(DataError, match="owner/no-such-data: neither a file or folder here nor a dataset"):
        read_rows("owner/no-such-data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl: the file is empty"),
        ("rows.jsonl", b"\n \n", "rows.jsonl: it holds no rows"),
        ("rows.csv", b"a,b\n", "rows.csv: it holds no rows"),
        (
            "rows.jsonl",
            b'{"a": "1"}\n{"a": "2"\n',
            r"rows.jsonl:2: not valid JSON: Expecting ',' delimiter at column 10, near '\{\"a\": \"2\"'",
        ),
        ("rows.jsonl", b'{"a": "1"}\n["b"]\n', "rows.jsonl:2: the line is an array, not an object"),
        ("rows.jsonl", b'null\n"b"\n', "rows.jsonl:1: the line is null, not an object"),
        ("rows.jsonl", b'{"a": "1"}\n{"a": "\xff"}\n', r"rows.jsonl:2: byte 8 of the line \(0xff\) is not UTF-8"),
        ("rows.json", b'[{"a": "1"},\n{"a": oops}]', "rows.json:2: not valid JSON: Expecting value at column 7"),
        ("rows.json", b'[{"a": "1"}, "b"]', "rows.json: element 1 of the array is a text, not an object"),
        ("rows.csv", b'a,b\n"1\n",2\n3,4,5\n', r"rows.csv:4: the row has 3 columns, the header 2 \(a, b\)"),
        ("rows.csv", b"a,b\n1\n", "rows.csv:2: the row has 1 columns, the header 2"),
        ("rows.csv", b'a,b\n1,2\n3,"4\n5,6\n', "rows.csv:3: not valid CSV: unexpected end of data"),
        ("rows.csv", b"a,a\n1,2\n", "rows.csv:1: column 2 of the header has twice 'a'"),
        ("rows.csv", b"a,\n1,2\n", "rows.csv:1: column 2 of the header has no name"),
        ("rows.csv", b"a,b\n1,\xe9\n", "rows.csv:2: byte 3 of the line"),
        ("rows.parquet", b"no parquet at all", "rows.parquet: not a readable Parquet file"),
        ("rows.xlsx", b"x", r"cannot read '.xlsx' files as rows; known are .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_files_are_named_with_line_and_reason(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": "1"}')
    with pytest.raises(DataError, match=r"trian.jsonl: there is no such file; did you mean train.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"the folder holds: train.jsonl"):
        read_rows(tmp_path / "zzzzzz.csv")
    with pytest.raises(DataError, match="nor a folder"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(DataError, match=r"not written by datasets.save_to_disk; name one of its files: train.jsonl"):
        read_rows(tmp_path)


def test_split_and_name_do_not_apply_to_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, ROWS)
    with pytest.raises(ConfigError, match="split='train' does not apply"):
        read_rows(path, split="train")
    with pytest.raises(ConfigError, match="name='plain' does not apply"):
        read_rows(write_saved(tmp_path, ROWS), name="plain")


# Plain text


def test_text_is_cut_into_chunks_with_end_tokens_between(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffA river.\r\n\r\nThe mill\u2028turns.".encode())
    write_jsonl(tmp_path, [{"text": "Bread."}, {"text": " "}, {"text": "Salt."}])
    chunks = text_examples([tmp_path / "a.txt", str(tmp_path / "rows.jsonl")], TOKENIZER, length=7, end_id=END)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    texts = ["A river.\n\nThe mill\u2028turns.", "Bread.", "Salt."]
    expected = [token for text in texts for token in [*TOKENIZER(text).input_ids, END]]
    assert tokens in (expected, expected[:-1])  # a last chunk of one token has no target
    assert all(len(chunk.tokens) == 7 for chunk in chunks[:-1])
    assert all(chunk.targets == [False] + [True] * (len(chunk.tokens) - 1) for chunk in chunks)
    assert {chunk.origin for chunk in chunks} == {"text"}
    assert text_examples(tmp_path / "a.txt", TOKENIZER, length=7, end_id=END)[0] == chunks[0]


def test_bad_text_sources(tmp_path: Path) -> None:
    cases: list[tuple[str, bytes, str]] = [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("blank.txt", b" \n", "blank.txt: the file holds only white space"),
        ("latin.txt", b"abc\n\xe9t\xe9", r"latin.txt:2: byte 1 of the line \(0xe9\) is not UTF-8"),
        ("rows.jsonl", b'{"texts": "a"}', "rows.jsonl:0: there is no field 'text'; the fields there are: texts"),
        ("more.jsonl", b'{"text": "a"}\n{"text": 3}', "more.jsonl:1: the field 'text' holds no text"),
        ("none.jsonl", b'{"text": ""}', "none.jsonl; give at least one document"),
    ]
    for name, content, message in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            text_examples(tmp_path / name, TOKENIZER, length=8, end_id=END)
    with pytest.raises(DataError, match=r"emptty.txt: there is no such file; did you mean empty.txt"):
        text_examples(tmp_path / "emptty.txt", TOKENIZER, length=8, end_id=END)
    with pytest.raises(ConfigError, match="must be at least 2"):
        text_examples(tmp_path / "rows.jsonl", TOKENIZER, length=1, end_id=END)


def test_all_texts_of_any_field(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A river.\nA mill.", encoding="utf-8")
    rows = write_jsonl(tmp_path, [{"q": "Why?", "n": 3, "a": ["So.", " "]}, {"q": None}])
    assert list(all_texts([tmp_path / "a.txt", str(rows)])) == ["A river.\nA mill.", "Why?", "So."]
    with pytest.raises(DataError, match=r"no text in .*rows.jsonl; give at least one text"):
        list(all_texts([write_jsonl(tmp_path, [{"q": 1}])]))


@pytest.mark.data
def test_real_text(tmp_path: Path) -> None:
    for needed in (SHARED / "tokenizers/gpt2", SHARED / "data/text/shakespeare.txt"):
        if not needed.exists():
            pytest.skip(f"{needed} is absent")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/gpt2")
    text = (SHARED / "data/text/shakespeare.txt").read_text(encoding="utf-8")[:50_000]
    (tmp_path / "part.txt").write_text(text, encoding="utf-8")
    chunks = text_examples(tmp_path / "part.txt", tokenizer, length=512, end_id=tokenizer.eos_token_id)
    assert {len(chunk.tokens) for chunk in chunks[:-1]} == {512}
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert tokenizer.decode(tokens[:-1]) == text
    assert tokens[-1] == tokenizer.eos_token_id
