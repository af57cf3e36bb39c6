"""Generation: each row has its own stream, modes and settings are left as they were, end tokens end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from distillm.generation import Mixture, Sampling, eval_mode, filtered, generate, truncated, uniforms
from distillm.types import Example, Layout
from naive import as_drawn, logits_before
from rows import NUM_TOKENS, prompts, row, tokens
from tiny import layout_for, tiny_causal, tiny_model

KINDS = ["llama", "gpt2", "opt", "t5", "bart"]
SAMPLINGS = {
    "greedy": Sampling(8, temperature=0.0),
    "sampled": Sampling(8),
    "filtered": Sampling(8, temperature=1.7, top_k=20, top_p=0.9),
}
MODELS: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    if kind not in MODELS:
        MODELS[kind] = tiny_model(kind, vocab_size=NUM_TOKENS + 3, seed=3)
    return MODELS[kind]


def written(model: Any, rows: Sequence[Example], sampling: Sampling, **changes: Any) -> list[Example]:
    options: dict[str, Any] = {
        "layout": layout_for(model),
        "end_ids": [1],
        "num_tokens": NUM_TOKENS,
        "seed": 5,
        "step": 2,
    }
    return generate(model, rows, sampling, **options | changes)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_row_does_not_depend_on_its_batch(kind: str, sampling: Sampling) -> None:
    model, rows = model_of(kind), prompts(3, 9, 1, 5, 5, 12, 7)
    alone = [written(model, [r], sampling)[0] for r in rows]
    assert [r.id for r in alone] == [r.id for r in rows]
    assert written(model, rows, sampling) == alone
    assert written(model, rows[::-1], sampling) == alone[::-1]
    for size in (1, 2, 3):
        assert written(model, rows, sampling, batch_size=size) == alone
    longer = [row(50, 90, 0), *rows, row(51, 1, 0)]  # the others are now mostly padding
    assert written(model, longer, sampling)[1:-1] == alone
    assert written(model, rows[2:4], sampling) == alone[2:4]
    # BART's bias makes one token the likeliest of every row.
    assert len({tuple(r.response) for r in alone}) > 1 or (kind == "bart" and sampling.temperature == 0)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_plain_loop_of_whole_forward_passes(kind: str, sampling: Sampling) -> None:
    """No cache, no padding, no batch, and one number of the row's stream for each position."""
    model, rows = model_of(kind), prompts(4, 1, 9)
    for r, got in zip(rows, written(model, rows, sampling, end_ids=[]), strict=True):
        ids = list[int]()
        for u in uniforms(5, 2, r.id, 8):
            with torch.no_grad():
                logits = as_drawn(model, logits_before(model, r.tokens, ids)[-1:])
            if sampling.temperature == 0:
                ids.append(int(logits.argmax()))
            else:
                law = filtered(logits, sampling).double().softmax(-1)[0]
                ids.append(int((law.cumsum(0) <= u).sum()))
        assert got.response == ids


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_with_any_token_gives_the_same_rows(kind: str) -> None:
    rows = prompts(2, 11, 6)
    for pad in (1, 7, NUM_TOKENS + 1):  # 1 is the end token
        assert written(model_of(kind), rows, Sampling(8), layout=Layout(pad)) == written(
            model_of(kind), rows, Sampling(8)
        )


def test_the_same_seed_step_and_id_give_the_same_tokens_and_others_give_others() -> None:
    model, rows = model_of("llama"), [Example(f"row:{i}", tokens(1, 4), [False] * 4) for i in range(4)]
    first = [r.response for r in written(model, rows, Sampling(8))]
    assert [r.response for r in written(model, rows, Sampling(8))] == first
    assert len({tuple(r) for r in first}) == 4  # one prompt, four streams
    for change in ({"seed": 6}, {"step": 3}):
        assert all(r.response != f for r, f in zip(written(model, rows, Sampling(8), **change), first, strict=True))
    greedy = {tuple(r.response) for r in written(model, rows, Sampling(8, temperature=0.0))}
    assert len(greedy) == 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_that_have_ended_leave_the_batch(kind: str, mixed: bool) -> None:
    model, rows = model_of(kind), prompts(*range(1, 17))
    mixture = Mixture(tiny_model(kind, vocab_size=NUM_TOKENS + 3, seed=9), 0.3) if mixed else None
    ends, sizes = list(range(2, 8)), list[int]()
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    try:
        together = written(model, rows, Sampling(24), end_ids=ends, mixture=mixture, keep_log_probs=True)
    finally:
        handle.remove()
    alone = [written(model, [r], Sampling(24), end_ids=ends, mixture=mixture, keep_log_probs=True)[0] for r in rows]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    lengths = [len(r.response) for r in together]
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    # At no token are there more than twice as many rows as are still written.
    assert all(size <= max(1, 2 * sum(length > at for length in lengths)) for at, size in enumerate(sizes))
    assert len(sizes) == max(lengths)


