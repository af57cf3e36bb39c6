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
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from .accounting import computed, part
from .data.collate import lay_out_prompts
from .errors import TrainingError, first_of
from .heads import eval_mode, where
from .processes import count, dealt, share, together
from .sharding import whole
from .types import Example, Layout, Origin, answer, asked_of

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a model's keys and values: the name changed in 5.24."""
BLOCK = 256
"""Tokens whose probabilities are added up at once; a vocabulary has some hundreds of such blocks."""


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
    logits = logits if sampling.temperature == 1 else logits / sampling.temperature
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

    The law is that of ``torch.multinomial``; a token of probability zero is never returned, for u from 0 to 1. First a
    block of tokens is found, by the sums of the blocks, then the token in it: only those few numbers are added up in
    float64, which keeps a running sum exact enough for any vocabulary.
    """
    p = logits.softmax(-1)
    num_tokens = p.shape[1]
    whole = num_tokens - num_tokens % BLOCK
    sums = [p[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), p[:, whole:].sum(-1, keepdim=True)]
    block, rest = _invert(torch.cat(sums, 1), u)
    columns = BLOCK * block[:, None] + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, columns.clamp(max=num_tokens - 1)).masked_fill(columns >= num_tokens, 0.0)
    token, _ = _invert(inside, rest)
    return (BLOCK * block + token).clamp(max=num_tokens - 1)  # where there is NaN, any one will do


def _invert(masses: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of ``masses`` ``[B, n]``, as a share of its end, passes ``u``, and how far into that one.

    Never one of mass zero, and always an index, for NaN too.
    """
    # Apple's GPUs have no float64.
    running = masses.to(torch.float32 if masses.device.type == "mps" else torch.float64).cumsum(-1)
    total = running[:, -1:]
    reached = torch.minimum(u.to(running.dtype)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(running, reached, right=True).clamp(max=masses.shape[1] - 1)
    own = masses.gather(1, index).to(running.dtype)
    before = running.gather(1, index) - own
    return index.squeeze(-1), ((reached - before) / own).clamp(0.0, 1.0).squeeze(-1)


@dataclass(frozen=True)
class Mixture:
    """Draw from ``share`` times ``model``'s distribution and the rest the generating model's own: the next-token
    distribution of teacher-mixed sampling (MiniLLM, arXiv:2306.08543)."""

    model: PreTrainedModel
    share: float


class _Mix:
    """A logits processor that turns one model's logits into the log-probabilities of a ``Mixture``."""

    def __init__(self, mixture: Mixture, inputs: dict[str, Tensor], num_tokens: int):
        self.mixture, self.num_tokens, self.cache = mixture, num_tokens, None
        self.inputs, self.answering = _encoded(mixture.model, inputs)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self.cache is None else input_ids[:, -1:]
        mask = _grow_mask(self.inputs, self.answering, input_ids.shape[1])
        if self.answering == "input_ids":
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            self.inputs |= {"position_ids": positions, "logits_to_keep": 1}
        out: Any = self.mixture.model(**self.inputs | {self.answering: new}, **{CACHE: self.cache}, use_cache=True)
        self.cache = getattr(out, CACHE)
        other, own = (x[:, : self.num_tokens].float().log_softmax(-1) for x in (out.logits[:, -1], scores))
        return torch.logaddexp(other + math.log(self.mixture.share), own + math.log1p(-self.mixture.share))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.inputs = _rows_of(self.inputs, rows)
        if self.cache is not None:
            self.cache.reorder_cache(rows)


class _Choose:
    """A logits processor that leaves one token possible: the greedy one, or the row's own draw.

    ``bad`` ``[B]`` is the first position without a finite largest logit, ``max_new_tokens`` where there is none. There
    the row gets an end token, and nobody waits for the device: who called `generate` looks once, afterwards.
    ``log_probs`` ``[B, max_new_tokens]``, where kept, are those of the chosen tokens. ``rows`` are the rows of the
    batch that are still written; the response begins at ``begin``. ``never`` is a token that is not drawn. What is
    returned is one tensor, changed in two places a row: filling one for every token would take as long as the draw.
    """

    def __init__(
        self,
        sampling: Sampling,
        draws: Tensor,
        num_tokens: int,
        end_ids: Sequence[int],
        begin: int,
        never: int | None,
        keep: bool,
    ):
        self.sampling, self.draws, self.num_tokens, self.begin = sampling, draws, num_tokens, begin
        self.never = None if never is None else torch.tensor([never], device=draws.device)
        self.ends = torch.tensor(list(end_ids), dtype=torch.long, device=draws.device)
        self.stop = next(iter(end_ids), 0)
        self.bad = torch.full((len(draws),), sampling.max_new_tokens, device=draws.device)
        self.log_probs = torch.zeros(draws.shape, device=draws.device) if keep else None
        self.rows = torch.arange(len(draws), device=draws.device)
        self.only: Tensor | None = None
        self.last = torch.empty(0, 1, dtype=torch.long, device=draws.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.begin
        logits = scores[:, : self.num_tokens].float()  # the padding of the vocabulary is never sampled
        if self.never is not None:
            logits = logits.index_fill(1, self.never, -torch.inf)
        if self.sampling.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            logits = filtered(logits, self.sampling)
            chosen = draw(logits, self.draws[self.rows, position])
        # NaN and +inf are found by the largest, and so is a row of -inf alone; some models forbid tokens by -inf.
        bad = ~logits.amax(-1).isfinite()
        self.bad[self.rows] = torch.where(bad, self.bad[self.rows].clamp(max=position), self.bad[self.rows])
        chosen = chosen.masked_fill(bad, self.stop)
        if self.log_probs is not None and self.sampling.temperature > 0:  # greedily a token is drawn with certainty
            drawn = logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
            self.log_probs[self.rows, position] = drawn
        if self.only is None:
            self.only = torch.full_like(scores, -torch.inf)
        else:
            self.only.scatter_(-1, self.last, -torch.inf)
        self.last = chosen[:, None]
        return self.only.scatter_(-1, self.last, 0.0)

    def half_ended(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A criterion to stop at: half of the rows have ended, so that the others go on without them."""
        ended = self.ended(input_ids)
        return (2 * ended.sum() >= len(ended)).expand(len(ended))

    def ended(self, ids: Tensor) -> Tensor:
        """Which rows of ``ids`` ``[B, T]`` have an end token in their response."""
        return torch.isin(ids[:, self.begin :], self.ends).any(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these of ``rows`` alone."""
        self.rows, self.only = self.rows[rows], None


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Example],
    sampling: Sampling,
    *,
    layout: Layout,
    end_ids: Sequence[int],
    num_tokens: int,
    seed: int = 0,
    step: int = 0,
    steps: Sequence[int] | None = None,
    origin: Origin = "student",
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    mixture: Mixture | None = None,
    keep_log_probs: bool = False,
) -> list[Example]:
    """Answer each prompt with ``model``, in input order. Several processes share the prompts, and all get all answers.

    A response ends with the end token that occurred; one cut by ``max_new_tokens`` has none. Prompts are batched by
    length, and rows that have ended leave their batch. An encoder-decoder never writes its padding. ``progress`` is
    called with the number of rows finished so far. ``mixture`` draws from a second model as well, ``keep_log_probs``
    keeps the log-probability with which each token was drawn. Draws belong to (seed, step, row, position); ``steps``
    has a step for each row where it is not the ``step`` at which all are written.

    Raises:
        TrainingError: the model's logits are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(asked_of(prompts[i], origin)), reverse=True)
    steps = [step] * len(prompts) if steps is None else steps
    mine = share(order)

    def written() -> list[Example]:
        answers: list[Example] = []
        for at in range(0, len(mine), batch_size):
            rows = mine[at : at + batch_size]
            contexts = [asked_of(prompts[i], origin) for i in rows]
            draws = np.stack([uniforms(seed, steps[i], prompts[i].id, sampling.max_new_tokens) for i in rows])
            drawn = _respond(model, contexts, sampling, draws, layout, end_ids, num_tokens, mixture, keep_log_probs)
            lengths = [(len(c), len(r)) for c, r in zip(contexts, drawn.responses, strict=True)]
            for writer in (model, *([] if mixture is None else [mixture.model])):
                computed(writer, tokens=lengths, logits=sum(written for _, written in lengths))
            if any(drawn.bad):
                raise _not_finite([prompts[i].id for i in rows], sum(drawn.bad))
            for i, response, log_probs in zip(rows, drawn.responses, drawn.log_probs, strict=True):
                answers.append(answer(prompts[i], response, origin, step, log_probs))
            if progress is not None:
                progress(min(len(answers) * count(), len(prompts)))
        return answers

    with whole(model, *([] if mixture is None else [mixture.model])):
        answers = dict(zip(order, dealt(together(written)), strict=True))
    return [answers[i] for i in range(len(prompts))]


def truncated(example: Example, end_ids: Sequence[int]) -> bool:
    """Whether a response was cut by length, that is, ends without an end token."""
    return not example.tokens or example.tokens[-1] not in end_ids


class _Drawn(NamedTuple):
    """Responses, whether the logits of one of a response's tokens were not finite, and what was kept of them."""

    responses: list[list[int]]
    bad: list[bool]
    log_probs: list[list[float] | None]


@part("generation")
@torch.no_grad()
def _respond(
    model: PreTrainedModel,
    contexts: list[list[int]],
    sampling: Sampling,
    draws: np.ndarray,
    layout: Layout,
    end_ids: Sequence[int],
    num_tokens: int,
    mixture: Mixture | None,
    keep_log_probs: bool,
) -> _Drawn:
    device = where(model)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    given = {name: value.to(device) for name, value in lay_out_prompts(contexts, layout).items()}
    # What is compiled is compiled for training: a cache that grows would have it compiled anew at every length.
    with eval_mode(model), _own_settings(model), torch.compiler.set_stance("force_eager"):
        begin = given.get("decoder_input_ids", given["input_ids"]).shape[1]
        # An encoder-decoder begins with its padding, which is no word: Marian gives it a mass that nothing trained.
        never = layout.pad_id if layout.start and layout.pad_id not in end_ids else None
        numbers = torch.from_numpy(draws).to(device, dtype)
        choose = _Choose(sampling, numbers, num_tokens, end_ids, begin, never, keep_log_probs)
        mixed = [] if mixture is None else [_Mix(mixture, given, num_tokens)]
        responses = _written(model, given, choose, mixed, layout)
    responses = [until_end(row, end_ids) for row in responses]
    # What comes after a row's end is not looked at.
    bad = [at < len(row) for at, row in zip(choose.bad.tolist(), responses, strict=True)]
    kept: list[list[float] | None] = [None] * len(responses)
    if choose.log_probs is not None:
        kept = [values[: len(row)] for values, row in zip(choose.log_probs.tolist(), responses, strict=True)]
    return _Drawn(responses, bad, kept)


def _written(
    model: PreTrainedModel, given: dict[str, Tensor], choose: _Choose, mixed: list[_Mix], layout: Layout
) -> list[list[int]]:
    """The tokens of each row; whenever half of the rows have ended, the others go on in a smaller batch."""
    inputs, answering = _encoded(model, given)
    longest = choose.begin + choose.sampling.max_new_tokens
    responses: list[list[int]] = [[] for _ in given[answering]]
    # Apple's GPUs learn of a stop one token late: there the rows stay together.
    halving = [] if model.device.type == "mps" else [cast(Any, choose.half_ended)]
    while len(choose.rows):
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest - inputs[answering].shape[1],
            pad_token_id=layout.pad_id,
            eos_token_id=choose.ends.tolist(),
            decoder_start_token_id=next(iter(layout.start), None),
            use_cache=True,
            return_dict_in_generate=True,
        )
        out: Any = cast(Any, model).generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([*mixed, choose]),
            stopping_criteria=StoppingCriteriaList(halving),
            synced_gpus=False,  # a model whose weights are spread is whole here
        )
        done = choose.ended(out.sequences) | (out.sequences.shape[1] >= longest)
        for row, ids, is_done in zip(choose.rows.tolist(), out.sequences.tolist(), done.tolist(), strict=True):
            if is_done:
                responses[row] = ids[choose.begin :]
        rows = (~done).nonzero().squeeze(-1)
        inputs = _rows_of(inputs | {answering: out.sequences}, rows)
        _grow_mask(inputs, answering, out.sequences.shape[1])
        if len(rows):
            inputs[CACHE] = getattr(out, CACHE)
            inputs[CACHE].reorder_cache(rows)
        for each in (choose, *mixed):
            each.keep(rows)
    return responses


