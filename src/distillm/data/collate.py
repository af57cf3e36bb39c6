"""``list[Example]`` -> ``Batch``: the only place where labels are aligned, and what a model reads is laid out."""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..types import IGNORE, Batch, Example


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    reader: Literal["student", "teacher"] = "student",
    seq2seq_start: int | None = None,
) -> Batch:
    """What one model reads, padded on the right to the longest row of the batch.

    Causal: the inputs are ``tokens[:-1]`` and ``labels[t] = tokens[t + 1]`` where that is a target, else IGNORE.
    With ``seq2seq_start`` (the decoder's first token) the tokens before the first target are the encoder's, the
    decoder reads ``[start, *response[:-1]]`` and ``labels[t] = response[t]``. The teacher reads ``teacher_context`` in
    place of the tokens before the first target, where given; both readers have the same targets in the same order.
    Masks come from lengths, never from ids, because ``pad_id`` may be the end token. Raises ValueError on a row
    whose first token is a target (nothing precedes it) or that has no token.
    """
    if not examples:
        raise ValueError("there is nothing to collate: the list of examples is empty")
    pairs = [_context_and_response(example, reader) for example in examples]
    marks = [example.targets[example.start :] for example in examples]
    if seq2seq_start is not None:
        return _seq2seq(pairs, marks, pad_id, seq2seq_start)
    rows = [context + response for context, response in pairs]
    targets = [[False] * len(context) + mark for (context, _), mark in zip(pairs, marks, strict=True)]
    # A row of one token is read, although nothing is predicted: a row of length 0 would be all mask (NaN in attention).
    input_ids, attention_mask = _padded([row[:-1] or row for row in rows], pad_id)
    labels = _labels([row[1:] for row in rows], [mark[1:] for mark in targets], input_ids.shape[1])
    return Batch({"input_ids": input_ids, "attention_mask": attention_mask}, labels)


def _context_and_response(example: Example, reader: str) -> tuple[list[int], list[int]]:
    context = example.prompt
    if reader == "teacher" and example.teacher_context is not None:
        context = example.teacher_context
    if not context:
        raise ValueError(f"row {example.id}: the {reader} has no token before the first target")
    return context, example.response


def _seq2seq(pairs: list[tuple[list[int], list[int]]], marks: list[list[bool]], pad_id: int, start_id: int) -> Batch:
    input_ids, attention_mask = _padded([context for context, _ in pairs], pad_id)
    decoder_ids, decoder_mask = _padded([[start_id, *response[:-1]] for _, response in pairs], pad_id)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    return Batch(inputs, _labels([response for _, response in pairs], marks, decoder_ids.shape[1]))


def _padded(rows: list[list[int]], fill: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """``rows`` as ``[B, T]`` int64 and the mask of their lengths; T is ``width`` or the longest length."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    inside = np.arange(lengths.max() if width is None else width) < lengths[:, None]
    ids = np.full(inside.shape, fill, dtype=np.int64)
    ids[inside] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return torch.from_numpy(ids), torch.from_numpy(inside.astype(np.int64))


def _labels(rows: list[list[int]], marks: list[list[bool]], width: int) -> Tensor:
    """``[B, width]``: the tokens of ``rows`` that are marked as targets, IGNORE elsewhere."""
    ids, _ = _padded(rows, IGNORE, width)
    is_target, _ = _padded([[int(mark) for mark in row] for row in marks], 0, width)
    return ids.masked_fill_(is_target == 0, IGNORE)
