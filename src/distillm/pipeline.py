"""A whole run: from the configuration to the run folder, in phases that can be interrupted and resumed."""

import shlex
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedModel

from .accounting import account_for, kept_by, part, peak_bytes, peak_rate, settle, taken
from .assembly import make_accelerator, make_sampling
from .assess import answers, assess, by_token, teacher_cross_entropy
from .card import hub_names, write_card
from .checkpoint import list_checkpoints, load_checkpoint, load_student, save_checkpoint, step_of
from .config import Run, as_yaml, changed
from .display import Display
from .errors import Interrupted, ProcessError, StorageError, Terminated, TrainingError
from .evaluation.run import decode, seeds_used
from .folder import RunFolder
from .kept_teacher import KeptTeacher
from .processes import anyone, by_first, count, dealt, first_alone, out_of_touch, writes
from .project import (
    Project,
    Stop,
    build,
    cached_before,
    save_student,
    saved_settings,
    training,
    unless_stopped,
    validated,
)
from .provenance import provenance
from .report import write_report
from .report.read import mapping
from .screen import without_credentials
from .train import Step
from .writing import write_text

SAMPLED = "samples.jsonl"
METRICS = "metrics.jsonl"
SAME = 5.0
"""Seconds within which signals are one wish: a launcher, or a sweep, passes on what its processes have got as well."""
SYSTEMS = {"before": "the student before training", "student": "the student", "teacher": "the teacher"}


def distill(run: Run, display: Display | None = None, command: str | None = None, stop: Stop | None = None) -> Path:
    """Train, evaluate and report; returns the run folder.

    With ``run.resume == "auto"`` the work goes on from the newest checkpoint. ``command`` is kept for the report.
    ``stop`` is set where the user asks to stop, which a run that has nothing left to do does not heed.

    Raises:
        DistillmError: a setting, a file or a model cannot be used, or training diverged; the message says what to do.
        Interrupted: the user asked to stop; everything done so far is saved.
        ProcessError: another process of the run has ended or hangs.
    """
    folder = RunFolder(Path(run.output))
    with _all_heard(run, folder) as met:
        accelerator = make_accelerator(run, several=True)
        display = display if display is not None and writes() else Display(quiet=True)
        with folder.held(), _interruptible(display, stop or Stop()) as stop, kept_by(account_for(run.device)):
            checkpoint = folder.open(resume=run.resume == "auto", overwrite=run.overwrite)
            cached = None if checkpoint is None else by_first(partial(cached_before, run, folder))
            project = build(run, display, stop, folder, accelerator, cached)
            met.append(project)
            _whole(project, checkpoint, command)
    return folder.path


def _whole(project: Project, checkpoint: Path | None, command: str | None) -> None:
    folder, display = project.folder, project.display
    try:
        if checkpoint is not None:
            _resume(project, checkpoint, command)
        else:
            _begin(project, command)
        if project.state.step < project.state.total_steps:
            folder.forget_eval(system="student")
            _train(project)
        _finish(project)
        _log_time(project)
        by_first(lambda: write_card(folder.path))  # once the scores are there, which it tells
        by_first(lambda: display.note(_ended(folder)))
    except TrainingError as error:
        _event(project, "failed", str(error), rows=error.rows)
        state = project.state
        where = f"In {folder.path}, after step {state.step} of {state.total_steps}: {_last_good(project)}."
        raise TrainingError(f"{error}\n{where}", error.rows) from error


@contextmanager
def _all_heard(run: Run, folder: RunFolder) -> Generator[list[Project]]:
    """Says where the work stood when another process was not heard of any more; it is given the project for that."""
    met: list[Project] = []
    try:
        yield met
    except RuntimeError as error:
        if not out_of_touch(error):
            raise
        at = f"after step {met[0].state.step}" if met else "before the first step"
        made = list_checkpoints(folder.checkpoints)
        said = f"the newest checkpoint is step {step_of(made[-1])}" if made else "there is no checkpoint yet"
        raise ProcessError(
            f"{at}, another process of this run ended, or said nothing for {run.train.timeout_minutes:g} minutes; "
            f"{said}.\nLook at what it said, and start all of them again with resume=auto. If it was only slow, raise "
            f"train.timeout_minutes.\n({str(error).splitlines()[0].partition(' This is')[0]})"
        ) from error


