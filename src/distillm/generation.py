"""Prompts -> responses. Every row draws from its own random stream, whatever batch it is generated in."""

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .errors import TrainingError, first_of
from .heads import eval_mode
from .types import Example, Origin, answer, last_turn


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those filters off."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniforms(seed: int, step: int, row: str, count: int) -> np.ndarray:
    """The first ``count`` draws in [0, 1) of the stream that belongs to (seed, step, row)."""
    key = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=16).digest()
    stream = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64))
    return np.random.Generator(stream).random(count)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """``logits`` ``[B, V]`` after temperature, top-k and top-p; what is left out becomes ``-inf``."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        # Stable, because ties (common in bfloat16) must not be broken by the shape of the batch.
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays while the mass BEFORE it is below top_p, so that the most likely one always stays.
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """One token id per row of ``logits`` ``[B, V]``, by inverting the cumulative distribution at ``u`` ``[B]``.

    The law is that of ``torch.multinomial``; a token of probability zero is never returned, for u from 0 to 1.
    """
    # float64 keeps the running sum exact enough for any vocabulary; Apple's GPUs have no such type.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(-1).to(dtype).cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(u.to(dtype)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


@dataclass(frozen=True)
class Mixture:
    """Draw from ``share`` times ``model``'s distribution and the rest the generating model's own: the next-token
    distribution of teacher-mixed sampling (MiniLLM, arXiv:2306.08543)."""

    model: PreTrainedModel
    share: float


class _Mix:
    """A logits processor that turns one model's logits into the log-probabilities of a ``Mixture``."""

    def __init__(self, mixture: Mixture, mask: Tensor, num_tokens: int):
        self.mixture, self.mask, self.num_tokens, self.cache = mixture, mask, num_tokens, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self.cache is None else input_ids[:, -1:]
        grown = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), grown)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out: Any = self.mixture.model(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        other, own = (x[:, : self.num_tokens].float().log_softmax(-1) for x in (out.logits[:, -1], scores))
        return torch.logaddexp(other + math.log(self.mixture.share), own + math.log1p(-self.mixture.share))


class _Choose:
    """A logits processor that leaves one token possible: the greedy one, or the row's own draw.

    ``bad`` ``[B]`` is the first position without a finite largest logit, ``max_new_tokens`` where there is none. There
    the row gets ``stop``, and nobody waits for the device: who called `generate` looks once, afterwards.
    ``log_probs``, where kept, are those of the chosen tokens, a tensor ``[B]`` a position.
    """

    def __init__(self, sampling: Sampling, draws: Tensor, num_tokens: int, stop: int, keep: bool = False):
        self.log_probs: list[Tensor] | None = [] if keep else None
        self.sampling, self.draws, self.num_tokens, self.stop, self.position = sampling, draws, num_tokens, stop, 0
        self.bad = torch.full((len(draws),), sampling.max_new_tokens, device=draws.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.num_tokens].float()  # the padding of the vocabulary is never sampled
        if self.sampling.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            logits = filtered(logits, self.sampling)
            chosen = draw(logits, self.draws[:, self.position])
        # NaN and +inf are found by the largest, and so is a row of -inf alone; some models forbid tokens by -inf.
        bad = ~logits.amax(-1).isfinite()
        self.bad = torch.where(bad, self.bad.clamp(max=self.position), self.bad)
        chosen = chosen.masked_fill(bad, self.stop)
        if self.log_probs is not None:
            greedy = self.sampling.temperature == 0  # which draws its token with certainty
            drawn = logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
            self.log_probs.append(torch.zeros_like(drawn) if greedy else drawn)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Example],
    sampling: Sampling,
    *,
    pad_id: int,
    end_ids: Sequence[int],
    num_tokens: int,
    seed: int = 0,
    step: int = 0,
    origin: Origin = "student",
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    mixture: Mixture | None = None,
    keep_log_probs: bool = False,
) -> list[Example]:
    """Answer each prompt with ``model``, in input order.

    A response ends with the end token that occurred; one cut by ``max_new_tokens`` has none. Prompts are batched by
    length. ``progress`` is called with the number of rows finished so far. ``mixture`` draws from a second model as
    well, ``keep_log_probs`` keeps the log-probability with which each token was drawn.

    Raises:
        TrainingError: the model's logits are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(_context(prompts[i], origin)), reverse=True)
    answers: dict[int, Example] = {}
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        contexts = [_context(prompts[i], origin) for i in rows]
        draws = np.stack([uniforms(seed, step, prompts[i].id, sampling.max_new_tokens) for i in rows])
        drawn = _respond(model, contexts, sampling, draws, pad_id, end_ids, num_tokens, mixture, keep_log_probs)
        if any(drawn.bad):
            raise _not_finite([prompts[i].id for i in rows], sum(drawn.bad))
        for i, response, log_probs in zip(rows, drawn.responses, drawn.log_probs, strict=True):
            answers[i] = answer(prompts[i], response, origin, step, log_probs)
        if progress is not None:
            progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


def truncated(example: Example, end_ids: Sequence[int]) -> bool:
    """Whether a response was cut by length, that is, ends without an end token."""
    return not example.tokens or example.tokens[-1] not in end_ids


def _context(prompt: Example, origin: Origin) -> list[int]:
    prompt = last_turn(prompt)
    privileged = origin == "teacher" and prompt.teacher_context is not None
    return prompt.teacher_context or [] if privileged else prompt.prompt


class _Drawn(NamedTuple):
    """Responses, whether the logits of one of a response's tokens were not finite, and what was kept of them."""

    responses: list[list[int]]
    bad: list[bool]
    log_probs: list[list[float] | None]


