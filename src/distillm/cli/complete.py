"""What a shell completes: runs and recipes, and settings by their dotted names with what they may be."""

import typing
from pathlib import Path
from typing import Any


def sources(incomplete: str) -> list[str]:
    """YAML files, run folders and recipes that begin so."""
    from ..config import recipes

    path = Path(incomplete)
    folder, start = (path, "") if incomplete.endswith("/") else (path.parent, path.name)
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if entry.name.startswith(start)]
    except OSError:
        entries = []
    files = [str(entry) for entry in entries if entry.suffix in (".yaml", ".yml")]
    folders = [f"{entry}/" for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [*files, *folders, *(name for name in recipes() if name.startswith(incomplete))]


def settings(incomplete: str) -> list[str]:
    """``train.`` -> ``train.steps=`` and so on; behind the sign, the values that are allowed."""
    from ..config import Run
    from ..explain import leaves

    name, sign, value = incomplete.partition("=")
    known: dict[str, list[Any]] = {}
    for key, annotation in leaves(Run):
        known.setdefault(key, []).append(annotation)
    if not sign:
        return [f"{key}=" for key in known if key.startswith(name) and not key.startswith("provenance")]
    values = dict.fromkeys(word for annotation in known.get(name, []) for word in _values(annotation))
    return [f"{name}={word}" for word in values if word.startswith(value)]


def _values(annotation: Any) -> list[str]:
    """The words that a setting may be."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(word) for word in typing.get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    return [word for part in typing.get_args(annotation) for word in _values(part)]
