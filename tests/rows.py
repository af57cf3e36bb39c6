"""Random rows, pairs of tiny models and the running of steps on them, for the tests of everything that trains."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from distillm.methods import Context, Method
from distillm.models import freeze, head_of
from distillm.readers import LocalTeacher
from distillm.schedules import Schedule, constant
from distillm.scoring import Pair
from distillm.sources import Draw, ReplayBuffer
from distillm.train import Step, training_steps
from distillm.types import Example, State
from kept_states import NUM_TOKENS, row, tokens
from tiny import layout_for, tiny_model


def prompts(*lengths: int) -> list[Example]:
    return [row(i, length, 0) for i, length in enumerate(lengths)]


def text_row(number: int, length: int) -> Example:
    return Example(f"text:{number}", tokens(900 + number, length), [False] + [True] * (length - 1), "text")


def pair_of(student: Any, teacher: Any | None, pad_id: int = 0, num_tokens: int = NUM_TOKENS) -> Pair:
    student.requires_grad_(True)
    cpu, said = torch.device("cpu"), None
    if teacher is not None:
        said = LocalTeacher(teacher, head_of(freeze(teacher)), layout_for(teacher, pad_id), cpu)
    return Pair(student, head_of(student), said, num_tokens, layout_for(student, pad_id), cpu)


def teacher_of(pair: Pair) -> Any:
    """The model that is the teacher in ``pair``."""
    assert isinstance(pair.teacher, LocalTeacher)
    return pair.teacher.model


def tiny_pair(
    kind: str = "llama", dtype: torch.dtype = torch.float64, teacher_kind: str = "llama", **config: Any
) -> Pair:
    """A student and a wider vocabulary's teacher; both are padded beyond the tokens they share."""
    student = tiny_model(kind, vocab_size=NUM_TOKENS + 3, layers=1, seed=1, **config)
    teacher = tiny_model(teacher_kind, vocab_size=NUM_TOKENS + 7, seed=2)
    return pair_of(student.to(dtype), teacher.to(dtype))


def fixed(*batches: Sequence[Example]) -> Any:
    """A source that yields these batches in turn."""
    return lambda state: Draw(list(batches[state.step % len(batches)]))


def context(source: Any, generate: Any = None, capacity: int = 100, seed: int = 0) -> Context:
    return Context(source, 2, generate, ReplayBuffer(capacity), seed, [1], NUM_TOKENS)


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients and learning rates it was given."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, lr=123.0)
        self.gradients: list[list[torch.Tensor]] = []
        self.rates: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        every = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every])
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def one_step(pair: Pair, method: Method, micro_batch_size: int = 3, **options: Any) -> tuple[Step, list[Any]]:
    """The step and its gradients, in the order of the student's parameters; the weights stay as they are."""
    optimizer = Recorder(pair.student.parameters())
    step = next(steps_of(pair, method, optimizer, State(total_steps=4), 0.0, micro_batch_size, **options))
    return step, optimizer.gradients[0]


def steps_of(
    pair: Pair,
    method: Method,
    optimizer: Any,
    state: State,
    rate: float | Schedule,
    micro_batch_size: int = 3,
    max_grad_norm: float = 1e9,
    mixed_precision: str = "no",
) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision would be kept
    return training_steps(
        pair,
        method,
        optimizer,
        state,
        accelerator=Accelerator(cpu=True, mixed_precision=mixed_precision),
        learning_rate=rate if callable(rate) else constant(rate),
        micro_batch_size=micro_batch_size,
        max_grad_norm=max_grad_norm,
    )
