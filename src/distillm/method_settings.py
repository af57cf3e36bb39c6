"""The settings of each method, and what they mean. Never imports torch."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic would take for 0 or 1, and YAML reads yes and on so
        raise ValueError(f"must be a number; given: {str(value).lower()}")
    return value


Number = BeforeValidator(_number)
PositiveInt = Annotated[int, Field(gt=0), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
PositiveFloat = Annotated[float, Field(gt=0), Number]
NonNegativeFloat = Annotated[float, Field(ge=0), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
OpenFraction = Annotated[float, Field(gt=0, lt=1), Number]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "symmetric_kl",
    "alpha_beta",
    "adaptive_kl",
]
SamplingName = Literal["none", "on_policy", "mixed", "adaptive", "adaptive_off_policy"]
ReplayRatio = Literal["decreasing", "constant", "increasing"]


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class MethodSettings(Section):
    """What all methods are asked; these are the answers of one that trains on the data's rows alone."""

    @property
    def written_share(self) -> float:
        """The share of steps that train on the student's responses; of one that validation moves, a half is assumed."""
        return 0.0

    @property
    def replays(self) -> bool:
        """Whether earlier responses are used again."""
        return False

    @property
    def monitored(self) -> str:
        """What of validations tells whether the student got worse."""
        return "validation_loss"

    def buffer_rows(self, num_prompts: int = 0, num_processes: int = 1) -> int:
        """Rows that are kept to be used again."""
        del num_prompts, num_processes
        return 1


class Sft(MethodSettings):
    """Supervised fine-tuning: cross-entropy on the responses."""

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


class SeqKd(MethodSettings):
    """Sequence-level KD: cross-entropy on the teacher's responses to the training prompts (arXiv:1606.07947)."""

    name: Literal["seqkd"] = "seqkd"
    """Sequence-level KD."""


