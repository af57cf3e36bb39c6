"""A ``Run`` becomes objects: models, method, optimizer."""

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import methods, sources
from .adapters import AdapterOff, add_adapter, base_of
from .config import Run
from .errors import ConfigError, ModelError
from .generation import Mixture, Sampling, generate
from .heads import HeadReader, packing
from .method_settings import Distillation, Distillm2, MiniLlm
from .methods import Context, Method
from .models import fingerprint, freeze, head_of, layout_of, load_model, load_tokenizer, shrink
from .processes import count, rank
from .scoring import Pair
from .sources import ReplayBuffer
from .train import parameter_groups
from .types import Example, State
from .vocabulary import end_ids, padded_note, shared_tokens

Note = Callable[[str], None]
Phase = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""A piece of work by name and size; what it gives is told the units done."""


@dataclass
class Models:
    """Both models, the tokenizer they share, and what reading and generating with them needs."""

    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    pair: Pair
    end_ids: tuple[int, ...]

    @cached_property
    def teacher_weights(self) -> str:
        """The fingerprint of the teacher, whose every weight is read once for it; empty where there is none."""
        return "" if self.teacher is None else fingerprint(self.teacher)


def load_models(run: Run, accelerator: Accelerator, note: Note) -> Models:
    """Load and check the student and, where the run has one, the teacher.

    Raises:
        ModelError: a model cannot be loaded, or the two do not share a tokenizer.
    """
    teacher, teacher_tokenizer = None, None
    if run.teacher is not None and not run.teacher.adapter_off:
        note(f"loading the teacher {run.teacher.path}")
        teacher = freeze(_load(run.teacher, accelerator, run.seed))
        teacher_tokenizer = _tokenizer(run.teacher, None)
    given = run.student
    if given.layers is not None:
        assert teacher is not None
        student = shrink(teacher, given.layers, decoder_layers=given.decoder_layers, dropout=given.dropout).to(
            getattr(torch, given.dtype)
        )  # pyright: ignore[reportArgumentType]
    else:
        student = _load(given, accelerator, run.seed, teacher_tokenizer)
    for name, model, wanted in (("teacher", teacher, run.teacher), ("student", student, given)):
        if model is not None and wanted is not None and wanted.attention is not None:
            _attend(name, model, wanted.attention)
    if given.lora is not None:
        path = given.path or ""
        if not given.lora.merge and (given.gguf_file or path.endswith(".gguf") or base_of(Path(path)) is not None):
            raise ConfigError(
                f"student.lora.merge=false saves the adapter beside its base, and {path} is a GGUF file or an "
                "adapter itself, which others cannot load as a base; leave merge out"
            )
        student = add_adapter(student, **given.lora.model_dump(exclude={"merge"}), seed=run.seed)
    if run.teacher is not None and run.teacher.adapter_off:
        teacher = cast(PreTrainedModel, AdapterOff(student))
    tokenizer = _tokenizer(given, teacher_tokenizer)
    num_tokens = shared_tokens(tokenizer, teacher_tokenizer or tokenizer)
    for name, model in (("student", student), ("teacher", teacher)):
        size = num_tokens if model is None else _vocabulary(model)
        if size < num_tokens:
            raise ModelError(f"the {name} has {size} embeddings, fewer than the {num_tokens} tokens of its tokenizer")
    if teacher is not None:
        said = padded_note(_vocabulary(student), _vocabulary(teacher), num_tokens)
        if said:
            note(said)
    if run.train.gradient_checkpointing:
        # Transformers 5 renames it on the way.
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if given.lora is None:
        student.requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_student, read_teacher = head_of(student), None if teacher is None else head_of(teacher)
    for warning in caught:
        note(str(warning.message))
    if run.train.packing:
        read_student = packing(read_student)
        read_teacher = None if read_teacher is None else _packing(read_teacher, note)
    if run.train.compile:
        _compile_layers(student)
    pair = Pair(
        student=student if count() == 1 else _averaged(student, accelerator),
        teacher=teacher,
        read_student=read_student,
        read_teacher=read_teacher,
        num_tokens=num_tokens,
        layout=layout_of(student, tokenizer),
        device=accelerator.device,
        teacher_layout=None if teacher is None else layout_of(teacher, tokenizer),
    )
    ends = end_ids(student, tokenizer)
    if teacher is not None:
        ends = tuple(dict.fromkeys((*ends, *end_ids(teacher, tokenizer))))
    return Models(tokenizer, student, teacher, pair, ends)


def make_buffer(run: Run, num_prompts: int) -> ReplayBuffer:
    """As large as the run's method needs; DistiLLM-2 keeps an epoch's responses, two for each prompt."""
    if isinstance(run.method, Distillm2):
        return ReplayBuffer(2 * num_prompts)
    replays = isinstance(run.method, Distillation | MiniLlm) and run.method.replays
    return ReplayBuffer(run.method.capacity if isinstance(run.method, Distillation | MiniLlm) and replays else 1)


def make_method(
    run: Run,
    models: Models,
    train: Sequence[Example],
    text: Sequence[Example],
    buffer: ReplayBuffer,
    phase: Phase | None = None,
) -> Method:
    """The run's method over ``train``, with the language-model loss on ``text`` where there is any.

    ``phase`` shows the progress of writing more than a step's responses at once.
    """
    sampling = make_sampling(run)

    def write(
        prompts: Sequence[Example],
        state: State,
        *,
        writer: Literal["student", "teacher"] = "student",
        steps: Sequence[int] | None = None,
        teacher_mix: float = 0.0,
        keep_log_probs: bool = False,
    ) -> list[Example]:
        model = models.student if writer == "student" else models.teacher
        assert model is not None
        mixture = None
        if teacher_mix:
            assert models.teacher is not None
            mixture = Mixture(models.teacher, teacher_mix)
        bulk = phase is not None and len(prompts) > run.train.batch_size
        with phase(f"{writer}'s responses", len(prompts)) if bulk and phase else nullcontext() as advance:
            return generate(
                model,
                prompts,
                sampling,
                layout=models.pair.layout_for(writer),
                end_ids=models.end_ids,
                num_tokens=models.pair.num_tokens,
                seed=run.seed,
                step=state.step,
                steps=steps,
                origin=writer,
                batch_size=run.generation.batch_size,
                progress=advance,
                mixture=mixture,
                keep_log_probs=keep_log_probs,
            )

    data = sources.dataset(train, run.train.batch_size, run.seed, run.train.length_bucket)
    left_out = {"name", "capacity", "trigger"}
    settings = run.method.model_dump(exclude=left_out, exclude_none=not isinstance(run.method, MiniLlm))
    per_epoch = sources.steps_per_epoch(len(train), run.train.batch_size)
    context = Context(data, per_epoch, write, buffer, run.seed, models.end_ids)
    method = methods.METHODS[run.method.name](context, **settings)
    if not text:
        return method
    return methods.with_text(method, sources.dataset(text, run.train.batch_size, run.seed + 1), run.data.text_weight)


def make_sampling(run: Run, temperature: float | None = None) -> Sampling:
    """The run's decoding settings."""
    given = run.generation.model_dump(exclude={"batch_size"})
    return Sampling(**cast(dict[str, Any], given | ({} if temperature is None else {"temperature": temperature})))


