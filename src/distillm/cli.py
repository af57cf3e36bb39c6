"""The command line. Heavy modules are imported inside the commands, so that help is quick."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from . import __version__, cli_judge
from .config import Run, load_run, make_run, read_yaml, recipes
from .errors import ConfigError, DataError, DistillmError, StorageError, TrainingError
from .listing import datasets

EXIT_CODES = """
Exit codes: 0 done · 1 a defect of distillm (with a traceback; please report it) · 2 a setting, file or model cannot be
used · 3 training diverged · 4 a file could not be written or read back · 5 judging is incomplete · 130 stopped by
Ctrl-C.
"""

ABOUT_RUNS = ("Run", "Data", "Method", "Student", "Seeds", "Best validation divergence", "Steps", "Time")

app = typer.Typer(
    name="distillm",
    help="Distil a large language model into a small one.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="The shipped recipes: a YAML file for each experiment.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.command("datasets")(datasets)
app.command()(cli_judge.judge)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings by dotted name.")]
MaxNew = Annotated[
    int | None, typer.Option(min=1, help="Longest response, in tokens; a run's own, or 256, unless given.")
]
Device = Annotated[str | None, typer.Option(help="auto (cuda, then mps, then cpu), cpu, cuda or mps.")]
Template = Annotated[str | None, typer.Option(help="alpaca, chat, or a Jinja template; a run's own unless given.")]
TaskName = Annotated[
    str | None, typer.Option(help="instruction, summarization, translation, chat or a YAML file; a run's own if any.")
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"distillm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def train(
    source: Annotated[str, typer.Argument(metavar="YAML|RECIPE|RUN", help="A YAML file, a recipe, or a run folder.")],
    overrides: Overrides = None,
) -> None:
    """Distil: train a student, score it, and write the run folder with its report.

    \b
    distillm train run.yaml
    distillm train run.yaml optim.lr=1e-4 method.alpha=0.2 output=runs/second
    distillm train runs/second resume=auto      goes on where an interrupted run stopped
    distillm train run.yaml method.name=gkd     another method on the same data: sft, seqkd, kd, imitkd, gkd,
                                                minillm, distillm or distillm2

    Every setting, its default and meaning: `distillm schema`. A file to start from: `distillm recipes show NAME`.
    """
    run = load_run(source, overrides or [])
    if (Path(source) / "run.yaml").is_file() and not any(o.startswith("output=") for o in overrides or []):
        run = run.model_copy(update={"output": source})
    from .display import Display
    from .pipeline import distill

    display = Display()
    folder = distill(run, display, "distillm " + " ".join(sys.argv[1:]))
    if list((folder / "eval").glob("*.json")):
        _show_comparison([folder])


@app.command()
def sweep(
    source: Annotated[str, typer.Argument(metavar="YAML|RECIPE", help="What the runs share.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE[,VALUE]...", help="Settings, with all their values.")
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which runs there would be.")] = False,
) -> None:
    """Make every combination of settings, and end in one table with mean and spread over seeds.

    \b
    distillm sweep run.yaml method.name=sft,kd,gkd,distillm seed=1,2,3 output=runs/methods
    distillm sweep run.yaml method.alpha=0,0.01,0.1,0.3 --jobs 2

    Finished runs are not repeated: after an interruption the same command goes on.
    """
    from .sweep import cells_of, run_sweep, write_table

    cells = cells_of(source, overrides)
    if dry_run:
        typer.echo("\n".join(cell.run.output for cell in cells))
        return
    from .display import Display

    finished, failed = run_sweep(cells, Display(), jobs)
    folder = Path(cells[0].run.output).parent
    if finished:
        _console().print(write_table(finished, folder))
        typer.echo(f"table: {folder / 'table.md'}")
    if failed:
        said = "\n".join(f"  {Path(name).name}: {text.splitlines()[0]}" for name, text in failed.items())
        raise TrainingError(f"{len(failed)} of {len(cells)} runs failed:\n{said}")


@app.command("eval")
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
    task: TaskName = None,
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
    evaluation = {"seeds": _whole_numbers("--seeds", seeds), "temperature": temperature}
    evaluation |= {"limit": limit, "batch_size": batch_size}
    generation = {"max_new_tokens": max_new_tokens}
    if predictions is not None:
        others = (source, data, teacher, template, task, max_new_tokens, device, *evaluation.values())
        if any(given is not None for given in others):
            raise ConfigError("--predictions FILE are texts that are there already: of the other options only --output")
        from .data import read_rows
        from .evaluation import score_predictions

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
        settings = _settings_for(source, template, device, task)
        settings["data"]["train"] = data
        if output is None and (Path(source) / "run.yaml").is_file():
            output = Path(source) / "eval" / f"{Path(data).stem}-student.json"
            if output.exists():
                raise ConfigError(f"{output} holds scores already; give --output FILE (the same one to replace them)")
        _make_folder_of(output)
        if teacher is not None:
            settings["teacher"] = {"path": teacher}
        run = _run_with(settings, source, {"evaluation": evaluation, "generation": generation})
        from .commands import score

        result, name = score(run, data), Path(data).stem
    if output is not None:
        head = {"data": name, "system": "student", "model": source}
        _write(output, json.dumps(head | result, ensure_ascii=False, indent=1))
    _show_scores(result, output)


@app.command()
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
    from .commands import as_rows, asked_in, respond
    from .data import read_rows

    if bool(prompts) == bool(file):
        raise ConfigError("give either one or more prompts, or --file FILE")
    settings = _settings_for(model, template, device, task)
    settings["data"] |= {"train": "prompts", "responses": "dataset"}
    settings |= {"teacher": None, "method": {"name": "sft"}, "validation": {}}  # only the student is needed
    decoding = {"evaluation": {"seeds": [seed], "temperature": temperature}}
    run = _run_with(settings, model, {**decoding, "generation": {"max_new_tokens": max_new_tokens}})
    _make_folder_of(output)
    answers = respond(run, read_rows(file) if file else as_rows(run, prompts or []))
    if output is not None:
        _write(output, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        return
    for answer in answers:
        typer.echo(f"> {asked_in(run, answer)}\n{answer['response']}\n")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the table (.md or .csv).")] = None,
) -> None:
    """Print a table over runs: scores with their spread, divergence, steps and time."""
    if output is not None and output.suffix not in (".md", ".csv"):
        raise ConfigError(f"{output}: the ending says the format; write .md or .csv")
    _show_comparison(runs)
    if output is not None:
        from .report import as_csv, as_markdown, compare_table

        _write(output, (as_csv if output.suffix == ".csv" else as_markdown)(compare_table(runs)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file.")] = None,
) -> None:
    """Write one self-contained HTML page over one or more runs."""
    from .report import write_report

    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    typer.echo(write_report(runs, target))


@app.command()
def analyse(
    source: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run folder; none for synthetic ones.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers and plots go.")] = Path("analysis"),
    seed: Annotated[int, typer.Option(help="Of the synthetic distributions.")] = 0,
    batches: Annotated[int, typer.Option(min=2, help="Batches of a run whose gradients are taken.")] = 16,
) -> None:
    """The theory, computed: gradient coefficients, errors of estimators, variance of gradients, against the skew.

    As figure 3 of DistiLLM, from synthetic distributions or, at its checkpoints, from a run's own models and rows.
    """
    from .analyse import analyse_run, analyse_synthetic, write_analysis
    from .display import Display

    found = analyse_synthetic(seed=seed) if source is None else analyse_run(source, Display(), batches=batches)
    typer.echo("\n".join(str(path) for path in write_analysis(found, output)))


@app.command()
def shrink(
    teacher: Annotated[str, typer.Argument(help="A model folder, GGUF file or hub name.")],
    output: Annotated[Path, typer.Argument(help="The student's folder.")],
    layers: Annotated[str, typer.Option(help="How many layers to keep (8), or which ones (0,4,9).")],
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model folder run its own code.")] = False,
) -> None:
    """Initialise a student from some of a teacher's layers, as an ordinary model folder."""
    wanted = _whole_numbers("--layers", layers) or []
    from .commands import shrink_to

    typer.echo(shrink_to(teacher, output, wanted if "," in layers else wanted[0], trust_remote_code))


