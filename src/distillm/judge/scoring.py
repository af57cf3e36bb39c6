"""Questions about the answers of ``eval/NAME.json``, and scores from what the judge replied."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ..errors import ConfigError, DataError, first_of
from .asking import Judgment, Question
from .prompts import READERS, Template, reminder

Ask = Callable[[Sequence[Question[Any]]], Sequence[Judgment[Any]]]
"""Takes questions and gives their judgments, in order."""
Texts = tuple[str, ...]
OUTCOMES = ("win", "tie", "loss")
_Z = statistics.NormalDist().inv_cdf(0.975)


class Row(BaseModel):
    """One prompt with its references and the answers to it, one per decoding seed."""

    id: str
    prompt: str
    references: list[str] = []
    predictions: list[str] = Field(min_length=1)


class Answers(BaseModel):
    """What the judge reads of ``eval/NAME.json``; other fields are left aside."""

    data: str | None = None
    system: str | None = None
    model: str | None = None
    seeds: list[int] = []
    predictions: list[Row] = Field(min_length=1)


@dataclass(frozen=True)
class Judge:
    """What is asked of whom: all that a reply depends on but the texts. ``extra`` are further fields of a request.

    ``tries`` bounds how often a question is asked whose reply has no verdict. A value of None in ``extra`` leaves the
    field of that name out.
    """

    model: str
    template: Template
    temperature: float = 0.0
    max_tokens: int = 512
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tries: int = 3

    def question(self, name: str, **texts: str) -> Question[Any]:
        """The question about ``texts``, the names of which are those of the template."""
        text = self.template.render(**texts)
        again = [f"{text}\n\n{reminder(self.template.kind, attempt)}" for attempt in range(2, self.tries + 1)]
        return Question(name, [self._body(each) for each in (text, *again)], READERS[self.template.kind])

    def _body(self, text: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in (body | dict(self.extra)).items() if value is not None}


@dataclass(frozen=True)
class Scored:
    """The outcome: ``scores`` for the summary, ``rows`` with every reply, ``failed`` with what is in no score.

    ``left_out`` of ``total`` answers (or pairs) are in no score.
    """

    scores: dict[str, Any]
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    left_out: int
    total: int


def read_answers(path: Path, limit: int | None = None) -> Answers:
    """The answers in an ``eval/NAME.json``, those to the first ``limit`` prompts.

    Raises:
        DataError: the file is absent or not of that form; a row lacks its prompt, or has another number of answers.
    """
    try:
        answers = Answers.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        hint = ""
        if first["loc"][-1:] == ("prompt",):
            hint = ". A judge has to know the question: give every row its `prompt`"
        raise DataError(
            f"{path}: {place + ': ' if place else ''}{first['msg']}{hint}. What is judged is an eval/NAME.json of a "
            "run, or what distillm eval --output writes"
        ) from error
    rows = answers.predictions
    if len({row.id for row in rows}) < len(rows):
        raise DataError(f"{path}: several rows have the same id; give each its own")
    count = len(rows[0].predictions)
    odd = next((row for row in rows if len(row.predictions) != count), None)
    if odd is not None:
        raise DataError(f"{path}: {odd.id} has {len(odd.predictions)} answers, where {rows[0].id} has {count}")
    seeds = answers.seeds if len(answers.seeds) == len(set(answers.seeds)) == count else list(range(count))
    return answers.model_copy(update={"predictions": rows[:limit], "seeds": seeds})


def seeds_chosen(answers: Answers, against: Answers | None, index: int | None) -> list[int]:
    """The places of the decoding seeds to judge: that of ``index``, or all; pairs are made place by place.

    Raises:
        ConfigError: there is no such place, or the two files have different numbers of seeds.
    """
    counts = [len(each.seeds) for each in (answers, against) if each is not None]
    if index is not None:
        if index >= min(counts):
            raise ConfigError(f"--seed-index {index}: there are answers of {min(counts)} seed(s), counted from 0")
        return [index]
    if len(set(counts)) > 1:
        raise ConfigError(f"{counts[0]} seed(s) against {counts[1]}: choose one of each by --seed-index 0")
    return list(range(counts[0]))


def score_single(answers: Answers, judge: Judge, ask: Ask, places: Sequence[int]) -> Scored:
    """Grade each answer and its row's first reference, 1 to 10 each, without the judge knowing which is which.

    ``judge_ratio`` is 100 * sum(grades of the answers) / sum(grades of the references) over the rows that have both
    grades, per decoding seed; ``judge_score`` and ``judge_reference`` are the mean grades of the same rows.

    Raises:
        DataError: a row has no reference.
        Whatever ``ask`` raises.
    """
    bare = [row.id for row in answers.predictions if not row.references]
    if bare:
        raise DataError(f"rows without a reference cannot be scored by its grade: {first_of(bare)}")
    names: dict[Texts, str] = {}
    for row in answers.predictions:
        names.setdefault((row.prompt, row.references[0]), f"{row.id}, reference")
        for place in places:
            names.setdefault((row.prompt, row.predictions[place]), f"{row.id}, seed {answers.seeds[place]}")
    questions = [judge.question(name, prompt=p, answer=a) for (p, a), name in names.items()]
    found = dict(zip(names, ask(questions), strict=True))
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    grades: list[list[tuple[float, float]]] = [[] for _ in places]
    for row in answers.predictions:
        reference = found[row.prompt, row.references[0]]
        told = [found[row.prompt, row.predictions[place]] for place in places]
        seeds = [answers.seeds[place] for place in places]
        for seed, judgment in [(None, reference), *zip(seeds, told, strict=True)]:
            if judgment.value is None:
                failed.append({"id": row.id, "seed": seed, "reason": judgment.reason})
        for graded, judgment in zip(grades, told, strict=True):
            if judgment.value is not None and reference.value is not None:
                graded.append((judgment.value, reference.value))
        shown = [
            {"seed": seed, "answer": row.predictions[place], **_shown("score", judgment)}
            for seed, place, judgment in zip(seeds, places, told, strict=True)
        ]
        rows.append(
            {
                "id": row.id,
                "prompt": row.prompt,
                "reference": {"answer": row.references[0], **_shown("score", reference)},
                "answers": shown,
            }
        )
    total = len(rows) * len(places)
    scores = {
        "judge_ratio": _summary([100 * sum(a for a, _ in g) / sum(r for _, r in g) if g else None for g in grades]),
        "judge_score": _summary([statistics.fmean(a for a, _ in g) if g else None for g in grades]),
        "judge_reference": _summary([statistics.fmean(r for _, r in g) if g else None for g in grades]),
    }
    return Scored(scores, rows, failed, total - sum(map(len, grades)), total)


def score_pairs(answers: Answers, against: Answers, judge: Judge, ask: Ask, places: Sequence[int]) -> Scored:
    """Compare the answers of two systems, each pair in both orders.

    A pair is a win where the first system's answer is preferred in both orders, a loss where the other's is, else a
    tie. ``win_rate`` is 100 * (wins + ties / 2) / pairs, per decoding seed; its interval is Wilson's of 95 %, with the
    prompts as its number, so that several answers to one prompt count once. Equal answers are ties and are not asked.

    Raises:
        DataError: the two files do not have the same rows.
        Whatever ``ask`` raises.
    """
    others = _matched(answers, against)
    names: dict[Texts, str] = {}
    pairs: list[tuple[Row, int, Texts, Texts]] = []
    for row in answers.predictions:
        for place in places:
            one, two = row.predictions[place], others[row.id].predictions[place]
            pairs.append((row, place, (row.prompt, one, two), (row.prompt, two, one)))
            if one != two:
                for order, texts in enumerate(pairs[-1][2:], 1):
                    names.setdefault(texts, f"{row.id}, seed {answers.seeds[place]}, order {order}")
    questions = [judge.question(name, prompt=p, answer_a=a, answer_b=b) for (p, a, b), name in names.items()]
    found = dict(zip(names, ask(questions), strict=True))
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for row, place, texts, swapped in pairs:
        entry = {"id": row.id, "seed": answers.seeds[place], "prompt": row.prompt, "answers": [*texts[1:]]}
        if texts == swapped:
            rows.append(entry | {"outcome": "tie", "equal": True, "orders": []})
            continue
        orders = [found[texts], found[swapped]]
        failed += [
            {"id": row.id, "seed": entry["seed"], "order": order, "reason": judgment.reason}
            for order, judgment in enumerate(orders, 1)
            if judgment.value is None
        ]
        outcome = outcome_of(*(judgment.value for judgment in orders))
        rows.append(entry | {"outcome": outcome, "equal": False, "orders": [_shown("verdict", j) for j in orders]})
    seeds = [answers.seeds[place] for place in places]
    left_out = sum(row["outcome"] is None for row in rows)
    return Scored(_pair_scores(rows, seeds), rows, failed, left_out, len(rows))


def outcome_of(first: str | None, swapped: str | None) -> str | None:
    """Win, tie or loss of answer A of the first order from both orders' verdicts; None where one is missing."""
    if first is None or swapped is None:
        return None
    return "tie" if _disagree(first, swapped) else {"A": "win", "B": "loss", "tie": "tie"}[first]


