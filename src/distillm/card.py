"""The model card of a student: metadata that the hub reads, and what somebody who uses the model should know.

A card is published. It is made of names and numbers of the run folder: no text of a row, no path of this machine.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .config import Run, recipes
from .data_settings import HELD_OUT
from .errors import DistillmError
from .explain import flat
from .known import known
from .method_settings import Method, Section
from .paths import is_dir, is_file
from .report.read import RunFolder, Scores, mapping, number_in, read_run
from .report.text import SYSTEM_NAMES, mean_std, method_name, parameter_count, score_name, short_name
from .screen import visible
from .tasks import CHAT, load_task
from .writing import write_text

NAME = "README.md"
LONGEST = 120
LONGEST_TEMPLATE = 4000
_FILES = (".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt", ".yaml", ".yml")
_SETTINGS = ("method", "optim", "train", "generation", "student.dtype", "student.dropout", "student.lora", "seed")
# Of a command, what has no room for a path or a name: numbers and words under settings that take nothing else.
_OVERRIDE = re.compile(r"((method|optim|train|generation|validation|evaluation|checkpoint)\.[a-z_.]+|seed)=[\w.,+-]+")


def write_card(folder: Path) -> Path:
    """Write the card of the run in ``folder`` into its ``student/``, in place of the one there, and return its path.

    Raises:
        DataError: ``folder`` is no run.
        StorageError: the card could not be written.
    """
    path = folder / "student" / NAME
    write_text(path, card_of(read_run(folder)))
    return path


def card_of(run: RunFolder) -> str:
    """The card as text: YAML between two lines of ``---``, then Markdown.

    Whatever a name in the run holds, it is a plain value in the one and a piece of code in the other.
    """
    parts = [
        *_introduction(run), "", *_method(run), "", *_data(run), "", *_scores(run), "", *_use(run), "",
        *_making(run), "", *_limits(run), "", *_licence(run),
    ]  # fmt: skip
    text = f"---\n{_metadata(run).to_yaml(line_break=chr(10))}\n---\n\n" + "\n".join(parts) + "\n"
    return str(ModelCard(text))


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can only mean a model or data set of the hub: nothing lies there on this machine."""
    if name in known():  # of which a folder may be at hand
        return not is_file(Path(name))
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not (name.lower().endswith(_FILES) or is_dir(Path(name)) or is_file(Path(name)))


def hub_names(config: Mapping[str, Any]) -> list[str]:
    """The names in ``config`` of models and data sets that are the hub's, as things lie on this machine now.

    A run records them, so that its card says the same wherever it is written.
    """
    student, teacher, data = (mapping(config, key) for key in ("student", "teacher", "data"))
    given = [student.get("path"), teacher.get("path"), mapping(teacher, "server").get("model")]
    given += [mapping(data, "responses_server").get("model")]
    given += [_path(data.get(key)) for key in ("train", "validation", "text")]
    given += [_path(source) for source in mapping(data, "test").values()]
    return sorted({name for name in given if isinstance(name, str) and is_hub_name(name)})


def _on_hub(run: RunFolder, name: str) -> bool:
    recorded = run.provenance.get("hub")
    return name in recorded if isinstance(recorded, list) else is_hub_name(name)


def _public(run: RunFolder, name: str) -> str:
    """``name`` as it may be published: a hub name whole, of a path the last part alone."""
    return name if _on_hub(run, name) else short_name(name)


def last_part(path: str) -> str:
    """What stands behind the last slash, of either kind."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _path(source: Any) -> Any:
    return source.get("path") if isinstance(source, Mapping) else source


def code(text: object) -> str:
    """``text`` as code in a line or a table's cell of Markdown, where nothing in it means anything."""
    line = visible(" ".join(str(text).split())).translate({ord("`"): "'", ord("|"): "/", ord("\\"): "/"})
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return f"`{line or '–'}`"


# ---------------------------------------------------------------------------------------------------------- metadata


