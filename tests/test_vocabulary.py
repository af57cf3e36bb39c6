"""Vocabularies are shared or refused by name; trained tokenizers give every text back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from distillm.errors import DataError, ModelError
from distillm.vocabulary import end_ids, padded_note, shared_tokens, text_end, train_tokenizer
from tiny import CHAT_TEMPLATE, SENTENCES, tiny_causal, tiny_tokenizer


def test_one_vocabulary_is_shared_whole() -> None:
    assert shared_tokens(tiny_tokenizer(), tiny_tokenizer()) == len(tiny_tokenizer()) == 300


def test_added_token_counts_on_both_sides_or_is_named() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    one.add_tokens(["<|extra|>"])
    with pytest.raises(ModelError, match=r"token 300 is missing for the teacher and '<\|extra\|>' for the student"):
        shared_tokens(one, other)
    with pytest.raises(ModelError, match=r"token 300 is '<\|extra\|>' for the teacher and missing for the student"):
        shared_tokens(other, one)
    other.add_tokens(["<|extra|>"])
    assert shared_tokens(one, other) == 301


def test_first_token_that_differs_is_named() -> None:
    student = train_tokenizer(SENTENCES, size=300)
    teacher = tiny_tokenizer()
    assert student.convert_ids_to_tokens(2) == "<unk>"
    with pytest.raises(ModelError, match="token 2 is '!' for the teacher and '<unk>' for the student"):
        shared_tokens(student, teacher)


def test_a_text_ends_with_the_models_token_where_the_tokenizer_has_none() -> None:
    tokenizer = tiny_tokenizer()
    assert text_end(tokenizer, [7]) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert text_end(tokenizer, [50_256, 7]) == 7
    with pytest.raises(ModelError, match=r"the model's \(50256\) is none of its 300 tokens"):
        text_end(tokenizer, [50_256])


def test_different_end_tokens_are_refused() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    student.eos_token = "<pad>"
    with pytest.raises(ModelError, match="end token is '</s>' for the teacher and '<pad>' for the student"):
        shared_tokens(student, teacher)


def test_padded_sizes_are_noted_in_one_line() -> None:
    assert padded_note(300, 300, 300) is None
    assert padded_note(320, 320, 300) is None
    note = padded_note(300, 384, 300)
    assert note is not None
    assert "\n" not in note
    assert "384" in note
    assert "300" in note


@pytest.mark.parametrize(
    ("generation", "config", "token", "expected"),
    [
        (None, None, 1, (1,)),
        ([5, 6], 5, 1, (5, 6, 1)),
        (6, [7, 6], None, (6, 7)),
        (0, None, 0, (0,)),
    ],
)
def test_every_end_token_counts_once(generation: Any, config: Any, token: Any, expected: tuple[int, ...]) -> None:
    model = tiny_causal()
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    tokenizer: Any = SimpleNamespace(eos_token_id=token)
    assert end_ids(model, tokenizer) == expected


def test_no_end_token_is_an_error() -> None:
    model = tiny_causal()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    assert end_ids(model, tokenizer) == (1,)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no token ends a response"):
        end_ids(model, tokenizer)


BPE = train_tokenizer(SENTENCES, size=320)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bpe_gives_back_any_text(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


def test_bpe_learns_merges_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, size=320, chat_template=CHAT_TEMPLATE)
    assert len(tokenizer) == 320
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length < 10**7
    text = SENTENCES[0]
    assert len(tokenizer(text)["input_ids"]) < 0.8 * len(text.encode())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert shared_tokens(again, tokenizer) == 320
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    assert again.apply_chat_template(chat, tokenize=False) == "user: Hi.\nassistant: Yes.</s>\n"
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_unigram_gives_back_texts_of_characters_it_has_seen(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(SENTENCES * 5), model="unigram", size=120)
    assert 60 < len(tokenizer) <= 120
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES, "The spider sat on a bread.", "a  bread"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert again(text)["input_ids"] == ids
    assert tokenizer.unk_token_id in tokenizer("喵")["input_ids"]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("texts", [[], [""], ["", " \n\t "]])
def test_no_text_is_an_error(model: Any, texts: list[str]) -> None:
    with pytest.raises(DataError, match="the texts are empty"):
        train_tokenizer(texts, model=model, size=300)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.lists(
        st.text(st.sampled_from("abcdefgh é\n"), min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=9
    ),
)
def test_unigram_keeps_to_its_size_or_says_what_it_needs(size: int, texts: list[str]) -> None:
    characters = set("".join(texts)) | {" "}
    if size < 3 + len(characters) + 1:
        with pytest.raises(DataError, match="too small"):
            train_tokenizer(texts, model="unigram", size=size)
    else:
        assert len(train_tokenizer(texts, model="unigram", size=size)) <= size


def test_a_unigram_without_room_does_not_train_for_ever() -> None:
    texts = ["agfgdd", "\néa\ngbfaa", "agfgdd", "\néa\ngbfaa", "agfgdd"]  # on which the trainer itself does not end
    with pytest.raises(DataError, match="need at least 12"):
        train_tokenizer(texts, model="unigram", size=8)


def test_sizes_too_small_say_what_is_needed() -> None:
    with pytest.raises(DataError, match="bpe tokenizer of 258 tokens is too small: it needs at least 259"):
        train_tokenizer(SENTENCES, size=258)
    assert len(train_tokenizer(SENTENCES, size=259)) == 259
    smallest = 3 + len(set("".join(SENTENCES))) + 1
    with pytest.raises(DataError, match=f"characters of these texts need at least {smallest}"):
        train_tokenizer(SENTENCES, model="unigram", size=smallest - 1)
    assert len(train_tokenizer(SENTENCES, model="unigram", size=smallest)) <= smallest
    unknown: Any = "wordpiece"
    with pytest.raises(DataError, match="give bpe or unigram"):
        train_tokenizer(SENTENCES, model=unknown, size=300)
