"""Score a run's model on rows: the one place that selection, the final test and ``distillm eval`` share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedModel

from .assembly import make_sampling
from .config import Run
from .errors import TrainingError
from .evaluation import Result, evaluate, summary
from .evaluation.fidelity import fidelity
from .evaluation.run import decode
from .evaluation.tokens import token_rows
from .generation import generate
from .loading import Models
from .readers import LocalTeacher
from .rows import Rows
from .scoring import Pair
from .train import validate
from .types import Example, State, as_teacher_reads


def assess(
    run: Run,
    models: Models,
    model: PreTrainedModel,
    rows: Rows,
    *,
    seeds: Sequence[int],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Scores and predictions of ``model``, and what its probabilities say at the references.

    For the student also how near they are to the teacher's.

    Raises:
        TrainingError: what a model computes is no number.
    """
    result = evaluate(
        model,
        models.tokenizer,
        rows.examples,
        rows.references,
        rows.prompts,
        make_sampling(run, run.evaluation.temperature),
        seeds,
        layout=models.pair.layout_for(_reads_as(models, model)),
        end_ids=models.end_ids,
        num_tokens=models.pair.num_tokens,
        batch_size=batch_size,
        progress=progress,
        origin=_reads_as(models, model),
        metrics=metrics_of(run),
    )
    examples, pair = rows.examples, models.pair
    if model is models.teacher:
        pair = _teacher_alone(models)
        assert pair is not None
        examples = [as_teacher_reads(example) for example in examples]
    if any(any(example.targets) for example in examples):
        figures = fidelity(pair, examples, divergence=run.validation.divergence, batch_size=run.train.micro_batch_size)
        odd = [name for name, value in figures.items() if math.isnan(value)]
        if odd:
            raise TrainingError(f"{', '.join(odd)} of the scored rows is nan: the weights of a model are damaged")
        result["scores"] |= {name: summary([value]) for name, value in figures.items()}
    return result


def metrics_of(run: Run) -> Sequence[str]:
    """The metrics on texts that the run is scored by: its own choice, or its task's."""
    return run.evaluation.metrics or run.data.spec.metrics


def measure(run: Run, models: Models, examples: Sequence[Example]) -> dict[str, float]:
    """The student's cross-entropy and, with a teacher, its divergence to it, on the references."""
    return validate(
        models.pair,
        [example for example in examples if any(example.targets)],
        State(),
        divergence=run.validation.divergence,
        batch_size=run.train.micro_batch_size,
    )


def teacher_cross_entropy(run: Run, models: Models, examples: Sequence[Example]) -> float | None:
    """How well the teacher predicts the responses of ``examples``, nats a token; None where it is not here."""
    pair = _teacher_alone(models)
    if pair is None:
        return None
    read = [as_teacher_reads(example) for example in examples if any(example.targets)]
    size = run.train.micro_batch_size
    return validate(pair, read, State(), divergence=run.validation.divergence, batch_size=size)["cross_entropy"]


def _teacher_alone(models: Models) -> Pair | None:
    """The teacher in the student's place."""
    teacher = models.pair.teacher
    if models.teacher is None or not isinstance(teacher, LocalTeacher):
        return None
    read = {"student": models.teacher, "read_student": teacher.reader, "layout": teacher.layout}
    return replace(models.pair, **read, teacher=None, cache=None)


def _reads_as(models: Models, model: PreTrainedModel) -> Literal["student", "teacher"]:
    """The teacher may have more to read than the student."""
    return "teacher" if model is models.teacher else "student"


def answers(run: Run, models: Models, model: PreTrainedModel, examples: Sequence[Example]) -> list[str]:
    """Responses with the decoding of the final test, so that what selects is what is scored."""
    return decode(models.tokenizer, _written(run, models, model, examples, run.generation.batch_size))


def by_token(run: Run, models: Models, rows: Sequence[tuple[str, Example, str]]) -> list[dict[str, Any]]:
    """What the student answers to ``rows`` with the first decoding seed, and how far it is from its teacher at each
    token: the records of ``tokens.jsonl``, see docs/architecture.md.

    A row is the name of its data set, its example and its prompt as the user wrote it. The teacher reads the answers.
    """
    written = _written(run, models, models.student, [example for _, example, _ in rows], run.evaluation.batch_size)
    found = token_rows(models.pair, models.tokenizer, written, batch_size=run.train.micro_batch_size)
    return [
        {"id": record["id"], "data": rows[number][0], "prompt": rows[number][2], **record}
        for number, record in found.items()
    ]


def _written(
    run: Run, models: Models, model: PreTrainedModel, examples: Sequence[Example], batch_size: int
) -> list[Example]:
    return generate(
        model,
        examples,
        make_sampling(run, run.evaluation.temperature),
        layout=models.pair.layout_for(_reads_as(models, model)),
        end_ids=models.end_ids,
        num_tokens=models.pair.num_tokens,
        seed=run.evaluation.seeds[0],
        batch_size=batch_size,
        origin=_reads_as(models, model),
    )
