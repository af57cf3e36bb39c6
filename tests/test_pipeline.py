"""Whole runs: what is in a run folder afterwards, and that it is true."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import distillm
from distillm.checkpoint import list_checkpoints, step_of
from distillm.config import load_run, make_run, read_yaml
from distillm.errors import ConfigError
from distillm.pipeline import distill
from distillm.provenance import provenance
from distillm.sources import Draw, Source, dataset
from distillm.types import State
from tiny_run import (
    Heard,
    assert_same_run,
    events,
    figures,
    lines,
    materials,
    same_weights,
    scores,
    settings,
    tiny_run,
    weights,
)

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": {"name": "sft"}, "data.text": None},
    "kd": {"method": {"name": "kd", "kd_weight": 0.5}, "data.text": None},
    "distillm": {},
}
TERMS = {"sft": {"cross_entropy"}, "kd": {"cross_entropy", "forward_kl"}, "distillm": {"skew_kl", "text"}}


@pytest.fixture(name="folder", scope="module", params=METHODS)
def _folder(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    return distill(tiny_run(made, folder, METHODS[request.param]), command="distillm train me")


def test_a_run_folder_holds_what_the_architecture_says(folder: Path):
    assert {path.name for path in folder.iterdir()} == {
        *("run.yaml", "metrics.jsonl", "samples.jsonl", "tokens.jsonl", "eval", "checkpoints", "student", "report.html")
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "numbers" in page


def test_every_step_is_logged_with_its_figures(folder: Path):
    steps = lines(folder / "metrics.jsonl", "step")
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    common = {"kind", "step", "loss", "terms", "counts", "lr", "grad_norm", "seconds", "tokens", "batch"}
    adaptive = {"probability", "replay_ratio", "buffer", "buffer_age"} if folder.name == "distillm" else set()
    for entry in steps:
        cut = {"truncated"} if entry["batch"] == "generated" else set()
        ages = set[str]() if entry["batch"] == "dataset" else {"age", "oldest"}
        assert entry.keys() == common | adaptive | cut | ages
        assert entry["terms"].keys() == entry["counts"].keys() == TERMS[folder.name]
        weight = 0.5 if folder.name == "kd" else 1.0
        assert entry["loss"] == pytest.approx(sum(weight * value for value in entry["terms"].values()))
        assert all(math.isfinite(value) for value in (entry["loss"], entry["grad_norm"], entry["seconds"]))
    assert steps[0]["lr"] == 0.01
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_student_rows_are_generated_and_replayed(folder: Path):
    steps = lines(folder / "metrics.jsonl", "step")
    if folder.name != "distillm":
        assert {entry["batch"] for entry in steps} == {"dataset"}
        return
    assert {entry["batch"] for entry in steps} == {"dataset", "generated", "replayed"}
    held = 0
    for entry in steps:
        held = min(6, held + 3 * (entry["batch"] == "generated"))
        assert entry["buffer"] == held
        assert (entry["buffer_age"] is None) == (held == 0)
        assert entry["probability"] == pytest.approx(0.7)
        assert 0 <= entry.get("truncated", 0) <= 3


def test_validation_is_measured_before_training_and_as_often_as_asked(folder: Path):
    measured = lines(folder / "metrics.jsonl", "validation")
    assert [entry["step"] for entry in measured] == [0, 4, 8]
    for entry in measured:
        assert entry.keys() == {"kind", "step", "cross_entropy", "divergence", "monitored"}
        assert entry["monitored"] == entry["cross_entropy"]
        assert entry["divergence"] > 0


def test_samples_follow_the_same_prompts_from_before_training_on(folder: Path):
    samples = lines(folder / "samples.jsonl")
    assert [(entry["step"], entry["id"]) for entry in samples] == [
        (step, row) for step in (0, 4, 8) for row in ("valid:0", "valid:1")
    ]
    first = samples[0]
    assert first.keys() == {"step", "id", "prompt", "reference", "teacher", "student"}
    assert first["prompt"] == "Say one three."
    assert first["reference"] == "one and three"
    assert isinstance(first["teacher"], str)
    assert len({entry["teacher"] for entry in samples if entry["id"] == "valid:0"}) == 1
    assert len({entry["student"] for entry in samples if entry["id"] == "valid:0"}) > 1


def test_before_student_and_teacher_are_scored_with_the_same_decoding(folder: Path):
    found = scores(folder)
    assert found.keys() == {f"numbers-{system}.json" for system in ("before", "student", "teacher")}
    for name, result in found.items():
        assert (result["data"], f"numbers-{result['system']}.json") == ("numbers", name)
        assert (result["num_rows"], result["seeds"]) == (3, [1, 2])
        assert result["decoding"] == {"max_new_tokens": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        assert {"rouge_l", "exact_match", "response_tokens", "truncated"} <= result["scores"].keys()
        assert ("divergence" in result["scores"]) == (result["system"] != "teacher")
        assert [len(row["predictions"]) for row in result["predictions"]] == [2, 2, 2]
        assert result["predictions"][0]["references"] == ["one and five"]
    assert found["numbers-before.json"]["predictions"] != found["numbers-student.json"]["predictions"]


def test_the_student_folder_loads_with_transformers_alone(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    generation = GenerationConfig.from_pretrained(folder / "student")
    assert generation.eos_token_id == [1]
    assert generation.pad_token_id == 0
    assert same_weights(weights(folder), {k: v for k, v in model.state_dict().items() if k in weights(folder)})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("Q: Say one two.\nA: ", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_run_yaml_says_where_the_run_comes_from_and_repeats_it(folder: Path, tmp_path: Path):
    run = load_run(str(folder), [f"output={tmp_path / 'again'}"])
    origin = run.provenance
    assert origin is not None
    assert origin["command"] == "distillm train me"
    assert origin["distillm"] == distillm.__version__
    assert origin["torch"] == torch.__version__
    assert {"python", "transformers", "git", "started", "machine"} <= origin.keys()
    assert (origin["threads"], origin["device"]) == (torch.get_num_threads(), "cpu")
    assert {name: facts["layers"] for name, facts in origin["models"].items()} == {"student": 1, "teacher": 2}
    assert_same_run(distill(run), folder)


def test_a_student_that_reads_no_teacher_needs_none(made: Path, tmp_path: Path):
    changes = METHODS["sft"] | {"teacher": None, "evaluation.compare": [], "evaluation.temperature": 0}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    assert scores(folder).keys() == {"numbers-student.json"}
    assert scores(folder)["numbers-student.json"]["seeds"] == [1]  # greedy: one answer
    assert all("divergence" not in entry for entry in lines(folder / "metrics.jsonl", "validation"))
    assert {entry["teacher"] for entry in lines(folder / "samples.jsonl")} == {None}


def test_the_time_until_a_checkpoint_is_told_with_it(made: Path, tmp_path: Path) -> None:
    changes = {"validation.every": 1, "checkpoint.every": 4, "optim.lr": 1e-3, "checkpoint.keep": 9}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    best = [e["step"] for e in lines(folder / "metrics.jsonl", "event") if e["event"] == "best"]
    assert set(best) - {4, 8}
    assert {e["step"] for e in lines(folder / "metrics.jsonl", "time")} >= {*best, 4, 8}


def test_another_trigger_does_not_read_the_figures_of_the_one_before(made: Path, tmp_path: Path) -> None:
    method = {"name": "distillm", "initial_probability": 0.3, "tolerance": 0.0, "reference": "best"}
    changes: dict[str, Any] = {"validation.every": 1, "method": method | {"trigger": "rouge_l"}, "train.steps": 4}
    distill(tiny_run(made, tmp_path / "run", changes))
    # All figures are above 0 now and were below: each would be worse than the best before.
    changes |= {"method": method | {"trigger": "validation_loss"}, "train.steps": 8, "resume": "auto"}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    assert lines(folder / "metrics.jsonl", "step")[4]["probability"] == pytest.approx(0.3)


@pytest.mark.parametrize("select", ["cross_entropy", "divergence", "rouge_l"])
def test_the_student_that_is_saved_is_the_best_by_the_chosen_figure(made: Path, tmp_path: Path, select: str):
    changes = {"validation.select": select, "validation.every": 1, "optim.lr": 1.0, "checkpoint.keep": 1}
    display = Heard()
    folder = distill(tiny_run(made, tmp_path / "run", changes), display)
    measured = {e["step"]: e[select] for e in lines(folder / "metrics.jsonl", "validation") if e["step"]}
    best = (max if select == "rouge_l" else min)(measured, key=measured.__getitem__)
    assert best < 8, "the run must get worse at its end for this test to say anything"
    assert [step_of(path) for path in list_checkpoints(folder / "checkpoints")] == [best, 8]
    chosen = load_file(folder / "checkpoints" / f"step-{best:08d}" / "student.safetensors")
    last = load_file(folder / "checkpoints" / "step-00000008" / "student.safetensors")
    assert same_weights(weights(folder), chosen)
    assert not same_weights(weights(folder), last)
    assert any(f"the best validation was after step {best}" in text for text in display.said)
    assert events(folder, "best")[-1]["step"] == best


def test_epochs_visit_each_row_once_and_validate_after_each(made: Path, tmp_path: Path):
    changes = METHODS["sft"] | {"train.steps": None, "train.epochs": 2, "train.batch_size": 5, "validation.every": None}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    assert [entry["step"] for entry in lines(folder / "metrics.jsonl", "validation")] == [0, 3, 6]
    tokens = [entry["tokens"] for entry in lines(folder / "metrics.jsonl", "step")]
    assert len(tokens) == 6
    assert sum(tokens[:3]) == sum(tokens[3:])


@pytest.mark.parametrize("trigger", ["validation_loss", "validation_divergence", "rouge_l"])
def test_what_triggers_is_monitored_so_that_a_rise_is_worse(made: Path, tmp_path: Path, trigger: str):
    changes = {"method.trigger": trigger, "validation.every": 2}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    measured = lines(folder / "metrics.jsonl", "validation")
    name, sign = {"rouge_l": ("rouge_l", -1), "validation_loss": ("cross_entropy", 1)}.get(trigger, ("divergence", 1))
    assert [entry["monitored"] for entry in measured] == [sign * entry[name] for entry in measured]
    state = json.loads((folder / "checkpoints" / "step-00000008" / "state.json").read_text())["state"]
    assert state["validation"] == [entry["monitored"] for entry in measured]


def test_the_probability_rises_when_the_monitored_figure_does(made: Path, tmp_path: Path):
    changes = {"method.initial_probability": 0.2, "method.tolerance": 0.0, "validation.every": 1, "optim.lr": 0.2}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    measured = [entry["monitored"] for entry in lines(folder / "metrics.jsonl", "validation")]
    expected, raised = 0.2, 0
    for step, entry in enumerate(lines(folder / "metrics.jsonl", "step")):
        if step and measured[step] > measured[step - 1]:
            expected, raised = min(1.0, expected + 0.1), raised + 1
        assert entry["probability"] == pytest.approx(expected)
    assert raised


def test_bfloat16_and_gradient_checkpointing_train(made: Path, tmp_path: Path):
    plain = distill(tiny_run(made, tmp_path / "plain", {"train.steps": 4}))
    frugal = distill(tiny_run(made, tmp_path / "frugal", {"train.steps": 4, "train.gradient_checkpointing": True}))
    assert figures(frugal) == figures(plain)
    assert same_weights(weights(frugal), weights(plain))
    short = distill(tiny_run(made, tmp_path / "short", {"train.steps": 4, "train.mixed_precision": "bf16"}))
    first, last = ([e["loss"] for e in lines(short / "metrics.jsonl", "step")][i] for i in (0, -1))
    assert last < first
    assert first == pytest.approx(lines(plain / "metrics.jsonl", "step")[0]["loss"], rel=0.02)
    assert {tensor.dtype for tensor in weights(short).values()} == {torch.float32}
    assert not same_weights(weights(short), weights(plain))
    # What measures the student computes in the type of its weights.
    for name, kind in (("metrics.jsonl", "validation"), ("samples.jsonl", None)):
        before = [[e for e in lines(run / name, kind) if e["step"] == 0] for run in (short, plain)]
        assert before[0] == before[1] != []
    assert scores(short)["numbers-before.json"] == scores(plain)["numbers-before.json"]


def test_bfloat16_on_a_device_without_it_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def accelerator(**options: Any) -> Any:
        raise ValueError(f"{options['mixed_precision']} requires a supported device")  # as accelerate does

    monkeypatch.setattr("distillm.assembly.Accelerator", accelerator)
    with pytest.raises(ConfigError, match=r"train.mixed_precision=bf16, .* does not have .*; use .*=none"):
        distill(tiny_run(made, tmp_path / "run", {"train.mixed_precision": "bf16"}))
    with pytest.raises(ValueError, match="no requires"):  # what is not about the precision stays what it is
        distill(tiny_run(made, tmp_path / "run"))


def test_a_gpu_is_recorded_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"Model {device.index}")
    assert provenance({}, torch.device("cuda", 1), "me")["device"] == "cuda:1 (Model 1)"
    assert provenance({}, torch.device("cpu"), "me")["device"] == "cpu"


def test_a_skipped_step_has_no_loss(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def sometimes_bare(*arguments: Any) -> Source:
        source = dataset(*arguments)

        def rows(state: State) -> Draw:
            drawn = source(state).rows
            return Draw([replace(r, targets=[False] * len(r.tokens)) for r in drawn] if state.step == 1 else drawn)

        return rows

    monkeypatch.setattr("distillm.sources.dataset", sometimes_bare)
    changes = METHODS["sft"] | {"train.steps": 3, "tracker": "tensorboard"}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    steps = lines(folder / "metrics.jsonl", "step")
    assert [(entry["loss"] is None, entry["grad_norm"] is None) for entry in steps] == [(i == 1,) * 2 for i in range(3)]
    assert [entry["step"] for entry in events(folder, "skipped")] == [2]
    assert "3 of 3, of which 1 skipped" in (folder / "report.html").read_text(encoding="utf-8")


def test_tensorboard_gets_the_figures_and_goes_with_the_run(made: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"tracker": "tensorboard", "train.steps": 4}
    folder = distill(tiny_run(made, tmp_path / "run", changes))
    (written,) = {path.parent for path in folder.rglob("events.out.tfevents.*") if path.parent.name == "distillm"}
    read = EventAccumulator(str(written))
    read.Reload()
    logged = {event.step: event.value for event in read.Scalars("loss")}
    assert logged == pytest.approx({entry["step"]: entry["loss"] for entry in lines(folder / "metrics.jsonl", "step")})
    assert [event.step for event in read.Scalars("validation/cross_entropy")] == [0, 4]
    distill(tiny_run(made, tmp_path / "run", {"train.steps": 4, "overwrite": True}))
    assert not list(folder.rglob("events.out.tfevents.*"))


def test_a_run_is_refused_where_one_is_and_overwritten_when_asked(made: Path, tmp_path: Path):
    short = {"train.steps": 2, "validation.every": 2}
    folder = distill(tiny_run(made, tmp_path / "run", short))
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run.*resume=auto.*overwrite=true"):
        distill(tiny_run(made, folder, short))
    assert (folder / "metrics.jsonl").read_bytes() == before
    distill(tiny_run(made, folder, short | {"overwrite": True, "seed": 4, "data.test": {}}))
    assert [entry["step"] for entry in lines(folder / "metrics.jsonl", "step")] == [1, 2]
    assert (folder / "metrics.jsonl").read_bytes() != before
    assert scores(folder) == {}
    kept = load_run(str(folder))
    assert kept.seed == 4
    assert not kept.overwrite


def test_the_library_runs_the_same_steps_as_the_pipeline(made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run", METHODS["kd"]))
    project = distillm.build(make_run(settings(made, tmp_path / "other", METHODS["kd"])))
    losses = [step.loss for step in distillm.steps(project)]
    assert losses == [entry["loss"] for entry in lines(folder / "metrics.jsonl", "step")]


def test_a_student_that_got_worse_is_said(made: Path, tmp_path: Path):
    display = Heard()
    distill(tiny_run(made, tmp_path / "bad", {"optim.lr": 30.0, "method": {"name": "sft"}}), display)
    assert any("no better than it was before training" in text for text in display.said)
    assert len(events(tmp_path / "bad", "worse")) == 1
    good = Heard()
    distill(tiny_run(made, tmp_path / "good", {"method": {"name": "sft"}}), good)
    assert not any("no better" in text for text in good.said)


def test_the_command_that_began_a_run_stays_when_it_goes_on_with_other_settings(made: Path, tmp_path: Path):
    run = tiny_run(made, tmp_path / "run", {"evaluation.compare": []})
    distill(run, command="first")
    distill(make_run(read_yaml(str(tmp_path / "run")) | {"resume": "auto"}, ["train.steps=9"]), command="second")
    kept = read_yaml(str(tmp_path / "run"))["provenance"]
    assert (kept["command"], kept["resumed"]) == ("first", ["second"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_compiled_layers_train_as_others_do(kind: str, tmp_path: Path) -> None:
    made = materials(tmp_path, kind)
    # Without dropout, of which compiled layers have their own draws.
    changes = {"train.steps": 4, "method.initial_probability": 0.5, "student.dropout": 0.0}
    plain = distill(tiny_run(made, tmp_path / "plain", changes))
    compiled = distill(tiny_run(made, tmp_path / "compiled", changes | {"train.compile": True}))
    losses = [[row["loss"] for row in lines(folder / "metrics.jsonl", "step")] for folder in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
