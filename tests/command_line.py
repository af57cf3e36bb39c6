"""``distillm`` called in this process: its exit code and what it said."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from distillm import cli


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


def distillm(*arguments: object) -> Said:
    """Run ``distillm ARGUMENTS`` through its entry point; an exception that escapes is a defect, and escapes here."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["distillm", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    """The output of a command that must end well."""
    said = distillm(*arguments)
    assert said.code == 0, said.err
    return said.out


def refused(*arguments: object, code: int = 2) -> str:
    """The message of a command that must be refused, in at most a screen and without a traceback."""
    said = distillm(*arguments)
    assert said.code == code, (said.code, said.err)
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) <= 24, said.err
    assert all(len(line) < 500 for line in said.err.splitlines()), said.err
    return said.err
