"""What the paper claims beside what was seen here: each claim is a list of comparisons, and figures decide them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import yaml
from pydantic import TypeAdapter

from distillm.evaluation import Difference
from distillm.report.text import score_name

from . import plan, results
from .plan import Strict
from .results import Found, Result, drawn, num_seeds, of_variant, starts_of
from .text import named, signed, table

HEADER = ("study", "claimed", "by", "seen", "teacher into student, steps, seeds", "verdict")
VERDICTS = ("held", "open", "reversed", "missed", "one seed")


class Comparison(Strict):
    """Two variants in some studies, by the study's score or by the seconds of training.

    As ``than``, ``student`` is the one that ``better`` starts from.
    """

    studies: list[str]
    better: str
    than: str
    margin: float = 0.0
    """Of a score: how much worse still counts as no worse."""
    faster: float | None = None
    """The claim is about time: ``better`` takes at most the time of ``than`` divided by this."""


class Claim(Strict):
    """A sentence of the paper in our words, where it is, and what would show it."""

    claim: str
    where: str
    comparisons: Sequence[Comparison] = ()
    see: str | None = None
    """Where it is no comparison of two variants: what was seen, and the page that tells it."""


@dataclass(frozen=True)
class Row:
    """How a comparison came out in a study, on its test sets together."""

    study: str
    who: str
    by: str
    came_out: str
    scale: str
    verdict: str


def read() -> list[Claim]:
    """The claims, from `claims.yaml`."""
    return TypeAdapter(list[Claim]).validate_python(yaml.safe_load((plan.HERE / "claims.yaml").read_text()))


def page(found: Found) -> list[str]:
    """Each claim with its comparisons, and how they came out."""
    lines = [
        "# What held and what did not",
        "",
        "Claims of DistiLLM (Ko et al., ICML 2024, arXiv:2402.03898) and of DistiLLM-2 (arXiv:2503.07067), in "
        "our words, beside what these studies saw, at their scale: small models, minutes of training, one "
        "teacher and one start in each study. A claim that is open or reversed here may well be true of larger models "
        "that train for longer.",
        "",
        "- *Held*: the 95 % interval of the difference lies on the claim's side of zero, with p < 0.05. Where a claim "
        "is that something costs nothing, as much worse as the row says counts for nothing, which is our choice.",
        "- *Reversed*: it lies on the other side.",
        "- *Open*: it does neither; these runs cannot tell.",
        "- *One seed*: nothing is decided, since its interval knows the test rows alone. A row says where that "
        "interval leaves out zero (or the loss that counts for nothing). Of times nothing is said.",
        "- Times have no interval: *held* is where all runs of the one are on the claim's side of all of the other, "
        "*missed* where a ratio that was claimed is not reached.",
        "",
        "With three seeds an interval is still too short where seeds differ more than rows do. A study with several "
        "test sets is asked of all their rows together. Each comparison is by itself, without correction for their "
        "number; the counts are no tally of independent tests, as comparisons share runs. A study that has not both "
        "sides is left out. *Seen* is the score of the first less that of the second, with its 95 % interval by [a "
        "bootstrap](../evaluation.md); 3e-4 is a learning rate.",
        "",
        "The ablations begin phi at 0.5 (the paper: 0), so that the student's responses matter in so few steps. That "
        "is not DistiLLM at its best, as [their table of the initial probability](ablations.md) shows, and the rows "
        "about how the responses are used are to be read with that in mind.",
        "",
    ]
    claims = [(claim, [row for each in claim.comparisons for row in _rows(each, found)]) for claim in read()]
    lines += table(["claim", *VERDICTS], [_counted(claim, rows) for claim, rows in claims if rows])
    for claim, rows in claims:
        lines += ["", f"## {claim.claim}", "", f"{claim.where}."]
        if claim.see is not None:
            lines += ["", f"{claim.see}."]
        elif rows:
            body = [[row.study, row.who, row.by, row.came_out, row.scale, row.verdict] for row in rows]
            lines += ["", *table(HEADER, body)]
        else:
            lines += ["", "No run here tells of it yet."]
    return lines


def _counted(claim: Claim, rows: Sequence[Row]) -> list[str]:
    counts = Counter(row.verdict.partition(",")[0] for row in rows)
    return [claim.claim, *(str(counts[verdict]) for verdict in VERDICTS)]


def _rows(comparison: Comparison, found: Found) -> list[Row]:
    rows: list[Row] = []
    for name in comparison.studies:
        study, kept = found.get(name, (None, {}))
        if study is None:
            continue
        ours, theirs = of_variant(kept, comparison.better), of_variant(kept, comparison.than)
        if comparison.than == "student" and (start := starts_of(study, found).get(comparison.better)) is not None:
            theirs = [start]
        if not ours or not theirs:
            continue
        who = f"{named(comparison.better)} over {named(comparison.than)}"
        seeds = num_seeds(ours, theirs)
        steps = " against ".join(dict.fromkeys(str(runs[0].record["steps"]) for runs in (ours, theirs) if drawn(runs)))
        scale = f"{_sizes(ours[0])}, {steps} steps, {seeds} seed{'s' * (seeds > 1)}"
        page = f"[{name}]({name}.md)"
        if comparison.faster is not None:
            times = [run.seconds for run in ours], [run.seconds for run in theirs]
            verdict = _all_faster(*times, comparison.faster) if seeds > 1 else "one seed"
            rows.append(Row(page, who, *_times(*map(fmean, times), comparison.faster), scale, verdict))
            continue
        sets = list(ours[0].record["scores"])
        out = results.difference(ours, theirs, sets, study.metric)
        by = score_name(study.metric) + (f", {len(sets)} sets" if len(sets) > 1 else "")
        by += f", {comparison.margin:g} worse at most" if comparison.margin else ""
        seen = signed(out, marked=seeds > 1 and not comparison.margin)
        verdict = _verdict(out, comparison.margin, seeds)
        rows.append(Row(page, who, by, seen, scale, verdict))
    return rows


def _times(ours: float, theirs: float, faster: float) -> tuple[str, str]:
    """What is claimed of two times, and what was seen, in the claim's direction."""
    if faster == 1:
        return "time", f"{ours / theirs:.2f} of its time"
    if faster < 1:
        return f"time, {1 / faster:.3g} times its at most", f"{ours / theirs:.2f} times its"
    return f"time, the other's at least {faster:.3g} times", f"{theirs / ours:.2f} times"


def _verdict(out: Difference, margin: float, seeds: int) -> str:
    side = "held" if out.low + margin > 0 else "reversed" if out.high + margin < 0 else "open"
    if seeds == 1:
        return {"held": "one seed, for it", "reversed": "one seed, against it", "open": "one seed"}[side]
    return "open" if margin == 0 and out.p >= 0.05 else side


def _sizes(run: Result) -> str:
    sizes = run.record["parameters"]
    known = [sizes[name] for name in ("teacher", "student") if name in sizes]
    return " into ".join(f"{size / 1e6:.1f} M" for size in known)


def _all_faster(ours: Sequence[float], theirs: Sequence[float], times: float) -> str:
    mine = [seconds * times for seconds in ours]
    other = "reversed" if times == 1 else "missed"
    return "held" if max(mine) < min(theirs) else other if min(mine) > max(theirs) else "open"
