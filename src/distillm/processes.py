"""What several processes of one run tell each other; a single one is told nothing and pays nothing.

All of them do the same work on the same rows, in the same order, and call what is here equally often. Where work can be
shared, each takes its part (``share``) and all get the whole (``together``).
"""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import zip_longest
from typing import Any, ParamSpec, TypeVar, cast

from torch import distributed

from .errors import DistillmError

P = ParamSpec("P")
T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def count_here() -> int:
    """How many of them are on this machine, as their launcher says."""
    return min(count(), int(os.environ.get("LOCAL_WORLD_SIZE", count())))


def writes() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``, which are dealt out one by one."""
    return items[rank() :: count()] if _several() else items


def together(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives in each process, in the order of their numbers.

    Raises:
        DistillmError: the first that ``work`` raised in any of them, in all of them.
    """
    if not _several():
        return [work()]
    mine: tuple[T | None, DistillmError | None]
    try:
        mine = work(), None
    except DistillmError as error:
        mine = None, error
    told: list[Any] = [None] * count()
    distributed.all_gather_object(told, mine)  # pyright: ignore[reportUnknownMemberType]
    for _, error in told:
        if error is not None:
            raise error
    return [value for value, _ in told]


def dealt(parts: Sequence[Sequence[T]]) -> list[T]:
    """The parts that ``share`` made, as one list again."""
    nothing = object()
    rounds = zip_longest(*parts, fillvalue=nothing)
    return [cast(T, item) for each in rounds for item in each if item is not nothing]


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` gives in the process that writes, which alone does it; an error of its is raised in all."""
    return together(lambda: work() if writes() else cast(T, None))[0]


def first_alone(act: Callable[P, None]) -> Callable[P, None]:
    """``act`` for the process that writes, nothing for the others, which do not wait for it."""

    @wraps(act)
    def acting(*given: P.args, **named: P.kwargs) -> None:
        if writes():
            act(*given, **named)

    return acting


def most(number: int) -> int:
    """The largest ``number`` of any process."""
    return max(together(lambda: number))


def anyone(holds: bool) -> bool:
    """Whether it holds in any process."""
    return any(together(lambda: holds))


def leave() -> None:
    """Leave the group of processes, if there is one, when all is done: who ends as a member may be aborted by torch's
    own threads. Not after an error, as it waits for the others."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def out_of_touch(error: RuntimeError) -> bool:
    """Whether ``error`` says that another process has ended, or was not heard of for too long."""
    # NCCL raises errors of torch's own; gloo bare ones, which name the place in its source.
    return distributed.is_available() and (
        isinstance(error, distributed.DistError) or (_several() and "gloo" in str(error))
    )


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