def _ended(folder: RunFolder) -> str:
    report = write_report([folder.path], folder.path / "report.html")
    asked = f'distillm generate {shlex.quote(str(folder.path))} "..."'
    return f"student: {folder.student}\nreport:  {report}\nask it:  {asked}"


def _begin(project: Project, command: str | None) -> None:
    project.folder.forget_after(-1)
    # A start that was killed before its first checkpoint may have left scores.
    _changes(project, saved_settings(project.folder))
    _describe(project, command)
    _validation(project)  # first, because it finds damaged weights
    if "before" in project.run.evaluation.compare:
        _score_tests(project, project.models.student, "before")


@first_alone
def _describe(project: Project, command: str | None, saved: dict[str, Any] | None = None) -> None:
    """Write ``run.yaml``; ``saved`` is what a run that goes on has had there."""
    models = {"student": project.models.student, "teacher": project.models.teacher}
    device = project.accelerator.device
    origin = provenance(models, device, command) | {"resolved": _resolved(project)}
    bf16 = project.run.train.mixed_precision == "bf16" or project.run.student.dtype == "bfloat16"
    origin |= {"rows": _rows(project), "hub": hub_names(project.run.model_dump(mode="json"))}
    origin["peak_flops"] = peak_rate(device, torch.bfloat16 if bf16 else torch.float32)
    if saved is not None:  # what began the run stays; what it was gone on with is added
        before = mapping(saved, "provenance")
        origin |= {key: before[key] for key in ("command", "started") if key in before}
        earlier, now = before.get("resumed"), command and without_credentials(command)
        origin["resumed"] = [*(earlier if isinstance(earlier, list) else []), now]
    text = as_yaml(project.run.model_copy(update={"provenance": origin}))
    write_text(project.folder.path / "run.yaml", text)


def _rows(project: Project) -> dict[str, int]:
    """How many rows there are for what, and windows of plain text."""
    sets = {"train": project.train, "validation": project.validation}
    return {name: len(rows.examples) for name, rows in sets.items()} | {"text": len(project.text)}


def _resolved(project: Project) -> dict[str, float | str]:
    """What the settings that were left open came to: the configuration itself stays as it was asked for."""
    run, cache = project.run, project.models.pair.cache
    left_open = run.teacher is not None and run.teacher.cache == "auto"
    return {
        "train.steps": project.state.total_steps,
        "validation.every": project.every,
        "checkpoint.every": run.checkpoint.every or project.every,
        "evaluation.temperature": make_sampling(run, run.evaluation.temperature).temperature,
    } | ({"teacher.cache": "off" if cache is None else cache.kind} if left_open else {})


def _train(project: Project) -> None:
    state, run, total = project.state, project.run, project.state.total_steps
    began = state.step
    with project.display.phase("train", total, began) as advance, _saved_if_stopped(project):
        for step in training(project):
            _log_step(project, step)
            settle()
            advance(step.step, _words(step), None if step.skipped else step.loss)
            due = step.step == total or step.step % project.every == 0
            if due:
                _validation(project)
            save, stopping = run.checkpoint.every, anyone(project.stop.is_set())
            if step.step == total or (step.step % save == 0 if save else due) or stopping:
                _save(project)
            if stopping and step.step < total:
                _event(project, "interrupted", f"stopped by {signal.Signals(project.stop.by).name}")
                raise project.stop.error(
                    f"stopped after step {step.step} of {total}; everything is saved. Go on with:\n"
                    f"  distillm train {project.folder.path} resume=auto"
                )


@contextmanager
def _saved_if_stopped(project: Project) -> Generator[None]:
    """A step that writes many responses may be stopped on its way: what was before it is saved."""
    try:
        yield
    except Interrupted:
        if project.state.step:
            _save(project)
        raise


def _last_good(project: Project) -> str:
    """The newest checkpoint after which a loss was finite, in words."""
    made, step = [step_of(c) for c in list_checkpoints(project.folder.checkpoints)], project.state.step
    good = [s for s in made if s < step]
    said = f"the last good checkpoint is step {good[-1]}" if good else "no good checkpoint was made"
    if step in made:
        said += f" (that of step {step} may hold the fault: delete it if going on from it by resume=auto fails again)"
    return said


