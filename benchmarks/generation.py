"""Tokens a second: responses in bulk beside transformers' ``generate`` and its continuous batching, the same sampling.

    python benchmarks/generation.py                         # GPT-2's vocabulary, 4 layers of 256, 64 + 64 tokens
    python benchmarks/generation.py --device cuda --rows 1024

The weights are random: what a token costs does not depend on them. In one table no row ends before its last token; in
the other about one token in 40 is an end, so that rows end at different lengths. Only tokens up to a row's end count.
Contenders take turns; rates are medians, by CPU seconds on a CPU and events on a GPU.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.models.gpt2 import GPT2Config
from transformers.utils import logging

from distillm import Example, Layout, Sampling, generate
from measure import DTYPES, begin, parser, seconds, write

VOCABULARY, LENGTH = 50_257, 64
Contender = Callable[[], int]
"""Writes all responses; returns their tokens."""


def prompts(rows: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator).tolist()
    return [Example(id=str(number), tokens=row, targets=[False] * LENGTH) for number, row in enumerate(ids)]


def ours(model: PreTrainedModel, given: list[Example], ends: list[int], batch_size: int) -> int:
    written = generate(
        model,
        given,
        Sampling(max_new_tokens=LENGTH),
        layout=Layout(pad_id=0),
        end_ids=ends,
        num_tokens=VOCABULARY,
        batch_size=batch_size,
    )
    return sum(len(example.tokens) - LENGTH for example in written)


def transformers_generate(model: Any, given: list[Example], ends: list[int], batch_size: int) -> int:
    total, last = 0, torch.tensor(ends, device=model.device)
    for at in range(0, len(given), batch_size):
        ids = torch.tensor([example.tokens for example in given[at : at + batch_size]], device=model.device)
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": ends or None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, **how)[:, LENGTH:]
        ended = torch.isin(out, last)
        total += int((ended.cumsum(1) - ended.int() == 0).sum())  # up to a row's first end, and with it
    return total


def continuous_batching(model: Any, given: list[Example], ends: list[int], batch_size: int) -> int:
    """Transformers' own engine, whose rows come and go; its cache takes no more pages than the rows can fill.

    Each call begins and ends the engine, as a step of training would have to, whose weights have changed.
    """
    paged = ContinuousBatchingConfig(
        num_blocks=2 * batch_size, page_size=LENGTH, max_batch_tokens=2048, max_requests_per_batch=batch_size,
        allow_block_sharing=False,
    )  # fmt: skip
    how = GenerationConfig(do_sample=True, max_new_tokens=LENGTH, pad_token_id=0, eos_token_id=ends or -1)
    out = model.generate_batch([example.tokens for example in given], how, paged)
    assert len(out) == len(given)
    assert not any(written.error for written in out.values())
    return sum(len(written.generated_tokens) for written in out.values())


def contenders(model: PreTrainedModel, given: list[Example], ends: list[int], sizes: list[int]) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for kind, function in (("transformers generate", transformers_generate), ("ours", ours)):
        found |= {f"{kind}, batches of {size}": partial(function, model, given, ends, size) for size in sizes}
    most = max(sizes)
    name = f"transformers continuous batching, {most} at a time"
    return found | {name: partial(continuous_batching, model, given, ends, most)}


def compare(found: dict[str, Contender], options: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in found}
    written: dict[str, int] = {}
    for turn in range(options.repetitions + 1):
        with console.status(f"repetition {turn} of {options.repetitions}") as status:
            for name, contender in found.items():
                status.update(f"repetition {turn} of {options.repetitions}: {name}")
                took = seconds(lambda n=name, c=contender: written.update({n: c()}), options.device)
                if turn:  # the first one warms up
                    rates[name].append(written[name] / took)
    return rates


def show(title: str, rates: dict[str, list[float]], console: Console) -> list[dict[str, Any]]:
    table, results = Table(title=title), []
    for column in ("", "ratio", "tokens/s", "least", "most"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    floor = statistics.median(next(iter(rates.values())))
    for name, found in rates.items():
        median = statistics.median(found)
        table.add_row(name, f"{median / floor:.2f}", *(f"{x:,.0f}" for x in (median, min(found), max(found))))
        results.append({"name": name, "ratio": median / floor, "tokens_per_second": found})
    console.print(table)
    return results


def parse() -> argparse.Namespace:
    asked = parser(__doc__)
    asked.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked.add_argument("--dtype", choices=list(DTYPES), default="float32")
    asked.add_argument("--layers", type=int, default=4)
    asked.add_argument("--width", type=int, default=256)
    asked.add_argument("--rows", type=int, default=128)
    asked.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128])
    asked.add_argument("--repetitions", type=int, default=3)
    return asked.parse_args()


def main() -> None:
    options = parse()
    console, described = begin(options, options.device)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=max(options.width // 64, 1))
    model = AutoModelForCausalLM.from_config(config).to(options.device, DTYPES[options.dtype]).eval()
    given, tables = prompts(options.rows), {}
    for title, ends in {"all rows to their last token": [], "rows end": list(range(0, VOCABULARY, 40))}.items():
        rates = compare(contenders(model, given, ends, options.batch_sizes), options, console)
        tables[title] = show(title, rates, console)
    write(options, described, results=tables)


if __name__ == "__main__":
    main()
