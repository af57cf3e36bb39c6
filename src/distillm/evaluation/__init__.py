"""How good a system's responses are: metrics on texts, the scoring of a model on rows, differences between systems."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .metrics import DEFAULT, METRICS, Metric, exact_match, rouge_l, score_texts, summary
from .significance import Difference, paired_bootstrap

if TYPE_CHECKING:
    from .run import Result, evaluate, score_predictions

__all__ = [
    "DEFAULT",
    "METRICS",
    "Difference",
    "Metric",
    "Result",
    "evaluate",
    "exact_match",
    "paired_bootstrap",
    "rouge_l",
    "score_predictions",
    "score_texts",
    "summary",
]

# These read models: found when asked for, so that tables of scores are made without torch.
_HOMES = {"Result": "run", "evaluate": "run", "score_predictions": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distillm.evaluation' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
