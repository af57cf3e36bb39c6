"""Heads to compare the implementations on, and what they may cost."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distillm.types import Head

BUDGET = 60_000  # several chunks and blocks at the sizes below
WEIGHT_OF = {"jsd": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha", "symmetric_kl": "weight"}
SIZES = [(1, 7, 3), (13, 101, 5), (37, 257, 11), (5, 1, 2)]
HEADS = [
    {},
    {"bias": True},
    {"scale": 0.37},
    {"softcap": 5.0},
    {"bias": True, "scale": 1.7, "softcap": 3.0},
    {"raw": True},
]


def jeffreys_half(p: Tensor, q: Tensor, power: float | Tensor = 1.0) -> Tensor:
    """A divergence that the library does not name."""
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) * (power if isinstance(power, float) else power[..., 0])


def make_head(
    seed: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = False,
    raw: bool = False,
    **rest: Any,
) -> Head:
    num_rows, num_tokens, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    if raw:
        return Head(parameter(num_rows, num_tokens), None)
    return Head(
        parameter(num_rows, width), parameter(num_tokens, width), parameter(num_tokens) if bias else None, **rest
    )


def parameters_of(head: Head) -> list[Tensor]:
    return [x for x in head[:3] if isinstance(x, Tensor)]


def results(loss: Callable[[], tuple[Tensor, Tensor]], student: Head) -> list[Tensor]:
    """The scalar, the values per row and the gradients, all scaled by an upstream factor."""
    total, values = loss()
    assert not values.requires_grad
    return [total.detach(), values, *torch.autograd.grad(total * 0.7, parameters_of(student))]


def rounded(*heads: Head) -> list[Head]:
    return [Head(*(None if x is None else x.detach().bfloat16() for x in head[:3])) for head in heads]


def addmm_flops(total: torch.Size, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        loss = run()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators made and that live at once, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in inputs | self.live.keys():
                self.live[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_beside_gradients(run: Callable[[], Tensor], student: Head) -> int:
    with PeakMemory() as memory:
        loss = run()
        loss.backward()
    return memory.peak - sum(x.grad.nbytes for x in parameters_of(student) if x.grad is not None)
