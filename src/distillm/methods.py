"""The methods. Each is a source of rows and a loss on them, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import schedules, sources
from .losses import TEXT, Loss, distill, nll, scaled
from .sources import Generate, ReplayBuffer, Source


@dataclass(frozen=True)
class Context:
    """What a method may draw on."""

    data: Source
    generate: Generate
    buffer: ReplayBuffer
    seed: int
    end_ids: Sequence[int]


@dataclass(frozen=True)
class Method:
    """Where rows come from, and what is minimised on them."""

    source: Source
    loss: Loss

    @property
    def reads_teacher(self) -> bool:
        """Whether any term needs the teacher's distribution."""
        return any(term.reads_teacher for term in self.loss)


def sft(context: Context) -> Method:
    """Cross-entropy on the dataset's responses."""
    return Method(context.data, nll())


def kd(context: Context, *, divergence: str = "forward_kl", kd_weight: float = 1.0, **parameters: float) -> Method:
    """``kd_weight * D(p, q) + (1 - kd_weight) * cross-entropy`` on the dataset's responses; published with KL(p||q)."""
    loss = scaled(kd_weight, distill(divergence, **parameters)) + scaled(1 - kd_weight, nll())
    return Method(context.data, loss)


def distillm(
    context: Context,
    *,
    divergence: str = "skew_kl",
    initial_probability: float = 0.0,
    increment: float = 0.1,
    tolerance: float = 0.1,
    reference: schedules.Reference = "previous",
    replay_ratio: str = "decreasing",
    fill_first: bool = False,
    train_on_fresh: bool = False,
    **parameters: float,
) -> Method:
    """Skew KL on adaptively chosen, mostly replayed student responses. DistiLLM, arXiv:2402.03898."""
    source = sources.off_policy(
        context.data,
        context.generate,
        context.buffer,
        probability=schedules.adaptive(initial_probability, increment, tolerance, reference),
        replay_ratio=REPLAY_RATIO[replay_ratio],
        seed=context.seed,
        end_ids=context.end_ids,
        fill_first=fill_first,
        train_on_fresh=train_on_fresh,
    )
    return Method(source, distill(divergence, **parameters))


def with_text(method: Method, text: Source, weight: float) -> Method:
    """``method`` and, at every step, ``weight`` times the cross-entropy on a batch of plain text."""
    return Method(sources.beside(method.source, text), method.loss + scaled(weight, nll("text", TEXT)))


# The published name: the share of student steps that generate anew. The others replay.
REPLAY_RATIO = {
    "decreasing": schedules.linear(1.0, 0.0),
    "constant": schedules.constant(0.5),
    "increasing": schedules.linear(0.0, 1.0),
}

METHODS = {"sft": sft, "kd": kd, "distillm": distillm}
