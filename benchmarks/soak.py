"""Does a long run grow? Thousands of steps of tiny models, with what the process and its folders hold sampled.

    python benchmarks/soak.py --output soak.json

A DistiLLM run with generation, replay, validation, checkpoints that are retained, and a teacher cache on disk that is
too small for its rows, so that states are evicted all the time. The first quarter of the samples is warm-up. Flat means
that the median of the last quarter exceeds that of the second by no more than a bound, and that a straight line
through the last three quarters rises by no more than it: 2 % of bytes, 0.2 % of Python's memory blocks (most of which
are the imported modules). Handles and threads may not rise at all; the cache stays within its limit and goes on
evicting. The logs (metrics.jsonl, samples.jsonl) grow with the steps by design and are told apart. Exit code 1 where
something grows.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table
from transformers.utils import logging

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the tiny models and their rows

from distillm.display import Display
from distillm.pipeline import distill
from measure import begin, parser, write
from tiny_run import materials, rows, tiny_run, write_rows

MOST = 0.02
ALLOWED = {"resident_bytes": MOST, "python_blocks": MOST / 10, "handles": 0.0, "threads": 0.0, "folder_bytes": MOST}
LOGS = ("metrics.jsonl", "samples.jsonl")


def held(folder: Path, cache: Path) -> dict[str, int]:
    """What this process and its folders hold now."""
    gc.collect()
    process = psutil.Process()
    return {
        "resident_bytes": process.memory_info().rss,
        "python_blocks": sys.getallocatedblocks(),
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "folder_bytes": _bytes(folder) - sum(_bytes(folder / name) for name in LOGS),
        "cache_bytes": _bytes(cache),
        "log_bytes": sum(_bytes(folder / name) for name in LOGS),
    }


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


class Watch(Display):
    """Says nothing, and samples at every ``every``-th training step."""

    def __init__(self, every: int, sample: Callable[[], dict[str, int]]):
        super().__init__(quiet=True)
        self.every, self.measure = every, sample
        self.steps: list[int] = []
        self.samples: list[dict[str, int]] = []

    def of(self, name: str) -> list[int]:
        """One figure, sample by sample."""
        return [sample[name] for sample in self.samples]

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Generator[Callable[..., None]]:
        def advance(step: int, *_: object) -> None:
            if name == "train" and step % self.every == 0:
                self.steps.append(step)
                self.samples.append(self.measure())

        yield advance


def judged(values: Sequence[int], most: float = MOST) -> dict[str, Any]:
    """The medians of the second and the last quarter, the rise of a straight line, and whether that is flat."""
    quarter = len(values) // 4
    second, last, warm = values[quarter : 2 * quarter], values[-quarter:], values[quarter:]
    before, after = statistics.median(second), statistics.median(last)
    rise = statistics.linear_regression(range(len(warm)), warm).slope * (len(warm) - 1)
    flat = after <= before * (1 + most) and rise <= before * most
    if not most:  # a straight line through whole numbers may rise by a rounding error
        flat = max(last) <= max(second)
    return {"second_quarter": before, "last_quarter": after, "line_rises_by": round(rise, 1), "flat": flat}


def within(sizes: Sequence[int], evicted: Sequence[int], bound: int) -> bool:
    """Whether the cache kept to its bound, and was still evicting in the last quarter of the run.

    Its own count leaves out the headers of files, which matter where files are tiny: hence a twentieth more.
    """
    return max(sizes) <= bound * 1.05 and sum(evicted[-(len(evicted) // 4) :]) > 0


def soak(folder: Path, steps: int, every: int, cache_bytes: int) -> dict[str, Any]:
    """A run of ``steps`` steps in ``folder``: its samples, and what they come to."""
    made = materials(folder)
    write_rows(made / "train.jsonl", rows(48))
    cache, output = folder / "cache", folder / "run"
    run = tiny_run(made, output, {
        "train.steps": steps, "validation.every": 20, "checkpoint.every": 10, "data.test": {},
        # Half of the batches are the student's, half of those from the buffer, to the end of the run.
        "method.capacity": 24, "method.initial_probability": 0.5, "method.tolerance": 1e9,
        "teacher.cache": "disk", "teacher.cache_folder": str(cache), "teacher.cache_gib": cache_bytes / 2**30,
    })  # fmt: skip
    before: set[Path] = set()

    def sample() -> dict[str, int]:
        nonlocal before
        there = set(cache.rglob("*.safetensors"))
        gone, before = len(before - there), there
        return held(output, cache) | {"evicted_files": gone}

    watch, begun = Watch(every, sample), time.monotonic()
    distill(run, watch)
    found = {name: judged(watch.of(name), most) for name, most in ALLOWED.items()}
    sizes, evicted, logs = watch.of("cache_bytes"), watch.of("evicted_files"), watch.of("log_bytes")
    found["cache_bytes"] = judged(sizes) | {"flat": within(sizes, evicted, cache_bytes)}
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "cache_limit": cache_bytes,
        "evicted_files": sum(evicted),
        "log_bytes_per_step": round((logs[-1] - logs[0]) / (watch.steps[-1] - watch.steps[0]), 1),
        "results": found,
        "steps": watch.steps,
        "samples": {name: watch.of(name) for name in watch.samples[0]},
    }


def main() -> int:
    """Print the table, write the file; 1 where something grows."""
    asked = parser(__doc__)
    asked.add_argument("--steps", type=int, default=2000)
    asked.add_argument("--every", type=int, default=20, help="steps between samples")
    asked.add_argument("--cache-bytes", type=int, default=20_000, help="the most that the cache on disk may hold")
    options: argparse.Namespace = asked.parse_args()
    logging.set_verbosity_error()
    console, described = begin(options, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.steps, options.every, options.cache_bytes)
    table = Table("Figure", "Second quarter", "Last quarter", "A line rises by", "Flat")
    for name, one in found["results"].items():
        numbers = (f"{one[key]:,.0f}" for key in ("second_quarter", "last_quarter", "line_rises_by"))
        table.add_row(name, *numbers, "yes" if one["flat"] else "NO")
    console.print(table)
    console.print(f"{found['seconds']} s, {found['evicted_files']} files seen to be evicted")
    console.print(f"the logs grow by {found['log_bytes_per_step']} bytes a step")
    write(options, described, **found)
    return 0 if all(one["flat"] for one in found["results"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
