"""The run folder: what a run writes while it goes on. See docs/architecture.md for the format of each file."""

import json
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import DAMAGED, list_checkpoints, newest_whole, remove, sweep
from .errors import ConfigError, StorageError
from .paths import is_dir, is_file
from .processes import by_first, first_alone, writes
from .writing import write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKENS = "tokens.jsonl"


class RunFolder:
    """A run's files. Lines are flushed as they are written; everything else is replaced in one stroke.

    Of several processes the first one alone writes and deletes; all may read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"
        self.condemned = False
        self.damaged: list[str] = []

    @contextmanager
    def held(self) -> Generator[None]:
        """No other run works in the folder meanwhile, where the system has such locks.

        Raises:
            ConfigError: another one does.
            StorageError: the folder cannot be made.
        """
        lock = by_first(lambda: _locked(self.path))
        try:
            yield
        finally:
            if lock is not None and writes():
                os.close(lock)

    def open(self, *, resume: bool, overwrite: bool) -> Path | None:
        """Make the folder, or go on in it; the newest whole checkpoint to resume from, if there is one.

        What is wrong with newer ones is left in ``damaged``.

        Raises:
            ConfigError: there is a run in it already, and neither ``resume`` nor ``overwrite`` is given; or there is a
                ``student`` in it that no run wrote; or one without a checkpoint to resume from.
            StorageError: the folder cannot be made; or there are checkpoints to resume from, and none of them is whole.
        """
        found, self.damaged, self.condemned = by_first(lambda: self._open(resume=resume, overwrite=overwrite))
        return found

    def _open(self, *, resume: bool, overwrite: bool) -> tuple[Path | None, list[str], bool]:
        occupied = any(is_file(self.path / name) for name in ("run.yaml", "metrics.jsonl"))
        occupied = occupied or bool(list_checkpoints(self.checkpoints))
        if is_dir(self.student) and not occupied:
            raise ConfigError(f"{self.student} is there already, and no run wrote it; choose another output=...")
        if occupied and not (resume or overwrite):
            raise ConfigError(
                f"{self.path} already holds a run. Go on with it by resume=auto, delete it by overwrite=true, "
                "or choose another folder by output=..."
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                sweep(folder)
            (self.path / "eval").mkdir(exist_ok=True)
            sweep(self.path / "eval")
            found, damaged = newest_whole(self.checkpoints) if resume else (None, [])
        except OSError as error:
            raise StorageError(f"could not make the run folder {self.path}: {error}") from error
        if found is None and not (damaged or overwrite) and is_dir(self.student):
            raise ConfigError(
                f"{self.path} holds a finished student, and no checkpoint to go on from: they were deleted. Score it "
                "by `distillm eval`, begin anew by overwrite=true, or choose another folder by output=..."
            )
        if damaged and found is None:
            way = "overwrite=true" if is_dir(self.student) else "the same command"
            said = "\n".join(damaged)
            raise StorageError(f"{said}\nNo whole checkpoint is left: {way} begins the run anew.")
        return found, damaged, occupied and overwrite and found is None

    def clear(self) -> None:
        """Delete the run that is to be overwritten: only once the new one has been found fit to start.

        All processes wait for it, so that none reads what is to go.
        """
        if self.condemned:
            by_first(self._clear)
            self.condemned = False

    def _clear(self) -> None:
        with _changing(self.path):
            shutil.rmtree(self.student, ignore_errors=True)  # first: without checkpoints it would pass for finished
            for checkpoint in list_checkpoints(self.checkpoints):
                remove(checkpoint)
            for path in self.checkpoints.glob(f"{DAMAGED}*"):
                shutil.rmtree(path)
            for name in ("eval", "distillm"):  # distillm: what a tracker wrote
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("samples.jsonl", TOKENS, "responses.jsonl", "report.html", "metrics.jsonl", "run.yaml"):
                (self.path / name).unlink(missing_ok=True)
            (self.path / "eval").mkdir()

    @first_alone
    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add one line to ``metrics.jsonl`` or ``samples.jsonl``."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"could not write {self.path / name}: {error}. The checkpoints are whole.") from error

    @first_alone
    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will make again, and a torn last line.

        How many of the steps before have no line any more, which no kill brings about, is left in ``damaged``.
        """
        logged: set[float] = set()
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                with _changing(path):
                    text = path.read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.split("\n") if _step(line) <= step]
                logged |= {_step(line, "step") for line in kept}
                write_text(path, "".join(line + "\n" for line in kept))
        missing = sum(number not in logged for number in range(1, step + 1))
        if missing:
            self.damaged.append(
                f"metrics.jsonl lacks {missing} of the {step} steps that were made: it was damaged or deleted. The "
                "student is not affected."
            )

    @first_alone
    def retain(self, keep: int, best: int | None) -> None:
        """Delete all checkpoints but the ``keep`` newest and the best."""
        with _changing(self.checkpoints):
            for checkpoint in list_checkpoints(self.checkpoints)[:-keep]:
                if best is None or checkpoint.name != f"step-{best:08d}":
                    remove(checkpoint)

    @first_alone
    def write_eval(self, name: str, result: dict[str, Any]) -> None:
        """Write ``eval/NAME.json``."""
        write_text(self.path / "eval" / f"{name}.json", json.dumps(result, ensure_ascii=False, indent=1))

    @first_alone
    def forget_eval(self, *, data: str = "", system: str = "") -> None:
        """Drop the scores on ``data``, or of ``system``, because they are about to change; all without either.

        With scores of the student goes what was found of its answers token by token.
        """
        if system in ("", "student") and is_file(self.path / TOKENS):
            with _changing(self.path / TOKENS):
                (self.path / TOKENS).unlink()
        for path in (self.path / "eval").glob("*.json"):
            # Exactly: the name of another data set may begin with this one's.
            of_data, _, of_system = path.stem.rpartition("-")
            if data in ("", of_data) and system in ("", of_system):
                with _changing(path):
                    path.unlink()

    @first_alone
    def write_tokens(self, records: Sequence[dict[str, Any]]) -> None:
        """Write ``tokens.jsonl``: one of ``records`` a line."""
        write_text(self.path / TOKENS, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))

    def has_tokens(self) -> bool:
        """Whether ``tokens.jsonl`` is there already, for all processes alike."""
        return by_first(lambda: is_file(self.path / TOKENS))

    def has_eval(self, name: str) -> bool:
        """Whether ``eval/NAME.json`` is there already and can be read, for all processes alike."""
        return by_first(lambda: _holds_scores(self.path / "eval" / f"{name}.json"))


def _locked(folder: Path) -> int | None:
    """A descriptor that keeps others out until it is closed, by whatever ends the process; None without locks."""
    if fcntl is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"could not make the run folder {folder}: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another process is at work in {folder}: wait for it, or stop it") from None
    except OSError:  # some network file systems have none
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _changing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"could not change {path}: {error}. The checkpoints are whole.") from error


def _holds_scores(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found["scores"], dict) and isinstance(found["predictions"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _step(line: str, kind: str | None = None) -> float:
    """The step that a line is of, if it is of ``kind``; infinity for what cannot be read."""
    try:
        entry = json.loads(line)
        return float(entry["step"]) if kind in (None, entry.get("kind")) else 0.0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return float("inf")
