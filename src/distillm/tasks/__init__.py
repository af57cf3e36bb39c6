"""What a task is, as data: its fields, prompts, metrics and decoding, from a small YAML file. Never imports torch."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.meta
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError
from ..explain import explain
from ..paths import home, is_file
from ..sandbox import Sandbox, broken
from ..settings_text import load_yaml

CHAT = "chat"
"""The name of the template that is the tokenizer's own."""

Metric = Literal["rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "chrf", "ter", "exact_match"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


class Decoding(_Part):
    """How responses of the task are written, where the run does not say."""

    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """1 is off."""


class Scoring(_Part):
    """How test rows are scored, where the run does not say."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy; unset is as in training."""


class TaskSpec(_Part):
    """A task: which texts a row holds, what is asked by them, and which text is to be learned."""

    name: str = ""
    """The name of its file; not to be written into it."""
    description: str = ""
    """One line about the task."""
    fields: dict[str, str]
    """Every text of a row: the task's name for it, and the column it is in unless `data.fields` says otherwise."""
    response: str | None = None
    """Which of `fields` is learned."""
    conversation: str | None = None
    """Instead of `response`: which of `fields` holds messages with roles; what the assistant says is learned."""
    optional: list[str] = []
    """Fields that a row may lack."""
    cut: list[str] = []
    """Fields that may be cut where a prompt is too long, the first one first."""
    templates: dict[str, str] = {}
    """Prompts by name, as Jinja text that sees fields (a missing optional one as "") and variables."""
    template: str
    """The prompt unless `data.template` says otherwise: a name in `templates`, `chat`, or Jinja text."""
    user: str | None = None
    """What the user says where the template is `chat`, as Jinja text; unset, the fields one after the other."""
    variables: dict[str, str] = {}
    """What else templates see, with its default; `data.variables` changes it."""
    metrics: Annotated[list[Metric], Field(min_length=1)] = ["rouge_l", "exact_match"]
    """What responses are scored by."""
    generation: Decoding = Decoding()
    """Decoding where the run's `generation` does not say."""
    evaluation: Scoring = Scoring()
    """Decoding of test rows where the run's `evaluation` does not say."""

    @property
    def asked(self) -> list[str]:
        """The fields that are part of the prompt."""
        return [role for role in self.fields if role != self.response]

    @property
    def required(self) -> list[str]:
        """The fields of the prompt that every row has."""
        return [role for role in self.asked if role not in self.optional]

    @property
    def named(self) -> list[str]:
        """The names that a template may have."""
        return [CHAT] if self.conversation else [*self.templates, CHAT]

    def owns(self, template: str) -> bool:
        """Whether ``template`` is the task's, so that it sees fields and variables only."""
        return template in (*self.named, self.template)

    def text_of(self, template: str) -> str:
        """The Jinja text of a template by name, or the given text itself."""
        return self.templates.get(template, template)

    @model_validator(mode="after")
    def _fits_together(self) -> "TaskSpec":
        if (self.response is None) == (self.conversation is None):
            raise ValueError("give one of response and conversation: the field that is learned")
        if self.conversation is not None and ([*self.fields] != [self.conversation] or self.template != CHAT):
            raise ValueError("a conversation is the only field, and its template is chat")
        if self.conversation is not None and (self.templates or self.user or self.cut or self.optional):
            raise ValueError("templates, user, cut and optional mean nothing to a conversation; leave them out")
        known = [*self.fields]
        for key, roles, allowed in (
            ("response", [self.response or known[0]], known),
            ("optional", self.optional, self.asked),
            ("cut", self.cut, self.asked),
        ):
            for role in roles:
                if role not in allowed:
                    raise ValueError(f"{key}: {role} is none of {', '.join(allowed)}{near(role, allowed)}")
        both = sorted(self.variables.keys() & self.fields.keys())
        if both:
            raise ValueError(f"variables: {both[0]} is a field too; give one of them another name")
        if CHAT in self.templates:
            raise ValueError("templates: chat is the tokenizer's own; give yours another name")
        texts = {f"templates.{name}": text for name, text in self.templates.items()}
        texts |= {} if self.template in self.named else {"template": self.template}
        for key, text in (texts | ({} if self.user is None else {"user": self.user})).items():
            self._check(key, text)
        return self

    def _check(self, key: str, text: str) -> None:
        if not is_jinja(text):
            raise ValueError(f"{key}: {text!r} is neither a name ({', '.join(self.named)}) nor Jinja text with fields")
        if said := broken_in(text):
            raise ValueError(f"{key}: {said}; mend the Jinja template")
        seen = jinja2.meta.find_undeclared_variables(_environment().parse(text))
        allowed = [*self.asked, *self.variables]
        for name in sorted(seen - {*allowed}):
            why = "is what is learned, and must not be in the prompt" if name == self.response else "is not known"
            raise ValueError(f"{key}: {name} {why}; it may use {', '.join(allowed)}{near(name, allowed)}")


def is_jinja(text: str) -> bool:
    """Whether ``text`` can be a template: it has a place where something is put in."""
    return "{{" in text or "{%" in text


def rendered(text: str, values: Mapping[str, Any]) -> str:
    """What the template ``text`` makes of ``values``, in the sandbox. It may raise anything."""
    return _environment().render(_compiled(text), values)


def broken_in(text: str) -> str | None:
    """Why ``text`` is no template that can be used; None where it is one."""
    return broken(text, _environment())


@lru_cache(maxsize=32)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@cache
def _environment() -> Sandbox:
    return Sandbox(keep_trailing_newline=True)  # a template's last line end belongs to the prompt


@cache
def tasks() -> dict[str, Path]:
    """The shipped tasks by name."""
    folder = Path(str(resources.files("distillm"))) / "tasks"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_task(source: str) -> TaskSpec:
    """A shipped task by name, or the task in a YAML file.

    Raises:
        ConfigError: there is none, or it cannot be used; the message names the key.
    """
    path = tasks().get(source, home(source))
    if not is_file(path):
        raise ConfigError(
            f"data.task: there is no task and no file {source}; the tasks are {', '.join(tasks())}"
            f"{near(source, [*tasks()])}"
        )
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _read(path: Path, _written: int) -> TaskSpec:
    """The task in a file as it was written at that time."""
    try:
        settings: Any = load_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: a task that cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no task; see docs/tasks.md for one")
    if "name" in settings:
        raise ConfigError(f"{path}: name: a task is named by its file; leave name out")
    try:
        return TaskSpec.model_validate({**settings, "name": path.stem})
    except ValidationError as error:
        raise ConfigError(explain(error, TaskSpec, str(path))) from None


def near(word: str, allowed: Sequence[str]) -> str:
    """The allowed name that was probably meant, as the end of a message."""
    found = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
