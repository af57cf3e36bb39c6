"""The values that travel through the library: ``Example`` -> ``Batch`` -> ``Head``, and the ``State`` of a run."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that predicts no target token."""

Origin = Literal["data", "student", "teacher", "text"]
"""Who wrote the target tokens: the dataset, a model, or a plain-text corpus."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as token ids: ragged, on the CPU, free of any architecture.

    ``targets[i]`` says whether ``tokens[i]`` is to be learned. ``teacher_context``, where given, replaces the tokens
    before the first target for the teacher only. ``born`` is the step at which a generated row was written, and
    ``log_probs``, where kept, the log-probability with which each of its response's tokens was drawn.
    """

    id: str
    tokens: list[int]
    targets: list[bool]
    origin: Origin = "data"
    born: int = 0
    teacher_context: list[int] | None = None
    log_probs: list[float] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.targets):
            raise ValueError(f"row {self.id}: {len(self.tokens)} tokens but {len(self.targets)} target marks")

    @property
    def start(self) -> int:
        """Index of the first target; the number of tokens where there is none."""
        return self.targets.index(True) if True in self.targets else len(self.tokens)

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first target."""
        return self.tokens[: self.start]

    @property
    def response(self) -> list[int]:
        """The tokens from the first target on."""
        return self.tokens[self.start :]


def as_teacher_reads(example: Example) -> Example:
    """``example`` with the teacher's context in place of the student's, where it has one."""
    context = example.teacher_context
    if context is None:
        return example
    tokens, targets = context + example.response, [False] * len(context) + example.targets[example.start :]
    return replace(example, tokens=tokens, targets=targets, teacher_context=None)


def last_turn(example: Example) -> Example:
    """``example`` with its last response alone as the target: what comes before is the prompt that it answers.

    The same row where there is but one response, and where there is none.
    """
    targets, first = example.targets, example.start
    start = len(targets)
    while start > first and not targets[start - 1]:
        start -= 1
    while start > first and targets[start - 1]:
        start -= 1
    if start == first:
        return example
    context = example.teacher_context  # which stands for the tokens before the first target
    context = None if context is None else context + example.tokens[first:start]
    return replace(example, targets=[False] * start + targets[start:], teacher_context=context)


def asked_of(prompt: Example, origin: Origin) -> list[int]:
    """The tokens that ``origin`` reads before it writes the last turn of ``prompt``."""
    prompt = last_turn(prompt)
    privileged = origin == "teacher" and prompt.teacher_context is not None
    return prompt.teacher_context or [] if privileged else prompt.prompt


def answer(
    prompt: Example, response: list[int], origin: Origin, born: int = 0, log_probs: list[float] | None = None
) -> Example:
    """``prompt``'s context, up to its last turn, followed by ``response``, every token of which is a target."""
    prompt = last_turn(prompt)
    tokens = prompt.prompt + response
    targets = [False] * prompt.start + [True] * len(response)
    return Example(prompt.id, tokens, targets, origin, born, prompt.teacher_context, log_probs)


class Layout(NamedTuple):
    """How a model is fed. Without ``start`` it is causal: prompt and response are one sequence.

    With ``start``, the decoder's first tokens, it is an encoder-decoder: the encoder reads the prompt and ``close``,
    the decoder the response.
    """

    pad_id: int
    start: tuple[int, ...] = ()
    close: tuple[int, ...] = ()

    def longest(self, prompt: int, response: int) -> int:
        """The positions that the model needs for so many tokens: an encoder-decoder reads the two apart."""
        return max(prompt + len(self.close), len(self.start) + response - 1) if self.start else prompt + response


class Batch(NamedTuple):
    """What one model reads: ``inputs`` for its forward, and ``labels[b, t]``, the token predicted AT position ``t``.

    ``labels`` is ``[B, T]`` int64 with ``IGNORE`` where nothing is to be predicted.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        return Batch({name: value.to(device) for name, value in self.inputs.items()}, self.labels.to(device))


class Head(NamedTuple):
    """Logits that have not been formed: ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    ``hidden`` is ``[N, d]``, ``weight`` ``[V, d]``, ``bias`` ``[V]``. Where ``weight`` is None, ``hidden`` holds the
    model's own logits ``[N, V]`` and nothing else applies.

    With ``listed``, the size V of a vocabulary, no more is known than the likeliest tokens of each row: ``hidden`` is
    ``[N, 2 k]``, the log-probabilities of k tokens and, as numbers, their ids. All others are one bucket.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    listed: int | None = None

    @property
    def num_tokens(self) -> int:
        """The entries of the vocabulary, V."""
        if self.listed is not None:
            return self.listed
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def at(self, temperature: float) -> "Head":
        """The head of the same logits divided by ``temperature``."""
        if temperature == 1.0:
            return self
        if self.listed is not None:
            raise ValueError("tokens that are one bucket have no distribution at another temperature")
        if self.weight is None:
            return self._replace(hidden=self.hidden / temperature)
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(scale=self.scale / temperature, softcap=softcap)

    def narrow(self, num_tokens: int) -> "Head":
        """The same head over the first ``num_tokens`` entries of the vocabulary."""
        if self.listed is not None:
            return self._replace(listed=num_tokens)
        if self.weight is None:
            return self._replace(hidden=self.hidden[:, :num_tokens])
        if self.weight.shape[0] == num_tokens:
            return self
        bias = None if self.bias is None else self.bias[:num_tokens]
        return self._replace(weight=self.weight[:num_tokens], bias=bias)


@dataclass
class State:
    """All that a schedule may read. Saved whole in every checkpoint.

    ``step`` is the number of finished optimizer steps; ``validation`` holds the monitored value of each validation;
    ``observed`` the sum and the count of each figure that a loss has watched so far.
    """

    step: int = 0
    total_steps: int = 1
    validation: list[float] = field(default_factory=list[float])
    observed: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def observe(self, name: str, total: float, count: float) -> None:
        """Add to the figure ``name``."""
        before = self.observed.get(name, [0.0, 0.0])
        self.observed[name] = [before[0] + total, before[1] + count]

    def mean(self, name: str) -> float | None:
        """The mean of the figure ``name`` so far; None before it was seen."""
        total, count = self.observed.get(name, (0.0, 0.0))
        return total / count if count else None
