"""The loop: a step has the naive loss and gradient however it is split; rates, clipping, end tokens, validation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distillm import losses
from distillm.generation import Sampling, generate, truncated
from distillm.heads import packing
from distillm.methods import Method, distillm, kd, sft, with_text
from distillm.readers import LocalTeacher
from distillm.schedules import learning_rate
from distillm.sources import dataset
from distillm.train import micro_batches, parameter_groups, validate
from distillm.types import Example, Layout, State
from naive import cross_entropy_of, divergence_of
from rows import (
    NUM_TOKENS,
    Recorder,
    context,
    fixed,
    one_step,
    pair_of,
    prompts,
    row,
    steps_of,
    teacher_of,
    text_row,
    tiny_pair,
    tokens,
)
from tiny import tiny_causal

GAPS = Example("chat", tokens(77, 9), [False, False, True, True, False, False, True, False, True])
ROWS = [row(0, 3, 5), row(1, 9, 1), GAPS, row(2, 2, 7, teacher_context=tokens(70, 5)), row(3, 6, 0), row(4, 1, 3)]
TEXT = [text_row(0, 11), text_row(1, 4), text_row(2, 7)]
TEXT_WEIGHT = 0.3


def answering(pair: Any, prompts_: Sequence[Example], state: State, **_: Any) -> list[Example]:
    return generate(
        pair.student, prompts_, Sampling(6), layout=Layout(0), end_ids=[1], num_tokens=NUM_TOKENS, step=state.step
    )


def build(name: str, pair: Any) -> Method:
    data = context(fixed(ROWS), partial(answering, pair))
    methods: dict[str, Callable[[], Method]] = {
        "sft": lambda: sft(data),
        "kd": lambda: kd(data, kd_weight=0.5),
        "distillm": lambda: distillm(data, initial_probability=1.0, alpha=0.2),
        "distillm_reverse": lambda: distillm(data, divergence="skew_reverse_kl"),
    }
    return methods[name]()


def naive_loss(name: str, pair: Any, rows: Sequence[Example]) -> Tensor:
    if name == "sft":
        return cross_entropy_of(pair, rows)
    if name == "kd":
        return 0.5 * divergence_of(pair, rows, "forward_kl") + 0.5 * cross_entropy_of(pair, rows)
    if name == "distillm":
        return divergence_of(pair, rows, "skew_kl", 0.2)
    return divergence_of(pair, rows, "skew_reverse_kl", 0.1)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("text", [False, True], ids=["alone", "with_text"])
@pytest.mark.parametrize("name", ["sft", "kd", "distillm", "distillm_reverse"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_is_the_naive_one_however_it_is_split(kind: str, name: str, text: bool, packed: bool) -> None:
    # Everything is float64, but llama's norms are float32 inside, whatever the model's type.
    relative, absolute = (1e-8, 1e-12) if kind == "gpt2" else (1e-4, 1e-7)
    pair = tiny_pair(kind, teacher_kind=kind)
    if packed:
        assert isinstance(pair.teacher, LocalTeacher)
        pair.teacher.reader = packing(pair.teacher.reader)
        pair = replace(pair, read_student=packing(pair.read_student))
    for size in (1, 2, 3, 100):
        method = build(name, pair)
        method = with_text(method, fixed(TEXT), TEXT_WEIGHT) if text else method
        step, gradients = one_step(pair, method, size)
        if size == 1:
            responses = [r for r in step.rows if r.origin != "text"]
            loss = naive_loss(name, pair, responses)
            loss = loss + TEXT_WEIGHT * cross_entropy_of(pair, TEXT) if text else loss
            expected = torch.autograd.grad(loss, list(pair.student.parameters()))
        assert step.loss == pytest.approx(loss.item(), rel=absolute)
        assert step.batch == ("generated" if name == "distillm" else "dataset")
        for actual, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=relative, atol=absolute)
            assert float(wanted.norm()) > 1e-3  # nothing to compare otherwise
        norm = torch.stack([g.norm() for g in expected]).norm()
        assert step.grad_norm == pytest.approx(float(norm), rel=relative)


def test_each_term_is_divided_by_its_own_count() -> None:
    pair = tiny_pair()
    step, _ = one_step(pair, with_text(build("kd", pair), fixed(TEXT), TEXT_WEIGHT), 2)
    assert step.counts == {"forward_kl": 20, "cross_entropy": 20, "text": 10 + 3 + 6}
    assert step.terms["cross_entropy"] == pytest.approx(cross_entropy_of(pair, ROWS).item())
    assert step.terms["forward_kl"] == pytest.approx(divergence_of(pair, ROWS, "forward_kl").item())
    assert step.terms["text"] == pytest.approx(cross_entropy_of(pair, TEXT).item())
    weighted = 0.5 * step.terms["forward_kl"] + 0.5 * step.terms["cross_entropy"] + TEXT_WEIGHT * step.terms["text"]
    assert step.loss == pytest.approx(weighted)
    assert step.tokens == sum(len(r.tokens) for r in ROWS + TEXT)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from(["cpu", "cuda"]))
def test_micro_batches_are_cut_where_it_costs_least(lengths: list[int], size: int, device: str) -> None:
    rows = [Example(str(n), [5] * length, [True] * length) for n, length in enumerate(lengths)]
    longest = sorted(lengths, reverse=True)
    overhead = 32 if device == "cpu" else 2048

    def cost(parts: list[list[int]]) -> int:
        return sum(part[0] * len(part) + overhead for part in parts)

    def cuts(left: list[int]) -> Iterator[list[list[int]]]:
        if not left:
            yield []
        for count in range(1, min(size, len(left)) + 1):
            yield from ([left[:count], *rest] for rest in cuts(left[count:]))

    found = [[len(row.tokens) for row in part] for part in micro_batches(rows, size, torch.device(device))]
    assert [length for part in found for length in part] == longest
    assert cost(found) == min(map(cost, cuts(longest)))


def test_micro_batches_hold_each_row_once_in_bounds_and_text_apart() -> None:
    rows = [*ROWS, *TEXT]
    for size in (1, 2, 4, 100):
        packed = micro_batches(rows, size, torch.device("cpu"), packed=True)
        assert len(packed) == -(-len(ROWS) // size) - (-len(TEXT) // size)
        parts = micro_batches(rows, size, torch.device("cpu"))
        assert sorted(r.id for part in packed for r in part) == sorted(r.id for r in rows)
        assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in rows)
        assert all(0 < len(part) <= size for part in parts)
        assert all(len({r.origin == "text" for r in part}) == 1 for part in parts)


# ------------------------------------------------------------------------------------- nothing is computed for nothing


def counted(module: Any) -> list[int]:
    calls = list[int]()
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("method", "teacher_calls"),
    [(sft, 0), (partial(kd, kd_weight=0.0), 0), (partial(kd, kd_weight=0.5), 2), (kd, 2), (distillm, 2)],
    ids=["sft", "kd_0", "kd_0.5", "kd_1", "distillm"],
)
def test_the_teacher_is_called_only_where_a_term_reads_it(method: Any, teacher_calls: int) -> None:
    pair = tiny_pair()
    teacher, student = counted(teacher_of(pair)), counted(pair.student)
    step, _ = one_step(pair, with_text(method(context(fixed(ROWS))), fixed(TEXT), 0.5), 3)
    assert len(teacher) == teacher_calls  # six response rows in threes; text is never the teacher's
    assert len(student) == 3
    assert "text" in step.terms


def test_terms_of_weight_zero_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("computed for nothing")

    student = counted(pair.student)
    monkeypatch.setattr(losses, "linear_cross_entropy", refuse)
    step, _ = one_step(pair, with_text(kd(context(fixed(ROWS)), kd_weight=1.0), fixed(TEXT), 0.0), 3)
    assert step.terms.keys() == step.counts.keys() == {"forward_kl"}
    assert len(student) == 2  # the text was not read


# --------------------------------------------------------------------------------------------- rates, clipping, modes


def test_each_step_uses_the_learning_rate_of_the_schedule() -> None:
    pair = tiny_pair()
    optimizer = Recorder(parameter_groups(pair.student, 0.1))
    assert len(optimizer.param_groups) == 2
    schedule = learning_rate(0.1, "cosine", 2, 0.001)
    state = State(total_steps=6)
    steps = list(steps_of(pair, build("sft", pair), optimizer, state, schedule))
    expected = [schedule(State(i, 6)) for i in range(6)]
    assert [s.lr for s in steps] == expected
    assert optimizer.rates == [[rate, rate] for rate in expected]
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
    assert state.step == 6


def test_training_goes_on_from_the_state_it_is_given() -> None:
    pair = tiny_pair()
    state = State(step=4, total_steps=6)
    steps = list(steps_of(pair, sft(context(dataset(ROWS, 2, 0))), Recorder(pair.student.parameters()), state, 0.0))
    assert [s.step for s in steps] == [5, 6]
    assert [s.rows for s in steps] == [tuple(dataset(ROWS, 2, 0)(State(i)).rows) for i in (4, 5)]


def test_gradients_are_clipped_to_the_norm_and_keep_their_direction() -> None:
    pair = tiny_pair()
    _, free = one_step(pair, build("kd", pair))
    norm = float(torch.stack([g.norm() for g in free]).norm())
    for limit in (norm / 7, norm * 7):
        optimizer = Recorder(pair.student.parameters())
        steps = steps_of(pair, build("kd", pair), optimizer, State(total_steps=1), 0.0, max_grad_norm=limit)
        assert next(steps).grad_norm == pytest.approx(norm)
        factor = min(1.0, limit / norm)
        clipped = torch.stack([g.norm() for g in optimizer.gradients[0]]).norm()
        assert float(clipped) == pytest.approx(norm * factor, rel=1e-5)
        for actual, whole in zip(optimizer.gradients[0], free, strict=True):
            torch.testing.assert_close(actual, whole * factor, rtol=1e-5, atol=1e-12)


def test_weights_decay_but_biases_and_norms_do_not() -> None:
    model = tiny_causal("gpt2")
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_student_trains_with_dropout_and_samples_without() -> None:
    pair = tiny_pair("gpt2", resid_pdrop=0.5)
    modes = list[bool]()
    pair.student.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    method = distillm(context(fixed(ROWS), partial(answering, pair)), initial_probability=1.0)
    assert one_step(pair, method)[0].batch == "generated"
    assert modes.index(True) >= 6  # the generation's forward passes
    assert all(modes[modes.index(True) :])
    assert not any(module.training for module in teacher_of(pair).modules())
    assert all(p.grad is None for p in teacher_of(pair).parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_passes_give_nearly_the_same_step_with_float32_gradients(kind: str) -> None:
    pair = tiny_pair(kind, torch.float32)
    (exact, wanted), (step, gradients) = (
        one_step(pair, build("kd", pair), mixed_precision=precision) for precision in ("no", "bf16")
    )
    assert step.loss == pytest.approx(exact.loss, rel=0.02)
    assert step.loss != exact.loss
    assert all(g.dtype == torch.float32 for g in gradients)
    a, b = (torch.cat([g.flatten() for g in part]) for part in (gradients, wanted))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.99


def test_nothing_in_the_environment_divides_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    step, wanted = one_step(pair, build("kd", pair))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again, gradients = one_step(pair, build("kd", pair))
    assert again.loss == step.loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


# ------------------------------------------------------------------------------------------------------ end tokens


def trained(rows: list[Example], pad_id: int) -> Any:
    pair = pair_of(tiny_causal("llama", vocab_size=NUM_TOKENS, seed=4), None, pad_id)
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=1.0)
    list(steps_of(pair, sft(context(fixed(rows))), optimizer, State(total_steps=50), 0.02, 2, 1.0))
    return pair.student


@pytest.mark.parametrize(("pad_id", "ends"), [(0, [1]), (1, [1]), (1, [1, 5, 7]), (5, [1, 5, 7])])
def test_end_tokens_are_learned_even_where_one_serves_as_padding(pad_id: int, ends: list[int]) -> None:
    lengths = [3, 1, 6, 2, 4, 5]
    rows = list[Example]()
    for i, length in enumerate(lengths):
        response = [20 + (i + j) % 9 for j in range(length)] + [ends[i % len(ends)]]
        rows.append(Example(f"row:{i}", [10 + i, 30 + i], [False] * 2))
        rows[-1] = Example(f"row:{i}", rows[-1].tokens + response, [False] * 2 + [True] * len(response))
    student = trained(rows, pad_id)
    greedy = Sampling(12, temperature=0.0)
    found = generate(student, rows, greedy, layout=Layout(pad_id), end_ids=ends, num_tokens=NUM_TOKENS)
    assert [r.response for r in found] == [r.response for r in rows]
    assert not any(truncated(r, ends) for r in found)
    cut = generate(
        student, rows, Sampling(4, temperature=0.0), layout=Layout(pad_id), end_ids=ends, num_tokens=NUM_TOKENS
    )
    assert [truncated(r, ends) for r in cut] == [length > 3 for length in lengths]
    assert all(not set(r.response) & set(ends) for r in cut if truncated(r, ends))


# ------------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_validation_is_the_naive_mean_per_token(batch_size: int) -> None:
    pair = tiny_pair("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    with torch.no_grad():
        expected = {
            "cross_entropy": cross_entropy_of(pair, ROWS).item(),
            "divergence": divergence_of(pair, ROWS, "skew_kl", 0.3).item(),
        }
    pair.student.train()
    result = validate(pair, ROWS, State(), divergence="skew_kl", batch_size=batch_size, alpha=0.3)
    assert result == pytest.approx(expected, rel=1e-9)


def test_validation_leaves_modes_generators_and_gradients_alone() -> None:
    pair = tiny_pair("gpt2", resid_pdrop=0.5)
    pair.student.train()
    for i, module in enumerate(pair.student.modules()):
        module.training = i % 2 == 0
    modes = [module.training for module in pair.student.modules()]
    state = torch.get_rng_state()
    validate(pair, ROWS, State(), divergence="forward_kl", batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in pair.student.modules()] == modes
    assert all(p.grad is None for p in pair.student.parameters())


def test_validation_without_a_teacher_has_no_divergence() -> None:
    pair = pair_of(tiny_causal("llama", vocab_size=NUM_TOKENS).double(), None)
    result = validate(pair, ROWS, State(), divergence="forward_kl", batch_size=2)
    assert result == pytest.approx({"cross_entropy": cross_entropy_of(pair, ROWS).item()})


def test_validation_skips_rows_without_targets() -> None:
    pair, bare = tiny_pair(), prompts(4, 2, 9)
    options: dict[str, Any] = {"divergence": "forward_kl", "batch_size": 2}
    assert validate(pair, ROWS + bare, State(), **options) == pytest.approx(validate(pair, ROWS, State(), **options))
