"""Teachers that do not fit: fewer bits, and layers in the CPU's memory and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distillm.config import make_run
from distillm.errors import ConfigError, ModelError
from distillm.heads import head_of
from distillm.models import fingerprint, load_model, num_parameters
from distillm.pipeline import distill
from distillm.shrinking import shrink
from tiny import save, tiny_model, tiny_tokenizer
from tiny_run import Heard, figures, same_weights, scores, settings, tiny_run, weights


@pytest.fixture(name="wide", scope="module")
def _wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose layers are wide enough to be quantized in blocks."""
    folder = tmp_path_factory.mktemp("wide")
    save(tiny_model("llama", seed=1, hidden_size=128, intermediate_size=256), tiny_tokenizer(), folder)
    return folder


@pytest.mark.parametrize(("bits", "error", "share"), [("8bit", 0.1, 0.5), ("4bit", 0.6, 0.4)])
def test_a_teacher_of_fewer_bits_is_smaller_and_near_the_whole_one(
    wide: Path, bits: str, error: float, share: float
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, of the extras quantization and dev")
    whole, small = load_model(wide), load_model(wide, quantization=bits)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        a, b = whole(ids).logits, small(ids).logits
    assert 0 < (a - b).norm() < error * a.norm()
    assert small.get_memory_footprint() < share * whole.get_memory_footprint()
    assert head_of(small).fused  # its output layer is as it was
    assert num_parameters(small) == num_parameters(whole)
    assert fingerprint(small) != fingerprint(whole)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_run_with_a_teacher_of_fewer_bits(made: Path, wide: Path, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, of the extras quantization and dev")
    changes = {"teacher.path": str(wide), "method": {"name": "distillm", "initial_probability": 0.5, "capacity": 8}}
    changes |= {"train.steps": 3, "train.batch_size": 4}
    whole = distill(tiny_run(made, tmp_path / "whole", changes))
    found = distill(tiny_run(made, tmp_path / "found", changes | {"teacher.quantization": bits}))
    mine, theirs = (scores(f)["numbers-student.json"]["scores"]["divergence"]["mean"] for f in (whole, found))
    assert mine != theirs
    assert mine == pytest.approx(theirs, rel=0.3)


@pytest.mark.parametrize("room", ["120KB", "10KB"])
def test_a_teacher_spread_over_memory_and_disk_makes_the_same_run(made: Path, tmp_path: Path, room: str) -> None:
    changes: dict[str, Any] = {"method": {"name": "gkd"}, "train.steps": 3}
    whole = distill(tiny_run(made, tmp_path / "whole", changes))
    # The teacher takes 0.2 MiB: some of it has no room in the larger memory, not even its output layer in the smaller.
    spread = {"teacher.placement": "device", "teacher.max_memory": {"cpu": room}}
    found = distill(tiny_run(made, tmp_path / "found", changes | spread))
    assert figures(found) == figures(whole)
    assert same_weights(weights(found), weights(whole))
    for name in ("predictions", "scores"):
        assert scores(found)["numbers-teacher.json"][name] == scores(whole)["numbers-teacher.json"][name]


def test_some_of_a_spread_teacher_is_really_on_disk(made: Path) -> None:
    model = load_model(made / "teacher", spread=True, max_memory={"cpu": "120KB"})
    places = {str(place) for place in model.hf_device_map.values()}
    assert places == {"cpu", "disk"}
    assert num_parameters(model) == num_parameters(load_model(made / "teacher"))


def test_a_spread_teacher_has_the_fingerprint_and_the_layers_of_the_whole_one(made: Path) -> None:
    spread = load_model(made / "teacher", spread=True, max_memory={"cpu": "10KB"})
    whole = load_model(made / "teacher")
    assert fingerprint(spread) == fingerprint(whole)
    assert head_of(spread).fused
    mine, theirs = shrink(spread, 1).state_dict(), shrink(whole, 1).state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in theirs.items())


def test_without_a_launcher_a_teacher_is_not_spread_over_processes(made: Path, tmp_path: Path) -> None:
    display = Heard()
    distill(tiny_run(made, tmp_path / "run", {"teacher.placement": "shard", "train.steps": 1}), display)
    assert any("the teacher is whole" in said for said in display.said)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory goes with placement=device"),
        ({"quantization": "4bit", "placement": "shard"}, "cannot be spread over processes"),
        ({"quantization": "4bit", "gguf_file": "model.gguf"}, "leave quantization out"),
        ({"quantization": "3bit"}, "quantization"),
    ],
)
def test_what_does_not_go_together_is_refused(made: Path, tmp_path: Path, teacher: dict[str, Any], said: str) -> None:
    given = settings(made, tmp_path)
    with pytest.raises(ConfigError, match=said):
        make_run(given | {"teacher": given["teacher"] | teacher})


def test_without_bitsandbytes_the_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'distillm\[quantization\]'"):
        load_model(made / "teacher", quantization="4bit")
