"""What the documentation shows is true: commands run, settings exist, the API is whole, pages ask nobody."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distillm
from answering_server import serving
from command_line import distillm as call
from distillm.config import Run, make_run, recipes
from distillm.explain import leaves
from docs_pages import DOCS, PAGES, ROOT, commands, fences
from docs_workspace import RUN, make_runs, make_workspace, overrides, prepare

# Commands that are not run here, by how they begin, with the reason.
NOT_RUN = {
    "pip install": "an installation, from the network",
    "git clone": "the same",
    "make ": "make test runs this; make demo and make faults have tests of their own",
    "accelerate launch --multi_gpu": "needs several GPUs; test_processes.py has accelerate on one machine without",
    "torchrun --nnodes 2": "two machines",
    "python benchmarks/": "minutes each; their figures are committed",
    "studies/": "the same",
    "distillm push runs/mine me/my-student --private": "needs the hub",
    "distillm init   ": "asks questions; with its flags it is run",
}
# Other tools: a page that shows them says that they are not run.
OTHERS = ("hf auth", "vllm serve", "transformers serve", "lm_eval", "python llama.cpp/")
# Run by other tests: a command, and the one command of each method's page (test_examples.py).
ELSEWHERE = {"distillm analyse -o docs/analysis": "test_theory.py"}
METHOD_PAGES = [page for page in PAGES if "/methods/" in page and "index" not in page]

RUNS = {  # finished runs that a page takes for given
    "docs/analysis.md": ["runs/mine"],
    "docs/evaluation.md": ["runs/mine", "runs/grid/kd", "runs/grid/distillm"],
    "docs/judge.md": ["runs/first", "runs/a", "runs/b"],
    "docs/howto/serve.md": ["runs/mine"],
    "docs/publishing.md": ["runs/mine"],
    "docs/watching.md": ["runs/mine", "runs/kd", "runs/distillm"],
    "docs/report.md": ["runs/mine", "runs/kd"],
}
SLOW = ("docs/analysis.md",)  # gradients at every checkpoint
FIXED_DATA: dict[str, Any] = {"method": {"name": "kd"}}
CHANGES = {"docs/teachers.md": FIXED_DATA, "docs/howto/server.md": FIXED_DATA}
WORDS = {
    "docs/encoder-decoders.md": {"MODEL": "encoder-decoder", "STUDENT": "smaller"},
    "docs/evaluation.md": {"MODEL": "model"},
}
FRAGMENTS = [(page, i) for page in PAGES for i, f in enumerate(fences(page)) if f.language == "yaml" and not f.title]
PYTHON = [page for page in PAGES if any(f.language == "python" for f in fences(page))]


def marked(page: str) -> Any:
    """``page``, as a slow one where it is."""
    return pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page


def run_here(page: str, start: str | tuple[str, ...] = "") -> list[str]:
    """The commands of a page that this file runs, of those that begin with ``start``."""
    left_out = (*NOT_RUN, *OTHERS, *ELSEWHERE)
    lines = [line for line in commands(page) if line.startswith(start) and not line.startswith(left_out)]
    return [] if page in METHOD_PAGES else lines


@pytest.fixture(name="workspace", scope="module")
def _workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    with contextlib.chdir(folder):
        make_runs(folder)
    return folder


def told(page: str, argument: str, found: dict[str, str], url: str) -> str:
    """An argument with the page's words in capitals replaced by something that is there."""
    words = WORDS.get(page, {}) | found | {"URL": url, "http://127.0.0.1:8000/v1": url}
    name = re.fullmatch(r"([\w.]+=)?(.+)", argument, re.DOTALL)
    assert name
    return (name[1] or "") + words.get(name[2], name[2])


