"""One draw: its law, its corners, and the filters before it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distillm.generation import BLOCK, Sampling, draw, filtered, uniforms

CORNERS = [0.0, 5e-324, 0.5, 0.9999999999999999, 1.0]
LAW = torch.tensor([0.0, 0.3, 0.01, 0.0, 0.2, 0.04, 0.15, 0.02, 0.08, 0.1, 0.06, 0.04])  # the last one is possible


def repeated(logits: Tensor, us: list[float]) -> Tensor:
    return draw(logits.expand(len(us), -1), torch.tensor(us, dtype=torch.float64))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([-math.inf, -1e4, -90.0, -3.0, 0.0, 1.0, 80.0]), min_size=1, max_size=30))
@example([-math.inf, 0.0, -math.inf])
@example([-1e4, 0.0, -1e4])
@example([0.0, -30.0, -math.inf])
def test_a_token_of_probability_zero_is_never_drawn(values: list[float]) -> None:
    assume(max(values) > -math.inf)
    logits = torch.tensor([values])
    chosen = repeated(logits, CORNERS)
    assert bool((logits.softmax(-1)[0, chosen] > 0).all())
    possible = logits.softmax(-1)[0].nonzero()[:, 0]
    assert chosen[0] == possible[0]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 3 * BLOCK + 2), st.floats(0, 1))
def test_a_draw_inverts_the_cumulative_distribution(seed: int, size: int, u: float) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 3
    law = logits.softmax(-1)[0].tolist()
    below, expected = 0.0, size - 1
    for token, mass in enumerate(law):
        below += mass
        assume(abs(below - u * sum(law)) > 1e-6 or token == size - 1)  # sums of blocks are float32
        if below > u * sum(law):
            expected = token
            break
    assert repeated(logits, [u]).tolist() == [expected]


def test_every_row_has_its_own_draw_and_a_large_vocabulary_loses_no_mass() -> None:
    vocabulary = 150_000
    logits = torch.zeros(3, vocabulary)
    u = torch.tensor([0.25, 0.5, 0.999999], dtype=torch.float64)
    assert draw(logits, u).tolist() == pytest.approx((u * vocabulary).tolist(), abs=1)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_the_last_token_is_drawn_at_the_edge_of_a_block(size: int) -> None:
    logits = torch.full((1, size), -torch.inf)
    logits[0, -1] = 0.0
    assert repeated(logits, CORNERS).tolist() == [size - 1] * len(CORNERS)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    seen = expected > 0
    assert int(counts[~seen].sum()) == 0
    return float(((counts - expected)[seen] ** 2 / expected[seen]).sum())


def test_draws_have_the_law_of_the_softmax_and_of_multinomial() -> None:
    num_draws, degrees_9 = 40_000, 27.88  # the 99.9 % point of chi-square: ten tokens are possible
    us = np.concatenate([uniforms(0, step, "row:0", 200) for step in range(200)]).tolist()
    ours = torch.bincount(repeated(LAW.log()[None], us), minlength=12).double()
    assert chi_square(ours, LAW.double() * num_draws) < degrees_9
    generator = torch.Generator().manual_seed(0)
    theirs = torch.bincount(torch.multinomial(LAW, num_draws, True, generator=generator), minlength=12).double()
    assert chi_square(theirs, LAW.double() * num_draws) < degrees_9
    together = (ours + theirs) / 2
    assert chi_square(ours, together) + chi_square(theirs, together) < degrees_9


def test_the_law_of_filtered_draws() -> None:
    sampling = Sampling(temperature=2.0, top_k=6, top_p=0.8)
    us = uniforms(3, 0, "row:1", 30_000).tolist()
    kept = naive_kept(LAW.log().tolist(), sampling)
    assert kept is not None
    assert sorted(kept) == [1, 4, 6, 8, 9]  # six by rank, then the mass before the sixth exceeds 0.8
    law = torch.tensor([LAW[i].sqrt() if i in kept else 0.0 for i in range(12)], dtype=torch.float64)
    counts = torch.bincount(repeated(filtered(LAW.log()[None], sampling), us), minlength=12).double()
    assert chi_square(counts, law / law.sum() * 30_000) < 18.47  # 4 degrees of freedom


# ---------------------------------------------------------------------------------------------------------- filters


def naive_kept(logits: list[float], sampling: Sampling) -> set[int] | None:
    """The tokens left by temperature, top-k (ties stay) and top-p (of equal ones the lower ids stay).

    None where a mass meets the bound of top-p so closely that rounding decides.
    """
    z: list[float] = (torch.tensor(logits) / sampling.temperature).tolist()  # in float32, where ties are made
    kept = set(range(len(z)))
    if 0 < sampling.top_k < len(z):
        kth = sorted(z, reverse=True)[sampling.top_k - 1]
        kept = {i for i in kept if z[i] >= kth}
    if sampling.top_p < 1:
        total, before, nucleus = sum(math.exp(z[i]) for i in kept), 0.0, set[int]()
        for i in sorted(kept, key=lambda i: (-z[i], i)):
            if before >= sampling.top_p:
                break
            nucleus.add(i)
            before += math.exp(z[i]) / total
            if abs(before - sampling.top_p) < 1e-5:
                return None
        kept = nucleus
    return kept


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]) | st.floats(-8, 8, width=32), min_size=1, max_size=40),
    st.integers(0, 45),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-4]),
    st.sampled_from([1.0, 0.5, 3.0]),
)
@example([0.0] * 40, 0, 0.51, 1.0)
@example([1.0] * 40, 7, 1.0, 1.0)
@example([0.0, 7.0, 1.401298464324817e-45], 0, 0.9, 3.0)  # a tie, once divided
def test_filters_keep_what_a_naive_reimplementation_keeps(
    values: list[float], top_k: int, top_p: float, temperature: float
) -> None:
    sampling = Sampling(1, temperature, top_k, top_p)
    logits = torch.tensor([values, [0.0] * len(values)])  # a second row, that rows do not mix
    out = filtered(logits, sampling)[0]
    kept = naive_kept(values, sampling)
    assume(kept is not None)
    assert kept is not None
    assert set(out.isfinite().nonzero()[:, 0].tolist()) == kept
    assert torch.equal(out[sorted(kept)], logits[0, sorted(kept)] / temperature)
    assert bool((out[~out.isfinite()] == -math.inf).all())


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filtered(logits, Sampling()), logits)
    assert torch.equal(filtered(logits, Sampling(top_k=50)), logits)
    assert torch.equal(filtered(logits, Sampling(top_k=500)), logits)
    assert filtered(logits, Sampling(top_k=1)).isfinite().sum(-1).tolist() == [1] * 4
    assert filtered(logits, Sampling(top_p=1e-9)).isfinite().sum(-1).tolist() == [1] * 4
