"""The report on a whole run, read back: self-contained, inert, the numbers of the files, readable by everyone."""

import base64
import gzip
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from distillm.report import write_report
from fabricated_run import CONFIG, evaluation, fabricate, samples, write_lines
from report_page import Page, records, report

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!-- <script> ",
    "]]> --> \"'><img src=http://evil.example/x onerror=alert(3)>",
    "{{ 7 * 7 }}{% raw %}",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "kitchen")


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return report(whole)


# One file that needs nothing else.


def test_is_under_5_mb_and_asks_for_nothing_outside(page: Page):
    assert len(page.source.encode()) < 5_000_000
    addresses = [
        (tag, key, value)
        for tag, attrs in page.elements
        for key, value in attrs.items()
        if key in ("src", "href", "srcset", "action", "data", "poster", "ping", "style", "background")
    ]
    assert addresses == [("link", "href", "data:,"), ("a", "href", "#main")]
    (style,) = page.all("style")
    assert "url(" not in style
    assert "@import" not in style
    (script,) = [text for text in page.all("script") if "use strict" in text]
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\(|https?:", script)


def test_policy_forbids_requests_and_every_script_but_ours(page: Page):
    (policy,) = [
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    (script,) = [text for text in page.all("script") if "use strict" in text]
    expected = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, get_plotlyjs())]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in expected)


def test_carries_plotly_whole(page: Page):
    (packed,) = page.all("script", id="plotly")
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()


def test_same_run_gives_the_same_bytes(whole: Path, page: Page):
    assert report(whole).source == page.source


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path: Path):
    run = fabricate(tmp_path / "long", num_steps=3000, every=100, num_samples=3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    spiked = [json.dumps({**json.loads(line), "loss": 987.0}) if '"step": 1501,' in line else line for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(spiked))
    long_texts = [{**row, "id": f"{index}", "student": "é<" * 4000} for index, row in enumerate(samples(100, 3000))]
    write_lines(run / "samples.jsonl", long_texts)
    page = report(run)
    assert len(page.source.encode()) < 5_000_000
    series = page.charts["run-1-loss"]["series"]
    assert max(series[0]["y"]) == 987.0
    assert series[0]["x"][0] == 1
    assert series[0]["x"][-1] == 3000
    assert all(len(line["x"]) <= 1300 for line in series)
    assert "200 of 3000 training steps" in page.source
    assert "further samples are left out" in page.source
    assert "more characters)" in page.source


# What came with the data is text.


def test_hostile_text_is_inert_and_shown(tmp_path: Path):
    run = fabricate(tmp_path / "<img src=x onerror=alert(0)>", num_steps=30, every=10)
    evil = " ".join(HOSTILE)
    config = {**CONFIG, "teacher": evil, "method": {"name": evil, "<b>key": evil}, "data": {"train": evil}}
    config["provenance"] = {**CONFIG["provenance"], "command": ["distillm", evil], "machine": evil}
    (run / "run.yaml").write_text(yaml.safe_dump(config))
    write_lines(
        run / "samples.jsonl",
        [{"step": 0, "id": evil, "prompt": evil, "reference": evil, "teacher": evil, "student": evil}],
    )
    by_token = {"id": evil, "data": evil, "prompt": evil, "tokens": [evil, *HOSTILE], "divergence": [9.0] * 6}
    write_lines(run / "tokens.jsonl", [by_token | {"choice": [evil] * 6, "chosen": [[1, 0.5]] * 6}])
    with (run / "metrics.jsonl").open("a") as file:
        step = {"kind": "step", "step": 31, "loss": 1.0, "terms": {evil: 0.5, "distill": 0.5}, "batch": evil}
        file.write(json.dumps(step) + "\n")
        file.write(json.dumps({"kind": "event", "step": 31, "event": evil, "message": evil}) + "\n")
    (run / "eval" / "evil.json").write_text(json.dumps({**evaluation(evil, 1.0, 1.0), "data": evil}))
    other = fabricate(tmp_path / "other", num_steps=30, every=10)
    for runs in ([run], [run, other]):
        page = report(*runs)
        kinds = [attrs.get("type") for tag, attrs in page.elements if tag == "script"]
        assert kinds == [None, "application/json", "text/plain"]
        assert {tag for tag, _ in page.elements}.isdisjoint({"img", "iframe", "object", "embed", "b", "form"})
        assert page.all("a") == ["Skip to the report"]
        assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
        assert "<!--" not in page.source
        names = [line["name"] for chart in page.charts.values() for line in chart["series"]]
        assert evil in names
        assert evil in page.all("dd", class_="text")
        assert page.all("p", class_="text prompt").count(evil[:1500]) == 2
        assert evil + "".join(HOSTILE) in page.all("p", class_="text tokens")


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=200).filter(str.strip))
def test_any_answer_is_shown_as_it_is(tmp_path_factory: pytest.TempPathFactory, answer: str):
    run = tmp_path_factory.mktemp("text") / "run"
    run.mkdir()
    (run / "run.yaml").write_text("{}")
    row = {"step": 0, "id": "a", "prompt": "p", "reference": "r", "teacher": None, "student": answer}
    write_lines(run / "samples.jsonl", [row])
    output = write_report([run], run / "report.html")
    page = Page(output.read_bytes().decode("utf-8"))
    assert page.all("dd", class_="text") == ["r", answer]