def test_streams_belong_to_their_key() -> None:
    assert np.array_equal(uniforms(1, 2, "a", 3), uniforms(1, 2, "a", 9)[:3])
    keys = [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (12, 2, "a"), (1, 22, "a"), (1, 2, "2/a"), (1, 2, "")]
    assert len({float(uniforms(*key, 1)[0]) for key in keys}) == len(keys)
    assert uniforms(0, 0, "train:0", 2).tolist() == [
        0.5772524237306871,
        0.3485738506918392,
    ]  # on any machine and version
    many = np.concatenate([uniforms(0, step, f"row:{i}", 5) for step in range(20) for i in range(100)])
    assert 0 <= many.min() < many.max() < 1
    counts = np.bincount((many * 20).astype(int), minlength=20)
    assert ((counts - 500) ** 2 / 500).sum() < 43.82  # chi-square, 19 degrees of freedom, 99.9 %


def test_fewer_new_tokens_are_the_beginning_of_more() -> None:
    rows = prompts(3, 5)
    long = written(model_of("llama"), rows, Sampling(12), end_ids=[])
    short = written(model_of("llama"), rows, Sampling(5), end_ids=[])
    assert [r.response for r in short] == [r.response[:5] for r in long]


def test_the_first_token_has_the_models_own_distribution() -> None:
    model, count = model_of("gpt2"), 3000
    prompt = tokens(4, 6)
    rows = [Example(f"row:{i}", prompt, [False] * 6) for i in range(count)]
    found = written(model, rows, Sampling(1), batch_size=count)
    with torch.no_grad():
        law = model(input_ids=torch.tensor([prompt])).logits[0, -1, :NUM_TOKENS].softmax(-1)
    counts = torch.bincount(torch.tensor([r.response[0] for r in found]), minlength=NUM_TOKENS)
    assert float(((counts - count * law) ** 2 / (count * law)).sum()) < 73.40  # 40 degrees of freedom, 99.9 %


def test_the_padding_of_the_vocabulary_is_never_sampled() -> None:
    wide, rows = tiny_causal("llama", vocab_size=NUM_TOKENS + 9, seed=3, tie_word_embeddings=False), prompts(3, 6, 2, 9)
    narrow = tiny_causal("llama", vocab_size=NUM_TOKENS, seed=3, tie_word_embeddings=False)
    with torch.no_grad():
        weights = {k: v[:NUM_TOKENS] if v.shape[0] == NUM_TOKENS + 9 else v for k, v in wide.state_dict().items()}
        narrow.load_state_dict(weights)
        wide.lm_head.weight[NUM_TOKENS:] = 3 * wide.lm_head.weight[:9] - wide.lm_head.weight[9:18]  # now likely
    for sampling in (Sampling(10), Sampling(10, temperature=0.0), Sampling(10, top_p=0.8)):
        assert written(wide, rows, sampling) == written(narrow, rows, sampling)
    free = written(wide, rows, Sampling(10), num_tokens=NUM_TOKENS + 9)
    assert max(max(r.response) for r in free) >= NUM_TOKENS


@settings(deadline=None, max_examples=12)
@given(st.sets(st.integers(2, NUM_TOKENS - 1), max_size=12), st.booleans())
def test_a_response_stops_at_any_end_token_and_keeps_the_one_that_occurred(ends: set[int], pad_is_end: bool) -> None:
    model, rows, sampling = model_of("llama"), prompts(3, 5, 8), Sampling(10)
    pad = min(ends) if ends and pad_is_end else 0
    endless = written(model, rows, sampling, end_ids=[])
    assert all(len(r.response) == 10 for r in endless)
    for got, whole in zip(
        written(model, rows, sampling, end_ids=sorted(ends), layout=Layout(pad)), endless, strict=True
    ):
        at = next((i for i, token in enumerate(whole.response) if token in ends), None)
        assert got.response == (whole.response if at is None else whole.response[: at + 1])
        assert truncated(got, sorted(ends)) == (at is None)
        assert got.targets == [False] * len(got.prompt) + [True] * len(got.response)


