"""Models: loading and building them, reading their ``Head``, and making a student out of a teacher's layers."""

import copy
import difflib
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .adapters import base_of, with_saved_adapter
from .data.tokenize import around
from .errors import ConfigError, DistillmError, ModelError
from .heads import HeadReader, head_of
from .paths import home, is_dir, is_file
from .trust import refuse_kernels, refuse_pickles
from .types import Layout

__all__ = [
    "HeadReader",
    "best_device",
    "freeze",
    "head_of",
    "layout_of",
    "load_model",
    "load_tokenizer",
    "num_parameters",
    "shrink",
]

Model = TypeVar("Model", bound=nn.Module)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece*")
_DROPOUT = re.compile(
    r"^(?!classifier|summary|moe_token|adaptor|speech|t2u|var_pred).*(dropout(_prob|_rate|_p)?|pdrop)$"
)
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
# Understood by transformers though no default configuration lists them.
_UNLISTED = {
    *("rope_theta", "rope_scaling", "attn_implementation", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
}


def best_device() -> str:
    """The fastest kind of device here: ``cuda``, else ``mps``, else ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def num_parameters(model: nn.Module) -> int:
    """How many numbers ``model`` learns or holds frozen; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def freeze(model: Model) -> Model:
    """Put ``model`` in eval mode, ask for no gradients, and return it."""
    return model.eval().requires_grad_(False)


def layout_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """How ``model`` is fed: one sequence, or an encoder's input and, after the decoder's first tokens, a response.

    Those are its start token and, where it has one, the token that it is made to write first (BART's BOS, a language's
    code). Raises ModelError where an encoder-decoder names no start token.
    """
    pad_id: Any = tokenizer.pad_token_id
    if not model.config.is_encoder_decoder:
        return Layout(pad_id)

    def named(name: str) -> int | None:
        return next(
            (i for c in (model.generation_config, model.config) if (i := getattr(c, name, None)) is not None), None
        )

    start = named("decoder_start_token_id")
    if start is None:
        raise ModelError(
            f"{type(model).__name__} names no token that its decoder starts with; give decoder_start_token_id in its "
            "config.json, or in student.config"
        )
    forced = named("forced_bos_token_id")
    return Layout(pad_id, (start,) if forced is None else (start, forced), tuple(around(tokenizer)[1]))


# ---------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(
    path: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a hub name or a GGUF file.

    Without a padding token of its own it pads with its end token: masks come from lengths, so the two never mix, and
    no embedding is added. Raises ModelError where there is no tokenizer.
    """
    source, gguf_file = _locate(path, gguf_file)
    if gguf_file is None and is_dir(source) and not any(any(source.glob(name)) for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{source} holds no tokenizer: copy tokenizer.json and tokenizer_config.json there from the model it came "
            "from, name another folder as its tokenizer, or train one with `distillm tokenizer`"
        )
    with _explained(f"the tokenizer of {path}"), _quiet(source, gguf_file):
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        tokenizer = AutoTokenizer.from_pretrained(source.as_posix(), trust_remote_code=trust_remote_code, **extra)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f'the tokenizer of {path} has neither a padding nor an end token: add "eos_token" (the token that ends '
                "a response) to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str | Path | None,
    *,
    config: Mapping[str, Any] | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    dropout: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers language model, in eval mode: from a folder, a hub name or a GGUF file, or built from ``config``.

    The folder of a LoRA adapter gives its base with the adapter merged into it.

    ``config`` is a dictionary such as ``{"model_type": "llama", "hidden_size": 64}``; its weights are drawn from
    ``seed`` alone, without touching the global generators. ``dtype`` is a name such as ``float32`` or ``auto`` (as
    saved); ``device`` None is ``best_device()``. ``dropout`` sets every dropout probability of the model; None leaves
    them. Pickled weights and a repository's own code are read only with ``trust_remote_code``. Raises ModelError,
    or ConfigError for a bad setting.
    """
    if (path is None) == (config is None):
        raise ConfigError("a model needs either a path or a config (to build it from), and not both")
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, but must be one of {', '.join(_DTYPES)}")
    place = _device(device)
    if path is None:
        assert config is not None
        model = _build(config, dtype, dropout, seed, trust_remote_code)
    else:
        model = _load(path, gguf_file, dtype, dropout, trust_remote_code)
    return model.to(place).eval()  # pyright: ignore[reportArgumentType] (its decorator hides nn.Module.to)


def _load(
    path: str | Path, gguf_file: str | None, dtype: str | torch.dtype, dropout: float | None, trusted: bool
) -> PreTrainedModel:
    source, gguf_file = _locate(path, gguf_file)
    base = base_of(source)
    if base is not None:
        if not trusted:
            refuse_pickles(source)
        with _explained(f"the adapter {path}"):
            model = _load(base, None, dtype, dropout, trusted)
            return with_saved_adapter(model, source)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _explained(f"the model {path}"), _quiet(source, gguf_file):
        config = AutoConfig.from_pretrained(source.as_posix(), trust_remote_code=trusted, **extra)
        if not trusted:
            refuse_kernels(config, source)
        _set_dropout(config, dropout)
        if gguf_file is not None:
            extra |= _dequantized()
        elif not trusted:
            refuse_pickles(source)
            extra["use_safetensors"] = True
        model, report = _auto_class(config).from_pretrained(
            source.as_posix(),
            config=config,
            dtype=dtype,
            trust_remote_code=trusted,
            output_loading_info=True,
            **extra,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights of {path} lack {len(missing)} tensors of {type(model).__name__} (the first is {missing[0]}): "
            "it is not a complete language model; give the folder of one that is"
        )
    return model


def _build(
    settings: Mapping[str, Any], dtype: str | torch.dtype, dropout: float | None, seed: int, trusted: bool
) -> PreTrainedModel:
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError('a model\'s config needs "model_type", the name of its architecture, such as "llama"')
    with _explained(f"a {kind} model from its config"):
        _check_names(kind, settings)
        config = AutoConfig.for_model(**settings)
        # An architecture's default ids belong to some other tokenizer: they would end responses at random tokens.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, settings.get(name))
        if config.is_encoder_decoder:
            # T5's and Marian's way.
            config.decoder_start_token_id = settings.get("decoder_start_token_id", settings.get("pad_token_id"))
        _set_dropout(config, dropout)
        if dtype == "auto":
            dtype = config.dtype or "float32"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # built on the CPU: this one alone draws the weights
            model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trusted)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            setattr(model.generation_config, name, settings.get(name))
        return model


