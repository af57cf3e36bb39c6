"""Messages with roles -> tokens: what the assistant says, each turn's end token included, is learned."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .tokenize import encode_prompts

Message = dict[str, str]
SPEAKERS = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class Unfit(DataError):
    """The chat template cannot be used with these messages."""


def messages_of(given: Any, row_id: str) -> list[Message]:
    """The messages of a row: ``{role, content}``, or ``{from, value}`` as ShareGPT has it.

    A content may be a list of parts, all of them text. Raises DataError naming the row.
    """
    if not isinstance(given, list | tuple) or not given:
        raise DataError(f"{row_id}: its messages are {given!r:.40}, not a list of messages; {_EXAMPLE}")
    found: list[Message] = []
    for number, message in enumerate(given):
        what = f"{row_id}: message {number}"
        if not isinstance(message, Mapping):
            raise DataError(f"{what} is {message!r:.40}; {_EXAMPLE}")
        speaker = message.get("role", message.get("from"))
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None or (role == "system" and number):
            allowed = "system (the first message), user and assistant"
            raise DataError(f"{what} is of role {speaker!r:.40}; the roles are {allowed}")
        found.append({"role": role, "content": _text(message.get("content", message.get("value")), what)})
    return found


_EXAMPLE = 'each must look like {"role": "user", "content": "..."}'


def _text(content: Any, what: str) -> str:
    if isinstance(content, str):
        return content
    parts = [p.get("text") if isinstance(p, Mapping) else None for p in content] if isinstance(content, list) else []
    texts = [text for text in parts if isinstance(text, str)]
    if not texts or len(texts) < len(parts):
        raise DataError(f"{what} has the content {content!r:.40}, which is not a text; write it as a text in the data")
    return "".join(texts)


def asked_of(messages: Sequence[Message]) -> list[Message]:
    """The messages before the last turn of the assistant, where that is what the conversation ends with."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def written(messages: Sequence[Message]) -> str:
    """What was said, to be read: the text itself where one user says one thing, else a line for each message."""
    said = [message for message in messages if message["role"] != "system"]
    if len(said) == 1:
        return said[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool, row_id: str) -> str:
    """``messages`` in the tokenizer's chat template; ``ask`` ends with the beginning of the assistant's turn."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template can raise anything
        raise Unfit(f"{row_id}: the tokenizer's chat template failed: {error}") from error


@dataclass
class Conversation:
    """A row's messages and how they become tokens, segment by segment.

    What comes before a turn of the assistant is encoded on its own, and so is what the assistant says: at generation
    the model has read the same ids that it read in training. A turn ends with ``end_id``; where the template writes no
    such token after a turn, it is put there. What the assistant says before the user has spoken is read, not learned.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    end_id: int
    row_id: str

    @cached_property
    def segments(self) -> list[tuple[list[int], bool]]:
        """Token ids, and whether they are the assistant's; contexts and turns in alternation.

        Raises DataError where the template writes the beginning of a conversation otherwise than the whole.
        """
        texts: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant" and any(m["role"] == "user" for m in self.messages[:i]):
                before = self._render(self.messages[:i], ask=True)
                after = self._render(self.messages[: i + 1], ask=False)
                texts.append((self._beyond(done, before, i), False))
                said, done = self._turn(self._beyond(before, after, i), before, message["content"], i)
                texts.append((said, True))
        if self.messages[-1]["role"] != "assistant":
            texts.append((self._beyond(done, self._render(self.messages, ask=True), len(self.messages)), False))
        # The template has written the special tokens itself.
        ids = encode_prompts(self.tokenizer, [text for text, _ in texts], has_specials=True)
        return [([*row, self.end_id] if said else row, said) for row, (_, said) in zip(ids, texts, strict=True)]

    @property
    def prompt_length(self) -> int:
        """Tokens before the last turn of the assistant."""
        return sum(len(ids) for ids, _ in self.segments) - len(self.response)

    @property
    def response(self) -> list[int]:
        """The last turn, if it is the assistant's."""
        ids, said = self.segments[-1]
        return ids if said else []

    def fitting(self, max_prompt: int, max_length: int) -> "tuple[Conversation | None, int]":
        """The conversation without as many of its oldest turns as it takes, and their number.

        The system message stays, and at the least what the user said last. None where the prompt does not fit even so.
        """
        system = [m for m in self.messages[:1] if m["role"] == "system"]
        rest = self.messages[len(system) :]
        last = len(asked_of(rest)) if rest else 0
        # A conversation begins with its first message, or with what a user says later on.
        starts = [0, *(i for i in range(1, last) if rest[i]["role"] == "user")]
        made = [Conversation(self.tokenizer, system + rest[i:], self.end_id, self.row_id) for i in starts]

        def fits(kept: Conversation) -> bool:
            length = kept.prompt_length
            return length <= max_prompt and length + len(kept.response) <= max_length

        at = 0 if fits(made[0]) else min(bisect_left(made, True, lo=1, key=fits), len(made) - 1)
        kept = made[at]
        return (kept if kept.prompt_length <= max_prompt else None), starts[at]

    def _render(self, messages: Sequence[Message], *, ask: bool) -> str:
        return render(self.tokenizer, messages, ask=ask, row_id=self.row_id)

    def _beyond(self, beginning: str, whole: str, number: int) -> str:
        if not whole.startswith(beginning):
            raise DataError(
                f"{self.row_id}: the tokenizer's chat template writes what comes before message {number} otherwise "
                "once more is said, so a model would not read what it has learned; use another chat template"
            )
        return whole[len(beginning) :]

    def _turn(self, written: str, before: str, content: str, number: int) -> tuple[str, str]:
        """What the assistant says, as the template writes it, and all text up to the end of the turn."""
        exact = written.startswith(content)
        said, start = (content, 0) if exact else (content.strip(), len(written) - len(written.lstrip()))
        if not written.startswith(said, start):
            raise DataError(
                f"{self.row_id}: the tokenizer's chat template does not write message {number} as it is: "
                f"{written!r:.60}; use another chat template"
            )
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_id))
        at = written.find(end, start + len(said))
        return said, before + written[: start + len(said) if at < 0 else at + len(end)]