def _log_step(project: Project, step: Step) -> None:
    loss, grad_norm = (None, None) if step.skipped else (step.loss, step.grad_norm)
    entry: dict[str, Any] = {"kind": "step", "step": step.step, "loss": loss, "terms": step.terms}
    entry |= {"counts": step.counts, "lr": step.lr, "grad_norm": grad_norm, "seconds": round(step.seconds, 4)}
    entry |= {"tokens": step.tokens, "batch": step.batch, **step.figures}
    project.folder.append(METRICS, entry)
    if step.skipped:
        _event(project, "skipped", f"no row of the batch had a target token ({len(step.rows)} rows)")
    if project.run.tracker != "none":
        numbers = {"loss": loss, "lr": step.lr, "grad_norm": grad_norm, **step.terms, **step.figures}
        project.accelerator.log({k: v for k, v in numbers.items() if v is not None}, step=step.step)


def _log_time(project: Project) -> None:
    """Where the time went since the last such line, what was computed in it, and the most memory held so far."""
    seconds, flops = taken()
    entry: dict[str, Any] = {"kind": "time", "step": project.state.step, "flops": flops}
    entry |= {"seconds": {name: round(took, 3) for name, took in seconds.items()}}
    project.folder.append(METRICS, entry | {"peak_bytes": peak_bytes(project.accelerator.device)})


def _words(step: Step) -> str:
    phi, buffer = step.figures.get("probability"), step.figures.get("buffer")
    adaptive = "" if phi is None else f"  {step.batch}  p {phi:.1f}"
    adaptive += "" if buffer is None else f"  buffer {buffer}"
    loss = "skipped" if step.skipped else f"loss {step.loss:.3f}"
    return f"{loss}  {step.tokens / step.seconds:.0f} tok/s{adaptive}"


def _validation(project: Project) -> None:
    """Measure, keep the best, answer the sample prompts."""
    run, state = project.run, project.state
    figures = validated(project)
    project.folder.append(METRICS, {"kind": "validation", "step": state.step, **figures})
    written = _samples(project)
    value = -figures["rouge_l"] if run.validation.select == "rouge_l" else figures[run.validation.select]
    if state.step == 0:
        project.first = value
    elif project.best is None or value < project.best[0]:
        project.best = (value, state.step)
        _event(project, "best", f"{run.validation.select} {abs(value):.4f}")
        _save(project)
    if run.tracker != "none":
        project.accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step=state.step)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if name != "monitored")
    project.display.note(f"validation after step {state.step}: {shown}")
    if written:  # another one each time
        project.display.sample(*written[(len(state.validation) - 1) % len(written)])


@part("validation", whole=True)
def _samples(project: Project) -> list[tuple[str, str]]:
    """Let the student answer the sample prompts; each with its answer."""
    rows = project.validation.examples[: project.run.validation.samples]
    if not rows:
        return []
    models, tokenizer = project.models, project.models.tokenizer
    if models.teacher is not None and not project.teacher_texts:
        written = [e for e in rows if e.origin == "teacher"]
        texts = (
            decode(tokenizer, written)
            if len(written) == len(rows)
            else answers(project.run, models, models.teacher, rows)
        )
        project.teacher_texts = dict(zip((e.id for e in rows), texts, strict=True))
    texts = answers(project.run, models, models.student, rows)
    for example, text in zip(rows, texts, strict=True):
        entry = {
            "step": project.state.step,
            "id": example.id,
            "prompt": project.validation.prompts[example.id],
            "reference": project.validation.references[example.id][0],
            "teacher": project.teacher_texts.get(example.id),
            "student": text,
        }
        project.folder.append(SAMPLED, entry)
    return [(project.validation.prompts[e.id], text) for e, text in zip(rows, texts, strict=True)]


