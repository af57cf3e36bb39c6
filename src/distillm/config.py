"""``Run``: the one validated configuration, from YAML and dotted overrides. Never imports torch."""

import difflib
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from .data_settings import Data
from .errors import ConfigError
from .explain import explain, flat, takes_section, takes_text
from .method_settings import (
    Distillation,
    Distillm,
    DivergenceName,
    Method,
    MiniLlm,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
)
from .model_settings import Decay, Student, Teacher
from .paths import is_dir, is_file
from .settings_text import check, load_yaml

Overlap = Literal["rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "chrf", "ter"]
MetricName = Literal[Overlap, "exact_match", "distinct_1", "distinct_2", "repetition", "length_ratio"]


class Generation(Section):
    """How responses are sampled, in training and, unless `evaluation` says otherwise, in evaluation. A task may have
    other defaults."""

    max_new_tokens: PositiveInt = 256
    """Longest response that a model writes, in tokens, the teacher's included; data.max_length bounds the data's."""
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_k: NonNegativeInt = 0
    """0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """1 is off."""
    batch_size: PositiveInt = 32
    """Rows generated at a time."""


class Optim(Section):
    """AdamW and the learning rate."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    final_lr: NonNegativeFloat | None = None
    """The learning rate at the last step (1e-7 unless set, or `lr` where that is less)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices; biases and norms have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's averages."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator."""

    @model_validator(mode="after")
    def _falls(self) -> "Optim":
        if self.final_lr is not None and self.schedule == "constant":
            raise ValueError("final_lr belongs to cosine and linear, not to constant; leave it out (or null)")
        if self.final_lr is not None and self.final_lr > self.lr:
            raise ValueError(f"final_lr ({self.final_lr}) must be at most lr ({self.lr}), from where it falls")
        return self


class Train(Section):
    """How long and in what portions."""

    epochs: PositiveInt | None = None
    """Passes over the training rows; 1 unless `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: PositiveInt = 32
    """Rows per optimizer step."""
    micro_batch_size: PositiveInt = 8
    """Most rows per forward and backward; lower it when memory runs out. A batch is cut by length, into more parts than
    it must be where that saves padding. The result does not depend on it."""
    length_bucket: PositiveInt = 1
    """Batches whose rows are shared out again by length, so that less is padded; 1 leaves them as they are drawn. Each
    epoch visits each row once all the same."""
    packing: bool = False
    """Let the models read the rows of a micro-batch one behind the other, without padding, where they keep them apart.
    It pays with an `attention` that does so too, such as flash_attention_2: others form a mask of all tokens by all."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True), Number] = 1.0
    """Gradients are clipped to this norm; .inf leaves them as they are."""
    mixed_precision: Literal["none", "bf16"] = "none"
    """bf16: the forward and backward passes of training, the teacher's too, compute in bfloat16. Weights, gradients of
    weights, the optimizer and what follows the logits stay as they are. Generation, validation and scoring compute in
    the type of the weights: they measure the student that is saved."""
    compile: bool = False
    """Compile the student's layers with torch.compile for the training steps. It takes a minute or so at first, and a
    C++ compiler on a CPU; whether it pays depends on model and machine (docs/performance.md)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    shard: bool = False
    """Spread the student's weights, gradients and optimizer over the processes (FSDP2) instead of replicating them; see
    docs/processes.md. Generation, validation and scoring gather the weights for their time."""
    cpu_offload: bool = False
    """With `shard`: keep them in the memory of the CPU, where the optimizer works too; slower, for the last resort."""
    timeout_minutes: PositiveFloat = 120.0
    """Of several processes: how long one waits for the others before the run ends with an error. The others wait while
    the first one saves, or asks a server."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.cpu_offload and not self.shard:
            raise ValueError("cpu_offload goes with shard")
        return self


class Validation(Section):
    """What is measured while training goes on."""

    every: PositiveInt | None = None
    """Steps between validations; once an epoch unless set."""
    divergence: DivergenceName = "forward_kl"
    """The divergence that is reported: skew_kl and skew_reverse_kl with alpha 0.1, jsd with beta 0.5, symmetric_kl with
    weight 0.5, whatever the method has."""
    select: Literal["cross_entropy", "divergence", "rouge_l"] = "cross_entropy"
    """Which validation figure chooses the student that is kept."""
    rouge_rows: PositiveInt = 50
    """Rows answered for rouge_l, where something asks for it."""
    samples: NonNegativeInt = 8
    """Prompts answered at each validation, for the report."""


class Evaluation(Section):
    """The scoring of test rows, after training and by `distillm eval`."""

    seeds: Annotated[list[Annotated[int, Number]], Field(min_length=1)] = [10, 20, 30, 40, 50]
    """Decoding seeds; one is enough when greedy."""
    batch_size: PositiveInt = 32
    """Rows generated at a time."""
    limit: PositiveInt | None = None
    """Score only the first rows."""
    temperature: NonNegativeFloat | None = None
    """Instead of generation.temperature; selection by rouge_l uses the same."""
    metrics: Annotated[list[MetricName], Field(min_length=1)] | None = None
    """What answers are scored by, see docs/evaluation.md; the task's own unless set (rouge_l and exact_match)."""
    compare: list[Literal["before", "teacher"]] = ["before", "teacher"]
    """What is scored besides: the student as it was before training, and the teacher."""
    token_rows: NonNegativeInt = 32
    """Test rows whose answers the teacher reads token by token, for the report; 0 for none."""


class Checkpoint(Section):
    """What is kept so that a run can go on."""

    every: PositiveInt | None = None
    """Steps between checkpoints; at each validation unless set."""
    keep: PositiveInt = 2
    """How many of the newest are kept; the best one is kept besides."""


class Run(Section):
    """A whole run. Every key may be overridden on the command line by its dotted name."""

    student: Student
    """The model that is trained."""
    teacher: Teacher | None = None
    """The model that is imitated; sft needs none, nor does seqkd where a server writes the responses."""
    data: Data
    """Where the rows are and how they are read."""
    method: Method = Distillm()
    """What is trained: sft, seqkd, kd, imitkd, gkd, minillm, distillm or distillm2."""
    generation: Generation = Generation()
    """How responses are sampled."""
    optim: Optim = Optim()
    """AdamW and the learning rate."""
    train: Train = Train()
    """How long and in what portions."""
    validation: Validation = Validation()
    """What is measured while training goes on."""
    evaluation: Evaluation = Evaluation()
    """The scoring of test rows."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept so that a run can go on."""
    output: str = "runs/default"
    """The run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32), Number] = 0
    """All draws follow from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send figures to a tracker."""
    resume: Literal["never", "auto"] = "never"
    """auto goes on from the newest checkpoint in `output`, if there is one."""
    overwrite: bool = False
    """Delete a run that is already in `output`."""
    provenance: dict[str, Any] | None = None
    """Written by the tool into a run's own run.yaml: versions, command, machine. Never read by training."""

    @property
    def teacher_writes(self) -> bool:
        """Whether the training responses are the teacher's."""
        return self.data.responses == "teacher" or self.method.name == "seqkd"

    @model_validator(mode="after")
    def _as_the_task_has_it(self) -> "Run":
        spec = self.data.spec
        asked = {"generation": spec.generation, "evaluation": spec.evaluation}
        for section in asked:
            given: Section = getattr(self, section)
            wanted = asked[section].model_dump(exclude_none=True)
            missing = {name: value for name, value in wanted.items() if name not in given.model_fields_set}
            setattr(self, section, given.model_copy(update=missing))
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> "Run":
        if self.train.steps is not None and self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below train.steps ({self.train.steps}), or "
                "the learning rate never reaches optim.lr"
            )
        method = self.method
        if method.replays and method.buffer_rows() < self.train.batch_size:
            raise ValueError(
                f"method.capacity ({method.buffer_rows()}) must be at least train.batch_size "
                f"({self.train.batch_size}): a student step draws a whole batch from the replay buffer"
            )
        if isinstance(method, MiniLlm) and self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature must be above 0 for minillm: its gradient is an expectation over responses "
                "that are drawn"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_there(self) -> "Run":
        served, teacher = self.data.responses_server is not None, self.teacher
        plain = self.method.name == "sft" or (self.method.name == "seqkd" and served)
        scores = {
            f"method {self.method.name}": not plain,
            "validation.select=divergence": self.validation.select == "divergence",
        }
        writes = {
            "student.layers": self.student.layers is not None,
            "data.responses=teacher": self.data.responses == "teacher" and not served,
            f"method {self.method.name}": self.method.name in ("seqkd", "minillm", "distillm2") and not plain,
        }
        needs = [name for name, holds in (*scores.items(), *writes.items()) if holds]
        own = teacher is not None and teacher.adapter_off
        reads_more = [n for n in ("teacher_template", "teacher_system") if getattr(self.data, n) is not None]
        if reads_more and teacher is None and not (served and self.teacher_writes):
            raise ValueError(f"data.{reads_more[0]} is what a teacher reads, and there is no teacher")
        if reads_more and isinstance(self.method, MiniLlm) and self.method.teacher_mix > 0:
            raise ValueError(
                f"method.teacher_mix draws from student and teacher at the same prompt, and data.{reads_more[0]} "
                "gives the teacher another; set method.teacher_mix=0"
            )
        if self.train.shard and self.student.lora is not None:
            raise ValueError("train.shard spreads the weights that are trained, and an adapter's are few; leave it out")
        if own and (self.student.lora is None or self.student.layers is not None):
            raise ValueError("teacher.adapter_off needs student.lora, and a student of its own (path or config)")
        if teacher is not None and teacher.quantization is not None and self.student.layers is not None:
            raise ValueError("student.layers takes whole layers out of the teacher; leave teacher.quantization out")
        if teacher is not None and not needs and not (teacher.here or teacher.cached or teacher.server):
            raise ValueError("teacher.path is missing: give it, or leave the section teacher out")
        if needs and (teacher is None or not (teacher.here or teacher.cached or teacher.server)):
            raise ValueError(f"teacher.path is missing, and {needs[0]} needs a teacher")
        if teacher is not None and not teacher.here:
            name = "teacher.cached" if teacher.cached else "teacher.server"
            for reason, holds in writes.items():
                if holds and (teacher.cached or teacher.server):
                    raise ValueError(
                        f"{reason} needs the teacher itself (teacher.path), and with {name} it is not here"
                    )
        return self

    @model_validator(mode="after")
    def _teacher_elsewhere_can_score(self) -> "Run":
        teacher, method = self.teacher, self.method
        if teacher is None or not isinstance(method, Distillation):
            return self
        if teacher.cached is not None and method.sampling != "none":
            raise ValueError(
                f"method {method.name} (sampling {method.sampling}) trains on what the student writes, and "
                "teacher.cached has only rows that the teacher has read before: take kd, sampling=none, or a teacher "
                "that is here (teacher.path) or on a server (teacher.server)"
            )
        if teacher.server is not None and method.temperature != 1:
            raise ValueError(
                "teacher.server says the likeliest tokens and one bucket, which has no other temperature; leave "
                "method.temperature out"
            )
        if teacher.server is not None and method.top_k is not None and method.top_k > teacher.server.top_k:
            raise ValueError(f"method.top_k is {method.top_k}, and teacher.server.top_k only {teacher.server.top_k}")
        return self


