"""The commands that let a model answer: ``eval``, ``generate``."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from ..errors import ConfigError
from .common import (
    Device,
    MaxNew,
    Template,
    make_folder_of,
    plain_console,
    run_with,
    settings_for,
    whole_numbers,
    write,
)


def evaluate_command(
    source: Annotated[
        str | None, typer.Argument(metavar="[RUN|MODEL]", help="A run folder, model folder or hub name.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows with references: a file, a folder or a datasets name.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score these texts instead: JSON Lines with `prediction` and `references`.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Decoding seeds with commas: 10,20,30.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measure the divergence to this teacher.")] = None,
    template: Template = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    max_new_tokens: MaxNew = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows generated at a time.")] = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Where the scores and predictions go, as JSON.")] = None,
) -> None:
    """Score a model, a run, or given predictions: ROUGE-L, exact match, length and, with a teacher, divergence.

    What is not given is as in the run; for a model, as in the defaults of `distillm schema`.
    """
    evaluation = {"seeds": whole_numbers("--seeds", seeds), "temperature": temperature}
    evaluation |= {"limit": limit, "batch_size": batch_size}
    generation = {"max_new_tokens": max_new_tokens}
    if predictions is not None:
        others = (source, data, teacher, template, max_new_tokens, device, *evaluation.values())
        if any(given is not None for given in others):
            raise ConfigError("--predictions FILE are texts that are there already: of the other options only --output")
        from ..data import read_rows
        from ..evaluation import score_predictions

        result = score_predictions(read_rows(str(predictions)), predictions.name)
        name = predictions.stem
    elif source is None or data is None:
        raise ConfigError(
            "give a run or model and --data FILE, or --predictions FILE"
            + (
                ""
                if source is None
                else f" (a run's own test sets are scored by `distillm train {source} resume=auto`)"
            )
        )
    else:
        settings = settings_for(source, template, device)
        settings["data"]["train"] = data
        if output is None and (Path(source) / "run.yaml").is_file():
            output = Path(source) / "eval" / f"{Path(data).stem}-student.json"
            if output.exists():
                raise ConfigError(f"{output} holds scores already; give --output FILE (the same one to replace them)")
        make_folder_of(output)
        if teacher is not None:
            settings["teacher"] = {"path": teacher}
        run = run_with(settings, source, {"evaluation": evaluation, "generation": generation})
        from ..commands import score

        result, name = score(run, data), Path(data).stem
    if output is not None:
        head = {"data": name, "system": "student", "model": source}
        write(output, json.dumps(head | result, ensure_ascii=False, indent=1))
    _show_scores(result, output)


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, GGUF file or hub name.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Instructions to answer.")] = None,
    file: Annotated[str | None, typer.Option(help="Rows to answer instead (JSON Lines, CSV, Parquet).")] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON Lines here instead of printing.")] = None,
    template: Template = None,
    max_new_tokens: MaxNew = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = None,
) -> None:
    """Let a model answer prompts."""
    from ..commands import respond
    from ..data import read_rows

    if bool(prompts) == bool(file):
        raise ConfigError("give either one or more prompts, or --file FILE")
    settings = settings_for(model, template, device)
    settings["data"] |= {"train": "prompts", "responses": "dataset"}
    settings |= {"teacher": None, "method": {"name": "sft"}, "validation": {}}  # only the student is needed
    decoding = {"evaluation": {"seeds": [seed], "temperature": temperature}}
    run = run_with(settings, model, {**decoding, "generation": {"max_new_tokens": max_new_tokens}})
    name = run.data.fields.get("instruction", "instruction")
    make_folder_of(output)
    answers = respond(run, read_rows(file) if file else [{name: prompt} for prompt in prompts or []])
    if output is not None:
        write(output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return
    for answer in answers:
        typer.echo(f"> {answer.get(name, '')}\n{answer['response']}\n")


def _show_scores(result: dict[str, Any], output: Path | None) -> None:
    table = Table("Score", "Mean", "± std", title=f"{result['num_rows']} rows, {len(result['seeds'])} seed(s)")
    for name, score in cast(dict[str, Any], result["scores"]).items():
        table.add_row(name, f"{score['mean']:.2f}", f"{score['std']:.2f}")
    console = plain_console()
    console.print(table)
    if output is not None:
        console.print(f"scores and predictions: {output}", soft_wrap=True)
