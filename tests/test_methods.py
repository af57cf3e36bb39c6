"""Every method: its objective against a naive computation, and its gradient against an exact one by enumeration."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distillm import policy_gradient as policy_gradient_module
from distillm.divergences import DIVERGENCES, Bucketed
from distillm.generation import Mixture, Sampling, generate
from distillm.losses import distill
from distillm.methods import METHODS, Method
from distillm.policy_gradient import policy_gradient
from distillm.scoring import Pair
from distillm.types import Example, Layout, State, answer
from naive import as_drawn, logits_before, next_token_laws
from rows import NUM_TOKENS, context, fixed, one_step, pair_of, row, teacher_of, tiny_pair, tokens
from tiny import tiny_model

ROWS = [row(0, 3, 5), row(1, 9, 2), row(2, 2, 7, teacher_context=tokens(70, 5)), row(3, 4, 3)]


def writer(pair: Pair) -> Any:
    def write(
        prompts: Sequence[Example],
        state: State,
        *,
        writer: Any = "student",
        teacher_mix: float = 0.0,
        steps: Sequence[int] | None = None,
        keep_log_probs: bool = False,
    ) -> list[Example]:
        model: Any = pair.student if writer == "student" else teacher_of(pair)
        mixture = Mixture(teacher_of(pair), teacher_mix) if teacher_mix else None  # pyright: ignore[reportArgumentType]
        return generate(
            model,
            prompts,
            Sampling(6),
            layout=pair.layout_for(writer),
            end_ids=[1],
            num_tokens=NUM_TOKENS,
            step=state.step,
            origin=writer,
            mixture=mixture,
            steps=steps,
            keep_log_probs=keep_log_probs,
        )

    return write


def laws(pair: Pair, example: Example) -> list[tuple[int, Tensor, Tensor]]:
    """Each target token, ``log p`` without gradients, ``log q``."""
    with torch.no_grad():
        teacher = next_token_laws(teacher_of(pair), example.teacher_context or example.prompt, example)
    student = next_token_laws(pair.student, example.prompt, example)
    return [(token, p, q) for (token, p), (_, q) in zip(teacher, student, strict=True)]


def mean_divergence(name: str, pair: Pair, rows: Sequence[Example], **parameters: float) -> Tensor:
    return torch.stack([DIVERGENCES[name](p, q, **parameters) for r in rows for _, p, q in laws(pair, r)]).mean()


def mean_cross_entropy(pair: Pair, rows: Sequence[Example]) -> Tensor:
    return torch.stack([-q[token] for r in rows for token, _, q in laws(pair, r)]).mean()


def hot(pair: Pair, rows: Sequence[Example]) -> Tensor:
    """KL at temperature 2, times 4, over the teacher's three likeliest tokens and the rest."""
    values = list[Tensor]()
    for r in rows:
        for _, p, q in laws(pair, r):
            p, q = (p / 2).softmax(-1), (q / 2).softmax(-1)
            kept = p.topk(3).indices
            p, q = (torch.cat([x[kept], 1 - x[kept].sum(0, keepdim=True)]) for x in (p, q))
            values.append(4 * (p * (p / q).log()).sum())
    return torch.stack(values).mean()


def mixed_with_cross_entropy(pair: Pair, rows: Sequence[Example]) -> Tensor:
    return 0.3 * mean_divergence("forward_kl", pair, rows) + 0.7 * mean_cross_entropy(pair, rows)


def policy(pair: Pair, rows: Sequence[Example], *, normalize: bool = True, clip: float | None = 0.2) -> Tensor:
    """MiniLLM's loss, a token at a time; the gradient of its long part is that of ``gained * log q(y_t)``."""
    values = list[Tensor]()
    for r in rows:
        assert r.log_probs is not None
        found = laws(pair, r)
        rewards = [(p[token] - q[token]).item() for token, p, q in found]
        for t, (token, p, q) in enumerate(found):
            ratio = math.exp(q[token].item() - r.log_probs[t])
            later = rewards[t + 1 :]
            returns = sum(later) / (max(len(later), 1) if normalize else 1)
            gained, held = ratio * returns, False
            if clip is not None:
                bounded = min(max(ratio, 1 - clip), 1 + clip) * returns
                held = bounded < gained
                gained = min(gained, bounded)
            slope = torch.zeros(()) if held else gained * (q[token] - q[token].detach())
            values.append(ratio * (q.exp() * (q - p)).sum() - gained - slope)
    return torch.stack(values).mean()


