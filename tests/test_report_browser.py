"""The report in a real browser: drawn, searched, switched, printed, reached by keyboard, and harmless."""

import json
import os
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from browser import CONTRAST, Opened, browser, chromium, opened
from distillm.cli import app
from distillm.config import as_yaml
from distillm.report import write_report
from fabricated_run import CONFIG, evaluation, fabricate, write_lines
from test_demo import demonstrate
from tiny_run import materials, tiny_run

DEMO = Path(__file__).parents[1] / "demo" / "report.html"
SHORT = {"train.steps": 6, "validation.every": 2, "data.text": None, "evaluation.seeds": [1]}
EVIL = " ".join(
    [
        "<script>window.struck = 1; alert(1)</script>",
        "</script><script>window.struck = 2</script>",
        "<img src=x onerror='window.struck = 3'>",
        "<a href='javascript:window.struck = 4'>here</a>",
        "<svg onload=alert(5)>",
        "</textarea></style></title><style>body{display:none}</style>",
        "{{ 7 * 7 }}{% raw %}${window.struck = 6}",
        "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe\N{POP DIRECTIONAL FORMATTING} \N{ARABIC LETTER BEH}\N{RIGHT-TO-LEFT MARK}",
    ]
)


@pytest.fixture(name="started", scope="module")
def _started() -> Generator[Any]:
    if chromium() is None:
        assert os.environ.get("DISTILLM_REQUIRE_BROWSER") != "1", "no Chromium: apt-get install chromium"
        pytest.skip("no Chromium: name one by DISTILLM_CHROMIUM, or apt-get install chromium")
    with browser() as found:
        yield found


