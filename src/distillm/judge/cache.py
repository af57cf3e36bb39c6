"""What the judge has answered, kept on disk line by line, so that nothing is paid for twice."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import StorageError
from ..writing import make_folder_of

FORMAT = 1
"""Part of every key: a change in how requests are made begins a new cache."""


@dataclass(frozen=True)
class Reply:
    """What the judge wrote. ``cut`` says that it was stopped by length; tokens are None where the server gives none."""

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def key_of(body: Mapping[str, Any]) -> str:
    """The SHA-256 of a request's body (model, messages, decoding); the server and its key are no part of it."""
    text = json.dumps([FORMAT, body], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_FIELDS = ("key", "text", "cut", "prompt_tokens", "completion_tokens")


class Cache:
    """Replies by key, in memory and in a JSON Lines file, to which each is appended and flushed as it comes.

    A line that a kill has torn is passed over. Two processes may append to the same file.
    """

    def __init__(self, path: Path, note: Callable[[str], None]):
        self.path = path
        self._replies: dict[str, Reply] = {}
        make_folder_of(path)
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
            self._file = path.open("ab")
        except OSError as error:
            raise StorageError(f"{path} cannot be used as a cache: {error.strerror}") from error
        unread = [line for line in lines if line.strip() and not self._take(line)]
        if lines[-1]:
            self._write(b"\n")  # what a kill has torn stays a line of its own
        if unread:
            note(f"{path}: {len(unread)} line(s) could not be read, as a kill may leave them; those are asked again")

    def _take(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            key, text, cut, *tokens = (entry[name] for name in _FIELDS)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(cut, bool)):
            return False
        if not all(isinstance(count, int | None) for count in tokens):
            return False
        self._replies[key] = Reply(text, cut, *tokens)
        return True

    def get(self, key: str) -> Reply | None:
        """The reply to the request of ``key``, if there was one."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep ``reply``; when this returns, a kill of the process no longer loses it.

        Raises:
            StorageError: the disk is full, or the file was taken away.
        """
        self._write(json.dumps({"key": key} | asdict(reply)).encode() + b"\n")
        self._replies[key] = reply

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise StorageError(f"could not write {self.path}: {error.strerror}. What is in it stays usable.") from error

    def __len__(self) -> int:
        return len(self._replies)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # the same full disk that was reported when the line was written
            self._file.close()
