"""What the small commands do: score a model, answer prompts, shrink a teacher."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from . import assembly
from .assess import answers, assess
from .checkpoint import written_aside
from .config import Run
from .data import InstructionTask
from .display import Display
from .errors import ConfigError, DataError
from .evaluation import Result
from .models import load_model, load_tokenizer, num_parameters, save_model
from .models import shrink as shrunk


def score(run: Run, data: str, seeds: Sequence[int], limit: int | None, batch_size: int) -> Result:
    """Score the run's student on the rows of ``data``, with the run's task and decoding."""
    display = Display()
    models = assembly.load_models(run, assembly.make_accelerator(run), display.note)
    rows = assembly.tokenised(run.data, data, models, display.note, limit)
    bare = next((row for row, references in rows.references.items() if not references), None)
    if bare is not None:
        raise DataError(f"{bare} has no reference to score against; give an output, or data.fields")
    greedy = assembly.make_sampling(run, run.evaluation.temperature).temperature == 0
    total = len(rows.examples) * (1 if greedy else len(seeds))
    with display.phase(f"score on {Path(data).stem}", total) as advance:
        return assess(
            run,
            models,
            models.student,
            rows,
            seeds=seeds,
            batch_size=batch_size,
            progress=lambda done, _: advance(done),
        )


def respond(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a ``response`` each, written by the run's student."""
    display = Display()
    models = assembly.load_models(run, assembly.make_accelerator(run), lambda _: None)
    chat = "template" not in run.data.model_fields_set and models.tokenizer.chat_template is not None
    task = InstructionTask(template="chat" if chat else run.data.template, system=run.data.system)
    examples, _ = task.examples(
        [{name: value for name, value in row.items() if name != "output"} for row in rows],
        models.tokenizer,
        max_prompt=run.data.max_prompt,
        max_length=run.data.max_length,
        end_id=cast(int, models.tokenizer.eos_token_id),
        source="prompts",
    )
    if len(examples) < len(rows):
        display.note(f"{len(rows) - len(examples)} rows have no text to answer and are left out")
    texts = answers(run, models, models.student, examples)
    places = [int(example.id.rsplit(":", 1)[1]) for example in examples]
    return [{**rows[i], "response": text} for i, text in zip(places, texts, strict=True)]


def shrink_to(teacher: str, target: Path, layers: int | list[int], trust_remote_code: bool) -> str:
    """Write a student made of some of the teacher's layers to ``target``; returns what was done."""
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another folder, or delete it")
    shutil.rmtree(target, ignore_errors=True)
    model = load_model(teacher, device="cpu", trust_remote_code=trust_remote_code)
    student = shrunk(model, layers)
    with written_aside(target) as scratch:
        save_model(student, load_tokenizer(teacher, trust_remote_code=trust_remote_code), scratch)
    before, after = num_parameters(model), num_parameters(student)
    kept: Any = student.config
    return f"{target}: {kept.num_hidden_layers} layers, {after / 1e6:.1f}M of {before / 1e6:.1f}M parameters"
