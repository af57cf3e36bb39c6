"""What a run would read, do and cost, and the usual mistakes in it: found in a minute, before hours are spent."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..accounting import account_for, kept_by
from ..assembly import make_accelerator, make_buffer, make_method
from ..caching import make_cache
from ..config import Run
from ..display import Display
from ..folder import RunFolder
from ..kept_teacher import KeptTeacher
from ..loading import load_models
from ..project import Stop, responses_server, teacher_responses, total_steps
from ..rows import answered, load_rows, read_data
from .cost import Cost, estimate
from .mistakes import Finding, of_cost, of_data, of_models, of_settings
from .subject import Subject

__all__ = ["Checked", "Cost", "Finding", "Subject", "check"]

READ = 16
"""Rows that both models read to be compared."""
WRITTEN = 4
"""Rows that the teacher answers, where it is to write all responses."""


@dataclass(frozen=True)
class Checked:
    """What was found: about the run, what it would cost, and what is wrong or worth a thought, the gravest first."""

    subject: Subject
    cost: Cost
    findings: list[Finding]

    @property
    def wrong(self) -> list[Finding]:
        """The findings that would waste the run."""
        return [finding for finding in self.findings if finding.grave]


def check(run: Run, display: Display | None = None) -> Checked:
    """Load everything that ``run`` names, try a step of it, and say what it would cost and what is wrong with it.

    Nothing is written but to a temporary folder. Where the teacher is to write responses, it answers a few prompts.

    Raises:
        DistillmError: what would end the run before its first step.
    """
    display = display or Display(quiet=True)
    with _scratch(run) as (here, folder), kept_by(account_for(run.device)):
        subject = _subject(here, folder, display)
        with display.phase("looking for mistakes", 3) as advance:
            findings = [*of_settings(run), *of_data(subject)]
            advance(1)
            findings += of_models(subject)
            advance(2)
            cost = estimate(subject)  # changes the student
            findings += of_cost(subject, cost)
            advance(3)
    return Checked(subject, cost, sorted(findings, key=lambda finding: not finding.grave))


@contextmanager
def _scratch(run: Run) -> Generator[tuple[Run, RunFolder]]:
    """``run`` as it is when it writes nothing that lasts: no responses, no tracker; and a folder that goes."""
    with tempfile.TemporaryDirectory(prefix="distillm-check-") as folder:
        data = run.data.model_copy(update={"responses_file": None})
        yield run.model_copy(update={"data": data, "tracker": "none"}), RunFolder(Path(folder))


def _subject(run: Run, folder: RunFolder, display: Display) -> Subject:
    server = responses_server(run, display.note)
    accelerator = make_accelerator(run)
    read = read_data(run)
    models = load_models(run, accelerator, display.note)
    rows = load_rows(run, read, models, display.note)
    steps = total_steps(run, rows.train)
    responses = teacher_responses(run, models, server, folder, display, Stop())

    longest = sorted(rows.train.examples, key=lambda e: len(e.tokens), reverse=True)
    train = longest[: run.train.micro_batch_size]
    if run.teacher_writes:
        few = replace(rows.train, examples=longest[:WRITTEN])
        train = answered(few, models, responses, by_teacher="all").examples
    else:  # a row without a response ends the run
        for each in (rows.train, rows.validation, *rows.tests.values()):
            answered(each, models, responses, by_teacher="none")
    asked = run.data.responses == "teacher" or not any(any(e.targets) for e in rows.validation.examples)
    validation = train if asked else [e for e in rows.validation.examples if any(e.targets)][:READ]
    method = make_method(run, models, train, rows.text, make_buffer(run, len(rows.train.examples)))
    if isinstance(models.pair.teacher, KeptTeacher):  # who answers from what was kept, or not at all
        tests = [example for test in rows.tests.values() for example in test.examples]
        kept = make_cache(
            run,
            models,
            method,
            train=rows.train.examples,
            validation=rows.validation.examples,
            tests=tests,
            steps=steps,
            note=display.note,
            precision=lambda: accelerator.autocast(),
        )
        models.pair = replace(models.pair, cache=kept)
    return Subject(run, read, models, rows, accelerator, method, steps, train, validation, asked)
