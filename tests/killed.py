"""A process that sends itself a signal at a chosen file operation, so that a kill hits the moment it is meant for."""

import os
import re
import runpy
import signal
import sys
from typing import Any

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


def arm(number: int, pattern: str, count: int) -> None:
    """Send ``number`` at the ``count``-th file operation for which ``pattern`` is in "operation path"."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and isinstance(arguments[0], str | os.PathLike):
            seen += re.search(pattern, f"{event} {os.fspath(arguments[0])}") is not None
            if seen == count:
                seen += 1
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def die_at(count: int, settings: dict[str, Any]) -> None:
    """A run that is killed at its ``count``-th file operation, removals through a folder's descriptor included."""
    import torch

    from distillm.config import make_run
    from distillm.pipeline import distill

    torch.set_num_threads(1)
    arm(signal.SIGKILL, rf"^\S+ {re.escape(settings['output'])}|^os\.(remove|rmdir) [^/]", count)
    distill(make_run(settings))


if __name__ == "__main__":  # killed.py SIGNAL PATTERN COUNT ARGUMENTS-OF-DISTILLM...
    arm(getattr(signal, sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.argv[1:4] = []
    runpy.run_module("distillm", run_name="__main__", alter_sys=True)
