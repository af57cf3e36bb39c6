"""A whole run that ends in a second: tiny models in folders, rows in files, settings, and readers of what it leaves."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distillm.checkpoint import DAMAGED
from distillm.config import Run, make_run
from distillm.display import Display
from tiny import save, tiny_model, tiny_tokenizer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """``rows`` as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int, first: int = 0, *, output: bool = True) -> list[dict[str, Any]]:
    """Short questions, with short answers unless ``output`` is false."""
    asked = [(NUMBERS[i % 10], NUMBERS[i // 10 % 10]) for i in range(first, first + count)]
    return [{"instruction": f"Say {a} {b}."} | ({"output": f"{a} and {b}"} if output else {}) for a, b in asked]


def materials(folder: Path, kind: str = "llama", **student: Any) -> Path:
    """A folder with ``teacher``, ``student`` (one layer, tied embeddings), rows to train on and a plain text."""
    tokenizer = tiny_tokenizer()
    save(tiny_model(kind, seed=1), tokenizer, folder / "teacher")
    student = {"tie_word_embeddings": True} | student
    save(tiny_model(kind, layers=1, seed=2, **student), tokenizer, folder / "student")
    write_rows(folder / "train.jsonl", rows(12))
    write_rows(folder / "valid.jsonl", rows(4, 20))
    write_rows(folder / "test.jsonl", rows(3, 40))
    (folder / "text.txt").write_text("A river runs through the valley and turns the old mill. " * 8, encoding="utf-8")
    return folder


def settings(made: Path, output: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a short DistiLLM run with dropout, generation, replay and plain text; ``changes`` by dotted name."""
    found: dict[str, Any] = {
        "teacher": {"path": str(made / "teacher")},
        "student": {"path": str(made / "student"), "dropout": 0.1},
        "data": {
            "train": str(made / "train.jsonl"),
            "validation": str(made / "valid.jsonl"),
            "test": {"numbers": str(made / "test.jsonl")},
            "template": "Q: {{ instruction }}\nA: ",
            "max_prompt": 32,
            "max_length": 48,
            "text": str(made / "text.txt"),
            "text_length": 16,
        },
        "method": {"name": "distillm", "initial_probability": 0.7, "capacity": 6, "replay_ratio": "constant"},
        "generation": {"max_new_tokens": 4},
        "optim": {"lr": 0.01},
        "train": {"steps": 8, "batch_size": 3, "micro_batch_size": 2},
        "validation": {"every": 4, "samples": 2},
        "evaluation": {"seeds": [1, 2]},
        "checkpoint": {"every": 2},
        "output": str(output),
        "seed": 3,
        "device": "cpu",
    }
    for name, value in (changes or {}).items():
        *sections, key = name.split(".")
        section = found
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return copy.deepcopy(found)


def tiny_run(made: Path, output: Path, changes: dict[str, Any] | None = None) -> Run:
    """``settings`` as a validated run."""
    return make_run(settings(made, output, changes))


class Heard(Display):
    """A display that keeps what was said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The entries of a JSON Lines file, of one ``kind`` where given."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in found if kind is None or entry.get("kind") == kind]


def figures(folder: Path) -> list[dict[str, Any]]:
    """Every step and validation of a run's log, in the order of writing, but for the time they took."""
    kept = [entry for entry in lines(folder / "metrics.jsonl") if entry["kind"] not in ("event", "time")]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in kept]


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """The events of one name in a run's log."""
    return [entry for entry in lines(folder / "metrics.jsonl", "event") if entry["event"] == event]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The student's weights that a run ended with."""
    return load_file(folder / "student" / "model.safetensors")


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def scores(folder: Path) -> dict[str, Any]:
    """Every ``eval/*.json`` by file name, but for how fast it was made."""
    found = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "eval").glob("*.json"))}
    return {name: {k: v for k, v in result.items() if k != "speed"} for name, result in found.items()}


def assert_same_run(folder: Path, other: Path) -> None:
    """Both runs made the same steps, validations, samples, scores and students; no scratch is left in ``folder``."""
    assert figures(folder) == figures(other)
    assert lines(folder / "samples.jsonl") == lines(other / "samples.jsonl")
    assert _text(folder / "tokens.jsonl") == _text(other / "tokens.jsonl")
    assert same_weights(weights(folder), weights(other))
    mine, theirs = scores(folder), scores(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name] | {"model": ""} == theirs[name] | {"model": ""}
    assert _contents(folder / "checkpoints") == _contents(other / "checkpoints")
    assert not list(folder.rglob(".*"))


def _text(path: Path) -> str | None:
    """What a file holds that not every run has."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, but for checkpoints that were set aside."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.parent.name.startswith(DAMAGED)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def first_losses(wanted: dict[str, Any]) -> list[float]:
    """The losses of a run's first two steps, as a process of its own may compute them."""
    import distillm

    torch.set_num_threads(1)
    steps = distillm.steps(distillm.build(make_run(wanted)))
    return [next(steps).loss, next(steps).loss]