def _check_names(kind: str, settings: Mapping[str, Any]) -> None:
    """Transformers keeps a misspelt setting without using it; this names it instead."""
    try:
        default = AutoConfig.for_model(kind)
    except ValueError:
        raise ConfigError(f"model_type {kind!r} is unknown to this version of transformers") from None
    known = {*default.to_dict(), *default.attribute_map, *_UNLISTED}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"a {kind} model's config has no setting {name!r}{hint}")


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device(best_device() if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"the device {str(device)!r} cannot be used here ({_first_line(error)}); try cpu") from error
    return place


def _set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
    if dropout is None:
        return
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}, but must be at least 0 and below 1")
    settings = config.to_dict()
    names = [n for n, v in settings.items() if _DROPOUT.match(n) and isinstance(v, int | float) and v is not True]
    if not names and dropout > 0:
        raise ConfigError(f"dropout is {dropout}, but a {config.model_type} model has no dropout to set; leave it out")
    for name in names:
        setattr(config, name, float(dropout))


def _locate(path: str | Path, gguf_file: str | None) -> tuple[Path, str | None]:
    """The folder or hub name, and the GGUF file in it if there is one."""
    source = home(path)
    if gguf_file is None and source.suffix == ".gguf":
        source, gguf_file = source.parent, source.name
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading the GGUF file {gguf_file} needs another package: pip install 'distillm[gguf]'")
    if is_file(source):
        raise ModelError(f"{source} is a file: give the folder it is in, or a .gguf file")
    # With a folder here of the owner's name, owner/name is a path that was mistyped.
    local = source.is_absolute() or str(path).startswith((".", "~")) or len(source.parts) > 2
    if not is_dir(source) and (local or (len(source.parts) == 2 and is_dir(source.parent))):
        raise ModelError(f"there is no folder {source}: give a model folder, a .gguf file, or a hub name (owner/name)")
    if gguf_file is not None and is_dir(source) and not is_file(source / gguf_file):
        raise ModelError(f"there is no file {source / gguf_file}")
    return source, gguf_file


