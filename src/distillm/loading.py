"""Both models of a ``Run``, checked and ready: where they come from, where they are, and how their heads are read."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import AdapterOff, add_adapter, base_of
from .client import Server, bearer_key, endpoint, require_httpx
from .config import Run
from .data_settings import CompletionsServer
from .errors import ConfigError, ModelError
from .heads import HeadReader, packing
from .kept_teacher import KeptTeacher
from .models import fingerprint, freeze, head_of, layout_of, load_model, load_tokenizer
from .processes import by_first, count
from .readers import LocalTeacher, Teacher
from .scoring import Pair
from .served_teacher import PATH, SETTING, WAYS, ServedTeacher
from .sharding import can_shard, shard
from .shrinking import shrink
from .types import Layout
from .vocabulary import end_ids, padded_note, shared_tokens

Note = Callable[[str], None]


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
        ConfigError: a setting does not fit a model, or a teacher elsewhere cannot score.
        ModelError: a model cannot be loaded, or the two do not share a tokenizer.
    """
    teacher, elsewhere, teacher_tokenizer = _load_teacher(run, accelerator, note)
    student = _load_student(run, accelerator, teacher, teacher_tokenizer)
    if run.teacher is not None and run.teacher.adapter_off:
        teacher = cast(PreTrainedModel, AdapterOff(student))
    tokenizer = _tokenizer(run.student, teacher_tokenizer)
    num_tokens = shared_tokens(tokenizer, teacher_tokenizer or tokenizer)
    sizes = {"student": _vocabulary(student)}
    if teacher is not None or elsewhere is not None:
        sizes["teacher"] = elsewhere.vocabulary if elsewhere is not None else _vocabulary(cast(Any, teacher))
    _check_vocabularies(sizes, num_tokens, note)
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
    if teacher is not None and run.teacher is not None and run.teacher.placement == "shard":
        _spread(teacher, accelerator, note)
    layout, scoring = layout_of(student, tokenizer), cast(Teacher | None, elsewhere)
    if run.teacher is not None and run.teacher.server is not None:
        scoring = _served(run, tokenizer, num_tokens, layout, note)
    if teacher is not None and read_teacher is not None:
        scoring = LocalTeacher(teacher, read_teacher, layout_of(teacher, tokenizer), accelerator.device)
    pair = Pair(
        student=_together(run, student, accelerator, note),
        read_student=read_student,
        teacher=scoring,
        num_tokens=num_tokens,
        layout=layout,
        device=accelerator.device,
    )
    ends = end_ids(student, tokenizer)
    if teacher is not None or elsewhere is not None:
        theirs = elsewhere.end_ids if elsewhere is not None else end_ids(teacher, tokenizer)
        ends = tuple(dict.fromkeys((*ends, *theirs)))
    return Models(tokenizer, student, teacher, pair, ends)


def _load_teacher(
    run: Run, accelerator: Accelerator, note: Note
) -> tuple[PreTrainedModel | None, KeptTeacher | None, PreTrainedTokenizerBase | None]:
    """The teacher's model or, where it is not here, what was kept of it; and its tokenizer."""
    given = run.teacher
    if given is None or given.adapter_off or given.server is not None:
        return None, None, None
    if given.cached is not None:
        kept = KeptTeacher(given.folder, given.cached, accelerator.device)
        return None, kept, kept.tokenizer
    if given.placement == "device" and count() > 1:
        raise ConfigError(
            f"teacher.placement=device hands the teacher out to all devices of a machine, and each of {count()} "
            "processes would; take teacher.placement=shard"
        )
    note(f"loading the teacher {given.path}")
    # What is to be spread is loaded into the CPU's memory, so that no device has to hold all of it.
    device = "cpu" if given.placement == "shard" else accelerator.device
    model = load_model(
        given.path,
        gguf_file=given.gguf_file,
        dtype=given.dtype,
        device=device,
        trust_remote_code=given.trust_remote_code,
        quantization=given.quantization,
        spread=given.placement == "device",
        max_memory=given.max_memory,
    )
    if given.attention is not None:
        _attend("teacher", model, given.attention)
    return freeze(model), None, _tokenizer(given, None)


