"""Chats: the assistant's turns alone are learned, and what a model reads before one is what it reads to write one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm.data import Task
from distillm.errors import ConfigError, DataError
from distillm.tasks import load_task
from distillm.types import Example, answer, last_turn
from tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
END = TOKENIZER.convert_tokens_to_ids(EOS)
CHAT = load_task("chat")


def says(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A row in which user and assistant speak in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + turns}


def build(
    rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, end_id: int = END, max_prompt: int = 5000, **more: Any
) -> Any:
    limits = {"max_prompt": max_prompt, "max_length": more.pop("max_length", max_prompt + 5000)}
    return Task(CHAT, **more).examples(rows, tokenizer, **limits, end_id=end_id, source="chat")


def only(row: dict[str, Any], tokenizer: Any = TOKENIZER, end_id: int = END, **more: Any) -> Example:
    [example], _ = build([row], tokenizer, end_id, **more)
    return example


def spans(example: Example) -> list[tuple[int, int]]:
    """Where each run of targets begins and ends."""
    marks = [False, *example.targets, False]
    edges = [i for i in range(len(example.targets) + 1) if marks[i] != marks[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


texts = st.text(min_size=1, max_size=30).filter(
    lambda text: text.strip() and "</s>" not in text and "<pad>" not in text
)
talks = st.lists(texts, min_size=2, max_size=9).map(lambda said: says(*said[: len(said) // 2 * 2]))


# -------------------------------------------------------------------------------------------------------------- masks


@settings(deadline=None, max_examples=60)
@given(talks, st.none() | texts)
def test_the_targets_are_what_the_assistant_says_and_the_end_of_its_turns(row: dict[str, Any], system: str | None):
    example = only(row, system=system)
    said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    found = [example.tokens[start:end] for start, end in spans(example)]
    assert [TOKENIZER.decode(tokens[:-1]) for tokens in found] == said
    assert all(tokens[-1] == END for tokens in found)
    whole = row["messages"] if system is None else [{"role": "system", "content": system}, *row["messages"]]
    assert TOKENIZER.decode(example.tokens) + "\n" == TOKENIZER.apply_chat_template(whole, tokenize=False)


@settings(deadline=None, max_examples=40)
@given(talks)
def test_before_each_turn_a_model_has_read_in_training_what_it_reads_at_generation(row: dict[str, Any]):
    example = only(row)
    for number, (start, _) in enumerate(spans(example)):
        asked = only({"messages": row["messages"][: 2 * number + 1]})
        assert asked.tokens == example.tokens[:start]
        assert not any(asked.targets)


def test_a_conversation_of_one_turn_is_an_instruction_in_the_chat_template():
    instruction = Task(template="chat", system="Be kind.")
    [example], _ = instruction.examples(
        [{"instruction": "Say hello.", "output": "Hello."}],
        TOKENIZER,
        max_prompt=100,
        max_length=200,
        end_id=END,
        source="chat",
    )
    assert only(says("Say hello.", "Hello."), system="Be kind.") == example
    assert only(says("Say hello.", "Hello.", system="Be kind."), system="Be rude.") == example  # its own comes first


def test_the_last_turn_is_what_is_asked_for_and_scored():
    task, row = Task(CHAT), says("One?", "1", "Two?", "2", system="Count.")
    assert task.references(row) == ["2"]
    assert task.user_text(row) == "system: Count.\nuser: One?\nassistant: 1\nuser: Two?"
    assert task.user_text(says("One?", "1")) == "One?"
    assert task.prompt_text(row, TOKENIZER).endswith("user: Two?\nassistant: ")
    assert task.references({"messages": row["messages"][:-1]}) == []
    _, [asked] = task.only_asked([row])
    assert asked == {"messages": row["messages"][:-1]}
    assert task.only_asked([asked])[1] == [asked]
    assert task.any_answered([asked, row])
    assert not task.any_answered([asked])


# ---------------------------------------------------------------------------------------------------------- last_turn


def test_a_response_answers_everything_before_the_last_turn():
    example = only(says("One?", "1", "Two?", "2"))
    (_, first_end), (start, end) = spans(example)
    asked = last_turn(example)
    assert asked.prompt == example.tokens[:start]
    assert asked.response == example.tokens[start:end]
    assert last_turn(asked) == asked
    written = answer(example, [7, END], "student", born=3)
    assert written.tokens == [*example.tokens[:start], 7, END]
    assert written.targets == [False] * start + [True, True]
    assert first_end < start


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.none() | st.lists(st.integers(50, 60), max_size=3))
def test_the_last_run_of_targets(marks: list[bool], context: list[int] | None):
    example = Example("x", [*range(len(marks))], marks, teacher_context=context)
    asked = last_turn(example)
    runs = spans(example)
    assert asked.tokens == example.tokens
    assert spans(asked) == runs[-1:]
    if context is not None:  # the teacher reads its own beginning, then what follows it
        first = example.start
        assert asked.teacher_context == context + example.tokens[first : max(asked.start, first)]
    if len(runs) < 2:
        assert asked == example


# ------------------------------------------------------------------------------------------------------------- limits


def test_the_oldest_turns_leave_first_and_the_system_message_stays():
    row = says("One?", "1", "Two?", "2", "Three?", "3", system="Count.")
    whole = only(row)
    (_, _), (_, _), (start, end) = spans(whole)
    fits, report = build([row], max_prompt=start, max_length=end)
    assert fits == [whole]
    assert str(report) == "1 of 1 rows used, all whole."
    for limits in ({"max_prompt": start - 1}, {"max_prompt": start, "max_length": end - 1}):
        [kept], report = build([row], **limits)
        assert kept.tokens == only(says("Two?", "2", "Three?", "3", system="Count.")).tokens
        assert str(report) == "1 of 1 rows used: 1 without their oldest turns."
    shortest = only(says("Three?", "3", system="Count."))
    [kept], report = build([row], max_prompt=shortest.start)
    assert kept.tokens == shortest.tokens
    assert kept.id == "chat:0"
    with pytest.raises(DataError, match="1 dropped because the limit leaves no room for the user's text"):
        build([row], max_prompt=shortest.start - 1)


def test_a_long_last_turn_is_cut_and_gets_no_end():
    row = says("One?", "1", "Two?", "A river runs through the valley and turns the old mill.")
    short = only(says(*[m["content"] for m in row["messages"][2:]]))
    [kept], report = build([row], max_prompt=short.start, max_length=short.start + 5)
    assert kept.tokens == short.tokens[: short.start + 5]
    assert (report.shortened, report.cut_responses) == (1, 1)


def test_what_the_assistant_says_before_the_user_is_read_and_not_learned():
    turns = [{"role": "assistant", "content": "Hello."}, *says("One?", "1")["messages"]]
    example = only({"messages": turns})
    assert TOKENIZER.decode(example.prompt) == "assistant: Hello.</s>\nuser: One?\nassistant: "
    assert TOKENIZER.decode(example.response) == "1</s>"
    [kept], report = build([{"messages": turns}], max_prompt=example.start - 1)
    assert kept.tokens == only(says("One?", "1")).tokens
    assert report.shortened == 1


def test_rows_that_cannot_be_used_are_counted():
    empty = [says("One?", "", "Two?", "2"), says("One?", " \n"), says(" ", "1")]
    _, report = build([*empty, says("One?", "1"), says("One?", "1", "Two?")])
    assert (report.empty_responses, report.dropped, report.prompt_only) == (2, 1, 1)


# ---------------------------------------------------------------------------------------------------- forms of messages


def test_sharegpt_and_parts_of_text_are_the_same_messages():
    row = says("One?", "1", system="Count.")
    other = [
        {"from": who, "value": m["content"]} for who, m in zip(("system", "human", "gpt"), row["messages"], strict=True)
    ]
    fields = {"messages": "conversations"}
    assert only({"conversations": other}, fields=fields) == only(row)
    task = Task(CHAT, fields=fields)
    assert task.only_asked([{"conversations": other}])[1] == [{"conversations": other[:-1]}]
    assert task.row_of("One?") == {"conversations": [{"role": "user", "content": "One?"}]}
    parts = [{**m, "content": [{"type": "text", "text": t} for t in m["content"]]} for m in row["messages"]]
    assert only({"messages": parts}) == only(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "chat:0: its messages are .*, not a list of messages; each must look like"),
        ({"messages": "Hello."}, "chat:0: its messages are 'Hello.', not a list"),
        ({"messages": ["Hello."]}, "chat:0: message 0 is 'Hello.'; each must look like"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "chat:0: message 0 is of role 'tool'; the roles are system"),
        ({"messages": [*says("a")["messages"], {"role": "system", "content": "x"}]}, "message 1 is of role 'system'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 has the content None, which is not a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 has the content .*, which"),
        ({"turns": []}, r"chat:0: the field 'messages' \(for messages\) is missing; the fields there are: turns"),
    ],
)  # fmt: skip
def test_bad_messages_are_named(row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        build([row])


# ---------------------------------------------------------------------------------------------------------- templates


def special(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat_template=template)
    turns = [AddedToken(token, normalized=False) for token in ("<turn>", "<done>")]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


TURNS = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] BEND }}<done>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@settings(deadline=None, max_examples=30)
@given(talks)
def test_with_tokens_around_turns_the_ids_are_those_of_the_whole_text(row: dict[str, Any]):
    tokenizer = special(TURNS.replace("BEND", ""))
    example = only(row, tokenizer, 301)
    whole = tokenizer(
        tokenizer.apply_chat_template(row["messages"], tokenize=False), add_special_tokens=False
    ).input_ids
    assert whole[: len(example.tokens)] == example.tokens
    assert whole[len(example.tokens) :] == tokenizer("\n", add_special_tokens=False).input_ids


def test_a_template_that_trims_is_learned_as_it_writes():
    tokenizer = special(TURNS.replace("BEND", "| trim"))
    example = only(says("One?", " 1 ", "Two?", "2\n"), tokenizer, 301)
    assert [tokenizer.decode(example.tokens[a:b]) for a, b in spans(example)] == ["1<done>", "2<done>"]
    padded = special(TURNS.replace("{{ m['content'] BEND }}", " {{ m['content'] }} "))
    example = only(says("One?", "1", "Two?", "2"), padded, 301)
    assert [padded.decode(example.tokens[a:b]) for a, b in spans(example)] == ["1<done>", "2<done>"]


def test_where_the_template_ends_no_turn_the_end_token_does():
    bare = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("{{ eos_token }}", ""))
    example = only(says("One?", "1", "Two?", "2"), bare)
    assert bare.decode(example.tokens) == "user: One?\nassistant: 1</s>\nuser: Two?\nassistant: 2</s>"


def test_templates_that_cannot_be_used_name_the_row():
    with pytest.raises(DataError, match=r"no chat template; task chat needs one: put a chat_template\.jinja"):
        build([says("One?", "1")], tiny_tokenizer())
    refuses = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"chat:0: .*roles must alternate"):
        build([says("One?", "1")], refuses)
    forgets = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '...' }}")
    with pytest.raises(DataError, match=r"chat:0: .* writes what comes before message 1 otherwise once more is said"):
        build([says("One?", "1")], tiny_tokenizer(chat_template=forgets))
    thinks = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'].split('!')[-1] if not loop.last else message['content'] }}"
    )
    assert only(says("One?", "hm!1"), tiny_tokenizer(chat_template=thinks))
    with pytest.raises(DataError, match=r"chat:0: .* writes what comes before message 3 otherwise"):
        build([says("One?", "hm!1", "Two?", "2")], tiny_tokenizer(chat_template=thinks))
    shouts = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | upper }}")
    with pytest.raises(DataError, match=r"chat:0: .* does not write message 1 as it is: 'ONE"):
        build([says("One?", "One")], tiny_tokenizer(chat_template=shouts))


def test_a_chat_has_no_template_but_the_tokenizers():
    with pytest.raises(ConfigError, match="task chat knows none but 'chat'"):
        Task(CHAT, template="{{ messages }}")


@pytest.mark.data
def test_the_chat_template_of_qwen():
    folder = SHARED / "tokenizers" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = says("How many legs has a spider?", "Eight.\n", "And an ant?", "  Six,\n\nas all insects. 🐜", "Thanks!", "!")
    for given_row in (row, {"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]}):
        example = only(given_row, tokenizer, end)
        whole = tokenizer.apply_chat_template(given_row["messages"], tokenize=True, return_dict=False)
        assert [*example.tokens, *tokenizer("\n").input_ids] == whole
        said = [tokenizer.decode(example.tokens[a:b]) for a, b in spans(example)]
        assert said == [m["content"] + "<|im_end|>" for m in row["messages"][1::2]]
        asked = given_row["messages"][:-1]
        prompt = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert last_turn(example).prompt == prompt
