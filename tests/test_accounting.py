"""Where the time of a run goes: parts, operations, and what the report says of them."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distillm.accounting import Account, computed, kept_by, part, peak_bytes, peak_rate
from distillm.adapters import add_adapter
from distillm.config import read_yaml
from distillm.pipeline import distill
from tiny import tiny_causal, tiny_seq2seq
from tiny_run import lines, materials, tiny_run

CPU = torch.device("cpu")
TICK = 0.02


def busy(ticks: int) -> None:
    time.sleep(ticks * TICK)


def test_a_part_has_its_own_time_without_that_of_the_parts_inside() -> None:
    account = Account(CPU)
    with kept_by(account):
        busy(1)
        with part("outer"):
            busy(2)
            with part("inner"):
                busy(4)
            busy(1)
        with part("inner"):
            busy(1)
    seconds, _ = account.take()
    assert set(seconds) == {"other", "outer", "inner"}
    assert [round(seconds[name] / TICK) for name in ("other", "outer", "inner")] == pytest.approx([1, 3, 5], abs=2)
    assert account.take()[0].get("outer") is None


def test_a_whole_part_has_the_time_of_what_is_inside() -> None:
    account = Account(CPU)
    with kept_by(account), part("validation", whole=True):
        with part("teacher"):
            busy(2)
        with part("generation"):
            busy(1)
    seconds, _ = account.take()
    assert "teacher" not in seconds
    assert seconds["validation"] >= 3 * TICK


def test_parts_end_with_an_error_and_no_account_is_needed() -> None:
    account = Account(CPU)
    with part("nobody counts"):
        pass
    with pytest.raises(ValueError, match="mine"), kept_by(account), part("failed", whole=True):
        raise ValueError("mine")
    with kept_by(account), part("after"):
        busy(1)
    assert account.take()[0]["after"] >= TICK


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_operations_are_those_of_the_products(kind: str) -> None:
    model, length = tiny_causal(kind), 7
    ids = torch.randint(5, 50, (1, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    account = Account(CPU)
    with kept_by(account):
        computed(model, tokens=[(3, length - 3)], logits=length)
    assert account.take()[1] == products
    with kept_by(account):
        computed(model, tokens=[(3, length - 3)], logits=length, trained=True)
    assert account.take()[1] == 3 * products


def operations(model: Any, *, trained: bool) -> int:
    account = Account(CPU)
    with kept_by(account):
        computed(model, tokens=[(1, 0)], logits=0, trained=trained)
    return account.take()[1]


def test_frozen_weights_take_no_gradient() -> None:
    model = tiny_causal("llama")
    forward = operations(model, trained=False)
    frozen = add_adapter(tiny_causal("llama"), r=2, alpha=4, dropout=0.0, targets=None, seed=0)
    adapter = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    assert operations(frozen, trained=True) == 2 * forward + 6 * adapter


def test_a_token_meets_the_experts_it_is_sent_to() -> None:
    model = tiny_causal("qwen3_moe")
    ids = torch.randint(5, 50, (1, 1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    experts = [p for p in model.parameters() if p.ndim == 3]  # whose products the counter does not know
    assert len(experts) == 4
    account = Account(CPU)
    with kept_by(account):
        computed(model, tokens=[(1, 0)], logits=1)
    assert account.take()[1] == counted + sum(2 * p[:2].numel() for p in experts)


def test_an_encoder_reads_the_prompt_and_a_decoder_the_response() -> None:
    model = tiny_seq2seq("t5")
    encoder = sum(p.numel() for n, p in model.encoder.named_parameters() if p.ndim == 2 and "embed" not in n
                  and "relative" not in n)  # fmt: skip
    account = Account(CPU)
    with kept_by(account):
        computed(model, tokens=[(5, 0), (2, 0)], logits=0)
    assert account.take()[1] == 2 * 7 * encoder


def test_a_run_says_where_its_time_went(tmp_path: Path) -> None:
    run = tiny_run(materials(tmp_path), tmp_path / "run", {"teacher.cache": "off"})
    began = time.perf_counter()
    folder = distill(run)
    wall = time.perf_counter() - began
    times = lines(folder / "metrics.jsonl", "time")
    parts = {
        name: sum(entry["seconds"].get(name, 0) for entry in times) for entry in times for name in entry["seconds"]
    }
    expected = {"data", "loading", "student forward", "student backward", "loss", "optimizer", "teacher"}
    assert expected | {"validation", "saving", "scoring", "other"} <= set(parts)
    assert 0.5 * wall < sum(parts.values()) <= wall
    assert parts["other"] < 0.5 * wall
    assert all(entry["flops"] > 0 for entry in times[:-1])
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("student backward", "teacher", "scoring"):
        assert parts[name] < 0.05 or re.search(rf'<th scope="row">{name}</th><td class="num">\d+\.\d</td>', page)
    assert "of what a large product reaches here" in page
    assert "GiB at most" in page
    assert read_yaml(str(folder))["provenance"]["peak_flops"] == peak_rate(CPU, torch.float32)


def test_memory_is_that_of_the_process() -> None:
    held = peak_bytes(CPU)
    if held is None:
        pytest.skip("this system does not tell the most memory of a process")
    block = torch.ones(2**26)
    assert (peak_bytes(CPU) or 0) >= held
    assert (peak_bytes(CPU) or 0) >= block.nbytes
    assert peak_rate(torch.device("meta"), torch.float32) is None


def test_measuring_the_machine_leaves_the_draws_of_a_run_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    peak_rate.cache_clear()
    peak_rate(CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
