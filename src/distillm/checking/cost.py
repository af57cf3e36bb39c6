"""What a run would cost: a step on its longest rows is tried, and the rest of the run follows from it."""

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from .. import schedules
from ..accounting import peak_bytes, taken
from ..assembly import make_optimizer, make_sampling
from ..caching import MEMORY_SHARE
from ..checkpoint import student_tensors
from ..config import Run
from ..evaluation.run import seeds_used
from ..generation import Mixture, generate
from ..method_settings import Distillation, Distillm2, MiniLlm
from ..paths import nearest_folder
from ..sources import Draw
from ..train import training_steps
from ..types import Example, State, answer, last_turn
from .subject import Subject

TRIED_TOKENS = 16
"""Tokens that are written for a sample; the seconds of longer responses follow from them."""
SPARE = 2**28
"""Bytes that the loss takes beside what the models keep (kernels.sweep.BYTE_BUDGET)."""


@dataclass(frozen=True)
class Work:
    """A part of a run: seconds on this machine, and operations."""

    name: str
    seconds: float
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a run takes. Bytes; ``work`` is empty where the memory did not suffice to try a step.

    ``memory`` is what the process holds at most: on a GPU of the GPU's memory, else of the machine's.
    """

    memory: int
    free_memory: int
    disk: int
    free_disk: int
    work: list[Work]

    @property
    def fits(self) -> bool:
        """Whether there is memory enough."""
        return self.memory <= self.free_memory

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return math.fsum(work.seconds for work in self.work)

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return math.fsum(work.flops for work in self.work)


@dataclass(frozen=True)
class Rate:
    """Seconds and operations of a token."""

    seconds: float
    flops: float

    def of(self, name: str, tokens: float) -> Work:
        """So many tokens of it."""
        return Work(name, self.seconds * tokens, self.flops * tokens)


def estimate(subject: Subject) -> Cost:
    """Try a step and some writing, and reckon the whole run from them; the student is another one afterwards.

    A step that would not fit is not tried. Where the device runs out of memory all the same, ``memory`` is what was
    held, and more than there is.
    """
    disk, free_disk = _disk(subject), shutil.disk_usage(nearest_folder(Path(subject.run.output))).free
    rows, free = heaviest(subject), _free(subject)
    foreseen = _held(subject) + _foreseen(subject, rows)
    if foreseen > free:
        return Cost(foreseen, free, disk, free_disk, [])
    try:
        work, memory = _tried(subject, rows)
    except torch.OutOfMemoryError:
        return Cost(max(foreseen, free + 1), free, disk, free_disk, [])
    return Cost(memory, free, disk, free_disk, work)


def heaviest(subject: Subject) -> list[Example]:
    """A micro-batch of the longest rows; as long as the student may write them, where it trains on its responses."""
    run, method = subject.run, subject.run.method
    count = min(run.train.micro_batch_size, subject.most_rows * subject.per_row)
    examples = [subject.train[i % len(subject.train)] for i in range(count)]
    if subject.student_writes:
        examples = [_as_written(e, run.generation.max_new_tokens) for e in examples]
    if isinstance(method, MiniLlm):
        examples = [replace(e, origin="student", log_probs=[0.0] * sum(e.targets)) for e in examples]
    if isinstance(method, Distillm2):
        origins: tuple[Literal["student", "teacher"], ...] = ("teacher", "student")
        examples = [replace(e, origin=origins[i % 2]) for i, e in enumerate(examples)]
    return examples + subject.rows.text[: min(run.train.micro_batch_size, run.train.batch_size)]


def _as_written(example: Example, most: int) -> Example:
    """``example`` with a response of ``most`` tokens, of those that it has, over and over; never a shorter one."""
    last = last_turn(example)
    if len(last.response) >= most:
        return example
    longer = (last.response * math.ceil(most / len(last.response)))[:most]
    return answer(example, longer, example.origin)


def _tried(subject: Subject, rows: list[Example]) -> tuple[list[Work], int]:
    """The parts of the run, and the memory that it holds at most."""
    run, models = subject.run, subject.models
    teacher_reads = _teacher_reads(subject, rows)
    optimizer = make_optimizer(run, models.student)
    trial = training_steps(
        models.pair,
        replace(subject.method, source=lambda _: Draw(rows)),
        optimizer,
        State(total_steps=2),
        accelerator=subject.accelerator,
        learning_rate=schedules.constant(0.0),
        micro_batch_size=run.train.micro_batch_size,
        max_grad_norm=run.train.max_grad_norm,
    )
    next(trial)  # makes the optimizer's averages, and compiles
    taken()
    tokens = next(trial).tokens
    parts, flops = taken()
    held, peak = _held(subject), peak_bytes(subject.accelerator.device) or 0
    reads = subject.method.reads_teacher and teacher_reads is not None
    flops -= teacher_reads.flops * tokens if reads and teacher_reads else 0
    seconds = math.fsum(took for name, took in parts.items() if name not in ("teacher", "optimizer", "other", "data"))
    student_reads = Rate((parts.get("student forward", 0.0) + parts.get("loss", 0.0)) / tokens, flops / tokens / 3)
    trains = Rate(seconds / tokens, flops / tokens)
    work = [
        *_training(subject, trains, teacher_reads, parts.get("optimizer", 0.0)),
        *_writing(subject),
        *_measuring(subject, student_reads, teacher_reads),
    ]
    return [part for part in work if part.seconds], max(peak, held + _writes_in(subject)) + _keeps(subject)


def _teacher_reads(subject: Subject, rows: list[Example]) -> Rate | None:
    pair = subject.models.pair
    rows = [row for row in rows if row.origin != "text"]
    if pair.teacher is None:
        return None
    taken()
    with torch.no_grad(), subject.accelerator.autocast():  # as in training
        pair.teacher_head(rows)
    parts, flops = taken()
    tokens = sum(len(row.tokens) for row in rows)
    return Rate(parts.get("teacher", 0.0) / tokens, flops / tokens)


def _training(subject: Subject, trains: Rate, teacher: Rate | None, optimizer: float) -> Iterator[Work]:
    run, row = subject.run, subject.prompt_tokens + subject.response_tokens
    train, text = len(subject.rows.train.examples), len(subject.rows.text)
    visited = subject.visited(train) * subject.per_row * row
    yield trains.of("training", visited + (subject.visited(text) * run.data.text_length if text else 0))
    yield Work("training", optimizer * subject.steps, 0)
    if teacher is None or not subject.method.reads_teacher:
        return
    need, kind = subject.cache
    if kind != "off" and need.again:  # each row once, and what is written anew
        written = _written(subject) * row
        visited = min(visited, train * row + written)
    yield teacher.of("teacher", visited)


def _writing(subject: Subject) -> Iterator[Work]:
    """What the student and the teacher write, for training and to be scored."""
    run, each = subject.run, min(subject.response_tokens, subject.run.generation.max_new_tokens)
    scored = len(subject.scored)
    answers = scored * len(seeds_used(run.evaluation.seeds, make_sampling(run, run.evaluation.temperature)))
    validations = subject.validations
    rows = len(subject.rows.validation.examples)
    asked = sum(min(count, rows) for count in _validated(run))
    writes = _writes(subject, "student")
    mix = run.method.teacher_mix if isinstance(run.method, MiniLlm) else 0.0
    drawn = _writes(subject, "student", mix) if mix else writes
    yield drawn.of("generation", _written(subject) * each)
    yield writes.of("validation", validations * asked * each)
    yield writes.of("scoring", (1 + ("before" in run.evaluation.compare)) * answers * each)
    teacher = subject.models.teacher
    to_write = len(subject.rows.train.examples) + len(subject.rows.validation.examples) if run.teacher_writes else 0
    to_write += _written(subject) if isinstance(run.method, Distillm2) else 0
    to_score = answers if "teacher" in run.evaluation.compare else 0
    if teacher is None or not (to_write or to_score):
        return
    writes = _writes(subject, "teacher")
    yield writes.of("teacher", to_write * each)
    yield writes.of("scoring", to_score * each)


def _measuring(subject: Subject, student: Rate, teacher: Rate | None) -> Iterator[Work]:
    """Validation, and reading the test rows."""
    row = subject.prompt_tokens + subject.response_tokens
    validated = subject.validations * len(subject.rows.validation.examples) * row
    scored = 2 * len(subject.scored) * row
    yield student.of("validation", validated)
    yield student.of("scoring", scored)
    if teacher is not None:
        kind = subject.cache[1]
        yield teacher.of("validation", validated if kind == "off" else len(subject.rows.validation.examples) * row)
        yield teacher.of("scoring", scored)


def _writes(subject: Subject, writer: Literal["student", "teacher"], teacher_mix: float = 0.0) -> Rate:
    """A few tokens of answers to the longest prompts, as many at a time as the run would write.

    ``teacher_mix`` is the teacher's share of what they are drawn from.
    """
    run, models = subject.run, subject.models
    model = models.student if writer == "student" else models.teacher
    assert model is not None
    prompts = [subject.train[i % len(subject.train)] for i in range(_at_once(subject))]
    sampling = make_sampling(run)
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, TRIED_TOKENS))
    taken()
    written = generate(
        model,
        [replace(prompt, id=f"{prompt.id}/{i}") for i, prompt in enumerate(prompts)],
        sampling,
        layout=models.pair.layout_for(writer),
        end_ids=models.end_ids,
        num_tokens=models.pair.num_tokens,
        origin=writer,
        batch_size=len(prompts),
        mixture=Mixture(models.teacher, teacher_mix) if teacher_mix and models.teacher is not None else None,
    )
    parts, flops = taken()
    tokens = sum(len(last_turn(e).response) for e in written)
    return Rate(math.fsum(parts.values()) / max(tokens, 1), flops / max(tokens, 1))


def _written(subject: Subject) -> float:
    """Responses that the student writes in training; of an adaptive probability, which only the run shows, half."""
    method = subject.run.method
    return method.written_share / (2 if method.replays else 1) * subject.visited(len(subject.rows.train.examples))


def _at_once(subject: Subject) -> int:
    """Responses that are written at a time, at most."""
    run, method = subject.run, subject.run.method
    train, validation = len(subject.rows.train.examples), len(subject.rows.validation.examples)
    asked = [1, *(min(count, validation) for count in _validated(run))]
    if run.teacher_writes and subject.models.teacher is not None:
        asked.append(train)
    if isinstance(method, Distillm2):  # an epoch's
        asked.append(min(subject.steps * run.train.batch_size, train))
    elif isinstance(method, Distillation | MiniLlm) and subject.student_writes:
        asked.append(subject.most_rows * (1 + min(method.max_staleness, subject.steps - 1)))
    scored = len(subject.scored) or min(run.evaluation.token_rows, validation)
    return max(min(run.evaluation.batch_size, scored), min(run.generation.batch_size, max(asked)))


def _validated(run: Run) -> list[int]:
    """How many rows each validation has the student answer, at most: those that are shown, and those scored."""
    by_rouge = "rouge_l" in (run.validation.select, run.method.monitored)
    return [run.validation.samples, run.validation.rouge_rows if by_rouge else 0]


def _keeps(subject: Subject) -> int:
    """Bytes of the teacher's states that the memory of the machine holds."""
    need, kind = subject.cache
    if subject.accelerator.device.type == "cuda":  # states are kept in the CPU's memory
        return 0
    most = int(MEMORY_SHARE * psutil.virtual_memory().available)
    capacity = max(subject.run.method.buffer_rows(), 1)
    replayed = need.replayed * min(1.0, _written(subject) / capacity)  # a short run does not fill its buffer
    return int(min((need.lasting if kind == "memory" else 0) + (replayed if kind != "off" else 0), most))


