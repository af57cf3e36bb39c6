"""Vocabularies: the entries two models share, the tokens that end a response, and training a tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, cast

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import DataError, ModelError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
_SPECIAL = [PAD, EOS, UNK]
_SMALLEST = {"bpe": 256 + len(_SPECIAL), "unigram": len(_SPECIAL) + 3}
# Lengths are limited by the data settings; this only has to be finite and above them all.
_NO_LIMIT = 1 << 20


def shared_tokens(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that mean something, below which both models' vocabularies are the same.

    Models may be padded beyond it. Raises ModelError, naming the first id that differs, for two different vocabularies.
    """
    student = {id_: token for token, id_ in student_tokenizer.get_vocab().items()}
    teacher = {id_: token for token, id_ in teacher_tokenizer.get_vocab().items()}
    if student != teacher:
        first = min(id_ for id_ in student.keys() | teacher.keys() if student.get(id_) != teacher.get(id_))
        raise ModelError(
            f"teacher and student have different tokenizers: token {first} is {_shown(teacher, first)} for the teacher "
            f"and {_shown(student, first)} for the student; give the student the teacher's tokenizer"
        )
    if student_tokenizer.eos_token_id != teacher_tokenizer.eos_token_id:
        raise ModelError(
            f"teacher and student end their responses differently: the end token is {teacher_tokenizer.eos_token!r} "
            f"for the teacher and {student_tokenizer.eos_token!r} for the student; give the student the teacher's "
            "tokenizer"
        )
    return max(student, default=-1) + 1


def _shown(vocabulary: dict[int, str], id_: int) -> str:
    return repr(vocabulary[id_]) if id_ in vocabulary else "missing"


def padded_note(student_vocab: int, teacher_vocab: int, num_tokens: int) -> str | None:
    """One line about models padded to different sizes, or None where the sizes are equal."""
    if student_vocab == teacher_vocab:
        return None
    return (
        f"the teacher's vocabulary is padded to {teacher_vocab} entries and the student's to {student_vocab}: "
        f"the {num_tokens} they share are used, the others left out"
    )


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a response: the generation configuration's, the model's and the tokenizer's.

    Raises ModelError where there is none.
    """
    sources = (getattr(model, "generation_config", None), model.config, tokenizer)
    found: list[int] = []
    for source in sources:
        ids: int | list[int] | None = getattr(source, "eos_token_id", None)
        found += [] if ids is None else [ids] if isinstance(ids, int) else ids
    if not found:
        raise ModelError(
            "no token ends a response: neither the model's generation_config.json and config.json nor the tokenizer "
            'has an end token; set "eos_token" in tokenizer_config.json'
        )
    return tuple(dict.fromkeys(found))


def text_end(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    """The token that ends a text: the tokenizer's end token, or the first of ``end_ids`` where it has none.

    Raises ModelError where those lie outside the vocabulary.
    """
    if tokenizer.eos_token_id is not None:
        return cast(int, tokenizer.eos_token_id)
    found = next((i for i in end_ids if i < len(tokenizer)), None)
    if found is None:
        raise ModelError(
            f"the tokenizer has no end token, and the model's ({', '.join(map(str, end_ids))}) is none of its "
            f'{len(tokenizer)} tokens; set "eos_token" in tokenizer_config.json'
        )
    return found


def turn_end(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    """The token that ends the assistant's turn in the chat template: the first of ``end_ids`` after its text.

    It need not be the tokenizer's end token, which is the answer where the template writes none of ``end_ids``.
    """
    after = behind_response(tokenizer)
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    written = next((i for i in ids if i in end_ids), None)
    return text_end(tokenizer, end_ids) if written is None else written


def behind_response(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind the assistant's text; "" where it cannot say, or there is none."""
    said = "Twelve."
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": said}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False)) if tokenizer.chat_template else ""
    except (jinja2.TemplateError, ValueError):  # a template for questions only
        text = ""
    return text.rpartition(said)[2] if said in text else ""


def train_tokenizer(
    texts: Iterable[str],
    *,
    model: Literal["bpe", "unigram"] = "bpe",
    size: int,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most ``size`` tokens learned from ``texts``; its first are ``<pad>``, ``</s>`` and ``<unk>``.

    ``bpe`` works on bytes and gives back any text; ``unigram`` knows only the characters it has seen. Raises DataError
    for empty texts, and for a size with no room for the bytes or characters.
    """
    if model not in _MODELS:
        raise DataError(f"there is no tokenizer model {model!r}: give bpe or unigram")
    if size < _SMALLEST[model]:
        raise DataError(f"a {model} tokenizer of {size} tokens is too small: it needs at least {_SMALLEST[model]}")
    written = (text for text in texts if text.strip())
    first = next(written, None)
    if first is None:
        raise DataError("there is no text to learn a tokenizer from: the texts are empty")
    tokenizer, trainer = _MODELS[model](size)
    texts = chain([first], written)
    tokenizer.train_from_iterator(_with_room(texts, size) if model == "unigram" else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=_NO_LIMIT,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _with_room(texts: Iterable[str], size: int) -> Iterator[str]:
    """``texts``, read once; at their end DataError where a unigram of ``size`` cannot hold their characters.

    The trainer reads all of them before it begins, and where there is no room it may never end.
    """
    seen = set(" ")
    for text in texts:
        seen.update(text)
        yield text
    # One more than the characters, or else the trainer exceeds the size it is given.
    smallest = len(_SPECIAL) + len(seen) + 1
    if size < smallest:
        raise DataError(
            f"a unigram tokenizer of {size} tokens is too small: the characters of these texts need at least {smallest}"
        )


def _byte_level_bpe(size: int) -> tuple[Any, Any]:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def _unigram(size: int) -> tuple[Any, Any]:
    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=_SPECIAL, unk_token=UNK, show_progress=False)
    return tokenizer, trainer


_MODELS = {"bpe": _byte_level_bpe, "unigram": _unigram}
