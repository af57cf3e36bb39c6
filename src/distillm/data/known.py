"""Rows of a data set that is known by name, from a local folder of its layout or from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..known import Known
from ..paths import home, is_dir
from .read import listed, read_rows, split_file


def known_rows(entry: Known, *, split: str, name: str | None = None, folder: str | Path = ".") -> list[dict[str, Any]]:
    """The rows of one split, under the task's own field names.

    They are read from ``folder``/NAME where that folder is there (NAME/PAIR for languages other than the usual ones):
    files named after their splits, or what ``datasets.save_to_disk`` wrote; otherwise from the hub. ``name`` is the
    pair of languages of a translation. Raises DataError where neither has the split.
    """
    place, used = located(entry, split=split, name=name, folder=folder)
    rows = read_rows(place, **used)
    columns = entry.columns_of(name)
    found = [_named(row, columns, f"{entry.name}:{i}") for i, row in enumerate(rows)]
    if entry.min_words is None or entry.task is None:
        return found
    answer = [*entry.columns][-1]
    kept = [row for row in found if _words(row.get(answer)) >= entry.min_words]
    if not kept:
        raise DataError(f"{entry.name}: no row has a reference of {entry.min_words} words or more")
    return kept


def located(
    entry: Known, *, split: str, name: str | None = None, folder: str | Path = "."
) -> tuple[str, dict[str, str | None]]:
    """What ``read_rows`` reads, and with which settings, for one split of a known data set."""
    pair = entry.asked_pair(name)
    local = home(folder) / entry.name
    other = pair != entry.pair
    if other:
        local = local / str(pair)
    if is_dir(local):
        part = split.partition("[")[0]
        saved = any((local / f"dataset_{what}.json").exists() for what in ("info", "dict"))
        file = None if saved else split_file(local, part)
        if file is not None and "[" not in split:
            return str(file), {}
        if file is None and not saved:
            there = sorted(path.stem for path in local.iterdir() if split_file(local, path.stem) == path)
            raise DataError(f"{local}: it has no split '{split}'; there are: {listed(there)}")
        return str(local), {"split": split}
    if entry.path is None:
        raise DataError(
            f"{entry.name}: there is no folder {local}, and no place on the hub is known; give data.folder, in which "
            f"{entry.name}/train.jsonl and so on lie"
        )
    return _on_the_hub(entry, split, entry.configuration if pair is None else entry.pairs[pair])


def _on_the_hub(entry: Known, split: str, configuration: str | None) -> tuple[str, dict[str, str | None]]:
    part, bracket, rest = split.partition("[")
    if part not in entry.splits:
        raise DataError(f"{entry.name}: the hub has no split '{part}' of it; there are: {listed([*entry.splits])}")
    if not entry.files:
        return str(entry.path), {"split": split, "name": configuration}
    revision = f"@{entry.revision}" if entry.revision else ""
    file = entry.files[part].format(configuration=configuration)
    return f"hf://datasets/{entry.path}{revision}/{file}", {"split": f"train{bracket}{rest}"}


def _named(row: Mapping[str, Any], columns: Mapping[str, str], row_id: str) -> dict[str, Any]:
    """``row`` with its columns under the task's names; one that has them already stays as it is."""
    renamed: dict[str, Any] = {}
    gone: set[str] = set()
    for role, column in columns.items():
        if role in row or column.partition(".")[0] not in row:
            continue
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(f"{row_id}: it has no {column}; the fields there are: {listed(list(row))}")
            value = value[part]
        renamed[role] = value
        gone.add(column.partition(".")[0])
    return {key: value for key, value in row.items() if key not in gone} | renamed


def _words(reference: Any) -> int:
    texts = reference if isinstance(reference, list) else [reference]
    return len(texts[0].split()) if texts and isinstance(texts[0], str) else 0