def _writes_in(subject: Subject) -> int:
    """Bytes that writing takes: keys and values of all tokens, and a few copies of the logits of one."""
    tokens = max(last_turn(e).start for e in subject.train) + subject.run.generation.max_new_tokens
    writers = [subject.models.student, subject.models.teacher]
    states = max(tokens * _state_bytes(writer) for writer in writers if writer is not None)
    return _at_once(subject) * (states + 16 * subject.models.pair.num_tokens)


def _state_bytes(model: Any) -> int:
    """Bytes of the keys and values of a token."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * next(model.parameters()).element_size()


def _foreseen(subject: Subject, rows: Sequence[Example]) -> int:
    """Bytes that a step takes beside both models: gradients, the optimizer's averages, what is kept for backward."""
    trained = [p for p in subject.models.student.parameters() if p.requires_grad]
    weights = sum(3 * p.numel() * p.element_size() for p in trained)
    with _kept_for_backward() as kept:
        subject.models.pair.student.train()
        one = subject.models.pair.score(rows[:1], State(), with_teacher=False)
        one.student.hidden.sum()
    known = {p.untyped_storage().data_ptr() for p in subject.models.student.parameters()}
    activations = sum(size for storage, size in kept().items() if storage not in known)
    share = sum(len(row.tokens) for row in rows) / max(len(rows[0].tokens), 1)
    return int(weights + activations * share + SPARE)


@contextmanager
def _kept_for_backward() -> Generator[Callable[[], dict[int, int]]]:
    """What autograd keeps inside: bytes by storage."""
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # or else an address would be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sizes


def _held(subject: Subject) -> int:
    device = subject.accelerator.device
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _free(subject: Subject) -> int:
    """What the process may hold: what it does, and what nobody does."""
    device = subject.accelerator.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + _held(subject)


def _disk(subject: Subject) -> int:
    """Bytes of the checkpoints (those that are kept, the best, one being written), the student, kept states."""
    student = subject.models.student
    checkpoint = sum(t.numel() * t.element_size() for t in student_tensors(student).values())
    checkpoint += sum(2 * p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    need, kind = subject.cache
    return (subject.run.checkpoint.keep + 2) * checkpoint + weights + (need.lasting if kind == "disk" else 0)