def _disagree(first: str, swapped: str) -> bool:
    return first != {"A": "B", "B": "A", "tie": "tie"}[swapped]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a ``share`` in [0, 1] that was seen in ``count`` draws (Wilson 1927)."""
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    centre, scale = share + _Z**2 / (2 * count), 1 + _Z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _pair_scores(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    judged = [row for row in rows if row["outcome"] is not None]
    points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    by_seed = [[points[row["outcome"]] for row in judged if row["seed"] == seed] for seed in seeds]
    prompts = len({row["id"] for row in judged})
    rate = statistics.fmean(points[row["outcome"]] for row in judged) if judged else None
    verdicts = [order["verdict"] for row in judged for order in row["orders"]]
    disagreeing = sum(_disagree(*(order["verdict"] for order in row["orders"])) for row in judged if row["orders"])
    return {
        "win_rate": _summary([100 * statistics.fmean(found) if found else None for found in by_seed])
        | {"interval": None if rate is None else [100 * end for end in wilson(rate, prompts)]},
        "pairs": {outcome: sum(row["outcome"] == outcome for row in judged) for outcome in OUTCOMES}
        | {"equal": sum(row["equal"] for row in judged), "disagreeing": disagreeing, "prompts": prompts},
        "preferred": {name: verdicts.count(name) for name in ("A", "B", "tie")},
    }


def _matched(answers: Answers, against: Answers) -> dict[str, Row]:
    others = {row.id: row for row in against.predictions}
    ids = {row.id for row in answers.predictions}
    odd = sorted(ids ^ others.keys())
    if odd:
        raise DataError(f"the two files must have the same rows; these are in one of them only: {first_of(odd)}")
    other = [row.id for row in answers.predictions if row.prompt != others[row.id].prompt]
    if other:
        raise DataError(f"the two files ask different things under the same id: {first_of(other)}")
    return others


def _shown(name: str, judgment: Judgment[Any]) -> dict[str, Any]:
    reason = {"reason": judgment.reason} if judgment.value is None else {}
    return {name: judgment.value, "replies": list(judgment.replies), **reason}


def _summary(per_seed: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds that have a value, and the values themselves."""
    known = [value for value in per_seed if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": None if not known else statistics.stdev(known) if len(known) > 1 else 0.0,
        "per_seed": list(per_seed),
    }