def run_command(page: str, line: str, found: dict[str, str], url: str) -> None:
    """Run one line of a page in this folder; what it prints may name something that a later line needs."""
    program, *words = [told(page, word, found, url) for word in shlex.split(line, comments=True)]
    words = [
        str(path) for word in words for path in (sorted(Path().glob(word)) if word.endswith(("*", "*/")) else [word])
    ]
    if "train" in words or words[0] in ("sweep", "check") or words[:2] == ["cache", "warm"]:
        given = {word.partition("=")[0] for word in words}
        words = [re.sub(r"^seed=(\d+),.*", r"seed=\1", word) for word in words]  # one of several seeds
        words += [setting for setting in overrides() if setting.partition("=")[0] not in given]
    if program == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *("2" if word == "4" else word for word in words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, f"{page}: {line}\n{done.stderr[-3000:]}"
        return
    if words[0] in ("eval", "generate") and "--predictions" not in words:
        words += ["--max-new-tokens", "3", *(["--seeds", "1"] if words[0] == "eval" else [])]
    if program == "python":
        runpy.run_path(words[0], run_name="__main__")
        return
    if words[0] == "watch":
        watch_and_stop(words)
        return
    said = call(*words)
    if words[0] == "check" and said.code == 2:  # it found mistakes: random models that can teach nothing
        assert "memory" in said.out
        return
    assert said.code == 0, f"{page}: {line}\n{said.out[-2000:]}\n{said.err[-2000:]}"
    if names := re.findall(r"\b[0-9a-f]{16}\b", said.out + said.err):  # of a kept teacher
        found["NAME"] = names[-1]


def watch_and_stop(words: list[str]) -> None:
    """A command that goes on until Ctrl-C: its page is read, then it is stopped."""
    command = [sys.executable, "-u", "-m", "distillm", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = next((line for line in process.stdout if "http://127.0.0.1:" in line), "")
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+\S*", said)
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"<html" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)


def run_page(page: str, start: tuple[str, ...], workspace: Path, folder: Path) -> None:
    """Run those commands of a page that begin with ``start``, in its order."""
    prepare(page, workspace, folder, RUNS.get(page, []), CHANGES.get(page, {}))
    found = dict[str, str]()
    with contextlib.chdir(folder), serving() as server:
        for line in run_here(page, start):
            run_command(page, line, found, server.url)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if run_here(page, "distillm")])
def test_every_command_of_a_page_runs(page: str, workspace: Path, tmp_path: Path) -> None:
    run_page(page, ("distillm", "python"), workspace, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page, "torchrun")])
def test_every_command_for_several_processes_runs(page: str, workspace: Path, tmp_path: Path) -> None:
    run_page(page, ("torchrun",), workspace, tmp_path)


def test_every_command_is_of_a_known_program() -> None:
    for page in PAGES:
        for line in run_here(page):
            assert line.startswith(("distillm ", "torchrun ", "python studies/")), f"{page}: nothing runs {line}"


def test_what_is_not_run_is_shown_somewhere_and_other_tools_are_marked() -> None:
    shown = [line for page in PAGES for line in commands(page)]
    for start in (*NOT_RUN, *OTHERS, *ELSEWHERE):
        assert any(line.startswith(start) for line in shown), f"{start} is on no page: take it out"
    for page in PAGES:
        if any(line.startswith(OTHERS) for line in commands(page)):
            text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
            assert re.search(r"(is|are) not run by the tests", text), page
    for page in PAGES:
        for script in re.findall(
            r"^    (?:python |bash )?((?:benchmarks|studies)/\S+\.\w+)", (ROOT / page).read_text(), re.M
        ):
            assert (ROOT / script).is_file(), f"{page}: {script}"


@pytest.mark.parametrize(("page", "index"), FRAGMENTS, ids=lambda value: str(value))
def test_every_piece_of_yaml_is_of_a_run(page: str, index: int, workspace: Path) -> None:
    """Sections that a page shows replace those of an ordinary run; one that is no run's names itself by its keys."""
    piece = yaml.safe_load(fences(page)[index].text)
    if "output_type" in piece:  # of lm_eval
        return
    assert piece.keys() <= Run.model_fields.keys(), page
    run = RUN | {name: part if name != "data" else RUN["data"] | part for name, part in piece.items()}
    with contextlib.chdir(workspace):
        make_run(run)


def given_names() -> dict[str, Any]:
    """What a piece of Python takes for given: the heads of two models at five tokens, and the tokens' weights."""
    heads = {f"{who}_head": distillm.Head(torch.randn(5, 8), torch.randn(20, 8)) for who in ("teacher", "student")}
    return heads | {"weights": torch.ones(5)}


