"""Losses straight from hidden states: the front door to the fused vocabulary projections.

``eager`` defines the answer; ``chunked`` and ``triton`` give the same within rounding, in memory that does not grow
with the rows. ``auto`` is ``triton`` where it can be, on a GPU, and otherwise ``chunked``, which can do everything.
"""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Bucketed, Divergence
from ..errors import ConfigError
from ..types import Head
from . import chunked, eager
from .eager import Parameters, logits

__all__ = ["linear_cross_entropy", "linear_divergence", "logits"]

Impl = Literal["auto", "eager", "chunked", "triton"]


@overload
def linear_divergence(
    divergence: str | Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: Literal[False] = False,
    byte_budget: int | None = None,
    top_k: int | None = None,
    **parameters: float | Tensor,
) -> Tensor: ...


@overload
def linear_divergence(
    divergence: str | Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: Literal[True],
    byte_budget: int | None = None,
    top_k: int | None = None,
    **parameters: float | Tensor,
) -> tuple[Tensor, Tensor]: ...


def linear_divergence(
    divergence: str | Divergence,
    teacher: Head,
    student: Head,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: bool = False,
    byte_budget: int | None = None,
    top_k: int | None = None,
    **parameters: float | Tensor,
) -> Tensor | tuple[Tensor, Tensor]:
    """``weights @ divergence(log_softmax(logits(teacher)), log_softmax(logits(student)), **parameters)``.

    A scalar, float32 (float64 for a float64 student), differentiable in the student's hidden, weight and bias only;
    with ``per_row``, also the values ``[N]``, detached. ``weights`` is ``[N]``. ``divergence`` is a name in
    ``DIVERGENCES`` or a function ``(p, q, **parameters)``, ``[..., V] -> [...]``, of each row alone; ``parameters``
    are numbers, or tensors ``[N]`` that reach it as ``[N, 1]``. With ``top_k`` all tokens but the teacher's
    likeliest are one bucket (``divergences.Bucketed``). ``byte_budget`` bounds what ``chunked`` and ``triton`` take
    beside inputs and gradients (256 MiB on a CPU, else about what 4,096 rows of logits are); one backward may run
    through their result. Raises ``ConfigError`` for an unknown name and where ``triton``, asked for by name, cannot
    be: it has the named divergences but ``adaptive_kl``, without ``top_k``, in float32 or less. ``ValueError``
    where shapes do not fit.
    """
    function = DIVERGENCES[_known(divergence, DIVERGENCES, "divergence")] if isinstance(divergence, str) else divergence
    if teacher.listed is not None:  # all that it does not list is one bucket
        top_k = min(top_k or teacher.hidden.shape[1] // 2, teacher.hidden.shape[1] // 2)
    if top_k is not None:
        function = Bucketed(function, top_k)
    num_rows = student.hidden.shape[0]
    _check_rows(num_rows, teacher=teacher.hidden, weights=weights)
    if teacher.num_tokens != student.num_tokens:
        raise ValueError(
            f"the teacher's head has {teacher.num_tokens} entries and the student's {student.num_tokens}; "
            "narrow both to the entries they share (Head.narrow)"
        )
    weights = weights.detach()
    rowwise = {k: v.detach().expand(num_rows) if isinstance(v, Tensor) else v for k, v in parameters.items()}
    chosen = _implementation(impl, function, rowwise, teacher, student)
    if chosen is eager:
        values = eager.divergence_rows(function, teacher, student, rowwise)
        total, values = _weighted_sum(weights, values), values.detach()
    else:
        total, values = chosen.divergence_rows(function, teacher, student, weights, rowwise, byte_budget)
    return (total, values) if per_row else total


@overload
def linear_cross_entropy(
    student: Head,
    labels: Tensor,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: Literal[False] = False,
    byte_budget: int | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    student: Head,
    labels: Tensor,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: Literal[True],
    byte_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    student: Head,
    labels: Tensor,
    weights: Tensor,
    *,
    impl: Impl = "auto",
    per_row: bool = False,
    byte_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``weights @ cross_entropy(logits(student), labels, reduction="none")``.

    As ``linear_divergence``, with ``labels`` ``[N]`` int64 for a teacher. A row whose label is ``IGNORE`` is worth 0.
    """
    _check_rows(student.hidden.shape[0], labels=labels, weights=weights)
    weights = weights.detach()
    chosen = _implementation(impl, None, {}, student)
    if chosen is eager:
        values = eager.cross_entropy_rows(student, labels)
        total, values = _weighted_sum(weights, values), values.detach()
    else:
        total, values = chosen.cross_entropy_rows(student, labels, weights, byte_budget)
    return (total, values) if per_row else total


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    # Not by @, which autocast would carry out in low precision.
    return (weights.to(values.dtype) * values).sum()


def _implementation(impl: str, divergence: Divergence | None, parameters: Parameters, *heads: Head) -> Any:
    """The module that computes ``divergence``, None for the cross-entropy."""
    known = _known(impl, ("auto", "eager", "chunked", "triton"), "implementation")
    if known == "eager":
        return eager
    if known == "chunked" or (known == "auto" and not heads[-1].hidden.is_cuda):
        return chunked
    try:
        from . import triton_rows
    except ImportError as error:
        if known == "auto":
            return chunked
        raise ConfigError(f"impl='triton' needs the package triton ({error}); install it, or take 'auto'") from error
    obstacle = triton_rows.obstacle(divergence, parameters, *heads)
    if known == "triton" and obstacle is not None:
        raise ConfigError(f"impl='triton' {obstacle}; take impl='chunked', or 'auto', which chooses")
    if known == "auto" and not (obstacle is None and triton_rows.works(heads[-1].hidden.device)):
        return chunked
    return triton_rows


def _known(name: str, names: Iterable[str], what: str) -> str:
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
        raise ConfigError(f"unknown {what} {name!r}; {hint}")
    return name


def _check_rows(num_rows: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[:1] != torch.Size([num_rows]):
            raise ValueError(f"the student has {num_rows} rows, {name} has shape {tuple(tensor.shape)}; give one each")
