"""A whole run: from the configuration to the run folder, in phases that can be interrupted and resumed."""

import math
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import PreTrainedModel

from . import build as builder
from . import schedules
from .build import Models, Rows
from .checkpoint import load_checkpoint, load_student, save_checkpoint, step_of, write_text, written_aside
from .config import Distillm, Run, as_yaml
from .display import Display
from .errors import Interrupted, TrainingError
from .evaluation import evaluate, rouge_l, summary
from .evaluation.run import decode
from .folder import RunFolder
from .generation import generate, truncated
from .methods import Method
from .models import num_parameters
from .report import write_report
from .sources import ReplayBuffer, steps_per_epoch
from .teacher import Responses
from .train import Step, training_steps, validate
from .types import Example, State

SAMPLED = "samples.jsonl"
METRICS = "metrics.jsonl"


@dataclass
class Project:
    """Everything a run works with."""

    run: Run
    folder: RunFolder
    models: Models
    train: Rows
    validation: Rows
    tests: dict[str, Rows]
    method: Method
    optimizer: torch.optim.AdamW
    accelerator: Accelerator
    state: State
    buffer: ReplayBuffer
    display: Display
    stop: threading.Event
    best: tuple[float, int] | None = None
    checkpointed: int | None = None
    teacher_texts: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def every(self) -> int:
        """Steps between validations."""
        per_epoch = steps_per_epoch(len(self.train.examples), self.run.train.batch_size)
        return self.run.validation.every or min(per_epoch, self.state.total_steps)


def distill(run: Run, display: Display | None = None, command: str | None = None) -> Path:
    """Train, evaluate and report; returns the run folder.

    With ``run.resume == "auto"`` the work goes on from the newest checkpoint. ``command`` is kept for the report.

    Raises:
        DistillmError: a setting, a file or a model cannot be used, or training diverged; the message says what to do.
        Interrupted: the user asked to stop; everything done so far is saved.
    """
    display = display or Display(quiet=True)
    folder = RunFolder(Path(run.output))
    checkpoint = folder.open(resume=run.resume == "auto", overwrite=run.overwrite)
    with _interruptible(display) as stop:
        project = build(run, display, stop, folder)
        if checkpoint is not None:
            _resume(project, checkpoint)
        else:
            write_text(folder.path / "run.yaml", as_yaml(run.model_copy(update={"provenance": _origin(project, command)})))
        folder.forget_after(project.state.step if checkpoint is not None else -1)
        if checkpoint is None:
            _score_tests(project, project.models.student, "before")
            _validation(project)
        _train(project)
        _finish(project)
    return folder.path


def build(
    run: Run, display: Display | None = None, stop: threading.Event | None = None, folder: RunFolder | None = None
) -> Project:
    """The objects of a run, ready for ``training_steps``; the teacher's responses are written if the run needs them."""
    display, stop, folder = display or Display(quiet=True), stop or threading.Event(), folder or RunFolder(Path(run.output))
    accelerator = builder.make_accelerator(run)
    if run.tracker != "none":
        accelerator.init_trackers("distillm", config={"run": as_yaml(run)})
    models = builder.load_models(run, accelerator, display.note)
    train, validation, tests = builder.load_rows(run, models, display.note)
    buffer = ReplayBuffer(run.method.capacity if isinstance(run.method, Distillm) else 1)
    responses = _responses(run, models, folder, display, stop)
    train, validation = (builder.answered(run, rows, models, responses) for rows in (train, validation))
    tests = {name: builder.answered(run, rows, models, responses, keep=True) for name, rows in tests.items()}
    epochs = run.train.epochs or 1
    steps = run.train.steps or epochs * steps_per_epoch(len(train.examples), run.train.batch_size)
    return Project(
        run=run,
        folder=folder,
        models=models,
        train=train,
        validation=validation,
        tests=tests,
        method=builder.make_method(run, models, train.examples, buffer),
        optimizer=builder.make_optimizer(run, models.student),
        accelerator=accelerator,
        state=State(total_steps=steps),
        buffer=buffer,
        display=display,
        stop=stop,
    )


