"""The named divergences against an exact reference, their identities, and rule 1: never NaN."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillm.divergences import (
    DIVERGENCES,
    adaptive_kl,
    alpha_beta,
    forward_kl,
    head_share,
    jsd,
    kl,
    mixture,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    symmetric_kl,
)

INF = math.inf
WEIGHT_OF = {"jsd": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha", "symmetric_kl": "weight"}
EXTREME_LOGITS = {
    "far apart": ([1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]),
    "both peaked": ([1e4, -1e4, -1e4], [1e4, -1e4, 0.0]),
    "no mass in the teacher": ([0.0, 1.0, -INF], [0.5, 0.0, 0.0]),
    "no mass in the student": ([0.5, 0.0, 0.0], [0.0, 1.0, -INF]),
    "no mass in both": ([0.0, 1.0, -INF], [0.5, 0.0, -INF]),
    "no mass in each": ([0.0, -INF, 1.0, -INF], [0.5, 0.0, -INF, -INF]),
    "underflowed teacher, no mass in the student": ([1e4, 0.0], [0.0, -INF]),
    "underflowed student, no mass in the teacher": ([0.0, -INF], [1e4, 0.0]),
    "nothing shared": ([-INF, 0.0], [0.0, -INF]),
}


def exact_kl(a: list[Decimal], b: list[Decimal]) -> Decimal:
    if any(y == 0 < x for x, y in zip(a, b, strict=True)):
        return Decimal("Infinity")
    return sum((x * (x / y).ln() for x, y in zip(a, b, strict=True) if x > 0), Decimal(0))


def exact(name: str, log_p: Tensor, log_q: Tensor, weight: float) -> float:
    """The true value, in arithmetic whose exponent cannot underflow here."""
    p, q = ([Decimal(0) if x == -INF else Decimal(x).exp() for x in row.tolist()] for row in (log_p, log_q))
    if name == "alpha_beta":
        return exact_alpha_beta(p, q, 0.2, 0.7)
    if name == "adaptive_kl":
        return exact_adaptive_kl(p, q)
    w = Decimal(weight)
    m = [w * x + (1 - w) * y for x, y in zip(p, q, strict=True)]
    reverse_m = [w * y + (1 - w) * x for x, y in zip(p, q, strict=True)]
    terms = {
        "forward_kl": lambda: [(Decimal(1), exact_kl(p, q))],
        "reverse_kl": lambda: [(Decimal(1), exact_kl(q, p))],
        "jsd": lambda: [(w, exact_kl(p, m) if w else Decimal(0)), (1 - w, exact_kl(q, m) if w < 1 else Decimal(0))],
        "skew_kl": lambda: [(Decimal(1), exact_kl(p, m))],
        "skew_reverse_kl": lambda: [(Decimal(1), exact_kl(q, reverse_m))],
        "total_variation": lambda: [(Decimal("0.5"), sum(abs(x - y) for x, y in zip(p, q, strict=True)))],
        "symmetric_kl": lambda: [(1 - w, exact_kl(p, q)), (w, exact_kl(q, p))],
    }[name]()
    return float(sum((c * value for c, value in terms if c), Decimal(0)))


def exact_alpha_beta(p: list[Decimal], q: list[Decimal], a: float, b: float) -> float:
    alpha, beta = Decimal(a), Decimal(b)
    total = alpha + beta

    def power(x: Decimal, e: Decimal) -> Decimal:
        return x**e if x else Decimal(0)

    terms = [
        (alpha * power(x, total) + beta * power(y, total)) / total - power(x, alpha) * power(y, beta)
        for x, y in zip(p, q, strict=True)
    ]
    return float(sum(terms, Decimal(0)) / (alpha * beta))


def exact_adaptive_kl(p: list[Decimal], q: list[Decimal]) -> float:
    head, mass = set[int](), Decimal(0)
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= Decimal("0.5"):
            break
        head.add(i)
        mass += p[i]
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    w = sum((gaps[i] for i in head), Decimal(0)) / sum(gaps) if sum(gaps) > Decimal("1e-300") else Decimal("0.5")
    parts = [(w, exact_kl(p, q)), (1 - w, exact_kl(q, p))]
    return float(sum((c * value for c, value in parts if c > Decimal("1e-13")), Decimal(0)))


def call(name: str, p: Tensor, q: Tensor, weight: float | Tensor) -> Tensor:
    return DIVERGENCES[name](p, q, **{WEIGHT_OF[name]: weight} if name in WEIGHT_OF else {})


def log_probabilities(seed: int, spread: float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return p.log_softmax(-1), q.log_softmax(-1)


random_pairs = st.builds(
    log_probabilities,
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 10.0, 1000.0]),
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
)
weights = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize("name", DIVERGENCES)
@given(pair=random_pairs, weight=weights)
@settings(deadline=None, max_examples=15)
def test_values_are_the_definitions_and_not_negative(name: str, pair: tuple[Tensor, Tensor], weight: float) -> None:
    p, q = pair
    values = call(name, p, q, weight)
    assert values.shape == p.shape[:-1]
    assert (values >= -1e-12).all()
    expected = [exact(name, *rows, weight) for rows in zip(p, q, strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(call(name, p, p, weight), torch.zeros_like(values), rtol=0, atol=1e-12)


@given(pair=random_pairs, weight=weights)
@settings(deadline=None, max_examples=30)
def test_identities(pair: tuple[Tensor, Tensor], weight: float) -> None:
    p, q = pair
    assert torch.equal(skew_kl(p, q, 0.0), forward_kl(p, q))
    assert torch.equal(skew_reverse_kl(p, q, 0.0), reverse_kl(p, q))
    torch.testing.assert_close(reverse_kl(p, q), forward_kl(q, p))
    if 0 < weight < 1:
        whole = weight * skew_kl(p, q, weight) + (1 - weight) * skew_reverse_kl(p, q, 1 - weight)
        torch.testing.assert_close(jsd(p, q, weight), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", EXTREME_LOGITS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits(name: str, case: str, dtype: torch.dtype) -> None:
    for weight in (0.0, 0.1, 0.5, 1.0):
        logits = [torch.tensor(z, dtype=dtype, requires_grad=True) for z in EXTREME_LOGITS[case]]
        log_p, log_q = (z.log_softmax(-1) for z in logits)
        value = call(name, log_p, log_q, weight)
        expected = exact(name, log_p.detach(), log_q.detach(), weight)
        torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=1e-6)
        value.backward()
        for z in logits:
            assert z.grad is not None
            assert z.grad.isfinite().all(), (weight, z.grad)
        rows = torch.tensor([[weight]], dtype=dtype)
        torch.testing.assert_close(call(name, log_p[None], log_q[None], rows), value[None])


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0, torch.tensor([[0.0], [0.3], [1.0]], dtype=torch.float64)])
def test_gradcheck(name: str, weight: float | Tensor) -> None:
    pair = [x.requires_grad_() for x in log_probabilities(0, 2.0, (3, 5))]
    assert torch.autograd.gradcheck(lambda p, q: call(name, p, q, weight), pair)
    assert torch.autograd.gradcheck(
        lambda p, q: call(name, p.log_softmax(-1), q.log_softmax(-1), weight),
        [x.detach().requires_grad_() for x in pair],
    )


def test_an_infinite_entry_has_no_gradient_and_leaves_the_others_theirs() -> None:
    a = torch.tensor([0.5, 0.5]).log().requires_grad_()
    b = torch.tensor([1.0, 0.0]).log().requires_grad_()
    value = kl(a, b)
    value.backward()
    assert value.item() == INF
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(b.grad, torch.tensor([-0.5, 0.0]))
    torch.testing.assert_close(a.grad, torch.tensor([0.5 * (math.log(0.5) + 1), 0.0]))


def test_mixture_of_nothing_is_nothing_and_its_gradient_zero() -> None:
    a = torch.tensor([-INF, 0.0]).requires_grad_()
    mixed = mixture(a, torch.tensor([-INF, -INF]), 0.25)
    assert mixed.tolist() == [-INF, pytest.approx(math.log(0.25))]
    mixed[1].backward()
    assert a.grad is not None
    assert a.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", WEIGHT_OF)
def test_weights_out_of_range_are_refused(name: str) -> None:
    p, q = log_probabilities(0, 1.0, (2, 2))
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"{WEIGHT_OF[name]} is {weight}; give a number from 0 to 1"):
            call(name, p, q, weight)
        with pytest.raises(ValueError, match=rf"{WEIGHT_OF[name]} holds .*; give numbers from 0 to 1"):
            call(name, p, q, torch.tensor([[0.5], [weight]]))
    with pytest.raises(ValueError, match=r"has shape \(2,\); give one per row"):
        call(name, p, q, torch.tensor([0.1, 0.2]))


@given(pair=random_pairs, exponent=st.floats(0.1, 2.0))
@settings(deadline=None, max_examples=30)
def test_alpha_beta_has_the_kls_as_its_ends_and_its_limits_are_limits(
    pair: tuple[Tensor, Tensor], exponent: float
) -> None:
    p, q = pair
    torch.testing.assert_close(alpha_beta(p, q, 1, 0), forward_kl(p, q), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha_beta(p, q, 0, 1), reverse_kl(p, q), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha_beta(p, q, 0, exponent), alpha_beta(q, p, exponent, 0))
    if p.min() > -20 and q.min() > -20:
        near = alpha_beta(p, q, exponent, 1e-6)
        torch.testing.assert_close(alpha_beta(p, q, exponent, 0), near, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.4), (1.3, 0.2)])
def test_alpha_beta_gradcheck(alpha: float, beta: float) -> None:
    pair = [x.requires_grad_() for x in log_probabilities(0, 2.0, (3, 5))]
    assert torch.autograd.gradcheck(lambda p, q: alpha_beta(p, q, alpha, beta), pair)


def test_alpha_beta_and_adaptive_kl_refuse_what_they_cannot_take() -> None:
    p, q = log_probabilities(0, 1.0, (2, 3))
    for alpha, beta in ((-0.1, 1.0), (1.0, -0.1), (0.0, 0.0)):
        with pytest.raises(ValueError, match="give numbers of at least 0 that are not both 0"):
            alpha_beta(p, q, alpha, beta)
    for mass in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"head_mass is {mass}; give a number between 0 and 1"):
            adaptive_kl(p, q, mass)


def test_adaptive_kl_is_a_symmetric_kl_whose_weights_are_held_constant() -> None:
    p, q = log_probabilities(3, 2.0, (4, 9))
    share = head_share(p.exp(), q.exp(), 0.5)
    assert ((share > 0) & (share < 1)).all()
    leaves = [q.clone().requires_grad_() for _ in range(2)]
    adaptive_kl(p, leaves[0]).sum().backward()
    symmetric_kl(p, leaves[1], 1 - share).sum().backward()
    assert leaves[0].grad is not None
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_the_head_ends_with_the_token_that_completes_its_mass() -> None:
    p = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    q = torch.tensor([[0.1, 0.3, 0.5, 0.1]])
    # 0.4 is less than half and 0.4 + 0.3 more: the head is the first two tokens.
    assert head_share(p, q, 0.5).item() == pytest.approx((0.2 + 0.1) / 0.6)
    assert head_share(p, q, 0.3).item() == pytest.approx(0.1 / 0.6)
    assert head_share(p, p, 0.5).item() == 0.5
