"""The rows of a run: read first, tokenised when the models are there, answered by the teacher where that is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from . import sources
from .assembly import Models, Note
from .config import Data, Run
from .data import InstructionTask, all_texts, read_rows, text_examples
from .errors import ConfigError, DataError
from .teacher import Responses
from .types import Example


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


def read_data(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The rows of every file of the run, by source: read before any model, so that a bad line is said at once.

    Raises:
        DataError: a file is missing or malformed.
    """
    data = run.data
    named = [data.train, *([] if data.validation is None else [data.validation]), *data.test.values()]
    if data.text is not None:
        next(iter(all_texts([data.text])))
    return {source: read_rows(source) for source in dict.fromkeys(named)}


def load_rows(run: Run, read: dict[str, list[dict[str, Any]]], models: Models, note: Note) -> RowSets:
    """What ``read_data`` read, tokenised; some training rows are held out where there is no validation file.

    Raises:
        DataError: a row lacks a field, or no row of a file is usable.
        ConfigError: a row is longer than a model can read.
    """
    data = run.data

    def rows(source: str, limit: int | None) -> Rows:
        return tokenised(data, source, read[source][:limit], models, note)

    train = rows(data.train, data.limit)
    if data.validation is not None:
        validation = rows(data.validation, data.validation_size)
    else:
        train, validation = _held_out(run, train)
        note(f"{len(validation.examples)} rows of {data.train} are held out for validation")
    tests = {name: rows(source, run.evaluation.limit) for name, source in data.test.items()}
    for found in (train, validation, *tests.values()):
        check_room(models, found.examples, run.generation.max_new_tokens)
    text: list[Example] = []
    if data.text is not None and data.text_weight > 0:
        end_id = cast(int, models.tokenizer.eos_token_id)
        text = text_examples(data.text, models.tokenizer, length=data.text_length, end_id=end_id)
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
    row = max(examples, key=lambda e: len(e.tokens))
    prompt = max(examples, key=lambda e: e.start)
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        room = None if model is None else getattr(model.config, "max_position_embeddings", None)
        if not isinstance(room, int):
            continue
        if len(row.tokens) > room:
            raise ConfigError(
                f"{row.id} has {len(row.tokens)} tokens, but the {name} reads at most {room}; "
                "lower data.max_length (data.text_length for plain text)"
            )
        if prompt.start + new_tokens > room and new_tokens:
            raise ConfigError(
                f"{prompt.id} has a prompt of {prompt.start} tokens, which with max_new_tokens={new_tokens} is more "
                f"than the {room} that the {name} reads; lower generation.max_new_tokens or data.max_prompt"
            )


def task_of(data: Data) -> InstructionTask:
    """The task that ``data`` describes."""
    roles = {"instruction": "instruction", "input": "input", "output": "output"}
    return InstructionTask(template=data.template, system=data.system, fields=roles | data.fields)


def tokenised(data: Data, source: str, rows: Sequence[Mapping[str, Any]], models: Models, note: Note) -> Rows:
    """``rows`` of ``source``, as the run's task reads them."""
    task = task_of(data)
    name = Path(source).stem
    examples, report = task.examples(
        rows,
        models.tokenizer,
        max_prompt=data.max_prompt,
        max_length=data.max_length,
        end_id=cast(int, models.tokenizer.eos_token_id),
        source=name,
    )
    note(f"{source}: {report}")
    ids = [f"{name}:{i}" for i in range(len(rows))]
    references = {row_id: task.references(row, row_id=row_id) for row_id, row in zip(ids, rows, strict=True)}
    written = {row_id: task.user_text(row, row_id=row_id) for row_id, row in zip(ids, rows, strict=True)}
    decode = models.tokenizer.decode
    prompts = {e.id: written[e.id] or cast(str, decode(e.prompt, skip_special_tokens=True)) for e in examples}
    return Rows(examples, references, prompts)


def answered(run: Run, rows: Rows, models: Models, responses: Responses, *, keep: bool = False) -> Rows:
    """``rows`` with the teacher's responses, if the run asks for them or, with ``keep``, where a row has none."""
    asked = run.data.responses == "teacher"
    wanted = [e for e in rows.examples if asked and not (keep and rows.references[e.id])]
    if not wanted:
        bare = next((e.id for e in rows.examples if not rows.references[e.id]), None)
        if bare is not None:
            raise DataError(
                f"{bare} has no response. Give one in the data, or let the teacher write all of them: "
                "data.responses=teacher"
            )
        return rows
    written = {e.id: e for e in responses(wanted)}
    texts = models.tokenizer.batch_decode([e.response for e in written.values()], skip_special_tokens=True)
    references = {row: [text.strip()] for row, text in zip(written, texts, strict=True)}
    return Rows([written.get(e.id, e) for e in rows.examples], rows.references | references, rows.prompts)