def steps(project: Project) -> Iterator[Step]:
    """The training steps of ``project``, from where its state stands."""
    run = project.run
    return training_steps(
        project.models.pair,
        project.method,
        project.optimizer,
        project.state,
        accelerator=project.accelerator,
        learning_rate=schedules.learning_rate(
            run.optim.lr, run.optim.schedule, run.optim.warmup_steps, min(run.optim.final_lr, run.optim.lr)
        ),
        micro_batch_size=run.train.micro_batch_size,
        max_grad_norm=run.train.max_grad_norm,
    )


def _train(project: Project) -> None:
    state, run, total = project.state, project.run, project.state.total_steps
    began = state.step
    with project.display.phase("train", total, began) as advance:
        try:
            for step in steps(project):
                _log_step(project, step)
                advance(step.step, _words(step))
                due = step.step == total or step.step % project.every == 0
                if due:
                    _validation(project)
                save = run.checkpoint.every
                if step.step == total or (step.step % save == 0 if save else due) or project.stop.is_set():
                    _save(project)
                if project.stop.is_set() and step.step < total:
                    _event(project, "interrupted", "stopped by the user")
                    raise Interrupted(
                        f"stopped after step {step.step} of {total}; everything is saved. Go on with:\n"
                        f"  distillm train {project.folder.path} resume=auto"
                    )
        except TrainingError as error:
            _event(project, "failed", str(error))
            last = project.checkpointed
            kept = f"the last good checkpoint is step {last}" if last is not None else "no checkpoint was made yet"
            raise TrainingError(f"{error}\nIn {project.folder.path}, {kept}.") from error


def _log_step(project: Project, step: Step) -> None:
    entry: dict[str, Any] = {"kind": "step", "step": step.step, "loss": step.loss, "terms": step.terms}
    entry |= {"counts": step.counts, "lr": step.lr, "grad_norm": step.grad_norm, "seconds": round(step.seconds, 4)}
    entry |= {"tokens": step.tokens, "batch": step.batch, **step.figures}
    if step.batch == "generated":
        ends = project.models.end_ids
        entry["truncated"] = sum(truncated(row, ends) for row in step.rows if row.origin == "student")
    project.folder.append(METRICS, entry)
    if step.skipped:
        _event(project, "skipped", f"no row of the batch had a target token ({len(step.rows)} rows)")
    if project.run.tracker != "none":
        numbers = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, **step.terms, **step.figures}
        project.accelerator.log({k: v for k, v in numbers.items() if v is not None}, step=step.step)


def _words(step: Step) -> str:
    phi, buffer = step.figures.get("probability"), step.figures.get("buffer")
    adaptive = "" if phi is None else f"  {step.batch}  p {phi:.1f}  buffer {buffer}"
    return f"loss {step.loss:.3f}  {step.tokens / step.seconds:.0f} tok/s{adaptive}"


def _validation(project: Project) -> None:
    """Measure, keep the best, answer the sample prompts."""
    run, models, state = project.run, project.models, project.state
    examples = project.validation.examples
    figures = validate(
        models.pair,
        examples,
        state,
        divergence=run.validation.divergence,
        batch_size=run.train.micro_batch_size,
    )
    trigger = run.method.trigger if isinstance(run.method, Distillm) else "validation_loss"
    if "rouge_l" in (run.validation.select, trigger):
        rows = examples[: run.validation.rouge_rows]
        texts = _answers(project, models.student, rows)
        wanted = [project.validation.references[e.id] for e in rows]
        scores = rouge_l(texts, wanted)
        figures["rouge_l"] = summary(scores)["mean"]
    # Every monitored value is one that falls as the student gets better.
    monitored = {
        "validation_loss": figures["cross_entropy"],
        "validation_divergence": figures.get("divergence", math.nan),
        "rouge_l": -figures.get("rouge_l", math.nan),
    }[trigger]
    state.validation.append(monitored)
    project.folder.append(METRICS, {"kind": "validation", "step": state.step, **figures, "monitored": monitored})
    value = -figures["rouge_l"] if run.validation.select == "rouge_l" else figures[run.validation.select]
    if state.step and (project.best is None or value < project.best[0]):
        project.best = (value, state.step)
        _event(project, "best", f"{run.validation.select} {abs(value):.4f}")
        _save(project)
    if run.tracker != "none":
        project.accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step=state.step)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
    project.display.note(f"validation after step {state.step}: {shown}")
    _samples(project)


