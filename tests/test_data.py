from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from distillm.data import (
    LengthReport,
    Task,
    encode_prompts,
    encode_responses,
    read_rows,
)
from distillm.errors import ConfigError, DataError
from distillm.types import Example
from tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
END = TOKENIZER.convert_tokens_to_ids(EOS)
LONG = "Seven birds sat on the wire; three of them flew away. 🦊 " * 15


def bos_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, END)]
    )
    tokenizer.bos_token = EOS
    return tokenizer


def build(
    task: Task,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    max_prompt: int = 200,
    max_length: int = 400,
    end_id: int = END,
) -> tuple[list[Example], LengthReport]:
    return task.examples(rows, tokenizer, max_prompt=max_prompt, max_length=max_length, end_id=end_id, source="train")


def row(instruction: Any = "Say hello.", input: Any = "", output: Any = "Hello.") -> dict[str, Any]:  # noqa: A002
    return {"instruction": instruction, "input": input, "output": output}


# Templates


def test_the_alpaca_wording() -> None:
    task = Task()
    assert task.prompt_text(row("Do {it}.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo {it}.\n\n### Response:\n"
    )
    assert task.prompt_text(row(input="Some\ntext.")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSay hello.\n\n### Input:\nSome\ntext."
        "\n\n### Response:\n"
    )


@pytest.mark.parametrize("given_input", ["", "  \n", None])
def test_a_blank_input_is_no_input(given_input: str | None) -> None:
    assert "Input" not in Task().prompt_text(row(input=given_input))
    assert "Input" not in Task().prompt_text({"instruction": "Say hello."})


def test_fields_are_mapped() -> None:
    task = Task(fields={"instruction": "question", "output": "answers"})
    rows = [{"question": "Why?", "answers": ["So.", "Because."], "input": "not a mapped field"}]
    assert "Why?" in task.prompt_text(rows[0])
    assert "not a mapped" not in task.prompt_text(rows[0])
    assert task.references(rows[0]) == ["So.", "Because."]
    examples, _ = build(task, rows)
    assert TOKENIZER.decode(examples[0].response[:-1]) == "So."


def test_a_jinja_template_sees_task_names_and_raw_names() -> None:
    task = Task(
        fields={"instruction": "q", "input": "doc", "output": "a"},
        template="{{ instruction }}|{{ q }}|{{ doc }}{% if input %}|{{ input }}{% endif %}|{{ topic }}\n",
    )
    assert task.prompt_text({"q": "Q", "doc": "D", "a": "A", "topic": "T"}) == "Q|Q|D|D|T\n"
    assert task.prompt_text({"q": "Q<", "doc": "", "topic": "T"}) == "Q<|Q<||T\n"


def test_a_jinja_template_needs_no_instruction() -> None:
    task = Task(fields={"output": "summary"}, template="{{ document }}\nTL;DR:")
    examples, _ = build(task, [{"document": "A river.", "summary": "River."}])
    assert TOKENIZER.decode(examples[0].tokens[:-1]) == "A river.\nTL;DR:River."
    assert examples[0].prompt == TOKENIZER("A river.\nTL;DR:").input_ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ question }}", "'question' is undefined; the fields it can use are: input, instruction"),
        ("{{ output }}", "'output' is undefined"),  # the response must not leak into its prompt
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ instruction.__init__.__globals__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_names_the_row_and_the_fields(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"train:0: the template failed: .*{reason}"):
        build(Task(template=template), [row()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "alpcaa"}, "neither a known name .* did you mean 'alpaca'?"),
        ({"template": "{{ instruction"}, "template: line 1: unexpected end of template"),
        ({"fields": {"instrction": "a"}}, "unknown key 'instrction'; allowed are .* did you mean 'instruction'?"),
        ({"fields": {"output": "a"}}, "needs a field for 'instruction'"),
        ({"system": "Be kind."}, "system applies to template 'chat' only"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Task(**settings)


def test_the_chat_template() -> None:
    task = Task(template="chat", system="Be kind.")
    text = "system: Be kind.\nuser: Say hello.\n\nIn French.\nassistant: "
    assert task.prompt_text(row(input="In French."), TOKENIZER) == text
    examples, _ = build(task, [row(input="In French.")])
    assert examples[0].prompt == TOKENIZER(text).input_ids
    assert examples[0].response == [*TOKENIZER("Hello.").input_ids, END]


def test_a_tokenizer_without_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template; choose template: alpaca"):
        build(Task(template="chat"), [row()], tiny_tokenizer())


def test_a_chat_template_that_refuses() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system message, please') }}")
    with pytest.raises(DataError, match=r"train:0: .*no system message, please.* or leave system out"):
        build(Task(template="chat", system="Be kind."), [row()], tokenizer)


# Tokens


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1).filter(str.strip), st.text(), st.text(min_size=1).filter(str.strip))
def test_tokens_decode_to_prompt_and_response(instruction: str, given_input: str, output: str) -> None:
    task = Task()
    rows = [row(instruction, given_input, output)]
    examples, report = build(task, rows, max_prompt=9_000, max_length=99_000)
    assert report == LengthReport(1)
    assert examples[0].id == "train:0"
    assert examples[0].prompt == TOKENIZER(task.prompt_text(rows[0])).input_ids
    assert examples[0].response == [*TOKENIZER(output).input_ids, END]
    if EOS not in output and "<pad>" not in output:
        assert TOKENIZER.decode(examples[0].response[:-1]) == output


