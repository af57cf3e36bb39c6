"""Numbers as a reader sees them, and the sentences and facts that are computed from a run."""

import math
import re
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from .read import RunFolder, Score, Scores, mapping, number_in

SCORE_NAMES = {
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_lsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "ter": "TER",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "repetition": "Repetition",
    "length_ratio": "Length ratio",
    "exact_match": "Exact match",
    "divergence": "Divergence (nats/token)",
    "agreement": "Top-1 agreement",
    "perplexity": "Perplexity",
    "calibration_error": "Calibration error",
    "response_tokens": "Response length (tokens)",
    "truncated": "Cut by length",
}
DATA_FACTS = ("task", "train", "validation", "test", "limit", "template", "responses", "text")
SYSTEM_NAMES = {"before": "student before", "student": "student distilled"}


def score_name(name: str) -> str:
    """The heading of a score's column."""
    return SCORE_NAMES.get(name, name.replace("_", " "))


def number(value: float | None) -> str:
    """Four significant digits; an en dash where there is no number."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e4 else f"{value:.3e}" if abs(value) < 1e-4 else f"{value:.0f}"


def decimals(name: str) -> int:
    """Decimals that suit a score: divergences live between 0 and 10, most others between 0 and 100."""
    return 3 if name in ("divergence", "length_ratio") else 2


def mean_std(name: str, score: Score | None) -> str:
    """``mean ± std``; the mean alone for a single seed, whose spread is not known."""
    if score is None:
        return "–"
    places = decimals(name)
    if score.std is None or score.num_seeds < 2:
        return f"{score.mean:.{places}f}"
    return f"{score.mean:.{places}f} ± {score.std:.{places}f}"


def parameter_count(count: int | None) -> str:
    """Parameters in thousands (K), millions (M) or billions (B)."""
    if count is None:
        return "–"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 999.5 else f"{count / size:.0f} {unit}"
    return str(count)


def duration(seconds: float | None) -> str:
    """Seconds as ``1 h 02 min``, ``4 min 05 s`` or ``12.3 s``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def model_name(run: RunFolder, model: str) -> str | None:
    """A model's path or hub name, or the layers that a student takes from its teacher; None where neither is set."""
    setting = run.config.get(model)
    if isinstance(setting, str):
        return setting
    if not isinstance(setting, Mapping):
        return None
    if isinstance(setting.get("path"), str):
        return setting["path"]
    layers = setting.get("layers")
    if layers is not None:
        return f"layers {', '.join(map(str, layers))}" if isinstance(layers, list) else f"{layers} layers"
    return None


def short_name(path: str) -> str:
    """The last part of a path; of a student in its run folder, the run's name."""
    parts = [part for part in re.split(r"[/\\]", path) if part]
    if len(parts) > 1 and parts[-1] == "student":
        return parts[-2]
    return parts[-1] if parts else path


def method_name(run: RunFolder) -> str | None:
    """The name of the method, or None."""
    setting = run.config.get("method")
    name = setting.get("name") if isinstance(setting, Mapping) else setting
    return name if isinstance(name, str) else None


def title(run: RunFolder) -> str:
    """``TEACHER into STUDENT, by METHOD``, as far as they are known; otherwise the folder's name."""
    teacher, student, method = model_name(run, "teacher"), model_name(run, "student"), method_name(run)
    if method is None or (teacher is None and student is None):
        return run.name
    names = [short_name(name) for name in (teacher, student) if name is not None]
    return f"{' into '.join(names if student else [*names, 'a student'])}, by {method}"


def verdict(run: RunFolder) -> list[tuple[str, str]]:
    """How close, at what size, at what cost: each with a sentence of the numbers that are there, or left out."""
    near = "; ".join(part for part in (_rouge_part(run), _divergence_part(run)) if part)
    lines = [("How close", near), ("At what size", _size_part(run)), ("At what cost", _cost_part(run))]
    return [(name, said[0].upper() + said[1:] + ".") for name, said in lines if said]