@torch.no_grad()
def _respond(
    model: PreTrainedModel,
    contexts: list[list[int]],
    sampling: Sampling,
    draws: np.ndarray,
    pad_id: int,
    end_ids: Sequence[int],
    num_tokens: int,
    mixture: Mixture | None,
    keep_log_probs: bool,
) -> _Drawn:
    device = model.device
    longest = max(len(c) for c in contexts)
    ids = torch.tensor([[pad_id] * (longest - len(c)) + c for c in contexts], device=device)
    mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    stop = next(iter(end_ids), 0)
    choose = _Choose(sampling, torch.from_numpy(draws).to(device=device, dtype=dtype), num_tokens, stop, keep_log_probs)
    mixed = [] if mixture is None else [_Mix(mixture, mask, num_tokens)]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(end_ids),
        use_cache=True,
    )
    with eval_mode(model), _own_settings(model):
        out: Any = cast(Any, model).generate(
            inputs=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([*mixed, choose]),
        )
    responses = [_until_end(row, end_ids) for row in out[:, longest:].tolist()]
    # What comes after a row's end is not looked at.
    bad = [at < len(row) for at, row in zip(choose.bad.tolist(), responses, strict=True)]
    kept: list[list[float] | None] = [None] * len(responses)
    if choose.log_probs is not None:
        rows = torch.stack(choose.log_probs, 1).tolist()
        kept = [values[: len(row)] for values, row in zip(rows, responses, strict=True)]
    return _Drawn(responses, bad, kept)


def _not_finite(ids: list[str], bad: int) -> TrainingError:
    return TrainingError(
        f"the model's logits are not finite while generating, for {bad} of {len(ids)} rows.\n"
        f"rows of the batch: {first_of(ids)}\n"
        "If the model has just been trained, try a lower optim.lr. If not, its weights are damaged, or too large for "
        "their type (try float32) or for a temperature near 0.",
        rows=ids,
    )


@contextmanager
def _own_settings(model: PreTrainedModel) -> Generator[None]:
    # `generate` fills every unset value from the model's file: a repetition penalty there would change the
    # distribution that is sampled from without a word.
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[: i + 1]
    return ids
