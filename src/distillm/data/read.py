"""Rows from JSON Lines, CSV, Parquet, or a ``datasets`` folder or name."""

import csv
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..paths import home, is_dir, is_file

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
BOM = b"\xef\xbb\xbf"
AROUND = 30  # characters shown on either side of a mistake
ON_THE_HUB = "hf://datasets/"
VALIDATION = ("validation", "valid", "val", "dev")
HUB_WORDS = 2  # a name on the hub is NAME or OWNER/NAME


def read_rows(source: str | Path, *, split: str | None = None, name: str | None = None) -> list[dict[str, Any]]:
    r"""The rows of ``source`` in its own order, each a dictionary by field name.

    ``source`` is a file (.jsonl; .json with objects line by line or in one array; .csv with a header; .parquet), a
    folder written by ``datasets.save_to_disk`` or with a file for each split, the name of a dataset that
    ``datasets.load_dataset`` knows, or files on the hub (hf://datasets/...). ``split`` chooses among the splits of a
    folder or dataset, ``name`` its configuration. Text is UTF-8, with or without a byte order mark; only ``\n`` and
    ``\r\n`` end a line. Raises DataError with the file and line.
    """
    path = home(source)
    if str(source).startswith(ON_THE_HUB):
        rows = _hub_rows(str(source), split, name)
    elif is_dir(path):
        _refuse(name=name, why=f"{source} is a folder")
        rows = _saved_rows(path, split)
    elif is_file(path) or _looks_like_file(str(source), path):
        _refuse(split=split, name=name, why=f"{source} is a file")
        rows = _file_rows(path)
    else:
        rows = _hub_rows(str(source), split, name)
    if not rows:
        raise DataError(f"{source}: it holds no rows; give data with at least one row")
    return rows


def split_file(folder: Path, split: str) -> Path | None:
    """The file of ``folder`` that is named after ``split``; validation may be called valid, val or dev."""
    names = VALIDATION if split in VALIDATION else (split,)
    return next((f for n in names for s in READERS if (f := folder / f"{n}{s}").is_file()), None)


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file, line endings as ``\\n``; DataError where it is missing, empty or not UTF-8."""
    return "\n".join(text for _, text in _text_lines(path))


def listed(names: Sequence[str], most: int = 12) -> str:
    """``names`` for a message, with the number of those left out."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"


def _refuse(why: str, **given: str | None) -> None:
    for setting, value in given.items():
        if value is not None:
            raise ConfigError(f"{setting}={value!r} does not apply, because {why}; leave {setting} out")


def _looks_like_file(source: str, path: Path) -> bool:
    if path.suffix.lower() in (*READERS, ".txt", ".tsv", ".gz", ".zst", ".zip") or path.is_absolute():
        return True
    return source.startswith((".", "~")) or len(path.parts) > HUB_WORDS


def _file_rows(path: Path) -> list[dict[str, Any]]:
    _check_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix}' files as rows; known are {listed(list(READERS))}")
    return reader(path)


def _check_file(path: Path) -> None:
    if not is_file(path):
        folder = path.parent
        if not is_dir(folder):
            raise DataError(f"{path}: there is no such file, nor a folder {folder}; check the path")
        there = sorted(entry.name for entry in folder.iterdir())
        near = get_close_matches(path.name, there, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the folder holds: {listed(there)}"
        raise DataError(f"{path}: there is no such file; {hint}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: not allowed to read this file; change its permissions")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give one with at least one row")


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. ``str.splitlines`` would split at U+2028 and its like, which text may hold."""
    _check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise DataError(
                    f"{path}:{number}: byte {error.start + 1} of the line (0x{byte:02x}) is not UTF-8 "
                    f"({error.reason}); save the file as UTF-8"
                ) from None
            yield number, text.removesuffix("\n").removesuffix("\r")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        value = json.loads(text)
        if _HALF.search(text):  # of a character, unless the other half follows
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{path}:{first_line}: a text holds half of a character ({half!r}), which no UTF-8 file can; mend this line"
        ) from None
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - AROUND) : error.pos + AROUND]
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: not valid JSON: {error.msg} at column {error.colno}, "
            f"near {around!r}; mend or remove this line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets in brackets
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{path}:{first_line}: cannot be read as JSON: {why}; mend or remove this line") from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, text in _text_lines(path):
        if text.strip():
            rows.append(_object(_parse(text, path, number), f"{path}:{number}: the line"))
    return rows


def _json(path: Path) -> list[dict[str, Any]]:
    first = next((text for _, text in _text_lines(path) if text.strip()), "")
    if not first.lstrip().startswith("["):
        return _json_lines(path)
    array = _parse(read_text(path), path, 1)
    return [_object(row, f"{path}: element {i} of the array") for i, row in enumerate(array)]


def _object(row: Any, what: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a text", type(None): "null"}.get(type(row), f"a {type(row).__name__}")
        raise DataError(f'{what} is {kind}, not an object; each row must look like {{"instruction": "..."}}')
    return row


def _csv(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    header: list[str] = []
    begin = 1  # a quoted cell may span lines: the row's first one
    # csv needs the line ends, because a quoted cell may hold one.
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole document; csv's own limit is 128 KiB
    lines = csv.reader((text + "\n" for _, text in _text_lines(path)), strict=True)
    try:
        for cells in lines:
            if not header:
                header = _header(cells, path, begin)
            elif cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{begin}: the row has {len(cells)} columns, the header {len(header)} "
                        f"({listed(header)}); put cells that hold a comma or a quote in double quotes"
                    )
                rows.append(dict(zip(header, cells, strict=True)))
            begin = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{begin}: not valid CSV: {error}; mend the row that begins here, or use JSON Lines"
        ) from None
    return rows


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    for column, name in enumerate(cells):
        if not name.strip() or name in cells[:column]:
            what = f"twice '{name}'" if name.strip() else "no name"
            raise DataError(f"{path}:{line}: column {column + 1} of the header has {what}; give each its own name")
    return cells


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa  # slow to import, and most data are not Parquet
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two of values, such as dates
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _saved_rows(path: Path, split: str | None) -> list[dict[str, Any]]:
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        if split is not None and (file := split_file(path, split)) is not None:
            return _file_rows(file)
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        hint = f"name one of its files: {listed(files)}" if files else "name a data file"
        raise DataError(f"{path}: the folder was not written by datasets.save_to_disk; {hint}")
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the saved dataset cannot be read: {error}") from None
    return _one_split(data, str(path), split)


def _hub_rows(source: str, split: str | None, name: str | None) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    given: dict[str, Any] = {"path": source, "name": name}
    if source.startswith(ON_THE_HUB):  # its files, by the reader of their kind; a script beside them is never run
        given = {"path": "parquet" if source.endswith(".parquet") else "json", "data_files": source}
    try:
        data = datasets.load_dataset(**given, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{source}: neither a file or folder here nor a dataset that could be loaded: {error}"
        ) from None
    return data.to_list() if isinstance(data, datasets.Dataset) else _one_split(data, source, split)


def _one_split(data: Any, source: str, split: str | None) -> list[dict[str, Any]]:
    import datasets

    if isinstance(data, datasets.Dataset):
        if split is not None and str(data.split) != split:
            raise DataError(f"{source}: it has no split '{split}', only one dataset; leave split out")
        return data.to_list()
    splits = list(data)
    if split is None and len(splits) != 1:
        raise DataError(f"{source}: choose a split; there are: {listed(splits)}")
    chosen = splits[0] if split is None else split
    if chosen not in data:
        raise DataError(f"{source}: it has no split '{split}'; there are: {listed(splits)}")
    return data[chosen].to_list()