def _samples(project: Project) -> None:
    rows = project.validation.examples[: project.run.validation.samples]
    if not rows:
        return
    models, tokenizer = project.models, project.models.tokenizer
    if models.teacher is not None and not project.teacher_texts:
        written = [e for e in rows if e.origin == "teacher"]
        texts = decode(tokenizer, written) if len(written) == len(rows) else _answers(project, models.teacher, rows)
        project.teacher_texts = dict(zip((e.id for e in rows), texts, strict=True))
    for example, text in zip(rows, _answers(project, models.student, rows), strict=True):
        entry = {
            "step": project.state.step,
            "id": example.id,
            "prompt": cast(str, tokenizer.decode(example.prompt, skip_special_tokens=True)),
            "reference": project.validation.references[example.id][0],
            "teacher": project.teacher_texts.get(example.id),
            "student": text,
        }
        project.folder.append(SAMPLED, entry)


def _answers(project: Project, model: PreTrainedModel, rows: list[Example]) -> list[str]:
    """Responses with the decoding of the final test, so that what selects is what is scored."""
    run, models = project.run, project.models
    answers = generate(
        model,
        rows,
        builder.make_sampling(run, run.evaluation.temperature),
        pad_id=models.pair.pad_id,
        end_ids=models.end_ids,
        num_tokens=models.pair.num_tokens,
        seed=run.evaluation.seeds[0],
        batch_size=run.generation.batch_size,
    )
    return decode(models.tokenizer, answers)


def _save(project: Project) -> None:
    if project.checkpointed == project.state.step:
        return
    extra = {"best": project.best, "teacher_texts": project.teacher_texts}
    student, optimizer = project.models.student, project.optimizer
    save_checkpoint(project.folder.checkpoints, student, optimizer, project.state, project.buffer, extra)
    project.checkpointed = project.state.step
    project.folder.retain(project.run.checkpoint.keep, project.best[1] if project.best else None)


def _resume(project: Project, checkpoint: Path) -> None:
    total = project.state.total_steps
    saved = load_checkpoint(checkpoint, project.models.student, project.optimizer, project.state, project.buffer)
    project.state.total_steps = total
    best = saved["extra"]["best"]
    project.best = None if best is None else (best[0], best[1])
    project.teacher_texts = saved["extra"]["teacher_texts"]
    project.checkpointed = step_of(checkpoint)
    project.folder.forget_after(project.state.step)
    _event(project, "resumed", f"from {checkpoint.name}")
    project.display.note(f"resumed from {checkpoint}")
    if saved["threads"] != torch.get_num_threads():
        said = f"the checkpoint was made with {saved['threads']} threads, now there are {torch.get_num_threads()}"
        project.display.note(f"{said}: results can differ in the last bits")


def _finish(project: Project) -> None:
    """The best student becomes ``student/``; test rows are scored; the report is written."""
    models, folder = project.models, project.folder
    if project.best is not None and project.best[1] != project.state.step:
        best = folder.checkpoints / f"step-{project.best[1]:08d}"
        load_student(models.student, load_file(best / "student.safetensors"))
        project.display.note(f"the best validation was after step {project.best[1]}: that student is kept")
    save_student(models, folder.student)
    _score_tests(project, models.student, "student")
    if models.teacher is not None and project.run.evaluation.compare:
        _score_tests(project, models.teacher, "teacher")
    if project.run.tracker != "none":
        project.accelerator.end_training()
    report = write_report([folder.path], folder.path / "report.html")
    project.display.note(f"student: {folder.student}\nreport:  {report}")


