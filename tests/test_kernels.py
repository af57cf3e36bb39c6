"""The fused projections against the naive lines they stand for: value, gradients, FLOPs and memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distillm.divergences import DIVERGENCES, Divergence, mixture
from distillm.errors import ConfigError
from distillm.kernels import chunked, linear_cross_entropy, linear_divergence, logits, sweep
from distillm.kernels.closed_form import CLOSED_FORMS
from distillm.types import IGNORE, Head
from kernel_cases import (
    BUDGET,
    HEADS,
    SIZES,
    WEIGHT_OF,
    PeakMemory,
    flops,
    jeffreys_half,
    make_head,
    parameters_of,
    peak_beside_gradients,
    results,
    rounded,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_matches_eager(loss: Callable[..., tuple[Tensor, Tensor]], student: Head, **tolerance: float) -> None:
    expected = results(lambda: loss(impl="eager"), student)
    for actual, wanted in zip(
        results(lambda: loss(impl="chunked", byte_budget=BUDGET), student), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, **tolerance)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "divergence", [*DIVERGENCES, DIVERGENCES["skew_kl"], jeffreys_half], ids=lambda d: getattr(d, "__name__", d)
)
def test_chunked_is_eager(divergence: str | Divergence, sizes: tuple[int, int, int], head: dict[str, Any]) -> None:
    num_rows, num_tokens, width = sizes
    teacher = make_head(1, (num_rows, num_tokens, width + 2), bias=True, softcap=9.0)
    student = make_head(2, sizes, **head)
    weights = torch.rand(num_rows, dtype=torch.float64)
    assert_matches_eager(
        lambda **how: linear_divergence(divergence, teacher, student, weights, per_row=True, **how), student
    )
    assert all(x.grad is None for x in parameters_of(teacher))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_chunked_cross_entropy_is_eager(sizes: tuple[int, int, int], head: dict[str, Any]) -> None:
    num_rows, num_tokens, _ = sizes
    student, labels = make_head(3, sizes, **head), torch.randint(num_tokens, (num_rows,))
    labels[num_rows // 2] = IGNORE
    weights = torch.rand(num_rows, dtype=torch.float64)
    assert_matches_eager(lambda **how: linear_cross_entropy(student, labels, weights, per_row=True, **how), student)


def test_eager_is_the_naive_line() -> None:
    teacher, student = make_head(1, (4, 9, 3)), make_head(2, (4, 9, 5), bias=True, scale=0.5, softcap=2.0)
    assert student.weight is not None
    z = 2.0 * torch.tanh(0.5 * F.linear(student.hidden, student.weight, student.bias) / 2.0)
    torch.testing.assert_close(logits(student), z)
    weights = torch.rand(4, dtype=torch.float64)
    values = DIVERGENCES["jsd"](logits(teacher).log_softmax(-1), z.log_softmax(-1), beta=0.3)
    actual = linear_divergence("jsd", teacher, student, weights, impl="eager", beta=0.3)
    torch.testing.assert_close(actual, weights @ values)
    labels = torch.tensor([0, 3, IGNORE, 8])
    expected = sum(-w * row.log_softmax(-1)[y] for w, row, y in zip(weights, z, labels, strict=True) if y != IGNORE)
    torch.testing.assert_close(linear_cross_entropy(student, labels, weights, impl="eager"), expected)


@pytest.mark.parametrize("name", [*WEIGHT_OF, "user-written"])
def test_one_parameter_per_row(name: str) -> None:
    divergence, parameter = (name, WEIGHT_OF[name]) if name in WEIGHT_OF else (jeffreys_half, "power")
    teacher, student = make_head(1, (29, 31, 4)), make_head(2, (29, 31, 6), bias=True)
    weights = torch.rand(29, dtype=torch.float64)

    def loss(rows: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        return linear_divergence(divergence, teacher, student, weights, per_row=True, **{parameter: rows}, **how)

    for rows in (torch.linspace(0.01, 0.9, 29), torch.linspace(0, 1, 29), torch.tensor(0.2)):
        assert_matches_eager(partial(loss, rows.double()), student)
    _, values = loss(torch.arange(29).double() / 29)
    for n, value in enumerate(values):
        one = slice(n, n + 1)
        heads = [head._replace(hidden=head.hidden[one]) for head in (teacher, student)]
        alone = linear_divergence(divergence, *heads, torch.ones(1), **{parameter: n / 29})
        torch.testing.assert_close(alone, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_closed_forms_are_eager_at_extreme_logits(name: str, dtype: torch.dtype) -> None:
    inf = math.inf
    ends = torch.tensor([0.0, 1.0, 1e4, -1e4, -inf, -200.0, -90.0], dtype=dtype)
    rows = torch.cartesian_prod(ends, ends, ends)
    rows = rows[rows.isfinite().any(-1)][:: 7 if name == "forward_kl" else 11]
    p, q = (x.reshape(-1, 3) for x in (rows.repeat_interleave(len(rows), 0), rows.repeat(len(rows), 1)))
    weights = torch.ones(len(p), dtype=dtype)
    # A gradient q (log q/p - KL) loses digits where the logarithms reach 2e4.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    for weight in (0.0, 1e-3, 0.1, 0.5, 1.0) if name in WEIGHT_OF else (None,):
        student = Head(q.clone().requires_grad_(), None)
        loss = partial(linear_divergence, name, Head(p, None), student, weights, per_row=True)
        if weight is not None:
            loss = partial(loss, **{WEIGHT_OF[name]: weight})
        eager, fused = (results(partial(loss, impl=how), student) for how in ("eager", "chunked"))
        assert not fused[1].isnan().any()
        torch.testing.assert_close(fused[1], eager[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused[2], eager[2], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("head", [{}, {"bias": True, "scale": 1.7, "softcap": 3.0}, {"raw": True}], ids=str)
@pytest.mark.parametrize("top_k", [1, 5, 99, 100, 500])
@pytest.mark.parametrize("name", [*DIVERGENCES, "user-written"])
def test_buckets_are_eager_and_a_bucket_for_every_token_changes_nothing(
    name: str, top_k: int, head: dict[str, Any]
) -> None:
    divergence = jeffreys_half if name == "user-written" else name
    teacher, student = make_head(1, (13, 101, 5)), make_head(2, (13, 101, 6), **head)
    weights = torch.rand(13, dtype=torch.float64)
    loss = partial(linear_divergence, divergence, teacher, student, weights, per_row=True)
    assert_matches_eager(partial(loss, top_k=top_k), student)
    whole, coarse = loss()[1], loss(top_k=top_k)[1]
    assert torch.equal(whole, coarse) == (top_k >= 100)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.4), (0.3, 0.0)])
def test_exponents_of_alpha_beta(alpha: float, beta: float) -> None:
    teacher, student = make_head(1, (29, 31, 4)), make_head(2, (29, 31, 6), bias=True)
    weights = torch.rand(29, dtype=torch.float64)
    loss = partial(linear_divergence, "alpha_beta", teacher, student, weights, per_row=True, alpha=alpha, beta=beta)
    assert_matches_eager(loss, student)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_head_at_a_temperature_has_the_logits_divided_by_it(head: dict[str, Any]) -> None:
    cold = make_head(1, (5, 7, 3), **head)
    torch.testing.assert_close(logits(cold.at(2.5)), logits(cold) / 2.5)
    assert cold.at(1.0) is cold


def test_labels_without_mass() -> None:
    student = Head(torch.tensor([[0.0, -math.inf, 1e4], [1e4, -1e4, 0.0]], requires_grad=True), None)
    assert_matches_eager(
        lambda **how: linear_cross_entropy(student, torch.tensor([1, 1]), torch.ones(2), per_row=True, **how), student
    )


def errors_in(dtype: torch.dtype, loss: Callable[..., tuple[Tensor, Tensor]], student: Head, impl: str) -> list[float]:
    """Relative errors, against float32 on the same numbers, of the scalar, the values and the gradients."""
    exact = Head(*(None if x is None else x.detach().float().requires_grad_() for x in student[:3]))
    expected = results(lambda: loss(exact, impl="eager"), exact)
    actual = results(lambda: loss(student, impl=impl), student)
    assert all(a.dtype == dtype for a in actual[2:])
    return [((a.float() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_bfloat16_is_as_exact_as_eager(name: str) -> None:
    sizes = 67, 203, 16
    labels, weights = torch.randint(203, (67,)), torch.rand(67)

    def errors(seed: int, impl: str) -> list[float]:
        (teacher,), student = rounded(make_head(seed, sizes)), make_head(seed + 99, sizes, torch.bfloat16, bias=True)

        def loss(head: Head, **how: Any) -> tuple[Tensor, Tensor]:
            if name == "cross_entropy":
                return linear_cross_entropy(head, labels, weights, per_row=True, byte_budget=BUDGET, **how)
            return linear_divergence(name, teacher, head, weights, per_row=True, byte_budget=BUDGET, **how)

        return errors_in(torch.bfloat16, loss, student, impl)

    naive, fused = (torch.tensor([errors(seed, impl) for seed in range(4)]).mean(0) for impl in ("eager", "chunked"))
    assert (fused <= 1.2 * naive).all(), (fused, naive)


def test_autocast_makes_the_product_in_its_dtype() -> None:
    teacher, student = make_head(1, (23, 41, 5), torch.float32), make_head(2, (23, 41, 6), torch.float32, bias=True)
    weights = torch.ones(23)
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches_eager(
            lambda **how: linear_divergence("jsd", teacher, student, weights, per_row=True, **how),
            student,
            rtol=0.05,
            atol=0.05,
        )
        low = linear_divergence("jsd", teacher, student, weights, per_row=True)[1]
        assert torch.equal(low, linear_divergence("jsd", *rounded(teacher, student), weights, per_row=True)[1])
    assert not torch.equal(low, linear_divergence("jsd", teacher, student, weights, per_row=True)[1])


@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_no_rows_are_worth_nothing(impl: str) -> None:
    for student in (make_head(1, (0, 9, 4), bias=True), make_head(1, (0, 9, 4), raw=True)):
        losses = [
            linear_divergence("skew_kl", make_head(2, (0, 9, 3)), student, torch.zeros(0), impl=impl),
            linear_cross_entropy(student, torch.zeros(0, dtype=torch.long), torch.zeros(0), impl=impl),
        ]
        for loss in losses:
            assert loss.item() == 0
            assert all((g == 0).all() for g in torch.autograd.grad(loss, parameters_of(student)))


def test_a_second_backward_says_why_it_cannot_be() -> None:
    student = make_head(2, (3, 7, 2))
    loss = linear_divergence("jsd", make_head(1, (3, 7, 2)), student, torch.ones(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through a chunked loss"):
        loss.backward()


def test_bad_arguments_say_what_to_do() -> None:
    teacher, student, weights = make_head(1, (3, 7, 2)), make_head(2, (3, 7, 4)), torch.ones(3)
    with pytest.raises(ConfigError, match="unknown divergence 'skew_k'; did you mean 'skew_kl'"):
        linear_divergence("skew_k", teacher, student, weights)
    with pytest.raises(ConfigError, match="unknown implementation 'chunk'; did you mean 'chunked'"):
        linear_cross_entropy(student, torch.zeros(3, dtype=torch.long), weights, impl="chunk")  # pyright: ignore
    with pytest.raises(ValueError, match="teacher's head has 7 entries and the student's 6; narrow both"):
        linear_divergence("jsd", teacher, student.narrow(6), weights)
    with pytest.raises(ValueError, match=r"the student has 3 rows, weights has shape \(2,\)"):
        linear_divergence("jsd", teacher, student, weights[:2])
    with pytest.raises(ValueError, match="alpha is 2; give a number from 0 to 1"):
        linear_divergence("skew_kl", teacher, student, weights, alpha=2)
    with pytest.raises(ValueError, match="return one value per row"):
        linear_divergence(lambda p, q: (p - q).sum(), teacher, student, weights)


def test_named_functions_take_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CLOSED_FORMS) == set(DIVERGENCES.values())

    def refuse(*_: object) -> None:
        raise AssertionError("went through autograd")

    monkeypatch.setattr(chunked, "_by_autograd", refuse)
    teacher, student = make_head(1, (3, 7, 2)), make_head(2, (3, 7, 4))
    for function in DIVERGENCES.values():
        linear_divergence(function, teacher, student, torch.ones(3))
    with pytest.raises(AssertionError, match="went through autograd"):
        linear_divergence(jeffreys_half, teacher, student, torch.ones(3))


def test_the_flop_counter_counts_in_place_products() -> None:
    assert flops(lambda: torch.zeros(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5)).sum()) == 2 * 3 * 7 * 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, jeffreys_half])
def test_flops_are_the_least(divergence: str | Divergence, bias: bool) -> None:
    num_rows, num_tokens, teacher_width, width = 37, 101, 12, 5
    teacher = make_head(1, (num_rows, num_tokens, teacher_width))
    student = make_head(2, (num_rows, num_tokens, width), bias=bias)
    product, weights = 2 * num_rows * num_tokens, torch.ones(num_rows)

    def count(student: Head) -> int:
        return flops(lambda: linear_divergence(divergence, teacher, student, weights, byte_budget=BUDGET))

    assert student.weight is not None
    assert count(student) == product * (3 * width + teacher_width)
    assert count(student._replace(weight=student.weight.detach())) == product * (2 * width + teacher_width)
    with torch.no_grad():
        assert count(student) == product * (width + teacher_width)


def test_flops_of_cross_entropy() -> None:
    student, labels = make_head(2, (37, 101, 5)), torch.randint(101, (37,))
    assert flops(lambda: linear_cross_entropy(student, labels, torch.ones(37), byte_budget=BUDGET)) == 6 * 37 * 101 * 5


def test_peak_memory_is_counted() -> None:
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        del a, b
        torch.ones(500).exp_()
    assert memory.peak == 8000
    assert memory.live == {view.untyped_storage()._cdata: 4000}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [*DIVERGENCES, "cross_entropy", "user-written"])
def test_memory_stays_within_the_budget_as_rows_grow(loss: str, dtype: torch.dtype) -> None:
    num_tokens, budget = 2003, 2**20

    def peak(num_rows: int, impl: Any) -> int:
        sizes = num_rows, num_tokens, 4
        student, labels = make_head(2, sizes, dtype, softcap=20.0), torch.zeros(num_rows, dtype=torch.long)
        teacher, weights = make_head(1, sizes, dtype), torch.ones(num_rows)

        def run() -> Tensor:
            if loss == "cross_entropy":
                return linear_cross_entropy(student, labels, weights, impl=impl, byte_budget=budget)
            named = (lambda p, q: DIVERGENCES["jsd"](p, mixture(p, q, 0.1))) if loss == "user-written" else loss
            return linear_divergence(named, teacher, student, weights, impl=impl, byte_budget=budget)

        return peak_beside_gradients(run, student)

    per_row, per_gradient = 64, 2 * num_tokens * 4 * 4  # vectors [N]; the weight's gradient in two dtypes at the end
    small, large = peak(40, "chunked"), peak(640, "chunked")
    assert small > 0.3 * budget
    assert large <= budget + 640 * per_row + per_gradient
    assert peak(640, "eager") > 640 * num_tokens * 4


def test_the_budget_decides_the_chunks() -> None:
    student = make_head(1, (1000, 1003, 4), torch.float32)
    project = sweep.Projection(student)
    scorer = chunked.cross_entropy_scorer(torch.zeros(1000, dtype=torch.long), project)
    counts = [sweep.row_counts(scorer, project, 1000, budget) for budget in (1, 2**18, 2**20, None)]
    assert counts[0] == (1, 1)
    assert counts[-1][0] == 1000
    assert [c for c, _ in counts] == sorted(c for c, _ in counts)
