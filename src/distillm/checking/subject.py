"""What is looked at: the objects of a run, and the rows of it that are read for a sample."""

import statistics
from dataclasses import dataclass
from functools import cached_property

from accelerate import Accelerator

from ..caching import Need, cache_kind, states_needed
from ..config import Run
from ..loading import Models
from ..method_settings import Distillm2
from ..methods import Method
from ..project import validated_every
from ..rows import Read, RowSets
from ..sources import steps_per_epoch
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
        return self.run.method.written_share > 0

    @property
    def scored(self) -> list[Example]:
        """The test rows, of all sets."""
        return [example for rows in self.rows.tests.values() for example in rows.examples]

    @property
    def per_row(self) -> int:
        """Responses that a step trains on for each row of the data."""
        return 2 if isinstance(self.run.method, Distillm2) else 1

    @property
    def most_rows(self) -> int:
        """Of the data, in a step: a batch, or all where there are fewer."""
        return min(self.run.train.batch_size, len(self.rows.train.examples))

    def visited(self, rows: int) -> int:
        """How often the steps read one of so many ``rows``: the last batch of an epoch has what is left."""
        size = self.run.train.batch_size
        epochs, rest = divmod(self.steps, steps_per_epoch(rows, size))
        return epochs * rows + min(rest * size, rows)

    @cached_property
    def prompt_tokens(self) -> float:
        """Of a training row, the mean."""
        return statistics.fmean(last_turn(e).start for e in self.rows.train.examples)

    @cached_property
    def response_tokens(self) -> float:
        """Of a training row, the mean; of those that were answered for this, where the data has no responses."""
        answered = [e for e in self.rows.train.examples if any(e.targets)] or self.train
        return statistics.fmean(sum(e.targets) for e in answered)

    @property
    def validations(self) -> float:
        """How often the run validates."""
        return self.steps / validated_every(self.run, self.rows.train, self.steps) + 1

    @cached_property
    def cache(self) -> tuple[Need, str]:
        """What keeping the teacher's states would take, and where they would be kept."""
        rows, teacher = self.rows, self.run.teacher
        if teacher is None or self.models.pair.teacher is None or not self.models.pair.teacher.keeps:
            return Need(0, 0, again=False), "off"
        if self.models.teacher is None and teacher.server is None:
            return Need(0, 0, again=True), "disk"
        need = states_needed(
            self.run,
            self.models,
            self.method,
            train=rows.train.examples,
            validation=rows.validation.examples,
            tests=self.scored,
            steps=self.steps,
        )
        if not any(any(e.targets) for e in rows.train.examples):  # still to be written
            one = states_needed(self.run, self.models, self.method, train=[], validation=self.train, tests=[], steps=1)
            count = len(rows.validation.examples) + (len(rows.train.examples) if need.again else 0)
            need = need._replace(lasting=one.lasting * count // len(self.train))
        return need, cache_kind(teacher, need)
