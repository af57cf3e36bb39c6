"""What a model's probabilities say at the reference tokens: perplexity, calibration, nearness to a teacher."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Bucketed, Divergence
from ..errors import DataError
from ..heads import eval_mode
from ..kernels import logits
from ..processes import share, together
from ..scoring import Pair
from ..sharding import whole
from ..train import micro_batches
from ..types import Example, Head, State

NUM_BINS = 15
BLOCK_ELEMENTS = 2**24
"""Logits formed at a time: rows of a vocabulary go through in blocks of so many numbers, 64 MiB in float32."""


def fidelity(
    pair: Pair, examples: Sequence[Example], *, divergence: str = "forward_kl", batch_size: int = 8
) -> dict[str, float]:
    """Figures of the student, each a mean over the N target tokens of ``examples``, which it reads as they are.

    ``perplexity``: ``exp`` of the mean cross-entropy. ``calibration_error``: with q the student's probability of its
    likeliest token, in 15 bins of equal width, ``100 sum_b n_b / N |share of q's tokens that are right - mean q|``
    (Naeini et al. 2015; Guo et al. 2017). With a teacher in ``pair``: ``divergence``, the mean of the divergence of
    that name in nats, with its default parameters; ``agreement``: 100 times the share of tokens where both models'
    likeliest token is the same (of equally likely ones the first). Several processes share the examples.

    Raises:
        DataError: no row has a target token.
    """
    count, sums = 0, dict.fromkeys(("cross_entropy", "divergence", "agreement"), 0.0)
    bins = torch.zeros(3, NUM_BINS, dtype=torch.float64)  # tokens, sum of probabilities, right ones
    with torch.no_grad(), eval_mode(pair.student), whole(pair.student):
        mine = [example for example in share(examples) if any(example.targets)]
        for part in pair.in_step(micro_batches(mine, batch_size, pair.device)):
            scored = pair.score(part, State(), with_teacher=pair.teacher is not None)
            count += len(scored.labels)
            for rows in blocks(scored.student):
                q, labels = log_probs(scored.student, rows), scored.labels[rows]
                sums["cross_entropy"] -= _sum(q.gather(-1, labels[:, None]))
                top, likeliest = q.max(-1)
                bins += _binned(top.exp(), likeliest == labels)
                if scored.teacher is not None:
                    p = log_probs(scored.teacher, rows)
                    sums["divergence"] += _sum(known_part(divergence, scored.teacher)(p, q))
                    sums["agreement"] += 100 * _sum(p.argmax(-1) == likeliest)
    told = together(lambda: (count, sums, bins))
    count = sum(each[0] for each in told)
    sums = {name: sum(each[1][name] for each in told) for name in sums}
    bins = torch.stack([each[2] for each in told]).sum(0)
    if not count:
        raise DataError("there is nothing to read: no row has a reference")
    means = {name: total / count for name, total in sums.items()}
    cross_entropy = means.pop("cross_entropy")
    found = means if pair.teacher is not None else {}
    perplexity = math.exp(cross_entropy) if cross_entropy < 700 else math.inf
    return found | {"perplexity": perplexity, "calibration_error": calibration_error(bins)}


def calibration_error(bins: Tensor) -> float:
    """Times 100, from the tokens of each bin, their probabilities' sum, and how many were right: ``[3, bins]``."""
    count, confidence, right = bins
    return 100 * float((right - confidence).abs().sum() / count.sum())


def _binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Bin b of B holds the probabilities in ``(b / B, (b + 1) / B]``."""
    columns = torch.stack([torch.ones_like(confidence), confidence, right]).cpu().double()  # which MPS does not have
    place = ((columns[1] * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
    return torch.zeros(3, NUM_BINS, dtype=torch.float64).index_add_(1, place, columns)


def known_part(name: str, teacher: Head) -> Divergence:
    """The divergence called ``name``, with all that ``teacher`` does not list in one bucket."""
    divergence = DIVERGENCES[name]
    return divergence if teacher.listed is None else Bucketed(divergence, teacher.hidden.shape[1] // 2)


def blocks(head: Head) -> Iterator[slice]:
    """The rows of ``head`` in parts whose logits are ``BLOCK_ELEMENTS`` at most."""
    size = max(1, BLOCK_ELEMENTS // head.num_tokens)
    return (slice(first, first + size) for first in range(0, len(head.hidden), size))


def log_probs(head: Head, rows: slice) -> Tensor:
    """``[n, V]`` of some rows of ``head``."""
    return logits(head._replace(hidden=head.hidden[rows])).log_softmax(-1)


def _sum(values: Tensor) -> float:
    return float(values.cpu().sum(dtype=torch.float64))  # which MPS does not have
