"""Where teacher and student differ: the answers of ``tokens.jsonl``, the worst first, each token with its shade."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from .read import Record, RunFolder, number_in
from .text import number

BOUNDS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Nats a token at which the next shade begins: what a reader tells apart, from a rounding error to a clash."""
MAX_TOKENS = 400
FEW = 5


@dataclass(frozen=True)
class Token:
    """A token's text, its shade (0 to ``len(BOUNDS)``), and what there is to say of it."""

    text: str
    shade: int
    said: str


@dataclass(frozen=True)
class Answer:
    """One answer of the student. ``groups``: "worst", "typical", both or neither; sums and means are in nats."""

    id: str
    data: str
    prompt: str
    tokens: list[Token]
    left_out: int
    total: str
    mean: str
    largest: list[str]
    groups: str


def answers(run: RunFolder, budget: int) -> list[Answer]:
    """The answers of ``run`` by falling sum, those of the worst and then of the typical that fit in so many bytes."""
    ranked = sorted(run.tokens, key=_total, reverse=True)
    first = max(0, (len(ranked) - FEW) // 2)
    groups = [
        " ".join(name for name, of in (("worst", range(FEW)), ("typical", range(first, first + FEW))) if rank in of)
        for rank in range(len(ranked))
    ]
    kept: dict[int, Answer] = {}
    for rank in sorted(range(len(ranked)), key=lambda rank: (not groups[rank], rank)):
        made = _answer(ranked[rank], groups[rank])
        size = 700 + sum(60 + len(escape(token.text + token.said).encode(errors="replace")) for token in made.tokens)
        if size <= budget:
            budget -= size
            kept[rank] = made
    return [kept[rank] for rank in sorted(kept)]


def scale() -> list[tuple[int, str]]:
    """Every shade with the nats that it stands for."""
    names = [f"below {BOUNDS[0]:g}", *(f"from {bound:g}" for bound in BOUNDS)]
    return list(enumerate(names))


def _answer(row: Record, groups: str) -> Answer:
    tokens = [_token(row, place) for place in range(min(len(row["tokens"]), MAX_TOKENS))]
    total, count = _total(row), len(row["tokens"])
    order = sorted(range(len(tokens)), key=lambda place: _value(row, place), reverse=True)
    return Answer(
        id=str(row.get("id", ""))[:80],
        data=str(row.get("data", ""))[:80],
        prompt=str(row.get("prompt", ""))[:1500],
        tokens=tokens,
        left_out=count - len(tokens),
        total=_nats(total),
        mean=_nats(total / count),
        largest=[tokens[place].said for place in order[:3] if _value(row, place) >= BOUNDS[0]],
        groups=groups,
    )


def _token(row: Record, place: int) -> Token:
    value, text = _value(row, place), row["tokens"][place]
    said = f"{_quoted(text)}: {_nats(value)} nats"
    if (of := _pair(row, "written", place)) is not None:
        said += f"; teacher {of[0]}, student {of[1]}"
    choice = _at(row, "choice", place)
    if isinstance(choice, str) and (of := _pair(row, "chosen", place)) is not None:
        same = choice == text
        said += ", the teacher's choice too" if same else f"; the teacher's choice {_quoted(choice)}: {of[0]}, {of[1]}"
    return Token(text, bisect_right(BOUNDS, value), said)


def _quoted(text: str) -> str:
    shown = json.dumps(text[:60], ensure_ascii=False) if text else "a part of a character"
    return shown + ("…" if len(text) > 60 else "")


def _nats(value: float) -> str:
    return "infinitely many" if math.isinf(value) else f"{value:.2f}"


def _value(row: Record, place: int) -> float:
    """The divergence at ``place``; null stands for one that is infinite."""
    value = row["divergence"][place]
    return math.inf if value is None else float(value)


def _total(row: Record) -> float:
    return math.fsum(_value(row, place) for place in range(len(row["divergence"])))


def _at(row: Record, name: str, place: int) -> Any:
    values: Any = row.get(name)
    return values[place] if isinstance(values, list) and place < len(values) else None


def _pair(row: Record, name: str, place: int) -> tuple[str, str] | None:
    found: Sequence[Any] | None = _at(row, name, place)
    if not isinstance(found, list) or len(found) != 2:
        return None
    teacher, student = (number_in({"": value}, "") for value in found)
    return (number(teacher), number(student)) if teacher is not None and student is not None else None
