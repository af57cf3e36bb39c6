"""Users' templates: Jinja in its immutable sandbox, which also refuses what would take all memory at a stroke.

It is no limit of time or memory in general: a template that goes through its own texts again and again is slow.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 1_000_000
"""Most characters or items made by one operation, and most numbers that all ranges of one rendering count."""
BITS = 4096
"""Most bits of a number that is computed."""
LONGEST = 10_000_000
"""Most characters of what a template gives."""
_WIDE = re.compile(r"\*|\d{5,}")  # of %: a width that is not written out, or has five digits
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|\d{5,})")  # of format()
_SIZED = ("center", "ljust", "rjust", "zfill", "expandtabs")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of a user's templates. Nothing is escaped: this is no web page. Unknown names are errors."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *, keep_trailing_newline: bool = False):
        super().__init__(
            undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=keep_trailing_newline
        )
        self.counted = 0
        del self.globals["lipsum"]  # texts of any length, for nobody
        self.globals |= {"range": self._range}
        for name in ("center", "indent", "format", "batch", "slice"):
            self.filters[name] = _bounded(self.filters[name])

    def render(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """What ``template`` makes of ``values``. It may raise anything."""
        self.counted = 0
        parts, size = list[str](), 0
        for part in template.generate(values):
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise SecurityError(f"it writes more than {LONGEST} characters")
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As Jinja's, within bounds."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > MOST:
                    raise SecurityError(f"a product of more than {MOST} items")
        if operator == "%" and isinstance(left, str):
            _check_widths(left, _WIDE)
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > BITS:
                raise SecurityError(f"a number of more than {BITS} bits")
        return super().call_binop(context, operator, left, right)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (Jinja's)
        if isinstance(getattr(__obj, "__self__", None), str) and getattr(__obj, "__name__", "") in _SIZED:
            _check_sizes(args)
        self.counted += 1
        self._check_counted()
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: D102 (Jinja's)
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(str(value.__self__), _WIDE_BRACES)
        return wrapped

    def _range(self, *limits: int) -> range:
        made = range(*limits)
        self.counted += len(made)
        self._check_counted()
        return made

    def _check_counted(self) -> None:
        if self.counted > MOST:
            raise SecurityError(f"it counts or calls more than {MOST} times")


def broken(template: str, environment: Sandbox) -> str | None:
    """Why ``template`` cannot be compiled, with the line; None where it can."""
    try:
        environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except Exception as error:  # deep nesting and its like, in the parser, the optimizer or Python's compiler
        return f"{type(error).__name__}: {error}"
    return None


def _bounded(work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are bounded; those of Jinja's filters are all widths or counts."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_sizes((*args, *kwargs.values()))
        if work.__name__ == "do_format":
            _check_widths(str(args[0]), _WIDE)
        return work(*args, **kwargs)

    for mark in ("jinja_pass_arg",):  # which Jinja puts on filters that take its context
        if hasattr(work, mark):
            setattr(bounded, mark, getattr(work, mark))
    return bounded


def _check_sizes(given: tuple[Any, ...]) -> None:
    if any(isinstance(one, int) and abs(one) > MOST for one in given):
        raise SecurityError(f"a size above {MOST}")


def _check_widths(form: str, wide: re.Pattern[str]) -> None:
    if wide.search(form):
        raise SecurityError("a format with a width of its values', or of five digits and more")
