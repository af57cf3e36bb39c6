"""The rows of a run: read first, tokenised when the models are there, answered by the teacher where that is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from . import sources
from .assembly import Models, Note
from .config import Data, Run, Source
from .data import InstructionTask, all_texts, read_rows, text_examples
from .errors import ConfigError, DataError, first_of
from .teacher import Responses
from .types import Example
from .vocabulary import turn_end


@dataclass
class Rows:
    """The rows of one purpose: tokenised, and by row id their references and what the user wrote."""

    examples: list[Example]
    references: dict[str, list[str]]
    prompts: dict[str, str]


@dataclass
class RowSets:
    """All rows of a run; ``text`` is empty without a plain-text corpus."""

    train: Rows
    validation: Rows
    tests: dict[str, Rows]
    text: list[Example]


Read = dict[str | Source, list[dict[str, Any]]]
"""Rows as they were read, by what the configuration names them."""


def read_data(run: Run) -> Read:
    """The rows of every file of the run, by source: read before any model, so that a bad line is said at once.

    Raises:
        DataError: a file is missing or malformed.
    """
    data = run.data
    named = [data.train, *([] if data.validation is None else [data.validation]), *data.test.values()]
    if data.text is not None:
        text = _source(data.text)
        next(iter(all_texts([text.path], split=text.split, name=text.name)))
    return {given: _read(_source(given)) for given in dict.fromkeys(named)}


def _source(given: str | Source) -> Source:
    return Source(path=given) if isinstance(given, str) else given


def _read(source: Source) -> list[dict[str, Any]]:
    return read_rows(source.path, split=source.split, name=source.name)


def load_rows(run: Run, read: Read, models: Models, note: Note) -> RowSets:
    """What ``read_data`` read, tokenised; some training rows are held out where there is no validation file.

    Raises:
        DataError: a row lacks a field, or no row of a file is usable.
        ConfigError: a row is longer than a model can read.
    """
    data = run.data

    def rows(source: str | Source, limit: int | None, *, asked: bool = False) -> Rows:
        return tokenised(data, source, read[source][:limit], models, note, asked=asked)

    answer = task_of(data).fields["output"]

    def bare(source: str | Source) -> bool:
        return run.teacher_writes and not any(answer in row for row in read[source])

    asked = data.responses == "teacher"
    train = rows(data.train, data.limit, asked=asked or bare(data.train))
    if data.validation is not None:
        validation = rows(data.validation, data.validation_size, asked=asked or bare(data.validation))
    else:
        train, validation = _held_out(run, train)
        note(f"{len(validation.examples)} rows of {data.train} are held out for validation")
    # Test rows keep their own responses, where the file has any.
    tests = {name: rows(source, run.evaluation.limit, asked=bare(source)) for name, source in data.test.items()}
    for found in (train, validation, *tests.values()):
        check_room(models, found.examples, run.generation.max_new_tokens)
    text: list[Example] = []
    if data.text is not None and data.text_weight > 0:
        end_id = cast(int, models.tokenizer.eos_token_id)
        source = _source(data.text)
        part = {"split": source.split, "name": source.name}
        text = text_examples(source.path, models.tokenizer, length=data.text_length, end_id=end_id, **part)
        check_room(models, text)
    return RowSets(train, validation, tests, text)


def _held_out(run: Run, train: Rows) -> tuple[Rows, Rows]:
    count = min(run.data.validation_size, len(train.examples) // 5)
    if not count:
        raise DataError(f"{run.data.train} has too few rows to hold some out; give data.validation")
    order = sources.keyed(run.seed, "holdout").sample(train.examples, len(train.examples))
    kept = {example.id for example in order[count:]}
    return replace(train, examples=[e for e in train.examples if e.id in kept]), replace(train, examples=order[:count])


def check_room(models: Models, examples: Sequence[Example], new_tokens: int = 0) -> None:
    """Raise ConfigError where a row, or a prompt and ``new_tokens`` of answer, is longer than a model can read."""
    both: dict[Literal["student", "teacher"], Any] = {"student": models.student, "teacher": models.teacher}
    for name, model in both.items():
        room = None if model is None else getattr(model.config, "max_position_embeddings", None)
        if not isinstance(room, int):
            continue
        layout = models.pair.layout_for(name)
        read = examples
        if name == "teacher":
            read = [e if e.teacher_context is None else _as_read(e) for e in examples]
        row = max(read, key=lambda e: layout.longest(e.start, len(e.tokens) - e.start))
        prompt = max(read, key=lambda e: e.start)
        if layout.longest(row.start, len(row.tokens) - row.start) > room:
            raise ConfigError(
                f"{row.id} has {len(row.tokens)} tokens, but the {name} reads at most {room}; "
                "lower data.max_length (data.text_length for plain text)"
            )
        if new_tokens and layout.longest(prompt.start, new_tokens) > room:
            raise ConfigError(
                f"{prompt.id} has a prompt of {prompt.start} tokens, which with max_new_tokens={new_tokens} is more "
                f"than the {room} that the {name} reads; lower generation.max_new_tokens or data.max_prompt"
            )


def _as_read(example: Example) -> Example:
    context = example.teacher_context or []
    tokens = context + example.response
    return replace(example, tokens=tokens, targets=[False] * len(context) + [True] * len(example.response))


def task_of(data: Data) -> InstructionTask:
    """The task that ``data`` describes."""
    roles = {"instruction": "instruction", "input": "input", "output": "output"}
    return InstructionTask(template=data.template, system=data.system, fields=roles | data.fields)


def end_of_response(data: Data, models: Models) -> int:
    """The token that ends a response: the chat template's own where that is used, else the tokenizer's."""
    if data.template == "chat":
        return turn_end(models.tokenizer, models.end_ids)
    return cast(int, models.tokenizer.eos_token_id)


def only_asked(
    task: InstructionTask, rows: Sequence[Mapping[str, Any]]
) -> tuple[InstructionTask, list[dict[str, Any]]]:
    """``rows`` without their responses, and the task of such rows."""
    answer = task.fields["output"]
    fields = {role: name for role, name in task.fields.items() if role != "output"}
    return replace(task, fields=fields), [{k: v for k, v in row.items() if k != answer} for row in rows]


def tokenised(
    data: Data,
    given: str | Source,
    rows: Sequence[Mapping[str, Any]],
    models: Models,
    note: Note,
    *,
    asked: bool = False,
) -> Rows:
    """``rows`` of the source ``given``, as the run's task reads them; ``asked``: a model is to write the responses."""
    task, source = task_of(data), _source(given)
    if asked:
        task, rows = only_asked(task, rows)
    name = Path(source.path).stem + ("" if source.split is None else f"-{source.split}")
    examples, report = task.examples(
        rows,
        models.tokenizer,
        max_prompt=data.max_prompt,
        max_length=data.max_length,
        end_id=end_of_response(data, models),
        source=name,
    )
    note(f"{source}: {report}")
    if data.teacher_template is not None or data.teacher_system is not None:
        examples = _for_teacher(data, task, rows, examples, models, name, note)
    ids = [f"{name}:{i}" for i in range(len(rows))]
    references = {row_id: task.references(row, row_id=row_id) for row_id, row in zip(ids, rows, strict=True)}
    written = {row_id: task.user_text(row, row_id=row_id) for row_id, row in zip(ids, rows, strict=True)}
    decode = models.tokenizer.decode
    prompts = {e.id: written[e.id] or cast(str, decode(e.prompt, skip_special_tokens=True)) for e in examples}
    return Rows(examples, references, prompts)


