"""The pages of the studies, from the results that are kept: nothing on them comes from elsewhere."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean

from distillm.report.text import duration, score_name

from . import claims, plan, plots, results, theory
from .plan import Axis, Study
from .results import Found, Result, mean_std, num_seeds, of_variant, starts_of
from .text import (
    TO_THE_TEACHER,
    minutes,
    models_table,
    named,
    percent,
    setting,
    shown_scores,
    signed,
    spread,
    table,
)

Groups = dict[str, list[Result]]
HEAD = "<!-- Made by `python -m studies pages` from the results beside each study: change those, or the script. -->"
LOSS, DIVERGENCE, ROUGE = 2, 3, 4
"""The columns of a curve that hold validation cross-entropy, divergence, ROUGE-L; 0 is the step and 1 the seconds."""


def write(into: Path, folder: Callable[[str], Path]) -> list[Path]:
    """Every page and figure, into ``into``; ``folder`` is where the results of a study are."""
    into.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    found = {name: (plan.read(name), results.load(folder(name))) for name in plan.names()}
    for name, (study, kept) in found.items():
        if not groups_of(study, kept):
            lines = [f"# {study.title}", "", study.about, "", "No run of it is made yet."]
        elif study.kind == "ablations":
            lines = ablations_page(study, kept, into, starts_of(study, found))
        else:
            lines = {"methods": methods_page, "theory": theory_page}[study.kind](study, kept, into)
        made.append(_page(into / f"{name}.md", lines))
    made.append(_page(into / "time.md", time_page(found, into)))
    made.append(_page(into / "claims.md", claims.page(found)))
    made.append(_page(into / "index.md", index_page(found)))
    return made


def _page(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join([HEAD, "", *lines]) + "\n", encoding="utf-8")
    return path


def groups_of(study: Study, kept: dict[str, Result]) -> Groups:
    """The runs of each variant that has any."""
    groups = {variant: of_variant(kept, variant) for variant in study.variants}
    return {variant: runs for variant, runs in groups.items() if runs}


def stages_of(study: Study, kept: dict[str, Result]) -> list[Result]:
    """The runs that came first."""
    return [kept[stage.name] for stage in study.stages if stage.train and stage.name in kept]


def test_sets(groups: Groups) -> list[str]:
    """The test sets of a study's runs."""
    return list(dict.fromkeys(data for runs in groups.values() for run in runs for data in run.record["scores"]))


def methods_page(study: Study, kept: dict[str, Result], into: Path) -> list[str]:
    """Methods side by side: scores, differences, curves, equal time."""
    groups = groups_of(study, kept)
    lines = [*_opening(study, groups), "## Scores", ""]
    sets = test_sets(groups)
    hidden = TO_THE_TEACHER if len(plan.teachers(study)) > 1 else ()
    if len(sets) > 1:
        lines += [f"**All {len(sets)} test sets together**, {sum(_num_rows(groups, data) for data in sets)} rows", ""]
        lines += [*_scores(study, groups, kept, sets), ""]
    for data in sets:
        lines += [f"**{data}**, {_num_rows(groups, data)} rows", ""]
        lines += [*models_table(stages_of(study, kept), data, study.metric, hidden), ""]
        lines += [*_scores(study, groups, kept, [data], alone=len(sets) == 1), ""]
    lines += [_reading(study, groups), ""]
    plots.curves(groups, ROUGE, "validation ROUGE-L", into / f"{study.name}-curves.svg")
    lines += ["## Along the way", "", f"![validation ROUGE-L by steps and by minutes]({study.name}-curves.svg)", ""]
    return [
        *lines,
        *_equal_time(study, groups, kept),
        "",
        *_to_be_known(study, groups, kept, [said for variant, said in METHODS if not variant or variant in groups]),
    ]


def _opening(study: Study, groups: Groups) -> list[str]:
    runs = [run for found in groups.values() for run in found]
    return [f"# {study.title}", "", study.about, "", *setting(study, runs, f"python -m studies run {study.name}"), ""]


