"""Text on its way to a terminal: what came from files, models and servers cannot steer it, and fits a screen."""

import re

LINES, WIDTH = 24, 400
"""Most lines of a message, and most characters of one of them."""
_ENDING = 120  # characters kept of the end of a line that is cut: the reason often stands there
# Control characters but tab and line feed, marks that turn the direction of writing, and halves of characters.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CREDENTIALS = re.compile(r"(\w:/{1,2})[^\s/@'\"]+@")  # pathlib takes // for /


def visible(text: str) -> str:
    r"""``text`` with every character that steers a terminal written out, such as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def without_credentials(text: str) -> str:
    """``text`` in which addresses have no user and password."""
    return _CREDENTIALS.sub(r"\1...@", text)


def on_screen(text: str) -> str:
    """``text`` as a message may be: visible, without credentials, of at most ``LINES`` lines of ``WIDTH`` each."""
    lines = [_cut(visible(line)) for line in without_credentials(text.replace("\r\n", "\n")).split("\n")]
    if len(lines) > LINES:
        left_out = len(lines) - LINES + 1
        lines = [*lines[: LINES - 2], f"... {left_out} lines are left out ...", lines[-1]]
    return "\n".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - _ENDING - 5]} ... {line[-_ENDING:]}"
