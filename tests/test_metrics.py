"""Metrics on texts: rouge-score's and sacrebleu's own values, the others by hand, and sums that give the same score."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from distillm.config import MetricName
from distillm.errors import ConfigError, DataError
from distillm.evaluation import METRICS, score_predictions, score_texts
from distillm.evaluation.metrics import known, signatures, sums
from distillm.report.text import SCORE_NAMES

WORDS = ["the", "fox", "Sleeps", "naïve", "你好", "runs", "running", "ran.", "(hi)", "'tis", "3.5", "😀", "é", "\n"]
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6)
OFTEN = settings(deadline=None, max_examples=60, derandomize=True)


def split(rows: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [prediction for prediction, _ in rows], [references for _, references in rows]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """As sacrebleu takes references of different number: one list for the first of each row, one for the second."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


# --------------------------------------------------------------------------------------------- as the libraries have it


@pytest.mark.parametrize(("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"),
                                            ("rouge_lsum", "rougeLsum")])  # fmt: skip
@given(rows=ROWS)
@OFTEN
def test_rouge_is_that_of_rouge_score(name: str, kind: str, rows: list[tuple[str, list[str]]]):
    scorer = RougeScorer([kind], use_stemmer=True)
    best = [scorer.score_multi(references, prediction)[kind].fmeasure for prediction, references in rows]
    assert score_texts(*split(rows), [name])[name] == pytest.approx(100 * sum(best) / len(best), abs=1e-9)


@pytest.mark.parametrize(("name", "theirs"), [("bleu", BLEU), ("chrf", CHRF), ("ter", TER)])
@given(rows=ROWS)
@OFTEN
def test_sacrebleu_called_directly_gives_the_same_score_and_signature(
    name: str, theirs: Any, rows: list[tuple[str, list[str]]]
):
    predictions, references = split(rows)
    metric = theirs()
    wanted = metric.corpus_score(predictions, streams(references)).score
    assert score_texts(predictions, references, [name])[name] == pytest.approx(wanted, abs=1e-9)
    assert signatures(references, [name])[name] == str(metric.get_signature())


def test_the_known_example_of_sacrebleu():
    # From sacrebleu's README.
    refs: list[list[str]] = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert score_texts(said, refs, ["bleu"])["bleu"] == pytest.approx(48.530827, abs=1e-6)


def test_a_tokenised_file_is_scored_without_a_warning(capfd: pytest.CaptureFixture[str]):
    assert score_texts(["a b c d ."] * 120, [["a b c d ."]] * 120, ["bleu"])["bleu"] == pytest.approx(100)
    assert capfd.readouterr().err == ""


@given(rows=ROWS, weights=st.lists(st.integers(0, 3), min_size=6, max_size=6).filter(lambda w: w[0] > 0))
@OFTEN
def test_rows_repeated_are_their_statistics_repeated(rows: list[tuple[str, list[str]]], weights: list[int]):
    predictions, references = split(rows)
    repeated = [row for row, weight in zip(rows, weights, strict=False) for _ in range(weight)]
    for name, metric in METRICS.items():
        if metric.resamples:
            found = metric.statistics(predictions, references)
            assert found.shape[0] == len(rows)
            total = np.array(weights[: len(rows)], dtype=float) @ found
            several = metric.score(np.stack([total, total])[None])
            assert several.shape == (1, 2)
            assert several[0] == pytest.approx(score_texts(*split(repeated), [name])[name], abs=1e-9)


@given(rows=ROWS)
@OFTEN
def test_every_metric_takes_every_text_and_is_finite(rows: list[tuple[str, list[str]]]):
    found = score_texts(*split(rows), list(METRICS))
    assert list(found) == list(METRICS)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert all(found[name] <= 100 + 1e-9 for name in METRICS if name not in ("ter", "length_ratio"))


# -------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("name", "predictions", "value"),
    [
        ("distinct_1", ["a b a", "b c"], 100 * 3 / 5),  # a, b, c of five words: over the corpus, not the mean of rows
        ("distinct_2", ["a b a", "b a"], 100 * 2 / 3),  # ab, ba of three pairs
        ("distinct_2", ["one", "two", ""], 0.0),  # no pair at all
        ("repetition", ["a b c d a b c d"], 20.0),  # abcd bcda cdab dabc abcd: one of five stands there already
        ("repetition", ["x x x x x", "a b c d e", "a b c"], (50 + 0 + 0) / 3),
        ("repetition", [""], 0.0),
    ],
)
def test_what_needs_no_reference(name: str, predictions: list[str], value: float):
    assert score_texts(predictions, [["x"]] * len(predictions), [name])[name] == pytest.approx(value)