class Distillation(MethodSettings):
    """A divergence per token, and a way to use what the student itself writes: every cell of the paper's ablations."""

    divergence: DivergenceName
    """The divergence between teacher p and student q, teacher first."""
    alpha: Annotated[float, Field(ge=0), Number] | None = None
    """Skew of skew_kl and skew_reverse_kl (0.1 unless set, below 1): the weight of the first argument inside the
    mixture. Exponent of p in alpha_beta (0.2 unless set)."""
    beta: Annotated[float, Field(ge=0), Number] | None = None
    """Mixing weight of jsd (0.5 unless set, between 0 and 1). Exponent of q in alpha_beta (0.7 unless set)."""
    weight: Fraction | None = None
    """Share of the reverse KL in symmetric_kl (0.5 unless set)."""
    head_mass: OpenFraction | None = None
    """The teacher's mass in the head of a distribution, in adaptive_kl (0.5 unless set)."""
    top_k: PositiveInt | None = None
    """Keep the teacher's so many likeliest tokens apart and put all others into one bucket."""
    temperature: PositiveFloat = 1.0
    """Both models' logits are divided by it inside the divergence; sampling has generation.temperature."""
    temperature_squared: bool = False
    """Multiply the divergence by temperature squared, which keeps the size of its gradient."""
    kd_weight: Fraction = 1.0
    """Weight of the divergence; the rest is cross-entropy on the dataset's rows."""
    sampling: SamplingName = "none"
    """Where rows come from. none: the dataset. on_policy: the student, anew at each step. mixed: the student with
    student_fraction, else the dataset. adaptive: the student with a probability that rises when validation gets worse.
    adaptive_off_policy: so, and most student rows are replayed."""
    student_fraction: Fraction = 0.5
    """mixed: how often a step trains on the student's responses."""
    initial_probability: Fraction = 0.0
    """adaptive: the probability of training on student responses, at first."""
    increment: Fraction = 0.1
    """adaptive: how much it is raised when validation gets worse."""
    tolerance: NonNegativeFloat = 0.1
    """adaptive: how much worse validation must get, in units of what `trigger` monitors."""
    reference: Literal["previous", "last_increase", "best"] = "previous"
    """adaptive: what validation is compared with: the one before (the paper), the last raise (the authors' code), the
    best."""
    trigger: Literal["validation_loss", "validation_divergence", "rouge_l"] = "validation_loss"
    """adaptive: what is monitored; a fall of rouge_l counts as worse."""
    off_policy: bool = False
    """on_policy, mixed and adaptive: replay most of the student's responses instead of generating anew."""
    capacity: PositiveInt = 1000
    """Replay: rows of the buffer."""
    capacity_per_process: bool = False
    """Replay: each of several processes adds so many rows to the buffer, as the authors' code has it; otherwise they
    share them."""
    replay_ratio: ReplayRatio = "decreasing"
    """Replay: the share of student steps that generate anew: 1 - t/T, 0.5, or t/T."""
    fill_first: bool = False
    """Replay: generate at every student step until the buffer is full (the authors' code)."""
    train_on_fresh: bool = False
    """Replay: train on the newly generated rows themselves, not on a sample of the buffer (the authors' code)."""
    max_staleness: NonNegativeInt = 0
    """A step that generates also answers the prompts of the next so many steps, of those that will generate: one large
    batch, many times faster, by a student that is at most so many steps old. 0 is the published algorithm."""
    response_noise: Fraction = 0.0
    """An ablation: this share of the tokens that the student writes is replaced by tokens drawn evenly from the
    vocabulary, ends aside, before a step trains on them."""

    @property
    def written_share(self) -> float:
        """Of an adaptive probability a half."""
        return {"none": 0.0, "on_policy": 1.0, "mixed": self.student_fraction}.get(self.sampling, 0.5)

    @property
    def replays(self) -> bool:
        """By off_policy, or as DistiLLM does."""
        return self.off_policy or self.sampling == "adaptive_off_policy"

    @property
    def monitored(self) -> str:
        """As `trigger` says."""
        return self.trigger

    def buffer_rows(self, num_prompts: int = 0, num_processes: int = 1) -> int:
        """The capacity, where earlier responses are used again."""
        return _capacity(self, num_processes)

    @property
    def adapts(self) -> bool:
        """Whether validation moves the probability of student rows."""
        return self.sampling in ("adaptive", "adaptive_off_policy")

    _parameters: ClassVar[dict[str, tuple[str, ...]]] = {
        "alpha": ("skew_kl", "skew_reverse_kl", "alpha_beta"),
        "beta": ("jsd", "alpha_beta"),
        "weight": ("symmetric_kl",),
        "head_mass": ("adaptive_kl",),
    }
    _adaptive: ClassVar = ("initial_probability", "increment", "tolerance", "reference", "trigger")
    _replay: ClassVar = ("capacity", "capacity_per_process", "replay_ratio", "fill_first", "train_on_fresh")

    @model_validator(mode="after")
    def _fits(self) -> "Distillation":
        for name, divergences in self._parameters.items():
            if getattr(self, name) is not None and self.divergence not in divergences:
                raise ValueError(f"{name} belongs to {' and '.join(divergences)}, not to {self.divergence}")
        if self.divergence in ("skew_kl", "skew_reverse_kl") and self.alpha is not None and self.alpha >= 1:
            raise ValueError(f"alpha is {self.alpha}, and the skew of {self.divergence} is below 1")
        if self.divergence == "jsd" and self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}, and the mixing weight of jsd is between 0 and 1")
        if self.divergence == "alpha_beta" and self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta of alpha_beta cannot both be 0")
        if self.temperature_squared and self.temperature == 1:
            raise ValueError("temperature_squared does nothing at temperature 1")
        if self.sampling == "on_policy" and self.kd_weight < 1:
            raise ValueError("kd_weight below 1 needs the dataset's rows for its cross-entropy, on_policy has none")
        if self.sampling != "none" and self.kd_weight == 0:
            raise ValueError("kd_weight=0 leaves nothing to learn from the student's responses; leave sampling out")
        if self.off_policy and self.sampling in ("none", "adaptive_off_policy"):
            raise ValueError(f"off_policy says nothing about sampling={self.sampling}; leave it out")
        if self.sampling == "none" and self.max_staleness:
            raise ValueError("max_staleness is of responses that the student writes, and sampling is none")
        if self.sampling == "none" and self.response_noise:
            raise ValueError("response_noise is in responses that the student writes, and sampling is none")
        self._unused(("student_fraction",), self.sampling == "mixed", "sampling=mixed")
        self._unused(self._adaptive, self.adapts, "an adaptive sampling")
        self._unused(self._replay, self.replays, "replay (off_policy=true or sampling=adaptive_off_policy)")
        return self

    def _unused(self, names: tuple[str, ...], used: bool, owner: str) -> None:
        """Raise ValueError for a setting that was changed and has no effect."""
        for name in names:
            if not used and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to {owner}, and sampling is {self.sampling}")


class Kd(Distillation):
    """Knowledge distillation on the dataset's responses, published with KL(p||q)."""

    name: Literal["kd"] = "kd"
    """Knowledge distillation."""
    divergence: DivergenceName = "forward_kl"
    """The divergence, teacher first; KL(p||q) as published."""


