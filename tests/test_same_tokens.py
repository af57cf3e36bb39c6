"""A model reads the same ids in training, when it or its teacher answers, in `distillm eval` and `distillm generate`.

Of a tokenizer that puts a token in front of every text (OPT) and of one that does not (GPT-2), real ones where they are
at hand. The authors' code of DistiLLM reads another first token in evaluation than in training.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer

from command_line import done
from distillm import generation
from distillm.config import make_run
from distillm.data import Task
from distillm.project import build, steps
from distillm.tasks import load_task
from distillm.types import last_turn
from tiny import CHAT_TEMPLATE, EOS, save, tiny_causal, tiny_tokenizer
from tiny_run import settings, write_rows

TOKENIZERS = Path(__file__).parents[2] / "shared" / "tokenizers"
TEMPLATES = {"plain": "Q: {{ instruction }}\nA: ", "bos": "{{ bos }}Q: {{ instruction }}\nA: ", "chat": "chat"}
ROWS = [{"instruction": f"Say {word}.", "output": f"{word} it is"} for word in ("one", "two", "three", "four", "five")]


def tiny_with_bos() -> Any:
    tokenizer = tiny_tokenizer(chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    end = tokenizer.convert_tokens_to_ids(EOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, end)])
    tokenizer.bos_token = EOS
    return tokenizer


def real(name: str) -> Any:
    folder = TOKENIZERS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    if name == "gpt2":
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer
    # Its folder holds no settings; the models' own say that </s> is put in front.
    ends = {f"{kind}_token": "</s>" for kind in ("bos", "eos", "unk")}
    opt: Any = GPT2Tokenizer.from_pretrained(folder, **ends, pad_token="<pad>", add_bos_token=True)
    opt.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return opt


MAKERS = {
    "tiny-bos": (tiny_with_bos, True, "opt"),
    "tiny": (lambda: tiny_tokenizer(chat_template=CHAT_TEMPLATE), False, "gpt2"),
    "opt": (lambda: real("opt"), True, "opt"),
    "gpt2": (lambda: real("gpt2"), False, "gpt2"),
}


class Reads:
    """The ids that models were given to answer, without padding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.found: list[tuple[int, ...]] = []
        respond = generation._respond

        def heard(model: Any, contexts: list[list[int]], *rest: Any) -> Any:
            self.found += map(tuple, contexts)
            return respond(model, contexts, *rest)

        monkeypatch.setattr(generation, "_respond", heard)

    def taken(self) -> set[tuple[int, ...]]:
        """What was read since the last time."""
        found, self.found = {*self.found}, []
        return found


def made_with(tokenizer: Any, kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    room = {"n_positions": 256} if kind == "gpt2" else {"max_position_embeddings": 256}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, seed in (("teacher", 1), ("student", 2)):
        model = tiny_causal(kind, vocab_size=len(tokenizer), layers=1, seed=seed, **room, **ids)
        save(model, tokenizer, folder / name)
    for name in ("train", "valid", "test"):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def settings_of(folder: Path, **data: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "data.text": None,
        "data.max_prompt": 100,
        "data.max_length": 140,
        "student.dropout": 0.0,
    }
    changes |= {"train.steps": 2, "train.batch_size": 5, "validation.every": 2, "generation.max_new_tokens": 3}
    changes |= {"method": {"name": "distillm2"}, "validation.samples": 5, "evaluation.seeds": [1]}
    return settings(folder, folder / "run", changes | {f"data.{key}": value for key, value in data.items()})


def check(given: dict[str, Any], folder: Path, reads: Reads, wanted: set[tuple[int, ...]]) -> None:
    """Every way of reading the rows of ``given`` reads ``wanted``."""
    project = build(make_run(given))
    examples = [*project.train.examples, *project.validation.examples, *project.tests["numbers"].examples]
    assert {tuple(last_turn(e).prompt) for e in examples} == wanted  # training, and what losses are measured on
    trained = [row for step in steps(project) for row in step.rows]
    assert {row.origin for row in trained} == {"student", "teacher"}
    assert {tuple(row.prompt) for row in trained} == wanted
    assert reads.taken() == wanted  # what student and teacher answered
    (folder / "settings.yaml").write_text(yaml.safe_dump(given))
    done("train", folder / "settings.yaml")
    assert reads.taken() == wanted  # samples and the scoring of the test rows as well
    done("eval", folder / "run", "--data", folder / "test.jsonl", "--output", folder / "scores.json")
    assert reads.taken() == wanted
    done("generate", folder / "run", "--file", folder / "test.jsonl")
    assert reads.taken() == wanted
    given = given | {"output": str(folder / "other"), "method": {"name": "seqkd"}}
    assert {tuple(e.prompt) for e in build(make_run(given)).train.examples} == wanted
    assert reads.taken() == wanted  # what the teacher answered for its file of responses


TINY = [(name, template) for name in ("tiny-bos", "tiny") for template in TEMPLATES]


@pytest.mark.parametrize(("name", "template"), [*TINY, ("opt", "alpaca"), ("gpt2", "alpaca")])
def test_one_row_has_the_same_ids_wherever_it_is_read(
    name: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, adds_bos, kind = MAKERS[name]
    tokenizer = make()
    bos = tokenizer.bos_token if adds_bos else ""
    text = TEMPLATES.get(template, template).replace("{{ bos }}", bos)
    folder = made_with(tokenizer, kind, tmp_path, ROWS)
    wanted: set[tuple[int, ...]] = set()
    for row in ROWS:
        said = Task(template=text).prompt_text(row, tokenizer)
        plain = tokenizer(said.removeprefix(bos), add_special_tokens=False).input_ids
        wanted.add((*([tokenizer.bos_token_id] if adds_bos else []), *plain))
    assert {ids[0] == tokenizer.bos_token_id for ids in wanted} == {adds_bos}
    check(settings_of(folder, template=text), folder, Reads(monkeypatch), wanted)
    asked = Reads(monkeypatch)
    done("generate", folder / "run", ROWS[0]["instruction"])
    [read] = asked.taken()
    assert read in wanted


@pytest.mark.parametrize("name", ["tiny-bos", "tiny"])
def test_the_last_turn_of_a_chat_is_asked_with_the_ids_that_were_learned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make, adds_bos, kind = MAKERS[name]
    tokenizer = make()
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(talk)]}
        for talk in (("Say one.", "one", "And two?", "two"), ("Three?", "three"), ("a", "b", "c", "d", "e", "f"))
    ]
    rows += rows[:2]
    folder = made_with(tokenizer, kind, tmp_path, rows)
    end = tokenizer.eos_token_id
    examples, _ = Task(load_task("chat")).examples(
        rows, tokenizer, max_prompt=100, max_length=140, end_id=end, source="x"
    )
    wanted = {tuple(last_turn(e).prompt) for e in examples}
    for ids, row in zip([last_turn(e).prompt for e in examples], rows, strict=True):
        assert ids.count(end) == adds_bos + (len(row["messages"]) // 2 - 1)
        chat = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == chat
    check(settings_of(folder, template=None, task="chat"), folder, Reads(monkeypatch), wanted)