@pytest.mark.parametrize(
    ("predictions", "references", "value"),
    [
        (["a b", "c"], [["a b c"], ["d"]], 3 / 4),  # words of all rows by words of all references
        (["a b"], [["a", "a b c", "a b c d"]], 2.0),  # 1 and 3 words are equally near: the shorter counts
        (["a b c"], [["a", "a b c d"]], 3 / 4),  # the nearest
        ([""], [["a"]], 0.0),
        (["a"], [[""]], 0.0),  # nothing to divide by
    ],
)
def test_length_ratio(predictions: list[str], references: list[list[str]], value: float):
    assert score_texts(predictions, references, ["length_ratio"])["length_ratio"] == pytest.approx(value)


def test_lines_are_the_sentences_of_rouge_lsum():
    # Reversed sentences: each is found whole where lines are sentences, and only one of them where they are not.
    reference, prediction = "a cat sat\nthe dog ran", "the dog ran\na cat sat"
    found = score_texts([prediction], [[reference]], ["rouge_l", "rouge_lsum"])
    assert found == {"rouge_l": pytest.approx(50), "rouge_lsum": pytest.approx(100)}


def test_sums_do_not_depend_on_the_order_of_rows():
    values = np.array([[1e16, 1.0], [1.0, 1.0], [-1e16, 1.0]])
    assert sums(values).tolist() == sums(values[::-1]).tolist() == [1.0, 3.0]


# -------------------------------------------------------------------------------------------------------------- by name


def test_the_configuration_knows_every_metric():
    assert set(get_args(MetricName)) == set(METRICS)


def test_the_docs_and_the_tables_name_every_metric():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in METRICS)
    assert set(METRICS) <= set(SCORE_NAMES)


def test_an_unknown_metric_is_named_with_what_there_is():
    assert known(["bleu", "chrf", "bleu"]) == ("bleu", "chrf")
    with pytest.raises(ConfigError, match="there is no metric 'blue'; did you mean bleu"):
        known(["blue"])
    with pytest.raises(ConfigError, match="there is no metric 'zzz'; choose from rouge_1, "):
        known(["zzz"])
    with pytest.raises(ConfigError, match="no metric is named"):
        known([])


@pytest.mark.parametrize("name", METRICS)
def test_predictions_without_their_references_are_an_error(name: str):
    if name not in ("distinct_1", "distinct_2", "repetition"):  # which look at no reference
        with pytest.raises(ValueError, match=r"zip|references for 1"):
            score_texts(["a", "b"], [["a"]], [name])


def test_given_predictions_are_scored_by_the_metrics_asked_for():
    rows = [
        {"predictions": ["the cat", "a cat"], "references": ["the cat", "one cat"]},
        {"predictions": ["dogs", "dog"], "references": "dogs"},
    ]
    found = score_predictions(rows, "f", ["bleu", "length_ratio"])
    assert list(found["scores"]) == ["bleu", "length_ratio"]
    assert found["scores"]["length_ratio"]["per_seed"] == [1.0, 1.0]
    assert found["signatures"] == {"bleu": signatures([["a", "b"], ["c"]], ["bleu"])["bleu"]}
    assert "nrefs:var|" in found["signatures"]["bleu"]
    assert "signatures" not in score_predictions(rows, "f")
    with pytest.raises(ConfigError, match="no metric 'rouge'"):
        score_predictions(rows, "f", ["rouge"])
    with pytest.raises(DataError, match="nothing to score"):
        score_predictions([], "f", ["bleu"])


def test_scores_are_made_without_torch_and_libraries_read_when_needed(tmp_path: Path):
    script = """
import json, sys
from distillm.evaluation import score_texts
assert not {"torch", "transformers", "rouge_score", "sacrebleu"} & sys.modules.keys()
print(json.dumps(score_texts(["a"], [["a"]], ["exact_match", "rouge_l", "bleu"])))
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact_match"] == 100