class ImitKd(Distillation):
    """Imitation: KL(p||q) on the student's own responses (arXiv:2009.07253)."""

    name: Literal["imitkd"] = "imitkd"
    """Imitation."""
    divergence: DivergenceName = "forward_kl"
    """The divergence, teacher first; KL(p||q) as published."""
    sampling: SamplingName = "on_policy"
    """on_policy as in the paper's comparison; mixed, with student_fraction 0.5, is common too; see kd."""


class Gkd(Distillation):
    """Generalized KD: JSD on the student's responses with probability 0.5, else the dataset's (arXiv:2306.13649)."""

    name: Literal["gkd"] = "gkd"
    """Generalized KD."""
    divergence: DivergenceName = "jsd"
    """The divergence, teacher first; jsd as published."""
    beta: Annotated[float, Field(ge=0), Number] | None = None
    """Mixing weight of jsd (0.1 unless set, as in the paper's comparison); exponent of q in alpha_beta."""
    sampling: SamplingName = "mixed"
    """mixed as published; see kd for the others."""


class Distillm(Distillation):
    """DistiLLM: a skew KL on adaptively chosen, mostly replayed student responses (arXiv:2402.03898)."""

    name: Literal["distillm"] = "distillm"
    """DistiLLM."""
    divergence: DivergenceName = "skew_kl"
    """skew_kl or skew_reverse_kl as published; any other as an ablation."""
    sampling: SamplingName = "adaptive_off_policy"
    """adaptive_off_policy as published; the others as ablations, see kd."""


class MiniLlm(MethodSettings):
    """MiniLLM: reverse KL of whole responses, by policy gradient (arXiv:2306.08543)."""

    name: Literal["minillm"] = "minillm"
    """MiniLLM."""
    teacher_mix: Annotated[float, Field(ge=0, lt=1), Number] = 0.2
    """The teacher's share of the distribution that responses are drawn from."""
    importance: Literal["token", "product"] = "token"
    """The weight of a token: its own ratio (published), or the product of the ratios up to it (unbiased)."""
    length_normalization: bool = True
    """Divide the rewards after a token by their number."""
    clip: OpenFraction | None = 0.2
    """How far a ratio may be from 1 and still be gained from; null does not clip."""
    off_policy: bool = False
    """Replay most responses instead of generating anew."""
    capacity: PositiveInt = 1000
    """Replay: rows of the buffer."""
    capacity_per_process: bool = False
    """Replay: each of several processes adds so many rows to the buffer, as the authors' code has it; otherwise they
    share them."""
    replay_ratio: ReplayRatio = "decreasing"
    """Replay: the share of steps that generate anew: 1 - t/T, 0.5, or t/T."""
    max_staleness: NonNegativeInt = 0
    """As in distillm: answer the prompts of the next so many steps at once; 0 writes at each step with the student as
    it is. The importance weights then correct for the age."""

    @property
    def written_share(self) -> float:
        """All."""
        return 1.0

    @property
    def replays(self) -> bool:
        """By off_policy."""
        return self.off_policy

    def buffer_rows(self, num_prompts: int = 0, num_processes: int = 1) -> int:
        """The capacity, where earlier responses are used again."""
        return _capacity(self, num_processes)

    @model_validator(mode="after")
    def _fits(self) -> "MiniLlm":
        for name in ("capacity", "capacity_per_process", "replay_ratio"):
            if not self.off_policy and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to off_policy=true")
        return self


def _capacity(method: Distillation | MiniLlm, num_processes: int) -> int:
    return method.capacity * (num_processes if method.capacity_per_process else 1) if method.replays else 1


class Distillm2(MethodSettings):
    """DistiLLM-2: skew KL on the teacher's and skew reverse KL on the student's responses (arXiv:2503.07067)."""

    name: Literal["distillm2"] = "distillm2"
    """DistiLLM-2."""
    alpha: OpenFraction = 0.1
    """The skew; with schedule=paper that of the first epoch, and the largest."""
    schedule: Literal["paper", "code"] = "paper"
    """paper: a skew for each response, and a weight of the student's that rises from 0.5 to 1. code: one skew for all,
    both weights 1."""
    detach_mixture: bool = False
    """Let no gradient flow through the mixture inside the skew reverse KL (the authors' code)."""

    @property
    def written_share(self) -> float:
        """All: half of the rows of each step."""
        return 1.0

    def buffer_rows(self, num_prompts: int = 0, num_processes: int = 1) -> int:
        """An epoch's responses, two for each prompt."""
        return 2 * num_prompts


Method = Annotated[
    Sft | SeqKd | Kd | ImitKd | Gkd | MiniLlm | Distillm | Distillm2,
    Field(discriminator="name"),
]
