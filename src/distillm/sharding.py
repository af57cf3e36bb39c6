"""Weights spread over the processes of a run by FSDP2: each holds its part, and gathers a layer when it is computed.

Gathering is work that all processes share: they have to run a spread model equally often, or make it ``whole`` first.
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .processes import writes

Model = TypeVar("Model", bound=nn.Module)


def can_shard() -> bool:
    """Whether this process was started by a launcher, so that there is a group to spread weights over."""
    return distributed.is_available() and distributed.is_initialized()


def shard(model: Model, device: torch.device, *, offload: bool = False) -> Model:
    """Spread ``model`` in place: its layers one by one, and what is left (embeddings, last norm, head) as one part.

    That part stays gathered from a forward pass to the end of its backward pass, so that a loss may use the
    unembedding. With ``offload`` parts are kept in the memory of the CPU, and the optimizer works there.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for part in [*_layers(model), model]:
        fully_shard(part, mesh=mesh, offload_policy=policy)
    return model


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists: what is inside of a layer, such as experts, may not run in every process."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def sharded(model: nn.Module | None) -> bool:
    """Whether the weights of ``model`` are spread."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(*models: nn.Module) -> Generator[None]:
    """Every process has all weights of ``models`` inside, and runs them as often as it likes, though not to train."""
    with ExitStack() as after:
        for model in models:
            if not isinstance(model, FSDPModule):
                continue
            for part in [m for m in model.modules() if isinstance(m, FSDPModule)]:
                part.unshard()
                part.set_reshard_after_forward(False, recurse=False)
                after.callback(part.reshard)
                if part is not cast(nn.Module, model):
                    after.callback(part.set_reshard_after_forward, True, recurse=False)
        yield


@contextmanager
def within_step(model: nn.Module, *, last: bool) -> Generator[None]:
    """The forward and backward pass of a micro-batch, the ``last`` one of a step or not.

    Replicated weights average their gradients in the last one alone; of spread ones, whose gradients are never whole,
    the part with the unembedding stays gathered until then.
    """
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(last, recurse=False)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread; any other as it is. All processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ``tensors`` in the process that writes, those that were spread on the CPU; nothing in the others."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        entire = full(tensor)
        if writes():
            found[name] = entire if entire is tensor else entire.cpu()
    return found


def like(entire: Tensor, own: Tensor) -> Tensor:
    """``entire``, which every process has, spread as ``own`` is."""
    if not isinstance(own, DTensor):
        return entire
    placed = entire.to(own.device)
    return cast(Any, distribute_tensor)(placed, own.device_mesh, own.placements, src_data_rank=None)
