"""What mkdocs puts into pages as it builds them: settings, commands and recipes, read from the code itself."""

import typing
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distillm.cli import app
from distillm.config import Run, recipes


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of generated tables by the tables."""
    for mark, table in {"settings": settings, "commands": commands, "recipes": recipe_table}.items():
        if f"<!-- {mark} -->" in markdown:
            markdown = markdown.replace(f"<!-- {mark} -->", table())
    return markdown


def settings() -> str:
    """A heading and a table for every section of ``Run``; each setting by its dotted name."""
    own = {name: field for name, field in Run.model_fields.items() if not _sections(field.annotation)}
    parts = ["## The run itself\n", *_table(own, "")]
    for name, field in Run.model_fields.items():
        for section in _sections(field.annotation):
            parts += _section(name, section, field.description or "")
    return "\n".join(parts)


def _section(path: str, section: type[BaseModel], said: str) -> list[str]:
    kind = section.model_fields.get("name")
    choice = kind is not None and isinstance(kind.default, str)
    heading = f"{path}.name: {kind.default}" if choice and kind is not None else path
    parts = ["", f"## {heading}\n", _line(section.__doc__ or said), ""]
    parts += _table(section.model_fields, f"{path}.")
    for name, field in section.model_fields.items():
        for inner in _sections(field.annotation):
            parts += _section(f"{path}.{name}", inner, field.description or "")
    return parts


def _table(fields: dict[str, Any], path: str) -> list[str]:
    rows = [
        f"| `{path}{name}` | {_type(field.annotation)} | {_default(field)} | {_line(field.description or '')} |"
        for name, field in fields.items()
    ]
    return ["| setting | value | default | meaning |", "|---|---|---|---|", *rows]


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _members(annotation: Any) -> list[Any]:
    """The types that a union, an optional type or an annotated one is made of."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, type(int | None)):
        return [found for part in typing.get_args(annotation) for found in _members(part)]
    return [annotation]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _members(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _type(annotation: Any) -> str:
    """A type in the words of YAML."""
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true, false",
        type(None): "null",
        Any: "anything",
    }
    said = list[str]()
    for part in _members(annotation):
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is typing.Literal:
            said += [f"`{value}`" for value in inner]
        elif origin in (list, tuple):
            said.append(f"list of {_type(inner[0])}")
        elif origin is dict:
            said.append(f"names with {_type(inner[1])}")
        elif isinstance(part, type) and issubclass(part, BaseModel):
            said.append("section")
        else:
            said.append(names[part])
    return ", ".join(dict.fromkeys(said))


def _default(field: Any) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return ""
    if isinstance(default, BaseModel):
        return "as below"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def commands() -> str:
    """Every command with its help, as ``distillm COMMAND --help`` says it."""
    parts = list[str]()
    for path, command in walk(typer.main.get_command(app), "distillm"):
        text = (command.help or "").replace("\b\n", "").replace("\f", "")
        head, _, rest = text.partition("\n\n")
        parts += [f"## {path}\n", _line(head), ""]
        if rest.strip():
            parts += ["```text", rest.strip("\n"), "```", ""]
        rows = [_option(option) for option in command.params if option.name != "help"]
        if rows:
            parts += ["| argument | meaning |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def walk(command: Any, path: str) -> list[tuple[str, Any]]:
    """A command and all below it, by what is typed."""
    inner = getattr(command, "commands", {})
    return [(path, command), *[found for name in inner for found in walk(inner[name], f"{path} {name}")]]


def _option(option: Any) -> str:
    argument = (option.metavar or option.name.upper()).replace("|", "\\|")
    names = ", ".join(option.opts) if option.param_type_name == "option" else argument
    default = option.default
    shown = default is not None and default is not False and not callable(default) and str(default) not in ("", "()")
    default = f" Default: `{default}`." if shown else ""
    return f"| `{names}` | {_line(getattr(option, 'help', None) or '')}{default} |"


def recipe_table() -> str:
    """The shipped recipes, with the first line of each."""
    rows = list[str]()
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        rows.append(f"| `{name}` | {_line(first.removeprefix('#'))} |")
    return "\n".join(["| recipe | what it is |", "|---|---|", *rows])
