"""The rows of a run: read first, tokenised when the models are there, answered by the teacher where that is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from . import sources
from .config import Run
from .data import LengthReport, Task, all_texts, known_rows, located, read_rows, text_examples
from .data_settings import HELD_OUT, Data, Source, part
from .errors import ConfigError, DataError, first_of
from .loading import Models, Note
from .paths import home, is_dir
from .tasks import CHAT
from .teacher import Responses
from .types import Example, as_teacher_reads, last_turn
from .vocabulary import text_end, turn_end


@dataclass
class Rows:
    """The rows of one purpose: tokenised, and by row id their references and what the user wrote.

    ``lengths`` says what the length limits did to the rows of their file, where they come from one.
    """

    examples: list[Example]
    references: dict[str, list[str]]
    prompts: dict[str, str]
    lengths: LengthReport | None = None


@dataclass
class RowSets:
    """All rows of a run; ``text`` is empty without a plain-text corpus."""

    train: Rows
    validation: Rows
    tests: dict[str, Rows]
    text: list[Example]


Read = dict[Source, list[dict[str, Any]]]
"""Rows as they were read, by where they are."""

Purpose = Literal["train", "validation", "test"]


def read_data(run: Run) -> Read:
    """The rows of every file of the run, by source: read before any model, so that a bad line is said at once.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: a setting does not fit the task.
    """
    data = run.data
    wanted = [placed(data, data.train, "train"), *(placed(data, given, "test") for given in data.test.values())]
    wanted += [] if data.validation is None else [placed(data, data.validation, "validation")]
    for source in wanted:
        task_of(data, source)
    if data.text is not None:
        path, part = _text_of(data, data.text)
        next(iter(all_texts([path], **part)))
    return {source: read_source(data, source) for source in dict.fromkeys(wanted)}


def placed(data: Data, given: str | Source, purpose: Purpose) -> Source:
    """``given`` in full: of a known data set the split that serves ``purpose``, unless another one is asked for."""
    source = part(given)
    if data.known_in(source) is None or source.split is not None:
        return source
    return source.model_copy(update={"split": purpose})


def read_source(data: Data, source: Source) -> list[dict[str, Any]]:
    """The rows that are there, those of a known data set under its task's own field names."""
    entry = data.known_in(source)
    if entry is None:
        return read_rows(source.path, split=source.split, name=source.name)
    if entry.task is None:
        raise DataError(f"{source.path} is plain text, for data.text; its rows have no responses to learn")
    return known_rows(entry, split=source.split or "train", name=source.name, folder=_folder(data))


def _text_of(data: Data, given: str | Source) -> tuple[str, dict[str, str | None]]:
    source = placed(data, given, "train")
    entry = data.known_in(source)
    if entry is None:
        return source.path, {"split": source.split, "name": source.name}
    return located(entry, split=source.split or "train", name=source.name, folder=_folder(data))


def _folder(data: Data) -> Path:
    folder = home(data.folder)
    if not is_dir(folder):
        raise DataError(f"data.folder: there is no folder {data.folder}")
    return folder


def load_rows(run: Run, read: Read, models: Models, note: Note) -> RowSets:
    """What ``read_data`` read, tokenised; some training rows are held out where there is no validation file.

    Raises:
        DataError: a row lacks a field, or no row of a file is usable.
        ConfigError: a row is longer than a model can read.
    """
    data = run.data

    def rows(given: str | Source, purpose: Purpose, limit: int | None, *, asked: bool = False) -> Rows:
        source = placed(data, given, purpose)
        bare = run.teacher_writes and not task_of(data, source).any_answered(read[source])
        return tokenised(data, source, read[source][:limit], models, note, asked=asked or bare)

    asked = data.responses == "teacher"
    train = rows(data.train, "train", data.limit, asked=asked)
    # Test rows keep their own responses, where the file has any.
    tests = {name: rows(given, "test", run.evaluation.limit) for name, given in data.test.items()}
    if data.test_size is not None:
        train, held = _held_out(run, train, data.test_size, "test")
        note(f"{len(held.examples)} rows of {data.train} are held out as the test set {HELD_OUT}")
        held = replace(held, examples=held.examples[: run.evaluation.limit])
        tests[HELD_OUT] = _with_their_own(run, read, held, models) if asked else held
    if data.validation is not None:
        validation = rows(data.validation, "validation", data.validation_size, asked=asked)
    else:
        train, validation = _held_out(run, train, data.validation_size)
        note(f"{len(validation.examples)} rows of {data.train} are held out for validation")
    for found in (train, validation, *tests.values()):
        check_room(models, found.examples, run.generation.max_new_tokens)
    text: list[Example] = []
    if data.text is not None and data.text_weight > 0:
        end_id = text_end(models.tokenizer, models.end_ids)
        path, chosen = _text_of(data, data.text)
        text = text_examples(path, models.tokenizer, length=data.text_length, end_id=end_id, **chosen)
        check_room(models, text)
    return RowSets(train, validation, tests, text)