def test_the_end_token_is_a_target_also_where_it_is_the_padding() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = EOS
    examples, _ = build(Task(), [row()], tokenizer, end_id=tokenizer.pad_token_id)
    assert examples[0].tokens[-1] == tokenizer.pad_token_id
    assert examples[0].targets[-1]


def test_bos_once_and_no_end_in_a_prompt() -> None:
    tokenizer = bos_tokenizer()
    assert tokenizer("a").input_ids[0] == tokenizer("a").input_ids[-1] == END
    body = TOKENIZER("water").input_ids
    assert encode_prompts(tokenizer, ["water", f"{EOS}water"], has_specials=False) == [[END, *body]] * 2
    assert encode_prompts(tokenizer, ["water"], has_specials=True) == [body]
    assert encode_prompts(TOKENIZER, ["water"], has_specials=False) == [body]
    assert encode_responses(tokenizer, ["water"], END) == [[*body, END]]


# Length limits


def kept(task: Task, example: Example, **content: str) -> str:
    """The longest beginning of the one given text that leads to the example's prompt."""
    role, text = next(iter(content.items()))
    for end in range(len(text), -1, -1):
        changed = task.prompt_text({**row(), **content, role: text[:end].rstrip()}, TOKENIZER)
        if TOKENIZER(changed).input_ids == example.prompt:
            return text[:end].rstrip()
    raise AssertionError("the prompt is not the template around a beginning of the text")


@pytest.mark.parametrize("template", ["alpaca", "chat", "Question: {{ instruction }} {{ input }}\nAnswer: "])
@pytest.mark.parametrize("role", ["instruction", "input"])
def test_a_long_prompt_is_cut_inside_the_text(template: str, role: str) -> None:
    task = Task(template=template)
    examples, report = build(task, [{**row(), role: LONG}], max_prompt=300)
    assert report == LengthReport(1, cut_prompts=1)
    prompt = examples[0].prompt
    assert 290 < len(prompt) <= 300
    text = kept(task, examples[0], **{role: LONG})
    assert len(text) > 100
    whole = task.prompt_text({**row(), role: LONG}, TOKENIZER)
    end = whole[whole.rindex(LONG.strip()[-1]) + 1 :]
    assert TOKENIZER.decode(prompt).endswith(end.lstrip())
    assert examples[0].response == [*TOKENIZER("Hello.").input_ids, END]


def test_the_input_is_cut_before_the_instruction() -> None:
    examples, report = build(Task(), [row(input=LONG), row(LONG, LONG)])
    texts = [TOKENIZER.decode(example.prompt) for example in examples]
    assert "### Instruction:\nSay hello.\n\n### Input:\nSeven birds" in texts[0]
    assert "### Instruction:\nSeven birds" in texts[1]
    assert "### Input:" not in texts[1]
    assert all(text.endswith("\n\n### Response:\n") for text in texts)
    assert report.cut_prompts == 2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 120), st.text(min_size=1, max_size=300), st.text(max_size=300))
def test_no_row_goes_beyond_the_limits(max_prompt: int, instruction: str, given_input: str) -> None:
    task = Task(template="Q: {{ instruction }}\n{{ input }}\nA:")
    rows = [row("fits"), row(instruction, given_input, LONG)]
    try:
        examples, report = build(task, rows, max_prompt=max_prompt, max_length=max_prompt + 20)
    except DataError:
        assert max_prompt < len(TOKENIZER(task.prompt_text(row("fits"))).input_ids)
        return
    assert report.used == len(examples)
    for example in examples:
        assert len(example.prompt) <= max_prompt
        assert len(example.tokens) <= max_prompt + 20
        assert TOKENIZER.decode(example.prompt).endswith("\nA:")


def test_a_long_response_is_cut_and_gets_no_end() -> None:
    room = 50
    prompt = len(build(Task(), [row()])[0][0].prompt)
    response = TOKENIZER(LONG).input_ids
    exact = TOKENIZER.decode(response[: room - 1])
    assert len(TOKENIZER(exact).input_ids) == room - 1
    rows = [row(output=LONG), row(output=exact)]
    examples, report = build(Task(), rows, max_prompt=prompt, max_length=prompt + room)
    assert report == LengthReport(2, cut_responses=1)
    assert examples[0].response == response[:room]
    assert examples[1].response == [*response[: room - 1], END]


def test_rows_that_cannot_be_used_are_counted_and_the_others_keep_their_number() -> None:
    blank = [row("  ", ""), row(output=""), row(output=" \n")]
    rows = [*blank, row(), row(output=None), {"instruction": "Say hello."}, row(output=[])]
    examples, report = build(Task(), rows)
    assert report == LengthReport(7, dropped=1, empty_responses=2, prompt_only=3)
    assert [example.id for example in examples] == ["train:3", "train:4", "train:5", "train:6"]
    assert examples[0].targets.count(True) > 1
    assert all(not any(example.targets) for example in examples[1:])
    assert all(example.prompt == examples[0].prompt for example in examples[1:])


