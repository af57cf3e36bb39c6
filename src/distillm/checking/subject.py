"""What is looked at: the objects of a run, and the rows of it that are read for a sample."""

import statistics
from dataclasses import dataclass

from accelerate import Accelerator

from ..config import Run
from ..loading import Models
from ..method_settings import Distillation, Distillm2, MiniLlm
from ..methods import Method
from ..rows import Read, RowSets
from ..types import Example, last_turn


@dataclass(frozen=True)
class Subject:
    """A run as it is before its first step. ``train`` are its longest rows, ``validation`` some of those, answered."""

    run: Run
    read: Read
    models: Models
    rows: RowSets
    accelerator: Accelerator
    method: Method
    steps: int
    train: list[Example]
    validation: list[Example]
    asked: bool
    """Whether the responses in ``validation`` were written by the teacher, for want of others."""

    @property
    def student_writes(self) -> bool:
        """Whether the student's responses are trained on."""
        method = self.run.method
        return isinstance(method, MiniLlm | Distillm2) or (
            isinstance(method, Distillation) and method.sampling != "none"
        )

    @property
    def scored(self) -> list[Example]:
        """The test rows, of all sets."""
        return [example for rows in self.rows.tests.values() for example in rows.examples]

    @property
    def prompt_tokens(self) -> float:
        """Of a training row, the mean."""
        return statistics.fmean(last_turn(e).start for e in self.rows.train.examples)

    @property
    def response_tokens(self) -> float:
        """Of a training row, the mean; of those that were answered for this, where the data has no responses."""
        answered = [e for e in self.rows.train.examples if any(e.targets)] or self.train
        return statistics.fmean(sum(e.targets) for e in answered)