def status(run: RunFolder) -> str | None:
    """That the run has not come to its end, or that it made the student no better; None for all others."""
    if not run.going_on:
        worse = [str(event.get("message") or "") for event in run.events if event.get("event") == "worse"]
        return f"{worse[-1][0].upper()}{worse[-1][1:]}." if worse and worse[-1] else None
    planned = f" of {run.planned}" if run.planned else ""
    return f"This run is still going on, or was killed: it has made {run.last_step}{planned} steps so far."


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """The rows of the facts table; what is not recorded has no row."""
    provenance = run.provenance
    rows = [(model.capitalize(), _model_facts(run, model)) for model in ("teacher", "student")]
    teacher, student = run.parameters("teacher"), run.parameters("student")
    if teacher and student:
        rows.append(
            ("Compression", f"{teacher / student:.2f} to 1 ({100 * student / teacher:.1f} % of the parameters)")
        )
    rows.append(("Method", _settings(run.config.get("method"))))
    data = mapping(run.config, "data")
    rows.append(("Data", _settings({key: data[key] for key in DATA_FACTS if key in data})))
    planned = run.planned
    if run.last_step is not None:
        skipped = len({event["step"] for event in run.events if event.get("event") == "skipped"})
        said = f"{run.last_step} of {planned}" if planned else str(run.last_step)
        rows.append(("Steps", f"{said}, of which {skipped} skipped (no target token)" if skipped else said))
    tokens = [number_in(step, "tokens") for step in run.steps]
    seconds = run.seconds
    if seconds:
        time = f"{duration(seconds)} in training steps, {seconds / len(run.steps):.3g} s a step"
        if all(count is not None for count in tokens):
            time += f", {math.fsum(count or 0 for count in tokens) / seconds:.3g} tokens/s"
        rows.append(("Time", time))
    rows.append(("Speed", _speed_fact(run)))
    rows.append(("Computed", _computed(run)))
    if run.peak_bytes:
        rows.append(("Memory", f"{run.peak_bytes / 2**30:.2f} GiB at most"))
    rows.append(("Started", _plain(provenance.get("started"))))
    machine = [_plain(provenance.get("machine")), _plain(provenance.get("device"))]
    if provenance.get("threads") is not None:
        machine.append(f"{_plain(provenance['threads'])} threads")
    rows.append(("Machine", ", ".join(part for part in machine if part)))
    versions = [f"{key} {_plain(provenance[key])}" for key in ("distillm", "python", "torch", "transformers", "git")
                if provenance.get(key)]  # fmt: skip
    rows.append(("Versions", ", ".join(versions)))
    rows.append(("Folder", str(run.path)))
    return [(name, value) for name, value in rows if value]


def _speed_fact(run: RunFolder) -> str:
    rates = _rates(run)
    parts = [f"{system} {rate:.3g} tokens/s" for system, rate in rates.items()]
    times = f" ({rates['student'] / rates['teacher']:.2f} times)" if len(rates) == 2 else ""
    return f"{', '.join(parts)}{times}, answering test rows where they were scored" if parts else ""


def _computed(run: RunFolder) -> str:
    seconds, peak = math.fsum(run.parts.values()), number_in(run.provenance, "peak_flops")
    if not run.flops or not seconds:
        return ""
    rate = run.flops / seconds
    share = f", {rate / peak:.1%} of what a large product reaches here" if peak else ""
    return f"{operations(run.flops)} in products that rows needed, {operations(rate)}/s over the whole run{share}"


def operations(count: float) -> str:
    """A number of floating-point operations, with its unit."""
    name, size = next(((n, s) for n, s in (("P", 1e15), ("T", 1e12), ("G", 1e9)) if count >= s), ("M", 1e6))
    return f"{count / size:.3g} {name}FLOP"


def command(run: RunFolder) -> str | None:
    """The command line that started the run, as a shell reads it."""
    given = run.provenance.get("command")
    if isinstance(given, list):
        return shlex.join(str(word) for word in given)
    return given if isinstance(given, str) and given.strip() else None


def decoding(scores: list[Scores]) -> list[str]:
    """How the systems were decoded: one sentence for each distinct setting."""
    sentences: dict[str, list[str]] = {}
    for entry in scores:
        parts = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in entry.decoding.items()]
        if entry.seeds:
            parts.append(f"{'seeds' if len(entry.seeds) > 1 else 'seed'} {', '.join(map(str, entry.seeds))}")
        if parts:
            sentences.setdefault(", ".join(parts), []).append(f"{entry.system} on {entry.data}")
    if len(sentences) == 1:
        return [f"Decoding: {next(iter(sentences))}."]
    return [f"Decoding of {', '.join(systems)}: {setting}." for setting, systems in sentences.items()]


