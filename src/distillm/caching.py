"""Whether, and where, a run keeps its teacher's states: chosen from how often rows are read and what they take."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import psutil
import torch

from .config import Run
from .errors import ConfigError
from .kept_teacher import KeptTeacher, missing
from .loading import Models, Note
from .methods import Method
from .model_settings import Teacher
from .paths import nearest_folder
from .processes import by_first, count_here
from .scoring import Pair
from .served_teacher import ServedTeacher
from .sources import steps_per_epoch
from .teacher_cache import Disk, Memory, TeacherCache, content
from .types import Example

Kind = Literal["memory", "disk", "off"]
MEMORY_SHARE = 0.25
"""Of the memory that is free, at most this part holds states."""


def make_cache(
    run: Run,
    models: Models,
    method: Method,
    *,
    train: Sequence[Example],
    validation: Sequence[Example],
    tests: Sequence[Example],
    steps: int,
    note: Note,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    before: Kind | None = None,
) -> TeacherCache | None:
    """The cache that ``run.teacher.cache`` asks for; what ``auto`` comes to is said in one line.

    ``precision`` is what training computes in. ``before`` is what ``auto`` came to when the run began: where rows are
    kept they are read one by one, which differs in the last bits from reading them together.
    """
    given, teacher = run.teacher, models.pair.teacher
    if given is None or teacher is None:
        return None
    if isinstance(teacher, KeptTeacher):
        return _kept_alone(teacher, train if method.reads_teacher else [], [*validation, *tests], precision, note)
    if given.cache == "off":
        return None
    if not teacher.keeps:
        if given.cache != "auto":
            note(
                f"teacher.cache={given.cache} has no effect: this teacher's logits are formed whole, too large to keep"
            )
        return None
    need = states_needed(run, models, method, train=train, validation=validation, tests=tests, steps=steps)
    memory = memory_for_states()
    kind, room = given.cache, f"{size(need.lasting + need.replayed)} of hidden states at most"
    if kind == "auto":
        kind = before or by_first(lambda: cache_kind(given, need))  # all do the same, however much memory each one has
        where = {"memory": "in memory", "disk": f"in {given.folder}", "off": "off"}[kind]
        why = ", as when the run began" if before else ", as neither memory nor disk has room" if kind == "off" else ""
        note(f"teacher cache: {where}{why} ({room})")
        if kind == "off":
            return None
    # Chosen by auto, states are for this run; whoever asks for a place by name may mean another run.
    once = [*([] if isinstance(teacher, ServedTeacher) else tests)]
    once += train if kind == "memory" and not need.again else []
    passing = once if given.cache == "auto" else []
    store, name = Memory(memory), "of this run"
    if kind == "disk":
        name = teacher_name(models, given)
        origin = given.path or (given.server and given.server.model) or "the student without its adapter"
        about: dict[str, str | int] = {"teacher": origin, "width": _width(models)}
        store = Disk(given.folder, name, int(given.cache_gib * 2**30), note, about)
    return TeacherCache(
        name,
        store,
        # Twice what a buffer of the longest responses takes: states of responses that have left it are of no use.
        Memory(min(memory, 2 * need.replayed)) if need.replayed else None,
        given.cache_batch_size or _portion(models),
        frozenset(content(example) for example in passing),
    )


class Need(NamedTuple):
    """Bytes of a teacher's states that a run reads more than once, of rows that last and of a buffer's responses; and
    whether the training rows are among them."""

    lasting: int
    replayed: int
    again: bool


def states_needed(
    run: Run,
    models: Models,
    method: Method,
    *,
    train: Sequence[Example],
    validation: Sequence[Example],
    tests: Sequence[Example],
    steps: int,
) -> Need:
    """What keeping the teacher's states would take at most in a run of ``steps`` steps."""
    assert run.teacher is not None
    epoch = steps_per_epoch(len(train), run.train.batch_size)
    again = method.reads_teacher and run.method.written_share != 1 and steps > epoch
    row_bytes = _width(models) * getattr(torch, run.teacher.dtype).itemsize
    # Test rows are read before training and after it, and not kept: `eval`, which has no cache, reads them in batches
    # and gives the very scores of the run. A server's answers have no such last bits, and cost more.
    asked = tests if isinstance(models.pair.teacher, ServedTeacher) else []
    lasting = row_bytes * _tokens([*validation, *asked, *(train if again else [])])
    return Need(lasting, row_bytes * _replayed_tokens(run) if method.reads_teacher else 0, again)


