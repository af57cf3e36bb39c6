"""What a frozen teacher says of a row, kept: its last hidden states at the target positions.

The logits are those states times the unembedding, so nothing is lost, and a row takes V / d times less room than its
logits. States are found by what made them: the teacher, the precision, and the tokens and targets it read.
"""

import glob
import hashlib
import json
import os
import shutil
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError, StorageError
from .readers import Teacher, in_step
from .types import Example, as_teacher_reads
from .writing import replacing, write_text

Note = Callable[[str], None]


class Store(Protocol):
    """Keeps states by key, and may forget them."""

    def get(self, key: str) -> Tensor | None:
        """The states ``[n, d]``, on the CPU; None where they are not there."""
        ...

    def put(self, key: str, states: Tensor) -> None:
        """Keep ``states``; where there is no room, the ones used longest ago go."""
        ...


class Memory:
    """The states used last, up to ``limit`` bytes, in this process."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.held: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        """As in ``Store``."""
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    def put(self, key: str, states: Tensor) -> None:
        """As in ``Store``."""
        if key in self.held:
            return
        self.held[key] = states
        self.size += states.nbytes
        while self.size > self.limit:
            self.size -= self.held.popitem(last=False)[1].nbytes


class Disk:
    """A file of safetensors for each row, in ``root/teacher/``, shared by all runs and processes.

    A file appears under its name whole or not at all, and its checksum is looked at when it is read: what is torn,
    damaged or foreign is deleted, told by ``note``, and made again. ``limit`` bounds ``root`` in bytes, all teachers
    together. Where nothing can be written, as on a full disk, that is told once and the run goes on without.
    """

    def __init__(self, root: Path, teacher: str, limit: int, note: Note, about: dict[str, str | int] | None = None):
        self.root, self.folder, self.limit, self.note = root, root / teacher, limit, note
        self.writes = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            described = self.folder / ABOUT
            if not described.exists():
                write_text(described, json.dumps(about or {}))
            self.size = sum(entry.size for entry in evictable(root))
        except (OSError, StorageError) as error:
            raise StorageError(f"the teacher cache {root} cannot be used: {error}; set teacher.cache_folder") from error

    def get(self, key: str) -> Tensor | None:
        """As in ``Store``."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                states, said = file.get_tensor("states"), file.metadata() or {}
            if said != {"key": key, "crc32": _checksum(states)}:
                raise SafetensorError("its checksum is another one")
            if not states.is_floating_point():  # the type is not in the checksum
                raise SafetensorError(f"it holds {states.dtype}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            self.note(f"{path} is damaged and is made again ({error})")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # evicted meanwhile, or another user's
            os.utime(path)  # what is used is not what goes first
        return states

    def put(self, key: str, states: Tensor) -> None:
        """As in ``Store``."""
        path = self._path(key)
        if not self.writes or path.exists():
            return
        said = {"key": key, "crc32": _checksum(states)}
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as scratch:
                save_file({"states": states.contiguous()}, scratch, said)
        except (OSError, SafetensorError) as error:
            self.writes = False
            self.note(f"the teacher cache {self.root} takes nothing more ({error}); the run goes on without")
            return
        self.size += states.nbytes
        if self.size > self.limit:
            self.size = evict(self.root, self.limit * 9 // 10)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


ABOUT = "teacher.json"
HEAD = "head"
"""A folder beside a teacher's states: what a run needs where the teacher itself is not (``kept_teacher``)."""


class Entry(NamedTuple):
    """A file of the cache."""

    path: Path
    size: int
    used: float


def entries(root: Path, teacher: str | None = None) -> Iterator[Entry]:
    """The files of states in ``root``, those of one teacher or all."""
    for path in root.glob(f"{'*' if teacher is None else glob.escape(teacher)}/??/*.safetensors"):
        with suppress(FileNotFoundError):  # another process may evict
            found = path.stat()
            yield Entry(path, found.st_size, found.st_mtime)


def evictable(root: Path) -> Iterator[Entry]:
    """The files of states that may go: those of teachers that are at hand."""
    alone = {path.parent.parent for path in root.glob(f"*/{HEAD}/head.json")}
    return (entry for entry in entries(root) if entry.path.parent.parent not in alone)


def evict(root: Path, limit: int) -> int:
    """Delete what was used longest ago until ``root`` holds at most ``limit`` bytes; returns how many it holds.

    What runs without the teacher need stays, and does not count: nobody could make it again.
    """
    found = sorted(evictable(root), key=lambda entry: entry.used)
    size = sum(entry.size for entry in found)
    for entry in found:
        if size <= limit:
            break
        entry.path.unlink(missing_ok=True)
        size -= entry.size
    for scratch in root.glob("*/??/.*.partial"):  # of processes that were killed
        with suppress(FileNotFoundError):
            if time.time() - scratch.stat().st_mtime > 3600:
                scratch.unlink()
    return size


class Kept(NamedTuple):
    """What is kept of one teacher."""

    name: str
    teacher: str
    rows: int
    size: int
    used: float | None
    alone: bool
    """Whether runs can do without the teacher itself."""


def teachers(root: Path) -> list[Kept]:
    """What ``root`` holds, a teacher a row, the one used last first; empty where there is no such folder."""
    found: list[Kept] = []
    for described in root.glob(f"*/{ABOUT}"):
        try:
            about = json.loads(described.read_text(encoding="utf-8"))
            teacher = str(about["teacher"])
        except (OSError, ValueError, KeyError, TypeError):
            teacher = "?"  # of a process that was killed, or not ours
        files = list(entries(root, described.parent.name))
        used = max((entry.used for entry in files), default=None)
        size = sum(entry.size for entry in files)
        alone = (described.parent / HEAD / "head.json").exists()
        found.append(Kept(described.parent.name, teacher, len(files), size, used, alone))
    return sorted(found, key=lambda kept: kept.used or 0, reverse=True)


def clear(root: Path, name: str | None = None) -> int:
    """Delete the states of the teacher called ``name``, or all; returns the bytes.

    Raises:
        ConfigError: nothing is kept under that name.
        StorageError: a file could not be deleted.
    """
    found = teachers(root)
    chosen = [kept for kept in found if name in (None, kept.name)]
    if name is not None and not chosen:
        there = ", ".join(kept.name for kept in found) or "nothing"
        raise ConfigError(f"{root} keeps nothing of {name}; it keeps: {there}")
    try:
        for kept in chosen:  # only what is recognised as ours: the folder may be any that a user names
            for entry in entries(root, kept.name):
                entry.path.unlink(missing_ok=True)
            (root / kept.name / ABOUT).unlink(missing_ok=True)
            if kept.alone:
                shutil.rmtree(root / kept.name / HEAD)
            for folder in [*(root / kept.name).glob("??"), root / kept.name]:
                with suppress(OSError):  # not empty: what is not ours stays
                    folder.rmdir()
    except OSError as error:
        raise StorageError(f"could not clear {root}: {error}") from error
    return sum(kept.size for kept in chosen)


@dataclass
class TeacherCache:
    """Answers with kept states, and has the teacher read the rows that it has none of.

    ``teacher`` names the weights and all else that its states depend on. Rows are read ``batch_size`` at a time: with 1
    the states of a row do not depend on the rows beside it, not even in their last bit. ``lasting`` keeps those of the
    data's and the teacher's responses, ``replayed`` those of the student's; None keeps none. ``once`` holds the
    ``content`` of rows that are read but once, and so not kept.
    """

    teacher: str
    lasting: Store | None
    replayed: Store | None
    batch_size: int = 1
    once: frozenset[bytes] = frozenset()

    @property
    def kind(self) -> Literal["memory", "disk"]:
        """Where the states are that are read again."""
        return "disk" if isinstance(self.lasting, Disk) else "memory"

    def states(self, rows: Sequence[Example], teacher: Teacher) -> list[Tensor]:
        """The states of each row; ``teacher`` reads those that are not kept."""
        keys = [self._key(row) for row in rows]
        by_key = dict(zip(keys, rows, strict=True))
        stores = {key: self._store(row) for key, row in by_key.items()}
        found: dict[str, Tensor] = {}
        for key, store in stores.items():
            kept = None if store is None else store.get(key)
            if kept is not None:
                found[key] = kept
        missing = [key for key in by_key if key not in found]
        passing = [key for key in missing if stores[key] is None]
        staying = [key for key in missing if stores[key] is not None]
        parts = [staying[at : at + self.batch_size] for at in range(0, len(staying), self.batch_size)]
        parts = [*parts, passing] if passing else parts
        for part in in_step(teacher, parts, teacher.lend):
            for key, states in zip(part, teacher.states([by_key[key] for key in part]), strict=True):
                found[key] = states
                store = stores[key]
                # What is not finite ends a run; kept on disk it would end every run after it as well.
                if store is not None and bool(states.isfinite().all()):
                    store.put(key, states.cpu().clone())  # not a view of the whole batch
        return [found[key] for key in keys]

    def lacking(self, rows: Sequence[Example]) -> list[Example]:
        """Those of ``rows`` of which nothing is kept."""
        return [row for row in rows if (store := self._store(row)) is None or store.get(self._key(row)) is None]

    def _store(self, row: Example) -> Store | None:
        if row.origin == "student":
            return self.replayed
        return None if self.once and content(row) in self.once else self.lasting

    def _key(self, row: Example) -> str:
        row = as_teacher_reads(row)
        digest = hashlib.sha256(f"{self.teacher}/{_precision()}/{len(row.tokens)}/".encode())
        digest.update(array("q", row.tokens).tobytes() + bytes(row.targets))
        return digest.hexdigest()


def content(row: Example) -> bytes:
    """What tells rows apart: files of two data sets may have one name, and their rows the same ids."""
    return hashlib.sha256(row.id.encode() + array("q", row.tokens).tobytes()).digest()


def _precision() -> str:
    """The types that autocast computes in here; states of one are not those of another."""
    return ",".join(
        f"{device}:{torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )


def _checksum(states: Tensor) -> str:
    return f"{zlib.crc32(states.contiguous().view(torch.uint8).numpy().data):08x}"
