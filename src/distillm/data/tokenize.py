"""Text -> token ids, in one place, so that training, generation and evaluation read the same tokens."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, has_specials: bool) -> list[list[int]]:
    """The ids of each prompt: the special tokens the tokenizer puts in front (once), then the text, and no end token.

    ``has_specials``: the texts come from a chat template, which has written the special tokens itself.
    """
    front = [] if has_specials else around(tokenizer)[0]
    ids = _plain(tokenizer, texts)
    # A user's template may begin with the BOS token's text, which must not be doubled.
    return [row if row[: len(front)] == front else front + row for row in ids]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], end_id: int) -> list[list[int]]:
    """The ids of each response and the end token, which is learned like every other."""
    # Some translation models have another vocabulary for what they write.
    return [[*row, end_id] for row in _plain(tokenizer, texts, "text_target")]


def longest_fit(tokenizer: PreTrainedTokenizerBase, text: str, fits: Callable[[str], bool], num_tokens: int) -> str:
    """The longest beginning of ``text``, at most about ``num_tokens`` long, for which ``fits`` holds; "" where none.

    Cuts lie between tokens, or between characters where the tokenizer knows no offsets.
    """
    cuts = list(range(1, len(text) + 1))
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # Several tokens of one character (bytes of an emoji) end at the same place.
        cuts = sorted({end for _, end in encoded["offset_mapping"] if end > 0})[:num_tokens]
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[: cuts[middle - 1]].rstrip()):
            low = middle
        else:
            high = middle - 1
    return text[: cuts[low - 1]].rstrip() if low else ""


def _plain(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], side: Literal["text", "text_target"] = "text"
) -> list[list[int]]:
    if not texts:
        return []
    # verbose: our own limits apply, not the tokenizer's warning about the model's length.
    settings: Any = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded: Any = tokenizer(**{side: list(texts)}, **settings)
    return [list(row) for row in encoded["input_ids"]]


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts in front of a text, and behind one that an encoder reads.

    ``bos_token_id`` does not say: GPT-2 has one and adds none.
    """
    probe = "a"
    whole: list[int] = list(tokenizer(probe)["input_ids"])
    body = _plain(tokenizer, [probe])[0]
    if not body:
        return [i for i in whole[:1] if i == tokenizer.bos_token_id], []
    start = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
    return whole[:start], whole[start + len(body) :]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens too; joined they are the text of all.

    A token that is a part of a character adds nothing until the last part of it, which adds the character.
    """
    texts: list[str] = []
    start, done = 0, 0  # the last token that added something stands before, so that spaces come out as in the whole
    for end in range(1, len(ids) + 1):
        before, now = text_of(tokenizer, ids[start:done]), text_of(tokenizer, ids[start:end])
        if now.endswith(INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, end
    return texts


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ``ids``, special tokens too."""
    return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