def _load_student(
    run: Run, accelerator: Accelerator, teacher: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedModel:
    given = run.student
    if given.layers is not None:
        assert teacher is not None
        student = shrink(teacher, given.layers, decoder_layers=given.decoder_layers, dropout=given.dropout).to(
            accelerator.device, getattr(torch, given.dtype)
        )  # pyright: ignore[reportArgumentType]
    else:
        config = given.config
        if config is not None:
            own = tokenizer if tokenizer is not None and given.tokenizer is None else _tokenizer(given, None)
            ids = {"bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
            config = {"vocab_size": len(cast(Any, own)), **ids, **config}
        student = load_model(
            given.path,
            config=config,
            gguf_file=given.gguf_file,
            dtype=given.dtype,
            device=accelerator.device,
            dropout=given.dropout,
            seed=run.seed,
            trust_remote_code=given.trust_remote_code,
        )
    if given.attention is not None:
        _attend("student", student, given.attention)
    if run.train.gradient_checkpointing:
        # Transformers 5 renames it on the way.
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if given.lora is None:
        return student.requires_grad_(True)  # layers of a frozen teacher too
    path = given.path or ""
    if not given.lora.merge and (given.gguf_file or path.endswith(".gguf") or base_of(Path(path)) is not None):
        raise ConfigError(
            f"student.lora.merge=false saves the adapter beside its base, and {path} is a GGUF file or an "
            "adapter itself, which others cannot load as a base; leave merge out"
        )
    return add_adapter(student, **given.lora.model_dump(exclude={"merge"}), seed=run.seed)


def _check_vocabularies(sizes: dict[str, int], num_tokens: int, note: Note) -> None:
    for name, size in sizes.items():
        if size < num_tokens:
            raise ModelError(
                f"the {name} has {size} embeddings, fewer than the {num_tokens} tokens of its tokenizer: use the "
                "tokenizer it was made with, or give a model built from a config at least that vocab_size"
            )
    if "teacher" in sizes:
        said = padded_note(sizes["student"], sizes["teacher"], num_tokens)
        if said:
            note(said)


def _served(run: Run, tokenizer: PreTrainedTokenizerBase, num_tokens: int, layout: Layout, note: Note) -> ServedTeacher:
    """The teacher on a server, once it is known how that is asked."""
    assert run.teacher is not None
    given = run.teacher.server
    assert given is not None
    if layout.start:
        raise ConfigError(f"{SETTING} scores the tokens of causal models, and the student is an encoder-decoder")
    server = connected(SETTING, PATH, given, note)
    teacher = ServedTeacher(server, given.model, given.top_k, tokenizer, num_tokens, layout, given.body)
    way = by_first(teacher.probe)
    teacher.way = next(each for each in WAYS if each.name == way)
    note(f"the teacher is {given.model} at {given.url}: its {given.top_k} likeliest tokens, asked for by {way}")
    return teacher


def connected(setting: str, path: str, given: CompletionsServer, note: Note) -> Server:
    """The server of a setting; what is wrong with it is said before any work.

    Raises:
        ConfigError: its address or the key is malformed, or httpx is not installed.
    """
    require_httpx(setting, "server")
    endpoint(given.url, path, f"{setting}.url")
    key = None if given.key_env is None else bearer_key(given.key_env)
    server = Server(given.url, key, given.jobs, given.timeout, given.attempts)
    if key is not None:
        note(f"the key in {given.key_env} goes to {given.url}{', without encryption' if server.exposed else ''}")
    return server


def _spread(teacher: PreTrainedModel, accelerator: Accelerator, note: Note) -> None:
    if can_shard():
        shard(teacher, accelerator.device)
    else:
        note("teacher.placement=shard: there is one process, started without a launcher; the teacher is whole")
        teacher.to(accelerator.device)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _together(run: Run, student: PreTrainedModel, accelerator: Accelerator, note: Note) -> torch.nn.Module:
    """The student for training by all processes: its gradients are averaged, or its weights spread.

    Not by ``prepare_model``, which would put autocast around generation and validation, too.
    """
    if run.train.shard:
        if can_shard():
            return shard(student, accelerator.device, offload=run.train.cpu_offload)
        note("train.shard: there is one process, started without a launcher, and nothing to spread weights over")
    if count() == 1:
        return student
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # Buffers are constants here, and processes do not run their models equally often.
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    options["find_unused_parameters"] = _leaves_out(student)
    return DistributedDataParallel(student, devices, **options)


def _leaves_out(student: PreTrainedModel) -> bool:
    """Whether a step may leave some weights without a gradient: layers that are dropped at random, positions that are
    computed once and for all."""
    drops = [value for name, value in student.config.to_dict().items() if name.endswith("layerdrop")]
    fixed = any("SinusoidalPositional" in type(module).__name__ for module in student.modules())
    return fixed or any(drops)


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