def make_optimizer(run: Run, student: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW; the learning rate is set at each step."""
    groups = parameter_groups(student, run.optim.weight_decay)
    # One pass over the weights: on two cores 0.07 s instead of 0.50 s for 57 M of them (docs/log.md).
    return torch.optim.AdamW(groups, lr=run.optim.lr, betas=run.optim.betas, eps=run.optim.eps, fused=True)


def make_accelerator(run: Run, *, several: bool = False) -> Accelerator:
    """The device, precision and tracker of a run, and the processes that share it; seeds the global generators
    (dropout), every process's differently.

    Raises:
        ConfigError: the device or its bfloat16 is not there, or the tracker is not installed; this is one of several
            processes, and the work is not for ``several``.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here; use device=auto or device=cpu")
    if run.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps, but torch sees no Apple GPU here; use device=auto or device=cpu")
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and not several:
        raise ConfigError(
            f"this was started as one of {processes} processes, and only distillm train shares its work between them; "
            "start it as one process"
        )
    if processes != "1" and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE says that this is one of {processes} processes, and MASTER_ADDR does not say where they meet: "
            "start them by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    if run.tracker != "none" and importlib.util.find_spec(run.tracker) is None:
        raise ConfigError(f"tracker={run.tracker}, but it is not installed: pip install {run.tracker}")
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    mixed = run.train.mixed_precision != "none"
    try:
        accelerator = Accelerator(
            cpu=run.device == "cpu",
            mixed_precision=run.train.mixed_precision if mixed else "no",
            log_with=None if run.tracker == "none" else run.tracker,
            project_dir=run.output,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=run.train.timeout_minutes))],
        )
    except ValueError as error:
        if not mixed:
            raise
        said = f"train.mixed_precision={run.train.mixed_precision}, which this device does not have ({error})"
        raise ConfigError(f"{said}; use train.mixed_precision=none") from error
    set_seed(run.seed + rank())
    return accelerator


def _averaged(student: PreTrainedModel, accelerator: Accelerator) -> DistributedDataParallel:
    """The student for training: its gradients are averaged over the processes.

    Not by ``prepare_model``, which would put autocast around generation and validation, too.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # Buffers are constants here, and processes do not run their models equally often.
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(student, devices, **options)


def _load(given: Any, accelerator: Accelerator, seed: int, tokenizer: Any = None) -> PreTrainedModel:
    config = getattr(given, "config", None)
    if config is not None and tokenizer is None:
        tokenizer = _tokenizer(given, None)
    if config is not None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = {"vocab_size": len(tokenizer), **ids, "pad_token_id": tokenizer.pad_token_id, **config}
    return load_model(
        given.path,
        config=config,
        gguf_file=given.gguf_file,
        dtype=given.dtype,
        device=accelerator.device,
        dropout=getattr(given, "dropout", None),
        seed=seed,
        trust_remote_code=given.trust_remote_code,
    )


def _tokenizer(given: Any, other: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    source = given.tokenizer or given.path
    if source is None:
        if other is None:
            raise ConfigError("student.tokenizer is missing: a student built from a configuration needs one")
        return other
    gguf = given.gguf_file if source == given.path else None
    return load_tokenizer(source, gguf_file=gguf, trust_remote_code=given.trust_remote_code)


def _vocabulary(model: PreTrainedModel) -> int:
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def _attend(name: str, model: PreTrainedModel, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        said = f"{name}.attention={attention} is not to be had here: {str(error).splitlines()[0]}"
        raise ModelError(f"{said}\nLeave it out for what transformers takes by itself") from error


def _packing(teacher: HeadReader, note: Note) -> HeadReader:
    if isinstance(teacher.model, AdapterOff):  # the student's own model, which has been found to keep rows apart
        return replace(teacher, packed=True)
    try:
        return packing(teacher)
    except ModelError as error:
        note(f"train.packing: the teacher's rows stay padded. {error}")
        return teacher


def _compile_layers(model: Any) -> None:
    """Let torch compile the layers in place when they first run, for rows of any length; the head stays as it is."""
    for part in (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else (model.base_model,):
        part.compile(dynamic=True)
