"""A plausible run folder, made of formulas: what `distillm train` and `distillm eval` leave behind."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]

CONFIG: Record = {
    "teacher": {"path": "models/SmolLM2-135M-Instruct", "dtype": "float32"},
    "student": {"path": "models/smollm2-6-layers"},
    "method": {"name": "distillm", "divergence": "skew_kl", "alpha": 0.1, "replay": {"capacity": 64}},
    "data": {
        "train": "kitchen/train.jsonl",
        "validation": "kitchen/valid.jsonl",
        "template": "alpaca",
        "max_length": 256,
    },
    "train": {"steps": 120, "batch_size": 8},
    "optim": {"lr": 0.0005, "schedule": "cosine"},
    "provenance": {
        "distillm": "0.1.0",
        "python": "3.12.3",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "git": "7c774c8",
        "command": ["distillm", "train", "run.yaml", "data.train=my kitchen/train.jsonl"],
        "started": "2026-05-04T09:12:33+00:00",
        "threads": 2,
        "device": "cpu",
        "models": {
            "teacher": {"parameters": 134515008, "layers": 30, "width": 576, "vocabulary": 49152},
            "student": {"parameters": 49556160, "layers": 6, "width": 576, "vocabulary": 49152},
        },
    },
}

DISHES = ["lentil soup", "flat bread", "pickled radish", "rice with peas", "plum cake", "onion tart", "bean stew"]


def steps(num_steps: int, *, plain_text: bool = True) -> Iterator[Record]:
    draw = random.Random(7)
    for step in range(1, num_steps + 1):
        probability = min(1.0, 0.1 * (step * 8 // num_steps))
        ratio = probability * (1 - step / num_steps)
        chance = draw.random()
        batch = "generated" if chance < ratio else "replayed" if chance < probability else "dataset"
        distill = 1.1 + 5 * math.exp(-4 * step / num_steps) + draw.gauss(0, 0.35)
        terms = {"distill": distill, "text": 3.2 + draw.gauss(0, 0.1)} if plain_text else {"distill": distill}
        yield {
            "kind": "step", "step": step, "loss": sum(terms.values()), "terms": terms,
            "counts": dict.fromkeys(terms, 412),
            "lr": 0.0005 * 0.5 * (1 + math.cos(math.pi * step / num_steps)), "grad_norm": 0.8 + draw.random(),
            "seconds": 2.5 + draw.random(), "tokens": 700 + draw.randrange(90), "batch": batch,
            "probability": probability, "replay_ratio": ratio, "buffer": min(64, step // 2),
            "buffer_age": step / 4 if step > 3 else None, "truncated": 1 if batch == "generated" else 0,
        }  # fmt: skip


def metrics(num_steps: int, every: int) -> Iterator[Record]:
    yield {"kind": "validation", "step": 0, "cross_entropy": 9.8137, "divergence": 7.9021, "monitored": 7.9021}
    for record in steps(num_steps):
        yield record
        step = record["step"]
        if step % every == 0:
            divergence = 0.9 + 7 * math.exp(-4 * step / num_steps)
            yield {
                "kind": "validation", "step": step, "cross_entropy": 2.2 + 7 * math.exp(-5 * step / num_steps),
                "divergence": divergence, "rouge_l": 30 * (1 - math.exp(-3 * step / num_steps)),
                "monitored": divergence,
            }  # fmt: skip
            yield {"kind": "event", "step": step, "event": "best", "message": f"divergence {divergence:.3f}"}
    yield {"kind": "event", "step": num_steps // 3, "event": "skipped", "message": "every response was empty"}


def samples(num_samples: int, last_step: int) -> Iterator[Record]:
    for step in (0, last_step // 2, last_step):
        for index in range(num_samples):
            dish = DISHES[index % len(DISHES)]
            good = f"Soak for an hour, then cook {dish} on a low flame.\nSeason at the end & taste before you serve it."
            yield {
                "step": step, "id": f"valid:{index}", "prompt": f"How do I make {dish} for {index + 2} people?",
                "reference": f"Cook {dish} slowly and salt it last.", "teacher": good,
                "student": "the of of and , the -" if step == 0 else f"Cook {dish} slowly in a pot, then taste it.",
            }  # fmt: skip


def tokens(num_rows: int) -> Iterator[Record]:
    """Answers by token: the more of them the later the row, and the last but one of each is where they differ."""
    for index in range(num_rows):
        words = [" Cook", " it", " slowly", " with", "\n", "", "é", " salt", *[" and"] * index, "</s>"]
        values: list[float | None] = [0.01 + 0.1 * place for place in range(len(words))]
        values[-2] = 3.5
        yield {
            "id": f"test:{index}", "data": "kitchen-test", "origin": "student",
            "prompt": f"How is {DISHES[index % 7]} made?",
            "tokens": words, "divergence": values, "written": [[0.4, 0.25]] * len(words),
            "choice": [" Bake", *words[1:]], "chosen": [[0.9, 0.125]] * len(words),
        }  # fmt: skip


def evaluation(system: str, rouge: float, divergence: float, data: str = "kitchen-test") -> Record:
    per_seed = [rouge - 0.4137, rouge, rouge + 0.4137]
    return {
        "data": data, "system": system, "model": f"models/{system}", "num_rows": 60, "seeds": [10, 20, 30],
        "decoding": {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "speed": {"tokens": 4000, "seconds": 10.0 if system == "student" else 32.0},
        "scores": {
            "rouge_l": {"mean": rouge, "std": 0.4137, "per_seed": per_seed},
            "exact_match": {"mean": 0.0, "std": 0.0, "per_seed": [0.0, 0.0, 0.0]},
            "divergence": {"mean": divergence, "std": 0.0, "per_seed": [divergence]},
            "response_tokens": {"mean": 31.25, "std": 1.5, "per_seed": [30.0, 31.0, 32.75]},
            "truncated": {"mean": 0.05, "std": 0.01, "per_seed": [0.04, 0.05, 0.06]},
        },
        "predictions": [{"id": "test:0", "prompt": "?", "references": ["!"], "predictions": ["a", "b", "c"]}],
    }  # fmt: skip


def write_lines(path: Path, records: Iterator[Record] | list[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def fabricate(folder: Path, *, num_steps: int = 120, every: int = 20, num_samples: int = 16) -> Path:
    """A whole run in ``folder``."""
    (folder / "eval").mkdir(parents=True)
    (folder / "student").mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metrics(num_steps, every))
    write_lines(folder / "samples.jsonl", samples(num_samples, num_steps))
    write_lines(folder / "tokens.jsonl", tokens(14))
    for system, rouge, divergence in (
        ("before", 0.0312, 7.9123), ("sft", 24.8125, 1.9375), ("student", 29.7031, 1.1094), ("teacher", 41.5625, 0.0),
    ):  # fmt: skip
        text = json.dumps(evaluation(system, rouge, divergence))
        (folder / "eval" / f"kitchen-{system}.json").write_text(text, encoding="utf-8")
    return folder
