"""Overlap with references, as everybody computes it: rouge-score and sacrebleu.

Both are imported when first used: neither is needed to read a run.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
References = Sequence[Sequence[str]]
"""For each row one reference or more."""

Name = Literal["bleu", "chrf", "ter"]


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def rouge(kind: str, predictions: Sequence[str], references: References) -> list[float]:
    """ROUGE F1 of one kind of rouge-score with Porter's stemmer, times 100: each row's best over its references.

    ``rougeLsum`` takes each line for a sentence, and its longest common subsequences are joined over sentences.
    """
    scorer = _rouge(kind)
    return [
        100 * max(scorer.score(reference, prediction)[kind].fmeasure for reference in row)
        for prediction, row in zip(predictions, references, strict=True)
    ]


@cache
def _sacrebleu(name: Name) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    # force: a prediction that ends in " ." is scored as it is, without a warning that it may be tokenised.
    return BLEU(force=True) if name == "bleu" else CHRF() if name == "chrf" else TER()


def statistics(name: Name, predictions: Sequence[str], references: References) -> Array:
    """What sacrebleu counts in each row, ``[rows, k]``: its corpus score is that of the sums.

    Rows may have different numbers of references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)}")
    # The metric's own significance tests take the same two steps; there are no public names for them.
    found: list[list[float]] = _sacrebleu(name)._extract_corpus_statistics(list(predictions), _streams(references))
    return np.array(found, dtype=np.float64)


def score(name: Name, sums: Array) -> Array:
    """sacrebleu's corpus score from sums of statistics, ``[..., k]`` to ``[...]``."""
    metric = _sacrebleu(name)
    flat = [metric._compute_score_from_stats(row.tolist()).score for row in sums.reshape(-1, sums.shape[-1])]
    return np.array(flat).reshape(sums.shape[:-1])


def signature(name: Name, references: References) -> str:
    """sacrebleu's signature: settings and version; ``nrefs:var`` where rows differ in their number of references."""
    metric = _sacrebleu(name)
    counts = {len(row) for row in references}
    metric.num_refs = counts.pop() if len(counts) == 1 else -1
    return str(metric.get_signature())


def _streams(references: References) -> list[list[str | None]]:
    """One list for each number of a reference, None where a row has no such one."""
    most = max(len(row) for row in references)
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]
