"""Where the rows of a step come from. A source is a function of the state, so a resumed run draws the same rows."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .generation import truncated
from .schedules import Schedule
from .types import Example, State


@dataclass(frozen=True)
class Draw:
    """The rows of one optimizer step, how they were come by, and figures for the log."""

    rows: list[Example]
    batch: Literal["dataset", "generated", "replayed"] = "dataset"
    figures: dict[str, float | None] = field(default_factory=dict[str, float | None])


Source = Callable[[State], Draw]
Generate = Callable[[Sequence[Example], State], list[Example]]


def keyed(*key: object) -> random.Random:
    """A generator that belongs to ``key``: every process that names the same key draws the same numbers."""
    return random.Random("/".join(map(str, key)))  # strings are hashed by SHA-512, not by the interpreter's salt


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Steps in which every row is visited once; the last one may be smaller."""
    return -(-rows // batch_size)


def dataset(examples: Sequence[Example], batch_size: int, seed: int) -> Source:
    """Shuffled epochs; each visits each row once."""
    per_epoch = steps_per_epoch(len(examples), batch_size)
    shuffled: tuple[int, list[int]] = (-1, [])

    def source(state: State) -> Draw:
        nonlocal shuffled
        epoch, at = divmod(state.step, per_epoch)
        if shuffled[0] != epoch:
            shuffled = epoch, keyed(seed, "epoch", epoch).sample(range(len(examples)), len(examples))
        return Draw([examples[i] for i in shuffled[1][at * batch_size : (at + 1) * batch_size]])

    return source


class ReplayBuffer:
    """The last ``capacity`` generated rows; the oldest leave."""

    def __init__(self, capacity: int):
        self.rows: deque[Example] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def full(self) -> bool:
        """Whether the next row pushes one out."""
        return len(self.rows) == self.rows.maxlen

    def age(self, step: int) -> float | None:
        """Mean number of steps since the rows were generated."""
        return sum(step - row.born for row in self.rows) / len(self.rows) if self.rows else None


def off_policy(
    data: Source,
    generate: Generate,
    buffer: ReplayBuffer,
    *,
    probability: Schedule,
    replay_ratio: Schedule,
    seed: int,
    end_ids: Sequence[int],
    fill_first: bool = False,
    train_on_fresh: bool = False,
) -> Source:
    """Student rows with the scheduled probability, most of them replayed; dataset rows otherwise.

    One ``u ~ U(0, 1)`` decides both: with ``u < probability * replay_ratio`` the current student answers the step's
    prompts into the buffer; with ``u < probability`` the step trains on a sample of the buffer (arXiv:2402.03898,
    algorithm 1). A buffer with less than a batch is filled first. ``fill_first`` generates until it is full and
    ``train_on_fresh`` trains on the new rows themselves, as the authors' code does. Where a step
    generates, ``truncated`` counts the rows just written that were cut by length: none of ``end_ids`` ends them.
    """

    def source(state: State) -> Draw:
        rng = keyed(seed, "replay", state.step)
        u, phi, ratio = rng.random(), probability(state), replay_ratio(state)
        drawn = data(state)
        cut: dict[str, float | None] = {}
        if u < phi:
            size = len(drawn.rows)
            wanted = u < phi * ratio or (fill_first and not buffer.full)
            generated = generate(drawn.rows, state) if wanted or len(buffer) < size else []
            if generated:
                cut = {"truncated": sum(truncated(row, end_ids) for row in generated)}
            buffer.rows.extend(generated)
            if generated and train_on_fresh:
                drawn = Draw(generated, "generated")
            else:
                rows = rng.sample(list(buffer.rows), min(size, len(buffer)))
                drawn = Draw(rows, "generated" if generated else "replayed")
        figures: dict[str, float | None] = {
            "probability": phi,
            "replay_ratio": ratio,
            "buffer": len(buffer),
            "buffer_age": buffer.age(state.step),
        }
        return Draw(drawn.rows, drawn.batch, figures | cut)

    return source


def beside(source: Source, other: Source) -> Source:
    """The rows of both, in one step."""

    def both(state: State) -> Draw:
        drawn = source(state)
        return Draw(drawn.rows + other(state).rows, drawn.batch, drawn.figures)

    return both