def _portion(models: Models) -> int:
    """Rows read at a time to be kept; a server reads as many as it is asked at a time."""
    teacher = models.pair.teacher
    if isinstance(teacher, ServedTeacher):
        return teacher.server.jobs
    return 1 if models.pair.device.type == "cpu" else 32


def _kept_alone(
    teacher: KeptTeacher,
    train: Sequence[Example],
    others: Sequence[Example],
    precision: Callable[[], AbstractContextManager[Any]],
    note: Note,
) -> TeacherCache:
    """What was kept of a teacher that is not here; raises ConfigError where a row is not among it."""
    cache = TeacherCache(teacher.name, Disk(teacher.root, teacher.name, 2**63, note), None)
    with precision():
        lacking = cache.lacking([example for example in train if any(example.targets)])
    lacking += cache.lacking([example for example in others if any(example.targets)])
    if lacking:
        raise ConfigError(missing(teacher.root, [example.id for example in lacking]))
    note(f"the teacher {teacher.name} is not here: what it said of all {len(train) + len(others)} rows is kept")
    return cache


def with_kept_states(pair: Pair, examples: Sequence[Example], note: Note) -> Pair:
    """``pair`` with what was kept of a teacher that is not here; without a teacher where a row is not among it."""
    if not isinstance(pair.teacher, KeptTeacher):
        return pair
    try:
        return replace(pair, cache=_kept_alone(pair.teacher, [], examples, nullcontext, note))
    except ConfigError as error:
        note(f"nearness to the teacher is not measured: {error}")
        return replace(pair, teacher=None)


def teacher_name(models: Models, given: Teacher) -> str:
    """A name for all that a teacher's states depend on beside the tokens: weights, code, precision, device, layout."""
    if given.server is not None:
        return hashlib.sha256(f"server/{given.server.name}".encode()).hexdigest()[:16]
    assert models.teacher is not None
    teacher: Any = models.teacher
    config = {k: v for k, v in teacher.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = [
        models.teacher_weights,
        type(teacher).__name__.removeprefix("FSDP"),
        json.dumps(config, sort_keys=True, default=str),
        str(teacher.config._attn_implementation),
        given.dtype,
        models.pair.device.type,
        str(models.pair.layout_for("teacher")),
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def cache_kind(given: Teacher, need: Need) -> Kind:
    """Where states are kept: where it was asked for, or where there is room for them."""
    if given.cache != "auto":
        return given.cache
    if need.lasting + need.replayed <= memory_for_states():
        return "memory"
    if need.lasting <= min(given.cache_gib * 2**30, shutil.disk_usage(nearest_folder(given.folder)).free / 2):
        return "disk"
    return "off"


def memory_for_states() -> int:
    """Bytes that this process may hold: its part of the machine's, as each of several reads other rows each epoch."""
    return int(MEMORY_SHARE * psutil.virtual_memory().available / count_here())


def _replayed_tokens(run: Run) -> int:
    """The most tokens that a buffer of student responses holds."""
    return run.method.buffer_rows() * run.generation.max_new_tokens if run.method.replays else 0


def _tokens(examples: Sequence[Example]) -> int:
    return sum(sum(e.targets) for e in examples)


def _width(models: Models) -> int:
    """The numbers that are kept of a token."""
    if isinstance(models.pair.teacher, ServedTeacher):
        return 2 * models.pair.teacher.top_k
    assert models.teacher is not None
    output: Any = models.teacher.get_output_embeddings()
    return output.weight.shape[1]


def size(count: int) -> str:
    """``count`` bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