@pytest.mark.parametrize("page", PYTHON)
def test_every_piece_of_python_runs(
    page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(page, workspace, tmp_path, RUNS.get(page, []), {})
    original = distillm.load_run
    monkeypatch.setattr(distillm, "load_run", lambda s, o=(): original(s, [*o, *overrides()]), raising=False)
    with contextlib.chdir(tmp_path):
        for number, fence in enumerate(f for f in fences(page) if f.language == "python"):
            Path(f"block{number}.py").write_text(fence.text, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(f"block{number}.py", init_globals=given_names(), run_name="__main__")
            assert out.getvalue() or "print(" not in fence.text


def test_the_tutorials_show_the_files_of_their_studies() -> None:
    for page in ("instruction", "translation", "prompts"):
        shown = {f.title: f.text for f in fences(f"docs/tutorials/{page}.md") if f.language == "yaml" and f.title}
        assert shown, page
        for name, text in shown.items():
            assert (ROOT / str(name)).read_text(encoding="utf-8") == text, f"{page}: {name}"


COLUMNS = {
    "ROUGE-L": "rouge_l",
    "exact match": "exact_match",
    "divergence": "divergence",
    "BLEU": "bleu",
    "chrf": "chrf",
}
COLUMNS |= {"agreement, %": "agreement", "cut by length, %": "truncated"}


@pytest.mark.parametrize("page", ["instruction", "translation", "prompts"])
def test_the_figures_of_a_tutorial_are_those_of_its_runs(page: str) -> None:
    made = json.loads((ROOT / "studies" / "tutorials" / page / "results.json").read_text(encoding="utf-8"))
    text = (DOCS / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    (header,) = re.findall(r"^\| student \| (.*) \|$", text, re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 4
    for run, system, cells in rows:
        (entry,) = [e for e in made if e["run"] == run and e["system"] == system]
        for column, cell in zip(header.split(" | "), (c.strip() for c in cells.split("|")), strict=True):
            if column == "minutes":
                assert cell in ("", f"{entry['seconds'] / 60:.1f}"), (run, system, column)
            elif cell:
                assert cell == f"{entry['scores'][COLUMNS[column]]['mean']:.2f}", (run, system, column)


def test_every_picture_is_shown() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    assert [p.name for p in sorted((DOCS / "images").iterdir()) if f"images/{p.name}" not in text] == []


# ------------------------------------------------------------------------------------------------------------ the site


@pytest.fixture(name="site", scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_asks_nobody_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    fetched = re.compile(r"<(?!a[\s>])[a-z]+[^>]*\s(?:src|href|data|action|poster)=[\"']?(?:https?:)?//[^\s>]*", re.I)
    for page in pages:
        assert fetched.findall(page.read_text(encoding="utf-8")) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_setting_is_on_its_page_with_its_default(site: Path) -> None:
    text = (site / "settings.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"<tr>\s*<td><code>([\w.]+)</code></td>", text))
    wanted = {name for name, _ in leaves(Run)} | {"output", "seed"}
    assert not {name for name in wanted if name not in shown and not any(s.startswith(f"{name}.") for s in shown)}
    assert "<td><code>0.0005</code></td>" in text  # optim.lr


def test_every_recipe_and_command_is_on_its_page(site: Path) -> None:
    listed = (site / "reproduce.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in listed for name in recipes())
    helped = (site / "commands.html").read_text(encoding="utf-8")
    for name in re.findall(r"^  ([a-z]+)  ", call("--help").out, re.MULTILINE):
        assert f">distillm {name}<" in helped, name


def test_every_public_name_is_on_the_page_of_the_api_with_a_docstring(site: Path) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: distillm\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(dir(distillm))
    built = (site / "api.html").read_text(encoding="utf-8")
    for name in listed:
        entry = re.search(rf'id="distillm\.{name}".*?<div class="doc doc-contents[^"]*">(.*?)</div>', built, re.DOTALL)
        assert entry, name
        assert "<p>" in entry[1], f"{name} has no docstring"
