"""The heat map: which answers, in which order, with which shades and words; what of ``tokens.jsonl`` is not used."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm.report import read_run, write_report
from distillm.report.heat import BOUNDS, MAX_TOKENS, answers
from fabricated_run import fabricate, tokens, write_lines
from report_page import Page, report


def run_with(folder: Path, rows: list[Any]) -> Path:
    run = fabricate(folder / "run", num_steps=10, every=5)
    write_lines(run / "tokens.jsonl", rows)
    return run


def row(number: int, *divergence: float | None) -> dict[str, Any]:
    return {"id": f"r{number}", "tokens": [f"t{n}" for n in range(len(divergence))], "divergence": list(divergence)}


def test_the_worst_come_first_and_groups_are_marked(tmp_path: Path):
    run = read_run(run_with(tmp_path, [row(n, float(n), 0.5) for n in range(20)]))
    found = answers(run, 10**6)
    assert [answer.id for answer in found] == [f"r{n}" for n in reversed(range(20))]
    assert [answer.id for answer in found if "worst" in answer.groups] == ["r19", "r18", "r17", "r16", "r15"]
    assert [answer.id for answer in found if "typical" in answer.groups] == ["r12", "r11", "r10", "r9", "r8"]
    assert (found[0].total, found[0].mean) == ("19.50", "9.75")


@pytest.mark.parametrize("count", [1, 3, 7])
def test_few_answers_are_both_worst_and_typical(tmp_path: Path, count: int):
    found = answers(read_run(run_with(tmp_path, [row(n, float(n)) for n in range(count)])), 10**6)
    assert sum("worst" in answer.groups for answer in found) == min(count, 5)
    assert sum("typical" in answer.groups for answer in found) == min(count, 5)


def test_shades_begin_at_their_bounds_and_infinity_has_the_last(tmp_path: Path):
    values = [0.0, *(value for bound in BOUNDS for value in (bound - 1e-6, bound)), None]
    (answer,) = answers(read_run(run_with(tmp_path, [row(0, *values)])), 10**6)
    shades = [token.shade for token in answer.tokens]
    assert shades == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert answer.total == "infinitely many"
    assert "infinitely many nats" in answer.tokens[-1].said


def test_words_say_what_both_models_thought(tmp_path: Path):
    found = answers(read_run(run_with(tmp_path, list(tokens(1)))), 10**6)
    first, second = found[0].tokens[:2]
    assert first.said == '" Cook": 0.01 nats; teacher 0.4, student 0.25; the teacher\'s choice " Bake": 0.9, 0.125'
    assert second.said == '" it": 0.11 nats; teacher 0.4, student 0.25, the teacher\'s choice too'
    assert found[0].tokens[5].said.startswith("a part of a character: ")
    assert [said.split(":")[0] for said in found[0].largest] == ['" salt"', '"</s>"', '"é"']


def test_the_page_holds_the_numbers_of_the_file(tmp_path: Path):
    rows = list(tokens(14))
    page = report(run_with(tmp_path, rows))
    expected = sorted(rows, key=lambda each: math.fsum(each["divergence"]), reverse=True)
    assert page.all("p", class_="text tokens") == ["".join(each["tokens"]) for each in expected]
    titles = [attrs["title"] for tag, attrs in page.elements if tag == "span" and "title" in attrs]
    assert len(titles) == sum(len(each["tokens"]) for each in rows)
    assert f"Sum {math.fsum(expected[0]['divergence']):.2f} nats" in page.source


def test_without_the_file_nothing_is_said(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "tokens.jsonl").unlink()
    page = report(run)
    assert read_run(run).notes == []
    assert "Where teacher and student differ" not in page.source


@pytest.mark.parametrize(
    "bad",
    [
        {"id": "a", "tokens": ["x"], "divergence": []},
        {"id": "a", "tokens": [], "divergence": []},
        {"id": "a", "tokens": "xy", "divergence": [1, 2]},
        {"id": "a", "tokens": [1], "divergence": [1]},
        {"id": "a", "tokens": ["x"], "divergence": ["1"]},
        {"id": "a", "tokens": ["x"], "divergence": [float("nan")]},
        {"id": "a"},
    ],
)
def test_rows_that_no_run_writes_are_left_out_and_told(tmp_path: Path, bad: dict[str, Any]):
    run = run_with(tmp_path, [bad, row(1, 1.0)])
    assert [each["id"] for each in read_run(run).tokens] == ["r1"]
    assert "tokens.jsonl: 1 rows are not as a run writes them" in report(run).all("aside")[0]


def test_odd_figures_beside_the_divergence_are_left_unsaid(tmp_path: Path):
    odd = row(0, 1.0, 2.0) | {"written": [[0.5]], "choice": [3, "y"], "chosen": "no", "id": 5, "prompt": None}
    (answer,) = answers(read_run(run_with(tmp_path, [odd])), 10**6)
    assert [token.said for token in answer.tokens] == ['"t0": 1.00 nats', '"t1": 2.00 nats']


def test_long_and_many_answers_are_cut_and_told(tmp_path: Path):
    long = [row(n, *[1.0] * (MAX_TOKENS + 7)) for n in range(60)]
    run = run_with(tmp_path, long)
    page = report(run)
    assert len(page.source.encode()) < 5_000_000
    assert "7 more tokens are in tokens.jsonl" in page.source
    assert "further answers are left out to keep this file small; tokens.jsonl has all" in page.source
    assert answers(read_run(run), 40_000)[0].groups == "worst"


def test_where_the_worst_is_too_long_shorter_ones_are_shown_and_where_all_are_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_with(tmp_path, [row(0, *[1.0] * MAX_TOKENS), row(1, 0.5)])
    assert [answer.id for answer in answers(read_run(run), 2000)] == ["r1"]
    monkeypatch.setattr("distillm.report.page.TOKEN_BYTES", 10)
    page = report(run)
    assert "2 further answers are left out" in page.source
    assert "Nats at a token" not in page.source


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_any_tokens_are_shown_as_they_are(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    folder = tmp_path_factory.mktemp("tokens") / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    line = {"id": "a", "tokens": texts, "divergence": [1.0] * len(texts)}
    (folder / "tokens.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report([folder], folder / "report.html").read_bytes().decode("utf-8"))
    assert page.all("p", class_="text tokens") == ["".join(texts)]
