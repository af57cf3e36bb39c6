"""The map in docs/architecture.md is true: imports go down, few files know ``Run``, files and functions stay small."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import distillm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "distillm"
FILES = sorted(PACKAGE.rglob("*.py"))

# docs/architecture.md has the same table; a folder stands for all its files.
LEVELS = {
    0: ["types.py", "errors.py", "screen.py", "notebook.py"],
    1: [
        "divergences.py",
        "schedules.py",
        "explain.py",
        "tasks/",
        "known/",
        "writing.py",
        "accounting.py",
        "client.py",
        "processes.py",
        "sharding.py",
        "paths.py",
        "settings_text.py",
        "sandbox.py",
    ],
    2: [
        "kernels/",
        "data/",
        "models.py",
        "shrinking.py",
        "trust.py",
        "heads.py",
        "vocabulary.py",
        "generation.py",
        "adapters.py",
        "teacher_cache.py",
        "readers.py",
    ],
    3: ["scoring.py", "kept_teacher.py", "served_teacher.py", "sources.py", "teacher.py", "completions.py"],
    4: ["losses.py", "policy_gradient.py", "contrastive.py", "theory.py"],
    5: ["methods.py"],
    6: ["train.py", "checkpoint.py", "folder.py", "evaluation/", "report/", "display.py", "judge/"],
    7: ["config.py", "method_settings.py", "data_settings.py", "model_settings.py", "recipes/"],
    8: ["loading.py", "assembly.py", "rows.py", "provenance.py", "card.py"],
    9: ["assess.py", "caching.py", "project.py", "publish.py"],
    10: ["pipeline.py", "commands.py", "checking/"],
    11: ["demo/", "sweep.py", "analyse.py", "listing.py", "starting.py"],
    12: ["cli/", "__main__.py"],
}
LEVEL_OF = {name.removesuffix("/"): level for level, names in LEVELS.items() for name in names}
KNOW_RUN = {
    "card.py",
    "loading.py",
    "assembly.py",
    "rows.py",
    "assess.py",
    "caching.py",
    "project.py",
    "pipeline.py",
    "commands.py",
    "checking",
    "demo",
    "sweep.py",
    "analyse.py",
    "starting.py",
    "cli",
}


def box(path: Path) -> str:
    """The table's name for a file: itself, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0]


def arrows(path: Path) -> set[Path]:
    """The package's own files that ``path`` imports when it runs, wherever in it the import stands."""
    found: set[Path] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
            for name in [alias.name for alias in node.names]:
                found.add(file_of(base / name) or file_of(base) or base)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "distillm" for name in names), f"{path}: use relative imports"
    return found - {path}


def file_of(module: Path) -> Path | None:
    for candidate in (module.with_name(module.name + ".py"), module / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


ARROWS = {path: arrows(path) for path in FILES}


def test_every_file_has_a_level_and_every_level_its_files():
    there = {box(path) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml")} - {"__init__.py"}
    assert there == set(LEVEL_OF)


def test_the_map_in_the_docs_is_this_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn: dict[int, list[str]] = {}
    for level, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE):
        drawn.setdefault(int(level), []).extend(re.findall(r"`([^`]+)`", names))
    assert {level: sorted(names) for level, names in drawn.items()} == {k: sorted(v) for k, v in LEVELS.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up(path: Path):
    if path == PACKAGE / "__init__.py":
        assert not ARROWS[path], "importing distillm must import nothing else"
        return
    for target in ARROWS[path] - {PACKAGE / "__init__.py"}:
        assert target in FILES, f"{path} imports {target}, which is no file of the package"
        assert LEVEL_OF[box(target)] <= LEVEL_OF[box(path)], f"{box(path)} imports {box(target)}, which is above it"


def test_no_files_import_each_other_in_a_circle():
    list(TopologicalSorter(ARROWS).static_order())


def test_only_a_few_files_know_the_configuration():
    know = {box(path) for path, targets in ARROWS.items() if PACKAGE / "config.py" in targets}
    assert know == KNOW_RUN, "everything else takes explicit arguments instead of a Run"
    assert {box(target) for target in ARROWS[PACKAGE / "config.py"]} == {
        "errors.py",
        "explain.py",
        "method_settings.py",
        "data_settings.py",
        "model_settings.py",
        "paths.py",
        "settings_text.py",
    }


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 80, node.name


LIGHT = {
    "the help": "sys.argv = ['distillm', '--help']",
    "the help of train": "sys.argv = ['distillm', 'train', '--help']",
    "the help of push": "sys.argv = ['distillm', 'push', '--help']",
    "the help of judge": "sys.argv = ['distillm', 'judge', '--help']",
    "the schema": "sys.argv = ['distillm', 'schema']",
    "the recipes": "sys.argv = ['distillm', 'recipes']",
    "the data sets": "sys.argv = ['distillm', 'datasets']",
}


def test_light_commands_and_modules_do_not_import_torch():
    script = f"""
import sys
import distillm.config, distillm.cli, distillm.report
for name, setting in {LIGHT!r}.items():
    exec(setting)
    try:
        distillm.cli.main()
    except SystemExit as end:
        assert not end.code, (name, end.code)
    heavy = {{"torch", "transformers", "datasets", "accelerate"}} & sys.modules.keys()
    assert not heavy, (name, heavy)
print("light")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("light\n")


def public_names() -> dict[str, str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_public_names_for_type_checkers_are_those_that_are_found():
    homes: dict[str, list[str]] = distillm._HOMES
    assert public_names() == {name: module for module, names in homes.items() for name in names}
    assert set(dir(distillm)) == {"__version__", *public_names()}


@pytest.mark.parametrize("name", sorted(public_names()))
def test_a_public_name_resolves_to_its_home_and_is_documented(name: str):
    home: Any = importlib.import_module(f"distillm.{public_names()[name]}")
    assert getattr(distillm, name) is getattr(home, name)
    assert name.isupper() or getattr(distillm, name).__doc__


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        distillm.distil  # noqa: B018


def imported_packages() -> set[str]:
    names: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").split(".")[0])
    return names - sys.stdlib_module_names


def plain(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {plain(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {plain(r) for requirements in PROJECT["optional-dependencies"].values() for r in requirements}


def test_every_imported_package_is_declared_and_every_core_dependency_is_imported():
    distributions = packages_distributions()
    imported = {name: {plain(d) for d in distributions.get(name, [name])} for name in imported_packages()}
    # Parts of a declared package that come with it by its own requirement.
    carried = {"huggingface_hub": "transformers", "markupsafe": "jinja2", "pyarrow": "datasets"}
    undeclared = {n for n, d in imported.items() if not d & (CORE | EXTRAS) and carried.get(n) not in CORE}
    assert not undeclared
    assert {name for d in imported.values() for name in d} & CORE == CORE


def test_nothing_evaluates_text_or_unpickles():
    dangerous = {"eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "os.system"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in dangerous, f"{path}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, f"{path}:{node.lineno}"
