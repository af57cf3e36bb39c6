"""Files that are there whole or not at all; imports nothing heavy, so that quick commands may write too."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A scratch file that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one stroke.

    Raises:
        StorageError: writing failed, as on a full disk; what stood at ``path`` before is untouched.
    """
    try:
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
            flush(scratch)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error}. Nothing that was saved before is lost.") from error


def make_folder_of(path: Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        StorageError: the folder of ``path`` cannot be made, or ``path`` is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"could not make the folder {path.parent}: {error.strerror}") from error
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give the name of a file")


def write_anew(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all, in a folder that is made if need be.

    Raises:
        StorageError: the folder cannot be made, ``path`` is a folder, or writing failed.
    """
    make_folder_of(path)
    write_text(path, text)


def flush(path: Path) -> None:
    """Ask the system to put ``path`` on the disk, so that a power cut after the rename cannot empty it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
