"""How good a system's responses are: metrics on texts, and the scoring of a model on rows."""

from .metrics import exact_match, rouge_l, score_texts, summary
from .run import Result, evaluate, score_predictions

__all__ = ["Result", "evaluate", "exact_match", "rouge_l", "score_predictions", "score_texts", "summary"]
