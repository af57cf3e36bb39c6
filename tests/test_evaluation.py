"""Scores against values worked out by hand, and the scoring of a model: seeds, order, lengths, progress."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import done
from distillm.errors import DataError
from distillm.evaluation import evaluate, exact_match, rouge_l, score_predictions, summary
from distillm.generation import Sampling, generate
from distillm.pipeline import distill
from distillm.types import Example, Layout
from tiny import SENTENCES, tiny_causal, tiny_tokenizer
from tiny_run import lines, materials, scores, tiny_run, write_rows

# ----------------------------------------------------------------------------------------------------- metrics on texts


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("the cat sat", ["the cat sat"], 100.0),
        ("The CAT, sat!", ["the cat sat"], 100.0),  # neither case nor punctuation counts
        ("cats sitting", ["cat sit"], 100.0),  # nor the ending of a word
        # The longest common subsequence "the sat down" has 3 words of 4 and of 5: P = 3/4, R = 3/5.
        ("the dog sat down", ["the cat sat right down"], 100 * 2 * 0.75 * 0.6 / 1.35),
        ("a b c d", ["d c b a"], 25.0),  # order counts: one word in common order
        ("one two", ["three four", "one two three", "one"], 80.0),  # the best reference: P = 1, R = 2/3
        ("words", ["nothing in common"], 0.0),
        ("", ["something"], 0.0),
        ("", [""], 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, references: list[str], value: float):
    assert rouge_l([prediction], [references]) == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("yes", ["yes"], 100.0),
        (" yes\n", ["no", "yes "], 100.0),
        ("Yes", ["yes"], 0.0),
        ("yes.", ["yes"], 0.0),
        ("", [""], 100.0),
    ],
)
def test_exact_match_by_hand(prediction: str, references: list[str], value: float):
    assert exact_match([prediction], [references]) == [value]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4), st.lists(st.text(max_size=20), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_scores_are_percentages_and_another_reference_never_lowers_them(predictions: list[str], references: list[str]):
    for metric in (rouge_l, exact_match):
        one = metric(predictions, [references[:1]] * len(predictions))
        more = metric(predictions, [references] * len(predictions))
        assert all(0 <= a <= b <= 100 for a, b in zip(one, more, strict=True))


def test_a_prediction_without_its_references_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        rouge_l(["a", "b"], [["a"]])


def test_summary_is_the_mean_and_the_sample_deviation_over_seeds():
    assert summary([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "per_seed": [1.0, 3.0]}
    assert summary([5.0]) == {"mean": 5.0, "std": 0.0, "per_seed": [5.0]}


# ---------------------------------------------------------------------------------------------------- given predictions


def test_given_predictions_are_scored_per_seed_and_kept():
    found = score_predictions(
        [
            {"id": "x", "prediction": ["a b", "a"], "references": ["a b"], "other": 1},
            {"predictions": ["c", "c"], "output": "c"},
        ],
        "file.jsonl",
    )
    assert found["num_rows"] == 2
    assert found["scores"]["exact_match"]["per_seed"] == [100.0, 50.0]
    # ROUGE-L of "a" against "a b" is 2 * 1 * 0.5 / 1.5.
    assert found["scores"]["rouge_l"]["per_seed"] == [100.0, pytest.approx((200 / 3 + 100) / 2)]
    assert [row["id"] for row in found["predictions"]] == ["x", "file.jsonl:1"]
    assert found["predictions"][0] == {"id": "x", "references": ["a b"], "predictions": ["a b", "a"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "nothing to score"),
        ([{"text": "a", "references": "b"}], r"row 0: no prediction\. Fields there: text, references"),
        ([{"prediction": "a"}], r"row 0: no references\. Fields there: prediction"),
        ([{}], "Fields there: none"),
        ([{"prediction": "a", "references": "b"}, {"prediction": 3, "references": "b"}], "row 1: prediction must be"),
        ([{"prediction": "a", "references": []}], "row 0: references must be a text or a list of texts, and not empty"),
        ([{"prediction": "a", "references": [None]}], "row 0: references must be"),
        (
            [{"prediction": ["a", "b"], "references": "b"}, {"prediction": "a", "references": "b"}],
            "row 1: 1 predictions, where the first row has 2",
        ),
    ],
)
def test_predictions_that_cannot_be_scored_are_named(rows: list[dict[str, Any]], said: str):
    with pytest.raises(DataError, match=said):
        score_predictions(rows, "file.jsonl")


# ----------------------------------------------------------------------------------------------------------- of a model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_causal("opt", seed=3)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    rows = [tokenizer(text)["input_ids"] for text in SENTENCES[:7]]
    return [Example(f"test:{i}", row, [False] * len(row)) for i, row in enumerate(rows)]


# So many of the 300 tokens end a response that about half of the short answers end by themselves.
END = tuple(range(1, 40))


def references(examples: list[Example]) -> dict[str, list[str]]:
    return {example.id: [f"answer {i}", "the end"] for i, example in enumerate(examples)}


def scored(
    model: Any, tokenizer: Any, examples: list[Example], sampling: Sampling, seeds: list[int], **more: Any
) -> Any:
    settings: dict[str, Any] = {
        "layout": Layout(0),
        "end_ids": END,
        "num_tokens": len(tokenizer),
        "batch_size": 3,
        **more,
    }
    prompts = {example.id: f"asked {example.id}" for example in examples}
    return evaluate(model, tokenizer, examples, references(examples), prompts, sampling, seeds, **settings)


def test_every_seed_is_an_answer_of_its_own_and_is_what_generate_gives(
    model: Any, tokenizer: Any, examples: list[Example]
):
    sampling = Sampling(max_new_tokens=6)
    found = scored(model, tokenizer, examples, sampling, [4, 9])
    assert found["seeds"] == [4, 9]
    assert found["decoding"] == {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    lengths, cut = [], []
    for number, seed in enumerate([4, 9]):
        answers = generate(
            model, examples, sampling, layout=Layout(0), end_ids=END, num_tokens=len(tokenizer), seed=seed, batch_size=2
        )
        texts = [tokenizer.decode(answer.response, skip_special_tokens=True).strip() for answer in answers]
        assert [row["predictions"][number] for row in found["predictions"]] == texts
        lengths.append(sum(len(answer.response) for answer in answers) / len(answers))
        ended = [any(token in END for token in answer.response) for answer in answers]
        assert all(len(answer.response) == 6 for answer, end in zip(answers, ended, strict=True) if not end)
        cut.append(100 * (1 - sum(ended) / len(ended)))
        wanted = list(references(examples).values())
        assert found["scores"]["rouge_l"]["per_seed"][number] == statistics.fmean(rouge_l(texts, wanted))
    assert found["scores"]["response_tokens"]["per_seed"] == pytest.approx(lengths)
    assert found["scores"]["truncated"]["per_seed"] == pytest.approx(cut)
    assert 0 < sum(cut) < 200
    assert found["scores"]["truncated"] == summary(found["scores"]["truncated"]["per_seed"])


def test_greedy_decoding_is_run_once(model: Any, tokenizer: Any, examples: list[Example]):
    found = scored(model, tokenizer, examples, Sampling(max_new_tokens=4, temperature=0), [1, 2, 3])
    assert found["seeds"] == [1]
    assert all(len(row["predictions"]) == 1 for row in found["predictions"])
    assert all(score["std"] == 0 and len(score["per_seed"]) == 1 for score in found["scores"].values())


def test_predictions_stay_in_the_order_of_the_rows_with_their_references(
    model: Any, tokenizer: Any, examples: list[Example]
):
    mixed = [examples[i] for i in (5, 0, 6, 2)]
    found = scored(model, tokenizer, mixed, Sampling(max_new_tokens=3), [1])
    assert found["num_rows"] == 4
    for example, row in zip(mixed, found["predictions"], strict=True):
        assert row["id"] == example.id
        assert row["prompt"] == f"asked {example.id}"
        assert row["references"] == references(mixed)[example.id]
    alone = scored(model, tokenizer, mixed[1:2], Sampling(max_new_tokens=3), [1])
    assert alone["predictions"][0]["predictions"] == found["predictions"][1]["predictions"]


def test_progress_counts_the_rows_of_all_seeds(model: Any, tokenizer: Any, examples: list[Example]):
    heard: list[tuple[int, int]] = []
    scored(model, tokenizer, examples, Sampling(max_new_tokens=2), [1, 2], progress=lambda *n: heard.append(n))
    assert heard == [(3, 14), (6, 14), (7, 14), (10, 14), (13, 14), (14, 14)]


def test_nothing_to_evaluate_is_an_error(model: Any, tokenizer: Any):
    with pytest.raises(DataError, match="no rows to evaluate"):
        scored(model, tokenizer, [], Sampling(), [1])


# ------------------------------------------------------------------------------------------------- selection and test


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selection_and_test_read_decode_and_score_alike(tmp_path: Path, dtype: str):
    made = materials(tmp_path)
    asked = [{"instruction": f"Say {i}.", "output": " ".join(SENTENCES[i : i + 3])} for i in range(6)]
    write_rows(made / "valid.jsonl", asked)
    changes = {
        "data.max_length": 200,
        "generation.max_new_tokens": 40,
        "validation.select": "rouge_l",
        "train.steps": 4,
    }
    more = {"data.test": {"mine": str(made / "valid.jsonl")}, "validation.every": 2, "evaluation.seeds": [3]}
    distill(tiny_run(made, made / "run", changes | more | {"student.dtype": dtype}))
    best = max(entry["rouge_l"] for entry in lines(made / "run" / "metrics.jsonl", "validation")[1:])
    assert best > 0
    assert scores(made / "run")["mine-student.json"]["scores"]["rouge_l"]["mean"] == pytest.approx(best)
    done("eval", made / "run", "--data", made / "valid.jsonl", "--output", made / "again.json")
    assert (
        json.loads((made / "again.json").read_text())["scores"] == scores(made / "run")["mine-student.json"]["scores"]
    )
