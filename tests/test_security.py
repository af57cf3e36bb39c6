"""Nothing that is read runs: templates, YAML, weights, model folders, data sets (docs/security.md)."""

import ast
import contextlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from command_line import distillm, refused
from distillm.config import load_run, make_run
from distillm.data import Task, read_rows
from distillm.errors import ConfigError, DataError, DistillmError, ModelError
from distillm.judge.prompts import Template, load_template
from distillm.models import load_model, load_tokenizer
from distillm.sweep import cells_of
from distillm.tasks import load_task
from tiny import CHAT_TEMPLATE, save, tiny_causal, tiny_tokenizer
from tiny_run import materials
from tiny_run import settings as tiny_settings

SOURCES = sorted((Path(__file__).parents[1] / "src" / "distillm").rglob("*.py"))

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ instruction | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch pwned').read() }}",
    "{{ range.__class__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}' | format('') | attr('__class__') }}",
    "{{ ('{0.__class__}'.format)('') }}",
    "{{ (['{0.__class__}'] | map('format', '') | list)[0].__class__ }}",
    "{% set f = '{x.__class__}'.format_map %}{{ f({'x': ''}) }}",
    "{{ (instruction | attr('format'))(instruction.__class__) }}",
    "{{ items.append(1) }}",
    "{{ items.__setitem__(0, 1) }}",
    "{{ items.sort() }}",
    "{{ table.update(a=1) }}",
    "{{ table.pop('a') }}",
    "{% set table.a = 2 %}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ (lambda: 1)() }}",
    "{% import os %}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ config }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ ''.encode.__func__ }}",
    "{{ (1).real.__class__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{{ m() }}",
    "{% macro m() %}x{% endmacro %}{{ m.__func__.__globals__ }}{{ m._func.__globals__ }}",
    "{{ loop.__class__ }}",
    "{{ none.__init__.__globals__ }}",
    "{{ true.__class__.__base__ }}",
    "{{ instruction.join.__self__.__class__ }}",
]
INNARDS = re.compile(r"<class|<function|<built-in|<module|__globals__|subclasses|root:x:|Environment")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs would leave its mark in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def untouched() -> bool:
    return not os.listdir()


