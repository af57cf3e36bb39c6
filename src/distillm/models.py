"""Models: loading and building them, how they are fed, their fingerprints."""

import difflib
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import align_module_device
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
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
from .sharding import full
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
]

Model = TypeVar("Model", bound=nn.Module)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece*")
_DROPOUT = re.compile(
    r"^(?!classifier|summary|moe_token|adaptor|speech|t2u|var_pred).*(dropout(_prob|_rate|_p)?|pdrop)$"
)
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)
# Understood by transformers though no default configuration lists them.
_UNLISTED = {*("rope_theta", "rope_scaling", "attn_implementation", "dtype"), *_IDS}


def best_device() -> str:
    """The fastest kind of device here: ``cuda``, else ``mps``, else ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def num_parameters(model: nn.Module) -> int:
    """How many numbers ``model`` learns or holds frozen; tied weights count once."""
    if getattr(model, "is_loaded_in_4bit", False):  # two numbers share a byte
        return cast(Any, model).num_parameters()
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
    with explained(f"the tokenizer of {path}"), quiet(source, gguf_file):
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
    quantization: str | None = None,
    spread: bool = False,
    max_memory: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """A transformers language model, in eval mode: from a folder, a hub name or a GGUF file, or built from ``config``.

    The folder of a LoRA adapter gives its base with the adapter merged into it.

    ``config`` is a dictionary such as ``{"model_type": "llama", "hidden_size": 64}``; its weights are drawn from
    ``seed`` alone, without touching the global generators. ``dtype`` is a name such as ``float32`` or ``auto`` (as
    saved); ``device`` None is ``best_device()``. ``dropout`` sets every dropout probability of the model; None leaves
    them. ``quantization`` (8bit, 4bit) loads linear layers by bitsandbytes. With ``spread`` layers go to the GPUs, the
    CPU's memory and the disk in turn, as they fit, or as ``max_memory`` allows. Pickled weights and a repository's own
    code are read only with ``trust_remote_code``. Raises ModelError, or ConfigError for a bad setting.
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
        extra = _placed(place, dtype, quantization, spread, max_memory)
        model = _load(path, gguf_file, dtype, dropout, trust_remote_code, extra)
        if extra:  # which have put it where it belongs
            return model.eval()
    return model.to(place).eval()  # pyright: ignore[reportArgumentType] (its decorator hides nn.Module.to)


def _placed(
    place: torch.device,
    dtype: str | torch.dtype,
    quantization: str | None,
    spread: bool,
    max_memory: Mapping[str, str] | None,
) -> dict[str, Any]:
    """What `from_pretrained` is told where weights are quantized, or do not all go to ``place``."""
    found: dict[str, Any] = {}
    if quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(f"quantization={quantization} needs another package: pip install 'distillm[quantization]'")
        found["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype,
        )
        found["device_map"] = {"": place}
    if spread:
        found["device_map"] = "auto"
        found["max_memory"] = max_memory and {int(k) if k.isdigit() else k: v for k, v in max_memory.items()}
    return found


def _load(
    path: str | Path,
    gguf_file: str | None,
    dtype: str | torch.dtype,
    dropout: float | None,
    trusted: bool,
    placed: Mapping[str, Any],
) -> PreTrainedModel:
    source, gguf_file = _locate(path, gguf_file)
    base = base_of(source)
    if base is not None:
        if not trusted:
            refuse_pickles(source)
        with explained(f"the adapter {path}"):
            model = _load(base, None, dtype, dropout, trusted, placed)
            return with_saved_adapter(model, source)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with explained(f"the model {path}"), quiet(source, gguf_file):
        config = AutoConfig.from_pretrained(source.as_posix(), trust_remote_code=trusted, **extra)
        if not trusted:
            refuse_kernels(config, source)
        set_dropout(config, dropout)
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
            **placed,
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
    with explained(f"a {kind} model from its config"):
        _check_names(kind, settings)
        config = AutoConfig.for_model(**settings)
        # An architecture's default ids belong to some other tokenizer: they would end responses at random tokens.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, settings.get(name))
        if config.is_encoder_decoder:
            # T5's and Marian's way.
            config.decoder_start_token_id = settings.get("decoder_start_token_id", settings.get("pad_token_id"))
        set_dropout(config, dropout)
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


def set_dropout(config: PretrainedConfig, dropout: float | None) -> None:
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
def explained(what: str) -> Generator[None]:
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
def quiet(source: Path, gguf_file: str | None) -> Generator[None]:
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
    for name, tensor in weights_of(model):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sums(full(tensor))}".encode())
    return digest.hexdigest()[:16]


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of ``model``'s state, those that wait on disk or in another memory read one after the other."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            yield name, tensor
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        with align_module_device(owner):
            yield name, cast(Tensor, getattr(owner, leaf))


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


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write an ordinary model folder: safetensors, configuration, generation settings, tokenizer.

    ``weights`` stand in for the model's own, as where those are spread over processes.
    """
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:  # some models have settings that contradict each other, which transformers loads and never saves
        ids = {name: value for name in _IDS if (value := getattr(settings, name, None)) is not None}
        model.generation_config = GenerationConfig(**ids)
    with quiet(folder, None):
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
