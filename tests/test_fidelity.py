"""Perplexity, calibration and agreement at the reference tokens: by hand, token by token, and in any portions."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from distillm.divergences import forward_kl, reverse_kl
from distillm.errors import DataError
from distillm.evaluation.fidelity import fidelity
from distillm.readers import LocalTeacher
from distillm.scoring import Pair
from distillm.types import Example, Head, Layout, as_teacher_reads
from rows import NUM_TOKENS, row, teacher_of, tiny_pair

FIGURES = {"divergence", "agreement", "perplexity", "calibration_error"}


def saying(*distributions: list[float]) -> Any:
    """A reader whose model gives these probabilities at the target positions, in their order."""
    reader = Mock(side_effect=lambda *_: Head(torch.tensor(distributions, dtype=torch.float64).log(), None))
    reader.fused, reader.packed, reader.unembedding = False, False, None
    return reader


def hand_pair(student: list[list[float]], teacher: list[list[float]] | None) -> Pair:
    nothing, cpu = torch.nn.Linear(1, 1), torch.device("cpu")
    nothing.device = cpu  # pyright: ignore[reportAttributeAccessIssue]
    said = None if teacher is None else LocalTeacher(nothing, saying(*teacher), Layout(0), cpu)
    return Pair(nothing, saying(*student), said, num_tokens=3, layout=Layout(0), device=cpu)


def test_figures_by_hand():
    # Three target tokens, 0, 1 and 2; the student is sure of the first, half right about the second, wrong in the last.
    student = [[0.8, 0.1, 0.1], [0.25, 0.5, 0.25], [0.81, 0.09, 0.1]]
    teacher = [[0.5, 0.25, 0.25], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]]
    found = fidelity(hand_pair(student, teacher), [Example("a", [0, 0, 1, 2], [False, True, True, True])])
    assert found.keys() == FIGURES
    assert found["perplexity"] == pytest.approx((0.8 * 0.5 * 0.1) ** (-1 / 3))
    # 0.8 = 12/15 ends bin 11 (so 0.81 is in bin 12), 0.5 is in bin 7: each alone, right, right and wrong.
    assert found["calibration_error"] == pytest.approx(100 * ((1 - 0.8) + (1 - 0.5) + 0.81) / 3)
    assert found["agreement"] == pytest.approx(100 * 2 / 3)  # the second: the teacher says token 0
    kl = sum(p * math.log(p / q) for ps, qs in zip(teacher, student, strict=True) for p, q in zip(ps, qs, strict=True))
    assert found["divergence"] == pytest.approx(kl / 3)


def test_tokens_of_one_bin_make_up_for_one_another():
    # 0.62 and 0.65 are both in (9/15, 10/15]: one right of two, 0.635 expected.
    pair = hand_pair([[0.62, 0.2, 0.18], [0.65, 0.2, 0.15]], None)
    found = fidelity(pair, [Example("a", [0, 0, 1], [False, True, True])])
    assert found["calibration_error"] == pytest.approx(100 * abs(0.635 - 0.5))
    assert found.keys() == {"perplexity", "calibration_error"}


def test_certainty_is_in_the_last_bin():
    pair = hand_pair([[1.0, 1e-300, 1e-300]], None)
    found = fidelity(pair, [Example("a", [1, 0], [False, True])])
    assert found == {"perplexity": pytest.approx(1), "calibration_error": pytest.approx(0, abs=1e-9)}


def test_the_same_models_agree_wholly():
    pair = tiny_pair()
    same = replace(pair, teacher=LocalTeacher(pair.student, pair.read_student, pair.layout, pair.device))
    found = fidelity(same, [row(i) for i in range(3)])
    assert (found["agreement"], found["divergence"]) == (100, pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("block", [1, 3 * NUM_TOKENS, 2**24])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_figures_token_by_token_in_any_portions(monkeypatch: pytest.MonkeyPatch, block: int, name: str):
    monkeypatch.setattr("distillm.evaluation.fidelity.BLOCK_ELEMENTS", block)
    pair = tiny_pair()
    examples = [row(0, 5, 3), row(1, 2, 6, teacher_context=[3, 4, 5]), row(2, 4, 0), row(3, 1, 1)]
    losses, gaps, agreed, sure = [], [], [], list[tuple[float, float]]()
    for example in examples:
        for i in range(len(example.response)):
            contexts = example.prompt + example.response[:i], example.teacher_context or example.prompt
            p, q = (
                model(input_ids=torch.tensor([read])).logits[0, -1, :NUM_TOKENS].detach().log_softmax(-1)  # pyright: ignore
                for model, read in ((teacher_of(pair), contexts[1] + example.response[:i]), (pair.student, contexts[0]))
            )
            label = example.response[i]
            losses.append(-float(q[label]))
            gaps.append(float({"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name](p, q)))
            agreed.append(int(p.argmax()) == int(q.argmax()))
            sure.append((float(q.max().exp()), float(int(q.argmax()) == label)))
    error = 0.0
    for b in range(15):
        inside = [(q, right) for q, right in sure if b / 15 < q <= (b + 1) / 15]
        error += abs(sum(right - q for q, right in inside)) / len(sure)
    found = fidelity(pair, examples, divergence=name, batch_size=2)
    wanted = {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "divergence": sum(gaps) / len(gaps),
        "agreement": 100 * sum(agreed) / len(agreed),
        "calibration_error": 100 * error,
    }
    assert found == {key: pytest.approx(value, rel=1e-8) for key, value in wanted.items()}


def test_nothing_to_read_is_an_error():
    with pytest.raises(DataError, match="no row has a reference"):
        fidelity(tiny_pair(), [row(0, 3, 0)])


def test_the_teacher_itself_is_read_with_its_own_context():
    given = Example("a", [5, 6, 7, 8, 9], [False, False, True, False, True], teacher_context=[3])
    read = as_teacher_reads(given)
    assert (read.tokens, read.targets, read.teacher_context) == ([3, 7, 8, 9], [False, True, False, True], None)
    assert as_teacher_reads(replace(given, teacher_context=None)).tokens == given.tokens