# --------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_get_out_of_its_sandbox(template: str):
    row = {"instruction": "Say one.", "items": [3, 2], "table": {"a": 1}}
    try:
        said = Task(template=template + "{{ instruction }}").prompt_text(row, row_id="train:0")
    except (ConfigError, DataError):
        said = ""
    assert not INNARDS.search(said), said
    assert row == {"instruction": "Say one.", "items": [3, 2], "table": {"a": 1}}
    assert untouched()


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_of_a_tokenizer_folder_does_not_get_out_either(template: str, tmp_path: Path):
    save(None, tiny_tokenizer(chat_template=CHAT_TEMPLATE + template), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    try:
        said = Task(template="chat").prompt_text({"instruction": "Say one."}, tokenizer, row_id="train:0")
    except DataError:
        said = ""
    assert not INNARDS.search(said), said
    assert untouched()


@pytest.mark.parametrize("template", ESCAPES)
def test_the_judges_template_and_that_of_a_task_do_not_get_out_either(template: str, tmp_path: Path):
    (tmp_path / "own.txt").write_text("{{ prompt }} {{ answer }}" + template.replace("instruction", "prompt"))
    spec = {
        "fields": {"instruction": "i", "output": "o"},
        "response": "output",
        "template": template + "{{ instruction }}",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(spec))
    for work in (
        lambda: load_template("single", tmp_path / "own.txt").render(prompt="p", answer="a"),
        lambda: Template("single", "own", template).render(prompt="p", answer="a"),
        lambda: Task(load_task(str(tmp_path / "own.yaml"))).prompt_text({"i": "x"}, row_id="train:0"),
    ):
        try:
            said = work()
        except DistillmError:
            said = ""
        assert not INNARDS.search(said), said
    assert untouched()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}", "{{ 10 ** 9 * 'a' }}", "{{ [0] * 10 ** 9 }}", "{{ 10 ** (10 ** 10) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}", "{{ range(-10 ** 9, 10 ** 9) | list }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
        "{{ 'a' | center(10 ** 9) }}", "{{ 'a'.center(10 ** 9) }}", "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10 ** 9, 1) }}", "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}", "{{ '{:{w}}'.format(1, w=10 ** 9) }}", "{{ 'a\n' | indent(10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}", "{{ [1] | slice(10 ** 9) | list }}", "{{ lipsum(n=10 ** 9) }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)  # fmt: skip
def test_a_template_that_would_take_all_memory_or_time_is_refused(template: str):
    before = peak()
    with pytest.raises((ConfigError, DataError)):
        Task(template="{{ instruction }}" + template).prompt_text({"instruction": "x"}, row_id="train:0")
    assert peak() - before < 200 * 2**20


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_an_ordinary_template_computes_and_formats():
    template = "{{ '%-4s|' % 'a' }}{{ '{:*^5}'.format('b') }}{{ '-' * 20 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ [1] * 2 }}"
    template += "{% for i in range(3) %}{{ i }}{% endfor %}{{ 'a b' | center(5) }}{{ [1, 2, 3] | batch(2) | list }}"
    said = Task(template=template).prompt_text({"instruction": "x"}, row_id="train:0")
    assert said == "a   |**b**" + "-" * 20 + "10241[1, 1]012 a b [[1, 2], [3]]"


# -------------------------------------------------------------------------------------------------------------- YAML

TAGS = [
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/object/new:os.system ['touch pwned']",
    "!!python/object/apply:subprocess.check_output [[touch, pwned]]",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/tuple [1, 2]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_nothing_but_plain_values(tag: str, tmp_path: Path):
    path, base = tmp_path / "own.yaml", {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"train": "x"}}
    path.write_text(f"student: {{path: s}}\nprovenance: {tag}\n")
    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump(base))
    for work in (
        lambda: load_run(str(path)),
        lambda: load_task(str(path)),
        lambda: make_run(dict(base), [f"provenance.a={tag}"]),
        lambda: make_run(dict(base), [f"optim.lr={tag}"]),
        lambda: cells_of(str(good), [f"optim.lr={tag},0.1", "output=x"]),
    ):
        with pytest.raises(ConfigError):
            work()
    assert untouched()


# -------------------------------------------------------------------------------------------- what the sources call

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("torch.load", "np.load", "numpy.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("os.system", "os.popen", "pickle.load", "pickle.loads", "shelve.open", "marshal.loads", "runpy.run_path"),
    *("shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile", "subprocess.getoutput"),
}
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile", "runpy", "code"}


def test_the_sources_call_nothing_that_runs_or_unpacks_what_it_reads():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN, where
                for argument in node.keywords:
                    unsafe = argument.arg in ("allow_pickle", "shell") and ast.unparse(argument.value) != "False"
                    assert not unsafe, where
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & MODULES, where


def test_only_one_file_makes_a_jinja_environment_for_users_and_only_one_reads_yaml():
    """The report's own page is made by Jinja too, from the package's template, with everything escaped."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
    assert [name for name, text in texts.items() if "SandboxedEnvironment" in text] == ["sandbox.py"]
    assert [name for name, text in texts.items() if "jinja2.Environment(" in text] == ["page.py"]
    assert "autoescape=True" in texts["page.py"]
    assert [name for name, text in texts.items() if re.search(r"yaml\.\w*([Ll]oad|Loader)", text)] == [
        "settings_text.py"
    ]


# ------------------------------------------------------------------------------------------------------------ models


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_pickled_weights_are_never_read(tmp_path: Path):
    folder = save(tiny_causal(), tiny_tokenizer(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ModelError, match="unpickling can run any code"):
            load_model(folder)
        (folder / name).unlink()
    assert untouched()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path):
    folder = save(tiny_causal(), tiny_tokenizer(), tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    load_model(folder)
    load_tokenizer(folder)
    assert untouched()


def test_a_pickled_adapter_is_never_read(tmp_path: Path):
    pytest.importorskip("peft")
    base = save(tiny_causal(), tiny_tokenizer(), tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    said = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="unpickling can run any code"):
        load_model(adapter)
    assert untouched()


@pytest.mark.skipif(pytest.importorskip("importlib.util").find_spec("gguf") is None, reason="needs gguf")
def test_a_gguf_file_that_is_a_pickle_is_not_unpickled(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError):
        load_model(tmp_path / "model.gguf")
    assert untouched()


MARK = "import pathlib; pathlib.Path('pwned').write_text('code ran')\n"
CODE = f"""{MARK}
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig):
    model_type = 'own'
class M(LlamaForCausalLM):
    config_class = C
class T:
    pass
def generate(*a, **k):
    {MARK}
