"""What a study is made of: stages that come first, then variants of one run over seeds, as `study.yaml` says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from distillm.config import Run, make_run, read_yaml
from distillm.errors import ConfigError
from distillm.explain import explain
from distillm.sweep import Cell

HERE = Path(__file__).parent
ROWS, RUNS = "../shared/data", "runs"
"""What the YAML files call the folder of the data sets, and that of the runs."""


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Stage(Strict):
    """One thing that the variants need: a tokenizer, a pretrained model, a run, or the theory's figures of a run."""

    name: str
    tokenizer: str | None = None
    """The rows that a tokenizer is trained on."""
    size: int = 5000
    """The tokenizer's tokens."""
    fetch: str | None = None
    """The pretrained model to bring."""
    train: str | None = None
    """The YAML file, beside study.yaml, of a run."""
    settings: dict[str, Any] = {}
    """Settings of that run which differ from its file."""
    responses: str | None = None
    """The variant that trains on the teacher's responses, which are written, and their time kept."""
    analyse: str | None = None
    """The variant whose first seed is analysed."""
    batches: int = 8
    alphas: list[float] = []
    """Of an analysis."""

    @model_validator(mode="after")
    def _one(self) -> "Stage":
        if sum(bool(kind) for kind in (self.tokenizer, self.fetch, self.train, self.responses, self.analyse)) != 1:
            raise ValueError(f"stage {self.name}: give one of tokenizer, fetch, train, responses, analyse")
        return self


class Axis(Strict):
    """One thing that is varied in an ablation: labels of a table's rows, and the variants that they stand for."""

    name: str
    about: str
    values: dict[str, str]
    reference: str
    """The label that the others are compared with."""
    numeric: bool = False
    """Whether labels are numbers that a plot has as its x axis."""

    @model_validator(mode="after")
    def _has_reference(self) -> "Axis":
        if self.reference not in self.values:
            raise ValueError(f"axis {self.name}: its reference {self.reference} is none of its values")
        return self


SHORT: dict[str, Any] = {
    "train.steps": 2,
    "train.batch_size": 4,
    "train.micro_batch_size": 4,
    "optim.warmup_steps": 0,
    "validation.every": 1,
    "validation.rouge_rows": 2,
    "data.validation_size": 2,
    "data.limit": 12,
    "generation.max_new_tokens": 4,
    "evaluation.limit": 3,
}
"""What makes any run of a study one of a second."""


class Smoke(Strict):
    """How the study is tried within seconds: settings beside ``SHORT``, and the variants that are made."""

    settings: dict[str, Any] = {}
    variants: list[str] | None = None


class Study(Strict):
    """A folder of `studies/` with a `study.yaml`."""

    name: str
    title: str
    about: str
    remarks: list[str] = []
    """What a reader should know of the results, in words."""
    needs: list[str] = []
    """Studies whose stages come first."""
    stages: list[Stage] = []
    base: str
    """The YAML file of the run that variants change; a path from `studies/`."""
    settings: dict[str, Any] = {}
    """Settings of every variant that differ from that file."""
    variants: dict[str, dict[str, Any]]
    seeds: list[int]
    seeds_of: dict[str, list[int]] = {}
    """Variants that are run with other seeds."""
    kind: Literal["methods", "ablations", "theory"] = "methods"
    baseline: str
    """The variant that the others are compared with."""
    metric: str
    """The score that differences are tested by."""
    axes: list[Axis] = []
    smoke: Smoke = Smoke()

    @model_validator(mode="after")
    def _known(self) -> "Study":
        named = [self.baseline, *self.seeds_of, *(self.smoke.variants or [])]
        named += [variant for axis in self.axes for variant in axis.values.values()]
        named += [variant for stage in self.stages for variant in (stage.responses, stage.analyse) if variant]
        unknown = [name for name in named if name not in self.variants]
        if unknown:
            raise ValueError(f"{self.name}: no variant is called {unknown[0]}")
        return self


def names() -> list[str]:
    """The studies, in the order in which they are to be made."""
    return sorted(
        (path.parent.name for path in HERE.glob("*/study.yaml")), key=lambda name: (len(read(name).needs), name)
    )


def read(name: str) -> Study:
    """The study called ``name``.

    Raises:
        ConfigError: there is none, or its file has a mistake.
    """
    path = HERE / name / "study.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no study {name}; there are {', '.join(names())}")
    try:
        return Study(name=name, **read_yaml(str(path)))
    except ValidationError as error:
        raise ConfigError(explain(error, Study, f"studies/{name}/study.yaml")) from None


@dataclass(frozen=True)
class Place:
    """Where rows are read and runs are written. ``smoke``: everything is made up and small."""

    rows: str = ROWS
    runs: str = RUNS
    smoke: bool = False

    def moved(self, value: Any) -> Any:
        """``value`` with the paths of the YAML files in it brought here."""
        if isinstance(value, dict):
            return {key: self.moved(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.moved(inner) for inner in value]
        if not isinstance(value, str):
            return value
        for written, here in ((ROWS, self.rows), (RUNS, self.runs)):
            if value == written or value.startswith(f"{written}/"):
                return here + value[len(written) :]
        return value

    def folder(self, study: str, run: str) -> Path:
        """Where a run of a study is."""
        return Path(self.runs) / study / run


def stage_run(study: Study, stage: Stage, place: Place) -> Run:
    """The run of a stage, which is written where the variants look for it."""
    assert stage.train is not None
    return _run(study, study.name + "/" + stage.train, stage.settings, place, stage.name)


def teachers(study: Study) -> set[str]:
    """The teachers beside which the study's runs are measured: stages may be made before the variants' own is there."""
    files = [study.base, *(f"{study.name}/{stage.train}" for stage in study.stages if stage.train)]
    return {read["teacher"]["path"] for file in files if "teacher" in (read := read_yaml(str(HERE / file)))}


def cells(study: Study, place: Place) -> list[Cell]:
    """The runs of the study, all variants with a seed before the next seed."""
    wanted = study.smoke.variants if place.smoke else None
    found: list[Cell] = []
    seeds = [study.seeds[0]] if place.smoke else sorted(set(study.seeds).union(*study.seeds_of.values()))
    for seed in seeds:
        for variant, settings in study.variants.items():
            if seed not in study.seeds_of.get(variant, study.seeds) or (wanted is not None and variant not in wanted):
                continue
            name = f"{variant}_seed-{seed}"
            run = _run(study, study.base, study.settings | settings | {"seed": seed}, place, name)
            found.append(Cell({"variant": variant, "seed": str(seed)}, run))
    return found


def _run(study: Study, file: str, settings: dict[str, Any], place: Place, name: str) -> Run:
    path = HERE / file
    settings = settings | (SHORT | study.smoke.settings if place.smoke else {})
    said = [f"{key}={json.dumps(place.moved(value))}" for key, value in settings.items()]
    said += [f"output={place.folder(study.name, name)}", "resume=auto"]
    return make_run(place.moved(read_yaml(str(path))), said, f"studies/{file}, {name}")