def _metadata(run: RunFolder) -> ModelCardData:
    base = _base(run)
    return ModelCardData(
        library_name="peft" if _is_adapter(run) else "transformers",
        pipeline_tag=_pipeline(run),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if _is_adapter(run) else "finetune",
        datasets=_datasets(run) or None,
        tags=[
            "distillm",
            *(["knowledge-distillation"] if _teacher(run) else []),
            *(name for name in _methods() if name == method_name(run)),
        ],
        model_name=_model_name(run),
        eval_results=_results(run) or None,
    )


def _base(run: RunFolder) -> str | None:
    """The hub's name of what the student started from, its teacher where it took layers of that; else None."""
    student = mapping(run.config, "student")
    origin = mapping(run.config, "teacher") if student.get("layers") is not None else student
    path = origin.get("path")
    return path if isinstance(path, str) and _on_hub(run, path) else None


def _datasets(run: RunFolder) -> list[str]:
    data = mapping(run.config, "data")
    named = [_hub_data(run, data.get(key)) for key in ("train", "text")]
    return list(dict.fromkeys(name for name in named if name is not None))


def _hub_data(run: RunFolder, source: Any) -> str | None:
    """The hub's name of a data set, of one that is known by another name too."""
    path = _path(source)
    if not isinstance(path, str) or not _on_hub(run, path):
        return None
    return known()[path].path if path in known() else path


def _data_name(run: RunFolder, source: Any) -> str:
    parts = [source.get(key) for key in ("name", "split")] if isinstance(source, Mapping) else []
    named = _hub_data(run, source) or _public(run, str(_path(source)))
    return ", ".join([named, *(str(part) for part in parts if part)])


def _pipeline(run: RunFolder) -> str:
    task = str(mapping(run.config, "data").get("task"))
    return task if task in ("summarization", "translation") and _is_encoder_decoder(run) else "text-generation"


def _results(run: RunFolder) -> list[EvalResult]:
    """The student's scores: means over rows, and over the decoding seeds where there are several."""
    tests = mapping(run.config, "data", "test")
    return [
        EvalResult(
            task_type=_pipeline(run),
            dataset_type=_hub_data(run, tests.get(entry.data)) or _plain(entry.data) or "data",
            dataset_name=_plain(entry.data) or "data",
            metric_type=_plain(name),
            metric_value=score.mean,
            metric_name=_plain(score_name(name)),
            metric_args=None if score.std is None or score.num_seeds < 2
            else {"std": score.std, "seeds": score.num_seeds},
        )
        for entry in run.scores if entry.system == "student"
        for name, score in entry.scores.items() if _plain(name)
    ]  # fmt: skip


def _model_name(run: RunFolder) -> str:
    student, teacher = mapping(run.config, "student"), mapping(run.config, "teacher")
    if isinstance(student.get("path"), str):
        begun = _public(run, student["path"]).split("/")[-1]
    elif student.get("layers") is not None:
        layers = student["layers"]
        number = len(layers) if isinstance(layers, list) else layers
        whole = _public(run, str(teacher.get("path"))).split("/")[-1]
        begun = f"{whole.removesuffix('.gguf')}-{number}-layers"
    else:
        begun = str(mapping(student, "config").get("model_type") or "student")
    begun = begun.removesuffix(".gguf")
    return "-".join(part for part in (_plain(begun), _plain(method_name(run) or "")) if part) or "student"


def _plain(text: str) -> str:
    """``text`` as the hub takes names: letters, digits and a few signs."""
    return re.sub(r"[^\w.()/% -]+", "-", text, flags=re.ASCII)[:LONGEST].strip("- ")


# --------------------------------------------------------------------------------------------------------- the folder


def _methods() -> dict[str, type[Section]]:
    """The settings of each method, by its name."""
    return {kind.model_fields["name"].default: kind for kind in get_args(get_args(Method)[0])}


def _is_adapter(run: RunFolder) -> bool:
    lora = mapping(run.config, "student").get("lora")
    return isinstance(lora, Mapping) and lora.get("merge") is False