@app.command()
def tokenizer(
    files: Annotated[list[str], typer.Argument(help="Text, JSON Lines, CSV or Parquet files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The tokenizer's folder.")],
    size: Annotated[int, typer.Option(min=1, help="Entries of the vocabulary.")] = 8000,
    model: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
) -> None:
    """Train a tokenizer on your own data, for small models from scratch."""
    from .commands import tokenizer_to

    if model != "bpe" and model != "unigram":
        raise ConfigError(f"--model {model}: give bpe or unigram")
    typer.echo(tokenizer_to(output, files, model, size))


@recipes_app.callback()
def _list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for name, path in recipes().items():
            first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            typer.echo(f"{name:28} {first}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A name from `distillm recipes`.")]) -> None:
    """Print a recipe, to be saved as your own run.yaml."""
    read_yaml(name)
    text = recipes()[name].read_text(encoding="utf-8")
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"), end="", soft_wrap=True)
    else:
        typer.echo(text, nl=False)  # the console would read [brackets] as marks of its own


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, so that an editor completes and explains the YAML."""
    typer.echo(json.dumps(Run.model_json_schema(), indent=2))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="At most two minutes: fewer steps, worse students.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Another teacher: a folder or a GGUF file.")] = None,
) -> None:
    """Distil a real pretrained teacher into 8 of its 30 layers, in minutes, and compare with fine-tuning."""
    from .demo import run_demo
    from .display import Display

    run_demo(output, Display(), quick=quick, teacher=teacher)


def _settings_for(source: str, template: str | None, device: str | None, task: str | None = None) -> dict[str, Any]:
    """The settings of a run folder with its student as it ended, or plain ones for a model.

    The device and the tracker are of the machine that trained, so they are not the run's.
    """
    folder = Path(source)
    if not (folder / "run.yaml").is_file():
        settings: dict[str, Any] = {"student": {"path": source}, "method": {"name": "sft"}, "data": {}}
    elif not (folder / "student").is_dir():
        raise DataError(f"{folder} has no student yet: the run has not ended. Go on with it by resume=auto")
    else:
        settings = read_yaml(source)
        kept = {name: settings["student"][name] for name in ("dtype", "trust_remote_code")}
        if (settings.get("teacher") or {}).get("adapter_off"):  # the student as it was is the teacher of what it became
            base = settings["student"]["path"]
            settings["teacher"] = None if base is None else {"path": base, **kept}
            settings |= {} if base else {"method": {"name": "sft"}}
        settings["student"] = {"path": str(folder / "student"), **kept}
    settings |= {"device": device or "auto", "tracker": "none"}
    if task is not None:  # what belongs to another task means nothing to it
        for name in ("template", "fields", "variables"):
            settings["data"].pop(name, None)
        settings["data"]["task"] = task
    if template is not None:
        settings["data"]["template"] = template
        if template != "chat":
            settings["data"] |= {"system": None, "teacher_system": None}
    return settings


def _run_with(settings: dict[str, Any], source: str, changes: dict[str, dict[str, Any]]) -> Run:
    """``settings`` as a run, with those ``changes`` that are not None."""
    for section, values in changes.items():
        settings.setdefault(section, {}).update({name: value for name, value in values.items() if value is not None})
    return make_run(settings, source=source)


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers with commas, such as 0,4,9") from error


def _make_folder_of(path: Path | None) -> None:
    """Find out before the work whether its result can be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"could not make the folder {path.parent}: {error.strerror}") from error
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give the name of a file")


