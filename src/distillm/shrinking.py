"""A student made of some of its teacher's layers."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import ModelError
from .heads import where
from .models import explained, quiet, set_dropout, weights_of

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
    set_dropout(config, dropout)
    weights: dict[str, Tensor] = {}
    for name, tensor in weights_of(teacher):
        new_name = _renamed(name, stacks, kept)
        if new_name is not None:
            weights[new_name] = tensor.detach().clone()
    said = " and ".join(f"{name} layers {which}".strip() for name, which in kept.items())
    with explained(f"{said} of {type(teacher).__name__}"), quiet(Path(), None):
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
    return student.to(where(teacher)).eval()


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