@pytest.fixture(name="sweep", scope="module")
def _sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sweep of two methods and two seeds, made by its command."""
    folder = tmp_path_factory.mktemp("sweep")
    run = tiny_run(materials(folder / "made"), folder / "grid", SHORT)
    (folder / "run.yaml").write_text(as_yaml(run), encoding="utf-8")
    done = CliRunner().invoke(app, ["sweep", str(folder / "run.yaml"), "method.name=kd,distillm", "seed=1,2"])
    assert done.exit_code == 0, done.output
    assert f"report: {folder / 'grid' / 'report.html'}" in done.output
    return folder / "grid"


@pytest.fixture(name="reports", scope="module")
def _reports(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    runs = [hostile(folder / "evil"), fabricate(folder / "kitchen")]
    return {
        "run": sweep / "distillm_seed-1" / "report.html",
        "sweep": sweep / "report.html",
        "fabricated": write_report([runs[1]], folder / "fabricated.html"),
        "hostile": write_report([runs[0]], folder / "hostile.html"),
        "hostile, several": write_report(runs, folder / "several.html"),
    }


def hostile(folder: Path) -> Path:
    """A run whose every text is an attack."""
    run = fabricate(folder / "<img src=x onerror=alert(0)>", num_steps=30, every=10)
    config = CONFIG | {"teacher": EVIL, "method": {"name": EVIL, "<b>key": EVIL}, "data": {"train": EVIL}}
    config["provenance"] = CONFIG["provenance"] | {"command": ["distillm", EVIL], "machine": EVIL}
    (run / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    row = {"id": EVIL, "prompt": EVIL, "reference": EVIL, "teacher": EVIL, "student": EVIL}
    write_lines(run / "samples.jsonl", [row | {"step": step} for step in range(6)])
    by_token = {"id": EVIL, "data": EVIL, "prompt": EVIL, "tokens": [EVIL, "a"], "divergence": [5.0, 0.1]}
    write_lines(run / "tokens.jsonl", [by_token | {"choice": [EVIL, EVIL], "chosen": [[0.5, 0.1]] * 2}])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        step = {"kind": "step", "step": 31, "loss": 1.0, "terms": {EVIL: 0.5, "distill": 0.5}, "batch": EVIL}
        event = {"kind": "event", "step": 31, "event": EVIL, "message": EVIL}
        time = {"kind": "time", "step": 31, "seconds": {EVIL: 3.0}}
        file.writelines(json.dumps(entry) + "\n" for entry in (step, event, time))
    evil = evaluation(EVIL, 1.0, 1.0) | {"data": EVIL}
    (run / "eval" / "evil.json").write_text(json.dumps(evil), encoding="utf-8")
    return run


def unfold(found: Opened) -> Opened:
    found.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    return found.drawn()


@pytest.fixture(name="found", scope="module", params=["run", "sweep", "fabricated", "hostile", "hostile, several"])
def _found(request: pytest.FixtureRequest, started: Any, reports: dict[str, Path]) -> Generator[Opened]:
    made = unfold(opened(started, reports[request.param]))
    yield made
    made.page.context.close()


@pytest.fixture(name="kitchen")
def _kitchen(started: Any, reports: dict[str, Path]) -> Generator[Opened]:
    made = opened(started, reports["fabricated"])
    yield made
    made.page.context.close()


# Whatever the run.


def assert_sound(found: Opened) -> None:
    """Nothing went wrong, nothing was asked for, and every chart is drawn with all its series."""
    page = found.page
    assert found.errors == []
    assert found.dialogs == []
    assert found.requests == [page.url]
    expected = page.evaluate("""() => {
      const all = new Map(JSON.parse(document.getElementById('charts').textContent).map((each) => [each.id, each]));
      return [...document.querySelectorAll('.chart')].map((place) => {
        const charts = place.dataset.charts.split(' ').map((id) => all.get(id));
        const marks = (kind) => charts.flatMap((chart) => (chart.kind === 'bar') === kind ? chart.series : []).length;
        const plots = (selector) => place.querySelectorAll(`.main-svg ${selector}`).length;
        return { lines: [marks(false), plots('.scatterlayer .trace')], bars: [marks(true), plots('.barlayer .trace')],
                 titles: charts.every((chart) => place.textContent.includes(chart.title)) };
      });
    }""")
    assert expected
    for chart in expected:
        assert chart["lines"][0] == chart["lines"][1]
        assert chart["bars"][0] == chart["bars"][1]
        assert chart["titles"]


def test_no_error_no_request_and_every_chart_drawn(found: Opened):
    assert_sound(found)


def test_nothing_of_the_data_runs_or_is_an_element(found: Opened):
    page = found.page
    assert page.evaluate("window.struck") is None
    assert (
        page.evaluate("document.querySelectorAll('img, iframe, object, embed, form, main a, svg script').length") == 0
    )
    links = "[...document.querySelectorAll('a')].map((each) => each.getAttribute('href'))"
    assert page.evaluate(links) == ["#main"]
    names = "[...document.querySelectorAll('*')].flatMap((each) => [...each.attributes].map((a) => a.name))"
    assert not [name for name in page.evaluate(names) if name.startswith("on")]


@pytest.mark.parametrize("name", ["hostile", "hostile, several"])
def test_hostile_text_is_shown_literally(started: Any, reports: dict[str, Path], name: str):
    found = unfold(opened(started, reports[name]))
    body = found.page.inner_text("body")
    for part in (
        "<script>window.struck = 1; alert(1)</script>",
        "<img src=x onerror='window.struck = 3'>",
        "{{ 7 * 7 }}",
    ):
        assert body.count(part) > 5
    assert found.page.text_content(".tokens") == f"{EVIL}a"
    assert found.styled("body", "display") == "block"
    # What turns the direction of writing ends with its token: the one after it is where it would be without.
    assert found.styled(".tokens .t", "unicodeBidi") == "isolate"
    found.page.context.close()


@pytest.mark.parametrize("name", ["run", "sweep", "fabricated", "hostile, several"])
def test_narrow_screens_do_not_scroll_sideways(started: Any, reports: dict[str, Path], name: str):
    found = unfold(opened(started, reports[name], width=380, height=800))
    widths = "[...document.querySelectorAll('.chart .main-svg')].map((each) => each.getBoundingClientRect().width)"
    widest = f"() => Math.max(...{widths})"
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 380
    assert found.page.evaluate(widest) <= 380
    found.page.set_viewport_size({"width": 768, "height": 800})
    found.page.wait_for_function(f"{widest} > 380")  # charts are as wide as there is room
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 768
    assert found.page.evaluate(widest) <= 768
    found.page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_have_contrast(found: Opened, theme: str):
    found.page.select_option("#theme", theme)
    ratio, where = found.page.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_headings_and_labels(found: Opened):
    page = found.page
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((each) => Number(each.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    unnamed = """() => [...document.querySelectorAll('input, select, textarea, button')]
        .filter((each) => !each.labels?.length && !each.textContent.trim() && !each.ariaLabel).length"""
    assert page.evaluate(unnamed) == 0
    assert page.evaluate("document.querySelectorAll('fieldset:not(:has(> legend))').length") == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.title").endswith("distillm")


@pytest.mark.parametrize("name", ["run", "sweep", "hostile"])
def test_prints(started: Any, reports: dict[str, Path], name: str, tmp_path: Path):
    found = opened(started, reports[name], color_scheme="dark")
    found.page.emulate_media(media="print")
    assert found.styled("body", "backgroundColor") == "rgb(255, 255, 255)"
    assert found.styled(".tools", "display") == "none"
    found.page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
    assert found.errors == []
    found.page.context.close()


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_without_scripts_all_is_there_to_read(started: Any, reports: dict[str, Path], name: str):
    found = opened(started, reports[name], java_script_enabled=False)
    assert found.page.locator("noscript p").first.is_visible()
    assert not found.page.locator(".tools").is_visible()
    assert found.page.locator(".item").count() > 0
    if name == "run":
        assert all(each.is_visible() for each in found.page.locator(".answer").all())
    found.page.context.close()


# What a reader does.


def test_search_hides_and_shows_as_one_types(kitchen: Opened):
    page = kitchen.page
    shown = page.locator(".item:visible")
    before = shown.count()
    page.locator("#search").press_sequentially("plum cake")
    texts = [text.lower() for text in shown.all_text_contents()]
    assert texts
    assert all("plum cake" in text for text in texts)
    kinds = {each.get_attribute("class") for each in shown.all()}
    assert kinds == {"answer item", "sample item"}
    total = page.locator(".item").count()
    assert page.inner_text("#found") == f"{len(texts)} of {total} answers hold these words"
    page.fill("#search", "nobody ever wrote this")
    assert shown.count() == 0
    page.fill("#search", "")
    assert shown.count() == before
    assert page.inner_text("#found") == ""


def test_search_finds_what_is_folded_away_and_folds_it_again(kitchen: Opened):
    page = kitchen.page
    assert not page.locator("details.more .item").first.is_visible()
    page.fill("#search", "for 17 people")
    assert page.locator("details.more .item:visible").count() == 1
    page.fill("#search", "")
    assert page.locator("details.more").get_attribute("open") is None


def test_search_counts_the_finds_of_each_run(started: Any, reports: dict[str, Path]):
    found = opened(started, reports["hostile, several"])
    found.page.fill("#search", "plum cake")
    assert [each.replace("·", "").strip() for each in found.page.locator(".hits").all_inner_texts()] == [
        "0 found",
        "4 found",
    ]
    found.page.context.close()


def test_worst_typical_and_all(kitchen: Opened):
    page = kitchen.page
    shown = page.locator(".answer:visible .label")
    worst = shown.all_inner_texts()
    sums = [float(text.split()[1]) for text in worst]
    assert len(worst) == 5
    assert sums == sorted(sums, reverse=True)
    page.get_by_label("the typical").check()
    assert len(set(shown.all_inner_texts()) - set(worst)) >= 4
    page.get_by_label("all", exact=True).check()
    everything = [float(text.split()[1]) for text in shown.all_inner_texts()]
    assert len(everything) == 14
    assert max(everything) == sums[0]


def test_shades_are_told_apart_in_both_themes(kitchen: Opened):
    for theme in ("light", "dark"):
        kitchen.page.select_option("#theme", theme)
        assert len({kitchen.styled(f".scale .h{shade}", "backgroundColor") for shade in range(7)}) == 7


def test_a_token_is_told_by_keyboard_and_by_touch(kitchen: Opened):
    page = kitchen.page
    answer = page.locator(".answer:visible").first
    answer.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    assert '" Cook": 0.01 nats' in answer.locator(".said").inner_text()
    page.keyboard.press("End")
    assert '"</s>"' in answer.locator(".said").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "3.50 nats" in answer.locator(".said").inner_text()
    assert answer.locator(".at").count() == 1
    answer.locator(".t").nth(2).click()
    assert '" slowly"' in answer.locator(".said").inner_text()


def test_keyboard_reaches_everything_in_order(kitchen: Opened):
    page = kitchen.page
    seen: list[str] = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(document.activeElement.id || document.activeElement.className || document.activeElement.tagName)"
            )
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert seen[:3] == ["skip", "search", "theme"]
    assert "scroll" in seen
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_stays(started: Any, reports: dict[str, Path]):
    found = opened(started, reports["run"], color_scheme="dark")
    dark = found.styled("body", "backgroundColor")
    found.page.select_option("#theme", "light")
    light = found.styled("body", "backgroundColor")
    assert dark != light
    line = "[...document.querySelectorAll('.scatterlayer .js-line')].map((each) => each.style.stroke)"
    colors = found.page.evaluate(line)
    found.page.reload()
    found.drawn()
    assert (found.styled("body", "backgroundColor"), found.page.input_value("#theme")) == (light, "light")
    found.page.select_option("#theme", "auto")
    assert found.styled("body", "backgroundColor") == dark
    assert found.page.evaluate(line) != colors
    found.page.context.close()


def test_a_browser_that_forbids_storage_shows_the_page(started: Any, reports: dict[str, Path]):
    context = started.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page.goto(reports["run"].as_uri())
    page.select_option("#theme", "dark")
    page.reload()
    page.wait_for_selector(".chart .main-svg")
    assert errors == []
    context.close()


def test_a_page_that_is_loaded_again_is_where_it_was(kitchen: Opened):
    page = kitchen.page
    page.get_by_label("all", exact=True).check()
    page.locator("details summary").first.click()
    page.fill("#search", "onion")
    page.evaluate("scrollTo(0, 1500)")
    page.reload()
    kitchen.drawn()
    assert page.input_value("#search") == "onion"
    assert page.evaluate("scrollY") == 1500
    assert page.locator("details").first.get_attribute("open") is not None
    assert page.get_by_label("all", exact=True).is_checked()
    assert all("onion" in text.lower() for text in page.locator(".item:visible").all_text_contents())
    assert kitchen.errors == []


def test_pointing_at_one_chart_tells_the_values_of_all_at_that_step(kitchen: Opened):
    page = kitchen.page
    place = page.locator(".chart").first
    place.evaluate("(each) => each.scrollIntoView()")
    box = place.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)
    page.wait_for_selector(".hoverlayer .legend", state="attached")
    said = page.text_content(".hoverlayer")
    for name in ("each step", "student-generation probability", "responses in the buffer", "dataset"):
        assert name in said


def test_the_demos_report(started: Any, tmp_path: Path):
    if not DEMO.exists():  # then that of a demonstration with a tiny teacher
        demonstrate(tmp_path, quick=True)
    found = unfold(opened(started, DEMO if DEMO.exists() else tmp_path / "demo" / "report.html"))
    assert_sound(found)
    assert found.page.locator(".answer").count() > 0
    assert found.page.locator(".sample").count() > 0
    found.page.context.close()
