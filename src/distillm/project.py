"""The objects of a run, ready for ``training_steps``."""

import math
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from . import assembly, schedules
from .accounting import part
from .adapters import merged
from .assess import answers, measure
from .caching import Kind, make_cache
from .checkpoint import student_tensors, written_aside
from .client import Server
from .completions import PATH, SETTING, Completions
from .config import Run, as_yaml, changed, read_yaml
from .display import Display
from .errors import ConfigError, Interrupted, Terminated, TrainingError
from .evaluation import rouge_l
from .folder import RunFolder
from .generation import generate, truncated
from .loading import Models, connected, load_models
from .methods import Method
from .models import num_parameters, save_model
from .notebook import facts_lines, facts_table
from .processes import by_first
from .report.read import mapping
from .rows import Rows, answered, end_of_response, load_rows, read_data
from .sharding import gathered, sharded
from .sources import ReplayBuffer, steps_per_epoch
from .teacher import Responses
from .train import Step, training_steps
from .types import Example, State


class Stop(threading.Event):
    """Whether somebody asked to stop: the user by Ctrl-C, or the system by SIGTERM."""

    by: int = signal.SIGINT

    def error(self, message: str) -> Interrupted:
        """What the work ends with, so that the exit code says who asked."""
        return (Terminated if self.by == signal.SIGTERM else Interrupted)(message)


