"""First contact: ``init``, and what `distillm` alone says to do next."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..paths import is_dir, is_file
from ..writing import write_anew


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.yaml"),
    teacher: Annotated[str | None, typer.Option(help="A model folder, a hub name, or a GGUF file.")] = None,
    student: Annotated[
        str | None, typer.Option(help="How many of the teacher's layers, or a smaller model of the same tokenizer.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON Lines, CSV or Parquet, or a name from `distillm datasets`.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="sft, seqkd, kd, imitkd, gkd, minillm, distillm or distillm2.")
    ] = "distillm",
    fields: Annotated[
        str | None,
        typer.Option(help="Your columns: instruction=question,output=answer; found by their names unless given."),
    ] = None,
    output: Annotated[str, typer.Option(help="The run folder.")] = "runs/mine",
) -> None:
    """Write a commented run.yaml for your own data, after three questions or from flags.

    \b
    distillm init
    distillm init run.yaml --teacher models/big --student 8 --data rows.jsonl
    """
    if file.exists():
        raise ConfigError(f"{file} is there already; give another name: distillm init mine.yaml")
    teacher = teacher or _asked("--teacher", "The teacher: a model folder, a hub name, or a GGUF file")
    student = student or _asked("--student", "The student: how many of its layers, or where a smaller model is", "8")
    data = data or _asked("--data", "The data: a file of rows (JSON Lines, CSV, Parquet), or a data set's name")
    from ..starting import stages, starting_yaml

    run, text = starting_yaml(teacher, student, data, method=method, fields=_pairs(fields), output=output)
    name = _no_option(str(file))
    way = [("Look before you leap:", shlex.join(["distillm", "check", name])), *stages(run, name)]
    text += "\n# The way from here:\n" + "".join(f"#   {command}\n" for _, command in way)
    write_anew(file, text)
    said = "".join(f"{reason}\n  {command}\n" for reason, command in way)
    typer.echo(f"{text}\nwritten to {file}.\n{said}", nl=False)


def _asked(option: str, question: str, usual: str | None = None) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(f"{option} is missing, and there is no terminal to ask on")
    return str(typer.prompt(question, default=usual, err=True)).strip()


def _pairs(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in (text or "").split(",") if part]
    for name, sign, column in pairs:
        if not (name and sign and column):
            raise ConfigError(
                f"--fields {text}: write NAME=COLUMN,NAME=COLUMN, such as instruction=question,output=answer"
            )
    return {name.strip(): column.strip() for name, _, column in pairs}


def next_steps(here: Path) -> str:
    """What there is to do in the folder ``here``: with nothing yet, with a run.yaml, with runs."""
    runs = [path.parent for pattern in ("run.yaml", "*/run.yaml", "*/*/run.yaml") for path in here.glob(pattern)]
    runs = [run for run in runs if is_file(run / "metrics.jsonl") and run != here]
    runs = sorted(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime, reverse=True)[:3]
    settings = [path.name for path in sorted(here.glob("*.yaml")) if _is_run(path)][:3]
    lines = ["distillm makes a small language model behave like a big one."]
    if not settings and not runs:
        lines += ["", "To begin:", _line("demo", "a real teacher distilled on this machine, in minutes")]
        lines += [_line("init", "a run.yaml for your own teacher and data, after three questions")]
    for found in settings:
        name = _word(found)
        lines += ["", f"{found} is here:", _line(f"check {name}", "what it would read, take and cost; usual mistakes")]
        lines += [_line(f"train {name}", "distil: trains, keeps the best student, scores it, writes a report")]
    for run in runs:
        found = str(run.relative_to(here))
        name = _word(found)
        if is_dir(run / "student"):
            lines += ["", f"{found} has ended:", _line(f"report {name}", "one page on what came out")]
            lines += [_line(f'generate {name} "..."', "let the student answer")]
        else:
            lines += ["", f"{found} has no student yet:", _line(f"watch {name}", "its page, live in a browser")]
            lines += [_line(f"train {name} resume=auto", "go on with it, if it was stopped")]
    return "\n".join([*lines, "", "All commands: distillm --help"])


def _line(command: str, text: str) -> str:
    return f"  distillm {command:<32} {text}"


def _word(path: str) -> str:
    """``path`` as a shell takes it for one, whatever is in it, and a command for no option."""
    return shlex.quote(_no_option(path))


def _no_option(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path


def _is_run(path: Path) -> bool:
    """Whether a YAML file looks like settings of a run; what is wrong in it is said by ``check``."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(line.startswith(("student:", "teacher:")) for line in file.read(1 << 16).splitlines())
    except OSError:  # a folder, a link to nothing
        return False
