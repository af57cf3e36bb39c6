"""``list[Example]`` -> ``Batch``: the only place where labels are aligned, and what a model reads is laid out.

Here alone an encoder-decoder differs from a causal model: its response is read behind the decoder's first tokens.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..types import IGNORE, Batch, Example, Layout


def collate(examples: Sequence[Example], layout: Layout, *, reader: Literal["student", "teacher"] = "student") -> Batch:
    """What one model reads, padded on the right to the longest row of the batch.

    Causal: the inputs are ``tokens[:-1]`` and ``labels[t] = tokens[t + 1]`` where that is a target, else IGNORE.
    Encoder-decoder: the tokens before the first target and ``layout.close`` are the encoder's, the decoder reads
    ``[*start, *response[:-1]]``, and each token of the response is the label of the position before it. The teacher
    reads ``teacher_context`` in place of the tokens before the first target, where given; both readers have the same
    targets in the same order. Masks come from lengths, never from ids, because the padding may be the end token.
    Raises ValueError on a row whose first token is a target (nothing precedes it) or that has no token.
    """
    if not examples:
        raise ValueError("there is nothing to collate: the list of examples is empty")
    pairs = [_context_and_response(example, reader) for example in examples]
    marks = [example.targets[example.start :] for example in examples]
    if layout.start:
        decoder = [([*layout.start], response) for _, response in pairs]
        inputs, labels = _predicted(decoder, marks, layout.pad_id)
        encoder = _padded([[*context, *layout.close] for context, _ in pairs], layout.pad_id)
        return Batch(_named(*encoder) | _named(*inputs, prefix="decoder_"), labels)
    inputs, labels = _predicted(pairs, marks, layout.pad_id)
    return Batch(_named(*inputs), labels)


def lay_out_prompts(contexts: Sequence[Sequence[int]], layout: Layout) -> dict[str, Tensor]:
    """What `generate` reads to answer ``contexts``: padded on the left for causal models, so that all end together."""
    if layout.start:
        inputs = _named(*_padded([[*context, *layout.close] for context in contexts], layout.pad_id))
        start = torch.tensor([layout.start] * len(contexts))
        return inputs | _named(start, torch.ones_like(start), prefix="decoder_")
    ids, mask = _padded([list(reversed(context)) for context in contexts], layout.pad_id)
    return _named(ids.flip(1), mask.flip(1))


def _named(ids: Tensor, mask: Tensor, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _predicted(
    pairs: list[tuple[list[int], list[int]]], marks: list[list[bool]], pad_id: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Ids and mask of what is read, and the label of each position: the token after it, where ``marks`` has it."""
    rows = [context + response for context, response in pairs]
    targets = [[False] * len(context) + mark for (context, _), mark in zip(pairs, marks, strict=True)]
    # A row of one token is read, although nothing is predicted: a row of length 0 would be all mask (NaN in attention).
    ids, mask = _padded([row[:-1] or row for row in rows], pad_id)
    return (ids, mask), _labels([row[1:] for row in rows], [mark[1:] for mark in targets], ids.shape[1])


def _context_and_response(example: Example, reader: str) -> tuple[list[int], list[int]]:
    context = example.prompt
    if reader == "teacher" and example.teacher_context is not None:
        context = example.teacher_context
    if not context:
        raise ValueError(f"row {example.id}: the {reader} has no token before the first target")
    return context, example.response


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