def _size_part(run: RunFolder) -> str:
    teacher, student = run.parameters("teacher"), run.parameters("student")
    if not teacher or not student:
        return ""
    times = f", {teacher / student:.1f} times fewer" if teacher > 1.05 * student else ""
    counts = [parameter_count(count).replace(" ", "\N{NO-BREAK SPACE}") for count in (student, teacher)]
    rates = [f"{'it' if who == 'student' else 'the teacher'} answers with {rate:.3g} tokens/s"
             for who, rate in sorted(_rates(run).items())]  # fmt: skip
    return "; ".join([f"{counts[0]} parameters to the teacher's {counts[1]}{times}", *rates])


def _cost_part(run: RunFolder) -> str:
    if not run.seconds or run.last_step is None:
        return ""
    said = f"{duration(run.seconds)} in {run.last_step} training steps{'' if run.finished else ' so far'}"
    whole = math.fsum(run.parts.values())
    said += f", {duration(whole)} from start to end" if whole > run.seconds else ""
    where = _plain(run.provenance.get("device"))
    return said + (f", on {where}" if where else "") + (f"; {operations(run.flops)}" if run.flops else "")


def _rates(run: RunFolder) -> dict[str, float]:
    """Tokens a second of "teacher" and "student" while they answered: the mean over the data sets scored."""
    rates: dict[str, list[float]] = {}
    for system in ("teacher", "student"):
        found = [entry.speed for entry in run.scores if entry.system == system and entry.speed is not None]
        if found:
            rates[system] = found
    return {system: statistics.fmean(found) for system, found in rates.items()}


def _rouge_part(run: RunFolder) -> str:
    data, before, after = _before_after(run, "rouge_l")
    if after is None:
        return ""
    ceiling = {entry.data: entry.scores["rouge_l"].mean for entry in run.scores
               if entry.system == "teacher" and "rouge_l" in entry.scores}  # fmt: skip
    beside = f" (the teacher's own: {ceiling[data]:.1f})" if data in ceiling else ""
    how = f"is {after:.1f}" if before is None else _change(before, after, 1)
    return f"ROUGE-L on {data} {how}{beside}"


def _divergence_part(run: RunFolder) -> str:
    data, before, after = _before_after(run, "divergence")
    if after is not None:
        how = f"is {after:.2f}" if before is None else _change(before, after, 2)
        return f"the divergence to the teacher on {data} {how} nats a token"
    known = [(record["step"], value) for record in run.validations
             if (value := number_in(record, "divergence")) is not None]  # fmt: skip
    if len(known) < 2:
        return ""
    (first, before), (last, after) = known[0], known[-1]
    return (
        f"the divergence to the teacher on the validation rows {_change(before, after, 2)} nats a token"
        f" between steps {first} and {last}"
    )


def _before_after(run: RunFolder, name: str) -> tuple[str, float | None, float | None]:
    """The data set, and the mean score before and after; a data set that has both is preferred."""
    means = {(entry.data, entry.system): entry.scores[name].mean for entry in run.scores if name in entry.scores}
    names = [data for data, system in means if system == "student"]
    names.sort(key=lambda data: (data, "before") not in means)
    if not names:
        return "", None, None
    return names[0], means.get((names[0], "before")), means[names[0], "student"]


def _change(before: float, after: float, places: int) -> str:
    first, last = f"{before:.{places}f}", f"{after:.{places}f}"
    if first == last:
        return f"stayed at {last}"
    return f"{'rose' if after > before else 'fell'} from {first} to {last}"


def _model_facts(run: RunFolder, model: str) -> str:
    details = mapping(run.provenance, "models", model)
    parts = [model_name(run, model) or ""]
    if (count := run.parameters(model)) is not None:
        parts.append(f"{parameter_count(count)} parameters ({count:,})")
    named = (("layers", "{} layers"), ("width", "width {}"), ("vocabulary", "vocabulary {}"))
    parts.extend(form.format(_plain(details[key])) for key, form in named if details.get(key) is not None)
    return ", ".join(part for part in parts if part)


def _settings(value: Any) -> str:
    """Settings on one line, the name first; nested ones by dotted keys, unset ones left out."""
    if not isinstance(value, Mapping):
        return _plain(value)
    parts = [str(value["name"])] if "name" in value else []
    parts.extend(f"{key}={text}" for key, text in _flat(value) if key != "name")
    return ", ".join(parts[:24]) + (f", and {len(parts) - 24} more" if len(parts) > 24 else "")


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            pairs.extend(_flat(entry, f"{prefix}{key}."))
        elif _plain(entry):
            pairs.append((f"{prefix}{key}", _plain(entry)))
    return pairs


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(_words(value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 160 else text[:159] + "…"


def _words(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list | tuple) else [str(values)]
