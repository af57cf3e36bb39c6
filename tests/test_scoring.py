"""Two models read the same rows: what comes out is aligned, narrowed to the shared tokens, and selectable."""

from typing import Any

import pytest
import torch

from distillm.kernels import logits
from distillm.losses import RESPONSES, TEXT
from distillm.types import Example, State
from rows import NUM_TOKENS, row, teacher_of, text_row, tiny_pair, tokens

STATE = State()


def naive_logits(model: torch.nn.Module, context: list[int], example: Example) -> list[torch.Tensor]:
    """The model's own logits before each target of the row, read alone and without padding."""
    response, marks = example.response, example.targets[example.start :]
    with torch.no_grad():
        full = model(input_ids=torch.tensor([context + response])).logits[0, :, :NUM_TOKENS]
    return [full[len(context) + i - 1] for i, mark in enumerate(marks) if mark]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_both_heads_hold_the_models_own_logits_of_the_same_targets(kind: str) -> None:
    pair = tiny_pair(kind)
    gaps = Example("chat", tokens(3, 8), [False, False, True, True, False, False, True, True])
    rows = [row(0, 5, 3), gaps, row(1, 2, 6, teacher_context=tokens(8, 9)), text_row(0, 7), row(2, 4, 0)]
    scored = pair.score(rows, STATE, with_teacher=True)
    student = [z for r in rows for z in naive_logits(pair.student, r.prompt, r)]
    assert scored.teacher is not None
    teacher = [z for r in rows for z in naive_logits(teacher_of(pair), r.teacher_context or r.prompt, r)]
    # Gemma-2 computes its norms in float32 whatever its own type, and how they round depends on the batch.
    rounding = {"atol": 1e-5, "rtol": 1e-5} if kind == "gemma2" else {}
    torch.testing.assert_close(logits(scored.student), torch.stack(student), **rounding)
    torch.testing.assert_close(logits(scored.teacher), torch.stack(teacher))
    marked = [[t for t, mark in zip(r.tokens, r.targets, strict=True) if mark] for r in rows]
    assert scored.labels.tolist() == [t for r in marked for t in r]
    assert scored.sequence.tolist() == [i for i, r in enumerate(marked) for _ in r]
    assert scored.origins == ("data", "data", "data", "text", "data")


def test_the_teacher_is_read_only_when_asked_for_and_without_gradients() -> None:
    pair = tiny_pair()
    assert pair.score([row(0)], STATE, with_teacher=False).teacher is None
    scored = pair.score([row(0)], STATE, with_teacher=True)
    assert scored.teacher is not None
    assert not scored.teacher.hidden.requires_grad
    assert scored.student.hidden.requires_grad


def test_only_keeps_the_target_tokens_of_the_origins_asked_for() -> None:
    pair = tiny_pair()
    rows = [row(0, 3, 2), text_row(0, 4), row(1, 2, 0), row(2, 2, 3, "student"), text_row(1, 3)]
    scored = pair.score(rows, STATE, with_teacher=True)
    assert scored.only(RESPONSES | TEXT) is scored
    for origins, chosen in ((RESPONSES, [0, 2, 3]), (TEXT, [1, 4]), (frozenset({"student"}), [3])):
        part = scored.only(origins)
        alone = pair.score([rows[i] for i in chosen], STATE, with_teacher=True)
        assert part.labels.tolist() == alone.labels.tolist()
        assert part.teacher is not None
        assert alone.teacher is not None
        torch.testing.assert_close(part.student.hidden, alone.student.hidden)
        torch.testing.assert_close(part.teacher.hidden, alone.teacher.hidden)
        assert {scored.origins[i] for i in part.sequence.tolist()} <= origins


# An OPT whose embeddings are narrower than its layers feeds its head bfloat16; the others' last norms give float32.
MIXED = [("llama", {}), ("gpt2", {}), ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False})]


@pytest.mark.parametrize(("kind", "config"), MIXED)
def test_under_mixed_precision_hidden_states_and_weights_have_one_type(kind: str, config: dict[str, Any]) -> None:
    pair, rows = tiny_pair(kind, torch.float32, **config), [row(0, 4, 5), row(1, 2, 3)]
    exact = logits(pair.score(rows, STATE, with_teacher=True).student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = pair.score(rows, STATE, with_teacher=True)
    for head in (scored.student, scored.teacher):
        assert head is not None
        assert head.weight is not None
        assert head.weight.dtype == head.hidden.dtype
    assert (scored.student.hidden.dtype == torch.bfloat16) == (kind == "opt")
    torch.testing.assert_close(logits(scored.student).float(), exact, atol=0.1, rtol=0.1)
    logits(scored.student).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pair.student.parameters())
