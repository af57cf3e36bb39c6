"""Questions about paths that users name, which may be no paths at all: too long, with a NUL, of a user that is none."""

from pathlib import Path

FILE_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
"""What a name must be that becomes part of a file's: no way out of its folder, no option, none too long."""


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether there is such a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there: whose disk it would lie on."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def home(path: str | Path) -> Path:
    """``path`` with ~ as the user's home; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
