"""Disks that are full or read-only: small file systems, and a limit on the size of files where none may be mounted."""

import random
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distillm.errors import StorageError
from faults.children import Child, Ended, distillm
from faults.kills import Work, works
from faults.outcomes import ERROR_THEN_SAME, SAME, WITHOUT, ImpossibleHereError, Ledger, Outcome
from tiny_run import materials

SHORT = {"full": 1, "limit": 1, "read-only": 0}
FULL = {"full": 16, "limit": 8, "read-only": 6}
HARMED = [
    "training",
    "filling the cache",
    "training with a cache on disk",
    "generating the teacher's responses",
    "scoring by distillm eval",
]
CACHED = "training with a cache on disk"
"""Here the cache alone is on the small disk: the run must be able to go on without it."""
SHORT_HARMED = ["training"]
SIZE = 32 * 2**20
FILES = {
    r"step-\d+": "a checkpoint",
    r"metrics\.jsonl|samples\.jsonl": "the log",
    r"/student": "the student",
    r"report\.html": "the report",
    r"responses\.jsonl": "responses",
    r"eval/|scores\.json": "scores",
    r"cache": "the cache",
    r"run\.yaml": "the settings",
}


def disk_of(work: Work, folder: Path) -> Path:
    """Which part of ``folder`` is on the small disk."""
    return folder / "cache" if work.fault == CACHED else folder


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at ``folder``."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ImpossibleHereError(f"there is no mount command ({error.strerror})") from error
    if mounted.returncode:
        raise ImpossibleHereError("mounting a file system is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, how: str) -> bool:
    """Make ``folder`` ro or rw; it is refused while a file there is being written."""
    command = ["mount", "-o", f"remount,{how}", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(folder: Path, room: int) -> Path:
    """A file that leaves ``room`` bytes of the file system at ``folder``."""
    ballast = folder / "ballast"
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())
    with ballast.open("wb") as file:
        left = SIZE - used - room
        while left > 0:
            left -= file.write(bytes(min(left, 2**20)))
    return ballast


def needed(folder: Path) -> int:
    """Bytes that the finished work takes on a disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def finished(work: Work, folder: Path, log: Path, ended: Ended) -> Outcome | tuple[Outcome, str]:
    """How the harmed command ended, what it left, and what the same command makes of that on a sound disk."""
    told = ended.said.count("takes nothing more")
    if ended.code != 0:
        ended.refused(StorageError.exit_code)
    assert told <= 1, ended.said
    assert not (told and "rows are kept" in ended.said), "it says that all is kept, which is not"
    work.kept(folder, work.whole)
    distillm(log, *work.arguments(folder)).well()
    work.same(folder, work.whole)
    if ended.code == 0:
        return WITHOUT if told else SAME
    said = ended.said.rpartition("\nerror: ")[2]
    hit = next((name for pattern, name in FILES.items() if re.search(pattern, said)), "")
    return ERROR_THEN_SAME, hit


def full(work: Work, folder: Path, draw: random.Random) -> Outcome | tuple[Outcome, str]:
    """The disk is full at some moment, and the same command is given again when there is room."""
    log = folder.with_suffix(".log")
    disk = disk_of(work, folder)
    with small_disk(disk):
        arguments = work.arguments(folder)
        # The report is larger than everything before it: most disks are full before that, some as the log begins.
        shares = [1.1] if work.fault == CACHED else [0.003, 0.15, 1.1]
        ballast = fill(disk, int(draw.uniform(0, draw.choice(shares)) * needed(disk_of(work, work.whole))))
        ended = distillm(log, *arguments)
        ballast.unlink()
        return finished(work, folder, log, ended)


def read_only(work: Work, folder: Path, draw: random.Random) -> Outcome | tuple[Outcome, str]:
    """The file system becomes read-only at some moment, as one with errors does."""
    log = folder.with_suffix(".log")
    disk = disk_of(work, folder)
    with small_disk(disk):
        child = Child(log, *work.arguments(folder))
        child.process.join(draw.uniform(0.05, 0.75 * work.seconds))  # the last part is the report
        while child.process.is_alive() and not remount(disk, "ro"):
            time.sleep(0.001)
        ended = child.wait()
        assert remount(disk, "rw")
        return finished(work, folder, log, ended)


@dataclass(frozen=True)
class Limit:
    """No file of the process may grow beyond ``size`` bytes."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def limited(work: Work, folder: Path, draw: random.Random) -> Outcome | tuple[Outcome, str]:
    """Files cannot grow beyond a size, as under a quota."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    sizes = [path.stat().st_size for path in work.whole.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    limit = draw.choice(sizes) - draw.choice([1, 200])
    ended = distillm(log, *work.arguments(folder), prepare=[Limit(limit)])
    return finished(work, folder, log, ended)


def spoil_disks(ledger: Ledger, folder: Path, counts: dict[str, int], harmed: list[str], seed: int = 0) -> None:
    """Each kind of work in ``harmed`` on each kind of disk."""
    made = materials(folder / "made")
    kinds = {"full": ("a full disk", full), "limit": ("a limit on files", limited)}
    kinds |= {"read-only": ("a disk that becomes read-only", read_only)}
    for number, work in enumerate(each for each in works(made) if each.fault in harmed):
        work.prepare(folder / f"work-{number}")
        for name, (fault, act) in kinds.items():
            for count in range(counts[name]):
                draw = random.Random(f"{seed}/{name}/{work.fault}/{count}")
                place = folder / f"work-{number}" / f"{name}-{count}"
                ledger.case(
                    f"{fault} while {work.fault}",
                    lambda work=work, act=act, place=place, draw=draw: act(work, place, draw),
                    f"seed {seed}, case {count}",
                )
