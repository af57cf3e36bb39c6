"""The teacher's responses: written once, kept as a file that can be read and reused."""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .errors import DataError, StorageError
from .generation import Sampling
from .processes import by_first, first_alone, together, writes
from .types import Example, answer, last_turn
from .writing import write_text

Write = Callable[[Sequence[Example], Callable[[list[Example]], None]], list[Example]]
"""Answers prompts; what it wants kept before all are answered it gives to its second argument."""


class Responses:
    """Answers prompts from ``path``, a JSON Lines file, and has those that are not in it written and added.

    The first line says who wrote the file and how (``weights`` is ``models.fingerprint`` of the teacher); each other
    one is a prompt's digest, the response as text, its tokens, and a checksum of prompt and tokens. Rows are added in
    portions, so that interrupted work goes on where it stopped; damaged ones are told by ``note`` and written again. Of
    several processes the first one alone writes the file.

    Raises:
        DataError: the file is of another teacher, or of other decoding settings.
    """

    def __init__(
        self,
        path: Path,
        teacher: str,
        weights: str,
        sampling: Sampling,
        write: Write,
        decode: Callable[[list[int]], str],
        portion: int,
        seed: int = 0,
        note: Callable[[str], None] = lambda _: None,
    ):
        self.path, self.write, self.decode, self.portion, self.note = path, write, decode, portion, note
        self.header: dict[str, Any] = {"teacher": teacher, "weights": weights, "decoding": asdict(sampling)}
        if sampling.temperature > 0:
            self.header["seed"] = seed
        self.known = by_first(self._read)  # the same for all processes, while one of them is writing already

    def __call__(self, prompts: Sequence[Example]) -> list[Example]:
        """``prompts`` with the teacher's responses, in order."""
        first = {_digest(p): p for p in reversed(prompts)}  # a prompt that comes twice is answered once
        missing = [first[d] for d in dict.fromkeys(map(_digest, prompts)) if d not in self.known]
        for at in range(0, len(missing), self.portion):
            written = self.write(missing[at : at + self.portion], self._keep)
            together(partial(self._keep, written))
        return [answer(p, self.known[_digest(p)], "teacher") for p in prompts]

    def _keep(self, written: list[Example]) -> None:
        fresh = [e for e in written if _digest(e) not in self.known]
        self._append(
            [
                {
                    "id": e.id,
                    "prompt": _digest(e),
                    "response": self.decode(e.response),
                    "tokens": e.response,
                    "crc32": _checksum(_digest(e), e.response),
                }
                for e in fresh
            ]
        )
        self.known |= {_digest(e): e.response for e in fresh}

    def _read(self) -> dict[str, list[int]]:
        if not self.path.exists():
            return {}
        try:
            found = self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"could not read {self.path}: {error}") from error
        whole = found[: found.rfind(b"\n") + 1]  # a line torn by a kill is written again
        header, *lines = whole.split(b"\n")[:-1] or [b""]
        try:
            first = json.loads(header) if header else None
            if first is None and not json.dumps(self.header, ensure_ascii=False).encode().startswith(found):
                raise ValueError("its first line is another one")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not a file of responses ({error}); delete it to write it anew") from error
        if first is not None and not _same(first, self.header):
            raise DataError(
                f"{self.path} holds responses of {_shown(first)}, not of {_shown(self.header)}; "
                "delete it, or choose another file by data.responses_file"
            )
        entries = {line: _entry(line) for line in lines}
        good = [line for line, entry in entries.items() if entry is not None]
        if len(good) < len(lines):
            self.note(f"{self.path}: {len(lines) - len(good)} responses are damaged and are written again")
        kept = b"".join(line + b"\n" for line in ([header, *good] if header else []))
        if found != kept and writes():  # only now is it known to be ours
            write_text(self.path, kept.decode())
        return {entry["prompt"]: entry["tokens"] for entry in entries.values() if entry is not None}

    @first_alone
    def _append(self, lines: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            with self.path.open("a", encoding="utf-8") as file:
                for line in [self.header] * fresh + lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"could not write {self.path}: {error}") from error


def _checksum(prompt: str, tokens: list[int]) -> str:
    return f"{zlib.crc32(json.dumps([prompt, tokens]).encode()):08x}"


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line holds, if it is as it was written; one without a checksum is older than they are."""
    try:
        entry: dict[str, Any] = json.loads(line)
        right = _checksum(entry["prompt"], entry["tokens"])
        sound = all(type(token) is int and token >= 0 for token in entry["tokens"]) and isinstance(entry["prompt"], str)
        return entry if sound and entry.get("crc32", right) == right else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _same(found: Any, wanted: dict[str, Any]) -> bool:
    # The teacher's path is for the reader: the same weights may lie elsewhere, and others may have taken their place.
    return isinstance(found, dict) and found | {"teacher": ""} == wanted | {"teacher": ""}


def _digest(prompt: Example) -> str:
    prompt = last_turn(prompt)
    context = prompt.prompt if prompt.teacher_context is None else prompt.teacher_context
    return hashlib.sha256(json.dumps(context).encode()).hexdigest()[:24]


def _shown(header: Any) -> str:
    if not isinstance(header, dict):
        return "an unknown origin"
    seed = f", seed {header['seed']}" if "seed" in header else ""
    return f"{header.get('teacher')} ({header.get('weights')}) with {header.get('decoding')}{seed}"
