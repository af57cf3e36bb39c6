"""Compile every kernel for a GPU that need not be there, as the library launches it, and print what came out.

Used by test_triton.py as a program of its own: a process that interprets kernels cannot compile them.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from distillm.divergences import DIVERGENCES
from distillm.kernels import triton_rows
from distillm.types import Head

NUM_TOKENS = 50_257  # odd, as GPT-2's: rows can only be read in wide pieces because they are padded


class NoDriver:
    """Stands for the driver of an NVIDIA GPU of this capability, as far as compiling asks one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


compiled: list[Any] = []


def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
    return lambda *given, **how: compiled.append(kernel.run(*given, grid=grid, warmup=True, **how))


def compile_divergence(name: str, dtype: torch.dtype, softcap: float | None, **parameters: Any) -> None:
    heads = [Head(torch.zeros(2, 8, dtype=dtype), torch.zeros(NUM_TOKENS, 8, dtype=dtype), None, 1.0, softcap)] * 2
    heads[1] = heads[1]._replace(hidden=heads[1].hidden.clone().requires_grad_())
    triton_rows.divergence_rows(DIVERGENCES[name], *heads, torch.ones(2), parameters, None)


def main() -> None:
    driver.set_active(NoDriver(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    rows = torch.tensor([0.0, 0.5])
    for function in triton_rows.TERMS:
        compile_divergence(function.__name__, torch.bfloat16, None)
    compile_divergence("skew_kl", torch.bfloat16, 30.0, alpha=rows)
    compile_divergence("skew_reverse_kl", torch.float16, None, alpha=rows)
    compile_divergence("alpha_beta", torch.float32, None, alpha=0.0)
    compile_divergence("alpha_beta", torch.float32, 30.0, beta=0.0)
    with torch.no_grad():
        compile_divergence("jsd", torch.bfloat16, None)
    for softcap in (None, 30.0):
        student = Head(torch.zeros(2, 8, requires_grad=True), torch.zeros(NUM_TOKENS, 8), None, 1.0, softcap)
        triton_rows.cross_entropy_rows(student, torch.zeros(2, dtype=torch.long), torch.ones(2), None)
    for kernel in compiled:
        loads = [line for line in kernel.asm["ptx"].splitlines() if "ld.global" in line]
        wide = [line for line in loads if ".v4." in line]
        json.dump({"binary": len(kernel.asm["cubin"]), "loads": len(loads), "wide": len(wide)}, sys.stdout)
        sys.stdout.write("\n")


main()
