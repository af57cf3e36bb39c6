"""The loss of a step, written out: one row at a time, full logits, one token at a time. Slow, and plain to see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distillm.scoring import Pair
from distillm.types import Example
from rows import NUM_TOKENS, teacher_of
from tiny import layout_for


def next_token_laws(model: torch.nn.Module, context: list[int], example: Example) -> list[tuple[int, Tensor]]:
    """Each target token and the log-probabilities with which the model expected it."""
    laws = list[tuple[int, Tensor]]()
    full = logits_before(model, context, example.response)
    for i, token in enumerate(example.response):
        if example.targets[example.start + i]:
            laws.append((token, full[i, :NUM_TOKENS].log_softmax(-1)))
    return laws


def logits_before(model: Any, context: list[int], response: list[int]) -> Tensor:
    """The logits before each token of ``response``, and those after it: one row in one pass, without padding."""
    layout = layout_for(model)
    if not layout.start:
        return model(input_ids=torch.tensor([context + response])).logits[0, len(context) - 1 :]
    decoder = torch.tensor([[*layout.start, *response]])
    return model(input_ids=torch.tensor([[*context, *layout.close]]), decoder_input_ids=decoder).logits[0]


def as_drawn(model: Any, logits: Tensor) -> Tensor:
    """``logits`` ``[..., V]`` of the tokens that are generated: an encoder-decoder never writes its padding."""
    logits = logits[..., :NUM_TOKENS].clone()
    if layout_for(model).start:
        logits[..., layout_for(model).pad_id] = -torch.inf
    return logits


def divergence(name: str, p: Tensor, q: Tensor, alpha: float) -> Tensor:
    if name == "skew_reverse_kl":
        mixed = (alpha * q.exp() + (1 - alpha) * p.exp()).log()
        return (q.exp() * (q - mixed)).sum()
    mixed = q if name == "forward_kl" else (alpha * p.exp() + (1 - alpha) * q.exp()).log()
    return (p.exp() * (p - mixed)).sum()


def cross_entropy_of(pair: Pair, rows: Sequence[Example]) -> Tensor:
    """Mean over the target tokens of ``rows``."""
    values = [-q[token] for r in rows for token, q in next_token_laws(pair.student, r.prompt, r)]
    return torch.stack(values).mean()


def divergence_of(pair: Pair, rows: Sequence[Example], name: str, alpha: float = 0.1) -> Tensor:
    """Mean over the target tokens of ``rows``."""
    values = list[Tensor]()
    for r in rows:
        with torch.no_grad():
            teacher = next_token_laws(teacher_of(pair), r.teacher_context or r.prompt, r)
        student = next_token_laws(pair.student, r.prompt, r)
        for (token, p), (same, q) in zip(teacher, student, strict=True):
            assert token == same
            values.append(divergence(name, p, q, alpha))
    return torch.stack(values).mean()