_ORIGINS = ("student.path", "student.config", "student.layers")
RIVALS = {
    "train.steps": ("train.epochs",),
    "train.epochs": ("train.steps",),
    **{name: (*(other for other in _ORIGINS if other != name), "student.decoder_layers") for name in _ORIGINS},
}
"""What a setting stands in place of: one that is given on the command line takes its rivals out of the file."""


def load_run(source: str, overrides: Sequence[str] = ()) -> Run:
    """A ``Run`` from a YAML file or the name of a recipe, with ``key.path=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown or out of range.
    """
    return make_run(read_yaml(source), overrides, source)


def make_run(settings: dict[str, Any], overrides: Sequence[str] = (), source: str = "configuration") -> Run:
    """A ``Run`` from nested settings; errors name the key, what was given and what is allowed."""
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r} is not an override; write key.path=value, such as optim.lr=1e-4")
        method, given = settings.get("method"), _value(key, value)
        if key == "method.name" and isinstance(method, dict) and method.get("name", Distillm().name) != given:
            settings["method"] = {}  # one method's settings mean nothing to another
        _set(settings, key.split("."), given)
        for rival in RIVALS.get(key, ()) if given is not None else ():
            if not any(other.startswith(f"{rival}=") for other in overrides):
                _drop(settings, rival.split("."))
    if isinstance(method := settings.get("method"), dict):
        method.setdefault("name", Distillm().name)  # as where there is no such section at all
    try:
        check(settings)
        return Run.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, Run, source)) from None
    except ValueError as error:
        raise ConfigError(f"{source} cannot be used: {error}") from None


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(resources.files("distillm"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(source: str) -> dict[str, Any]:
    """The settings in a YAML file, a run folder, or a recipe."""
    path, known = Path(source), recipes()
    if is_dir(path):
        path = path / "run.yaml"
        # The demonstration's own folder does not hide the recipe of the same name.
        if not is_file(path) and source not in known:
            raise ConfigError(f"{source} is a folder without a run.yaml, so it holds no run; give a YAML file or a run")
    if not is_file(path):
        if source not in known:
            near = difflib.get_close_matches(source, [*known, *(str(p) for p in Path().glob("*.y*ml"))], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no file and no recipe {source}.{hint} `distillm recipes` lists the recipes.")
        path = known[source]
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not YAML
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings; `distillm recipes show demo` prints a working file")
    return typing.cast(dict[str, Any], settings)


def as_yaml(run: Run) -> str:
    """``run`` as YAML that ``load_run`` reads back, without what only steers one start of it."""
    settings = run.model_dump(mode="json", exclude={"resume", "overwrite"})
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)
    if load_yaml(text) != settings:  # a few signs, such as U+0085, are read as line ends
        text = yaml.safe_dump(settings, sort_keys=False, width=110)
    return text


def changed(saved: dict[str, Any], run: Run) -> list[str]:
    """The settings, by dotted name, in which ``run`` differs from the settings ``saved`` in a run folder."""
    now = run.model_dump(mode="json", exclude={"resume", "overwrite", "provenance"})
    old, new = flat({k: v for k, v in saved.items() if k != "provenance"}), flat(now)
    return [f"{key}={new.get(key)}" for key in old | new if old.get(key) != new.get(key)]


def _value(key: str, text: str) -> Any:
    try:
        value = load_yaml(text)
    except ValueError as error:
        if takes_text(Run, key):  # such as a template, which may look like broken YAML
            return text
        raise ConfigError(f"{key}={text}: the value is not YAML ({' '.join(str(error).split())})") from error
    meant = isinstance(value, str | None) or (isinstance(value, dict) and takes_section(Run, key))
    return text if not meant and takes_text(Run, key) else value


def _drop(settings: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        inner = settings.get(key)
        if not isinstance(inner, dict):
            return
        settings = typing.cast(dict[str, Any], inner)
    settings.pop(path[-1], None)


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = settings.get(key)
        if inner is None:
            inner = settings[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(path)}: {key} is not a section")
        settings = typing.cast(dict[str, Any], inner)
    settings[path[-1]] = value