def test_lone_surrogates_do_not_stop_the_report(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    row = {"step": 0, "id": "\ud800", "prompt": "\ud800", "reference": "r", "teacher": None, "student": "half \udc00"}
    write_lines(run / "samples.jsonl", [row])
    assert "half ?" in report(run).all("dd", class_="text")


# The numbers are those of the files.


def test_validation_table_has_the_numbers_of_the_file(whole: Path, page: Page):
    expected = records(whole / "metrics.jsonl", "validation")
    label = f"All {len(expected)} validations"
    assert page.column(label, "Step") == [str(row["step"]) for row in expected]
    for key, heading in (("cross_entropy", "Cross-entropy (nats/token)"), ("divergence", "Divergence (nats/token)")):
        shown = [float(text) for text in page.column(label, heading)]
        assert shown == pytest.approx([row[key] for row in expected], rel=1e-3)
    assert page.column(label, "ROUGE-L")[0] == "–"


def test_step_table_and_charts_have_the_numbers_of_the_file(whole: Path, page: Page):
    expected = records(whole / "metrics.jsonl", "step")
    label = f"All {len(expected)} training steps"
    for key, heading in (
        ("loss", "Loss"),
        ("lr", "Learning rate"),
        ("probability", "Probability"),
        ("buffer", "Buffer"),
    ):
        shown = [float(text) for text in page.column(label, heading)]
        assert shown == pytest.approx([row[key] for row in expected], rel=1e-3, abs=1e-9)
    assert page.column(label, "Batch") == [row["batch"] for row in expected]
    shown = [float(text) for text in page.column(label, "Term text")]
    assert shown == pytest.approx([row["terms"]["text"] for row in expected], rel=1e-3)
    raw, smooth = page.charts["run-1-loss"]["series"]
    assert raw["y"] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    window = 6
    assert smooth["y"][-1] == pytest.approx(sum(row["loss"] for row in expected[-window:]) / window, rel=1e-5)
    assert smooth["name"] == f"mean of the last {window} steps"


def test_origins_count_every_batch(whole: Path, page: Page):
    batches = [row["batch"] for row in records(whole / "metrics.jsonl", "step")]
    shares = {line["name"]: line["y"] for line in page.charts["run-1-origins"]["series"]}
    assert set(shares) == {"dataset", "generated", "replayed"}
    assert [sum(parts) for parts in zip(*shares.values(), strict=True)] == pytest.approx([1.0] * 40)
    for name in shares:
        shown = page.column("Batches by origin", name)
        assert sum(map(int, shown)) == batches.count(name)


def test_scores_table_has_the_numbers_of_the_files(whole: Path, page: Page):
    header, *rows = page.table("Scores")
    assert [row[1] for row in rows] == ["student before", "sft", "student distilled", "teacher"]
    for row, system in zip(rows, ("before", "sft", "student", "teacher"), strict=True):
        scores = json.loads((whole / "eval" / f"kitchen-{system}.json").read_text())["scores"]
        mean, std = scores["rouge_l"]["mean"], scores["rouge_l"]["std"]
        assert row[header.index("ROUGE-L")] == f"{mean:.2f} ± {std:.2f}"
        # The divergence does not depend on the decoding seed: one value has no spread.
        assert row[header.index("Divergence (nats/token)")] == f"{scores['divergence']['mean']:.3f}"
        assert row[-2:] == ["60", "3"]


def test_verdict_is_computed(whole: Path, page: Page):
    seconds = sum(row["seconds"] for row in records(whole / "metrics.jsonl", "step"))
    assert page.verdict == {
        "How close": "ROUGE-L on kitchen-test rose from 0.0 to 29.7 (the teacher's own: 41.6);"
        " the divergence to the teacher on kitchen-test fell from 7.91 to 1.11 nats a token.",
        "At what size": "49.6\N{NO-BREAK SPACE}M parameters to the teacher's 135\N{NO-BREAK SPACE}M, 2.7 times fewer;"
        " it answers with 400 tokens/s; the teacher answers with 125 tokens/s.",
        "At what cost": f"{int(seconds // 60)} min {round(seconds % 60):02d} s in 120 training steps, on cpu.",
    }


def test_verdict_says_when_it_became_worse(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "eval" / "kitchen-before.json").write_text(json.dumps(evaluation("before", 35.0, 1.1094)))
    said = report(run).verdict["How close"]
    assert "fell from 35.0 to 29.7" in said
    assert "stayed at 1.11 nats" in said


def test_verdict_falls_back_on_validation(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    for path in (run / "eval").iterdir():
        path.unlink()
    verdict = report(run).verdict
    assert "ROUGE-L" not in verdict["How close"]
    assert "on the validation rows fell from 7.90 to 1.03 nats a token between steps 0 and 10" in verdict["How close"]
    assert "tokens/s" not in verdict["At what size"]


def test_speed_of_both_or_of_whichever_is_known(tmp_path: Path, page: Page):
    both = "teacher 125 tokens/s, student 400 tokens/s (3.20 times), answering test rows where they were scored"
    assert dict(page.table("The run"))["Speed"] == both
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    (run / "eval" / "kitchen-teacher.json").unlink()
    one = "student 400 tokens/s, answering test rows where they were scored"
    assert dict(report(run).table("The run"))["Speed"] == one


def test_facts_command_and_configuration(whole: Path, page: Page):
    facts = dict(page.table("The run"))
    steps = records(whole / "metrics.jsonl", "step")
    seconds = sum(row["seconds"] for row in steps)
    assert facts["Time"].startswith(f"{int(seconds // 60)} min")
    assert f"{seconds / len(steps):.3g} s a step" in facts["Time"]
    assert facts["Steps"] == "120 of 120, of which 1 skipped (no target token)"
    assert facts["Compression"] == "2.71 to 1 (36.8 % of the parameters)"
    assert "134,515,008" in facts["Teacher"]
    assert facts["Method"] == "distillm, divergence=skew_kl, alpha=0.1, replay.capacity=64"
    assert page.all("code", id="run-1-command") == ["distillm train run.yaml 'data.train=my kitchen/train.jsonl'"]
    assert (whole / "run.yaml").read_text() in page.all("code")


def test_samples_stand_side_by_side_at_every_recorded_step(page: Page):
    assert len(page.all("article", class_="sample item")) == 16
    assert "4 more samples" in page.source
    assert page.all("dt", class_="label")[:5] == [
        "Reference", "Teacher", "Student before training", "Student at step 60", "Student at step 120",
    ]  # fmt: skip
    answers = page.all("dd", class_="text")[1:]
    assert answers[0].startswith("Soak for an hour, then cook lentil soup")
    assert answers[1] == "the of of and , the -"
    assert answers[2] == "Cook lentil soup slowly in a pot, then taste it."


def test_many_steps_are_folded_away_but_for_the_first_and_the_last(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    row = next(samples(1, 10))
    write_lines(run / "samples.jsonl", [{**row, "step": step, "student": f"answer {step}"} for step in range(8)])
    page = report(run)
    labels = page.all("dt", class_="label")
    assert labels[:4] == ["Reference", "Teacher", "Student before training", "Student at step 7"]
    assert page.all("dd", class_="text")[4:] == [f"answer {step}" for step in range(1, 7)]
    assert "The 6 answers between" in page.all("summary")


def test_a_reference_that_is_the_teachers_stands_once(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    write_lines(run / "samples.jsonl", [{**row, "reference": row["teacher"]} for row in samples(1, 10)])
    assert "Reference" not in report(run).all("dt", class_="label")


def test_reference_stands_in_for_a_missing_teacher(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=10, every=5)
    write_lines(run / "samples.jsonl", [{**row, "teacher": None} for row in samples(1, 10)])
    page = report(run)
    assert page.all("dt", class_="label")[0] == "Reference"
    assert page.all("dd", class_="text")[0] == "Cook lentil soup slowly and salt it last."


def test_events_are_listed(page: Page):
    events = page.all("li")
    assert "step 40 skipped every response was empty" in events
    assert "step 20 best divergence 4.494" in events


# Everyone can read it.


@pytest.mark.parametrize("several", [False, True])
def test_headings_language_and_labels(whole: Path, tmp_path: Path, several: bool):
    runs = [whole, fabricate(tmp_path / "other", num_steps=10, every=5)] if several else [whole]
    page = report(*runs)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert ("html", {"lang": "en"}) in page.elements
    assert [attrs for _, attrs in page.elements if attrs.get("name") == "viewport"]
    assert all(text.strip() for text in page.all("button"))
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if attrs.get("role") in ("img", "region"))
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag in ("table", "pre"))
    assert all(attrs.get("tabindex") == "0" for tag, attrs in page.elements if attrs.get("role") == "region")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert set(references) <= set(ids)
    drawn = [name for _, attrs in page.elements for name in str(attrs.get("data-charts") or "").split()]
    assert sorted(drawn) == sorted(page.charts)


def luminance(color: str) -> float:
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_have_contrast_in_both_themes(page: Page):
    (style,) = page.all("style")
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r"\{([^{}]*)\}", style)]
    themes = [theme for theme in themes if "ink" in theme]
    assert len(themes) == 3
    assert themes[1] == themes[2]
    for theme in themes:
        for text in ("ink", "muted", "accent"):
            for ground in ("paper", "raised"):
                light, dark = sorted((luminance(theme[text]), luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
        for shade in [name for name in theme if re.fullmatch(r"h\d", name)]:
            light, dark = sorted((luminance(theme["ink"]), luminance(theme[shade])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, shade
        for line in [name for name in theme if name.startswith("run-")]:
            light, dark = sorted((luminance(theme[line]), luminance(theme["paper"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, line
