"""A run does not grow, in small; ``benchmarks/soak.py`` does the same over thousands of steps (docs/soak.md)."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distillm.assembly import Models
from distillm.pipeline import distill
from tiny_run import Heard, materials, tiny_run


@pytest.fixture(name="soak", scope="module")
def _soak() -> Any:
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(benchmarks)
        found = importlib.util.spec_from_file_location("soak", benchmarks / "soak.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    return module


def test_a_short_run_holds_no_more_at_its_end(soak: Any, tmp_path: Path):
    """Bytes and memory need a longer run to be judged; what must be exact is so in a short one as well."""
    found = soak.soak(tmp_path, 60, 5, 12_000)
    results = found["results"]
    for name in ("handles", "threads", "cache_bytes"):
        assert results[name]["flat"], (name, results[name], found["samples"][name])
    assert found["evicted_files"] > 0
    checkpoints = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(checkpoints) <= 3
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoints",
        "eval",
        "metrics.jsonl",
        "report.html",
        "run.yaml",
        "samples.jsonl",
        "student",
        "tokens.jsonl",
    ]
    assert found["log_bytes_per_step"] < 1000


def test_what_grows_is_noticed(soak: Any):
    flat = [100, 3, *[1000] * 30]
    assert soak.judged(flat)["flat"]
    assert soak.judged(flat, 0.0)["flat"]
    assert not soak.judged([1000 + 2 * i for i in range(32)])["flat"]
    assert not soak.judged([*[1000] * 24, *[1100] * 8])["flat"]
    assert not soak.judged([*[6] * 31, 7], 0.0)["flat"]
    assert not soak.within([100, 200, 100, 100], [0, 1, 1, 1], 150)
    assert not soak.within([100] * 4, [1, 1, 1, 0], 150)
    assert soak.within([100] * 4, [0, 0, 0, 1], 150)


def test_states_of_responses_that_left_the_buffer_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The states kept of the student's responses are bounded by what the buffer can hold, not by the machine."""
    made, seen = materials(tmp_path), list[Any]()

    class Spy(Models):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "pair" and getattr(value, "cache", None) is not None:
                seen.append(value.cache)

    monkeypatch.setattr("distillm.loading.Models", Spy)
    changes = {"train.steps": 40, "method.capacity": 3, "method.initial_probability": 1.0, "teacher.cache": "memory"}
    distill(tiny_run(made, tmp_path / "run", changes | {"validation.every": 40, "checkpoint.every": 40}), Heard())
    (cache,) = seen
    assert cache.replayed.limit == 2 * 3 * 4 * 32 * 4  # twice: rows, tokens, width, bytes
    assert 0 < cache.replayed.size <= cache.replayed.limit
