"""What a teacher says of rows, as states: the model itself reads them here.

States are small, a row's target tokens at a time, and a ``Head`` is made of them, so that they can be kept or come from
elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .accounting import computed
from .data import collate
from .heads import HeadReader
from .processes import most
from .types import IGNORE, Example, Head, Layout

Part = TypeVar("Part")


class Teacher(Protocol):
    """Whoever says what the teacher's next-token distributions are."""

    @property
    def layout(self) -> Layout:
        """How the teacher is fed."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether its states are small enough to be kept."""
        ...

    @property
    def packed(self) -> bool:
        """Whether it reads the rows of a batch one behind the other."""
        ...

    @property
    def joint(self) -> bool:
        """Whether all processes of a run have to read equally often."""
        ...

    def states(self, rows: Sequence[Example]) -> Sequence[Tensor]:
        """``[n, d]`` for each row: what there is to know of its n target tokens."""
        ...

    def head(self, states: Tensor) -> Head:
        """The head of states, ``[N, d]``, of one row or several."""
        ...

    def lend(self) -> None:
        """Take part in a reading of other processes, where that is ``joint``."""
        ...


class LocalTeacher:
    """A frozen model in this process. Its states are what its unembedding is fed; its own logits where that is not to
    be had. ``device`` is where its head is wanted, wherever its layers are."""

    def __init__(self, model: Any, reader: HeadReader, layout: Layout, device: torch.device):
        self.model, self.reader, self.layout = model, reader, layout
        self.device = torch.empty(0, device=device).device  # with its number, as weights have it

    @property
    def keeps(self) -> bool:
        """As in ``Teacher``: hidden states are, logits are not."""
        return self.reader.fused

    @property
    def packed(self) -> bool:
        """As in ``Teacher``."""
        return self.reader.packed

    @property
    def joint(self) -> bool:
        """As in ``Teacher``: where its weights are spread over the processes."""
        return isinstance(self.model, FSDPModule)

    def states(self, rows: Sequence[Example]) -> Sequence[Tensor]:
        """As in ``Teacher``."""
        batch = collate(rows, self.layout, reader="teacher").to(self.device)
        account(self.model, rows)
        counts = (batch.labels != IGNORE).sum(1).tolist()
        return self.reader(self.model, batch).hidden.split(counts)

    def head(self, states: Tensor) -> Head:
        """As in ``Teacher``."""
        if self.reader.unembedding is None:
            return Head(states, None)
        if isinstance(self.model, FSDPModule):
            self.model.unshard()  # the part with the unembedding, which stays so: nothing trains it
        return self.reader.head(states.to(self.device))

    def lend(self) -> None:
        """As in ``Teacher``."""
        self.states([Example("", [0, 0], [False, True])])


def account(model: nn.Module, rows: Sequence[Example]) -> None:
    """Count what reading ``rows`` takes."""
    lengths = [(row.start, len(row.tokens) - row.start) for row in rows]
    computed(model, tokens=lengths, logits=sum(sum(row.targets) for row in rows), trained=torch.is_grad_enabled())


def in_step(teacher: Teacher, parts: Sequence[Part], lend: Callable[[], object]) -> Sequence[Part]:
    """``parts``; where all processes have to read equally often, first as many loans as another one has parts more."""
    if teacher.joint:
        for _ in range(most(len(parts)) - len(parts)):
            lend()
    return parts
