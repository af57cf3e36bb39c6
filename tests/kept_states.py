"""Random rows, and states that stand for what a teacher says of them: for processes of their own, quickly imported."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distillm.types import Example, Origin

NUM_TOKENS = 41


def tokens(seed: int, length: int, below: int = NUM_TOKENS) -> list[int]:
    return torch.randint(2, below, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(number: int, prompt: int = 3, response: int = 4, origin: Origin = "data", **rest: Any) -> Example:
    """A row of ``prompt`` random tokens and ``response`` ones to be learned."""
    marks = [False] * prompt + [True] * response
    return Example(f"row:{number}", tokens(number, prompt + response), marks, origin, **rest)


def states_of(rows: Sequence[Example]) -> list[Tensor]:
    """What stands for a teacher that has read ``rows``."""
    return [torch.tensor([[float(t), 1.0] for t in r.response]) for r in rows]


def saying(read: Any) -> Any:
    """A teacher whose states ``read`` gives."""
    return SimpleNamespace(states=read, joint=False, lend=never)


def never(*_: Any) -> None:
    raise AssertionError("the teacher was asked to read again")
