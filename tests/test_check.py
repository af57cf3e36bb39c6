"""``distillm check``: each planted mistake is found, and a sound run has none; what it shows and says it costs."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from distillm.checking import Checked, check, mistakes
from distillm.cli import app
from distillm.config import load_run
from distillm.errors import ConfigError, DataError, ModelError
from tiny import CHAT_TEMPLATE, save, tiny_config, tiny_model, tiny_tokenizer
from tiny_run import Heard, events, materials, rows, settings, tiny_run, write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``teacher`` has learned the rows, with chats as their template."""
    from distillm.pipeline import distill

    folder = materials(tmp_path_factory.mktemp("taught"))
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "all.jsonl", rows(12) + rows(4, 20))
    learn = {
        "data.train": str(folder / "all.jsonl"),
        "student.path": str(folder / "teacher"),
        "method": {"name": "sft"},
        "data.template": "chat",
        "data.text": None,
        "train": {"steps": 160, "batch_size": 6},
        "optim.lr": 0.01,
        "validation": {"every": 160, "samples": 0},
        "evaluation.compare": [],
        "data.test": {},
        "teacher": None,
        "student.dropout": None,
    }
    run = distill(tiny_run(folder, folder / "run", learn))
    (folder / "teacher").rename(folder / "untaught")
    (run / "student").rename(folder / "teacher")
    return folder


ROOM = {"data.max_prompt": 64, "data.max_length": 96}


def found(made: Path, tmp_path: Path, **changes: Any) -> Checked:
    sound: dict[str, Any] = {
        "data.max_prompt": 64,
        "data.max_length": 96,
        "train.steps": 40,
        "generation.max_new_tokens": 16,
    }
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return check(tiny_run(made, tmp_path / "run", sound | given))


def grave(checked: Checked) -> set[str]:
    return {finding.name for finding in checked.wrong}


def test_a_sound_run_has_no_findings(taught: Path, tmp_path: Path) -> None:
    checked = found(taught, tmp_path, data__template="chat")
    assert checked.findings == []
    assert not (tmp_path / "run").exists()


def test_the_wrong_template(taught: Path, tmp_path: Path) -> None:
    checked = found(taught, tmp_path, data__template="alpaca", data__max_prompt=128, data__max_length=200)
    assert grave(checked) == {"template"}
    assert "chat" in next(finding.advice for finding in checked.findings)


def test_a_chat_template_that_is_not_used_where_there_is_nothing_to_compare(taught: Path, tmp_path: Path) -> None:
    asked = write_rows(tmp_path / "asked.jsonl", rows(12, output=False))
    checked = found(taught, tmp_path, data__train=str(asked), data__validation=str(asked), data__responses="teacher")
    assert "template" in {finding.name for finding in checked.findings}


def test_a_chat_template_that_does_not_work_and_is_not_used(taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("teacher", "student"):
        save(tiny_model("llama", layers=1), tiny_tokenizer(chat_template="{{ raise_exception('no') }}"), folder / name)
    found(taught, tmp_path, teacher__path=str(folder / "teacher"), student__path=str(folder / "student"))


def test_no_end_token(taught: Path, tmp_path: Path) -> None:
    """The chat template ends turns by a token at which no model stops."""
    folder = tmp_path / "other"
    folder.mkdir()
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("eos_token", "'<over>'"))
    for name in ("teacher", "student"):
        save(tiny_model("llama", layers=1 + (name == "teacher")), tokenizer, folder / name)
    models = {"teacher__path": str(folder / "teacher"), "student__path": str(folder / "student")}
    checked = found(taught, tmp_path, data__template="chat", **models)
    assert any(f.name == "end" and "<over>" in f.text for f in checked.wrong)


def test_end_tokens_inside_the_responses(taught: Path, tmp_path: Path) -> None:
    twice = write_rows(tmp_path / "twice.jsonl", [row | {"output": row["output"] + "</s>"} for row in rows(12)])
    checked = found(taught, tmp_path, data__train=str(twice))
    assert any(f.name == "end" and "</s>" in f.advice for f in checked.wrong)


def test_responses_of_the_teacher_that_never_end(made: Path, tmp_path: Path) -> None:
    checked = found(made, tmp_path, data__responses="teacher", generation__max_new_tokens=4)
    assert any(f.name == "end" and f.text.startswith("4 of 4") for f in checked.wrong)


