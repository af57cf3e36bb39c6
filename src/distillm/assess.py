"""Score a run's model on rows: the one place that selection, the final test and ``distillm eval`` share."""

from collections.abc import Callable, Sequence
from typing import Literal

from transformers import PreTrainedModel

from .assembly import Models, make_sampling
from .config import Run
from .evaluation import Result, evaluate, summary
from .evaluation.run import decode
from .generation import generate
from .rows import Rows
from .train import validate
from .types import Example, State


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
    """Scores and predictions of ``model``; for the student, its mean divergence to the teacher as well."""
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
    )
    if model is models.student and models.teacher is not None:
        result["scores"]["divergence"] = summary([measure(run, models, rows.examples)["divergence"]])
    return result


def measure(run: Run, models: Models, examples: Sequence[Example]) -> dict[str, float]:
    """The student's cross-entropy and, with a teacher, its divergence to it, on the references."""
    return validate(
        models.pair,
        [example for example in examples if any(example.targets)],
        State(),
        divergence=run.validation.divergence,
        batch_size=run.train.micro_batch_size,
    )


def _reads_as(models: Models, model: PreTrainedModel) -> Literal["student", "teacher"]:
    """The teacher may have more to read than the student."""
    return "teacher" if model is models.teacher else "student"


def answers(run: Run, models: Models, model: PreTrainedModel, examples: Sequence[Example]) -> list[str]:
    """Responses with the decoding of the final test, so that what selects is what is scored."""
    written = generate(
        model,
        examples,
        make_sampling(run, run.evaluation.temperature),
        layout=models.pair.layout_for(_reads_as(models, model)),
        end_ids=models.end_ids,
        num_tokens=models.pair.num_tokens,
        seed=run.evaluation.seeds[0],
        batch_size=run.generation.batch_size,
        origin=_reads_as(models, model),
    )
    return decode(models.tokenizer, written)
