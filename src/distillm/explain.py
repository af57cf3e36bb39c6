"""What is wrong with a configuration, said in its own dotted names."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from .screen import without_credentials

MOST = 12  # lines of a message: the first mistakes explain the others
_SECTION_EXPECTED = ("model_type", "model_attributes_type", "dict_type")


def explain(error: ValidationError, root: type[BaseModel], source: str) -> str:
    """One line for each setting that cannot be used: its dotted name, what was given, and what is allowed."""
    found: dict[str, dict[str, str]] = {}
    for one in error.errors(include_url=False):
        if one["type"] == "string_type" and isinstance(one["input"], dict) and one["loc"][-1] == "str":
            continue  # a section was given: what is wrong inside it is said
        key, section = located(root, one["loc"])
        key += ".name" * (one["type"] == "union_tag_invalid")
        text, given = _said(one, key, section, root)
        found.setdefault(key, {})[text] = given
    lines = [
        f"  {key + ': ' if key else ''}{' or '.join(said)}{next(iter(said.values()))}" for key, said in found.items()
    ]
    if len(lines) > MOST:
        lines = [*lines[:MOST], f"  and {len(lines) - MOST} more"]
    return "\n".join([f"{source}: {len(found)} setting{'s' * (len(found) > 1)} cannot be used", *lines])


def located(root: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, type[BaseModel] | None]:
    """A validation error's place as a dotted name, and the section that its last part stands in.

    Pydantic's own marks (which member of a union was tried) are left out.
    """
    parts, section, holder, left = list[str](), root, root, [*loc]
    members = list[Any]()
    while left:
        part = left.pop(0)
        if part != "[key]":
            parts.append(str(part))
        if section is None:
            members = [inner for member in members for inner in _values(member)]
        else:
            field = section.model_fields.get(str(part))
            members = [] if field is None else _members(field.annotation)
        sections = _sections(members)
        tag = left.pop(0) if len(members) > 1 and left else None
        holder, section = section, next((s for s in sections if len(sections) == 1 or tag == _tag(s)), None)
    return ".".join(parts), holder


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by dotted name, with its annotation; those of all members of a union."""
    for name, field in section.model_fields.items():
        members = _members(field.annotation)
        sections = _sections(members)
        if len(sections) < len(members):
            yield prefix + name, field.annotation
        for member in sections:
            yield from leaves(member, f"{prefix}{name}.")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = typing.cast(dict[str, Any], value) if isinstance(value, dict) else None
        found |= {f"{prefix}{key}": value} if inner is None else flat(inner, f"{prefix}{key}.")
    return found


def takes_text(root: type[BaseModel], key: str) -> bool:
    """Whether the setting ``key`` is free text, so that what a user types for it is not to be read as YAML."""
    holds = dict(leaves(root))
    above = key.rpartition(".")[0]
    return str in _members(holds.get(key)) or str in _values(holds.get(above))


def takes_section(root: type[BaseModel], key: str) -> bool:
    """Whether the setting ``key``, which may be free text, may also be a section of settings."""
    holds = dict(leaves(root))
    return bool(_sections([*_members(holds.get(key)), *_values(holds.get(key.rpartition(".")[0]))]))


def nearest(given: str, allowed: Sequence[str]) -> str:
    """The allowed name that was probably meant, abbreviations such as skl included, and all that are allowed."""
    short = [name for name in allowed if _initials(name) == given]
    near = short or difflib.get_close_matches(given, allowed, 1, cutoff=0.5)
    return (f" Did you mean {near[0]}?" if near else "") + f" Allowed: {', '.join(allowed)}"


def _said(error: Any, key: str, section: type[BaseModel] | None, root: type[BaseModel]) -> tuple[str, str]:
    """What is wrong, and what was given where that is not part of it."""
    kind, given, name = error["type"], error["input"], key.rpartition(".")[2]
    if kind == "invalid_key" or "[key]" in error["loc"]:
        return "a name must be a text: put it in quotes", ""
    if kind == "extra_forbidden" and section is not None:
        owners = sorted({path for path, _ in leaves(root) if path.rpartition(".")[2] == name} - {key})
        elsewhere = f" Did you mean {owners[0]}?" if owners else nearest(name, list(section.model_fields))
        return f"no such setting{_of_method(section)}.{elsewhere}", ""
    if kind == "missing":
        beside = ", ".join(map(str, given)) if "." in key and isinstance(given, dict) else ""
        return "missing" + (f" beside {beside}" if beside else ""), ""
    if kind == "union_tag_invalid":
        above, tag = key.rpartition(".")[0], str(error["ctx"]["tag"])
        return f"{tag!r} is not a {above}.{nearest(tag, _tags(root, above))}", ""
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{given!r} is not allowed.{nearest(str(given), allowed)}", ""
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, "), ""
    if kind in _SECTION_EXPECTED:
        example = given if kind == "model_attributes_type" and isinstance(given, str) else "value"
        return f"must be a section of settings, such as {{name: {example}}}", _shown(given)
    return re.sub(r"^\w+ should", "must", error["msg"]).replace(" after validation", ""), _shown(given)


def _members(annotation: Any) -> list[Any]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [member for part in typing.get_args(annotation) for member in _members(part) if member is not type(None)]
    return [annotation]


def _sections(members: list[Any]) -> list[type[BaseModel]]:
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _values(annotation: Any) -> list[Any]:
    """What the values of a mapping may be; none for anything else."""
    return _members(typing.get_args(annotation)[1]) if typing.get_origin(annotation) is dict else []


def _tag(section: type[BaseModel]) -> Any:
    return section.model_fields["name"].default if "name" in section.model_fields else None


def _of_method(section: type[BaseModel]) -> str:
    tag = _tag(section)
    return f" of {tag}" if tag else ""


def _tags(root: type[BaseModel], key: str) -> list[str]:
    return [str(_tag(member)) for member in _members(root.model_fields[key].annotation)]


def _initials(name: str) -> str:
    return "".join(word if word == "kl" else word[:1] for word in name.split("_"))


def _shown(given: Any) -> str:
    text = "nothing (leave the line out)" if given is None else without_credentials(repr(given))
    return f"; given: {text if len(text) <= 80 else text[:77] + '...'}"
