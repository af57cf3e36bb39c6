"""A ``Run`` becomes objects: models, method, optimizer."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers import PreTrainedModel

from . import methods, sources
from .config import Run
from .errors import ConfigError
from .generation import Mixture, Sampling, generate
from .loading import Models
from .method_settings import MiniLlm
from .methods import Context, Method
from .processes import count, rank
from .sources import ReplayBuffer
from .train import parameter_groups
from .types import Example, State

Phase = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""A piece of work by name and size; what it gives is told the units done."""


def make_buffer(run: Run, num_prompts: int) -> ReplayBuffer:
    """As large as the run's method needs."""
    return ReplayBuffer(run.method.buffer_rows(num_prompts, count()))


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

    Raises:
        ConfigError: student and teacher cannot be drawn from together.
    """
    pair, mixes = models.pair, isinstance(run.method, MiniLlm) and run.method.teacher_mix > 0
    if mixes and pair.layout_for("teacher").start != pair.layout.start:
        raise ConfigError(
            "method.teacher_mix draws from student and teacher at the same tokens, and their decoders start with "
            "different ones; set method.teacher_mix=0"
        )
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
    left_out = {"name", "capacity", "capacity_per_process", "trigger"}
    settings = run.method.model_dump(exclude=left_out, exclude_none=not isinstance(run.method, MiniLlm))
    per_epoch = sources.steps_per_epoch(len(train), run.train.batch_size)
    context = Context(data, per_epoch, write, buffer, run.seed, models.end_ids, models.pair.num_tokens)
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
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            raise ConfigError(
                f"accelerate is configured to use {engine}, whose settings are not read here. Choose none of it in "
                "accelerate config; train.shard=true spreads the student, teacher.placement=shard the teacher"
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
            kwargs_handlers=[_group(run)],
        )
    except ValueError as error:
        if not mixed:
            raise
        said = f"train.mixed_precision={run.train.mixed_precision}, which this device does not have ({error})"
        raise ConfigError(f"{said}; use train.mixed_precision=none") from error
    set_seed(run.seed + rank())
    return accelerator


def _group(run: Run) -> InitProcessGroupKwargs:
    """How the processes of a run speak: what is kept in the CPU's memory is summed there, too."""
    timeout = timedelta(minutes=run.train.timeout_minutes)
    if run.train.cpu_offload and run.device != "cpu" and torch.cuda.is_available():
        return InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", timeout=timeout)
    return InitProcessGroupKwargs(timeout=timeout)