def _num_rows(groups: Groups, data: str) -> int:
    kept = (run.record["statistics"].get(data) for runs in groups.values() for run in runs)
    return next(rows["num_rows"] for rows in kept if rows is not None)


def _scores(
    study: Study, groups: Groups, kept: dict[str, Result], sets: Sequence[str], alone: bool = True
) -> list[str]:
    """A row for each method; ``alone``: what does not depend on the test set is there too."""
    first = next(iter(groups.values()))[0]
    names = shown_scores(first.record["scores"][sets[0]], study.metric)[1:] if len(sets) == 1 else []
    others = [name for name in (study.baseline, "student") if name in groups or name in kept]
    header = ["method", "seeds", score_name(study.metric), *(f"against {named(name)}" for name in others)]
    header += [*map(score_name, names), *((*USE, "kept step", "minutes") if alone else ())]
    rows: list[list[str]] = []
    if len(sets) > 1:  # of one set there is a table of the models
        first_rows = [(stage, results.pooled(stage, sets, study.metric)) for stage in stages_of(study, kept)]
        empty = [""] * (len(header) - 3)
        rows += [[named(stage.name), "", spread(study.metric, [score]), *empty] for stage, score in first_rows]
    for variant, runs in groups.items():
        score = spread(study.metric, [results.pooled(run, sets, study.metric) for run in runs])
        differs = ["" if variant == name else _against(runs, of_variant(kept, name), sets, study) for name in others]
        more = [spread(name, [run.score(sets[0], name) for run in runs]) for name in names]
        if alone:
            more += [*_use(runs), ", ".join(str(run.record["kept_step"]) for run in runs), minutes(runs)]
        rows.append([named(variant), str(len(runs)), score, *differs, *more])
    return table(header, rows)


def _against(runs: Sequence[Result], others: Sequence[Result], sets: Sequence[str], study: Study) -> str:
    """The difference in the study's score; with one seed its interval knows the rows alone, and it has no mark."""
    found = results.difference(runs, others, sets, study.metric)
    return signed(found, marked=num_seeds(runs, others) > 1)


USE = ("student's rows, %", "phi at the end")


def _use(runs: Sequence[Result]) -> list[str]:
    """How much of what they trained on the student wrote, and the probability of that as training ended."""
    return [
        percent(mean(run.student_share for run in runs)),
        "" if runs[0].record["probability"] is None else f"{mean(run.record['probability'] for run in runs):.2f}",
    ]


COLUMNS = (
    "*The student before* is what the methods start from. *Student's rows*: of all steps, those on what the student "
    "wrote (of DistiLLM-2, half of each); *phi*: the probability of such a step, which only "
    "[DistiLLM](../methods/distillm.md) moves; *kept step*: the checkpoint that is scored, of each seed; *cut by "
    "length*: answers, in per cent, that met the limit; *top-1 agreement*: tokens, in per cent, at which both models "
    "find the same most likely; *minutes*: those of the training steps, writing included, [had nothing slowed them "
    "down](time.md). What the methods and losses are: [methods](../methods/index.md)."
)


def _reading(study: Study, groups: Groups) -> str:
    scores = {name for runs in groups.values() for found in runs[0].record["scores"].values() for name in found}
    told = {"divergence": "divergence", "ter": "TER", "truncated": "the share cut by length"}
    lower = [word for name, word in told.items() if name in scores]
    several = any(len(runs) > 1 for runs in groups.values())
    parts = [
        "± is the deviation over training seeds, of one teacher and one start." if several else "",
        f"In brackets the 95 % interval of the difference in {score_name(study.metric)}, by a bootstrap over test "
        "rows and training seeds together ([how](../evaluation.md));",
        "with three seeds it is too short where seeds differ more than rows do, and" if several else "",
        "with one it knows the rows alone. † p < 0.05, ‡ p < 0.01, not corrected for the number of comparisons, "
        "and not said of one seed.",
        "Divergence is KL(teacher ‖ student) at the tokens of the references, which is what KD minimises."
        if "divergence" in lower
        else "",
        f"Better when lower: {', '.join(lower)}." if lower else "",
        COLUMNS,
    ]
    return " ".join(filter(None, parts))


