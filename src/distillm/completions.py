"""Prompts -> responses by a server: OpenAI's completions, which vLLM, llama.cpp and `transformers serve` speak."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from .accounting import part
from .client import Endpoint, Server, ask_all, endpoint, refused, whole
from .data.tokenize import around, encode_responses
from .errors import ConfigError
from .generation import Sampling, until_end
from .types import Example, answer, asked_of

SETTING = "data.responses_server"
PATH = "/completions"
SURE = 8
"""Answers that must all be of another tokenizer before the server's model is held to have one."""


@dataclass(frozen=True)
class Completions:
    """A model that a server runs, and the tokenizer that it shares.

    ``prompt`` says how prompts travel: as tokens, which is exact and brings tokens back where the server can say them
    (vLLM), or as text, which the server tokenises itself. ``end_id`` ends a response that came as text and was not cut.
    ``extra`` are further fields of a request; a value of None leaves the field of that name out.
    """

    server: Server
    model: str
    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]
    end_id: int
    num_tokens: int
    prompt: Literal["tokens", "text"] = "tokens"
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @part("generation")
    def __call__(
        self,
        prompts: Sequence[Example],
        sampling: Sampling,
        *,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        keep: Callable[[list[Example]], None] | None = None,
    ) -> list[Example]:
        """Answer each prompt, in input order, ``server.jobs`` at a time; like ``generation.generate`` for a teacher.

        Draws are the server's; where it honours a request's seed, each row has its own, of ``seed`` and its id.
        ``progress`` is called with the number of rows finished so far, and several times a second while waiting; what
        it raises ends the work. ``keep`` gets each answer as it comes.

        Raises:
            ConfigError: the server refuses: the key, the address, the model or the request is wrong; or its model has
                another tokenizer.
            ServerError: the server gives no answer to a prompt.
        """
        bodies = [self._body(asked_of(prompt, "teacher"), sampling, _seed(seed, prompt.id)) for prompt in prompts]
        answers: dict[int, Example] = {}
        strangers: list[bool] = []

        def heard(i: int, said: _Said) -> None:
            strangers.append(self._strange(said))
            if len(strangers) >= min(SURE, len(prompts)) and all(strangers):
                raise ConfigError(
                    "the tokens of the server's model mean another text here: it does not have the student's "
                    f"tokenizer. Ask by text: {SETTING}.prompt=text"
                )
            # Text that is tokenised anew may have more tokens than the model wrote.
            answers[i] = answer(prompts[i], self._tokens(said)[: sampling.max_new_tokens], "teacher")
            if keep is not None and not all(strangers):
                keep([answers[i]])

        address = endpoint(self.server.url, PATH, f"{SETTING}.url")
        asked = Endpoint(address, "completion", _read, lambda status: _advice(status, address))
        ask_all(self.server, asked, bodies, [prompt.id for prompt in prompts], heard, progress)
        return [answers[i] for i in range(len(prompts))]

    def _body(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """A request. A server fills what is left out from the model's own file, or as it likes: nothing may be."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.temperature > 0:
            body["seed"] = seed
        if self.prompt == "text":  # asked of servers that know no fields beyond OpenAI's
            front = around(self.tokenizer)[0]  # which the server puts there itself
            text = prompt[len(front) :] if prompt[: len(front)] == front else prompt
            body["prompt"] = self.tokenizer.decode(text)
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        else:
            body |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        return {name: value for name, value in (body | dict(self.extra)).items() if value is not None}

    def _strange(self, said: "_Said") -> bool:
        """Whether the tokens of what was said are not those of its text, up to how white space is treated."""
        if self.prompt == "text" or not said.tokens or not said.text.strip():
            return False
        own = cast(str, self.tokenizer.decode(said.tokens, skip_special_tokens=True))
        return "".join(own.split()) != "".join(said.text.split())

    def _tokens(self, said: "_Said") -> list[int]:
        """The response as tokens; one that was not cut ends with an end token."""
        tokens = said.tokens
        if tokens is None or self.prompt == "text":
            tokens = encode_responses(self.tokenizer, [said.text], self.end_id)[0]
            return tokens[:-1] if said.cut else tokens
        strange = [token for token in tokens if not 0 <= token < self.num_tokens]
        if strange:
            raise ConfigError(
                f"the server's model wrote token {strange[0]}, and the student's tokenizer has {self.num_tokens}: they "
                f"do not share a tokenizer. Ask by text: {SETTING}.prompt=text"
            )
        tokens = until_end(tokens, self.end_ids)
        ended = said.cut or (bool(tokens) and tokens[-1] in self.end_ids)
        return tokens if ended else [*tokens, self.end_id]


@dataclass(frozen=True)
class _Said:
    """What a server wrote. ``tokens`` is None where it says none; ``cut`` says that it was stopped by length."""

    text: str
    tokens: list[int] | None
    cut: bool


def _read(found: Any) -> _Said:
    choice = found["choices"][0]
    text, tokens = choice["text"], choice.get("token_ids")
    if not isinstance(text, str) or not (tokens is None or all(type(token) is int for token in tokens)):
        raise TypeError
    return _Said(whole(text), tokens, choice.get("finish_reason") == "length")


def _seed(seed: int, row: str) -> int:
    """A seed of 31 bits that belongs to (seed, row)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=4).digest()) >> 1


def _advice(status: int, url: str) -> str:
    return refused(status, url, SETTING) or (
        f"The request itself is not accepted. A server that takes no tokens is asked by text: {SETTING}.prompt=text. "
        f"Fields can be added, or left out by null: {SETTING}.body={{return_token_ids: null}}"
    )
