"""The judge's questions, made from templates, and the verdicts read from its replies."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
import jinja2.meta

from ..errors import ConfigError
from ..sandbox import Sandbox, broken
from .cache import Reply

Kind = Literal["single", "pair"]
Verdict = Literal["A", "B", "tie"]

NEEDED: dict[Kind, tuple[str, ...]] = {"single": ("prompt", "answer"), "pair": ("prompt", "answer_a", "answer_b")}
"""What a template must show; it may also use ``mark``."""
FORMS: dict[Kind, str] = {"single": "Score: N", "pair": "Verdict: A, B or tie"}
_MARKUP = re.compile(r"[*_`\[\]()#>\"'$]+")
_SCORE = re.compile(
    r"(?:(?:final|overall|my) )*(?:score|rating|grade) ?[:=]? ?(\d+(?:\.\d+)?)(?: ?(?:/|out of) ?10)? ?\.?", re.I
)
_VERDICT = re.compile(
    r"(?:(?:final|overall|my) )*(?:verdict|winner) ?[:=]? ?(?:(?:answer|reply) )?(a|b|tie) ?\.?", re.I
)
_PROMPTS = resources.files("distillm.judge").joinpath("prompts")
_ENVIRONMENT = Sandbox()


@dataclass(frozen=True)
class Template:
    """A question's template: Jinja, in its immutable sandbox. ``name`` says where it is from."""

    kind: Kind
    name: str
    text: str

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.text)

    @property
    def sha256(self) -> str:
        """The version of the prompt."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, **texts: str) -> str:
        """The question about ``texts``, which stand in it as they are: they are values, never parts of a template.

        ``mark`` is a code that the texts do not contain and cannot foresee, for tags that they cannot close.
        """
        try:
            return _ENVIRONMENT.render(self._compiled, {"mark": mark_for(texts), **texts})
        except Exception as error:  # a user's template can raise anything
            raise ConfigError(f"{self.name}: the template fails: {type(error).__name__}: {error}") from error


def mark_for(texts: Mapping[str, str]) -> str:
    """16 hexadecimal digits that are a function of ``texts`` and occur in none of them."""
    joined = "\x00".join(f"{name}\x00{text}" for name, text in sorted(texts.items()))
    mark = hashlib.sha256(joined.encode()).hexdigest()[:16]
    while mark in joined:
        mark = hashlib.sha256(mark.encode()).hexdigest()[:16]
    return mark


def load_template(kind: Kind, path: Path | None = None) -> Template:
    """The template in ``path``, or our own.

    Raises:
        ConfigError: it cannot be read, is no template, uses unknown names, or does not show what is judged.
    """
    if path is None:
        name = f"{kind}.txt"
        return Template(kind, name, _PROMPTS.joinpath(name).read_text(encoding="utf-8"))
    try:
        text = path.read_text(encoding="utf-8")
        if said := broken(text, _ENVIRONMENT):
            raise ConfigError(f"--prompt {path}: {said}")
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
    except OSError as error:
        raise ConfigError(f"--prompt {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt {path}: it is not UTF-8") from error
    missing, unknown = set(NEEDED[kind]) - used, used - {*NEEDED[kind], "mark"}
    if missing or unknown:
        wrong = [f"{{{{ {name} }}}} is missing" for name in sorted(missing)] + [
            f"{{{{ {name} }}}} is unknown" for name in sorted(unknown)
        ]
        raise ConfigError(
            f"--prompt {path}: {', '.join(wrong)}. It needs {', '.join(NEEDED[kind])}, may use mark, and must ask for "
            f"a last line of the form '{FORMS[kind]}'"
        )
    return Template(kind, str(path), text)


def reminder(kind: Kind, attempt: int) -> str:
    """What is added to a question that is asked again; ``attempt`` counts from 2."""
    text = _PROMPTS.joinpath("again.txt").read_text(encoding="utf-8")
    return _ENVIRONMENT.from_string(text).render(attempt=attempt, form=FORMS[kind])


def read_score(reply: Reply) -> float | None:
    """The grade, 1 to 10, that stands alone on the last line of a reply, or alone on its first, or None.

    Only these two places count, and only whole lines, so that a grade quoted in the text decides nothing. The last line
    of a reply that was cut is not its end, so it does not count either.
    """
    found = _find(reply, _SCORE)
    value = None if found is None else float(found)
    return value if value is not None and 1 <= value <= 10 else None


def read_verdict(reply: Reply) -> Verdict | None:
    """A, B or tie, read as ``read_score`` reads."""
    found = _find(reply, _VERDICT)
    known: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}
    return None if found is None else known[found.lower()]


def _find(reply: Reply, form: re.Pattern[str]) -> str | None:
    lines = [plain for line in reply.text.splitlines() if (plain := " ".join(_MARKUP.sub(" ", line).split()))]
    if not lines:
        return None
    ends = [lines[0]] if reply.cut else [lines[-1], lines[0]]
    return next((found[1] for line in ends if (found := form.fullmatch(line))), None)


READERS: dict[Kind, Callable[[Reply], float | Verdict | None]] = {"single": read_score, "pair": read_verdict}