def _equal_time(study: Study, groups: Groups, kept: dict[str, Result]) -> list[str]:
    """The best validation of each method by the time at which the fastest had made all its steps."""
    limit = min(max(run.seconds for run in runs) for runs in groups.values())
    start = next(iter(groups.values()))[0].curve[0]
    rows = [["the student before", "0", spread("rouge_l", [start[ROUGE]])]]
    for variant, runs in groups.items():
        rows.append(_reached(named(variant), runs, limit))
        charged = next((kept[stage.name] for stage in study.stages if stage.responses == variant), None)
        if charged is not None and charged.record["seconds"] is not None:
            left = limit - charged.record["seconds"]
            rows.append(_reached(f"{named(variant)}, its writing paid by the clock", runs, left))
    text = (
        f"What each had reached after {duration(limit)}, when the fastest had made all its steps: the best validation "
        "ROUGE-L of training until then, of the same runs, whose learning rate was still to fall. The best of more "
        "validations is higher by chance, which is for the fast. The first row is what they started from."
    )
    return ["## At equal time", "", f"{text} {written_besides(kept)}".rstrip(), "", *table(EQUAL, rows)]


def _reached(name: str, runs: Sequence[Result], limit: float) -> list[str]:
    reached = [reached_by(run, limit) for run in runs]
    values = [value for _, value in reached]
    return [name, ", ".join(str(step) for step, _ in reached), "–" if None in values else spread("rouge_l", values)]


EQUAL = ("method", "steps until the last validation", "validation ROUGE-L")


def written_besides(kept: dict[str, Result]) -> str:
    """What the teacher's responses took, which no run of SeqKD paid for."""
    written = kept.get("responses")
    if written is None:
        return ""
    rows, seconds = written.record["rows"], written.record["seconds"]
    took = "was not timed" if seconds is None else f"took {duration(seconds)} by the clock"
    return f"SeqKD's time is that of its steps: writing {rows:,} responses {took} besides, once for all."


def reached_by(run: Result, limit: float) -> tuple[int, float | None]:
    """The steps made within ``limit`` seconds, as far as validations tell, and the best ROUGE-L of those, if any."""
    points = [(step, rouge) for step, seconds, *_, rouge in run.curve if step > 0 and seconds <= limit]
    return max((step for step, _ in points), default=0), max((rouge for _, rouge in points), default=None)


METHODS = (
    (
        "",
        "Unless a row says another, all methods have one learning rate, which was not searched for each of them: "
        "another may suit some better.",
    ),
    (
        "",
        "The checkpoint kept is the best of the validations after training began, by ROUGE-L: the student before is "
        "none of them, and a method may end below it, since the learning rate begins anew on fewer rows.",
    ),
    (
        "distillm-skl",
        "DistiLLM's phi starts at 0.2 (0 in the paper, but 0.2 for its largest models) and any worsening of the "
        "validation loss raises it (in the paper one of more than 0.1).",
    ),
    ("", "The plain-text loss, which the paper has beside its losses, is left out of all."),
    ("minillm", "So it is of MiniLLM, which has it as a term of its own."),
    ("seqkd", "SeqKD trains on greedy responses of the teacher."),
    ("distillm2", "DistiLLM-2 trains on sampled responses of the teacher."),
    ("distillm2", "DistiLLM-2 trains on two rows for each prompt, so that equal steps are twice the rows."),
)
"""What holds for every comparison of methods, or for those that have a variant."""


def _validated(study: Study, groups: Groups) -> list[str]:
    """What the validations tell beside the tables of a comparison of methods."""
    adaptive = [run for runs in groups.values() for run in runs if run.record["method"]["name"] == "distillm"]
    if study.kind != "methods" or not adaptive:
        return []
    rises = [sum(b[LOSS] - a[LOSS] > 0.1 for a, b in pairwise(run.curve)) for run in adaptive]
    lines = [
        f"In {sum(map(bool, rises))} of {len(rises)} runs of DistiLLM a validation loss was higher by more than 0.1 "
        f"than the one before (in each at most {max(rises)}): by the paper's rule phi would hardly adapt here."
    ]
    if len(plan.teachers(study)) > 1:
        start = adaptive[0].curve[0][DIVERGENCE]
        lines.append(
            "The student before was made beside the teacher as it came, so that the tables of models leave out how "
            f"near it is to the fine-tuned one: in validation {start:.2f} nats/token, when the methods begin."
        )
    return lines


