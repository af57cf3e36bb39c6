"""The paired bootstrap: its interval covers as often as it says, its p-values are uniform where nothing differs."""

import numpy as np
import pytest

from distillm.evaluation import METRICS, Difference, paired_bootstrap
from distillm.evaluation.significance import Array

MEAN = METRICS["exact_match"].score


def run(values: Array) -> Array:
    """The statistics of a mean, ``[seeds, rows, 2]``, of values ``[rows]`` or ``[seeds, rows]``."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    return np.stack([values, np.ones_like(values)], -1)


def within(share: float, expected: float, count: int) -> bool:
    """Whether a share of ``count`` draws is within three standard errors of what it should be."""
    return abs(share - expected) <= 3 * np.sqrt(expected * (1 - expected) / count)


def test_the_difference_is_that_of_the_means_over_runs_seeds_and_rows():
    draw = np.random.default_rng(0)
    system, baseline = draw.normal(size=(3, 2, 40)), draw.normal(size=(2, 5, 40))
    found = paired_bootstrap([run(x) for x in system], [run(x) for x in baseline], MEAN)
    assert found.difference == pytest.approx(system.mean() - baseline.mean())
    assert found.low < found.difference < found.high


def test_all_follows_from_the_seed():
    draw = np.random.default_rng(1)
    pair = [run(draw.normal(size=50))], [run(draw.normal(size=50))]
    assert paired_bootstrap(*pair, MEAN, seed=3) == paired_bootstrap(*pair, MEAN, seed=3)
    assert paired_bootstrap(*pair, MEAN, seed=3) != paired_bootstrap(*pair, MEAN, seed=4)


def test_what_is_the_same_has_no_difference_and_p_1():
    same = run(np.arange(30))
    assert paired_bootstrap([same], [same], MEAN) == Difference(0.0, 0.0, 0.0, 1.0)


def test_rows_are_paired():
    # The rows differ by hundreds, the systems by 1 in each row: only pairing sees it.
    rows = np.random.default_rng(2).normal(0, 100, 60)
    found = paired_bootstrap([run(rows + 1)], [run(rows)], MEAN, samples=500)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))
    assert found.p == pytest.approx(2 / 501)


def test_a_portion_of_rows_at_a_time_is_still_every_sample(monkeypatch: pytest.MonkeyPatch):
    draw = np.random.default_rng(3)
    pair = [run(draw.normal(0.3, 1, 100))], [run(np.zeros(100))]
    whole = paired_bootstrap(*pair, MEAN, samples=1001)
    monkeypatch.setattr("distillm.evaluation.significance.MOST_DRAWS", 700)
    parts = paired_bootstrap(*pair, MEAN, samples=1001)
    assert parts == whole  # one run each: nothing else is drawn in between


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"different numbers of rows: \[3, 4\]"):
        paired_bootstrap([run(np.ones(3))], [run(np.ones(4))], MEAN)


def test_the_interval_of_a_mean_is_that_of_the_theory():
    values = np.random.default_rng(4).normal(0.5, 2, 400)
    found = paired_bootstrap([run(values)], [run(np.zeros(400))], MEAN, samples=4000)
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.12 * error)


def test_p_and_interval_agree():
    draw = np.random.default_rng(5)
    for i in range(60):
        found = paired_bootstrap([run(draw.normal(0.2, 1, 80))], [run(np.zeros(80))], MEAN, samples=999, seed=i)
        if abs(found.p - 0.05) > 0.003:
            assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


# ---------------------------------------------------------------------------------------------------------- simulations


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
def test_coverage_and_p_values_by_simulation(kind: str):
    """1000 times 200 rows: an interval of 95 % holds the truth in 95 %, and p-values under the null are uniform."""
    draw, truth, count = np.random.default_rng(6), 0.0, 1000
    covered, p = 0, list[float]()
    for i in range(count):
        if kind == "normal":
            one, other = draw.normal(0, 1, (2, 200)) + draw.normal(0, 3, 200)
        else:
            one, other = (draw.random((2, 200)) < 0.3).astype(float)
        found = paired_bootstrap([run(one)], [run(other)], MEAN, samples=400, seed=i)
        covered += found.low <= truth <= found.high
        p.append(found.p)
    # 0.945: a percentile interval from 200 rows is short by (n - 1) / n, and normal where it should be Student's.
    assert within(covered / count, 0.945, count)
    for level in (0.1, 0.25, 0.5, 0.75):
        # Coarse differences are often exactly 0, which counts for both sides: p is then on the safe side.
        share = sum(value <= level for value in p) / count
        assert within(share, level, count) or (kind == "bernoulli" and share < level)
    assert min(p) > 0


def test_seeds_of_decoding_are_noise_in_the_rows_and_counted_there():
    draw, count, covered = np.random.default_rng(7), 500, 0
    for i in range(count):
        rows = draw.normal(0, 1, 150)
        one, other = rows + draw.normal(0, 2, (3, 150)), rows + draw.normal(0, 2, (5, 150))
        found = paired_bootstrap([run(one)], [run(other)], MEAN, samples=300, seed=i)
        covered += found.low <= 0 <= found.high
    assert within(covered / count, 0.945, count)


def test_training_runs_are_drawn_too():
    """Runs that differ more than rows do: drawing rows alone would cover in a tenth of the cases, drawing both nearly
    as often as it says (with few runs less: the interval takes their spread for known)."""
    draw, count = np.random.default_rng(8), 300
    covered = dict.fromkeys(("both", "rows"), 0)
    for i in range(count):
        rows = draw.normal(0, 1, 100)
        one, other = (rows + draw.normal(0, 1, (6, 1)) + draw.normal(0, 0.5, (6, 100)) for _ in range(2))
        both = paired_bootstrap([run(x) for x in one], [run(x) for x in other], MEAN, samples=300, seed=i)
        alone = paired_bootstrap([run(one.mean(0))], [run(other.mean(0))], MEAN, samples=300, seed=i)
        covered["both"] += both.low <= 0 <= both.high
        covered["rows"] += alone.low <= 0 <= alone.high
    assert covered["rows"] / count < 0.2
    assert 0.87 < covered["both"] / count <= 0.97


def test_two_runs_have_the_spread_of_their_mean():
    """The variance over samples is that of the mean of R runs, var / R, without the bias of drawing R of R."""
    draw = np.random.default_rng(9)
    spread = []
    for i in range(300):
        runs = [run(np.full(20, value)) for value in draw.normal(0, 1, 2)]
        found = paired_bootstrap(runs, [run(np.zeros(20))], MEAN, samples=400, seed=i, level=0.5)
        spread.append(((found.high - found.low) / 2) ** 2)  # two points of equal weight: half their distance, squared
    assert np.mean(spread) == pytest.approx(1 / 2, rel=0.25)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_a_metric_of_the_corpus_is_resampled_from_its_sums(name: str):
    references = [
        [f"the {word} sat on the {word} mat today"]
        for word in ["cat", "dog", "hen", "fox", "owl", "cow", "pig", "ant", "bee", "elk"]
    ]
    good = [row[0].replace("today", "now") for row in references]
    bad = [text.replace("mat", "rug").replace("sat", "is") for text in good]
    metric = METRICS[name]
    one, other = (metric.statistics(texts, references)[None] for texts in (good, bad))
    found = paired_bootstrap([one], [other], metric.score, samples=300)
    sign = -1 if metric.better == "lower" else 1
    assert sign * found.low > 0 or sign * found.high > 0
    assert sign * found.difference > 0
    assert found.p < 0.05
