"""Where two models differ: a student's answers token by token, with what its teacher would have written there."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data import pieces, text_of
from ..heads import eval_mode
from ..processes import share, together
from ..scoring import Pair
from ..sharding import whole
from ..train import micro_batches
from ..types import Example, State
from .fidelity import blocks, known_part, log_probs

COLUMNS = ("divergence", "teacher", "student", "choice", "p", "q")


def token_rows(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Example], *, batch_size: int = 8
) -> dict[int, dict[str, Any]]:
    """By its place in ``answers`` a record of each that has a target token, with lists of one entry for each of them.

    ``tokens``: their texts, as ``pieces`` gives them. ``divergence``: ``KL(teacher || student)`` over the next token
    at that place, in nats; None where it is infinite. ``written``: the token's probability for the teacher and for
    the student. ``choice``: the text of the teacher's likeliest token; ``chosen``: the probabilities of that one.
    Beside them ``id`` and ``origin``. Several processes share the answers. Nothing is kept in ``pair.cache``: these
    rows are read once.
    """
    pair = replace(pair, cache=None)
    found: dict[int, dict[str, Any]] = {}
    places = {id(example): number for number, example in enumerate(answers)}
    with torch.no_grad(), eval_mode(pair.student), whole(pair.student):
        mine = [example for example in share(answers) if any(example.targets)]
        for part in pair.in_step(micro_batches(mine, batch_size, pair.device)):
            scored = pair.score(part, State(), with_teacher=True)
            assert scored.teacher is not None
            columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
            for rows in blocks(scored.student):
                p, q = log_probs(scored.teacher, rows), log_probs(scored.student, rows)
                _collect(columns, p, q, known_part("forward_kl", scored.teacher)(p, q), scored.labels[rows])
            sequence, labels = scored.sequence.tolist(), scored.labels.tolist()
            for index, example in enumerate(part):
                at = [place for place, number in enumerate(sequence) if number == index]
                if at:
                    own = {name: [values[place] for place in at] for name, values in columns.items()}
                    record = _record(tokenizer, [labels[place] for place in at], own)
                    found[places[id(example)]] = {"id": example.id, "origin": example.origin, **record}
    told = together(lambda: found)
    merged = {number: record for each in told for number, record in each.items()}
    return {number: merged[number] for number in sorted(merged)}


def _collect(columns: dict[str, list[float]], p: Tensor, q: Tensor, divergence: Tensor, labels: Tensor) -> None:
    """Add the figures of a block of tokens: ``p``, ``q`` ``[n, V]`` are log-probabilities, ``labels`` ``[n]``."""
    top, choice = p.max(-1)
    columns["divergence"] += divergence.clamp(min=0).tolist()
    columns["choice"] += choice.tolist()
    columns["p"] += top.exp().tolist()
    columns["q"] += q.gather(-1, choice[:, None])[:, 0].exp().tolist()
    columns["teacher"] += p.gather(-1, labels[:, None])[:, 0].exp().tolist()
    columns["student"] += q.gather(-1, labels[:, None])[:, 0].exp().tolist()


def _record(tokenizer: PreTrainedTokenizerBase, labels: list[int], own: dict[str, list[float]]) -> dict[str, Any]:
    def pairs(teacher: str, student: str) -> list[list[float | None]]:
        return [[_short(p), _short(q)] for p, q in zip(own[teacher], own[student], strict=True)]

    return {
        "tokens": pieces(tokenizer, labels),
        "divergence": [_short(value) for value in own["divergence"]],
        "written": pairs("teacher", "student"),
        "choice": [text_of(tokenizer, [int(token)]) for token in own["choice"]],
        "chosen": pairs("p", "q"),
    }


def _short(value: float) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
