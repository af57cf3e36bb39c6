"""What the small commands do: score a model, answer prompts, shrink a teacher, train a tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from . import assembly, loading
from .assess import answers, assess
from .caching import with_kept_states
from .checkpoint import written_aside
from .config import Run
from .data import all_texts
from .data_settings import Data, Source
from .display import Display
from .errors import ConfigError, DataError, StorageError
from .evaluation import Result
from .evaluation.run import seeds_used
from .kept_teacher import KeptTeacher, keep
from .models import load_model, load_tokenizer, num_parameters, save_model
from .project import build
from .readers import LocalTeacher
from .report.text import parameter_count
from .rows import check_room, end_of_response, placed, read_source, task_of, tokenised
from .shrinking import shrink as shrunk
from .tasks import CHAT
from .teacher_cache import Disk
from .train import micro_batches
from .vocabulary import end_ids, train_tokenizer


def score(run: Run, data: Mapping[str, str], system: Literal["student", "teacher"] = "student") -> Iterator[Result]:
    """Score a model of the run on each of ``data``, by name, as the run's settings say.

    All files are read before the models are, which are loaded once.

    Raises:
        ConfigError: there is no such model, or a row does not fit it.
        DataError: a file cannot be read, or a row has no reference.
    """
    display = Display()
    if system == "teacher" and (run.teacher is None or not run.teacher.here):
        elsewhere = "the run's teacher is not here, and what is kept or served of it writes no answers to score"
        raise ConfigError("the run has no teacher to score" if run.teacher is None else elsewhere)
    sources = {name: placed(run.data, given, "test") for name, given in data.items()}
    read = {name: read_source(run.data, source)[: run.evaluation.limit] for name, source in sources.items()}
    for name, found in read.items():
        _check_references(run.data, sources[name], found)
    models = loading.load_models(run, assembly.make_accelerator(run), display.note)
    model = models.student if system == "student" else models.teacher
    assert model is not None
    fitting = _fitting(run, models)
    rows = {name: tokenised(fitting, sources[name], found, models, display.note) for name, found in read.items()}
    for found in rows.values():
        check_room(models, found.examples, run.generation.max_new_tokens)
    seeds = seeds_used(run.evaluation.seeds, assembly.make_sampling(run, run.evaluation.temperature))
    models.pair = with_kept_states(models.pair, [e for found in rows.values() for e in found.examples], display.note)
    for name, found in rows.items():
        with display.phase(f"score on {name}", len(found.examples) * len(seeds)) as advance:
            yield assess(
                run,
                models,
                model,
                found,
                seeds=seeds,
                batch_size=run.evaluation.batch_size,
                progress=lambda done, _, advance=advance: advance(done),
            )


def _check_references(data: Data, source: Source, rows: Sequence[Mapping[str, Any]]) -> None:
    task = task_of(data, source)
    for i, row in enumerate(rows):
        row_id = f"{Path(source.path).stem}:{i}"
        task.user_text(row, row_id=row_id)  # which names a field that the task needs
        if not task.references(row, row_id=row_id):
            raise DataError(
                f"{row_id} has no reference to score against: no field '{task.answer}'. Add one to every row, or let "
                f"the model answer without scores: distillm generate MODEL --file {source.path}"
            )


def _fitting(run: Run, models: loading.Models) -> Data:
    """``run.data``; what was not chosen there fits the model: its own chat template, and the length it reads."""
    fitting: dict[str, Any] = {}
    if models.tokenizer.chat_template is not None:
        fitting["template"] = CHAT
    room = getattr(models.student.config, "max_position_embeddings", None)
    if isinstance(room, int) and room > run.generation.max_new_tokens + 1:
        fitting["max_length"] = min(run.data.max_length, room)
        fitting["max_prompt"] = min(run.data.max_prompt, room - run.generation.max_new_tokens)
    return run.data.model_copy(update={k: v for k, v in fitting.items() if k not in run.data.model_fields_set})


def respond(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a ``response`` each, written by the run's student."""
    display = Display()
    models = loading.load_models(run, assembly.make_accelerator(run), lambda _: None)
    data = _fitting(run, models)
    task, asked = task_of(data).only_asked(rows)
    examples, report = task.without_missing(asked).examples(
        asked,
        models.tokenizer,
        max_prompt=data.max_prompt,
        max_length=data.max_length,
        end_id=end_of_response(data, models),
        source="prompts",
    )
    if report.cut_prompts or report.dropped:
        display.note(f"prompts: {report}")
    check_room(models, examples, run.generation.max_new_tokens)
    texts = answers(run, models, models.student, examples)
    places = [int(example.id.rsplit(":", 1)[1]) for example in examples]
    return [{**rows[i], "response": text} for i, text in zip(places, texts, strict=True)]


