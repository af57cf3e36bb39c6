"""Where the rows of a step come from. A source is a function of the state, so a resumed run draws the same rows."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

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


class Generate(Protocol):
    """Answers prompts with the current student."""

    def __call__(
        self, prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None
    ) -> list[Example]:
        """``prompts`` with responses. ``steps`` are those whose draws each row takes; ``state.step`` unless given."""
        ...


def keyed(*key: object) -> random.Random:
    """A generator that belongs to ``key``: every process that names the same key draws the same numbers."""
    return random.Random("/".join(map(str, key)))  # strings are hashed by SHA-512, not by the interpreter's salt


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Steps in which every row is visited once; the last one may be smaller."""
    return -(-rows // batch_size)


def dataset(examples: Sequence[Example], batch_size: int, seed: int, bucket: int = 1) -> Source:
    """Shuffled epochs; each visits each row once.

    With a ``bucket`` above 1 the rows of so many batches in a row are shared out again by length, so that a batch holds
    rows of like length, and the epoch's batches come in an order of their own.
    """
    per_epoch = steps_per_epoch(len(examples), batch_size)
    kept: tuple[int, list[list[int]]] = (-1, [])

    def source(state: State) -> Draw:
        nonlocal kept
        epoch, at = divmod(state.step, per_epoch)
        if kept[0] != epoch:
            kept = epoch, batches(keyed(seed, "epoch", epoch))
        return Draw([examples[i] for i in kept[1][at]])

    def batches(rng: random.Random) -> list[list[int]]:
        order, span = rng.sample(range(len(examples)), len(examples)), bucket * batch_size
        if bucket > 1:
            parts = (order[i : i + span] for i in range(0, len(order), span))
            # The last batch of an epoch may be smaller: it is the longest rows' here, which costs least memory.
            order = [i for part in parts for i in sorted(part, key=lambda i: len(examples[i].tokens))]
        found = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if bucket > 1:
            rng.shuffle(found)
        return found

    return source


class ReplayBuffer:
    """The last ``capacity`` generated rows; the oldest leave. ``ahead`` has those that later steps will bring in."""

    def __init__(self, capacity: int):
        self.rows: deque[Example] = deque(maxlen=capacity)
        self.ahead: dict[int, list[Example]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def full(self) -> bool:
        """Whether the next row pushes one out."""
        return len(self.rows) == self.rows.maxlen

    def age(self, step: int) -> float | None:
        """Mean number of steps since the rows were generated."""
        return sum(step - row.born for row in self.rows) / len(self.rows) if self.rows else None


@dataclass(frozen=True)
class Replay:
    """How earlier responses are used again: ``ratio`` is the share of student steps that generate anew.

    ``fill_first`` generates until the buffer is full and ``train_on_fresh`` trains on the new rows themselves, as the
    authors' code of DistiLLM does.
    """

    buffer: ReplayBuffer
    ratio: Schedule
    fill_first: bool = False
    train_on_fresh: bool = False


def student_rows(
    data: Source,
    generate: Generate,
    *,
    probability: Schedule,
    seed: int,
    end_ids: Sequence[int],
    replay: Replay | None = None,
    ahead: dict[int, list[Example]] | None = None,
    max_staleness: int = 0,
) -> Source:
    """Student rows with the scheduled probability; dataset rows otherwise.

    One ``u ~ U(0, 1)`` decides: with ``u < probability`` the current student answers the step's prompts and the step
    trains on that. With ``replay`` it answers them, into the buffer, only with ``u < probability * ratio``; with
    ``u < probability`` the step trains on a sample of the buffer (arXiv:2402.03898, algorithm 1), which is filled
    first where it holds less than a batch. Where a step generates, ``truncated`` counts the rows just written that
    were cut by length: none of ``end_ids`` ends them.

    With ``max_staleness`` a step that generates answers the prompts of the next so many steps as well, of those that
    will generate as far as can be told, and keeps them in ``ahead``: one large batch in place of many small ones, by a
    student that is at most so many steps old.
    """
    ahead = {} if ahead is None else ahead

    def scheduled(u: float, state: State) -> bool:
        """Whether a step with the coin ``u`` generates, as far as the schedules say."""
        return u < probability(state) * (1.0 if replay is None else replay.ratio(state))

    def fresh_rows(state: State, prompts: list[Example]) -> list[Example]:
        if state.step in ahead:
            return ahead.pop(state.step)
        asked = {state.step: prompts}
        for step in range(state.step + 1, min(state.step + max_staleness + 1, state.total_steps)):
            later = replace(state, step=step)
            if step not in ahead and scheduled(keyed(seed, "replay", step).random(), later):
                asked[step] = data(later).rows
        steps = [step for step, rows in asked.items() for _ in rows]
        written = generate([row for rows in asked.values() for row in rows], state, steps=steps)
        for row, step in zip(written, steps, strict=True):
            ahead.setdefault(step, []).append(row)
        return ahead.pop(state.step)

    def source(state: State) -> Draw:
        rng = keyed(seed, "replay", state.step)
        u, phi = rng.random(), probability(state)
        figures: dict[str, float | None] = {"probability": phi}
        drawn = data(state)
        if u < phi:
            short = replay is not None and (
                (replay.fill_first and not replay.buffer.full) or len(replay.buffer) < len(drawn.rows)
            )
            generated = fresh_rows(state, drawn.rows) if short or scheduled(u, state) else []
            if generated:
                figures["truncated"] = sum(truncated(row, end_ids) for row in generated)
            if replay is not None:
                replay.buffer.rows.extend(generated)
            if replay is None or (generated and replay.train_on_fresh):
                rows = generated
            else:
                rows = rng.sample(list(replay.buffer.rows), min(len(drawn.rows), len(replay.buffer)))
            drawn = Draw(rows, "generated" if generated else "replayed")
            ages = [state.step - row.born for row in rows]
            figures |= {"age": sum(ages) / len(ages), "oldest": max(ages)}
        if replay is not None:
            figures["replay_ratio"] = replay.ratio(state)
            figures |= {"buffer": len(replay.buffer), "buffer_age": replay.buffer.age(state.step)}
        return Draw(drawn.rows, drawn.batch, figures)

    return source


def noisy(generate: Generate, share: float, num_tokens: int, end_ids: Sequence[int], seed: int) -> Generate:
    """``generate``, and each token it wrote replaced, with probability ``share``, by one drawn evenly from the others.

    Ends are neither replaced nor drawn, so that responses keep their lengths.
    """
    others = [token for token in range(num_tokens) if token not in end_ids]

    def written(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
        rows = generate(prompts, state, steps=steps)
        return [disturbed(row, step) for row, step in zip(rows, steps or [state.step] * len(rows), strict=True)]

    def disturbed(row: Example, step: int) -> Example:
        rng = keyed(seed, "noise", step, row.id)
        drawn = [(rng.random() < share, rng.choice(others)) for _ in row.response]
        response = [
            other if replaced and token not in end_ids else token
            for token, (replaced, other) in zip(row.response, drawn, strict=True)
        ]
        return replace(row, tokens=row.tokens[: len(row.tokens) - len(response)] + response)

    return written


def paired(
    data: Source,
    steps_per_epoch: int,
    generate: Generate,
    teacher_generate: Generate,
    buffer: ReplayBuffer,
    end_ids: Sequence[int],
) -> Source:
    """For each prompt a response of the teacher and one of the student, all written as an epoch begins.

    The responses of the epoch are the buffer, which must hold two for each prompt, and are saved with it.
    """

    def source(state: State) -> Draw:
        epoch = state.step // steps_per_epoch
        figures: dict[str, float | None] = {}
        drawn = data(state).rows
        known = {(row.id, row.origin): row for row in buffer.rows if row.born // steps_per_epoch == epoch}
        fresh = any((row.id, "student") not in known for row in drawn)
        if fresh:
            end = min((epoch + 1) * steps_per_epoch, state.total_steps)
            prompts = [row for step in range(state.step, end) for row in data(replace(state, step=step)).rows]
            buffer.rows.clear()
            written = generate(prompts, state)
            buffer.rows.extend(teacher_generate(prompts, state) + written)
            figures["truncated"] = sum(truncated(row, end_ids) for row in written)
            known = {(row.id, row.origin): row for row in buffer.rows}
        rows = [known[row.id, origin] for row in drawn for origin in ("teacher", "student")]
        figures |= {"buffer": len(buffer), "buffer_age": buffer.age(state.step)}
        return Draw(rows, "generated" if fresh else "replayed", figures)

    return source


def beside(source: Source, other: Source) -> Source:
    """The rows of both, in one step."""

    def both(state: State) -> Draw:
        drawn = source(state)
        return Draw(drawn.rows + other(state).rows, drawn.batch, drawn.figures)

    return both