def _save(project: Project) -> None:
    if project.checkpointed == project.state.step:
        return
    extra = {
        "first": project.first,
        "best": project.best,
        "select": project.run.validation.select,
        "trigger": project.run.method.monitored,
        "teacher_texts": project.teacher_texts,
    }
    student, optimizer = project.models.student, project.optimizer
    with part("saving"):
        save_checkpoint(project.folder.checkpoints, student, optimizer, project.state, project.buffer, extra)
    project.checkpointed = project.state.step
    _log_time(project)  # a kill loses what came since
    _retain(project)


def _retain(project: Project) -> None:
    project.folder.retain(project.run.checkpoint.keep, project.best[1] if project.best else None)


def _resume(project: Project, checkpoint: Path, command: str | None) -> None:
    total = project.state.total_steps
    saved = load_checkpoint(checkpoint, project.models.student, project.optimizer, project.state, project.buffer)
    project.state.total_steps = total
    extra = saved["extra"]
    # The best by one figure says nothing about another.
    comparable = extra["select"] == project.run.validation.select
    best = extra["best"] if comparable else None
    project.best = None if best is None else (best[0], best[1])
    project.first = extra["first"] if comparable else None
    if not comparable:
        project.folder.forget_eval(system="student")  # of a student that was chosen by another figure
    if extra.get("trigger", project.run.method.monitored) != project.run.method.monitored:
        project.state.validation.clear()  # one's figures are no reference for another's
        project.display.note("method.trigger is another one now: the adaptive probability begins anew")
    project.teacher_texts = extra["teacher_texts"]
    project.checkpointed = step_of(checkpoint)
    _retain(project)  # the kill may have come between a checkpoint and this
    project.folder.forget_after(project.state.step)
    before = saved_settings(project.folder)
    differences = _changes(project, before)
    said = f"from {checkpoint.name}" + (f", with changed settings: {', '.join(differences)}" if differences else "")
    for damaged in project.folder.damaged:
        _event(project, "damaged", damaged)
        project.display.note(damaged)
    _event(project, "resumed", said)
    project.display.note(f"resumed {said}")
    if differences or mapping(before, "provenance", "resolved") != _resolved(project):
        _describe(project, command, before)
    for name, now in {"threads": torch.get_num_threads(), "processes": count()}.items():
        if saved[name] != now:
            said = f"the checkpoint was made with {saved[name]} {name}, now there are {now}"
            said += ": results can differ in the last bits" + (", and dropout's draws" if name == "processes" else "")
            _event(project, name, said)
            project.display.note(said)


def _changes(project: Project, saved: dict[str, Any]) -> list[str]:
    """The settings that differ from the ``saved`` ones of its folder, whose scores go where they would not compare."""
    folder = project.folder
    if not saved:  # nobody knows what the scores are of
        folder.forget_eval()
        return []
    differences, tests = changed(saved, project.run), {*mapping(saved, "data", "test"), *project.run.data.test}
    for key in (difference.partition("=")[0] for difference in differences):
        if key.startswith("data.test."):  # a name of a test set, or a part of where it is
            for name in tests:
                if f"{key}.".startswith(f"data.test.{name}."):
                    folder.forget_eval(data=name)
        elif key.startswith(("student.", "teacher.", "data.", "generation.", "evaluation.")):
            folder.forget_eval()
    return differences


def _finish(project: Project) -> None:
    """The best student becomes ``student/``; test rows are scored; the report is written."""
    models, folder = project.models, project.folder
    if project.best is not None and project.best[1] != project.state.step:
        best = folder.checkpoints / f"step-{project.best[1]:08d}"
        try:
            load_student(models.student, best)
            project.display.note(f"the best validation was after step {project.best[1]}: that student is kept")
        except StorageError as error:
            said = f"{error} It was the best by validation: the student of the last step is kept in its place."
            _event(project, "damaged", said)
            project.display.note(said)
    if project.first is not None and project.best is not None and project.best[0] >= project.first:
        said = _no_better(project, project.first, project.best[0])
        _event(project, "worse", said)
        project.display.note(f"WARNING: {said}")
    with part("saving"):
        save_student(project.run, models, folder.student)
    _score_tests(project, models.student, "student")
    _score_tokens(project)
    if "teacher" in project.run.evaluation.compare:
        if models.teacher is not None:
            _score_tests(project, models.teacher, "teacher")
        elif models.pair.teacher is not None:
            project.display.note("the teacher's own answers are not scored: it is not here to write any")
    if project.run.tracker != "none":
        project.accelerator.end_training()