def test_a_response_without_any_token_counts_as_cut() -> None:
    assert truncated(Example("a", [], []), [1])
    assert not truncated(Example("a", [3, 1], [False, True]), [1, 2])


def test_what_is_written_says_by_whom_and_when() -> None:
    rows = [row(1, 4, 3, teacher_context=tokens(8, 6))]
    student, teacher = (
        written(model_of("llama"), rows, Sampling(6), origin=origin)[0] for origin in ("student", "teacher")
    )
    assert (student.id, student.origin, student.born) == ("row:1", "student", 2)
    assert teacher.origin == "teacher"
    assert student.prompt == teacher.prompt == rows[0].prompt  # not the response that the row had
    assert student.teacher_context == rows[0].teacher_context
    seen = Example("row:1", tokens(8, 6), [False] * 6)
    assert teacher.response == written(model_of("llama"), [seen], Sampling(6))[0].response != student.response


def test_progress_is_told_after_each_batch() -> None:
    told = list[int]()
    written(model_of("llama"), prompts(2, 3, 4, 5, 6), Sampling(2), batch_size=2, progress=told.append)
    assert told == [2, 4, 5]
    assert written(model_of("llama"), [], Sampling(2), progress=told.append) == []


# ------------------------------------------------------------------------------------------------- modes and settings


def mixed_modes(model: Any) -> list[bool]:
    """Put the modules of ``model`` in different modes, and say which."""
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 1
    return [module.training for module in model.modules()]


def test_sampling_is_in_eval_mode_and_every_modules_mode_is_restored() -> None:
    dropping = tiny_causal("gpt2", vocab_size=NUM_TOKENS, seed=3, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    plain = tiny_causal("gpt2", vocab_size=NUM_TOKENS, seed=3)
    rows, modes = prompts(3, 9, 4), mixed_modes(dropping)
    state = torch.get_rng_state()
    assert written(dropping, rows, Sampling(8)) == written(plain, rows, Sampling(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in dropping.modules()] == modes
    assert True in modes
    assert False in modes


def test_modes_and_settings_are_restored_when_generation_fails() -> None:
    model, calls = tiny_causal("gpt2", vocab_size=NUM_TOKENS), list[int]()
    modes, kept = mixed_modes(model), model.generation_config

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("out of luck")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="out of luck"):
        written(model, prompts(3, 4), Sampling(8), end_ids=[])
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is kept


def test_eval_mode_nests() -> None:
    model = tiny_causal("gpt2").train()
    with eval_mode(model):
        with eval_mode(model):
            pass
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


UNWANTED: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0},
    {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1},
    {"bad_words_ids": [[i] for i in range(2, 30)]},
    {"suppress_tokens": list(range(2, 30)), "begin_suppress_tokens": [30]},
    {"min_new_tokens": 8, "no_repeat_ngram_size": 1},
    {"max_length": 4, "eos_token_id": list(range(40)), "pad_token_id": 3},
    {"forced_eos_token_id": 9, "forced_bos_token_id": 8, "exponential_decay_length_penalty": (1, 9.0)},
    {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    {"sequence_bias": [[[5], 50.0]], "renormalize_logits": True},
]


@pytest.mark.parametrize("unwanted", UNWANTED, ids=[next(iter(u)) for u in UNWANTED])
def test_the_models_own_generation_settings_have_no_influence_and_stay(unwanted: dict[str, Any]) -> None:
    model, rows = tiny_causal("llama", vocab_size=NUM_TOKENS + 3, seed=3), prompts(3, 6, 2)
    kept = model.generation_config = GenerationConfig(**unwanted)
    before = kept.to_dict()
    for sampling in (Sampling(8), Sampling(8, temperature=0.0)):
        assert written(model, rows, sampling) == written(model_of("llama"), rows, sampling)
    assert model.generation_config is kept
    assert kept.to_dict() == before
