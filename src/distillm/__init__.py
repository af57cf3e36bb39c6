"""Distil a large language model into a small one: DistiLLM and the methods it is compared with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, save_checkpoint
    from .config import Run, load_run
    from .data import InstructionTask, collate, read_rows, text_examples
    from .divergences import (
        DIVERGENCES,
        forward_kl,
        jsd,
        reverse_kl,
        skew_kl,
        skew_reverse_kl,
        symmetric_kl,
        total_variation,
    )
    from .errors import DistillmError
    from .evaluation import evaluate, exact_match, rouge_l
    from .generation import Sampling, generate
    from .kernels import linear_cross_entropy, linear_divergence
    from .methods import Context, Method, distillm, kd, sft
    from .models import head_of, load_model, load_tokenizer, shrink
    from .pipeline import build, distill
    from .report import write_report
    from .scoring import Pair, Scored
    from .sources import ReplayBuffer
    from .train import Step, training_steps, validate
    from .types import Batch, Example, Head, State
    from .vocabulary import shared_tokens, train_tokenizer

# Where each public name lives: nothing heavy is imported before it is used, so that `distillm --help` is quick.
_HOMES = {
    "checkpoint": ["load_checkpoint", "save_checkpoint"],
    "config": ["Run", "load_run"],
    "data": ["InstructionTask", "collate", "read_rows", "text_examples"],
    "divergences": [
        "DIVERGENCES",
        "forward_kl",
        "jsd",
        "reverse_kl",
        "skew_kl",
        "skew_reverse_kl",
        "symmetric_kl",
        "total_variation",
    ],
    "errors": ["DistillmError"],
    "evaluation": ["evaluate", "exact_match", "rouge_l"],
    "generation": ["Sampling", "generate"],
    "kernels": ["linear_cross_entropy", "linear_divergence"],
    "methods": ["Context", "Method", "distillm", "kd", "sft"],
    "models": ["head_of", "load_model", "load_tokenizer", "shrink"],
    "pipeline": ["build", "distill"],
    "report": ["write_report"],
    "scoring": ["Pair", "Scored"],
    "sources": ["ReplayBuffer"],
    "train": ["Step", "training_steps", "validate"],
    "types": ["Batch", "Example", "Head", "State"],
    "vocabulary": ["shared_tokens", "train_tokenizer"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604
    "__version__",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distillm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
