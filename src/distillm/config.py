"""``Run``: the one validated configuration, from YAML and dotted overrides. Never imports torch."""

import difflib
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from .data_settings import Data
from .errors import ConfigError
from .explain import explain, flat, takes_section, takes_text
from .method_settings import (
    Distillation,
    Distillm,
    DivergenceName,
    Fraction,
    Method,
    MiniLlm,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
)

Decay = Annotated[float, Field(ge=0, lt=1), Number]
Dtype = Literal["float32", "bfloat16", "float16"]
Overlap = Literal["rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "chrf", "ter"]
MetricName = Literal[Overlap, "exact_match", "distinct_1", "distinct_2", "repetition", "length_ratio"]


class Model(Section):
    """A language model: causal, or an encoder-decoder."""

    path: str | None = None
    """A model folder, a hub name, or a GGUF file."""
    gguf_file: str | None = None
    """The GGUF file inside `path`."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    dtype: Dtype = "float32"
    """The type of the weights."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """How attention is computed; transformers' choice unless set."""
    trust_remote_code: bool = False
    """Let the model folder run its own Python code. Only for authors you trust."""


class Lora(Section):
    """A low-rank adapter: all that is trained."""

    r: PositiveInt = 16
    """Its rank."""
    alpha: PositiveFloat = 32
    """Its scale: what it adds is multiplied by alpha / r."""
    dropout: Decay = 0.0
    """Dropout before it, in training."""
    targets: list[str] | None = None
    """The linear layers that get one, by the last part of their names; all but the output layer unless set."""
    merge: bool = True
    """Save the student with its adapter merged into the weights; false saves the adapter alone, beside its base."""


class Teacher(Model):
    """The model that is imitated."""

    adapter_off: bool = False
    """Self-distillation: the student without its adapter is the teacher. It may read more than the student does, see
    data.teacher_system and data.teacher_template."""
    cache: Annotated[
        Literal["auto", "off", "memory", "disk"],
        BeforeValidator(lambda given: "off" if given is False else given),  # YAML reads a bare off as false
    ] = "auto"
    """Where its last hidden states are kept, so that it reads no row twice in training. disk is shared by all runs with
    this teacher; auto takes memory where they fit in it, else disk, and keeps no row that the run reads but once."""
    cache_folder: str | None = None
    """Where disk keeps them: ~/.cache/distillm/teacher unless set."""
    cache_gib: PositiveFloat = 20.0
    """The most that the folder may hold, of all teachers together, in GiB; what was used longest ago goes first."""
    cache_batch_size: PositiveInt | None = None
    """Rows read at a time to be kept. With 1 a row's states do not depend on other rows in their last bits; unset is 1
    on a CPU, where batches save little, and 32 elsewhere."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Teacher":
        if self.adapter_off and self.path is not None:
            raise ValueError("give path or adapter_off, not both: with adapter_off the student is the teacher")
        changed = [
            n
            for n in ("gguf_file", "tokenizer", "dtype", "attention", "trust_remote_code")
            if getattr(self, n) != getattr(Model(), n)
        ]
        if self.adapter_off and changed:
            raise ValueError(f"with adapter_off the student is the teacher: {changed[0]} says nothing; leave it out")
        return self


class Student(Model):
    """The model that is trained: exactly one of `path`, `config` and `layers`."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # pyright: ignore[reportIncompatibleVariableOverride]
    """The type of the weights. float32 with train.mixed_precision is the safe choice; float16 cannot hold AdamW's
    averages of small gradients."""
    config: dict[str, Any] | None = None
    """A transformers configuration to build the student from, such as {model_type: llama, hidden_size: 256}."""
    layers: PositiveInt | list[NonNegativeInt] | None = None
    """Initialise the student with so many of the teacher's layers, evenly spaced, or with these ones."""
    decoder_layers: PositiveInt | list[NonNegativeInt] | None = None
    """Of an encoder-decoder, the decoder's, where they are others than the encoder's."""
    dropout: Fraction | None = None
    """Every dropout of the model; unset leaves the model's own."""
    lora: Lora | None = None
    """Train a low-rank adapter in place of the weights; {} takes its defaults."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        given = [name for name in ("path", "config", "layers") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of path, config and layers (found {found})")
        if self.gguf_file is not None and self.path is None:
            raise ValueError(f"gguf_file is a file inside path, and {given[0]} is given instead; leave gguf_file out")
        if self.decoder_layers is not None and self.layers is None:
            raise ValueError("decoder_layers goes with layers (the encoder's)")
        if self.lora is not None and not self.lora.merge and self.path is None:
            raise ValueError(f"lora.merge=false needs a base that others can load, and {given[0]} is none; merge it")
        if self.trust_remote_code and self.layers is not None and self.tokenizer is None:
            raise ValueError("with layers no code but the teacher's runs; give teacher.trust_remote_code instead")
        return self


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
    timeout_minutes: PositiveFloat = 120.0
    """Of several processes: how long one waits for the others before the run ends with an error. The others wait while
    the first one saves, or asks a server."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
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
        if isinstance(method, Distillation | MiniLlm) and method.replays and method.capacity < self.train.batch_size:
            raise ValueError(
                f"method.capacity ({method.capacity}) must be at least train.batch_size "
                f"({self.train.batch_size}): a student step draws a whole batch from the replay buffer"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_there(self) -> "Run":
        served = self.data.responses_server is not None
        plain = self.method.name == "sft" or (self.method.name == "seqkd" and served)
        reasons = {
            f"method {self.method.name}": not plain,
            "student.layers": self.student.layers is not None,
            "data.responses=teacher": self.data.responses == "teacher" and not served,
            "validation.select=divergence": self.validation.select == "divergence",
        }
        needs = [name for name, holds in reasons.items() if holds]
        own = self.teacher is not None and self.teacher.adapter_off
        reads_more = [n for n in ("teacher_template", "teacher_system") if getattr(self.data, n) is not None]
        if reads_more and self.teacher is None and not (served and self.teacher_writes):
            raise ValueError(f"data.{reads_more[0]} is what a teacher reads, and there is no teacher")
        if reads_more and isinstance(self.method, MiniLlm) and self.method.teacher_mix > 0:
            raise ValueError(
                f"method.teacher_mix draws from student and teacher at the same prompt, and data.{reads_more[0]} "
                "gives the teacher another; set method.teacher_mix=0"
            )
        if own and (self.student.lora is None or self.student.layers is not None):
            raise ValueError("teacher.adapter_off needs student.lora, and a student of its own (path or config)")
        if needs and not own and (self.teacher is None or self.teacher.path is None):
            raise ValueError(f"teacher.path is missing, and {needs[0]} needs a teacher")
        return self


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
    if isinstance(method := settings.get("method"), dict):
        method.setdefault("name", Distillm().name)  # as where there is no such section at all
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, Run, source)) from None


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(resources.files("distillm"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(source: str) -> dict[str, Any]:
    """The settings in a YAML file, a run folder, or a recipe."""
    path, known = Path(source), recipes()
    if path.is_dir():
        path = path / "run.yaml"
        # The demonstration's own folder does not hide the recipe of the same name.
        if not path.is_file() and source not in known:
            raise ConfigError(f"{source} is a folder without a run.yaml, so it holds no run; give a YAML file or a run")
    if not path.is_file():
        if source not in known:
            near = difflib.get_close_matches(source, [*known, *(str(p) for p in Path().glob("*.y*ml"))], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no file and no recipe {source}.{hint} `distillm recipes` lists the recipes.")
        path = known[source]
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that there is not
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
    if yaml.safe_load(text) != settings:  # a few signs, such as U+0085, are read as line ends
        text = yaml.safe_dump(settings, sort_keys=False, width=110)
    return text


def changed(saved: dict[str, Any], run: Run) -> list[str]:
    """The settings, by dotted name, in which ``run`` differs from the settings ``saved`` in a run folder."""
    now = run.model_dump(mode="json", exclude={"resume", "overwrite", "provenance"})
    old, new = flat({k: v for k, v in saved.items() if k != "provenance"}), flat(now)
    return [f"{key}={new.get(key)}" for key in old | new if old.get(key) != new.get(key)]


def _value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        if takes_text(Run, key):  # such as a template, which may look like broken YAML
            return text
        raise ConfigError(f"{key}={text}: the value is not YAML ({' '.join(str(error).split())})") from error
    meant = isinstance(value, str | None) or (isinstance(value, dict) and takes_section(Run, key))
    return text if not meant and takes_text(Run, key) else value


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = settings.get(key)
        if inner is None:
            inner = settings[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(path)}: {key} is not a section")
        settings = typing.cast(dict[str, Any], inner)
    settings[path[-1]] = value
