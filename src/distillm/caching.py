"""Whether, and where, a run keeps its teacher's states: chosen from how often rows are read and what they take."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from .assembly import Models, Note
from .config import Run, Teacher
from .method_settings import Distillation, Distillm2, MiniLlm
from .methods import Method
from .teacher_cache import Disk, Memory, TeacherCache
from .types import Example

MEMORY_SHARE = 0.25
"""Of the memory that is free, at most this part holds states."""


def default_folder() -> Path:
    """Where states are kept on disk unless a run says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distillm" / "teacher"


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
) -> TeacherCache | None:
    """The cache that ``run.teacher.cache`` asks for; what ``auto`` comes to is said in one line."""
    given, reader = run.teacher, models.pair.read_teacher
    if given is None or models.teacher is None or reader is None or given.cache == "off":
        return None
    if not reader.fused:
        if given.cache != "auto":
            note(
                f"teacher.cache={given.cache} has no effect: this teacher's logits are formed whole, too large to keep"
            )
        return None
    again = method.reads_teacher and not _on_policy(run) and steps * run.train.batch_size > len(train)
    row_bytes = _width(models) * getattr(torch, given.dtype).itemsize
    lasting = row_bytes * _tokens([*validation, *(train if again else [])])
    replayed = row_bytes * _replayed_tokens(run) if method.reads_teacher else 0
    memory = int(MEMORY_SHARE * psutil.virtual_memory().available)
    kind, room = given.cache, f"{size(lasting + replayed)} of hidden states at most"
    if kind == "auto":
        kind = _choice(given, lasting, replayed, memory)
        where = {
            "memory": "in memory",
            "disk": f"in {_folder(given)}",
            "off": "off, as neither memory nor disk has room",
        }
        note(f"teacher cache: {where[kind]} ({room})")
        if kind == "off":
            return None
    # Chosen by auto, states are for this run; whoever asks for a place by name may mean another run.
    passing = [*tests, *(train if kind == "memory" and not again else [])] if given.cache == "auto" else []
    store, name = Memory(memory), "of this run"
    if kind == "disk":
        name = teacher_name(models, given)
        about = {"teacher": str(given.path or "the student without its adapter"), "width": _width(models)}
        store = Disk(_folder(given), name, int(given.cache_gib * 2**30), note, about)
    cpu = models.pair.device.type == "cpu"
    return TeacherCache(
        name,
        store,
        # Twice what a buffer of the longest responses takes: states of responses that have left it are of no use.
        Memory(min(memory, 2 * replayed)) if replayed else None,
        given.cache_batch_size or (1 if cpu else 32),
        frozenset(example.id for example in passing),
    )


def teacher_name(models: Models, given: Teacher) -> str:
    """A name for all that a teacher's states depend on beside the tokens: weights, code, precision, device, layout."""
    assert models.teacher is not None
    teacher: Any = models.teacher
    config = {k: v for k, v in teacher.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = [
        models.teacher_weights,
        type(teacher).__name__,
        json.dumps(config, sort_keys=True, default=str),
        str(teacher.config._attn_implementation),
        given.dtype,
        models.pair.device.type,
        str(models.pair.layout_for("teacher")),
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _choice(given: Teacher, lasting: int, replayed: int, memory: int) -> Literal["memory", "disk", "off"]:
    if lasting + replayed <= memory:
        return "memory"
    folder = _folder(given)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if lasting <= min(given.cache_gib * 2**30, shutil.disk_usage(there).free / 2):
        return "disk"
    return "off"


def _folder(given: Teacher) -> Path:
    return Path(given.cache_folder) if given.cache_folder else default_folder()


def _on_policy(run: Run) -> bool:
    return isinstance(run.method, MiniLlm | Distillm2) or (
        isinstance(run.method, Distillation) and run.method.sampling == "on_policy"
    )


def _replayed_tokens(run: Run) -> int:
    """The most tokens that a buffer of student responses holds."""
    method = run.method
    if not isinstance(method, Distillation | MiniLlm) or not method.replays:
        return 0
    return method.capacity * run.generation.max_new_tokens


def _tokens(examples: Sequence[Example]) -> int:
    return sum(sum(e.targets) for e in examples)


def _width(models: Models) -> int:
    assert models.teacher is not None
    output: Any = models.teacher.get_output_embeddings()
    return output.weight.shape[1]


def size(count: int) -> str:
    """``count`` bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