def _dequantized() -> dict[str, Any]:
    """Newer transformers would leave GGUF weights packed where a kernel exists, and refuse to save the model."""
    import transformers

    made = getattr(transformers, "GgufConfig", None)
    return {} if made is None else {"quantization_config": made(dequantize=True)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()


@contextmanager
def _explained(what: str) -> Generator[None]:
    """Turn the many errors of a failed load into one line of ours."""
    try:
        yield
    except StrictDataclassError as error:
        raise ConfigError(f"cannot make {what}: {' '.join(str(error).split())}") from error
    except DistillmError:
        raise
    except Exception as error:  # the loaders raise anything, tokenizers bare Exception
        reason = _first_line(error)
        if "connect" in reason or "offline" in reason.lower():
            reason = "there is no such folder here, and the hub cannot be reached"
        raise ModelError(f"cannot load {what}: {reason}") from error


@contextmanager
def _quiet(source: Path, gguf_file: str | None) -> Generator[None]:
    """No progress bars while a local folder is read; a download keeps its own."""
    with ExitStack() as after:
        if is_dir(source) and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            after.callback(logging.enable_progress_bar)
        if gguf_file is not None:
            # Its own bar heeds no setting.
            reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
            after.callback(setattr, reader, "tqdm", reader.tqdm)
            reader.tqdm = partial(reader.tqdm, disable=True)
        yield


def fingerprint(model: nn.Module) -> str:
    """A short name of ``model``'s weights, each bit of them, that no single change leaves as it was."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sums(tensor)}".encode())
    return digest.hexdigest()[:16]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums(tensor: Tensor) -> list[int]:
    """Two sums of the bits read as whole numbers, the second weighted by place: exact, whatever device or order."""
    whole = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=whole.device)
    for number, part in enumerate(whole.split(2**22)):
        places = torch.arange(1, len(part) + 1, device=part.device)
        part = part.to(torch.int64)
        sums += torch.stack([part.sum(), (part * places).sum() * (2 * number + 1)])
    return sums.tolist()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary model folder: safetensors, configuration, generation settings, tokenizer."""
    with _quiet(folder, None):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------- shrinking


Layers = int | Sequence[int]


def shrink(
    teacher: PreTrainedModel,
    layers: Layers,
    *,
    decoder_layers: Layers | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """A student that starts as ``teacher`` with only some of its layers, in eval mode on the same device.

    A number keeps that many evenly spaced layers, the first and the last among them; a sequence names them, ascending
    from 0. Of an encoder-decoder ``layers`` are the encoder's and, unless ``decoder_layers`` says otherwise, the
    decoder's. Embeddings, norms, head and generation settings are copies; ``dropout`` is as in ``load_model``.
    Raises ModelError for layers that do not exist and for models whose layers cannot be taken out.
    """
    config: Any = copy.deepcopy(teacher.config)
    stacks = _stacks(teacher)
    if decoder_layers is not None and "decoder" not in stacks:
        raise ModelError(
            f"{type(teacher).__name__} has no encoder, and layers are its decoder's; leave decoder_layers out"
        )
    asked = {name: layers if name != "decoder" or decoder_layers is None else decoder_layers for name in stacks}
    kept = {name: _kept(asked[name], stack.size) for name, stack in stacks.items()}
    if "decoder" not in stacks:
        for name, value in _layer_lists(teacher.config, kept[""]).items():
            setattr(config, name, value)
    for name, stack in stacks.items():
        for setting in stack.settings:
            setattr(config, setting, len(kept[name]))
    _set_dropout(config, dropout)
    weights: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        new_name = _renamed(name, stacks, kept)
        if new_name is not None:
            weights[new_name] = tensor.detach().clone()
    said = " and ".join(f"{name} layers {which}".strip() for name, which in kept.items())
    with _explained(f"{said} of {type(teacher).__name__}"), _quiet(Path(), None):
        architecture: Any = type(teacher)
        student, report = architecture.from_pretrained(
            None, config=config, state_dict=weights, dtype=teacher.dtype, output_loading_info=True
        )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ModelError(
            f"{said} of {type(teacher).__name__} do not fit a model of so many layers (first: {wrong[0]}); "
            "its layers differ by position, so keep a pattern that repeats (and the first one)"
        )
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).eval()


class _Stack(NamedTuple):
    """A list of layers by its name in the model, its length, and the settings that hold the length."""

    prefix: str
    size: int
    settings: tuple[str, ...]


def _stacks(model: PreTrainedModel) -> dict[str, _Stack]:
    """The stacks of layers of ``model``: "encoder" and "decoder", or "" for the only one."""
    config: Any = model.config
    if not config.is_encoder_decoder:
        size: int = config.num_hidden_layers
        return {"": _Stack(_layers_name(model, size), size, ("num_hidden_layers",))}
    parts: dict[str, nn.Module] = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}  # pyright: ignore[reportAssignmentType]
    modules = {id(module): name for name, module in model.named_modules()}
    # T5 calls its encoder's number num_layers; BART repeats it as num_hidden_layers.
    names = {
        "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
        "decoder": ("decoder_layers", "num_decoder_layers"),
    }
    stacks: dict[str, _Stack] = {}
    for part, module in parts.items():
        settings = tuple(name for name in names[part] if name in {*config.to_dict(), *config.attribute_map})
        if not settings:
            raise ModelError(
                f"the {part} of {type(model).__name__} cannot be shrunk: its configuration has no {names[part]}"
            )
        size = getattr(config, settings[0])
        stacks[part] = _Stack(f"{modules[id(module)]}.{_layers_name(module, size)}", size, settings)
    return stacks


