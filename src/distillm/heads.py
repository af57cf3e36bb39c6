"""Reading a model's ``Head``: what its unembedding is fed at target positions, checked once against its own logits."""

import inspect
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ModelError
from .types import IGNORE, Batch, Head

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class HeadReader:
    """``reader(model, batch)``: the ``Head`` of ``model`` at the batch's target positions, made by ``head_of``.

    The rows are those where ``batch.labels`` is not ``IGNORE``, in row-major order; gradients flow through them. With
    ``fused`` the model forms its own logits for one position only; otherwise the head holds the model's own logits.
    ``packed`` readers let the model read the rows one behind the other, without padding (``packing``).
    """

    model: Any = field(repr=False)
    unembedding: nn.Linear | None
    scale: float = 1.0
    softcap: float | None = None
    packed: bool = False
    copies: dict[torch.device, tuple[Tensor, Tensor | None]] = field(
        default_factory=dict[torch.device, tuple[Tensor, Tensor | None]], repr=False, compare=False
    )
    """Of a frozen unembedding that lies elsewhere than it is wanted."""

    @property
    def fused(self) -> bool:
        """Whether the head stands for logits that are never formed."""
        return self.unembedding is not None

    def __call__(self, model: Any, batch: Batch) -> Head:
        """Run ``model``, or a wrapper of it such as DistributedDataParallel; raises ModelError for another model."""
        batch = pack(batch) if self.packed else batch
        targets = batch.labels != IGNORE  # [B, T]
        if self.unembedding is None:
            return Head(_forward(model, batch.inputs).logits[targets], None)
        hidden: list[Tensor] = []

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden.append(args[0])
            return (args[0][:, :1],)

        with _before(self.unembedding, capture):
            _forward(model, batch.inputs)
        if len(hidden) != 1:
            raise ModelError("this head reader was made for another model: call head_of on the model that is read")
        fed = hidden[0]  # where the last layer is, which may be another device
        return self.head(fed[targets.to(fed.device)].to(targets.device))

    def head(self, hidden: Tensor) -> Head:
        """The head of what the unembedding is fed, ``[N, d]``, now or at an earlier time; for a fused reader alone."""
        assert self.unembedding is not None
        if self.unembedding.weight.device == hidden.device:
            weight, bias = self._weights(hidden.device)
        elif hidden.device in self.copies:
            weight, bias = self.copies[hidden.device]
        else:
            with align_module_device(self.unembedding), torch.no_grad():  # which may wait on disk
                self.copies[hidden.device] = weight, bias = self._weights(hidden.device, copy=True)
        return Head(hidden, weight, bias, self.scale, self.softcap)

    def _weights(self, device: torch.device, *, copy: bool = False) -> tuple[Tensor, Tensor | None]:
        assert self.unembedding is not None
        biases = [self.unembedding.bias, getattr(self.model, "final_logits_bias", None)]
        there = [bias.flatten().to(device, copy=copy) for bias in biases if bias is not None]
        return self.unembedding.weight.to(device, copy=copy), sum(there[1:], there[0]) if there else None


def head_of(model: Any) -> HeadReader:
    """The reader of ``model``'s head, after a check on one small batch that ``Head`` reproduces the model's own logits.

    Honours biases (``final_logits_bias`` too), logit scales and soft-capping. Where no such head reproduces the logits,
    the reader uses the model's own, and a UserWarning says so. Leaves modes and random generators as they were.
    """
    unembedding = model.get_output_embeddings()
    if not _plain(unembedding):
        return _own_logits(model, f"its output layer is {type(unembedding).__name__}, not a plain linear one")
    with torch.no_grad(), eval_mode(model):
        seen = _observations(model, unembedding)
    with torch.no_grad(), align_module_device(unembedding):
        for scale in _scales(model.config):
            for softcap in _softcaps(model.config):
                reader = HeadReader(model, unembedding, scale, softcap)
                if seen and all(_reproduces(reader, hidden, logits) for hidden, logits in seen):
                    return reader
    return _own_logits(model, "its logits are not its output layer's, scaled and soft-capped in a known way")