def pairs(pair: Pair, rows: Sequence[Example], *, skew: Callable[[Example, float], float], b: float) -> Tensor:
    """DistiLLM-2's loss: means over tokens, then over rows."""
    parts: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for r in rows:
        found = laws(pair, r)
        p_mean = math.exp(sum(p[token].item() for token, p, _ in found) / len(found))
        q_mean = math.exp(sum(q[token].item() for token, _, q in found) / len(found))
        alpha = skew(r, p_mean - q_mean if r.origin == "teacher" else q_mean - p_mean)
        name = "skew_kl" if r.origin == "teacher" else "skew_reverse_kl"
        parts[r.origin].append(torch.stack([DIVERGENCES[name](p, q, alpha=alpha) for _, p, q in found]).mean())
    return (1 - b) * torch.stack(parts["teacher"]).mean() + b * torch.stack(parts["student"]).mean()


Naive = Callable[[Pair, Sequence[Example]], Tensor]
CASES: dict[str, tuple[str, dict[str, Any], Naive]] = {
    "sft": ("sft", {}, mean_cross_entropy),
    "seqkd": ("seqkd", {}, mean_cross_entropy),
    "kd": ("kd", {}, partial(mean_divergence, "forward_kl")),
    "kd_weight": ("kd", {"kd_weight": 0.3}, mixed_with_cross_entropy),
    "kd_hot_top_k": ("kd", {"temperature": 2.0, "temperature_squared": True, "top_k": 3}, hot),
    "imitkd": ("imitkd", {}, partial(mean_divergence, "forward_kl")),
    "gkd": ("gkd", {"student_fraction": 1.0}, partial(mean_divergence, "jsd", beta=0.1)),
    "gkd_on_data": ("gkd", {"student_fraction": 0.0}, partial(mean_divergence, "jsd", beta=0.1)),
    "minillm": ("minillm", {}, policy),
    "minillm_plain": (
        "minillm",
        {"clip": None, "length_normalization": False},
        partial(policy, normalize=False, clip=None),
    ),
    "distillm": ("distillm", {"initial_probability": 1.0}, partial(mean_divergence, "skew_kl", alpha=0.1)),
    "distillm2": ("distillm2", {}, partial(pairs, skew=lambda _, __: 0.1, b=0.5)),
}  # fmt: skip


def gradients(loss: Tensor, pair: Pair) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(pair.student.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, pair.student.parameters(), strict=True)]


def method_of(name: str, pair: Pair, settings: dict[str, Any]) -> Method:
    return METHODS[name](context(fixed(ROWS), writer(pair)), **settings)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_each_method_is_the_naive_one_however_it_is_split(case: str, kind: str) -> None:
    name, settings, naive = CASES[case]
    pair = tiny_pair(kind, teacher_kind=kind)
    origins = {"minillm": {"student"}, "imitkd": {"student"}, "distillm2": {"teacher", "student"}}.get(name)
    for size in (1, 2, 100):
        step, found = one_step(pair, method_of(name, pair, settings), size)
        if size == 1:
            loss = naive(pair, step.rows)
            wanted = gradients(loss, pair)
            assert origins is None or {r.origin for r in step.rows} == origins
        assert step.loss == pytest.approx(loss.item(), rel=1e-6)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_every_method_has_a_case() -> None:
    assert {name for name, _, _ in CASES.values()} == set(METHODS)


def test_distillm2_gives_each_response_its_own_skew_after_the_first_epoch() -> None:
    pair = tiny_pair("gpt2", teacher_kind="gpt2")
    method = method_of("distillm2", pair, {})
    state = State(step=3, total_steps=4)  # the second of two epochs of two steps
    usual = {"teacher": 0.02, "student": 0.01}
    for origin, c in usual.items():
        state.observe(f"first_gap_{origin}", 5 * c, 5)
    drawn = method.source(state)
    seen = set[float]()

    def skew(r: Example, gap: float) -> float:
        seen.add(min(max(1 - 0.9 * usual[r.origin] / gap, 0.01), 0.1))
        return min(max(1 - 0.9 * usual[r.origin] / gap, 0.01), 0.1)

    scored = pair.score(drawn.rows, state, with_teacher=True)
    loss = sum(
        t.weight(state) * t.total(scored.only(t.origins)) / t.count(drawn.rows) for t in method.loss if t.weight(state)
    )
    assert isinstance(loss, Tensor)
    assert loss.item() == pytest.approx(pairs(pair, drawn.rows, skew=skew, b=1.0).item(), rel=1e-6)
    assert len(seen) > 1


