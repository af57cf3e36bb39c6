"""The commands that let a model answer: ``eval``, ``generate``."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from ..config import Run
from ..errors import ConfigError
from ..paths import FILE_NAME, is_file
from ..screen import visible
from ..writing import make_folder_of, write_anew
from .common import (
    Device,
    MaxNew,
    TaskName,
    Template,
    plain_console,
    run_with,
    settings_for,
    whole_numbers,
)

ALONE = "--predictions FILE are texts that are there already: of the other options only --output and --metrics"


def evaluate_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|MODEL]", help="A run folder, model folder, GGUF file or hub name."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows with references: a file, a folder, a data set's name, NAME=any of them. Repeatable."),
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Where data sets known by name lie, as NAME/test.jsonl.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score these texts instead: JSON Lines with `prediction` and `references`.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Metrics on texts with commas, such as rouge_l,bleu,chrf; see docs/evaluation.md."),
    ] = None,
    system: Annotated[str, typer.Option(help="Whose answers: student, or the run's teacher.")] = "student",
    seeds: Annotated[str | None, typer.Option(help="Decoding seeds with commas: 10,20,30.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure the nearness to this teacher.")] = None,
    template: Template = None,
    task: TaskName = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    max_new_tokens: MaxNew = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows generated at a time.")] = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="The JSON file of scores and predictions; for several --data their folder.")
    ] = None,
) -> None:
    """Score a model, a run, or given predictions: on texts, by length, by its probabilities, against a teacher.

    \b
    distillm eval runs/mine --data my/test.jsonl --data other/test2.jsonl --metrics rouge_l,bleu,chrf
    distillm eval model.gguf --data my/test.jsonl --output scores.json
    distillm eval --predictions answers.jsonl --metrics bleu

    What is not given is as in the run; for a model, as in the defaults of `distillm schema`, but that it reads rows by
    its own chat template where it has one, and no longer ones than it can. Without --output a run's
    scores go to RUN/eval/DATA-SYSTEM.json, where `distillm compare` and `distillm report` find them.
    """
    from ..evaluation.metrics import known

    chosen = None if metrics is None else list(known(name.strip() for name in metrics.split(",")))
    evaluation = {"seeds": whole_numbers("--seeds", seeds), "temperature": temperature}
    evaluation |= {"limit": limit, "batch_size": batch_size}
    if predictions is not None:
        if system != "student":
            raise ConfigError(ALONE)
        if any(given for given in (source, data, folder, teacher, template, task, max_new_tokens, device)) or any(
            given is not None for given in evaluation.values()
        ):
            raise ConfigError(ALONE)
        _score_given(predictions, chosen, output)
        return
    if source is None or not data:
        own = "" if source is None else f" (its own test sets are scored by `distillm train {source} resume=auto`)"
        raise ConfigError("give a run or model and --data FILE, or --predictions FILE" + own)
    settings = settings_for(source, template, device, task)
    named = _named(data)
    settings["data"] |= {"train": next(iter(named.values()))} | ({} if folder is None else {"folder": folder})
    targets = _targets(source, list(named), system, output)
    if teacher is not None:
        settings["teacher"] = {"path": teacher}
    changes = {"evaluation": evaluation | {"metrics": chosen}, "generation": {"max_new_tokens": max_new_tokens}}
    _score_model(source, run_with(settings, source, changes), system, named, targets)


def _score_given(predictions: Path, metrics: list[str] | None, output: Path | None) -> None:
    from ..data import read_rows
    from ..evaluation import DEFAULT, score_predictions

    if output is not None:
        make_folder_of(output)
    result = score_predictions(read_rows(str(predictions)), predictions.name, metrics or DEFAULT)
    _keep({"data": predictions.stem, "system": "student", "model": None} | result, output)


def _score_model(source: str, run: Run, system: str, data: dict[str, str], targets: dict[str, Path | None]) -> None:
    from ..commands import score

    if system != "student" and system != "teacher":
        raise ConfigError(f"--system {system}: give student or teacher")
    model = source if system == "student" else run.teacher and run.teacher.path
    for name, result in zip(data, score(run, data, system), strict=True):
        _keep({"data": name, "system": system, "model": model} | result, targets[name])


def _named(data: list[str]) -> dict[str, str]:
    """The data sets by the names that their scores are kept under: NAME=DATA, or the name of the file."""
    named: dict[str, str] = {}
    for given in data:
        name, sign, path = given.partition("=")
        if not sign or not re.fullmatch(FILE_NAME, name):
            name, path = Path(given).stem, given
        if name in named:
            raise ConfigError(
                f"two --data are called {name}, and scores are kept by name; give one as --data NAME={path}"
            )
        named[name] = path
    return named


def _targets(source: str, names: list[str], system: str, output: Path | None) -> dict[str, Path | None]:
    """Where the scores of each data set go: nowhere, to a file, or to a folder in which nothing is replaced."""
    in_run = is_file(Path(source) / "run.yaml")
    if output is None and not in_run:
        return dict.fromkeys(names)
    if output is not None and len(names) == 1:
        targets = [output]
    else:
        folder = Path(source) / "eval" if output is None else output
        targets = [folder / f"{name}-{system}.json" for name in names]
        there = next((target for target in targets if target.exists()), None)
        if there is not None:
            instead = "FILE (the same one to replace them)" if len(names) == 1 else "FOLDER, or delete them"
            raise ConfigError(f"{there} holds scores already; give --output {instead}")
    for target in targets:
        make_folder_of(target)
    return dict(zip(names, targets, strict=True))


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, GGUF file or hub name.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Instructions to answer.")] = None,
    file: Annotated[str | None, typer.Option(help="Rows to answer instead (JSON Lines, CSV, Parquet).")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON Lines here instead of printing.")] = None,
    template: Template = None,
    task: TaskName = None,
    max_new_tokens: MaxNew = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = None,
) -> None:
    """Let a model answer prompts."""
    from ..commands import as_rows, asked_in, respond
    from ..data import read_rows

    if bool(prompts) == bool(file):
        raise ConfigError("give either one or more prompts, or --file FILE")
    settings = settings_for(model, template, device, task)
    settings["data"] |= {"train": "prompts", "responses": "dataset"}
    settings |= {"teacher": None, "method": {"name": "sft"}, "validation": {}}  # only the student is needed
    decoding = {"evaluation": {"seeds": [seed], "temperature": temperature}}
    run = run_with(settings, model, {**decoding, "generation": {"max_new_tokens": max_new_tokens}})
    if output is not None:
        make_folder_of(output)
    answers = respond(run, read_rows(file) if file else as_rows(run, prompts or []))
    if output is not None:
        write_anew(output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return
    for answer in answers:
        typer.echo(visible(f"> {asked_in(run, answer)}\n{answer['response']}\n"))


def _keep(result: dict[str, Any], output: Path | None) -> None:
    """Write the scores and predictions, where they are to be kept, and show the scores."""
    if output is not None:
        write_anew(output, json.dumps(result, ensure_ascii=False, indent=1))
    title = f"{result['data']}: {result['num_rows']} rows, {len(result['seeds'])} seed(s)"
    table = Table("Score", "Mean", "± std", title=title)
    for name, score in cast(dict[str, Any], result["scores"]).items():
        table.add_row(name, f"{score['mean']:.2f}", f"{score['std']:.2f}")
    console = plain_console()
    console.print(table)
    if speed := result.get("speed"):
        console.print(f"decoding: {speed['tokens'] / speed['seconds']:.0f} tokens/s ({speed['seconds']:.1f} s)")
    for name, signature in result.get("signatures", {}).items():
        console.print(f"{name}: {signature}", soft_wrap=True)
    if output is not None:
        console.print(f"scores and predictions: {output}", soft_wrap=True)