def test_the_report_is_one_sentence() -> None:
    assert str(LengthReport(3)) == "3 of 3 rows used, all whole."
    assert str(LengthReport(9, cut_prompts=1, cut_responses=2, dropped=3, empty_responses=4)) == (
        "2 of 9 rows used: 1 with a cut prompt, 2 with a cut response (no end token), 3 dropped because the limit "
        "leaves no room for the user's text, or there is none, 4 left out because the response is empty."
    )


def test_no_usable_row() -> None:
    with pytest.raises(DataError, match=r"train: no row is usable: 0 of 2 rows used: 2 dropped .* Raise max_prompt"):
        build(Task(), [row(), row(LONG)], max_prompt=10)
    with pytest.raises(DataError, match=r"no row is usable: .* Leave the output field out"):
        build(Task(), [row(output="")])
    with pytest.raises(DataError, match="train: there are no rows"):
        build(Task(), [])


@pytest.mark.parametrize(("max_prompt", "max_length"), [(0, 10), (10, 10), (20, 10)])
def test_limits_out_of_range(max_prompt: int, max_length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_prompt={max_prompt} must be at least 1 and below max_length=10"):
        build(Task(), [row()], max_prompt=max_prompt, max_length=max_length)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "Why?", "output": "So."}, r"train:1: the field 'instruction' \(for instruction\) is missing; .*"
         "question, output; give its name in fields.instruction"),
        (row(instruction=None), r"train:1: the field 'instruction' \(for instruction\) is null"),
        (row(instruction=3), "train:1: the field 'instruction' is 3, not a text"),
        (row(input=["a"]), r"train:1: the field 'input' is \['a'\], not a text"),
        (row(output=4.5), "train:1: the field 'output' is 4.5, not a text"),
        (row(output=["a", None]), "train:1: the field 'output' is None, not a text"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(Task(), [row(), bad])


def test_a_chosen_field_that_no_row_has() -> None:
    task = Task(fields={"instruction": "instruction", "output": "outputs"})
    with pytest.raises(DataError, match=r"no row has the field 'outputs' \(for output\); .* did you mean 'output'?"):
        build(task, [row()])


# Real files


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "num_rows"), [("dolly/valid", 1000), ("dolly/test", 500), ("self_instruct/test", 242), ("vicuna/test", 80)]
)
def test_real_rows_with_the_tokenizer_of_gpt2(name: str, num_rows: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers", "gpt2"))
    rows = read_rows(shared("data", f"{name}.jsonl"))
    assert len(rows) == num_rows
    task, end = Task(), tokenizer.eos_token_id
    examples, report = task.examples(rows, tokenizer, max_prompt=256, max_length=512, end_id=end, source="x")
    assert report.used == len(examples) == num_rows - report.empty_responses
    ended = 0
    for example in examples:
        assert len(example.prompt) <= 256
        assert len(example.tokens) <= 512
        assert tokenizer.decode(example.prompt).startswith("Below is an instruction that describes a task")
        assert tokenizer.decode(example.prompt).endswith("\n\n### Response:\n")
        ended += example.tokens[-1] == end
        source = rows[int(example.id.removeprefix("x:"))]
        assert task.references(source)[0].startswith(tokenizer.decode(example.response[:-1])[:20])
    assert ended == len(examples) - report.cut_responses
    assert report.cut_prompts == sum(
        len(tokenizer(task.prompt_text(rows[int(example.id[2:])]), verbose=False).input_ids) > 256
        for example in examples
    )


@pytest.mark.data
def test_the_tokenizer_of_opt_gets_one_bos() -> None:
    folder = shared("tokenizers", "opt")
    # The folder holds no settings; the models' own say that </s> is put in front.
    tokenizer = GPT2Tokenizer.from_pretrained(
        folder, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True
    )
    bos = tokenizer.bos_token_id
    rows = read_rows(shared("data", "vicuna", "test.jsonl"))
    examples, _ = Task().examples(rows, tokenizer, max_prompt=64, max_length=512, end_id=bos, source="vicuna")
    for example in examples:
        assert example.prompt[0] == bos
        assert example.prompt.count(bos) == 1
        assert example.response.count(bos) == (example.tokens[-1] == bos)


@pytest.mark.data
def test_the_chat_template_of_qwen_survives_a_cut() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers", "qwen2.5"))
    rows = [row(LONG, "", "Seven."), row("How many?", LONG, "Seven.")]
    task, end = Task(template="chat"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples, report = task.examples(rows, tokenizer, max_prompt=100, max_length=200, end_id=end, source="x")
    assert report.cut_prompts == 2
    for example in examples:
        text = tokenizer.decode(example.prompt)
        assert text.startswith("<|im_start|>system\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert example.prompt.count(end) == 2
        assert 90 < len(example.prompt) <= 100
        assert example.response[-1] == end
