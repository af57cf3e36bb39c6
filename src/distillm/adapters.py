"""LoRA (arXiv:2106.09685) by peft: training an adapter, merging it, and the model without it as a teacher."""

import copy
import importlib.util
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ConfigError, ModelError
from .heads import eval_mode
from .paths import is_file

_CONVERSIONS = "_weight_conversions"


def add_adapter(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float, targets: Sequence[str] | None, seed: int
) -> PreTrainedModel:
    """Put a low-rank adapter into ``model``'s layers, of which alone training changes anything.

    ``targets`` are names of linear layers, all but the output layer where None. At first the adapter changes nothing.

    Raises:
        ConfigError: peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("student.lora needs peft: pip install 'distillm[lora]'") from None
    settings = LoraConfig(
        r=r,
        lora_alpha=cast(Any, alpha),
        lora_dropout=dropout,
        target_modules="all-linear" if targets is None else list(targets),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(settings)
    except ValueError as error:
        raise ConfigError(f"student.lora.targets: {error}") from error
    return model


def base_of(folder: Path) -> str | None:
    """The model that the adapter in ``folder`` was trained on; None where there is no adapter or a whole model.

    Raises:
        ModelError: the adapter does not say, or peft is not installed.
    """
    settings = folder / "adapter_config.json"
    if not is_file(settings) or is_file(folder / "config.json"):
        return None
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{folder} holds an adapter, which needs peft: pip install 'distillm[lora]'")
    try:
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"cannot read {settings}: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{settings} does not name the adapter's base model (base_model_name_or_path)")
    return base


def with_saved_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``model`` with the adapter in ``folder`` merged into its weights."""
    # Loading leaves how names in peft's files become the model's, which saving would undo: what is saved is no adapter.
    conversions = getattr(model, _CONVERSIONS, None)
    model.load_adapter(str(folder))
    setattr(model, _CONVERSIONS, conversions)
    return _merge(model)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` with its adapter added to its weights: an ordinary model."""
    return _merge(copy.deepcopy(model))


def _merge(model: PreTrainedModel) -> PreTrainedModel:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer) and not isinstance(module, TrainableTokensWrapper):
                child.merge()
                setattr(module, name, child.get_base_layer())
            elif isinstance(child, ModulesToSaveWrapper):  # a layer that was trained whole
                setattr(module, name, child.modules_to_save[child.active_adapters[0]])
            elif isinstance(child, TrainableTokensWrapper):  # some rows of an embedding
                child.token_adapter.merge()
                setattr(module, name, child.token_adapter.get_base_layer())
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Module) and head.weight is not words.weight:  # one of the two was trained by itself
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.__dict__.pop("peft_config", None)  # else another adapter would be a second one
    model._hf_peft_config_loaded = False  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return model


class AdapterOff(nn.Module):
    """``model`` as it is without its adapter, in eval mode and without gradients: a teacher for the model with it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.model.generation_config = config

    def forward(self, **inputs: Any) -> Any:
        """What the model says without its adapter."""
        with self._switched_off():
            return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """What the model writes without its adapter."""
        with self._switched_off():
            return self.model.generate(**inputs)  # pyright: ignore[reportCallIssue, reportUnknownVariableType]

    def get_encoder(self) -> Any:
        """The model's encoder without its adapter."""

        def encode(**inputs: Any) -> Any:
            with self._switched_off():
                return self.model.get_encoder()(**inputs)  # pyright: ignore[reportCallIssue]

        return encode

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's weights but for the adapter, which is not part of this teacher."""
        return {name: value for name, value in self.model.state_dict().items() if ".lora_" not in name}

    @contextmanager
    def _switched_off(self) -> Generator[None]:
        self.model.disable_adapters()
        try:
            with torch.no_grad(), eval_mode(self.model):
                yield
        finally:
            self.model.enable_adapters()