def test_a_response_of_a_few_that_is_cut_is_worth_a_thought(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = iter([True, False, False, False])
    monkeypatch.setattr("distillm.checking.mistakes.truncated", lambda *_: next(cut))  # pyright: ignore[reportUnknownLambdaType]
    checked = found(made, tmp_path, data__responses="teacher", generation__max_new_tokens=4)
    assert [f.grave for f in checked.findings if f.name == "end"] == [False]


@pytest.mark.parametrize("limit", ["prompt", "response"])
def test_half_of_the_data_cut(limit: str, taught: Path, tmp_path: Path) -> None:
    long = [
        {
            "instruction": "Say one two. " * 9 * (limit == "prompt"),
            "output": "one and two " * (30 if limit == "response" else 1),
        }
        for _ in range(6)
    ]
    mixed = [row | {"instruction": row["instruction"] or "Say."} for row in long] + rows(6)
    file = write_rows(tmp_path / "mixed.jsonl", mixed)
    checked = found(taught, tmp_path, data__train=str(file), data__template="chat")
    cut = [f for f in checked.wrong if f.name == "cut"]
    assert cut
    assert all("6 of 12" in f.text for f in cut)
    advised = dict(part.split("=") for part in cut[0].advice.split() if "=" in part)
    wider = found(
        taught, tmp_path, data__train=str(file), data__template="chat",
        **{name.replace(".", "__"): int(value) for name, value in advised.items()},
    )  # fmt: skip
    assert "cut" not in {f.name for f in wider.findings}


def test_a_teacher_that_is_worse_than_the_student(taught: Path, tmp_path: Path) -> None:
    models = {"teacher__path": str(taught / "student"), "student__path": str(taught / "teacher")}
    checked = found(taught, tmp_path, data__template="chat", **models)
    assert "teacher" in grave(checked)


def test_a_teacher_is_asked_what_it_reads_in_training(taught: Path, tmp_path: Path) -> None:
    """The same weights twice, of which the teacher alone has the template that they know."""
    changes = {"student__path": str(taught / "teacher"), "data__template": "{{ instruction }} -> "}
    assert "teacher" not in grave(found(taught, tmp_path, data__teacher_template="chat", **changes))


def test_training_names_a_teacher_that_knows_less(taught: Path, tmp_path: Path) -> None:
    from distillm.pipeline import distill

    models = {"teacher.path": str(taught / "student"), "student": {"path": str(taught / "teacher")}}
    wanted = {**ROOM, **models, "data.template": "chat", "method": {"name": "kd"}, "data.text": None, "optim.lr": 0.05}
    display = Heard()
    folder = distill(tiny_run(taught, tmp_path / "run", wanted), display)
    (worse,) = events(folder, "worse")
    assert "knows these responses less well than it did" in worse["message"]
    assert any(worse["message"] in said for said in display.said)
    assert worse["message"] in (folder / "report.html").read_text(encoding="utf-8")


def test_a_teacher_that_knows_little_of_the_rows(made: Path, tmp_path: Path) -> None:
    """Beside a student that is noise it does not show that the teacher has not learned the rows."""
    noise = {"path": None, "config": tiny_config("llama", layers=1, initializer_range=0.5)}
    checked = found(made, tmp_path, student=noise)
    (finding,) = [f for f in checked.findings if f.name == "teacher"]
    assert "nats a token" in finding.text
    assert "output=" in finding.advice
    assert not finding.grave
    assert "does not know" in finding.text


def test_a_teacher_that_does_not_teach_may_be_worse(taught: Path, tmp_path: Path) -> None:
    models = {"teacher__path": str(taught / "student"), "student__path": str(taught / "teacher")}
    checked = found(taught, tmp_path, data__template="chat", method={"name": "sft"}, **models)
    assert checked.wrong == []


@pytest.mark.parametrize("which", ["data__train", "data__validation", "data__test"])
def test_a_row_without_a_response_ends_the_check_as_it_would_the_run(which: str, taught: Path, tmp_path: Path) -> None:
    some = rows(12)
    some[3]["output"] = None
    file = str(write_rows(tmp_path / "some.jsonl", some))
    changes: dict[str, Any] = {which: {"some": file} if which == "data__test" else file}
    with pytest.raises(DataError, match="some:3 has no response"):
        found(taught, tmp_path, data__template="chat", **changes)


def test_a_single_row(taught: Path, tmp_path: Path) -> None:
    one = str(write_rows(tmp_path / "one.jsonl", rows(1)))
    assert "length" in grave(found(taught, tmp_path, data__train=one, generation__max_new_tokens=1))


def test_as_many_rows_left_out_as_cut(taught: Path, tmp_path: Path) -> None:
    long = [{"instruction": "Say one two. " * 9, "output": "one"}] * 2
    empty = [{"instruction": "Say.", "output": ""}] * 2
    file = str(write_rows(tmp_path / "some.jsonl", long + empty + rows(8)))
    cut = [f for f in found(taught, tmp_path, data__train=file, data__template="chat").wrong if f.name == "cut"]
    assert [("data.max_prompt=" in f.advice, "left out" in f.text) for f in cut] == [(True, False), (False, True)]


def test_a_skew_of_zero_is_none(made: Path, tmp_path: Path) -> None:
    for alpha, names in ((0.1, {"start"}), (0.0, set[str]())):
        method = {"name": "kd", "divergence": "skew_kl", "alpha": alpha}
        checked = found(made, tmp_path, student={"layers": 1}, method=method)
        assert {f.name for f in checked.findings} & {"start"} == names


def test_a_teacher_that_is_the_student(taught: Path, tmp_path: Path) -> None:
    checked = found(taught, tmp_path, data__template="chat", student__path=str(taught / "teacher"))
    assert "same" in grave(checked)


def test_tokenizers_that_differ(taught: Path, tmp_path: Path) -> None:
    save(tiny_model("llama", vocab_size=290), tiny_tokenizer(290), tmp_path / "other")
    with pytest.raises(ModelError, match="different tokenizers"):
        found(taught, tmp_path, student__path=str(tmp_path / "other"))


def test_test_rows_that_are_trained_on(taught: Path, tmp_path: Path) -> None:
    checked = found(taught, tmp_path, data__template="chat", data__test={"known": str(taught / "train.jsonl")})
    assert grave(checked) == {"leak"}


def test_responses_longer_than_what_may_be_written(taught: Path, tmp_path: Path) -> None:
    checked = found(taught, tmp_path, data__template="chat", generation__max_new_tokens=2)
    assert grave(checked) == {"length"}


def test_a_folder_that_holds_a_run(taught: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    assert grave(found(taught, tmp_path, data__template="chat")) == {"output"}


def test_what_is_worth_a_thought(made: Path, tmp_path: Path) -> None:
    repeated = write_rows(tmp_path / "repeated.jsonl", rows(4) * 3)
    checked = found(
        made, tmp_path, data__train=str(repeated), data__test={}, train__steps=4, train__batch_size=3,
        student={"layers": 1},
    )  # fmt: skip
    assert {"steps", "test", "repeated"} <= {f.name for f in checked.findings if not f.grave}


def test_no_memory_and_no_disk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distillm.checking import cost

    monkeypatch.setattr(cost, "_free", lambda subject: 1000)  # pyright: ignore[reportUnknownLambdaType]
    checked = found(made, tmp_path)
    assert checked.cost.work == []
    assert "memory" in grave(checked)
    text = next(f.text for f in checked.findings if f.name == "memory")
    assert "are free" in text
    monkeypatch.undo()
    assert "disk" not in grave(found(made, tmp_path))
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))  # pyright: ignore[reportUnknownLambdaType]
    assert "disk" in grave(found(made, tmp_path))