def where(model: Any) -> torch.device:
    """Where ``model`` takes its inputs: of layers that wait on disk none says so, and they take them from anywhere."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def packing(reader: HeadReader) -> HeadReader:
    """The same reader, that packs the rows of a batch into one.

    Checked on two rows: they are read as they are apart, and the second one does not see the first one change.

    Raises:
        ModelError: the model does not keep packed rows apart.
    """
    model, found = reader.model, replace(reader, packed=True)
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} takes no positions that begin anew for each row: leave packing out")
    weight = model.get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (2, 8), generator=torch.Generator().manual_seed(0)).to(where(model))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0

    def read(by: HeadReader, ids: Tensor) -> Tensor:
        batch = Batch({"input_ids": ids, "attention_mask": mask}, torch.where(mask == 1, ids, IGNORE))
        return by(model, batch).hidden.float()

    with torch.no_grad(), eval_mode(model):
        apart, packed = read(reader, ids), read(found, ids)
        ids[0] = ids[0].flip(0)
        changed = read(found, ids)
    second = int(mask[0].sum())
    # Low precision rounds differently in another layout, by too much to tell a leak; in the same layout it does not.
    leak = (changed - packed)[second:].abs().max() / packed.abs().max()
    error = (packed - apart).abs().max() / apart.abs().max()
    if not (leak <= 1e-4 and error <= max(1e-4, 16 * torch.finfo(weight.dtype).eps)):
        raise ModelError(f"{type(model).__name__} lets packed rows read each other: leave packing out")
    return found


def pack(batch: Batch) -> Batch:
    """The rows of a causal ``batch`` one behind the other in a single one, without padding; targets keep their order.

    Positions that begin anew are what tells transformers' models to keep the rows apart.
    """
    kept = batch.inputs["attention_mask"].bool()
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    inputs = {"input_ids": batch.inputs["input_ids"][kept][None], "position_ids": positions[kept][None]}
    return Batch(inputs, batch.labels[kept][None])


def _own_logits(model: Any, reason: str) -> HeadReader:
    warnings.warn(
        f"the logits of {type(model).__name__} are formed in full for every position, which is right but takes more "
        f"time and memory: {reason}",
        stacklevel=3,
    )
    return HeadReader(model, None)


def _plain(unembedding: Any) -> bool:
    """A linear layer of ordinary weights: neither quantized nor wrapped by an adapter, which a new one hides."""
    return type(unembedding) is nn.Linear and unembedding.weight.is_floating_point()


def _declared(config: Any, names: tuple[str, ...]) -> list[float]:
    text = config.get_text_config(decoder=True)
    values = [getattr(text, name, None) for name in names]
    return [float(v) for v in values if isinstance(v, int | float) and v]


def _scales(config: Any) -> list[float]:
    """What the configuration may mean by its scale; one name multiplies in some models and divides in others."""
    divisors = [1 / v for v in _declared(config, _DIVISORS)]
    return list(dict.fromkeys([*divisors, *_declared(config, _MULTIPLIERS), 1.0]))


def _softcaps(config: Any) -> list[float | None]:
    return [*_declared(config, _SOFTCAPS), None]


def _observations(model: Any, unembedding: nn.Linear) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (unembedding's input, model's own logits), ``[N, d]`` and ``[N, V]``; empty where they do not match up.

    The second pair has its input scaled up to logits of about 50, where a soft cap shows.
    """
    generator = torch.Generator().manual_seed(0)
    num_ids = min(model.get_input_embeddings().weight.shape[0], unembedding.weight.shape[0])
    ids = torch.randint(num_ids, (2, 6), generator=generator).to(where(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    pairs: list[tuple[Tensor, Tensor]] = []
    boost = 1.0
    for _ in range(2):
        fed: list[Tensor] = []

        def feed(_: nn.Module, args: tuple[Tensor, ...], boost: float = boost, fed: list[Tensor] = fed) -> Any:
            fed.append(args[0] * boost if args else torch.empty(0))
            return (fed[-1],) if args else None

        with _before(unembedding, feed):
            logits = _forward(model, inputs).logits
        if len(fed) != 1 or fed[0].shape[:-1] != ids.shape or logits.shape != (*ids.shape, unembedding.weight.shape[0]):
            return []
        pairs.append((fed[0].flatten(0, 1), logits.flatten(0, 1)))
        with align_module_device(unembedding):
            weight = unembedding.weight
            largest = F.linear(fed[0].to(weight.device), weight).abs().max().item()
        boost = 50 / largest if largest > 0 else 1.0
    return pairs


def _reproduces(reader: HeadReader, hidden: Tensor, logits: Tensor) -> bool:
    """Whether the reader's head gives ``logits``, up to the rounding of their own precision."""
    head = reader.head(hidden)
    assert head.weight is not None
    wide = torch.promote_types(logits.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(wide)
    z = F.linear(head.hidden.to(wide), head.weight.to(wide), bias) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    tolerance = max(1e-4, 4 * torch.finfo(head.weight.dtype).eps, 4 * torch.finfo(logits.dtype).eps)
    return float((z - logits.to(z.device)).abs().max()) <= tolerance * float(logits.abs().max())


def _forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return model(**inputs, **({"use_cache": False} if any_name or "use_cache" in parameters else {}))


@contextmanager
def _before(module: nn.Module, hook: Any) -> Generator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """``model`` in eval mode inside, every module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
