"""A run.yaml to start from: what three answers, and a look at the data and the teacher, come to."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Run, make_run
from .data import Task, read_rows, roomy
from .errors import ConfigError, DataError
from .known import known
from .models import load_tokenizer
from .paths import home, is_dir, is_file
from .settings_text import load_yaml
from .tasks import CHAT, TaskSpec, load_task, near, tasks

SAID = {
    "instruction": ("instruction", "prompt", "question", "query", "problem", "title"),
    "input": ("input", "context", "passage"),
    "output": ("output", "response", "answer", "completion", "target", "solution"),
    "document": ("document", "dialogue", "article", "text"),
    "summary": ("summary", "highlights", "abstract"),
    "source": ("source", "src"),
    "target": ("target", "tgt", "translation"),
    "messages": ("messages", "conversations", "conversation"),
}
"""How columns are called that hold a task's fields, the likeliest name first."""
ENOUGH_STEPS = 300
SAMPLE = 500
"""Rows whose lengths are looked at."""
_ESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Found:
    """What was read off the data and the teacher. ``lengths`` are longest prompt, row and response, where known."""

    task: str
    fields: dict[str, str]
    num_rows: int | None
    answered: bool
    chat: bool | None
    lengths: tuple[int, int, int] | None = None


def starting_yaml(
    teacher: str, student: str, data: str, *, method: str, fields: Mapping[str, str] | None = None, output: str
) -> tuple[Run, str]:
    """A commented run.yaml, and the run that it is.

    ``student`` is a number of the teacher's layers, or where a smaller model is; ``data`` a file or the name of a data
    set. ``fields`` are names of columns by the task's field, where they do not tell themselves.

    Raises:
        ConfigError: the answers do not make a run.
        DataError: the data cannot be read, or its columns do not say what they hold.
    """
    for option, path in (("--teacher", teacher), ("--student", student)):
        if _is_local(path) and not (is_dir(home(path)) or is_file(home(path))):
            raise ConfigError(f"{option} {path}: there is no such folder or file")
    found = _look(teacher, data, fields or {})
    text = _written(teacher, student, data, method, output, found)
    return make_run(load_yaml(text), source="what was given"), text


def stages(run: Run, file: str) -> list[tuple[str, str]]:
    """The commands from ``file`` to a student, each with its reason: what a run needs before it depends on where its
    models come from."""
    output = run.output
    if run.method.name in ("sft", "seqkd") or run.teacher is None:
        return [("Train the student:", _command(file))]
    found: list[tuple[str, str]] = []
    before: list[str] = []
    slower = ["optim.lr=1e-4"]  # weights that know something are not to lose it in the first steps
    if not run.teacher_writes:
        learns = [
            "teacher=null",
            f"student.path={run.teacher.path}",
            "method.name=sft",
            *slower,
            f"output={output}-teacher",
        ]
        found.append(("The teacher learns your rows first, unless it knows them:", _command(file, *learns)))
        before.append(f"teacher.path={output}-teacher/student")
    if run.student.layers is not None:
        begins = [*before, "method.name=sft", f"output={output}-first"]
        found.append(("A student of its layers begins as noise: fine-tune it.", _command(file, *begins)))
        before += [f"student.path={output}-first/student", *slower]
    return [*found, ("Distil:", _command(file, *before))]


def _command(file: str, *settings: str) -> str:
    return shlex.join(["distillm", "train", file, *settings])


def _look(teacher: str, data: str, given: Mapping[str, str]) -> Found:
    tokenizer = _tokenizer(teacher)
    chat = None if tokenizer is None else tokenizer.chat_template is not None
    if chat is None and {"instruct", "chat", "it"} & set(re.split(r"[^a-z]+", teacher.rpartition("/")[2].lower())):
        chat = True
    entry = None if is_file(Path(data)) else known().get(data)
    if entry is not None:
        if given:
            raise ConfigError(f"--fields is for data of your own: {data} is known, and its columns with it")
        return Found(entry.task or "instruction", {}, entry.splits.get("train"), answered=True, chat=chat)
    rows = read_rows(data)
    held = (name for row in rows[:SAMPLE] for name, value in row.items() if value is not None)
    columns = [str(name) for name in dict.fromkeys(held)]
    task, fields, answered = _read_as(data, columns, given)
    spec = load_task(task)
    lengths = None
    if tokenizer is not None:
        template = CHAT if chat or spec.conversation else ""
        kept = {role: fields.get(role, name) for role, name in spec.fields.items() if fields.get(role, name) in columns}
        lengths = _lengths(Task(spec, fields=kept, template=template), rows[:SAMPLE], tokenizer)
    return Found(task, fields, len(rows), answered, chat, lengths)


def _is_local(path: str) -> bool:
    """Whether ``path`` can be no hub name."""
    return path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1


def _tokenizer(teacher: str) -> Any:
    """The teacher's, where that lies here: nothing is fetched for a look."""
    return load_tokenizer(teacher) if is_dir(home(teacher)) or is_file(home(teacher)) else None


