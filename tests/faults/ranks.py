"""One of two processes of a run killed, or stopped so that it says nothing any more."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from distillm.errors import ProcessError
from faults.children import Child, Ended
from faults.kills import assert_saved
from faults.outcomes import ERROR_THEN_SAME, SAME, Ledger, Outcome
from tiny_run import assert_same_run, materials, settings

SHORT = {"kill": 1, "hang": 0, "torchrun": 0}
FULL = {"kill": 10, "hang": 8, "torchrun": 2}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
HANG_SECONDS = 6.0
GRACE = 40.0
"""Seconds that torchrun gives a process between SIGTERM and SIGKILL, and some."""


@dataclass(frozen=True)
class As:
    """Makes its process the one of two with this number, as a launcher would."""

    number: int
    port: int

    def __call__(self) -> None:
        told = {"RANK": self.number, "LOCAL_RANK": self.number, "WORLD_SIZE": 2, "MASTER_PORT": self.port}
        os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pair:
    """A command that two processes share."""

    def __init__(self, folder: Path, wanted: Path):
        port = free_port()
        self.both = [
            Child(folder / f"log-{number}", "train", wanted, "resume=auto", prepare=[As(number, port)])
            for number in (0, 1)
        ]

    def finished(self) -> None:
        for child in self.both:
            child.wait().well()


@dataclass
class Bench:
    """The run of two processes that nothing disturbed, and how long it takes from its first line on."""

    folder: Path
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.made = materials(self.folder / "made")
        self.whole = self.folder / "whole"
        pair = Pair(self.folder, self.wanted(self.whole))
        began = until_begun(self.whole / "run", pair.both[0])
        pair.finished()
        self.seconds = time.monotonic() - began

    def wanted(self, folder: Path, minutes: float = 2.0) -> Path:
        """The settings of a run in ``folder``, written down."""
        folder.mkdir(parents=True)
        found: dict[str, Any] = settings(self.made, folder / "run", {"train.timeout_minutes": minutes})
        (folder / "wanted.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
        return folder / "wanted.yaml"

    def finished(self, folder: Path) -> Outcome:
        """What was saved is there, and the same command makes the same run of it."""
        assert_saved(folder / "run", self.whole / "run")
        Pair(folder, folder / "wanted.yaml").finished()
        assert_same_run(folder / "run", self.whole / "run")
        return ERROR_THEN_SAME


def until_begun(run: Path, first: Child) -> float:
    """Wait for the first line of the log; when that was."""
    while not (run / "metrics.jsonl").exists():
        assert first.process.is_alive(), first.wait().said
        time.sleep(0.005)
    return time.monotonic()


def disturbed(bench: Bench, folder: Path, by: int, draw: random.Random) -> Outcome:
    """SIGKILL or SIGSTOP for one of the two; the other must end by itself, in time, with an error in words."""
    wanted = bench.wanted(folder, HANG_SECONDS / 60 if by == signal.SIGSTOP else 2.0)
    pair, chosen = Pair(folder, wanted), draw.choice([0, 1])
    until_begun(folder / "run", pair.both[0])
    time.sleep(draw.uniform(0, 0.6 * bench.seconds))
    with suppress(ProcessLookupError):  # it has ended, and nothing is disturbed
        os.kill(pair.both[chosen].pid, by)
    try:
        ended: Ended = pair.both[1 - chosen].wait(2 * HANG_SECONDS + 10)
    finally:
        pair.both[chosen].process.kill()  # one that is stopped would never end
        pair.both[chosen].process.join()
    if ended.code != 0:  # the last thing that is waited for comes before the end
        ended.refused(ProcessError.exit_code)
        assert "resume=auto" in ended.said or chosen == 0
    outcome = bench.finished(folder)
    return SAME if ended.code == 0 else outcome


def launched(bench: Bench, folder: Path, by: int) -> Outcome:
    """The same below torchrun, which has to end the other one and itself."""
    wanted = bench.wanted(folder, HANG_SECONDS / 60)
    command = [*TORCHRUN, "-m", "distillm", "train", str(wanted), "resume=auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as launcher:
        while not list((folder / "run" / "checkpoints").glob("step-*")):
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            time.sleep(0.01)
        workers = [each for each in psutil.Process(launcher.pid).children() if each.environ().get("RANK") == "1"]
        os.kill(workers[0].pid, by)
        try:
            _, said = launcher.communicate(timeout=HANG_SECONDS + GRACE)
        except subprocess.TimeoutExpired:
            for each in [*workers, launcher]:  # what hangs must not outlive the case
                each.kill()
            raise
    assert launcher.returncode != 0, said
    assert b"another process of this run ended" in said, said[-3000:]
    assert_saved(folder / "run", bench.whole / "run")
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert told.returncode == 0, told.stderr
    assert_same_run(folder / "run", bench.whole / "run")
    return ERROR_THEN_SAME


def disturb(ledger: Ledger, folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Disturb one of two processes as often as ``counts`` says."""
    bench = Bench(folder)
    kinds = {"kill": ("killed", signal.SIGKILL), "hang": ("stopped, so that it hangs", signal.SIGSTOP)}
    for name, (what, by) in kinds.items():
        for number in range(counts[name]):
            draw = random.Random(f"{seed}/{name}/{number}")
            place = folder / f"{name}-{number}"
            ledger.case(
                f"one of two processes {what}",
                lambda place=place, by=by, draw=draw: disturbed(bench, place, by, draw),
                f"seed {seed}, case {number}",
            )
    for number in range(counts["torchrun"]):
        what, by = list(kinds.values())[number % 2]
        place = folder / f"torchrun-{number}"
        ledger.case(f"one of two processes of torchrun {what}", lambda place=place, by=by: launched(bench, place, by))
