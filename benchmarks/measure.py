"""What the benchmarks measure with: time, memory, the speed that the machine reaches, and what the machine is."""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(about: str | None) -> argparse.ArgumentParser:
    """With what every benchmark has to ask."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=1, help="of a CPU")
    made.add_argument("--output", type=Path, help="write machine, settings and results there, as JSON")
    return made


def contenders(asked: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Ask for a teacher, rows, and which of ``names`` are to run; each runs in a process of its own (`in_turn`)."""
    asked.add_argument("teacher", help="a model folder or GGUF file")
    asked.add_argument("--data", required=True, help="JSON Lines of instruction, input and output")
    asked.add_argument("--only", nargs="+", default=[*names], choices=[*names], metavar="CONTENDER")
    asked.add_argument("--one", help=argparse.SUPPRESS)


def in_turn(
    options: argparse.Namespace,
    device: str,
    one: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, dict[str, Any]], Console], None],
    launched: Callable[[str], list[str]] = lambda _: [],
    lines: int = 1,
) -> None:
    """What ``one`` finds of each contender, shown and written as it comes; of one that fails, its last ``lines``.

    ``launched`` are words between Python and the script, for those that a launcher starts.
    """
    if options.one:
        torch.set_num_threads(options.threads)
        sys.stdout.write("\n" + json.dumps(one(options)) + "\n")
        return
    (console, described), results = begin(options, device), dict[str, dict[str, Any]]()
    for name in options.only:
        with console.status(name):
            command = [sys.executable, *launched(name), *sys.argv, "--one", name]
            told = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        said = (told.stdout if told.returncode == 0 else told.stderr).strip().splitlines()
        results[name] = json.loads(said[-1]) if told.returncode == 0 else {"why": "\n".join(said[-lines:]) or "failed"}
        show(results, console)
        for failed, result in results.items():
            if "why" in result:
                console.print(f"{failed}: {result['why']}", markup=False)
        write(options, described, results=results)


def begin(options: argparse.Namespace, device: str) -> tuple[Console, dict[str, Any]]:
    """Where to print, and the machine, which is printed first."""
    torch.set_num_threads(options.threads)
    console, described = Console(width=None if sys.stdout.isatty() else 120), machine(device)
    console.print(", ".join(f"{key} {value}" for key, value in described.items()), markup=False)
    return console, described


def write(options: argparse.Namespace, described: dict[str, Any], **results: Any) -> None:
    """``results``, what was asked and the machine, where they were asked for."""
    if options.output:
        asked = {key: str(value) for key, value in vars(options).items() if key != "output"}
        report = {"machine": described, "settings": asked, **results}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.process_time()
    call()
    return time.process_time() - begun


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes beside what was there before; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free but kept would be used again and not be counted
    reset.write_text("5", encoding="ascii")  # the highest resident size begins anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def peaks(device: str, dtype: str) -> tuple[float, float]:
    """What a large square product reaches, in operations, and a large copy, in bytes, a second of the table's clock."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    products = [seconds(lambda: a @ a, device) for _ in range(7)]
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copies = [seconds(lambda: target.copy_(source), device) for _ in range(7)]
    return 2 * size**3 / min(products[2:]), 2 * source.nbytes / min(copies[2:])


def machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (told := Path("/proc/cpuinfo")).exists():
        models = [line.split(":")[1].strip() for line in told.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    installed = {found.name.lower().replace("-", "_"): found.version for found in distributions()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: installed.get(name, "not installed") for name in ("torch", "triton", "trl", "liger_kernel")},
    }
