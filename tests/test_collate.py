from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.data import collate
from distillm.types import IGNORE, Batch, Example, Layout, answer
from tiny import tiny_causal, tiny_seq2seq

PAD = 0


def layout(start: int | None = None, pad: int = PAD) -> Layout:
    return Layout(pad, () if start is None else (start,))


tokens = st.lists(st.integers(0, 20), max_size=8)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    context = draw(tokens.filter(bool))
    response = draw(tokens)
    marks = draw(st.lists(st.booleans(), min_size=len(response), max_size=len(response)))
    teacher = draw(st.none() | tokens.filter(bool))
    return Example("x:0", context + response, [False] * len(context) + marks, teacher_context=teacher)


def learned(batch: Batch) -> list[list[int]]:
    return [row[row != IGNORE].tolist() for row in batch.labels]


def targets(example: Example) -> list[int]:
    return [token for token, mark in zip(example.tokens, example.targets, strict=True) if mark]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(examples(), min_size=1, max_size=5), st.sampled_from([None, 3]), st.sampled_from(["student", "teacher"])
)
def test_labels_are_the_target_tokens_in_order(rows: list[Example], start: int | None, reader: str) -> None:
    batch = collate(rows, layout(start), reader=reader)
    assert learned(batch) == [targets(row) for row in rows]
    read = batch.inputs["input_ids" if start is None else "decoder_input_ids"]
    assert batch.labels.shape == read.shape
    assert batch.labels.dtype == torch.int64


@settings(deadline=None, max_examples=50)
@given(st.lists(examples(), min_size=1, max_size=5))
def test_a_label_is_the_next_token_and_masks_are_lengths(rows: list[Example]) -> None:
    batch = collate(rows, layout())
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert ids.shape[1] == max(1, max(len(row.tokens) - 1 for row in rows))
    for b, row in enumerate(rows):
        length = max(1, len(row.tokens) - 1)
        assert ids[b, :length].tolist() == (row.tokens[:-1] or row.tokens)
        assert mask[b].tolist() == [1] * length + [0] * (ids.shape[1] - length)
        assert (ids[b, length:] == PAD).all()
        for t, label in enumerate(batch.labels[b].tolist()):
            if label != IGNORE:
                assert label == row.tokens[t + 1]
                assert row.targets[t + 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(examples(), min_size=1, max_size=5))
def test_seq2seq_splits_at_the_first_target(rows: list[Example]) -> None:
    batch = collate(rows, layout(7))
    for b, row in enumerate(rows):
        inputs = {name: value[b] for name, value in batch.inputs.items()}
        assert inputs["input_ids"][inputs["attention_mask"] == 1].tolist() == row.prompt
        assert inputs["decoder_input_ids"][inputs["decoder_attention_mask"] == 1].tolist() == [7, *row.response[:-1]]


@settings(deadline=None, max_examples=50)
@given(st.lists(tokens.filter(bool), min_size=1, max_size=4), st.data())
def test_dataset_and_generated_rows_get_the_same_labels(prompts: list[list[int]], data: st.DataObject) -> None:
    responses = [data.draw(tokens) for _ in prompts]
    written = [
        Example(f"x:{i}", p + r, [False] * len(p) + [True] * len(r))
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ]
    bare = [Example(f"x:{i}", p, [False] * len(p)) for i, p in enumerate(prompts)]
    generated = [answer(p, r, "student", born=3) for p, r in zip(bare, responses, strict=True)]
    regenerated = [answer(p, r, "student") for p, r in zip(written, responses, strict=True)]
    for start in (None, 5):
        expected = collate(written, layout(start))
        for rows in (generated, regenerated):
            batch = collate(rows, layout(start))
            assert torch.equal(batch.labels, expected.labels)
            assert all(torch.equal(batch.inputs[name], value) for name, value in expected.inputs.items())


@pytest.mark.parametrize("start", [None, 9])
def test_the_end_token_is_learned_where_it_is_the_padding_too(start: int | None) -> None:
    end = PAD
    rows = [Example("a", [end, 5, 6, end], [False, False, True, True]), Example("b", [5, end], [False, True])]
    batch = collate(rows, layout(start, end))
    assert learned(batch) == [[6, end], [end]]
    if start is None:
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    else:
        assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
        assert batch.inputs["decoder_attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_the_teacher_reads_its_own_context_and_the_student_does_not() -> None:
    row = Example("a", [1, 2, 3, 4], [False, False, True, True], teacher_context=[7, 8, 9])
    assert collate([row], layout(), reader="teacher").inputs["input_ids"].tolist() == [[7, 8, 9, 3]]
    assert collate([row], layout(), reader="teacher").labels.tolist() == [[IGNORE, IGNORE, 3, 4]]
    assert collate([row], layout()).inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert collate([row], layout(5), reader="teacher").inputs["input_ids"].tolist() == [[7, 8, 9]]


def test_several_spans_of_targets() -> None:
    row = Example("chat", [1, 2, 3, 4, 5, 6], [False, True, False, False, True, True])
    assert collate([row], layout()).labels.tolist() == [[2, IGNORE, IGNORE, 5, 6]]
    assert collate([row], layout(9)).labels.tolist() == [[2, IGNORE, IGNORE, 5, 6]]


def test_rows_without_targets_and_of_one_token() -> None:
    rows = [Example("a", [4], [False]), Example("b", [5, 6, 7], [False] * 3)]
    batch = collate(rows, layout())
    assert batch.inputs["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert (batch.labels == IGNORE).all()
    assert collate(rows, layout(9)).inputs["decoder_input_ids"].tolist() == [[9], [9]]


@pytest.mark.parametrize("start", [None, 9])
@pytest.mark.parametrize(
    ("row", "reader"),
    [
        (Example("a", [], []), "student"),
        (Example("a", [3, 4], [True, True]), "student"),
        (Example("a", [3, 4], [False, True], teacher_context=[]), "teacher"),
    ],
)
def test_a_row_in_which_nothing_precedes_the_first_target_is_refused(
    row: Example, reader: str, start: int | None
) -> None:
    with pytest.raises(ValueError, match=f"row a: the {reader} has no token before the first target"):
        collate([row], layout(start), reader=reader)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to collate"):
        collate([], layout())


@pytest.mark.parametrize(("build", "start"), [(tiny_causal, None), (tiny_seq2seq, 1)])
def test_a_model_gives_a_row_the_same_logits_alone_and_padded(
    build: Callable[[], torch.nn.Module], start: int | None
) -> None:
    model = build()
    rows = [
        Example("a", [5, 6, 7, 8, 9, 10], [False, False, True, True, True, True]),
        Example("b", [5], [False]),
        Example("c", [11, 12, 13], [False, True, True]),
    ]
    with torch.no_grad():
        together = collate(rows, layout(start))
        padded = model(**together.inputs).logits
        for b, row in enumerate(rows):
            alone = collate([row], layout(start))
            expected = model(**alone.inputs).logits[0]
            torch.testing.assert_close(padded[b, : expected.shape[0]], expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(together.labels[b, : expected.shape[0]], alone.labels[0])
    assert padded.isfinite().all()