def _encoded(model: PreTrainedModel, given: dict[str, Tensor]) -> tuple[dict[str, Any], str]:
    """The inputs of ``model``, what an encoder says in place of what it reads, and the name of the ids it goes on."""
    if "decoder_input_ids" not in given:
        return dict(given), "input_ids"
    read = {name: given[name] for name in ("input_ids", "attention_mask")}
    said: Any = cast(Any, model).get_encoder()(**read)
    inputs = {name: value for name, value in given.items() if name != "input_ids"}
    return inputs | {"encoder_outputs": BaseModelOutput(last_hidden_state=said.last_hidden_state)}, "decoder_input_ids"


def _grow_mask(inputs: dict[str, Any], answering: str, length: int) -> Tensor:
    """Let the mask of the ids ``answering`` in ``inputs`` cover ``length`` positions; returns it."""
    name = answering.replace("input_ids", "attention_mask")
    mask: Tensor = inputs[name]
    inputs[name] = torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], 1)
    return inputs[name]


def _rows_of(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The same inputs for some rows of the batch; a cache is reordered by whoever holds it."""

    def of(value: Any) -> Any:
        if isinstance(value, BaseModelOutput):
            return BaseModelOutput(last_hidden_state=cast(Any, value.last_hidden_state)[rows])
        return value[rows] if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in inputs.items()}


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


def until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """``ids`` up to the first end token, which stays."""
    for i, token in enumerate(ids):
        if token in end_ids:
            return ids[: i + 1]
    return ids
