"""Losses: sums over the right rows, counts to divide them by, and nothing computed for a weight of 0."""

import math

import pytest
import torch
from torch import Tensor

from distillm.data import Task, collate
from distillm.losses import RESPONSES, TEXT, Loss, Term, distill, nll, scaled
from distillm.methods import METHODS, Method, kd, sft, with_text
from distillm.scoring import Scored
from distillm.types import IGNORE, Example, Head, Layout, State, answer
from rows import context, fixed, one_step, row, text_row, tiny_pair
from tiny import tiny_tokenizer

STATE = State(step=2, total_steps=10)


def scored(*origins: str) -> Scored:
    """Three target tokens for each sequence, raw logits over 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 * len(origins)
    student, teacher = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (rows,), generator=generator)
    sequence = torch.arange(len(origins)).repeat_interleave(3)
    return Scored(Head(student, None), Head(teacher, None), labels, sequence, origins, STATE)  # pyright: ignore[reportArgumentType]


def only_term(loss: Loss) -> Term:
    (term,) = loss
    return term


def test_cross_entropy_is_the_sum_of_minus_log_q() -> None:
    s = scored("data", "student")
    expected = sum(-float(s.student.hidden[i].log_softmax(-1)[label]) for i, label in enumerate(s.labels.tolist()))
    assert float(only_term(nll()).total(s)) == pytest.approx(expected, rel=1e-12)


def test_a_divergence_is_summed_with_the_teacher_first() -> None:
    s = scored("data", "student")
    assert s.teacher is not None
    p, q = s.teacher.hidden.softmax(-1).tolist(), s.student.hidden.softmax(-1).tolist()

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    rows = list(zip(p, q, strict=True))
    assert float(only_term(distill("forward_kl")).total(s)) == pytest.approx(sum(kl(a, b) for a, b in rows))
    assert float(only_term(distill("reverse_kl")).total(s)) == pytest.approx(sum(kl(b, a) for a, b in rows))
    skewed = sum(kl(a, [0.3 * x + 0.7 * y for x, y in zip(a, b, strict=True)]) for a, b in rows)
    assert float(only_term(distill("skew_kl", alpha=0.3)).total(s)) == pytest.approx(skewed)


def test_a_users_own_divergence_is_named_after_itself() -> None:
    def squares(p: Tensor, q: Tensor, power: float = 2.0) -> Tensor:
        return ((p.exp() - q.exp()).abs() ** power).sum(-1)

    term, s = only_term(distill(squares, power=2.0)), scored("data")
    assert s.teacher is not None
    expected = ((s.teacher.hidden.softmax(-1) - s.student.hidden.softmax(-1)) ** 2).sum()
    assert term.name == "squares"
    assert float(term.total(s)) == pytest.approx(float(expected))


def test_only_the_terms_with_a_divergence_read_the_teacher() -> None:
    assert not only_term(nll()).reads_teacher
    assert only_term(distill("jsd")).reads_teacher
    found = {name for name in METHODS if Method(fixed([]), METHODS[name](context(fixed([]))).loss).reads_teacher}
    assert found == set(METHODS) - {"sft", "seqkd"}


def test_counts_are_of_the_tokens_or_sequences_of_the_terms_own_rows() -> None:
    rows = [row(0, 3, 4), row(1, 2, 0), row(2, 5, 2, "student"), row(3, 1, 1, "teacher"), text_row(0, 6)]
    assert only_term(nll()).count(rows) == only_term(distill("jsd")).count(rows) == 4 + 2 + 1
    assert only_term(nll(origins=TEXT)).count(rows) == 5
    assert only_term(nll()).count(rows[1:2]) == 0
    per_sequence = Term("x", only_term(nll()).total, per="sequence")
    assert per_sequence.count(rows) == 3
    assert frozenset({"text"}) == TEXT
    assert not RESPONSES & TEXT


def test_counts_are_the_labels_that_collation_makes() -> None:
    gaps = Example("chat", [5, 6, 7, 8, 9, 3], [False, True, True, False, True, False])
    for rows in ([row(0, 3, 4), gaps], [text_row(0, 7), text_row(1, 3)], [row(1, 2, 0), gaps]):
        count = only_term(nll(origins=RESPONSES | TEXT)).count(rows)
        assert count == int((collate(rows, Layout(0)).labels != IGNORE).sum())


def test_scaling_multiplies_weights_and_leaves_the_loss_it_was_given() -> None:
    loss = nll("a") + nll("b")
    twice = scaled(lambda state: state.step / state.total_steps, scaled(3.0, loss))
    assert [t.weight(STATE) for t in twice] == pytest.approx([0.6, 0.6])
    assert [t.weight(STATE) for t in loss] == [1.0, 1.0]
    assert [t.name for t in twice] == ["a", "b"]


def test_kd_shares_its_weight_with_cross_entropy() -> None:
    loss = kd(context(fixed([])), kd_weight=0.3).loss
    assert {t.name: t.weight(STATE) for t in loss} == {"forward_kl": 0.3, "cross_entropy": 0.7}
    assert {t.name for t in with_text(sft(context(fixed([]))), fixed([]), 2.0).loss} == {"cross_entropy", "text"}


@pytest.mark.parametrize("name", ["sft", "kd", "distillm"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dataset_and_generated_rows_with_the_same_tokens_get_the_same_labels_and_loss(name: str, kind: str) -> None:
    fields = [{"instruction": "How many legs?", "output": "Eight legs."}, {"instruction": "Sky?", "output": "Blue."}]
    task = Task(template="{{ instruction }}")
    data, _ = task.examples(fields, tiny_tokenizer(), max_prompt=64, max_length=128, end_id=1, source="x")
    data = [Example(e.id, [t % 41 for t in e.tokens], e.targets) for e in data]  # the tiny models know 41 tokens
    generated = [answer(e, list(e.response), "student", born=3) for e in data]
    assert [(g.tokens, g.targets) for g in generated] == [(d.tokens, d.targets) for d in data]
    assert all(d.tokens[-1] == 1 and d.targets[-1] for d in data)
    labels = [collate(rows, Layout(1)).labels for rows in (data, generated)]
    assert torch.equal(labels[0], labels[1])
    assert sorted(labels[0][0][labels[0][0] != IGNORE].tolist()) == sorted(data[0].response)
    pair = tiny_pair(kind)
    results = [one_step(pair, METHODS[name](context(fixed(rows)))) for rows in (data, generated)]
    assert results[0][0].terms == results[1][0].terms
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
