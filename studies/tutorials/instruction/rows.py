"""Writes small instruction data with exact answers: units, alphabetical order, comparisons. All of it is made here."""

import json
import random
from pathlib import Path

UNITS = [
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
]
WORDS = [
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer",
    "island", "jacket", "kettle", "lemon", "mirror", "needle", "orange", "pencil",
    "quarry", "river", "saddle", "table", "umbrella", "violin", "window", "yellow",
    "zebra",
]  # fmt: skip


def rows(draw: random.Random) -> list[dict[str, str]]:
    """Every question once, in random order."""
    found = {
        f"How many {small} are {n} {big}?": f"{n} {big} are {n * factor} {small}."
        for big, small, factor in UNITS
        for n in range(2, 16)
    }
    for _ in range(110):
        words = draw.sample(WORDS, 3)
        found[f"Put these words in alphabetical order: {', '.join(words)}."] = ", ".join(sorted(words)) + "."
    for _ in range(110):
        a, b = draw.sample(range(10, 100), 2)
        found[f"Which number is larger, {a} or {b}?"] = f"{max(a, b)} is larger than {min(a, b)}."
    return draw.sample([{"instruction": ask, "output": answer} for ask, answer in found.items()], len(found))


def main() -> None:
    """``my/train.jsonl``, ``my/valid.jsonl`` and ``my/test.jsonl``: different questions in each."""
    made = rows(random.Random(0))
    folder = Path("my")
    folder.mkdir(exist_ok=True)
    parts = {"train": made[:240], "valid": made[240:264], "test": made[264:304]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main()
