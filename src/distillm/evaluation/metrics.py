"""Metrics on texts: for each row what its score is made of, and a corpus's score from the sums over its rows.

So a bootstrap resamples sums and never reads a text again. Definitions and sources: docs/evaluation.md.
"""

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from . import overlap, surface
from .overlap import References

Array = npt.NDArray[np.float64]
Summary = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """``statistics(predictions, references)`` is ``[rows, k]``; ``score`` takes its sums, ``[..., k]`` to ``[...]``.

    ``resamples``: whether the score of other rows is that of their sums. It is not where a row's statistics depend on
    the rows before it. ``signature``, where there is one, says with which settings and version a score was made.
    """

    statistics: Callable[[Sequence[str], References], Array]
    score: Callable[[Array], Array]
    better: Literal["higher", "lower", "neither"] = "higher"
    resamples: bool = True
    signature: Callable[[References], str] | None = None


def _mean(values: Callable[[Sequence[str], References], Sequence[float]]) -> Metric:
    """The mean over rows of a value of each."""
    return Metric(
        lambda predictions, references: np.array([(v, 1.0) for v in values(predictions, references)]).reshape(-1, 2),
        surface.ratio,
    )


def _sacrebleu(name: overlap.Name, better: Literal["higher", "lower"]) -> Metric:
    return Metric(
        lambda predictions, references: overlap.statistics(name, predictions, references),
        lambda sums: overlap.score(name, sums),
        better,
        signature=lambda references: overlap.signature(name, references),
    )


def rouge_l(predictions: Sequence[str], references: References) -> list[float]:
    """ROUGE-L F1 with stemming, times 100, the best over each row's references (Lin 2004)."""
    return overlap.rouge("rougeL", predictions, references)


def exact_match(predictions: Sequence[str], references: References) -> list[float]:
    """100 where a prediction equals one of its references, white space at the ends aside; else 0."""
    return surface.exact_match(predictions, references)


METRICS: dict[str, Metric] = {
    "rouge_1": _mean(lambda p, r: overlap.rouge("rouge1", p, r)),
    "rouge_2": _mean(lambda p, r: overlap.rouge("rouge2", p, r)),
    "rouge_l": _mean(rouge_l),
    "rouge_lsum": _mean(lambda p, r: overlap.rouge("rougeLsum", p, r)),
    "bleu": _sacrebleu("bleu", "higher"),
    "chrf": _sacrebleu("chrf", "higher"),
    "ter": _sacrebleu("ter", "lower"),
    "exact_match": _mean(exact_match),
    "distinct_1": Metric(lambda p, _: surface.distinct(1, p), surface.share, resamples=False),
    "distinct_2": Metric(lambda p, _: surface.distinct(2, p), surface.share, resamples=False),
    "repetition": Metric(lambda p, _: surface.repeated(4, p), surface.share, "lower"),
    "length_ratio": Metric(surface.lengths, surface.ratio, "neither"),
}
"""Every metric on texts by its name; all but ``length_ratio`` are times 100."""

DEFAULT = ("rouge_l", "exact_match")


def known(names: Iterable[str]) -> tuple[str, ...]:
    """``names``, each once; ``ConfigError`` where one is no metric, or where there is none."""
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(METRICS)}"
            raise ConfigError(f"there is no metric {name!r}; {hint}")
    if not chosen:
        raise ConfigError(f"no metric is named; choose from {', '.join(METRICS)}")
    return chosen


def score_texts(
    predictions: Sequence[str], references: References, metrics: Sequence[str] = DEFAULT
) -> dict[str, float]:
    """The corpus score by each of ``metrics``."""
    made = {name: METRICS[name].statistics(predictions, references) for name in metrics}
    return {name: float(METRICS[name].score(sums(found))) for name, found in made.items()}


def sums(found: Array) -> Array:
    """Statistics ``[rows, k]`` summed over the rows ``[k]``, correctly rounded in whatever order they come."""
    return np.array([math.fsum(column) for column in found.T])


def signatures(references: References, metrics: Sequence[str]) -> dict[str, str]:
    """How the scores of those of ``metrics`` that have a signature are made."""
    made = {name: METRICS[name].signature for name in metrics}
    return {name: signature(references) for name, signature in made.items() if signature is not None}


def summary(per_seed: Sequence[float]) -> Summary:
    """Mean and sample standard deviation over seeds, and the values themselves."""
    spread = statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0
    return {"mean": statistics.fmean(per_seed), "std": spread, "per_seed": list(per_seed)}


def summaries(per_seed: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """The summary of each score over the scores of each seed."""
    return {name: summary([scores[name] for scores in per_seed]) for name in per_seed[0]}
