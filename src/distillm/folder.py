"""The run folder: what a run writes while it goes on. See docs/architecture.md for the format of each file."""

import json
import shutil
from pathlib import Path
from typing import Any

from .checkpoint import list_checkpoints, write_text
from .errors import ConfigError, StorageError


class RunFolder:
    """A run's files. Lines are flushed as they are written; everything else is replaced in one stroke."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"

    def open(self, *, resume: bool, overwrite: bool) -> Path | None:
        """Make the folder, or go on in it; the checkpoint to resume from, if there is one.

        Raises:
            ConfigError: there is a run in it already, and neither ``resume`` nor ``overwrite`` is given.
            StorageError: the folder cannot be made.
        """
        occupied = (self.path / "run.yaml").exists() or (self.path / "metrics.jsonl").exists()
        if occupied and not resume:
            if not overwrite:
                raise ConfigError(
                    f"{self.path} already holds a run. Go on with it by resume=auto, delete it by overwrite=true, "
                    "or choose another folder by output=..."
                )
            for name in ("run.yaml", "metrics.jsonl", "samples.jsonl", "responses.jsonl", "report.html"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("eval", "checkpoints", "student"):
                shutil.rmtree(self.path / name, ignore_errors=True)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "eval").mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"could not make the run folder {self.path}: {error}") from error
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add one line to ``metrics.jsonl`` or ``samples.jsonl``."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"could not write {self.path / name}: {error}. The checkpoints are whole.") from error

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will make again, and a torn last line."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [
                    line
                    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")
                    if _step(line) <= step
                ]
                write_text(path, "".join(line + "\n" for line in kept))

    def retain(self, keep: int, best: int | None) -> None:
        """Delete all checkpoints but the ``keep`` newest and the best."""
        for checkpoint in list_checkpoints(self.checkpoints)[:-keep]:
            if best is None or checkpoint.name != f"step-{best:08d}":
                shutil.rmtree(checkpoint)

    def write_eval(self, name: str, result: dict[str, Any]) -> None:
        """Write ``eval/NAME.json``."""
        write_text(self.path / "eval" / f"{name}.json", json.dumps(result, ensure_ascii=False, indent=1))

    def forget_eval(self, system: str) -> None:
        """Drop the scores of a system that is about to change."""
        for path in (self.path / "eval").glob(f"*-{system}.json"):
            path.unlink()

    def has_eval(self, name: str) -> bool:
        """Whether ``eval/NAME.json`` is there already."""
        return (self.path / "eval" / f"{name}.json").exists()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