def _write(path: Path, text: str) -> None:
    from .checkpoint import write_text

    _make_folder_of(path)
    write_text(path, text)


def _show_comparison(runs: Sequence[Path]) -> None:
    from .report import compare_table, table_cells

    header, body = table_cells(compare_table(runs))
    columns = [(name, cells) for name, *cells in zip(header, *body, strict=True)]
    # What is the same in every row is said once, so that the scores fit a terminal.
    same = [name in ABOUT_RUNS and len({*cells}) == 1 for name, cells in columns]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for (name, _), once in zip(columns, same, strict=True):
        if not once:
            table.add_column(name)
    for row in body:
        table.add_row(*(cell for cell, once in zip(row, same, strict=True) if not once))
    console = _console()
    console.print(table)
    said = [f"{name}: {cells[0]}" for (name, cells), once in zip(columns, same, strict=True) if once]
    console.print(" · ".join(said), highlight=False)


def _console() -> Console:
    """A console as wide as the terminal; in a file or a pipe nothing is squeezed. [Brackets] are no marks."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(markup=False, width=200)


def _show_scores(result: dict[str, Any], output: Path | None) -> None:
    table = Table("Score", "Mean", "± std", title=f"{result['num_rows']} rows, {len(result['seeds'])} seed(s)")
    for name, score in cast(dict[str, Any], result["scores"]).items():
        table.add_row(name, f"{score['mean']:.2f}", f"{score['std']:.2f}")
    console = _console()
    console.print(table)
    if output is not None:
        console.print(f"scores and predictions: {output}", soft_wrap=True)


def main() -> None:
    """Run the command line; what a user can mend is said without a traceback."""
    # Read by GNU's OpenMP when torch is loaded. Its threads spin for milliseconds at each barrier: beside one
    # busy program on two cores that makes a pass several times slower, and idle ones gain nothing (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except DistillmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if "OutOfMemoryError" not in type(error).__name__:
            raise
        typer.echo(
            "error: out of memory. Lower train.micro_batch_size, and generation.batch_size and evaluation.batch_size "
            "(--batch-size of distillm eval) if it ran out while generating; the result stays the same.",
            err=True,
        )
        sys.exit(2)