def test_distillm2_takes_the_usual_gap_from_the_first_epoch_alone() -> None:
    pair = tiny_pair("gpt2", teacher_kind="gpt2")
    from rows import Recorder, steps_of

    state, seen = State(total_steps=4), list[float]()
    for step in steps_of(pair, method_of("distillm2", pair, {}), Recorder(pair.student.parameters()), state, 0.01):
        assert ("first_gap_student" in step.figures) == (step.step <= 2)
        seen.append(step.figures["gap_student"])
    assert state.mean("first_gap_student") == pytest.approx(sum(seen[:2]) / 2)


# Every response over a small vocabulary, so that expectations are sums.

END, LONGEST, SMALL = 1, 3, 4


@pytest.fixture(name="small", scope="module", params=["gpt2", "t5"])
def small_pair(request: pytest.FixtureRequest) -> Pair:
    student, teacher = (tiny_model(request.param, vocab_size=SMALL, layers=1, seed=seed).double() for seed in (3, 4))
    with torch.no_grad():  # the laws of fresh models are all but uniform
        for model in (student, teacher):
            model.get_input_embeddings().weight.mul_(6.0)
    return pair_of(student, teacher, num_tokens=SMALL)


PROMPT = Example("p", [2, 3, 2], [False] * 3)


def responses(begun: tuple[int, ...] = ()) -> Iterator[list[int]]:
    if begun and (begun[-1] == END or len(begun) == LONGEST):
        yield list(begun)
        return
    for token in range(SMALL):
        yield from responses((*begun, token))


def log_laws(pair: Pair, response: list[int]) -> tuple[Tensor, Tensor]:
    """``log p`` (no gradients) and ``log q`` of the response's tokens."""
    chosen = torch.tensor(response)[:, None]
    with torch.no_grad():
        p = logits_before(teacher_of(pair), PROMPT.tokens, response)[:-1].log_softmax(-1).gather(-1, chosen)[:, 0]
    return p, logits_before(pair.student, PROMPT.tokens, response)[:-1].log_softmax(-1).gather(-1, chosen)[:, 0]


def total_of(loss: Any, pair: Pair, example: Example) -> Tensor:
    (term,) = loss
    return term.total(pair.score([example], State(total_steps=4), with_teacher=True))


def test_the_enumeration_is_complete(small: Pair) -> None:
    mass = sum(log_laws(small, y)[1].sum().exp().item() for y in responses())
    assert mass == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("mix", [0.0, 0.2, 0.7])