def _is_encoder_decoder(run: RunFolder) -> bool:
    recorded = mapping(run.provenance, "models", "student").get("encoder_decoder")
    if isinstance(recorded, bool):
        return recorded
    try:
        found = json.loads((run.path / "student" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("is_encoder_decoder") is True


def _teacher(run: RunFolder) -> str | None:
    """The teacher in words, or None where the student learned from the data alone."""
    teacher = mapping(run.config, "teacher")
    if method_name(run) == "sft" and not _taught(run):  # it was measured against, if at all
        return None
    if teacher.get("adapter_off"):
        return "the student itself without its adapter"
    if teacher.get("cached"):
        return f"a model of which the states of all rows were kept ({code(teacher['cached'])})"
    if isinstance(teacher.get("path"), str):
        return code(_public(run, teacher["path"]))
    for server in (mapping(teacher, "server"), mapping(run.config, "data", "responses_server")):
        if isinstance(server.get("model"), str):
            return f"{code(_public(run, server['model']))}, on a server"
    return None


def _taught(run: RunFolder) -> bool:
    """Whether fine-tuning had anything of the teacher: its responses, or its layers."""
    answers = mapping(run.config, "data").get("responses") == "teacher"
    return answers or mapping(run.config, "student").get("layers") is not None


# --------------------------------------------------------------------------------------------------------------- text


def _introduction(run: RunFolder) -> list[str]:
    student, teacher = mapping(run.config, "student"), _teacher(run)
    layers, decoder = student.get("layers"), student.get("decoder_layers")
    if isinstance(student.get("path"), str):
        begun = f"It began as {code(_public(run, student['path']))}."
    elif layers is not None:
        own = f"; its decoder with {_layers(decoder)}" if decoder is not None else ""
        begun = f"It began with {_layers(layers)} of the teacher{own}."
    else:
        kind = mapping(student, "config").get("model_type") or "model"
        begun = f"It began with random weights, as a {code(kind)} built from a configuration."
    if _is_adapter(run):
        begun += " This folder holds a LoRA adapter alone; the base model is not part of it."
    elif isinstance(student.get("lora"), Mapping):
        begun += " A LoRA adapter was trained and merged into the weights."
    made = f"a student of {teacher}" if teacher else "a language model, fine-tuned without a teacher"
    lines = [f"# {_model_name(run)}", "", f"This model is {made}, made with distillm. {begun}", ""]
    return lines + _sizes(run)


def _layers(kept: Any) -> str:
    return (
        f"the layers {code(', '.join(map(str, kept)))}"
        if isinstance(kept, list)
        else f"{code(kept)} layers, evenly spaced,"
    )


def _sizes(run: RunFolder) -> list[str]:
    rows: list[str] = []
    for role in ("student", "teacher"):
        facts = mapping(run.provenance, "models", role)
        count = run.parameters(role)
        if count is not None:
            shape = [f"{number_in(facts, key):.0f}" if number_in(facts, key) else "–" for key in ("layers", "width")]
            rows.append(f"| {role} | {parameter_count(count)} | {shape[0]} | {shape[1]} |")
    if not rows:
        return []
    student, teacher = run.parameters("student"), run.parameters("teacher")
    table = ["| model | parameters | layers | width |", "|---|---:|---:|---:|", *rows]
    if student and teacher:
        said = f"{teacher / student:.2f} to 1: the student has {100 * student / teacher:.1f} % of the parameters."
        table += ["", f"Compression {said}"]
    return table


def _method(run: RunFolder) -> list[str]:
    name = method_name(run)
    found = None if name is None else _methods().get(name)
    lines = ["## Method", "", " ".join((found.__doc__ or "").split()) if found else f"Method: {code(name)}."]
    planned, last = run.planned, run.last_step
    batch = number_in(mapping(run.config, "train"), "batch_size")
    if last is not None:
        of = f" of {planned}" if planned and planned != last else ""
        lines.append(f"Trained for {last}{of} steps" + (f" of {batch:.0f} rows." if batch else "."))
    best: list[int] = []
    for event in run.events:
        if event.get("event") == "best":
            best.append(event["step"])
        elif event.get("event") == "resumed" and "validation.select=" in str(event.get("message")):
            best = []  # the best by one figure says nothing about another
    lost = any(event.get("event") == "damaged" and event["step"] == last for event in run.events)
    if best and not lost:
        lines.append(f"The weights are those of step {best[-1]}, the best by validation.")
    changed = _changed(run, found)
    if changed:
        lines += ["", "Settings that are not distillm's defaults:", ""]
        lines += [f"- {code(key)}: {code(json.dumps(value, ensure_ascii=False))}" for key, value in changed.items()]
    return lines


def _changed(run: RunFolder, method: type[Section] | None) -> dict[str, Any]:
    """The settings of training that differ from their defaults, by dotted name."""
    now = {key: value for key, value in flat(run.config).items() if key.startswith(_SETTINGS)}
    plain = {name: field.default for name, field in Run.model_fields.items()}
    usual = {name: part.model_dump(mode="json") for name, part in plain.items() if isinstance(part, Section)}
    usual["method"] = {} if method is None else {n: f.default for n, f in method.model_fields.items()}
    before = flat(usual) | {"seed": plain["seed"], "student.dtype": "float32"}
    left_out = ("method.name", "train.timeout_minutes", "train.steps", "train.batch_size", "generation.batch_size")
    return {key: value for key, value in now.items() if value != before.get(key) and key not in left_out}


def _data(run: RunFolder) -> list[str]:
    data, rows = mapping(run.config, "data"), mapping(run.provenance, "rows")
    lines = ["## Data", ""]
    for key, said in (("train", "Trained on"), ("validation", "Chosen by"), ("text", "Plain text besides")):
        if data.get(key) is not None:
            count = number_in(rows, key)
            unit = "windows" if key == "text" else "rows"
            counted = "" if count is None else f", {count:.0f} {unit}"
            lines.append(f"- {said}: {code(_data_name(run, data[key]))}{counted}")
        elif key == "validation" and (count := number_in(rows, key)):
            lines.append(f"- {said}: {count:.0f} more rows of the same")
    if data.get("test_size") is not None:
        lines.append(f"- The test set {code(HELD_OUT)}: rows of the same, which were not trained on")
    if data.get("task"):
        lines.append(f"- Task: {code(_public(run, str(data['task'])))}")
    wrote = data.get("responses") == "teacher" or method_name(run) == "seqkd"
    lines.append(f"- Responses: {'written by the teacher' if wrote else 'those of the data'}")
    if data.get("teacher_template") or data.get("teacher_system"):
        lines.append("- The teacher read another prompt than the student.")
    return [*lines, "", *_prompt(data)]


def _prompt(data: Mapping[str, Any]) -> list[str]:
    """How a prompt is laid out, without which the model cannot be used as it was trained."""
    template = data.get("template")
    try:
        task = load_task(str(data.get("task") or "instruction"))
        template = task.text_of(str(template or task.template))
    except DistillmError:  # a task of the user's own that is not there any more
        pass
    system = data.get("system")
    extra = ["", "The system message:", "", *_block(str(system))] if system else []
    if template == CHAT:
        return ["Prompts are laid out by the chat template of the tokenizer.", *extra]
    if template is None:
        return []
    return ["Prompts are laid out by this Jinja template:", "", *_block(str(template)), *extra]


def _block(text: str) -> list[str]:
    """``text`` as a block of code that nothing in it ends."""
    text = visible(text.replace("\r\n", "\n"))[:LONGEST_TEMPLATE]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return [f"{fence}text", *text.split("\n"), fence]


def _scores(run: RunFolder) -> list[str]:
    lines = ["## Scores", ""]
    if not run.scores:
        return [*lines, "None were computed."]
    for data in dict.fromkeys(entry.data for entry in run.scores):
        found = {entry.system: entry for entry in run.scores if entry.data == data}
        shown = [system for system in ("before", "student", "teacher") if system in found]
        lines += [*_table(data, {system: found[system] for system in shown}), ""] if shown else []
    lines.append(
        "Means over rows; ± is the standard deviation over decoding seeds. ROUGE, BLEU, chrF, exact match, agreement, "
        "repetition and answers cut by length are in percent."
    )
    return lines


def _table(data: str, systems: Mapping[str, Scores]) -> list[str]:
    rows = next((entry.num_rows for entry in systems.values()), None)
    names = list(dict.fromkeys(name for entry in systems.values() for name in entry.scores))
    heads = [SYSTEM_NAMES.get(system, system) for system in systems]
    return [
        f"On {code(data)}{'' if rows is None else f', {rows} rows'}:",
        "",
        f"| score | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(heads),
        *(
            f"| {code(score_name(name))} | "
            + " | ".join(mean_std(name, entry.scores.get(name)) for entry in systems.values()) + " |"
            for name in names
        ),
    ]  # fmt: skip


def _use(run: RunFolder) -> list[str]:
    auto = "AutoModelForSeq2SeqLM" if _is_encoder_decoder(run) else "AutoModelForCausalLM"
    length = number_in(mapping(run.config, "generation"), "max_new_tokens") or 256
    chat = mapping(run.config, "data").get("template") == CHAT or mapping(run.config, "data").get("task") == "chat"
    ask = (
        ['chat = [{"role": "user", "content": "..."}]',
         'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
         "return_dict=True)"]
        if chat
        else ['prompt = "..."  # laid out as the data were',
              'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)']
    )  # fmt: skip
    start = "" if _is_encoder_decoder(run) else 'inputs["input_ids"].shape[1] :'
    load = f"model = {auto}.from_pretrained(name)"
    return [
        "## Use",
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'name = "OWNER/NAME"  # where this model is: on the hub, or a folder',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        load + ("  # needs peft, and loads the base model too" if _is_adapter(run) else ""),
        *ask,
        f"output = model.generate(**inputs, max_new_tokens={length:.0f})",
        f"print(tokenizer.decode(output[0{', ' + start if start else ''}], skip_special_tokens=True))",
        "```",
    ]


def _making(run: RunFolder) -> list[str]:
    origin = run.provenance
    versions = [
        f"{name} {origin[name]}" for name in ("distillm", "python", "torch", "transformers") if origin.get(name)
    ]
    lines = ["## How it was made", ""]
    command = _command(origin.get("command") or "")
    lines += [f"- Command: {code(command)}"] if command.startswith("distillm") else []
    lines += [f"- Versions: {code(', '.join(versions))}"] if versions else []
    lines += [f"- Git revision of the working folder: {code(origin['git'])}"] if origin.get("git") else []
    lines += [f"- Device: {code(origin['device'])}"] if origin.get("device") else []
    return lines


def _command(given: Any) -> str:
    """The command without what may name a place or a person: paths by their last part, other settings left out."""
    words = [str(word) for word in given] if isinstance(given, list) else str(given).split()
    kept: list[str] = []
    for word in words:
        last = last_part(word) if "=" not in word else ""
        whole = word in ("distillm", "train", *recipes()) or _OVERRIDE.fullmatch(word)
        shown = word if whole else last if re.fullmatch(r"[\w.-]+\.ya?ml", last) else "..."
        if shown != "..." or kept[-1:] != ["..."]:
            kept.append(shown)
    return " ".join(kept)


def _limits(run: RunFolder) -> list[str]:
    tested = "on the data named above" if run.scores else "not at all"
    learned = (
        "teacher's errors and leanings as well as its answers" if _teacher(run) else "errors and leanings of the data"
    )
    return [
        "## Limits",
        "",
        f"The model was tested {tested}, and nothing is known of it elsewhere. It has learned the {learned}. It can "
        "say what is false or harmful; whether it does was not measured.",
    ]


def _licence(run: RunFolder) -> list[str]:
    begun = mapping(run.config, "student").get("path") is not None
    sources = ["the model it began as"] * begun + ["the teacher"] * (_teacher(run) is not None) + ["the data"]
    return [
        "## Licence",
        "",
        f"Not stated here: distillm does not know it. What may be done with this model depends on the licences of "
        f"{' and '.join([', '.join(sources[:-1]), sources[-1]] if len(sources) > 1 else sources)}. Check them, and "
        "write `license:` into the metadata above, before you publish it.",
    ]
