"""Steps that cannot be made: nothing to learn is skipped, nothing finite stops, and the student stays as it was."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from distillm.errors import DataError, TrainingError
from distillm.methods import Method, distillm, kd, sft, with_text
from distillm.train import validate
from distillm.types import Example, State
from rows import Recorder, context, fixed, prompts, row, steps_of, teacher_of, text_row, tiny_pair, tokens

RARE = 39  # a token of one row only
ROWS = [Example(f"row:{i}", tokens(i, 6, RARE), [False] * 2 + [True] * 4) for i in range(7)]
ROWS[4] = Example("row:4", [*ROWS[4].tokens[:3], RARE, *ROWS[4].tokens[4:]], ROWS[4].targets)

METHODS: dict[str, Any] = {
    "sft": sft,
    "kd": partial(kd, kd_weight=0.5),
    "reverse_kl": partial(kd, divergence="reverse_kl"),
    "jsd": partial(kd, divergence="jsd"),
    "total_variation": partial(kd, divergence="total_variation"),
    "distillm": distillm,
    "skew_reverse_kl": partial(distillm, divergence="skew_reverse_kl"),
}


def adamw(pair: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(pair.student.parameters(), lr=1.0, weight_decay=0.1)


def bits(value: Any) -> Any:
    """``value`` with every tensor as its bytes, so that NaN equals itself."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, list) else copy.copy(value)


def snapshot(pair: Any, optimizer: Any) -> Any:
    return bits(pair.student.state_dict()), bits(optimizer.state_dict())


# ------------------------------------------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize("name", ["sft", "kd", "distillm"])
def test_a_step_without_any_target_is_skipped_and_changes_nothing(name: str) -> None:
    pair = tiny_pair(dtype=torch.float32)
    optimizer, state = adamw(pair), State(total_steps=3)
    method = METHODS[name](context(fixed(ROWS, prompts(3, 5, 2), ROWS)))
    steps = steps_of(pair, method, optimizer, state, 0.01)
    assert not next(steps).skipped
    before = snapshot(pair, optimizer)
    step = next(steps)
    assert step.skipped
    assert (step.step, step.loss, step.grad_norm, step.terms, step.counts) == (2, 0.0, 0.0, {}, {})
    assert snapshot(pair, optimizer) == before
    assert state.step == 2
    assert not next(steps).skipped
    assert snapshot(pair, optimizer) != before
    assert all(bool(p.isfinite().all()) for p in pair.student.parameters())


def test_rows_without_targets_do_not_change_a_step() -> None:
    pair = tiny_pair()
    optimizers = [Recorder(pair.student.parameters()) for _ in range(2)]
    full = [ROWS, [*prompts(4, 1, 9), *ROWS, *prompts(8)]]
    steps = [
        next(steps_of(pair, METHODS["kd"](context(fixed(rows))), optimizer, State(total_steps=1), 0.0, 2))
        for rows, optimizer in zip(full, optimizers, strict=True)
    ]
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-6)
    for a, b in zip(optimizers[0].gradients[0], optimizers[1].gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_plain_text_is_learned_where_every_response_is_empty() -> None:
    pair = tiny_pair()
    method = with_text(METHODS["kd"](context(fixed(prompts(3, 4)))), fixed([text_row(0, 9)]), 0.5)
    step = next(steps_of(pair, method, Recorder(pair.student.parameters()), State(total_steps=1), 0.1))
    assert not step.skipped
    assert step.counts == {"text": 8}
    assert step.loss == 0.5 * step.terms["text"] > 0
    assert step.grad_norm > 0


def test_a_skipped_step_reads_no_model() -> None:
    pair = tiny_pair()
    calls = list[int]()
    for model in (pair.student, teacher_of(pair)):
        assert model is not None
        model.register_forward_hook(lambda *_: calls.append(1))
    method = METHODS["kd"](context(fixed(prompts(3, 4))))
    assert next(steps_of(pair, method, adamw(pair), State(total_steps=1), 0.1)).skipped
    assert calls == []


# -------------------------------------------------------------------------------------------------- nothing finite


def fails_at_step_three(pair: Any, method: Method, poison: Any) -> str:
    """What ``failure_at_step_three`` says."""
    return str(failure_at_step_three(pair, method, poison))


def failure_at_step_three(pair: Any, method: Method, poison: Any) -> TrainingError:
    """Two good steps, then ``poison``; the error of the third, after a check that nothing moved."""
    optimizer, state = adamw(pair), State(total_steps=9)
    steps = steps_of(pair, method, optimizer, state, 0.01)
    assert [next(steps).skipped for _ in range(2)] == [False, False]
    poison()
    before = snapshot(pair, optimizer)
    with pytest.raises(TrainingError) as raised:
        next(steps)
    assert snapshot(pair, optimizer) == before
    assert state.step == 2
    assert all(p.grad is None or not bool(p.grad.any()) for p in pair.student.parameters())
    return raised.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "reader"),
    [(name, "student") for name in METHODS] + [(name, "teacher") for name in METHODS if name != "sft"],
)
def test_a_loss_that_is_not_finite_stops_and_leaves_the_student_as_it_was(name: str, reader: str, value: float) -> None:
    pair = tiny_pair(dtype=torch.float32, tie_word_embeddings=False)

    def poison() -> None:
        model: Any = pair.student if reader == "student" else teacher_of(pair)
        with torch.no_grad():
            model.get_input_embeddings().weight[RARE, 0] = value  # only one row reads it

    said = fails_at_step_three(pair, METHODS[name](context(fixed(ROWS))), poison)
    assert "step 3" in said
    assert ", ".join(r.id for r in ROWS) in said
    assert "weights were not changed" in said


@pytest.mark.parametrize("name", ["kd", "distillm"])
def test_a_poisoned_hidden_state_stops_too(name: str) -> None:
    pair = tiny_pair(dtype=torch.float32)

    def poison() -> None:
        model: Any = teacher_of(pair)
        with torch.no_grad():
            model.model.norm.weight[3] = float("inf")

    assert "step 3" in fails_at_step_three(pair, METHODS[name](context(fixed(ROWS))), poison)


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is() -> None:
    pair = tiny_pair(dtype=torch.float32)

    def poison() -> None:
        next(iter(pair.student.parameters())).register_hook(lambda gradient: gradient * float("inf"))

    said = fails_at_step_three(pair, METHODS["sft"](context(fixed(ROWS))), poison)
    assert "gradient norm" in said
    assert "cross_entropy" not in said.splitlines()[0]


def test_of_a_large_batch_the_message_names_the_first_rows_and_the_error_holds_all() -> None:
    pair = tiny_pair(dtype=torch.float32)
    rows = [row(i) for i in range(20)]

    def poison() -> None:
        with torch.no_grad():
            pair.student.get_parameter("model.norm.weight").fill_(float("nan"))

    error = failure_at_step_three(pair, METHODS["sft"](context(fixed(rows))), poison)
    assert "row:15, ..." in str(error)
    assert "row:16" not in str(error)
    assert error.rows == [r.id for r in rows]


@pytest.mark.parametrize("rows", [[], prompts(3, 4)], ids=["no_rows", "no_targets"])
def test_validation_on_nothing_is_an_error_and_no_perfect_score(rows: list[Example]) -> None:
    with pytest.raises(DataError, match="validat"):
        validate(tiny_pair(), rows, State(), divergence="forward_kl", batch_size=2)
