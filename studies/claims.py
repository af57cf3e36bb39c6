"""What the paper claims beside what was seen here: each claim is a list of comparisons, and their intervals decide."""

from collections.abc import Sequence

import yaml
from pydantic import TypeAdapter

from distillm.evaluation import METRICS
from distillm.report.text import score_name

from . import plan, results
from .plan import Strict, Study
from .results import Result, mean_std, of_variant
from .text import named, signed, table

Found = dict[str, tuple[Study, dict[str, Result]]]


class Comparison(Strict):
    """Two variants of a study, or of several; ``by`` is a score, ``seconds``, or ``curve``."""

    studies: list[str]
    better: str
    than: str
    by: str = "score"
    """``score``: the study's own, on its test sets. ``seconds``: of training, fewer being better. ``divergence``: from
    the teacher on the test references, less being better."""
    factor: float = 1.0
    """Of ``seconds``: how many times faster the claim has it."""


class Claim(Strict):
    """A sentence of the paper in our words, where it is, and what would show it."""

    claim: str
    where: str
    comparisons: list[Comparison]


def read() -> list[Claim]:
    """The claims, from `claims.yaml`."""
    return TypeAdapter(list[Claim]).validate_python(yaml.safe_load((plan.HERE / "claims.yaml").read_text()))


def page(found: Found) -> list[str]:
    """Each claim with its comparisons, and how they came out."""
    lines = [
        "# What held and what did not",
        "",
        "Claims of DistiLLM (Ko et al., ICML 2024, arXiv:2402.03898), in our words, beside what these studies saw, at "
        "their scale: small models and minutes of training. *Held*: the 95 % interval lies on the claim's side of "
        "zero. *Reversed*: it lies on the other. *Open*: it holds zero, so that these runs cannot tell. A claim that "
        "is open or reversed here may well be true of larger models trained for longer. Times have no interval: "
        "*held* is where all runs of the one are faster than all of the other.",
        "",
    ]
    for claim in read():
        rows = [row for comparison in claim.comparisons for row in _rows(comparison, found)]
        if rows:
            header = ["study", "better", "than", "by", "difference", "at the scale of", ""]
            lines += [f"## {claim.claim}", "", f"{claim.where}. {_summary(rows)}", "", *table(header, rows), ""]
    return lines


def _rows(comparison: Comparison, found: Found) -> list[list[str]]:
    rows: list[list[str]] = []
    for name in comparison.studies:
        if name not in found:
            continue
        study, kept = found[name]
        ours, theirs = (of_variant(kept, variant) for variant in (comparison.better, comparison.than))
        if not ours or not theirs:
            continue
        seeds = len(ours) if len(ours) == len(theirs) else f"{len(ours)} and {len(theirs)}"
        scale = f"{_millions(ours[0])}, {ours[0].record['steps']} steps, seeds: {seeds}"
        who = [named(comparison.better), named(comparison.than)]
        if comparison.by == "score":
            for data in ours[0].record["scores"]:
                if METRICS[study.metric].better == "higher":
                    difference = results.difference(ours, theirs, data, study.metric)
                    verdict = _verdict(difference.low, difference.high)
                    where = f"[{study.name}]({study.name}.md), {data}"
                    rows.append([where, *who, score_name(study.metric), signed(difference), scale, verdict])
        else:
            rows.append([f"[{study.name}]({study.name}.md)", *who, *_by_run(comparison, ours, theirs), scale, ""])
            rows[-1][-1] = _verdict_of(comparison, ours, theirs)
    return rows


def _millions(run: Result) -> str:
    sizes = run.record["parameters"]
    known = [sizes[name] for name in ("teacher", "student") if name in sizes]
    return " into ".join(f"{size / 1e6:.1f} M" for size in known)


def _values(comparison: Comparison, runs: Sequence[Result]) -> list[float]:
    if comparison.by == "seconds":
        return [run.seconds for run in runs]
    (data, *_) = runs[0].record["scores"]
    return [value for run in runs if (value := run.score(data, comparison.by)) is not None]


def _by_run(comparison: Comparison, ours: Sequence[Result], theirs: Sequence[Result]) -> list[str]:
    mine, other = (mean_std(_values(comparison, runs)) for runs in (ours, theirs))
    if mine is None or other is None:
        return [comparison.by, "–"]
    if comparison.by == "seconds":
        return ["time", f"{other[0] / mine[0]:.2f} times as fast"]
    return [comparison.by, f"{mine[0]:.3f} and {other[0]:.3f}"]


def _verdict_of(comparison: Comparison, ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Of figures that each run has one of: held where all runs of the one are on the claim's side of all others."""
    mine = [value * comparison.factor for value in _values(comparison, ours)]
    other = _values(comparison, theirs)
    if not mine or not other:
        return ""
    if max(mine) < min(other):
        return "held"
    return "reversed" if min(mine) > max(other) else "open"


def _verdict(low: float, high: float) -> str:
    return "held" if low > 0 else "reversed" if high < 0 else "open"


def _summary(rows: Sequence[Sequence[str]]) -> str:
    counts = {verdict: sum(row[-1] == verdict for row in rows) for verdict in ("held", "open", "reversed")}
    return (
        "Here: "
        + ", ".join(f"{verdict} in {count}" for verdict, count in counts.items() if count)
        + f" of {len(rows)}."
    )
