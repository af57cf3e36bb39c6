"""Pieces of a page: tables, numbers with their spread, differences with their intervals."""

from collections.abc import Sequence
from statistics import fmean

from distillm.evaluation import Difference
from distillm.report.differences import mark
from distillm.report.read import Score
from distillm.report.text import duration, parameter_count, score_name
from distillm.report.text import mean_std as scored

from .plan import Study
from .results import Result, mean_std

NAMES = {
    "sft": "SFT",
    "kd": "KD",
    "seqkd": "SeqKD",
    "imitkd": "ImitKD",
    "gkd": "GKD",
    "minillm": "MiniLLM",
    "distillm-skl": "DistiLLM, SKL",
    "distillm-srkl": "DistiLLM, SRKL",
    "distillm2": "DistiLLM-2",
    "teacher": "the teacher",
    "student": "the student before",
    "sft-3e-4": "SFT at 3e-4",
    "minillm-3e-4": "MiniLLM at 3e-4",
    "kd-3e-4": "KD at 3e-4",
    "distillm-skl-3e-4": "DistiLLM, SKL at 3e-4",
    "skl": "SKL, adaptive off-policy",
    "replay-never": "SKL, adaptive",
    "kl-on-policy": "ImitKD (KL, on-policy)",
    "imitkd-off": "ImitKD with replay",
    "jsd-mixed": "GKD (JSD, mixed)",
    "gkd-off": "GKD with replay",
    "minillm-off": "MiniLLM with replay",
    "skl-mixed-off": "SKL, mixed with replay",
    "replay-constant": "SKL, replay constant",
    "replay-increasing": "SKL, replay rising",
}
"""What variants are called on the pages."""
TO_THE_TEACHER = ("divergence", "agreement")
"""Scores that say how near a student is to the teacher that it was scored beside."""
HIDDEN = ("response_tokens", "calibration_error", "exact_match", "perplexity")
"""Scores that would make a table too wide; they are in the results."""


def named(variant: str) -> str:
    """The name of a variant for a reader."""
    loss, _, how = variant.partition("-")
    spaced = how.replace("-", " ").replace("off policy", "off-policy").replace("on policy", "on-policy")
    told = {"raw": "from random weights", "smaller": "smaller student", "larger": "larger student"}.get(how, spaced)
    plain = ", ".join(filter(None, (loss.upper(), told)))
    if how[:1].isdigit():
        plain = f"{loss.upper()}, skew {how}" if loss in ("skl", "srkl") else f"{loss} {how}"
    return NAMES.get(variant, plain)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def spread(name: str, values: Sequence[float | None]) -> str:
    """``mean ± deviation`` of a score over training seeds."""
    found = mean_std(values)
    return scored(name, None if found is None else Score(*found, len(values)))


def signed(found: Difference, *, marked: bool = True) -> str:
    """A difference, its 95 % interval and its mark."""
    shown = f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{shown} {mark(found)}".rstrip() if marked else shown


def minutes(results: Sequence[Result]) -> str:
    """Mean minutes of training."""
    return f"{fmean(result.seconds for result in results) / 60:.1f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.0f}"


def setting(study: Study, runs: Sequence[Result], command: str) -> list[str]:
    """What all runs of a page have in common."""
    sizes = {name: {run.record["parameters"].get(name) for run in runs} - {None} for name in ("teacher", "student")}
    shown = {name: ", ".join(parameter_count(n) for n in sorted(found)) for name, found in sizes.items()}
    steps = sorted({(run.record["steps"], run.record["batch_size"]) for run in runs})
    trained = ", ".join(f"{count} steps of {size} rows" for count, size in steps)
    return [
        f"- **Command**: `{command}`; stopped, it goes on where it stopped.",
        f"- **Models**: teacher {shown['teacher']}, student {shown['student']} parameters.",
        f"- **Each run**: {trained}, from {_rows(runs)} training rows.",
        f"- **Code**: {revisions(runs)}.",
        f"- **Machine**: {machines(runs)}.",
    ]


def _rows(runs: Sequence[Result]) -> str:
    return ", ".join(f"{count:,}" for count in sorted({run.record["rows"]["train"] for run in runs}))


def revisions(runs: Sequence[Result]) -> str:
    """The code that made the runs, and when."""
    trees = sorted({run.record["code"][:10] for run in runs})
    commits = sorted({(run.record["git"] or "unknown")[:10] for run in runs})
    days = sorted({run.record["started"][:10] for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    made_by = f"`src/distillm` of revision {', '.join(commits)} (tree {', '.join(trees)})"
    return f"{made_by}, {when}; settings beside the results"


def machines(runs: Sequence[Result]) -> str:
    """Where the runs were made."""
    found = sorted({(r.record["device"], r.record["machine"], r.record["threads"], r.record["torch"]) for r in runs})
    return "; ".join(
        f"{device}, {machine}, {threads} thread a run, torch {torch}" for device, machine, threads, torch in found
    )


def shown_scores(scores: Sequence[str], first: str) -> list[str]:
    """The scores that a table shows, ``first`` before the others."""
    return [first, *(name for name in scores if name != first and name not in HIDDEN)]


def models_table(stages: Sequence[Result], data: str, first: str, hidden: Sequence[str] = ()) -> list[str]:
    """What the teacher and the student before distillation score, but for ``hidden`` scores, and what they cost."""
    systems = [(stage.name, stage, stage.record["scores"]) for stage in stages]
    untrained = [(f"{stage.name} as it came", stage, stage.record["before"]) for stage in stages]
    systems = [each for pair in zip(untrained, systems, strict=True) for each in pair if data in each[2]]
    names = shown_scores(list(dict.fromkeys(name for _, _, scores in systems for name in scores[data])), first)
    names = [name for name in names if name not in hidden]
    rows = [
        [
            name,
            parameter_count(stage.record["parameters"]["student"]),
            f"{stage.record['steps']:,}" if scores is stage.record["scores"] else "",
            duration(stage.seconds) if scores is stage.record["scores"] else "",
            *(spread(score, [scores[data][score]["mean"]] if score in scores[data] else []) for score in names),
        ]
        for name, stage, scores in systems
    ]
    return table(["", "parameters", "steps", "training", *map(score_name, names)], rows)