def _no_better(project: Project, first: float, best: float) -> str:
    """What is said of a student that training has not made better, with the likeliest reason."""
    run = project.run
    said = f"by {run.validation.select} the student is no better than it was before training"
    usual = "try a lower optim.lr, more steps, or optim.warmup_steps"
    if run.validation.select != "cross_entropy":
        return f"{said}: {usual}"
    said += f" ({first:.3f} then, {best:.3f} at best)"
    with part("validation", whole=True):
        teacher = teacher_cross_entropy(run, project.models, project.validation.examples)
    if teacher is not None and project.method.reads_teacher and teacher > first:
        return (
            f"{said}, and the teacher ({teacher:.3f}) knows these responses less well than it did: fine-tune the "
            "teacher on them first (method.name=sft), or let it write them (data.responses=teacher)"
        )
    return f"{said}: {usual}"


def _score_tests(project: Project, model: PreTrainedModel, system: str) -> None:
    run, models = project.run, project.models
    seeds = seeds_used(run.evaluation.seeds, make_sampling(run, run.evaluation.temperature))
    path = {"before": run.student.path, "student": str(project.folder.student)}
    origin = path.get(system, run.teacher.path if run.teacher is not None else None)
    for name, rows in project.tests.items():
        file = f"{name}-{system}"
        if project.folder.has_eval(file):
            continue
        phase = project.display.phase(f"score {SYSTEMS[system]} on {name}", len(rows.examples) * len(seeds))
        with part("scoring", whole=True), phase as advance:
            checked = unless_stopped(project.stop, advance)
            result = assess(
                run,
                models,
                model,
                rows,
                seeds=seeds,
                batch_size=run.evaluation.batch_size,
                progress=lambda done, _, checked=checked: checked(done),
            )
        project.folder.write_eval(file, {"data": name, "system": system, "model": origin} | result)


def _score_tokens(project: Project) -> None:
    """Answers to the first test rows of each set in turn, or to validation rows where there are none, by token."""
    run, models, folder = project.run, project.models, project.folder
    if not run.evaluation.token_rows or models.pair.teacher is None or folder.has_tokens():
        return
    if isinstance(models.pair.teacher, KeptTeacher):
        project.display.note(
            "the student's answers are not compared token by token: the teacher is not here to read them"
        )
        return
    sets = project.tests or {"validation": project.validation}
    rows = dealt([[(name, e, of.prompts[e.id]) for e in of.examples] for name, of in sets.items()])
    with part("scoring", whole=True):
        folder.write_tokens(by_token(run, models, rows[: run.evaluation.token_rows]))


def _event(project: Project, event: str, message: str, **more: Any) -> None:
    entry = {"kind": "event", "step": project.state.step, "event": event, "message": message, **more}
    project.folder.append(METRICS, entry)


@contextmanager
def _interruptible(display: Display, stop: Stop) -> Generator[Stop]:
    """The first Ctrl-C or SIGTERM sets ``stop``, heeded at the next safe point; the second one stops at once."""
    asked_at = 0.0

    def ask(by: int, _: FrameType | None) -> None:
        nonlocal asked_at
        stop.by, before, asked_at = by, asked_at, time.monotonic()
        pressed_again = by == signal.SIGINT and count() == 1
        if stop.is_set() and (pressed_again or asked_at - before > SAME):
            display.note("stopped at once; the newest checkpoint stands, if there is one yet")
            if by == signal.SIGTERM:
                raise SystemExit(Terminated.exit_code)
            raise KeyboardInterrupt  # the command line ends with 130
        if stop.is_set():
            return
        stop.set()
        later = f"another SIGTERM, after {SAME:g} seconds, stops"
        again = "press Ctrl-C again to stop" if by == signal.SIGINT else later
        display.note(f"stopping after this step and saving; {again} at once")

    with heard(ask, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def heard(handler: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> Generator[None]:
    """``handler`` gets the ``signals`` meanwhile, where this is the thread that they reach."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)
