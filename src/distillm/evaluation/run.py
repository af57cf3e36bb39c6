"""Score a model, or given predictions, on rows with references."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..generation import Sampling, generate, truncated
from ..types import Example, Layout, Origin
from .metrics import DEFAULT, known, score_texts, signatures, summaries

Result = dict[str, Any]
"""What is written to ``eval/NAME.json``; see docs/architecture.md."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    references: Mapping[str, Sequence[str]],
    prompts: Mapping[str, str],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    layout: Layout,
    end_ids: Sequence[int],
    num_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    origin: Origin = "student",
    metrics: Sequence[str] = DEFAULT,
) -> Result:
    """Let ``model`` answer ``examples`` once per seed and score the answers against ``references``.

    ``references`` and ``prompts`` are by row id; a prompt is kept beside its answers as the user wrote it.
    Scores are means over rows; their spread is over the decoding seeds, so a greedy decoding has none and is run once.
    ``progress`` is called with the rows done and the rows in all. ``origin`` "teacher" reads what the teacher reads.
    ``metrics`` are names of ``METRICS``; the number of tokens, and how many answers were cut, are always told.
    """
    metrics = known(metrics)
    if not examples:
        raise DataError("there are no rows to evaluate")
    seeds = seeds_used(seeds, sampling)
    texts: list[list[str]] = []
    per_seed: list[dict[str, float]] = []
    wanted = [references[example.id] for example in examples]
    tokens, seconds = 0, 0.0
    for number, seed in enumerate(seeds):
        base, total = number * len(examples), len(seeds) * len(examples)
        began = time.perf_counter()
        answers = generate(
            model,
            examples,
            sampling,
            layout=layout,
            end_ids=end_ids,
            num_tokens=num_tokens,
            seed=seed,
            batch_size=batch_size,
            origin=origin,
            progress=None if progress is None else lambda done, base=base, total=total: progress(base + done, total),
        )
        seconds += time.perf_counter() - began
        tokens += sum(len(a.response) for a in answers)
        texts.append(decode(tokenizer, answers))
        found = score_texts(texts[-1], wanted, metrics)
        found["response_tokens"] = statistics.fmean(len(a.response) for a in answers)
        found["truncated"] = 100 * statistics.fmean(truncated(a, end_ids) for a in answers)
        per_seed.append(found)
    return {
        "num_rows": len(examples),
        "seeds": list(seeds),
        "decoding": asdict(sampling),
        "speed": {"tokens": tokens, "seconds": seconds},
        "scores": summaries(per_seed),
        **_signed(wanted, metrics),
        "predictions": [
            {
                "id": example.id,
                "prompt": prompts[example.id],
                "references": list(references[example.id]),
                "predictions": [text[i] for text in texts],
            }
            for i, example in enumerate(examples)
        ],
    }


def seeds_used(seeds: Sequence[int], sampling: Sampling) -> Sequence[int]:
    """Those of ``seeds`` that answers differ by: greedy decoding draws nothing, so one is enough."""
    return seeds[:1] if sampling.temperature == 0 else seeds


def decode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    """The responses as text, without special tokens and outer white space."""
    return [cast(str, tokenizer.decode(e.response, skip_special_tokens=True)).strip() for e in examples]


def _signed(references: Sequence[Sequence[str]], metrics: Sequence[str]) -> Result:
    made = signatures(references, metrics)
    return {"signatures": made} if made else {}


def score_predictions(rows: Sequence[Mapping[str, Any]], source: str, metrics: Sequence[str] = DEFAULT) -> Result:
    """Score given texts: rows with ``prediction`` (a text, or one per seed) and ``references`` (a text or several).

    ``predictions`` and ``output`` are taken as other names for the two.

    Raises:
        ConfigError: one of ``metrics`` is not known.
        DataError: a row lacks one of the two, has no reference, or another number of predictions than the first.
    """
    metrics = known(metrics)
    predictions = [_texts(row, ("prediction", "predictions"), source, i) for i, row in enumerate(rows)]
    references = [_texts(row, ("references", "reference", "output"), source, i) for i, row in enumerate(rows)]
    seeds = len(predictions[0]) if predictions else 0
    for i, given in enumerate(predictions):
        if len(given) != seeds:
            raise DataError(f"{source}, row {i}: {len(given)} predictions, where the first row has {seeds}")
    if not seeds:
        raise DataError(f"{source}: there is nothing to score")
    per_seed = [score_texts([given[s] for given in predictions], references, metrics) for s in range(seeds)]
    return {
        "num_rows": len(rows),
        "seeds": list(range(seeds)),
        "scores": summaries(per_seed),
        **_signed(references, metrics),
        "predictions": [
            {"id": str(row.get("id", f"{source}:{i}")), "references": references[i], "predictions": predictions[i]}
            for i, row in enumerate(rows)
        ],
    }


def _texts(row: Mapping[str, Any], names: Sequence[str], source: str, i: int) -> list[str]:
    for name in names:
        if name in row:
            texts: list[Any] = row[name] if isinstance(row[name], list) else [row[name]]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{source}, row {i}: {name} must be a text or a list of texts, and not empty")
            return cast(list[str], texts)
    raise DataError(f"{source}, row {i}: no {names[0]}. Fields there: {', '.join(row) or 'none'}")
