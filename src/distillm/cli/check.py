"""The command that looks before a run leaps: ``check``."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..config import load_run
from .common import Overrides, RunSource, plain_console

if TYPE_CHECKING:
    from ..checking import Checked
    from ..types import Example

SHOWN_TOKENS = 160
"""Of a row; the middle of a longer prompt, and the end of a longer response, are left out."""
_PLAIN = str.maketrans({"⟦": "[[", "⟧": "]]", "␤": "\\n", "·": "|", "…": "...", "✗": "x"})
"""What stands for the marks of ``check`` where there is nothing but ASCII."""


def check(
    source: RunSource,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Tokenised rows to show.")] = 3,
) -> None:
    """Look before you leap: what a run would read, take and cost, and the usual mistakes in it.

    \b
    distillm check run.yaml
    distillm check run.yaml method.name=gkd train.micro_batch_size=16

    Loads everything, tries one step on the longest rows, writes nothing. Exit code 2 if something would waste the run.
    """
    from ..checking import check as checked
    from ..display import Display

    run = load_run(source, overrides or [])
    found = checked(run, Display())
    console = plain_console()
    for line in [*_about(found), *_rows(found, rows), *_cost(found), *_findings(found)]:
        shown = line if console.encoding.startswith("utf") else Text(line.plain.translate(_PLAIN))
        console.print(shown, soft_wrap=True)
    if found.wrong:
        raise typer.Exit(2)


def _about(found: "Checked") -> list[Text]:
    from ..models import num_parameters
    from ..report.text import parameter_count

    subject, run = found.subject, found.subject.run
    student, teacher = subject.models.student, subject.models.teacher
    sizes = {"student": num_parameters(student)} | ({} if teacher is None else {"teacher": num_parameters(teacher)})
    times = f", {sizes['teacher'] / sizes['student']:.1f} times fewer" if "teacher" in sizes else ""
    own = run.teacher is not None and run.teacher.adapter_off
    lines = [_line("student", f"{parameter_count(sizes['student'])} parameters{'' if own else times}")]
    if "teacher" in sizes and not own:
        lines.insert(0, _line("teacher", f"{parameter_count(sizes['teacher'])} parameters"))
    method = run.method.model_dump(exclude_none=True)
    lines.append(_line("method", ", ".join([run.method.name, *(f"{k} {method[k]}" for k in _TOLD if k in method)])))
    tests = [f"{len(rows.examples)} to test on ({name})" for name, rows in subject.rows.tests.items()]
    counts = [f"{len(subject.rows.train.examples)} to train on", f"{len(subject.rows.validation.examples)} to validate"]
    lines.append(_line("rows", ", ".join([*counts, *tests])))
    lines.append(
        _line("a row", f"{subject.prompt_tokens:.0f} tokens of prompt, {subject.response_tokens:.0f} of response, mean")
    )
    return [*lines, _line("steps", f"{subject.steps} of {run.train.batch_size} rows")]


_TOLD = ("divergence", "alpha", "sampling")


def _rows(found: "Checked", count: int) -> list[Text]:
    examples = [e for e in found.subject.rows.train.examples if any(e.targets)] or found.subject.train
    shown = examples[:count]
    if not shown:
        return []
    how = Text.assemble(
        ("prompt", "dim"), ", ", ("learned", _LEARNED), " (where there is no colour: in ⟦ ⟧); ␤ is a line"
    )
    return [Text(), how, *(_row(found, example) for example in shown)]


_LEARNED = "bold green"


def _row(found: "Checked", example: "Example") -> Text:
    """A row token by token, with a mark between tokens; what is learned is coloured, and in brackets."""
    from ..data import pieces
    from ..screen import visible

    texts = [visible(p.replace("\n", "␤")) for p in pieces(found.subject.models.tokenizer, example.tokens)]
    kept = _kept(example)
    line, inside = Text.assemble((f"{example.id}  ", "bold"), no_wrap=False), False
    for at, text in enumerate(texts):
        if at not in kept:
            line.append(" … " if at - 1 in kept else "")
            continue
        if example.targets[at] != inside:
            line.append("⟧" if inside else "⟦")
            inside = not inside
        line.append(text, _LEARNED if inside else "dim")
        line.append("·" if text and at + 1 < len(texts) and example.targets[at + 1] == inside else "", "dim blue")
    return line.append("⟧" if inside else "")


def _kept(example: "Example") -> set[int]:
    """Places of the tokens that are shown."""
    start, end = example.start, len(example.tokens)
    half = SHOWN_TOKENS // 2
    prompt = range(start) if start <= half else [*range(half // 2), *range(start - half // 2, start)]
    return {*prompt, *range(start, min(end, start + half))}


def _cost(found: "Checked") -> list[Text]:
    from ..caching import size
    from ..report.text import duration, operations

    cost = found.cost
    lines = [Text(), _line("memory", f"{size(cost.memory)} at most, of {size(cost.free_memory)}")]
    if cost.work:
        parts: dict[str, float] = {}
        for work in cost.work:
            parts[work.name] = parts.get(work.name, 0.0) + work.seconds
        said = ", ".join(f"{name} {duration(took)}" for name, took in parts.items())
        lines.append(_line("time", f"about {duration(cost.seconds)} on this machine: {said}"))
        lines.append(_line("compute", operations(cost.flops)))
    return [*lines, _line("disk", f"{size(cost.disk)} at most, of {size(cost.free_disk)}"), Text()]


def _findings(found: "Checked") -> list[Text]:
    if not found.findings:
        return [Text("Nothing looks wrong.", "green")]
    lines: list[Text] = []
    for finding in found.findings:
        mark, style = ("✗", "bold red") if finding.grave else ("!", "yellow")
        lines.append(Text.assemble((f"{mark} {finding.name:9}", style), finding.text))
        lines.append(Text(f"{'':11}{finding.advice}", "dim"))
    return lines


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name:9}", "bold"), text)