def _to_be_known(study: Study, groups: Groups, kept: dict[str, Result], always: Sequence[str] = ()) -> list[str]:
    """What a reader must know before believing the tables: words of the study, and what became of its runs."""
    lines = [*study.remarks, *always, *_validated(study, groups)]
    worse = {variant: sum("worse" in run.record["events"] for run in runs) for variant, runs in groups.items()}
    if any(worse.values()):
        of = [f"{named(variant)} ({count} of {len(groups[variant])})" for variant, count in worse.items() if count]
        lines.append(f"Runs in which no validation was better than before training: {'; '.join(of)}.")
    for name, run in kept.items():
        if "failed" in run.record:
            lines.append(f"{name} did not come to its end: it failed after step {run.record['failed']}.")
    missing = {
        named(v): [str(s) for s in study.seeds_of.get(v, study.seeds) if f"{v}_seed-{s}" not in kept]
        for v in study.variants
    }
    waiting = [f"{name} (seed {', '.join(seeds)})" for name, seeds in missing.items() if seeds]
    if waiting:
        lines.append(f"Not made yet: {'; '.join(waiting)}.")
    return ["## To be known", "", *(f"- {line}" for line in lines)] if lines else []


def ablations_page(study: Study, kept: dict[str, Result], into: Path, starts: dict[str, Result]) -> list[str]:
    """One table and perhaps one plot for each axis; ``starts`` are the students that variants start from."""
    groups = groups_of(study, kept)
    (data,) = test_sets(groups)
    anew = "*Written anew*: of all steps, those that generated. *Validation loss*: cross-entropy, of the kept step."
    lines = [*_opening(study, groups), _reading(study, groups), "", anew, ""]
    for axis in study.axes:
        there = {label: groups[variant] for label, variant in axis.values.items() if variant in groups}
        if axis.reference in there and len(there) > 1:
            lines += _axis(study, axis, there, data, into, starts)
    return [*lines, *_to_be_known(study, groups, kept)]


def _axis(study: Study, axis: Axis, there: Groups, data: str, into: Path, starts: dict[str, Result]) -> list[str]:
    rows: list[list[str]] = []
    base = there[axis.reference]
    losses = {label: [run.kept_validation[LOSS] for run in runs] for label, runs in there.items()}
    for label, runs in there.items():
        differs = "" if label == axis.reference else _against(runs, base, [data], study)
        start = starts.get(axis.values[label])
        rows.append(
            [
                f"**{label}**" if label == axis.reference else label,
                str(len(runs)),
                spread(study.metric, [run.score(data, study.metric) for run in runs]),
                differs,
                "" if start is None else _against(runs, [start], [data], study),
                spread("cross_entropy", losses[label]),
                spread("divergence", [run.score(data, "divergence") for run in runs]),
                spread("truncated", [run.score(data, "truncated") for run in runs]),
                *_use(runs),
                percent(mean(run.record["batches"]["generated"] / run.record["steps"] for run in runs)),
                ", ".join(str(run.record["kept_step"]) for run in runs),
                minutes(runs),
            ]
        )
    header = [axis.name, "seeds", score_name(study.metric), f"against {axis.reference}", "against the student before"]
    header += ["validation loss", "divergence", "cut by length, %"]
    lines = [f"## {axis.name[0].upper()}{axis.name[1:]}", "", axis.about, ""]
    lines += [*table([*header, *USE, "written anew, %", "kept step", "minutes"], rows), ""]
    if axis.numeric:
        file = f"{study.name}-{axis.name.replace(' ', '-').lower()}.svg"
        scores = {label: mean_std([run.score(data, study.metric) for run in runs]) for label, runs in there.items()}
        lost = {label: mean_std(values) for label, values in losses.items()}
        panels = {score_name(study.metric): scores, "validation loss (cross-entropy)": lost}
        known = {panel: {x: y for x, y in values.items() if y is not None} for panel, values in panels.items()}
        plots.axis_plot(known, axis.name, into / file)
        lines += [f"![{score_name(study.metric)} and validation loss by {axis.name}]({file})", ""]
    return lines