def _read_as(data: str, columns: Sequence[str], given: Mapping[str, str]) -> tuple[str, dict[str, str], bool]:
    """The task whose fields the columns are, their names where they differ, and whether there are responses."""
    there = {column.lower() for column in columns}
    absent = [column for column in given.values() if column.lower() not in there]
    if absent:
        raise DataError(f"{data} has no column {absent[0]}; it has {', '.join(columns)}{near(absent[0], columns)}")
    specs = {name: load_task(name) for name in ("instruction", *sorted(set(tasks()) - {"instruction"}))}
    found = {name: _named(spec, columns, given) for name, spec in specs.items()}
    for name, spec in specs.items():  # a task whose every text is there
        answer = spec.response or spec.conversation or ""
        if {*spec.required, answer} <= found[name].keys():
            return name, _changed(spec, found[name]), True
    asked = (
        next((n for n in specs if found[n] and set(found[n]) == set(given)), "instruction") if given else "instruction"
    )
    if specs[asked].conversation is None and set(specs[asked].required) <= found[asked].keys():  # prompts alone
        return asked, _changed(specs[asked], found[asked]), False
    if len(columns) == 1 and not given:
        return "instruction", {"instruction": columns[0]}, False
    raise DataError(
        f"{data}: its columns are {', '.join(columns)}, and which of them is asked and which is answered does not tell "
        "itself. Say it: --fields instruction=COLUMN,output=COLUMN (without output the teacher writes the responses)"
    )


def _named(spec: TaskSpec, columns: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    lower = {column.lower(): column for column in columns}
    for role in spec.fields:
        names = (given[role],) if role in given else SAID.get(role, (role,)) if not given else ()
        name = next((lower[name.lower()] for name in names if name.lower() in lower), None)
        if name is not None and name not in found.values():
            found[role] = name
    unknown = [role for role in given if role not in spec.fields]
    return {} if unknown else found


def _changed(spec: TaskSpec, found: Mapping[str, str]) -> dict[str, str]:
    return {role: name for role, name in found.items() if spec.fields[role] != name}


def _lengths(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[int, int, int] | None:
    """Limits for the tokens of prompt, row and response, which 98 in 100 are within; None for odd rows."""
    try:
        examples, _ = task.examples(rows, tokenizer, max_prompt=10**6, max_length=2 * 10**6, end_id=0, source="data")
    except (ConfigError, DataError):
        return None
    measured = [(e.start, len(e.tokens), sum(e.targets)) for e in examples]
    prompt, whole, response = (roomy(lengths) for lengths in zip(*measured, strict=True))
    return prompt, whole, response


def _written(teacher: str, student: str, data: str, method: str, output: str, found: Found) -> str:
    layers, name = student.isdecimal(), method if method.isidentifier() else _quoted(method)
    origin = f"layers: {student}" if layers else f"path: {_quoted(student)}"
    said = "   # so many of the teacher's layers; path: takes a smaller model" if layers else ""
    batch = 16 if (found.num_rows or 10_000) >= 1000 else 8
    steps = max(1, (found.num_rows or 10_000) // batch)
    epochs = min(20, max(3, math.ceil(ENOUGH_STEPS / steps)))
    lines = [
        "# A run of distillm. All settings, with their meaning: distillm schema. Look before you leap: distillm check.",
        f"teacher: {{path: {_quoted(teacher)}}}",
        f"student: {{{origin}}}{said}",
        "data:",
        f"  train: {_quoted(data)}",
        *_data_lines(found),
        f"method: {{name: {name}}}   # or sft, seqkd, kd, imitkd, gkd, minillm, distillm, distillm2",
        *_generation_lines(found),
        "# On a GPU add mixed_precision: bf16. Where memory runs out, lower micro_batch_size: no result changes.",
        f"train: {{epochs: {epochs}, batch_size: {batch}, micro_batch_size: 8}}",
        f"optim: {{lr: {'5.0e-4' if layers else '1.0e-4'}, warmup_steps: {min(20, epochs * steps // 10)}}}",
        "evaluation: {seeds: [10, 20]}   # each scores a set of answers of its own",
        f"output: {_quoted(output)}",
    ]
    return "\n".join(lines) + "\n"


def _data_lines(found: Found) -> list[str]:
    lines: list[str] = []
    if found.task != "instruction":
        lines.append(f"  task: {found.task}")
    if found.fields:
        lines.append(f"  fields: {{{', '.join(f'{role}: {_quoted(name)}' for role, name in found.fields.items())}}}")
    lines.append(
        f"  test_size: {min(100, max(1, (found.num_rows or 1000) // 10))}"
        "   # rows held out and scored at the end; test: {NAME: FILE} takes your own"
    )
    if found.chat and found.task != "chat":
        lines.append("  template: chat   # the teacher's own chat template; alpaca, or one in Jinja, for a plain model")
    if not found.answered:
        lines.append("  responses: teacher   # there are prompts only: the teacher writes the responses, once")
    if found.chat is None or found.lengths is None:
        lines.append(
            "  # the teacher is not here to be looked at: distillm check says whether template and lengths fit"
        )
    if found.lengths is not None:
        prompt, whole, _ = found.lengths
        whole = max(whole, prompt + 8) if found.answered else prompt + 128
        lines.append(f"  max_prompt: {prompt}   # tokens; 98 of 100 rows are no longer")
        lines.append(f"  max_length: {whole}")
    return lines


def _generation_lines(found: Found) -> list[str]:
    most = None if found.lengths is None else found.lengths[2] if found.answered else 128
    if most is None:
        return ["generation: {max_new_tokens: 128}   # the longest response that a model writes"]
    return [f"generation: {{max_new_tokens: {most}}}   # the longest response that a model writes, in tokens"]


def _quoted(text: str) -> str:
    """``text`` as YAML reads it back, which takes some characters for breaks of a line, and some not at all."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