def _renamed(name: str, stacks: Mapping[str, _Stack], kept: Mapping[str, list[int]]) -> str | None:
    """The student's name of the teacher's tensor ``name``; None where its layer goes."""
    for part, stack in stacks.items():
        if match := re.match(rf"{re.escape(stack.prefix)}\.(\d+)\.", name):
            layer = int(match[1])
            if layer not in kept[part]:
                return None
            return f"{stack.prefix}.{kept[part].index(layer)}.{name[match.end() :]}"
    return name


def _kept(layers: int | Sequence[int], num_layers: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= num_layers:
            raise ModelError(f"cannot keep {layers} layers: the teacher has {num_layers}, so give 1 to {num_layers}")
        last, gaps = num_layers - 1, max(layers - 1, 1)
        return [(i * last + gaps // 2) // gaps for i in range(layers)]
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_layers:
        raise ModelError(f"layers {kept}: give different indices in ascending order, from 0 to {num_layers - 1}")
    return kept


def _layers_name(teacher: nn.Module, num_layers: int) -> str:
    """The name of the list of decoder layers; the outermost one, as experts inside a layer may be as many."""
    for name, module in teacher.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise ModelError(f"{type(teacher).__name__} has no list of {num_layers} layers to choose from; it cannot be shrunk")


def _layer_lists(config: PretrainedConfig, kept: list[int]) -> dict[str, list[Any]]:
    """The configuration's per-layer lists, for the layers kept: one entry a layer, or the indices of some layers."""
    lists: dict[str, list[Any]] = {}
    for name, value in config.to_dict().items():
        if not isinstance(value, list | tuple) or "token" in name or name == "architectures":
            continue
        if name in ("full_attn_idxs", "moe_layers", "mlp_only_layers"):
            lists[name] = [new for new, old in enumerate(kept) if old in value]
        elif len(value) == config.num_hidden_layers:
            lists[name] = [value[i] for i in kept]
    return lists