def _for_teacher(
    data: Data,
    task: InstructionTask,
    rows: Sequence[Mapping[str, Any]],
    examples: list[Example],
    models: Models,
    name: str,
    note: Note,
) -> list[Example]:
    """``examples`` with what the teacher reads in place of their prompts."""
    template = data.teacher_template or data.template
    system = data.teacher_system or (data.system if template == "chat" else None)
    other = replace(task, template=template, system=system)
    prompts = other.prompts(rows, models.tokenizer, max_prompt=data.max_length - 1, source=name)
    empty = [e.id for e in examples if not prompts[e.id][0]]
    if empty:
        raise DataError(
            f"{first_of(empty)}: what the teacher is to read is longer than data.max_length without the instruction; "
            "raise data.max_length, or shorten the row or the teacher's template"
        )
    cut = sum(prompts[e.id][1] for e in examples)
    if cut:
        note(f"{name}: {cut} of the teacher's {len(examples)} prompts are cut to data.max_length")
    return [replace(e, teacher_context=prompts[e.id][0]) for e in examples]


def answered(
    rows: Rows, models: Models, responses: Responses, *, by_teacher: Literal["all", "missing", "none"]
) -> Rows:
    """``rows`` with the teacher's responses: in place of all, of those that a row has not, or of none.

    Raises:
        DataError: a row is left without a response.
    """
    without = [e for e in rows.examples if not rows.references[e.id]]
    if by_teacher == "none" and without:
        raise DataError(
            f"{without[0].id} has no response. Give one in the data, or let the teacher write all of them: "
            "data.responses=teacher"
        )
    wanted = rows.examples if by_teacher == "all" else without
    if by_teacher == "none" or not wanted:
        return rows
    written = {e.id: e for e in responses(wanted)}
    texts = models.tokenizer.batch_decode([e.response for e in written.values()], skip_special_tokens=True)
    references = {row: [text.strip()] for row, text in zip(written, texts, strict=True)}
    return Rows([written.get(e.id, e) for e in rows.examples], rows.references | references, rows.prompts)
