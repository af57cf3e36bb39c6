"""Distil a large language model into a small one: DistiLLM and the methods it is compared with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
"""The version of this package."""

if TYPE_CHECKING:
    from .assess import measure as measure
    from .checking import check as check
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .config import Run as Run
    from .config import load_run as load_run
    from .data import Task as Task
    from .data import collate as collate
    from .data import read_rows as read_rows
    from .data import text_examples as text_examples
    from .divergences import DIVERGENCES as DIVERGENCES
    from .divergences import forward_kl as forward_kl
    from .divergences import jsd as jsd
    from .divergences import reverse_kl as reverse_kl
    from .divergences import skew_kl as skew_kl
    from .divergences import skew_reverse_kl as skew_reverse_kl
    from .divergences import symmetric_kl as symmetric_kl
    from .divergences import total_variation as total_variation
    from .errors import DistillmError as DistillmError
    from .evaluation import evaluate as evaluate
    from .evaluation import exact_match as exact_match
    from .evaluation import rouge_l as rouge_l
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .kernels import linear_cross_entropy as linear_cross_entropy
    from .kernels import linear_divergence as linear_divergence
    from .methods import Context as Context
    from .methods import Method as Method
    from .methods import distillm as distillm
    from .methods import kd as kd
    from .methods import sft as sft
    from .models import head_of as head_of
    from .models import layout_of as layout_of
    from .models import load_model as load_model
    from .models import load_tokenizer as load_tokenizer
    from .pipeline import distill as distill
    from .project import build as build
    from .project import steps as steps
    from .readers import LocalTeacher as LocalTeacher
    from .report import write_report as write_report
    from .report.frames import plot as plot
    from .report.frames import read_run as read_run
    from .scoring import Pair as Pair
    from .scoring import Scored as Scored
    from .shrinking import shrink as shrink
    from .sources import ReplayBuffer as ReplayBuffer
    from .train import Step as Step
    from .train import training_steps as training_steps
    from .train import validate as validate
    from .types import Batch as Batch
    from .types import Example as Example
    from .types import Head as Head
    from .types import Layout as Layout
    from .types import State as State
    from .vocabulary import shared_tokens as shared_tokens
    from .vocabulary import train_tokenizer as train_tokenizer

# Where each public name lives: nothing heavy is imported before it is used, so that `distillm --help` is quick.
_HOMES = {
    "assess": ["measure"],
    "checking": ["check"],
    "checkpoint": ["load_checkpoint", "save_checkpoint"],
    "config": ["Run", "load_run"],
    "data": ["Task", "collate", "read_rows", "text_examples"],
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
    "models": ["head_of", "layout_of", "load_model", "load_tokenizer"],
    "pipeline": ["distill"],
    "project": ["build", "steps"],
    "readers": ["LocalTeacher"],
    "report": ["write_report"],
    "report.frames": ["plot", "read_run"],
    "scoring": ["Pair", "Scored"],
    "shrinking": ["shrink"],
    "sources": ["ReplayBuffer"],
    "train": ["Step", "training_steps", "validate"],
    "types": ["Batch", "Example", "Head", "Layout", "State"],
    "vocabulary": ["shared_tokens", "train_tokenizer"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distillm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return ["__version__", *_HOME]