def theory_page(study: Study, kept: dict[str, Result], into: Path) -> list[str]:
    """The theory's figures, of the study's own models."""
    groups = groups_of(study, kept)
    return [*_opening(study, groups), *theory.sections(study, kept, into), *_to_be_known(study, groups, kept)]


def time_page(found: Found, into: Path) -> list[str]:
    """Where the time of each method goes, by the runs' own accounting."""
    lines = [
        "# Time and its parts",
        "",
        "By the accounting that every run keeps (`kind: time` in its metrics.jsonl), the mean over training seeds. "
        "Two runs at a time shared the machine, and other work came and went, so that the clock alone compares "
        "nothing. A run's *slowdown* is what the backward pass of a token took it, over the least of any run of that "
        "student in the study, as that is nearly the same work in all of them; every time, here and on the other "
        "pages, is divided by it. How well that serves is told by the deviation over the seeds of a method, and by "
        "*backward / forward* of each run: where that differs between two runs by so many per cent, their times "
        "compare to within that. Not corrected, by the clock, are the writing of the teacher's responses and the "
        "training of the teacher. *Writing* is the student's, *teacher* its reading of rows, which is not cached but "
        "in the studies whose page says so.",
        "",
    ]
    for name, (study, kept) in found.items():
        groups = groups_of(study, kept)
        if study.kind != "methods" or not groups:
            continue
        plots.times(groups, into / f"{name}-time.svg")
        base = groups.get(study.baseline)
        rows: list[list[str]] = []
        for variant, runs in groups.items():
            parts = {part: sum(run.parts.get(part, 0.0) for run in runs) for part in plots.PARTS}
            whole = sum(run.seconds for run in runs)
            ratio = (
                spread("ratio", [run.seconds / mean(other.seconds for other in base) for run in runs]) if base else "–"
            )
            shares = [percent(parts[part] / whole) for part in ("generation", "teacher")]
            slowed = ", ".join(f"{run.slowdown:.2f}" for run in runs)
            passes = [run.parts["student backward"] / run.parts["student forward"] for run in runs]
            rows.append([named(variant), minutes(runs), ratio, *shares, slowed, ", ".join(f"{p:.2f}" for p in passes)])
        header = ["method", "minutes", f"time / {named(study.baseline)}", "writing, % of the time", "teacher, %"]
        lines += [f"## {study.title}", "", *table([*header, "slowdown of each run", "backward / forward"], rows), ""]
        lines += [f"![seconds of a step by part]({name}-time.svg)", "", written_besides(kept), ""]
    return lines


def planned(study: Study) -> int:
    """The runs of a study, its stages aside."""
    return sum(len(study.seeds_of.get(variant, study.seeds)) for variant in study.variants)


def index_page(found: Found) -> list[str]:
    """What there is."""
    rows = [
        [f"[{study.title}]({name}.md)", f"{sum(map(len, groups_of(study, kept).values()))} of {planned(study)}"]
        for name, (study, kept) in found.items()
    ]
    return [
        "# The studies",
        "",
        "The paper's comparisons on other, much smaller models and mostly other data, at the scale of a small CPU; "
        "none of its own results is reproduced here. Everything that is needed to make them again is there: settings "
        "under `studies/`, one command for each, and the results of every run beside its settings, from which these "
        "pages are made. **[What held and what did not](claims.md)** puts the paper's claims beside them; "
        "[time](time.md) is told by the runs' own accounting.",
        "",
        *table(["study", "runs"], rows),
        "",
        "`python -m studies run NAME` makes what is missing of one, `python -m studies run --smoke` tries all on "
        "made-up rows, `python -m studies pages` writes these pages.",
    ]
