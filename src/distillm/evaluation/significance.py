"""Is the difference of two systems more than chance? A paired bootstrap over rows and training runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MOST_DRAWS = 2**22
"""Rows drawn at a time, which bounds the memory: 32 MiB of counts."""


@dataclass(frozen=True)
class Difference:
    """Score of a system less that of the baseline, its interval, and the p-value of there being none."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    system: Sequence[Array],
    baseline: Sequence[Array],
    score: Callable[[Array], Array],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The percentile interval of the difference, and its two-sided p-value (Efron & Tibshirani 1993; Koehn 2004).

    Each system is one array ``[decoding seeds, rows, k]`` of a metric's statistics for each of its training runs; the
    rows are the same in all. A system's score is the mean, over runs and decoding seeds, of ``score`` of the sums over
    rows. A sample draws rows with replacement, the same for both systems, all runs and all seeds. Where a system has
    R > 1 runs, it draws R - 1 of them as well, each system for itself: so many make the variance of the mean over runs
    unbiased (Rao & Wu 1988), and rows crossed with runs err on the safe side (Owen 2007). Decoding seeds are not
    drawn: what they vary by is different in each row, so that drawing rows counts it already.

    ``p`` is twice the smaller share of samples on one side of 0, which agrees with the interval: below ``1 - level``
    where that leaves out 0 (but for one sample). It is at least ``2 / (samples + 1)``. All follows from ``seed``.
    """
    counts = {array.shape[1] for array in (*system, *baseline)}
    if len(counts) != 1:
        raise ValueError(f"the systems have different numbers of rows: {sorted(counts)}")
    (num_rows,) = counts
    draw = np.random.default_rng(seed)
    found = np.concatenate(
        [
            _means(system, score, rows, draw) - _means(baseline, score, rows, draw)
            for rows in _resampled(num_rows, samples, draw)
        ]
    )
    whole = np.ones((1, num_rows))
    difference = _means(system, score, whole, None) - _means(baseline, score, whole, None)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    one_side = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p = min(1.0, 2 * (one_side + 1) / (samples + 1))
    return Difference(float(difference[0]), float(low), float(high), p)


def _resampled(num_rows: int, samples: int, draw: np.random.Generator) -> Iterator[Array]:
    """How often each row is in each sample, ``[some samples, rows]`` at a time."""
    portion = max(1, MOST_DRAWS // num_rows)
    for first in range(0, samples, portion):
        size = min(portion, samples - first)
        drawn = draw.integers(num_rows, size=(size, num_rows)) + num_rows * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows).astype(np.float64)


def _means(
    runs: Sequence[Array], score: Callable[[Array], Array], rows: Array, draw: np.random.Generator | None
) -> Array:
    """The system's score in each sample of ``rows`` ``[samples, rows]``; of all its runs where nothing is drawn."""
    by_run = np.stack([score(_sums(rows, run)).mean(-1) for run in runs], axis=-1)
    if draw is None or len(runs) == 1:
        return by_run.mean(-1)
    drawn = draw.integers(len(runs), size=(len(rows), len(runs) - 1))
    return np.take_along_axis(by_run, drawn, axis=-1).mean(-1)


def _sums(rows: Array, run: Array) -> Array:
    """Statistics ``[decoding seeds, rows, k]`` summed over the rows drawn: ``[samples, decoding seeds, k]``."""
    seeds, num_rows, width = run.shape
    return (rows @ run.transpose(1, 0, 2).reshape(num_rows, seeds * width)).reshape(len(rows), seeds, width)
