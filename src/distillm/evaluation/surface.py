"""What can be counted in texts without a library: words are what stands between white space."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """100 where a prediction equals one of its references, white space at the ends aside; else 0."""
    return [
        100.0 * (prediction.strip() in {reference.strip() for reference in row})
        for prediction, row in zip(predictions, references, strict=True)
    ]


def distinct(n: int, predictions: Sequence[str]) -> Array:
    """For each row its n-grams that no row before has, and all of its n-grams: ``[rows, 2]`` (Li et al. 2016)."""
    seen: set[tuple[str, ...]] = set()
    counts: list[tuple[int, int]] = []
    for prediction in predictions:
        before, grams = len(seen), ngrams(n, prediction)
        seen.update(grams)
        counts.append((len(seen) - before, len(grams)))
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def repeated(n: int, predictions: Sequence[str]) -> Array:
    """For each row the share of its n-grams that stand earlier in the same row, and 1: ``[rows, 2]``.

    seq-rep-n of Welleck et al. 2020: ``1 - distinct n-grams / n-grams``; 0 for a row of fewer than n words.
    """
    shares: list[tuple[float, float]] = []
    for prediction in predictions:
        grams = ngrams(n, prediction)
        shares.append((1 - len(set(grams)) / len(grams) if grams else 0.0, 1.0))
    return np.array(shares, dtype=np.float64).reshape(-1, 2)


def lengths(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """For each row its words, and those of its reference of the nearest length (the shorter of two): ``[rows, 2]``."""
    counts: list[tuple[int, int]] = []
    for prediction, row in zip(predictions, references, strict=True):
        words = len(prediction.split())
        counts.append((words, min((abs(len(r.split()) - words), len(r.split())) for r in row)[1]))
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def ngrams(n: int, text: str) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def ratio(sums: Array) -> Array:
    """The first sum by the second, ``[..., 2]`` to ``[...]``; 0 where the second is 0."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.zeros_like(below), where=below != 0)


def share(sums: Array) -> Array:
    """``ratio``, times 100."""
    return 100 * ratio(sums)
