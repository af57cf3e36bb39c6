"""Two models read the same rows: what a loss sees of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .accounting import part
from .data import collate
from .heads import HeadReader
from .readers import Teacher, account, in_step
from .teacher_cache import TeacherCache
from .types import IGNORE, Example, Head, Layout, Origin, State


@dataclass(frozen=True)
class Scored:
    """A batch after the models have read it. Rows are its N target tokens.

    ``labels`` ``[N]``; ``sequence`` ``[N]`` says which of ``origins`` each token belongs to; the teacher's head is
    None where no term asked for it. ``log_probs`` ``[N]`` are those the tokens were drawn with, NaN where not kept.
    A term may leave a figure in ``figures``: its sum and count over the sequences or tokens of the batch.
    """

    student: Head
    teacher: Head | None
    labels: Tensor
    sequence: Tensor
    origins: tuple[Origin, ...]
    state: State
    log_probs: Tensor | None = None
    figures: dict[str, tuple[Tensor, int]] = field(default_factory=dict[str, tuple[Tensor, int]])

    def only(self, origins: frozenset[Origin]) -> "Scored":
        """The target tokens of the sequences that have one of ``origins``."""
        if origins.issuperset(self.origins):
            return self
        kept = torch.tensor([o in origins for o in self.origins], device=self.labels.device)[self.sequence]
        return replace(
            self,
            student=self.student._replace(hidden=self.student.hidden[kept]),
            teacher=self.teacher and self.teacher._replace(hidden=self.teacher.hidden[kept]),
            labels=self.labels[kept],
            sequence=self.sequence[kept],
            log_probs=None if self.log_probs is None else self.log_probs[kept],
        )


@dataclass(frozen=True)
class Pair:
    """The student and, where there is one, whoever says what the teacher thinks of a row."""

    student: nn.Module
    read_student: HeadReader
    teacher: Teacher | None
    num_tokens: int
    layout: Layout
    device: torch.device
    cache: TeacherCache | None = None
    """Keeps the teacher's states of the rows that are read again."""

    @property
    def packed(self) -> bool:
        """Whether all that read read the rows of a batch one behind the other."""
        return self.read_student.packed and (self.teacher is None or self.teacher.packed)

    def layout_for(self, reader: Literal["student", "teacher"]) -> Layout:
        """How the student or the teacher is fed."""
        return self.layout if reader == "student" or self.teacher is None else self.teacher.layout

    def score(self, examples: Sequence[Example], state: State, *, with_teacher: bool) -> Scored:
        """Let the models read ``examples``; gradients, where they are on, reach the student alone."""
        batch = collate(examples, self.layout).to(self.device)
        target = batch.labels != IGNORE
        with part("student forward"):
            student = _one_dtype(self.read_student(self.student, batch)).narrow(self.num_tokens)
        account(self.student.module if isinstance(self.student, DistributedDataParallel) else self.student, examples)
        return Scored(
            student=student,
            teacher=self.teacher_head(examples) if with_teacher else None,
            labels=batch.labels[target],
            sequence=target.nonzero()[:, 0],
            origins=tuple(e.origin for e in examples),
            state=state,
            log_probs=_log_probs(examples, self.device),
        )

    @part("teacher")
    @torch.no_grad()
    def teacher_head(self, examples: Sequence[Example]) -> Head:
        """The teacher's head at the target tokens of ``examples``, of kept states where there are any."""
        assert self.teacher is not None
        states = torch.cat([each.to(self.device) for each in self._states(examples)])
        return _one_dtype(self.teacher.head(states)).narrow(self.num_tokens)

    def in_step(self, parts: Sequence[Sequence[Example]]) -> Sequence[Sequence[Example]]:
        """``parts``, each of which the teacher is to read, once other processes that have more parts need no help."""
        if self.teacher is None:
            return parts
        return in_step(self.teacher, parts, self._lend)

    @part("teacher")
    @torch.no_grad()
    def _lend(self) -> None:
        assert self.teacher is not None
        if self.cache is None or not self.teacher.keeps:
            self.teacher.lend()
        else:
            self._states([])
        self.teacher.head(torch.empty(0))  # which may have to gather the unembedding

    def _states(self, examples: Sequence[Example]) -> Sequence[Tensor]:
        assert self.teacher is not None
        if self.cache is None or not self.teacher.keeps:
            return self.teacher.states(examples)
        return self.cache.states(examples, self.teacher)


def _log_probs(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    if all(e.log_probs is None for e in examples):
        return None
    # A response that is generated is whole: each of its tokens is a target.
    rows = [e.log_probs or [math.nan] * sum(e.targets[1:]) for e in examples]
    return torch.tensor([value for row in rows for value in row], device=device)


def _one_dtype(head: Head) -> Head:
    # Under mixed precision the hidden states are bfloat16 and the weights float32.
    if head.weight is None or head.weight.dtype == head.hidden.dtype:
        return head
    bias = None if head.bias is None else head.bias.to(head.hidden.dtype)
    return head._replace(weight=head.weight.to(head.hidden.dtype), bias=bias)