@dataclass
class Project:
    """Everything a run works with."""

    run: Run
    folder: RunFolder
    models: Models
    train: Rows
    validation: Rows
    tests: dict[str, Rows]
    text: list[Example]
    method: Method
    optimizer: torch.optim.AdamW
    accelerator: Accelerator
    state: State
    buffer: ReplayBuffer
    display: Display
    stop: Stop
    first: float | None = None
    best: tuple[float, int] | None = None
    checkpointed: int | None = None
    teacher_texts: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def every(self) -> int:
        """Steps between validations."""
        return validated_every(self.run, self.train, self.state.total_steps)

    def __repr__(self) -> str:
        return facts_lines("Project", self._facts())

    def _repr_html_(self) -> str:
        return facts_table("Project", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        models = {"student": self.models.student, "teacher": self.models.teacher}
        sizes = [(role, f"{num_parameters(m):,} parameters") for role, m in models.items() if m is not None]
        rows = {"train": self.train, "validation": self.validation, **self.tests}
        counts = ", ".join(f"{len(found.examples)} {name}" for name, found in rows.items())
        step = f"{self.state.step} of {self.state.total_steps}, validated every {self.every}"
        return [("method", self.run.method.name), *sizes, ("rows", counts), ("step", step), ("output", self.run.output)]


def build(
    run: Run,
    display: Display | None = None,
    stop: Stop | None = None,
    folder: RunFolder | None = None,
    accelerator: Accelerator | None = None,
    cached: Kind | None = None,
) -> Project:
    """The objects of a run, ready for ``training_steps``; the teacher's responses are written if the run needs them.

    ``cached`` is what ``teacher.cache=auto`` came to before, of a run that goes on.
    """
    display, stop, folder = (
        display or Display(quiet=True),
        stop or Stop(),
        folder or RunFolder(Path(run.output)),
    )
    server = responses_server(run, display.note)
    accelerator = accelerator or assembly.make_accelerator(run)
    with part("data"):
        read = read_data(run)
    with part("loading"):
        models = load_models(run, accelerator, display.note)
    with part("data"):
        rows = load_rows(run, read, models, display.note)
    steps = total_steps(run, rows.train)
    folder.clear()
    if run.tracker != "none":
        accelerator.init_trackers("distillm", config={"run": as_yaml(run)})
    responses = teacher_responses(run, models, server, folder, display, stop)
    # SeqKD trains on the teacher's responses, and is measured like every other method on the data's own.
    absent = "missing" if run.teacher_writes else "none"
    train = answered(rows.train, models, responses, by_teacher="all" if run.teacher_writes else "none")
    asked = "all" if run.data.responses == "teacher" else absent
    validation = answered(rows.validation, models, responses, by_teacher=asked)
    tests = {name: answered(test, models, responses, by_teacher=absent) for name, test in rows.tests.items()}

    @contextmanager
    def phase(name: str, total: int) -> Generator[Callable[..., None]]:
        with display.phase(name, total) as advance:
            yield unless_stopped(stop, advance)

    buffer = assembly.make_buffer(run, len(train.examples))
    _say_cut(run, models, [train, validation, *tests.values()], display)
    method = assembly.make_method(run, models, train.examples, rows.text, buffer, phase)
    cache = make_cache(
        run,
        models,
        method,
        train=train.examples,
        validation=validation.examples,
        tests=[example for test in tests.values() for example in test.examples],
        steps=steps,
        note=display.note,
        precision=lambda: accelerator.autocast(),
        before=cached,
    )
    models.pair = replace(models.pair, cache=cache)
    return Project(
        run=run,
        folder=folder,
        models=models,
        train=train,
        validation=validation,
        tests=tests,
        text=rows.text,
        method=method,
        optimizer=assembly.make_optimizer(run, models.student),
        accelerator=accelerator,
        state=State(total_steps=steps),
        buffer=buffer,
        display=display,
        stop=stop,
    )


def saved_settings(folder: RunFolder) -> dict[str, Any]:
    """The settings in the run folder; empty where there are none.

    Raises:
        ConfigError: they cannot be read.
    """
    path = folder.path / "run.yaml"
    if not path.exists():
        return {}
    try:
        return read_yaml(str(folder.path))
    except ConfigError as error:
        raise ConfigError(f"{error}\nDelete {path} to go on with the settings given: it is written anew") from error


def cached_before(run: Run, folder: RunFolder) -> Kind | None:
    """What ``teacher.cache=auto`` came to when the run in ``folder`` began; None where what it came of has changed."""
    saved, came_of = saved_settings(folder), ("teacher.", "student.", "data.", "method.", "generation.")
    if not saved or any(difference.startswith(came_of) for difference in changed(saved, run)):
        return None
    kind = mapping(saved, "provenance", "resolved").get("teacher.cache")
    return kind if kind in ("memory", "disk", "off") else None


def validated_every(run: Run, train: Rows, steps: int) -> int:
    """Steps between validations in a run of so many ``steps`` over ``train``."""
    return run.validation.every or min(steps_per_epoch(len(train.examples), run.train.batch_size), steps)


def total_steps(run: Run, train: Rows) -> int:
    """The optimizer steps of a run over ``train``.

    Raises:
        ConfigError: the learning rate would never reach its peak.
    """
    epochs, warmup = run.train.epochs or 1, run.optim.warmup_steps
    total = run.train.steps or epochs * steps_per_epoch(len(train.examples), run.train.batch_size)
    if warmup >= total:
        raise ConfigError(f"optim.warmup_steps ({warmup}) must be below the {total} steps of train.epochs={epochs}")
    return total


def _say_cut(run: Run, models: Models, sets: list[Rows], display: Display) -> None:
    written = [e for rows in sets for e in rows.examples if e.origin == "teacher"]
    cut = sum(truncated(e, models.end_ids) for e in written)
    if cut:
        display.note(
            f"{cut} of the teacher's {len(written)} responses are cut at generation.max_new_tokens="
            f"{run.generation.max_new_tokens} and have no end token to learn"
        )


def steps(project: Project) -> Iterator[Step]:
    """The training steps of ``project``, from where its state stands, with a validation wherever the run has one.

    Validation moves DistiLLM's probability; its history is ``project.state.validation``.
    """
    if not project.state.validation:
        validated(project)
    for step in training(project):
        yield step
        if step.step % project.every == 0:
            validated(project)


@part("validation", whole=True)
def validated(project: Project) -> dict[str, float]:
    """The figures of the student on the validation rows; what the method monitors joins the history that it reads.

    Raises:
        TrainingError: the cross-entropy is not finite, or the divergence is no number.
    """
    run, models, state = project.run, project.models, project.state
    examples = project.validation.examples
    figures = measure(run, models, examples)
    if not math.isfinite(figures["cross_entropy"]):
        raise TrainingError(
            f"step {state.step}: the cross-entropy on the validation rows is {figures['cross_entropy']}.\n"
            + ("Try a lower optim.lr, or train in float32." if state.step else "The student's weights are damaged.")
        )
    if math.isnan(figures.get("divergence", 0.0)):
        raise TrainingError(
            f"step {state.step}: the divergence to the teacher on the validation rows is nan, although the student's "
            "cross-entropy is finite.\nThe teacher's weights are damaged, or its type does not hold what it computes."
        )
    if "rouge_l" in (run.validation.select, run.method.monitored):
        rows = examples[: run.validation.rouge_rows]
        texts = answers(run, models, models.student, rows)
        scores = rouge_l(texts, [project.validation.references[e.id] for e in rows])
        figures["rouge_l"] = sum(scores) / len(scores)
    # Every monitored value is one that falls as the student gets better.
    monitored = {
        "validation_loss": figures["cross_entropy"],
        "validation_divergence": figures.get("divergence", math.nan),
        "rouge_l": -figures.get("rouge_l", math.nan),
    }[run.method.monitored]
    state.validation.append(monitored)
    return figures | {"monitored": monitored}


def training(project: Project) -> Iterator[Step]:
    """The training steps alone: whoever asks for them validates."""
    run, optim = project.run, project.run.optim
    final_lr = min(1e-7, optim.lr) if optim.final_lr is None else optim.final_lr
    return training_steps(
        project.models.pair,
        project.method,
        project.optimizer,
        project.state,
        accelerator=project.accelerator,
        learning_rate=schedules.learning_rate(optim.lr, optim.schedule, optim.warmup_steps, final_lr),
        micro_batch_size=run.train.micro_batch_size,
        max_grad_norm=run.train.max_grad_norm,
    )


def save_student(run: Run, models: Models, target: Path) -> None:
    """An ordinary model folder: weights (or the adapter alone), configuration, generation settings and tokenizer.

    All processes call it, and the first one writes.
    """
    lora, student = run.student.lora, models.student
    spread = gathered(student_tensors(student)) if sharded(student) else None

    def write() -> None:
        with written_aside(target) as scratch:
            student.generation_config.eos_token_id = list(models.end_ids)
            student.generation_config.pad_token_id = models.pair.layout.pad_id
            saved = merged(student) if lora is not None and lora.merge else student
            save_model(saved, models.tokenizer, scratch, weights=spread)
            for path in (*target.glob("LICENSE*"), *target.glob("NOTICE*")):  # which the user laid there
                if path.is_file() and not path.is_symlink():
                    shutil.copy2(path, scratch)

    by_first(write)


def teacher_responses(
    run: Run, models: Models, server: Server | None, folder: RunFolder, display: Display, stop: Stop
) -> Responses:
    """Whoever answers prompts as the run's teacher: the model here, or ``server``. What was answered is on file."""
    completions = None if server is None else _completions(run, models, server)
    sampling = assembly.make_sampling(run, run.data.responses_temperature)
    path = Path(run.data.responses_file) if run.data.responses_file else folder.path / "responses.jsonl"
    served = run.data.responses_server

    def write(prompts: Sequence[Example], keep: Callable[[list[Example]], None]) -> list[Example]:
        with display.phase("teacher's responses", len(prompts)) as advance:
            progress = unless_stopped(stop, advance)
            if completions is not None:
                ask = partial(completions, prompts, sampling, seed=run.seed, progress=progress, keep=keep)
                return by_first(ask)
            assert models.teacher is not None
            return generate(
                models.teacher,
                prompts,
                sampling,
                layout=models.pair.layout_for("teacher"),
                end_ids=models.end_ids,
                num_tokens=models.pair.num_tokens,
                seed=run.seed,
                origin="teacher",
                batch_size=run.generation.batch_size,
                progress=progress,
            )

    def text(tokens: list[int]) -> str:
        return cast(str, models.tokenizer.decode(tokens, skip_special_tokens=True))

    teacher = run.teacher.path if run.teacher is not None else ""
    return Responses(
        path,
        str(teacher) if served is None else served.url,
        models.teacher_weights if served is None else served.name,
        sampling,
        write,
        text,
        portion=8 * (run.generation.batch_size if served is None else served.jobs),
        seed=run.seed,
        note=display.note,
    )


def responses_server(run: Run, note: Callable[[str], None]) -> Server | None:
    """The server that writes the teacher's responses, if there is one; what is wrong with it is said before any work.

    Raises:
        ConfigError: its address or the key is malformed, or httpx is not installed.
    """
    given = run.data.responses_server
    if given is None:
        return None
    if not run.teacher_writes:
        note(f"data.responses_server is not asked: method {run.method.name} learns from the data's responses")
        return None
    return connected(SETTING, PATH, given, note)


def _completions(run: Run, models: Models, server: Server) -> Completions:
    given = run.data.responses_server
    assert given is not None
    ends, last = models.end_ids, end_of_response(run.data, models)
    num_tokens = models.pair.num_tokens
    return Completions(server, given.model, models.tokenizer, ends, last, num_tokens, given.prompt, given.body)


def unless_stopped(stop: Stop, advance: Callable[..., None]) -> Callable[[int], None]:
    """``advance``, unless the user asked to stop: these phases are cheap to begin again."""

    def check(done: int) -> None:
        if stop.is_set():
            raise stop.error("stopped; what was finished is saved. Go on with the same command and resume=auto")
        advance(done)

    return check