"""


def with_code(folder: Path, kind: str) -> Path:
    """A model folder that names Python files of its own in every place where transformers looks for them."""
    save(tiny_causal(), tiny_tokenizer(), folder)
    (folder / "own.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    (folder / "setup.py").write_text(CODE)
    (folder / "__init__.py").write_text(CODE)
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": [None, "own.T"]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text()) | {"auto_map": classes, "custom_generate": "custom_generate"}
        if kind == "unknown":
            settings |= {"model_type": "own", "tokenizer_class": "T"} if name != "generation_config.json" else {}
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["known", "unknown"])
@pytest.mark.parametrize("role", ["student.path", "teacher.path", "student.tokenizer"])
def test_a_folders_own_code_is_not_run_unless_it_is_trusted(kind: str, role: str, tmp_path: Path):
    made = materials(tmp_path / "made")
    folder = with_code(tmp_path / "own", kind)
    path = tmp_path / "run.yaml"
    quick = {"train.steps": 1, "validation.every": 1, "data.text": None, "data.test": {}}
    path.write_text(yaml.safe_dump(tiny_settings(made, tmp_path / "run", quick)))
    said = distillm("train", path, f"{role}={folder}")
    assert said.code in (0, 2), said.err  # 0: what the folder holds is known, and needs no code of its own
    assert "Traceback" not in said.err
    assert untouched()


def test_the_mark_is_left_where_code_runs(tmp_path: Path):
    folder = with_code(tmp_path / "own", "unknown")
    with contextlib.suppress(ModelError):
        load_model(folder, trust_remote_code=True)
    assert not untouched()


def test_an_attention_kernel_named_by_a_model_folder_is_not_fetched(tmp_path: Path):
    folder = save(tiny_causal(), tiny_tokenizer(), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        (folder / "config.json").write_text(json.dumps(settings | {name: "someone/evil-kernel"}))
        with pytest.raises(ModelError, match="asks for the attention kernel someone/evil-kernel of the hub"):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(settings | {"attn_implementation": "eager"}))
    load_model(folder)


def test_what_a_run_saves_holds_no_code_and_no_pickle(tmp_path: Path):
    made = materials(tmp_path / "made")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(made, tmp_path / "run", {"train.steps": 2})))
    assert distillm("train", path).code == 0
    kinds = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".yaml", ".html", ".safetensors", ".jinja", ".md"}
    assert all(
        isinstance(tensor, torch.Tensor) for tensor in load_file(tmp_path / "run/student/model.safetensors").values()
    )


# -------------------------------------------------------------------------------------------------------------- data


def test_a_data_sets_own_script_is_not_run(tmp_path: Path):
    script = "open('pwned', 'w')\nimport datasets\nclass Own(datasets.GeneratorBasedBuilder):\n    pass\n"
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(script)
    (folder / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    for source in (folder, folder / "own.py"):
        with pytest.raises(DataError):
            read_rows(str(source))
    assert read_rows(folder, split="train") == [{"instruction": "a", "output": "b"}]
    (Path("owner") / "own").mkdir(parents=True)
    (Path("owner") / "own" / "own.py").write_text(script)
    for source in ("owner/own", "owner/own/own.py"):
        with pytest.raises(DataError):
            read_rows(source)
    assert os.listdir() == ["owner"]


@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.zip", "rows.tar", "rows.jsonl.zst", "rows.pkl", "rows.pt", "rows.npy"]
)
def test_archives_and_pickles_are_no_data(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert "cannot read" in refused("tokenizer", tmp_path / name, "-o", tmp_path / "new")
    assert untouched()


# ---------------------------------------------------------------------------------------------------------- the page


def test_every_test_that_the_page_names_is_there():
    """A name that ends in ... is the beginning of one."""
    here = Path(__file__).parent
    text = (here.parent / "docs" / "security.md").read_text(encoding="utf-8")
    there = {name for path in here.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = re.findall(r"`(test_\w+)(\.\.\.)?`", text)
    assert len(named) > 20
    for name, cut in named:
        assert any(one.startswith(name) if cut else one == name for one in there), name


def test_the_page_counts_the_ways_out_and_the_generated_inputs():
    here = Path(__file__).parent
    text = (here.parent / "docs" / "security.md").read_text(encoding="utf-8")
    fuzzed = "".join((here / name).read_text() for name in ("test_fuzz.py", "test_fuzz_files.py"))
    assert f"{len(ESCAPES)} known ways" in text
    assert f"({sum(map(int, re.findall(r'^@fuzz.(.*).$', fuzzed, re.M))):,} generated inputs" in text
