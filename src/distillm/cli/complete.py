"""What a shell completes: runs and recipes, and settings by their dotted names with what they may be."""

import typing
from typing import Any

from ..paths import home, is_dir


def sources(incomplete: str) -> list[str]:
    """YAML files, run folders and recipes that begin so."""
    from ..config import recipes

    begun, sign, start = incomplete.rpartition("/")  # kept as it is: a shell takes what goes on as it began
    try:
        entries = [entry for entry in sorted(home(begun + sign).iterdir()) if entry.name.startswith(start)]
    except OSError:
        entries = []
    files = [f"{begun}{sign}{entry.name}" for entry in entries if entry.suffix in (".yaml", ".yml")]
    entries = [entry for entry in entries if is_dir(entry) and not entry.name.startswith(".")]
    folders = [f"{begun}{sign}{entry.name}/" for entry in entries]
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