METHODS: list[dict[str, Any]] = [
    {"name": "sft"}, {"name": "seqkd"}, {"name": "kd"}, {"name": "imitkd"}, {"name": "gkd", "kd_weight": 0.5},
    {"name": "minillm"}, {"name": "distillm", "max_staleness": 2}, {"name": "distillm2"},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_every_method_is_tried(method: dict[str, Any], made: Path, tmp_path: Path) -> None:
    teacher = None if method["name"] == "sft" else {"path": str(made / "teacher")}
    checked = found(made, tmp_path, method=method, teacher=teacher)
    parts = {work.name for work in checked.cost.work}
    writes = method["name"] in ("imitkd", "gkd", "minillm", "distillm", "distillm2")
    assert {"training", "validation", "scoring"} <= parts
    assert ("generation" in parts) == writes
    assert ("teacher" in parts) == (teacher is not None)
    assert checked.cost.flops > 0
    assert checked.cost.disk > 3 * 4 * sum(p.numel() for p in checked.subject.models.student.parameters())


@pytest.mark.parametrize(("method", "size"), [("distillm", 10), ("distillm", 32), ("distillm2", 10), ("distillm2", 32)])
def test_as_many_rows_are_tried_as_a_step_has(
    method: str, size: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 rows a batch of 32 has all, and DistiLLM-2 two responses to each."""
    from distillm.pipeline import distill
    from distillm.scoring import Pair

    score, trained = Pair.score, list[int]()

    def counted(pair: Pair, rows: list[Any], *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            trained.append(len(rows))
        return score(pair, rows, *args, **options)

    monkeypatch.setattr(Pair, "score", counted)
    # Packed rows are not cut by length.
    train = {"steps": 2, "batch_size": size, "micro_batch_size": 99, "packing": True}
    changes: dict[str, Any] = {"method": {"name": method}, "data.text": None, "train": train}
    run = tiny_run(made, tmp_path / "run", changes)
    check(run)
    tried = max(trained)
    trained.clear()
    distill(run)
    assert tried == max(trained)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "t5"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    checked = found(materials(tmp_path / "made", kind), tmp_path)
    assert checked.cost.seconds > 0


OTHERS: dict[str, dict[str, Any]] = {
    "lora": {"student": {"lora": {}}},
    "the student is the teacher": {
        "student": {"lora": {}}, "teacher": {"adapter_off": True}, "data.teacher_system": "Be brief.",
    },
    "bf16": {"train.mixed_precision": "bf16", "train.gradient_checkpointing": True},
    "packing": {"train.packing": True, "data.text": None},
    "on disk": {"teacher.cache": "disk"},
    "rouge": {"validation.select": "rouge_l"},
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings(case: str, taught: Path, tmp_path: Path) -> None:
    changes = {"data__template": "chat"} | {name.replace(".", "__"): value for name, value in OTHERS[case].items()}
    if "student" in changes:
        changes["student"] = {"path": str(taught / "student")} | changes["student"]
    if case == "on disk":
        changes["teacher__cache_folder"] = str(tmp_path / "cache")
    checked = found(taught, tmp_path, **changes)
    assert checked.cost.seconds > 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("steps", "size"), [(10, 5), (10, 2), (1, 7), (3, 7), (2, 99)])
def test_flops_are_those_of_the_run(made: Path, tmp_path: Path, steps: int, size: int) -> None:
    """Of fine-tuning rows of one length nothing is left to chance: what is foreseen is what the run then computes."""
    from distillm.pipeline import distill

    same = write_rows(tmp_path / "same.jsonl", [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(8)])
    changes: dict[str, Any] = {
        "method": {"name": "sft"}, "teacher": None, "data.train": str(same), "data.validation": str(same),
        "data.test": {}, "train": {"steps": steps, "batch_size": size, "micro_batch_size": 1},
        "validation": {"samples": 0, "every": max(steps // 2, 1)},
    }  # fmt: skip
    run = tiny_run(made, tmp_path / "run", changes)
    foreseen = check(run).cost.flops
    folder = distill(run)
    times = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    computed = math.fsum(entry["flops"] for entry in times if entry["kind"] == "time")
    assert foreseen == pytest.approx(computed, rel=0.1)


def test_the_command_shows_rows_costs_and_findings(taught: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    wanted = settings(
        taught,
        tmp_path / "run",
        {"data.template": "chat", **ROOM, "train.steps": 40},
    )
    path.write_text(json.dumps(wanted))
    shown = CliRunner().invoke(app, ["check", str(path), "generation.max_new_tokens=16"])
    assert shown.exit_code == 0, shown.output
    assert "Nothing looks wrong." in shown.output
    row = next(line for line in shown.output.splitlines() if "⟦" in line and line.startswith("train:0"))
    prompt, _, response = row.partition("⟦")
    assert "user" in prompt.replace("·", "")
    assert response.replace("·", "") == "one and one</s>⟧"
    for part in ("memory", "time", "compute", "disk", "train:1", "train:2"):
        assert part in shown.output
    shown = CliRunner().invoke(app, ["check", str(path), "generation.max_new_tokens=2"])
    assert shown.exit_code == 2
    assert "✗ length" in shown.output


def test_a_terminal_that_knows_but_ascii(made: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "run.yaml", [settings(made, tmp_path / "run", {"train.steps": 2})])
    shown = subprocess.run(
        [sys.executable, "-m", "distillm", "check", str(path)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "[[on|e| and| |on|e|</s>]]" in shown.stdout, shown.stderr
    assert "x teacher" in shown.stdout


def test_a_setting_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{student: {layers: 2}, data: {train: rows.jsonl}}\n")
    with pytest.raises(ConfigError, match=r"teacher\.path"):
        load_run(str(path))


def test_the_page_names_every_finding() -> None:
    source = Path(mistakes.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"Finding\(\s*\"(\w+)\"", source))
    page = (Path(__file__).parents[1] / "docs" / "howto" / "check.md").read_text(encoding="utf-8")
    told = {name for line in page.splitlines() if line.startswith("| ") for name in re.findall(r"`(\w+)`", line)}
    assert len(names) > 10
    assert names <= told