def save_student(models: Models, target: Path) -> None:
    """An ordinary model folder: weights, configuration, generation settings and tokenizer."""
    with written_aside(target) as scratch:
        student = models.student
        if student.generation_config is not None:
            student.generation_config.eos_token_id = list(models.end_ids)
            student.generation_config.pad_token_id = models.pair.pad_id
        student.save_pretrained(scratch)
        models.tokenizer.save_pretrained(scratch)


def _score_tests(project: Project, model: PreTrainedModel, system: str) -> None:
    run, models = project.run, project.models
    if system == "before" and not run.evaluation.compare:
        return
    for name, rows in project.tests.items():
        file = f"{name}-{system}"
        # The student is scored anew on a resumed run only if its file is missing, like the others.
        if project.folder.has_eval(file):
            continue
        with project.display.phase(f"score {system} on {name}", len(rows.examples) * len(run.evaluation.seeds)) as advance:
            result = evaluate(
                model,
                models.tokenizer,
                rows.examples,
                rows.references,
                builder.make_sampling(run, run.evaluation.temperature),
                run.evaluation.seeds,
                end_ids=models.end_ids,
                num_tokens=models.pair.num_tokens,
                batch_size=run.evaluation.batch_size,
                progress=lambda done, total: _checked(project.stop, advance)(done),
            )
        if system != "teacher" and models.teacher is not None:
            figures = validate(
                models.pair,
                [e for e in rows.examples if any(e.targets)],
                project.state,
                divergence=run.validation.divergence,
                batch_size=run.train.micro_batch_size,
            )
            result["scores"]["divergence"] = summary([figures["divergence"]])
        origin = str(project.folder.student) if system == "student" else run.teacher.path if run.teacher else None
        head = {"data": name, "system": system, "model": origin if system != "before" else run.student.path}
        project.folder.write_eval(file, head | result)


def _responses(run: Run, models: Models, folder: RunFolder, display: Display, stop: threading.Event) -> Responses:
    sampling = builder.make_sampling(run, run.data.responses_temperature)
    path = Path(run.data.responses_file) if run.data.responses_file else folder.path / "responses.jsonl"

    def write(prompts: Any) -> list[Example]:
        assert models.teacher is not None
        with display.phase("teacher's responses", len(prompts)) as advance:
            return generate(
                models.teacher,
                prompts,
                sampling,
                pad_id=models.pair.pad_id,
                end_ids=models.end_ids,
                num_tokens=models.pair.num_tokens,
                seed=run.seed,
                origin="teacher",
                batch_size=run.generation.batch_size,
                progress=_checked(stop, advance),
            )

    def text(tokens: list[int]) -> str:
        return cast(str, models.tokenizer.decode(tokens, skip_special_tokens=True))

    teacher = run.teacher.path if run.teacher is not None else ""
    return Responses(path, str(teacher), sampling, write, text, portion=8 * run.generation.batch_size)


def _checked(stop: threading.Event, advance: Callable[..., None]) -> Callable[[int], None]:
    """``advance``, unless the user asked to stop: these phases are cheap to begin again."""

    def check(done: int) -> None:
        if stop.is_set():
            raise Interrupted("stopped; what was finished is saved. Go on with the same command and resume=auto")
        advance(done)

    return check


def _event(project: Project, event: str, message: str) -> None:
    project.folder.append(METRICS, {"kind": "event", "step": project.state.step, "event": event, "message": message})


@contextmanager
def _interruptible(display: Display) -> Iterator[threading.Event]:
    """The first Ctrl-C asks to stop at the next safe point; the second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_: int, __: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        display.note("stopping after this step and saving; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _origin(project: Project, command: str | None) -> dict[str, Any]:
    models = {"student": project.models.student, "teacher": project.models.teacher}
    return {
        "distillm": version("distillm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "git": _revision(),
        "command": command or " ".join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": str(project.accelerator.device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "models": {name: _facts(model) for name, model in models.items() if model is not None},
    }


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    facts = {"parameters": num_parameters(model), "layers": getattr(config, "num_hidden_layers", None)}
    return facts | {"width": getattr(config, "hidden_size", None), "vocabulary": config.vocab_size}


def _revision() -> str | None:
    """The git revision of the working folder, if it is one."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
