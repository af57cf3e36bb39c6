"""Logits that are not finite while a model generates: an error that names rows, never an invented token."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import refused
from distillm.errors import TrainingError
from distillm.generation import Sampling, generate
from distillm.pipeline import distill
from distillm.types import Layout
from rows import NUM_TOKENS, prompts
from tiny import tiny_causal
from tiny_run import events, lines, materials, scores, tiny_run

SAMPLINGS = {
    "greedy": Sampling(6, temperature=0.0),
    "sampled": Sampling(6),
    "filtered": Sampling(6, temperature=1.3, top_k=9, top_p=0.8),
}
NAN, INF = math.nan, math.inf


def shifted(rows: list[int], at: int, column: int | slice, value: float) -> Any:
    """A model whose logits of ``rows`` become ``value`` in ``column`` from its forward pass number ``at`` on."""
    model = tiny_causal(vocab_size=NUM_TOKENS + 3)
    passes = 0

    def spoil(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes > at:
            logits = logits.clone()
            logits[rows, :, column] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    return model


def written(model: Any, sampling: Sampling, end_ids: list[int], **options: Any) -> list[Any]:
    return generate(
        model, prompts(5, 3, 4), sampling, layout=Layout(0), end_ids=end_ids, num_tokens=NUM_TOKENS, **options
    )


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(("column", "value"), [(7, NAN), (7, INF), (slice(None), NAN), (slice(None), -INF)])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_logits_that_are_not_finite_are_an_error_that_names_the_rows(
    sampling: Sampling, column: int | slice, value: float, at: int
) -> None:
    with pytest.raises(TrainingError, match="logits are not finite while generating, for 1 of 3 rows") as raised:
        written(shifted([1], at, column, value), sampling, [])
    assert sorted(raised.value.rows) == ["row:0", "row:1", "row:2"]
    assert all(name in str(raised.value) for name in raised.value.rows)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_single_tokens_may_be_forbidden_by_minus_infinity(sampling: Sampling) -> None:
    found = written(shifted([0, 1, 2], 0, slice(5, 30), -INF), sampling, [])
    assert not {token for row in found for token in row.response} & set(range(5, 30))


def test_a_row_that_has_ended_is_not_looked_at_any_more() -> None:
    """Its padding is of no interest; the others go on."""
    greedy = SAMPLINGS["greedy"]
    plain = written(tiny_causal(vocab_size=NUM_TOKENS + 3), greedy, [])
    ends = [plain[0].response[0]]  # the first row, the longest, ends at once
    assert any(ends[0] not in row.response for row in plain)
    assert written(shifted([0], 1, 7, NAN), greedy, ends) == written(
        tiny_causal(vocab_size=NUM_TOKENS + 3), greedy, ends
    )


def test_a_temperature_too_small_for_the_logits_is_told() -> None:
    with pytest.raises(TrainingError, match="a temperature near 0"):
        written(tiny_causal(vocab_size=NUM_TOKENS + 3), Sampling(4, temperature=1e-40), [])


def test_a_student_that_diverges_while_it_generates_ends_the_run_with_what_to_do(made: Path, tmp_path: Path) -> None:
    changes = {
        "method": {"name": "distillm", "initial_probability": 1.0, "capacity": 6, "replay_ratio": "decreasing"},
        "train.steps": 2,
        "validation.every": 50,
        "checkpoint.every": 1,
        "data.test": {},
    }
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    message = refused("train", folder, "resume=auto", "train.steps=40", "optim.lr=1e15", code=3)
    step = lines(folder / "metrics.jsonl", "step")[-1]["step"]
    assert step == 3  # it was this step that made the student what it is
    for part in ("logits are not finite while generating", "after step 3 of 40", "last good checkpoint is step 2"):
        assert part in message
    (failed,) = events(folder, "failed")
    assert failed["step"] == 3
    assert len(failed["rows"]) == 3
    assert all(name in failed["message"] for name in failed["rows"])


def test_damaged_weights_are_found_before_anything_is_scored(made: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    materials(tmp_path / "made")
    path = tmp_path / "made" / "student" / "model.safetensors"
    poisoned = load_file(path)
    poisoned["model.norm.weight"][3] = NAN
    save_file(poisoned, path, {"format": "pt"})
    run = tiny_run(tmp_path / "made", tmp_path / "run", {"method": {"name": "sft"}})
    with pytest.raises(TrainingError, match="step 0: the cross-entropy on the validation rows is nan"):
        distill(run)
    assert scores(tmp_path / "run") == {}
