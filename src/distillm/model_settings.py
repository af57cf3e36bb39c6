"""The settings of the models: the student, and where what the teacher says comes from. Never imports torch."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .data_settings import CompletionsServer
from .method_settings import Fraction, NonNegativeInt, Number, PositiveFloat, PositiveInt, Section

Decay = Annotated[float, Field(ge=0, lt=1), Number]
Dtype = Literal["float32", "bfloat16", "float16"]


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


def default_folder() -> Path:
    """Where a teacher's states are kept on disk unless a run says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distillm" / "teacher"


class TeacherServer(CompletionsServer):
    """A server that runs the teacher and scores given tokens: vLLM, or completions with echo and logprobs. Its model
    has the student's tokenizer."""

    top_k: PositiveInt = 20
    """How many of the likeliest tokens it says of each place; all others are one bucket of the divergence."""
    jobs: PositiveInt = 16
    """Rows asked about at a time: by `distillm cache warm` so many, in training those of a micro-batch at most."""

    @model_validator(mode="after")
    def _asks_what_is_read(self) -> "TeacherServer":
        fixed = {"model", "prompt", "stream", "n", "best_of", "echo", "logprobs", "prompt_logprobs", "max_tokens"}
        for name in self.body:
            if name in fixed:
                raise ValueError(f"body: {name} cannot be set there")
        return self

    @property
    def name(self) -> str:
        """All that its answers depend on beside the tokens; names of models mean something to a server alone."""
        return (
            f"{self.model} at {self.url}, the {self.top_k} likeliest tokens{f', with {self.body}' if self.body else ''}"
        )


class Teacher(Model):
    """The model that is imitated: its folder or name, or where else what it says comes from."""

    quantization: Literal["8bit", "4bit"] | None = None
    """Load its linear layers with so many bits (bitsandbytes); its output layer stays as it is."""
    placement: Literal["replicate", "shard", "device"] = "replicate"
    """Where its weights are. replicate: on the device of each process. shard: spread over the processes (FSDP2).
    device: layer after layer on the GPUs of this machine, then in the CPU's memory, then on disk, as they fit."""
    max_memory: dict[str, str] | None = None
    """For placement device: how much of each may be used, such as {"0": 20GiB, cpu: 60GiB}."""
    cached: str | None = None
    """Without the model: the name that `distillm cache` shows of what was kept of it, in `cache_folder`. For methods on
    fixed data, every row of which must be there; `path`, and how that would be loaded, are then not read."""
    server: TeacherServer | None = None
    """Without the model: a server that scores given tokens."""
    adapter_off: bool = False
    """Self-distillation: the student without its adapter is the teacher. It may read more than the student does, see
    data.teacher_system and data.teacher_template."""
    cache: Annotated[
        Literal["auto", "off", "memory", "disk"],
        BeforeValidator(lambda given: "off" if given is False else given),  # YAML reads a bare off as false
    ] = "auto"
    """Where its last hidden states are kept, so that it reads no row twice in training. disk is shared by all runs with
    this teacher; auto takes memory where they fit in it, else disk, and keeps no row that the run reads but once.
    What it takes is decided as a run begins."""
    cache_folder: str | None = None
    """Where disk keeps them: ~/.cache/distillm/teacher unless set."""
    cache_gib: PositiveFloat = 20.0
    """The most that the folder may hold, of all teachers together, in GiB; what was used longest ago goes first. What
    `distillm cache warm` kept for runs without the teacher stays."""
    cache_batch_size: PositiveInt | None = None
    """Rows read at a time to be kept. With 1 a row's states do not depend on other rows in their last bits; unset is 1
    on a CPU, where batches save little, and 32 elsewhere."""

    @property
    def folder(self) -> Path:
        """Where disk keeps its states."""
        return Path(self.cache_folder) if self.cache_folder else default_folder()

    @property
    def here(self) -> bool:
        """Whether the model itself is loaded, so that it can write and not only score."""
        return self.adapter_off or (self.path is not None and self.cached is None and self.server is None)

    @model_validator(mode="after")
    def _one_origin(self) -> "Teacher":
        if self.adapter_off and self.path is not None:
            raise ValueError("give path or adapter_off, not both: with adapter_off the student is the teacher")
        if self.server is not None and (self.path is not None or self.cached is not None):
            raise ValueError("give path, cached or server: where the teacher is")
        if self.adapter_off and (self.server is not None or self.cached is not None):
            raise ValueError("with adapter_off the student is the teacher; leave server and cached out")
        of_a_model = ("gguf_file", "tokenizer", "dtype", "attention", "trust_remote_code")
        of_a_teacher = ("quantization", "placement", "max_memory")
        changed = [n for n in of_a_model if getattr(self, n) != getattr(Model(), n)]
        changed += [n for n in of_a_teacher if getattr(self, n) not in (None, "replicate")]
        for name, why in (("adapter_off", "the student is the teacher"), ("server", "the server has the model")):
            if getattr(self, name) and changed:
                raise ValueError(f"with {name} {why}: {changed[0]} says nothing; leave it out")
        if self.cached is not None and not re.fullmatch(r"[0-9a-f]{16}", self.cached):
            raise ValueError(
                f"cached is a name that `distillm cache` shows, 16 digits and letters, not {self.cached!r}"
            )
        if self.max_memory is not None and self.placement != "device":
            raise ValueError("max_memory goes with placement=device")
        if self.quantization is not None and self.placement == "shard":
            raise ValueError("a quantized teacher cannot be spread over processes; use placement=device or replicate")
        if self.quantization is not None and (self.gguf_file or (self.path or "").endswith(".gguf")):
            raise ValueError("a GGUF file has its own quantization; leave quantization out")
        if self.cached is not None and self.cache not in ("auto", "disk"):
            raise ValueError(f"cached is what is kept on disk, and cache={self.cache} looks elsewhere; leave cache out")
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