def test_minillm_has_the_exact_gradient_of_the_sequence_level_reverse_kl(small: Pair, mix: float) -> None:
    """Length normalisation and clipping off, full-product importance weights; for any share of the teacher's."""
    loss = policy_gradient(importance="product", length_normalization=False, clip=None)
    exact, estimated = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for y in responses():
        log_p, log_q = log_laws(small, y)
        exact = exact + log_q.sum().exp() * (log_q.sum() - log_p.sum())
        drawn = (mix * log_p.exp() + (1 - mix) * log_q.detach().exp()).log()
        example = answer(PROMPT, y, "student", log_probs=drawn.tolist())
        estimated = estimated + drawn.sum().exp() * total_of(loss, small, example)
    wanted, found = gradients(exact, small), gradients(estimated, small)
    assert max(float(w.abs().max()) for w in wanted) > 1e-2
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "parameters"), [("jsd", {"beta": 0.1}), ("skew_kl", {"alpha": 0.1}), ("skew_reverse_kl", {"alpha": 0.1})]
)
def test_on_policy_gradients_hold_the_probability_of_responses_constant(
    small: Pair, name: str, parameters: dict[str, float]
) -> None:
    loss = distill(name, **parameters)
    exact, found = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for y in responses():
        example = answer(PROMPT, y, "student")
        weight = log_laws(small, y)[1].sum().exp().detach()
        with torch.no_grad():
            p = logits_before(teacher_of(small), PROMPT.tokens, y)[:-1].log_softmax(-1)
        q = logits_before(small.student, PROMPT.tokens, y)[:-1].log_softmax(-1)
        exact = exact + weight * DIVERGENCES[name](p, q, **parameters).sum()
        found = found + weight * total_of(loss, small, example)
    for one, other in zip(gradients(found, small), gradients(exact, small), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gemma2", "t5", "bart"])
def test_teacher_mixed_sampling_draws_from_the_mixture_whatever_the_batch(kind: str) -> None:
    pair = tiny_pair(kind, torch.float32, kind)
    prompts = [row(i, length, 0) for i, length in enumerate((2, 9, 5))]
    write = partial(writer(pair), teacher_mix=0.4, keep_log_probs=True)
    together = write(prompts, State())
    for prompt, drawn in zip(prompts, together, strict=True):
        alone = write([prompt], State())[0]
        assert alone.tokens == drawn.tokens
        assert drawn.log_probs is not None
        assert len(drawn.log_probs) == len(drawn.response)
        mixed = [(token, (0.4 * p.exp() + 0.6 * q.exp()).log()) for token, p, q in laws(pair, drawn)]
        wanted = [as_drawn(pair.student, law).log_softmax(-1)[token].item() for token, law in mixed]
        assert drawn.log_probs == pytest.approx(wanted, abs=1e-4)
    assert together != writer(pair)(prompts, State())


@pytest.mark.parametrize("importance", ["token", "product"])
@pytest.mark.parametrize("drawn", [-300.0, 0.0, -1e-3])
def test_ratios_that_leave_the_range_of_float32_give_no_nan(importance: Any, drawn: float) -> None:
    pair = tiny_pair("gpt2", torch.float32)
    with torch.no_grad():
        pair.student.get_input_embeddings().weight.mul_(3e3)  # pyright: ignore[reportCallIssue, reportOperatorIssue]
    example = answer(row(0, 4, 0), tokens(5, 6), "student", log_probs=[drawn] * 6)
    loss = policy_gradient(importance=importance, length_normalization=True, clip=0.2)
    value = total_of(loss, pair, example)
    assert not value.isnan()
    assert not any(g.isnan().any() for g in gradients(value, pair)) or not value.isfinite()


def test_the_ratio_of_a_long_response_stays_within_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400
    log_q, sequence = torch.full((count,), -1.0), torch.zeros(count, dtype=torch.long)
    scored: Any = SimpleNamespace(log_probs=log_q - 0.35, sequence=sequence, labels=sequence, figures={})
    monkeypatch.setattr(policy_gradient_module, "response_log_probs", lambda _: (log_q - 0.5, log_q))
    found = policy_gradient_module.weigh(scored, "product", length_normalization=True, clip=0.2)
    for values in (found.single, found.long, found.value):
        assert values.isfinite().all()


def test_kept_log_probabilities_are_those_of_the_decoding_that_was_used() -> None:
    pair = tiny_pair("gpt2", torch.float32)
    prompt = row(0, 4, 0)
    settings: dict[str, Any] = {"layout": Layout(0), "end_ids": [1], "num_tokens": NUM_TOKENS, "keep_log_probs": True}
    model: Any = pair.student
    (drawn,) = generate(model, [prompt], Sampling(5, temperature=0.5), **settings)
    wanted = [(q / 0.5).log_softmax(-1)[token].item() for token, q in next_token_laws(model, prompt.prompt, drawn)]
    assert drawn.log_probs == pytest.approx(wanted, abs=1e-4)
    (greedy,) = generate(model, [prompt], Sampling(5, temperature=0), **settings)
    assert greedy.log_probs == [0.0] * len(greedy.response)


def test_cross_entropy_beside_a_divergence_reads_no_student_rows() -> None:
    pair = tiny_pair("gpt2")
    method = METHODS["gkd"](context(fixed(ROWS), writer(pair)), kd_weight=0.5, student_fraction=1.0)
    step, _ = one_step(pair, method)
    assert set(step.terms) == {"jsd"}
    step, _ = one_step(pair, METHODS["gkd"](context(fixed(ROWS)), kd_weight=0.5, student_fraction=0.0))
    assert set(step.terms) == {"jsd", "cross_entropy"}


def test_merging_tokens_never_raises_a_divergence() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(50, 12, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2))
    for name in ("forward_kl", "reverse_kl", "skew_kl", "jsd", "total_variation"):
        whole = DIVERGENCES[name](p, q)
        values = [Bucketed(DIVERGENCES[name], k)(p, q) for k in (1, 3, 7, 11, 12, 40)]
        for coarse, finer in zip(values, [*values[1:], whole], strict=True):
            assert (coarse <= finer + 1e-12).all()
        torch.testing.assert_close(values[-1], whole)
    with pytest.raises(ValueError, match="top_k is 0; give at least 1"):
        Bucketed(DIVERGENCES["forward_kl"], 0)