def _held_out(run: Run, train: Rows, most: int, purpose: Purpose = "validation") -> tuple[Rows, Rows]:
    """``train`` without some of its rows, ``most`` and a fifth at most, and these; others for every ``purpose``."""
    count = min(most, len(train.examples) // 5)
    if not count:
        raise DataError(f"{run.data.train} has too few rows to hold some out; give data.{purpose}")
    key = ("holdout",) if purpose == "validation" else ("holdout", purpose)
    order = sources.keyed(run.seed, *key).sample(train.examples, len(train.examples))
    kept = {example.id for example in order[count:]}
    return replace(train, examples=[e for e in train.examples if e.id in kept]), replace(train, examples=order[:count])


def _with_their_own(run: Run, read: Read, held: Rows, models: Models) -> Rows:
    """``held`` rows of the training data, with the responses that the data have, in place of none."""
    source = placed(run.data, run.data.train, "train")
    if not task_of(run.data, source).any_answered(read[source]):
        return held
    own = tokenised(run.data, source, read[source][: run.data.limit], models, lambda _: None)
    found = {example.id: example for example in own.examples}
    # Of an odd row the response is empty, and the teacher's is taken.
    references = held.references | {row: own.references[row] for row in found}
    return replace(held, examples=[found.get(e.id, e) for e in held.examples], references=references)


def check_room(models: Models, examples: Sequence[Example], new_tokens: int = 0) -> None:
    """Raise ConfigError where a row, or a prompt and ``new_tokens`` of answer, is longer than a model can read."""
    both: dict[Literal["student", "teacher"], Any] = {"student": models.student, "teacher": models.teacher}
    for name, model in both.items():
        room = None if model is None else getattr(model.config, "max_position_embeddings", None)
        if not isinstance(room, int):
            continue
        layout = models.pair.layout_for(name)
        read = [as_teacher_reads(e) for e in examples] if name == "teacher" else examples
        row = max(read, key=lambda e: layout.longest(e.start, len(e.tokens) - e.start))
        prompt = max(map(last_turn, read), key=lambda e: e.start)
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


def task_of(data: Data, source: Source | None = None) -> Task:
    """The task that ``data`` describes, as it is for the rows of ``source``.

    A known data set for this task has its own field names, and a translation brings its languages.
    """
    spec, entry = data.spec, None if source is None else data.known_in(source)
    fields = spec.fields | ({} if entry is not None and entry.task == data.task else data.fields)
    variables = data.variables | ({} if source is None else data.languages_of(source))
    return Task(spec, fields=fields, template=data.prompt, system=data.system, variables=variables)


def end_of_response(data: Data, models: Models) -> int:
    """The token that ends a response: the chat template's own where that is used, else the tokenizer's."""
    if data.prompt == CHAT:
        return turn_end(models.tokenizer, models.end_ids)
    return text_end(models.tokenizer, models.end_ids)


def tokenised(
    data: Data,
    source: Source,
    rows: Sequence[Mapping[str, Any]],
    models: Models,
    note: Note,
    *,
    asked: bool = False,
) -> Rows:
    """``rows`` of ``source``, as the run's task reads them; ``asked``: a model is to write the responses."""
    task = task_of(data, source)
    other = {name: value for name, value in task.variables.items() if data.variables.get(name, value) != value}
    if other:
        note(f"{source}: read with {', '.join(f'{name} {value}' for name, value in other.items())}")
    entry = data.known_in(source)
    if entry is not None and entry.min_words:
        note(f"{source}: rows whose reference has fewer than {entry.min_words} words are left out")
    if asked:
        task, rows = task.only_asked(rows)
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
    prompts = {
        e.id: written[e.id] or cast(str, decode(last_turn(e).prompt, skip_special_tokens=True)) for e in examples
    }
    return Rows(examples, references, prompts, report)


def _for_teacher(
    data: Data,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    examples: list[Example],
    models: Models,
    name: str,
    note: Note,
) -> list[Example]:
    """``examples`` with what the teacher reads in place of their prompts."""
    template = data.teacher_template or data.prompt
    system = data.teacher_system or (data.system if template == CHAT else None)
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
    found = [written.get(e.id, e) for e in rows.examples]
    return replace(rows, examples=found, references=rows.references | references)
