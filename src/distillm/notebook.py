"""What a notebook shows of an object: a small table of facts, in which nothing comes alive."""

import html
from collections.abc import Sequence

from .screen import visible


def facts_table(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """``facts``, a name and a value in each row, as HTML."""
    rows = "".join(
        f'<tr><th style="text-align: left">{_text(name)}</th><td style="text-align: left">{_text(value)}</td></tr>'
        for name, value in facts
    )
    return f"<table><caption>{_text(title)}</caption><tbody>{rows}</tbody></table>"


def facts_lines(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The same for a terminal: a line for each."""
    return "\n".join([visible(title), *(f"  {visible(name)}: {visible(value)}" for name, value in facts)])


def _text(value: str) -> str:
    return html.escape(visible(value))
