"""`make faults`: every fault as often as it is worth, and the table in docs/reliability.md written anew.

Names of classes of faults as arguments try those alone, and write nothing.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers

import conftest  # noqa: F401  # the settings of all tests: one thread, no network
from distillm import __version__
from faults import damage, disks, kills, not_finite, ranks, servers
from faults.outcomes import IMPOSSIBLE, LOST, Ledger

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- begin: written by make faults -->", "<!-- end: written by make faults -->"
REAL_KILLS = 3

Try = Callable[[Ledger, Path, int], None]
CLASSES: dict[str, Try] = {
    "kills": lambda ledger, folder, seed: kills.kill(ledger, folder, kills.FULL, seed),
    "processes": lambda ledger, folder, seed: kills.kill_real(ledger, folder, REAL_KILLS, seed),
    "disks": lambda ledger, folder, seed: disks.spoil_disks(ledger, folder, disks.FULL, disks.HARMED, seed),
    "damage": lambda ledger, folder, _: damage.damage(ledger, folder, damage.FULL),
    "numbers": lambda ledger, folder, seed: not_finite.spoil_numbers(ledger, folder, not_finite.FULL, seed),
    "ranks": lambda ledger, folder, seed: ranks.disturb(ledger, folder, ranks.FULL, seed),
    "servers": lambda ledger, folder, seed: servers.trouble(ledger, folder, servers.FULL, seed),
}


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def summary(ledger: Ledger, seed: int, seconds: float) -> str:
    """What stands in the document: when and with what, the counts, and what could not be tried."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    versions = f"distillm {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    parts = [
        f"Made on {date.today().isoformat()} with {versions}, transformers {transformers.__version__}; {machine}; "
        f"seed {seed}; {seconds / 60:.0f} minutes.",
        f"**{ledger.tried} faults, {ledger.of([LOST])} losses**, {ledger.of([IMPOSSIBLE])} not possible there.",
        ledger.table(),
    ]
    parts += [f"Not possible there: {reason}." for reason in sorted(ledger.reasons)]
    return "\n\n".join(parts)


def write(text: str) -> None:
    """Put ``text`` between the two marks of the document."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=", ".join(CLASSES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    unknown = set(given.classes) - set(CLASSES)
    if unknown:
        parser.error(f"there is no class {', '.join(sorted(unknown))}; there are {', '.join(CLASSES)}")
    ledger, began = Ledger(say), time.monotonic()
    for name in given.classes or CLASSES:
        at, tried = time.monotonic(), ledger.tried
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            CLASSES[name](ledger, Path(folder), given.seed)
        took = time.monotonic() - at
        say(f"{name}: {ledger.tried - tried} faults in {took:.0f} s, {len(ledger.losses)} losses so far")
    text = summary(ledger, given.seed, time.monotonic() - began)
    say(text)
    if not given.classes:
        write(text)
    return 1 if ledger.losses else 0


if __name__ == "__main__":
    sys.exit(main())
