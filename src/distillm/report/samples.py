"""What the student answered to the same prompts as training went on, beside its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from .read import Record, RunFolder

MAX_TEXT = 1500
AT_ONCE = 4


@dataclass(frozen=True)
class Sample:
    """One prompt, and the answers to it with their labels; ``between`` are those that do not stand out."""

    id: str
    prompt: str
    answers: list[tuple[str, str]]
    between: list[tuple[str, str]]


def samples(run: RunFolder) -> list[Sample]:
    """Each prompt once: reference and teacher, as far as there are, then the student at every recorded step.

    Of more than ``AT_ONCE`` steps the first and the last stand out.
    """
    by_id: dict[str, dict[int, Record]] = {}
    for row in run.samples:
        by_id.setdefault(str(row["id"]), {})[row["step"]] = row
    found: list[Sample] = []
    for row_id, rows in by_id.items():
        steps = sorted(rows)
        last = rows[steps[-1]]
        told = [(_stage(step), rows[step].get("student")) for step in steps]
        few = len(told) <= AT_ONCE
        known = [(name, last.get(name.lower())) for name in ("Reference", "Teacher")]
        known = known[1:] if known[0][1] == known[1][1] else known  # the teacher's response may be the reference
        beside = [*known, *(told if few else (told[0], told[-1]))]
        prompt = cut(str(last.get("prompt", "")), MAX_TEXT)
        found.append(Sample(cut(row_id, 80), prompt, _texts(beside), [] if few else _texts(told[1:-1])))
    return found


def within(found: Sequence[Sample], budget: int) -> list[Sample]:
    """As many of the first as fit in ``budget`` bytes of HTML."""
    kept: list[Sample] = []
    for sample in found:
        texts = [sample.prompt, *(text for _, text in (*sample.answers, *sample.between))]
        budget -= 200 + sum(100 + len(escape(text).encode(errors="replace")) for text in texts)
        if budget < 0:
            break
        kept.append(sample)
    return kept


def cut(text: str, most: int) -> str:
    """``text``, of which no more than ``most`` characters are shown, and how many are not."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} more characters)"


def _texts(answers: Sequence[tuple[str, object]]) -> list[tuple[str, str]]:
    return [(label, cut(text, MAX_TEXT)) for label, text in answers if isinstance(text, str)]


def _stage(step: int) -> str:
    return "Student before training" if step == 0 else f"Student at step {step}"
