"""Metrics on texts. Each takes predictions and, for each, its references; each returns one value per row."""

import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

Summary = dict[str, Any]


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F1 with stemming, times 100, the best over each row's references (Lin 2004)."""
    scorer = _scorer()
    return [
        100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in row)
        for prediction, row in zip(predictions, references, strict=True)
    ]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """100 where a prediction equals one of its references, white space at the ends aside; else 0."""
    return [
        100.0 * (prediction.strip() in {reference.strip() for reference in row})
        for prediction, row in zip(predictions, references, strict=True)
    ]


def score_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean of each text metric over the rows."""
    return {
        "rouge_l": statistics.fmean(rouge_l(predictions, references)),
        "exact_match": statistics.fmean(exact_match(predictions, references)),
    }


def summary(per_seed: Sequence[float]) -> Summary:
    """Mean and sample standard deviation over seeds, and the values themselves."""
    spread = statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0
    return {"mean": statistics.fmean(per_seed), "std": spread, "per_seed": list(per_seed)}