def warm(run: Run, display: Display) -> str:
    """Let the run's teacher read the rows of the run that its cache has not; returns what was done.

    Beside its states goes what makes heads of them, so that a run on these rows can do without the teacher.

    Raises:
        ConfigError: the run has no teacher, or one whose states are not kept.
        StorageError: there was no room for all of them.
    """
    if run.teacher is None:
        raise ConfigError("the run has no teacher whose states could be kept")
    project = build(run, display)
    pair = project.models.pair
    if isinstance(pair.teacher, KeptTeacher):
        raise ConfigError("teacher.cached means that the teacher is not here: nobody can read more rows")
    if pair.cache is None:
        raise ConfigError("this teacher's states are not kept: its logits are formed whole")
    # As in a run: rows are trained on in mixed precision, where it is set, and validated on without.
    scored = [project.validation, *project.tests.values()]
    sets = [(project.train, project.accelerator.autocast), *((rows, nullcontext) for rows in scored)]
    done, total = 0, sum(any(e.targets) for rows, _ in sets for e in rows.examples)
    with display.phase("the teacher reads", total) as advance:
        for rows, precision in sets:
            read = [e for e in rows.examples if any(e.targets)]
            for part in micro_batches(read, pair.cache.batch_size, pair.device):
                with precision():
                    pair.teacher_head(part)
                done += len(part)
                advance(done)
    if isinstance(pair.cache.lasting, Disk) and not pair.cache.lasting.writes:
        raise StorageError("not all rows could be kept; make room, and give the same command again for the others")
    lacking = 0
    for rows, precision in sets:
        with precision():
            lacking += len(pair.cache.lacking([e for e in rows.examples if any(e.targets)]))
    if lacking:
        raise StorageError(
            f"{lacking} of {total} rows are not kept: {run.teacher.folder} may hold teacher.cache_gib="
            f"{run.teacher.cache_gib:g}, so that others had to go for them. Give more"
        )
    kept = f"{total} rows are kept; train with teacher.cache=disk"
    if not isinstance(pair.teacher, LocalTeacher) or run.teacher.adapter_off:
        return kept
    ends = end_ids(pair.teacher.model, project.models.tokenizer)
    keep(run.teacher.folder / pair.cache.teacher, pair.teacher, project.models.tokenizer, ends)
    return f"{kept}. Where the teacher is not, a copy of {run.teacher.folder} does: teacher.cached={pair.cache.teacher}"


def as_rows(run: Run, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the run's task in which the user says nothing but ``prompts``."""
    task = task_of(run.data)
    return [task.row_of(prompt) for prompt in prompts]


def asked_in(run: Run, row: Mapping[str, Any]) -> str:
    """What the user says in a row, to be shown before its response."""
    return task_of(run.data).user_text(row)


def tokenizer_to(target: Path, files: Sequence[str], model: Literal["bpe", "unigram"], size: int) -> str:
    """Train a tokenizer on all texts of ``files`` and write it to ``target``; returns what was done."""
    must_be_free(target)
    trained = train_tokenizer(all_texts(files), model=model, size=size)
    with written_aside(target) as scratch:
        trained.save_pretrained(scratch)
    return f"{target}: {len(trained)} tokens"


def must_be_free(target: Path) -> None:
    """Raise ConfigError unless ``target`` is new or an empty folder: what stands there would be replaced."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; choose another folder, or delete it")


def shrink_to(
    teacher: str,
    target: Path,
    layers: int | list[int],
    decoder_layers: int | list[int] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write a student made of some of the teacher's layers to ``target``; returns what was done."""
    must_be_free(target)
    model = load_model(teacher, device="cpu", trust_remote_code=trust_remote_code)
    student = shrunk(model, layers, decoder_layers=decoder_layers)
    with written_aside(target) as scratch:
        save_model(student, load_tokenizer(teacher, trust_remote_code=trust_remote_code), scratch)
    before, after = (parameter_count(num_parameters(each)) for each in (model, student))
    kept: Any = student.config
    return f"{target}: {kept.num_hidden_layers} layers, {after} of {before} parameters"
