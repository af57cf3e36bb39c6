"""The methods. Each is a source of rows and a loss on them, and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from . import schedules, sources
from .contrastive import contrastive
from .losses import REFERENCES, TEXT, Loss, distill, nll, scaled
from .policy_gradient import Importance, policy_gradient
from .schedules import Schedule
from .sources import Replay, ReplayBuffer, Source
from .types import Example, State

Sampling = Literal["none", "on_policy", "mixed", "adaptive", "adaptive_off_policy"]


class Writes(Protocol):
    """Answers prompts with the student as it is, or with the teacher."""

    def __call__(
        self,
        prompts: Sequence[Example],
        state: State,
        *,
        writer: Literal["student", "teacher"] = "student",
        steps: Sequence[int] | None = None,
        teacher_mix: float = 0.0,
        keep_log_probs: bool = False,
    ) -> list[Example]:
        """``prompts`` with responses; ``teacher_mix`` is the teacher's share of what the student draws from."""
        ...


@dataclass(frozen=True)
class Context:
    """What a method may draw on."""

    data: Source
    steps_per_epoch: int
    generate: Writes
    buffer: ReplayBuffer
    seed: int
    end_ids: Sequence[int]
    num_tokens: int


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
    """Cross-entropy on the dataset's responses. With the teacher's in their place it is SeqKD, arXiv:1606.07947."""
    return Method(context.data, nll())


def distillation(
    context: Context,
    *,
    divergence: str,
    sampling: Sampling,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    top_k: int | None = None,
    student_fraction: float = 0.5,
    initial_probability: float = 0.0,
    increment: float = 0.1,
    tolerance: float = 0.1,
    reference: schedules.Reference = "previous",
    off_policy: bool = False,
    replay_ratio: str = "decreasing",
    fill_first: bool = False,
    train_on_fresh: bool = False,
    max_staleness: int = 0,
    response_noise: float = 0.0,
    **parameters: float,
) -> Method:
    """``kd_weight * D(p, q)``, per token, on rows by ``sampling``; the rest is cross-entropy on the dataset's rows.

    KD, ImitKD, GKD and DistiLLM are cells of one table: a divergence, and a way to use the student's own responses.
    """
    probability: dict[Sampling, Schedule] = {
        "on_policy": schedules.constant(1.0),
        "mixed": schedules.constant(student_fraction),
        "adaptive": schedules.adaptive(initial_probability, increment, tolerance, reference),
    }
    source = context.data
    if sampling != "none":
        again = off_policy or sampling == "adaptive_off_policy"
        replay = Replay(context.buffer, REPLAY_RATIO[replay_ratio], fill_first, train_on_fresh) if again else None
        generate: sources.Generate = context.generate
        if response_noise:
            generate = sources.noisy(generate, response_noise, context.num_tokens, context.end_ids, context.seed)
        source = sources.student_rows(
            context.data,
            generate,
            probability=probability["adaptive" if sampling == "adaptive_off_policy" else sampling],
            seed=context.seed,
            end_ids=context.end_ids,
            replay=replay,
            ahead=context.buffer.ahead,
            max_staleness=max_staleness,
        )
    divergence_loss = distill(
        divergence, temperature=temperature, temperature_squared=temperature_squared, top_k=top_k, **parameters
    )
    return Method(source, scaled(kd_weight, divergence_loss) + scaled(1 - kd_weight, nll(origins=REFERENCES)))


def kd(context: Context, *, divergence: str = "forward_kl", sampling: Sampling = "none", **settings: Any) -> Method:
    """KL(p||q) on the dataset's responses."""
    return distillation(context, divergence=divergence, sampling=sampling, **settings)


def imitkd(
    context: Context, *, divergence: str = "forward_kl", sampling: Sampling = "on_policy", **settings: Any
) -> Method:
    """KL(p||q) on the student's responses. ImitKD, arXiv:2009.07253."""
    return distillation(context, divergence=divergence, sampling=sampling, **settings)


def gkd(context: Context, *, divergence: str = "jsd", sampling: Sampling = "mixed", **settings: Any) -> Method:
    """JSD, of weight 0.1 unless set, on the student's responses half of the time. GKD, arXiv:2306.13649."""
    if divergence == "jsd":
        settings.setdefault("beta", 0.1)
    return distillation(context, divergence=divergence, sampling=sampling, **settings)


def distillm(
    context: Context, *, divergence: str = "skew_kl", sampling: Sampling = "adaptive_off_policy", **settings: Any
) -> Method:
    """Skew KL on adaptively chosen, mostly replayed student responses. DistiLLM, arXiv:2402.03898."""
    return distillation(context, divergence=divergence, sampling=sampling, **settings)


def minillm(
    context: Context,
    *,
    teacher_mix: float = 0.2,
    importance: Importance = "token",
    length_normalization: bool = True,
    clip: float | None = 0.2,
    off_policy: bool = False,
    replay_ratio: str = "decreasing",
    max_staleness: int = 0,
) -> Method:
    """Sequence-level reverse KL by policy gradient on teacher-mixed student responses. MiniLLM, arXiv:2306.08543."""

    def generate(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
        return context.generate(prompts, state, steps=steps, teacher_mix=teacher_mix, keep_log_probs=True)

    source = sources.student_rows(
        context.data,
        generate,
        probability=schedules.constant(1.0),
        seed=context.seed,
        end_ids=context.end_ids,
        replay=Replay(context.buffer, REPLAY_RATIO[replay_ratio]) if off_policy else None,
        ahead=context.buffer.ahead,
        max_staleness=max_staleness,
    )
    loss = policy_gradient(importance=importance, length_normalization=length_normalization, clip=clip)
    return Method(source, loss)


def distillm2(
    context: Context,
    *,
    alpha: float = 0.1,
    schedule: Literal["paper", "code"] = "paper",
    detach_mixture: bool = False,
) -> Method:
    """Skew KL on the teacher's and skew reverse KL on the student's responses. DistiLLM-2, arXiv:2503.07067."""

    def teacher(prompts: Sequence[Example], state: State, *, steps: Sequence[int] | None = None) -> list[Example]:
        return context.generate(prompts, state, steps=steps, writer="teacher")

    source = sources.paired(
        context.data, context.steps_per_epoch, context.generate, teacher, context.buffer, context.end_ids
    )
    loss = contrastive(
        alpha=alpha, schedule=schedule, detach_mixture=detach_mixture, first_epoch=context.steps_per_epoch
    )
    return Method(source, loss)


def with_text(method: Method, text: Source, weight: float) -> Method:
    """``method`` and, at every step, ``weight`` times the cross-entropy on a batch of plain text."""
    return Method(sources.beside(method.source, text), method.loss + scaled(weight, nll("text", TEXT)))


# The published name: the share of student steps that generate anew. The others replay.
REPLAY_RATIO = {
    "decreasing": schedules.linear(1.0, 0.0),
    "constant": schedules.constant(0.5),
    "increasing": schedules.linear(0.0, 1.0),
}

METHODS: dict[str, Callable[..., Method]] = {
    "sft": sft,
    "seqkd": sft,
    "kd": kd,
    "imitkd": imitkd,
    "gkd": gkd,
    "minillm": minillm,
    "distillm": distillm,
    "distillm2": distillm2,
}
