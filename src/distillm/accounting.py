"""Where a run's time goes, and what it computes for it: seconds by part, and floating-point operations."""

import math
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

OTHER = "other"


class Account:
    """Seconds of each part, without those of the parts inside it, and the operations of both models.

    On a GPU a part begins and ends at a mark in its stream, and the marks are read by ``settle``: nothing waits for
    the device before. What belongs to no part is "other". Operations are those of the matrix products that the rows
    need: forward twice a weight and token, backward twice that (a frozen weight's half), heads at target tokens alone;
    neither padding nor attention's own products count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flops = 0
        self.seconds: dict[str, float] = {}
        self._parts: list[str] = []
        self._whole = False
        self._marks: list[tuple[str, Any]] = [(OTHER, self._mark())]

    @contextmanager
    def part(self, name: str, whole: bool) -> Generator[None]:
        """What is inside is ``name``'s; with ``whole``, all of it, whatever parts it has."""
        if self._whole:
            yield
            return
        self._end()
        self._parts.append(name)
        self._whole = whole
        try:
            yield
        finally:
            self._end()
            self._parts.pop()
            self._whole = False

    def settle(self) -> None:
        """Read the marks, waiting for what the device has been given: for where it has been waited for anyhow."""
        self._end()
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (_, begun), (name, ended) in pairwise(self._marks):
            took = begun.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._marks = self._marks[-1:]

    def take(self) -> tuple[dict[str, float], int]:
        """Seconds by part and operations since the last call."""
        self.settle()
        taken = self.seconds, self.flops
        self.seconds, self.flops = {}, 0
        return taken

    def _end(self) -> None:
        self._marks.append((self._parts[-1] if self._parts else OTHER, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)


def account_for(device: str) -> Account:
    """An account of what a run on ``device`` does: auto, cuda, mps or cpu."""
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    return Account(torch.device("cuda" if cuda else "cpu"))


@contextmanager
def kept_by(account: Account) -> Generator[None]:
    """``account`` is told of the parts inside."""
    token = _ACCOUNT.set(account)
    try:
        yield
    finally:
        _ACCOUNT.reset(token)


@contextmanager
def part(name: str, whole: bool = False) -> Generator[None]:
    """A part of the work, for whoever keeps account of it."""
    account = _ACCOUNT.get()
    if account is None:
        yield
    else:
        with account.part(name, whole):
            yield


def settle() -> None:
    """Let whoever keeps account read the marks: the device has been waited for."""
    account = _ACCOUNT.get()
    if account is not None:
        account.settle()


def taken() -> tuple[dict[str, float], int]:
    """What was kept account of since the last call: nothing where nobody does."""
    account = _ACCOUNT.get()
    return ({}, 0) if account is None else account.take()


def computed(model: nn.Module, *, tokens: Iterable[tuple[int, int]], logits: int, trained: bool = False) -> None:
    """``model`` read rows, each of so many prompt and response tokens, and formed ``logits`` rows of logits."""
    account = _ACCOUNT.get()
    if account is None:
        return
    of_prompt, of_response, of_logit = _operations(model, trained)
    account.flops += of_logit * logits + sum(of_prompt * prompt + of_response * response for prompt, response in tokens)


_OPERATIONS: WeakKeyDictionary[Any, dict[bool, tuple[int, int, int]]] = WeakKeyDictionary()


def _operations(model: Any, trained: bool) -> tuple[int, int, int]:
    """For a token of the prompt, one of the response, and a row of logits; with the backward pass where ``trained``."""
    known = _OPERATIONS.setdefault(model, {})
    if trained in known:
        return known[trained]
    experts = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", None)

    def operations(weights: Iterable[Any]) -> int:
        # Forward two a weight, in the backward pass two for what it was fed, and two for itself where it is trained.
        return sum(_met(w, experts) * (2 if not trained else 6 if w.requires_grad else 4) for w in weights)

    output = model.get_output_embeddings()
    of_encoder = of_others = 0
    for name, module in model.named_modules():
        if module is output or isinstance(module, nn.Embedding):
            continue
        count = operations(module.parameters(recurse=False))
        if "encoder" in name.split("."):
            of_encoder += count
        else:
            of_others += count
    of_logit = 0 if output is None else operations([output.weight])
    if not model.config.is_encoder_decoder:  # BERT-like causal models have their layers in an "encoder" too
        of_encoder = of_others = of_encoder + of_others
    known[trained] = of_encoder, of_others, of_logit
    return known[trained]


def _met(weight: Any, experts: int | None) -> int:
    """How many numbers of a matrix meet a token: of several experts' matrices, so many experts'."""
    packed = getattr(weight, "quant_state", None)  # 4 bits: two to a byte
    shape = weight.shape if packed is None else packed.shape
    if len(shape) == 3 and experts is not None:
        return min(experts, shape[0]) * shape[1] * shape[2]
    return math.prod(shape) if len(shape) == 2 else 0


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far, of the device where it has its own; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@cache
def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a large product reaches here, the best of three; None where nothing tells its time."""
    if device.type not in ("cpu", "cuda"):
        return None
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # the run's own draws stay what they are
    a = torch.randn(size, size, generator=own, device=device).to(dtype)
    account, times = Account(device), list[float]()
    for _ in range(4):
        account.take()
        torch.mm(a, a)
        times.append(sum(account.take()[0].values()))
    return 2 * size**3 / min(times[1:])
