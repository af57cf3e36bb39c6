"""Answers token by token: the divergence by hand, texts that join, and ``tokens.jsonl`` through a run's life."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillm import pipeline
from distillm.config import load_run, make_run
from distillm.data import pieces
from distillm.evaluation.tokens import _short, token_rows
from distillm.kept_teacher import KeptTeacher
from distillm.pipeline import distill
from distillm.types import Example
from rows import NUM_TOKENS, row, teacher_of, tiny_pair
from tiny import tiny_tokenizer
from tiny_run import Heard, lines, materials, settings, tiny_run

SHORT = {"train.steps": 2, "validation.every": 2, "data.text": None, "evaluation.seeds": [1], "evaluation.compare": []}
LISTS = ("tokens", "divergence", "written", "choice", "chosen")


@pytest.fixture(name="folder", scope="module")
def _folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_run(made, tmp_path_factory.mktemp("runs") / "run", SHORT | {"evaluation.seeds": [1, 2]}))


def again(folder: Path, *overrides: str) -> Path:
    return distill(load_run(str(folder), [f"output={folder}", "resume=auto", *overrides]))


@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids)


def test_a_character_stands_with_its_last_part_and_an_unfinished_one_is_shown():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a€")
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == ["a", "", "", "€"]
    assert pieces(tokenizer, ids[:-1]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert pieces(tokenizer, [*ids, 1])[-1] == "</s>"


@pytest.mark.parametrize("block", [1, 2**24])
def test_figures_are_those_of_both_models_logits(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr("distillm.evaluation.fidelity.BLOCK_ELEMENTS", block)
    pair, tokenizer = tiny_pair(), tiny_tokenizer()
    answers = [row(number) for number in range(4)]
    found = token_rows(pair, tokenizer, answers, batch_size=3)
    assert list(found) == [0, 1, 2, 3]
    for number, answer in enumerate(answers):
        record, ids = found[number], torch.tensor([answer.tokens])
        at = [place - 1 for place, target in enumerate(answer.targets) if target]
        with torch.no_grad():
            models: list[Any] = [teacher_of(pair), pair.student]
            p, q = (m(input_ids=ids).logits[0, at, :NUM_TOKENS].double().log_softmax(-1) for m in models)
        assert record["divergence"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-6)
        assert record["tokens"] == pieces(tokenizer, [answer.tokens[place + 1] for place in at])
        for n, place in enumerate(at):
            likeliest = int(p[n].argmax())
            assert record["choice"][n] == tokenizer.decode([likeliest])
            for name, of in (("written", answer.tokens[place + 1]), ("chosen", likeliest)):
                expected = [float(x[n, of].exp()) for x in (p, q)]
                assert record[name][n] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_answers_are_those_that_were_scored_first(folder: Path):
    scored = json.loads((folder / "eval" / "numbers-student.json").read_text())["predictions"]
    found = lines(folder / "tokens.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in scored]
    for mine, other in zip(found, scored, strict=True):
        assert (mine["data"], mine["prompt"], mine["origin"]) == ("numbers", other["prompt"], "student")
        assert "".join(mine["tokens"]).replace("</s>", "").strip() == other["predictions"][0]
        assert len({len(mine[name]) for name in LISTS}) == 1
        assert all(value >= 0 for value in mine["divergence"])


def test_an_encoder_decoder_and_a_tokenizer_with_fewer_entries_than_the_models(tmp_path: Path):
    made = materials(tmp_path, "t5", vocab_size=320)
    rows = lines(distill(tiny_run(made, tmp_path / "run", SHORT)) / "tokens.jsonl")
    assert len(rows) == 3
    assert all(len(row["tokens"]) == len(row["divergence"]) > 0 for row in rows)


def test_sets_in_turn_up_to_the_number_asked_for(made: Path, tmp_path: Path):
    tests = {name: str(made / f"{name}.jsonl") for name in ("test", "valid")}
    rows = lines(
        distill(tiny_run(made, tmp_path / "run", SHORT | {"data.test": tests, "evaluation.token_rows": 3}))
        / "tokens.jsonl"
    )
    assert [row["data"] for row in rows] == ["test", "valid", "test"]


def test_validation_rows_where_nothing_is_to_be_tested(made: Path, tmp_path: Path):
    rows = lines(distill(tiny_run(made, tmp_path / "run", SHORT | {"data.test": {}})) / "tokens.jsonl")
    assert [row["data"] for row in rows] == ["validation"] * 4


@pytest.mark.parametrize(
    "changes", [{"evaluation.token_rows": 0}, {"teacher": None, "method": {"name": "sft"}}], ids=["none", "no teacher"]
)
def test_left_out_where_not_wanted_or_nobody_reads(made: Path, tmp_path: Path, changes: dict[str, Any]):
    assert not (distill(tiny_run(made, tmp_path / "run", SHORT | changes)) / "tokens.jsonl").exists()


def test_a_teacher_that_is_not_here_is_said(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = pipeline._score_tokens

    def away(project: Any) -> None:
        project.models.pair = replace(project.models.pair, teacher=object.__new__(KeptTeacher))
        real(project)

    monkeypatch.setattr(pipeline, "_score_tokens", away)
    display = Heard()
    folder = distill(tiny_run(made, tmp_path / "run", SHORT), display)
    assert not (folder / "tokens.jsonl").exists()
    assert any("not compared token by token" in text for text in display.said)


def test_rows_without_an_answer_are_left_out():
    pair = tiny_pair()
    rows = [
        Example("none", [5, 6], [False, False], "student"),
        Example("one", [5, 6, 7], [False, True, True], "student"),
    ]
    found = token_rows(pair, tiny_tokenizer(), rows)
    assert list(found) == [1]
    assert (found[1]["id"], len(found[1]["tokens"])) == ("one", 2)


def test_kept_when_nothing_changed_and_made_anew_when_something_did(made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run", SHORT))
    path = folder / "tokens.jsonl"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    again(folder)
    assert path.stat().st_mtime_ns == stamp
    path.unlink()  # as a kill before it was written leaves the folder
    again(folder)
    assert path.read_bytes() == before
    again(folder, "generation.max_new_tokens=2")
    assert max(len(row["tokens"]) for row in lines(path)) <= 2
    again(folder, "train.steps=4", "generation.max_new_tokens=4")
    assert path.read_bytes() != before


def test_what_cannot_be_a_number_is_none():
    assert (_short(math.inf), _short(math.nan), _short(0.123456)) == (None, None, 0.1235)


def test_overwriting_a_run_deletes_them(made: Path, tmp_path: Path):
    folder = distill(tiny_run(made, tmp_path / "run", SHORT))
    run = make_run(settings(made, folder, SHORT | {"evaluation.token_rows": 0}) | {"overwrite": True})
    assert not (distill(run) / "tokens.jsonl").exists()
