"""``distillm`` as processes that can be killed, each forked from one that has imported everything already."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import killed

PATIENCE = 240.0
"""Seconds after which a process that should have ended is held to hang."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, -9 after SIGKILL, and all that it said."""

    code: int
    said: str
    seconds: float

    def well(self) -> "Ended":
        """The same, if it ended well; an AssertionError otherwise."""
        assert self.code == 0, (self.code, self.said[-2000:])
        return self

    def refused(self, *codes: int) -> "Ended":
        """The same, if it ended with one of ``codes``, an error in words and no traceback."""
        assert self.code in codes, (self.code, self.said[-2000:])
        assert "Traceback" not in self.said, self.said[-2000:]
        assert "error: " in self.said or "process 1: " in self.said, self.said[-2000:]
        return self


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "distillm.cli", "distillm.pipeline", "distillm.commands", "killed"])
    return context


def command(log: Path, prepare: "Sequence[Callable[[], None]]", arguments: Sequence[str]) -> None:
    """The body of a child: ``distillm ARGUMENTS``, with what it says in ``log``."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from distillm import cli

    torch.set_num_threads(1)
    for act in prepare:
        act()
    sys.argv = ["distillm", *arguments]
    cli.main()


class Child:
    """A command that is running."""

    def __init__(self, log: Path, *arguments: object, prepare: Sequence[Callable[[], None]] = ()):
        self.log, self.began = log, time.monotonic()
        given = (log, prepare, [str(argument) for argument in arguments])
        self.process = _context().Process(target=command, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill_after(self, seconds: float) -> Ended:
        """Let it run for ``seconds``, then SIGKILL, unless it has ended by itself."""
        self.process.join(seconds)
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Until it has ended; one that hangs is killed, and is an AssertionError."""
        self.process.join(patience)
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"still running after {patience:.0f} seconds: {self.log.read_text()[-1000:]}")
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, said, time.monotonic() - self.began)


def distillm(log: Path, *arguments: object, prepare: Sequence[Callable[[], None]] = ()) -> Ended:
    """Run ``distillm ARGUMENTS`` to its end, whatever that is."""
    return Child(log, *arguments, prepare=prepare).wait()


def on(folders: Sequence[Path]) -> str:
    """The pattern of file operations below ``folders``, removals through a folder's descriptor included."""
    return "|".join([*(rf"^\S+ {re.escape(str(folder))}" for folder in folders), r"^os\.(remove|rmdir) [^/]"])


@dataclass(frozen=True)
class DieAt:
    """Kills its own process at the ``count``-th file operation that ``pattern`` fits."""

    pattern: str
    count: int

    def __call__(self) -> None:
        killed.arm(signal.SIGKILL, self.pattern, self.count)


@dataclass(frozen=True)
class Count:
    """Writes to ``path`` how many file operations ``pattern`` has fitted, each time one does."""

    pattern: str
    path: Path

    def __call__(self) -> None:
        seen, told = 0, os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            known = event in killed.OPERATIONS and isinstance(arguments[0], str | os.PathLike)
            if known and re.search(self.pattern, f"{event} {os.fspath(arguments[0])}"):
                seen += 1
                os.pwrite(told, json.dumps(seen).encode(), 0)

        sys.addaudithook(hook)
