"""Prompts -> responses by a server: OpenAI's completions, which vLLM, llama.cpp and `transformers serve` speak."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from .accounting import part
from .client import Client, Endpoint, NoAnswer, Server, endpoint, whole
from .data.tokenize import around, encode_responses
from .errors import ConfigError, ServerError
from .generation import Sampling, until_end
from .types import Example, answer, asked_of

SETTING = "data.responses_server"
PATH = "/completions"
POLL = 0.1  # seconds between two looks at whether the user wants to stop


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
    ) -> list[Example]:
        """Answer each prompt, in input order, ``server.jobs`` at a time; like ``generation.generate`` for a teacher.

        Draws are the server's; where it honours a request's seed, each row has its own, of ``seed`` and its id.
        ``progress`` is called with the number of rows finished so far, and several times a second while waiting; what
        it raises ends the work.

        Raises:
            ConfigError: the server refuses: the key, the address, the model or the request is wrong; or its model has
                another tokenizer.
            ServerError: the server gives no answer to a prompt.
        """
        bodies = [self._body(asked_of(prompt, "teacher"), sampling, _seed(seed, prompt.id)) for prompt in prompts]
        said = asyncio.run(self._ask([prompt.id for prompt in prompts], bodies, progress))
        # Text that is tokenised anew may have more tokens than the model wrote.
        responses = [self._tokens(each)[: sampling.max_new_tokens] for each in said]
        return [answer(prompt, response, "teacher") for prompt, response in zip(prompts, responses, strict=True)]

    def _body(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """A request. Only what differs from a server's own defaults is in it: some refuse fields they do not know."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "return_token_ids": True,
        }
        if self.prompt == "text":
            front = around(self.tokenizer)[0]  # which the server puts there itself
            text = prompt[len(front) :] if prompt[: len(front)] == front else prompt
            body |= {"prompt": self.tokenizer.decode(text), "return_token_ids": None}
        if sampling.temperature > 0:
            body["seed"] = seed
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        return {name: value for name, value in (body | dict(self.extra)).items() if value is not None}

    async def _ask(
        self, names: list[str], bodies: list[dict[str, Any]], progress: Callable[[int], None] | None
    ) -> list["_Said"]:
        said: list[_Said | None] = [None] * len(bodies)
        left = iter(range(len(bodies)))
        address = endpoint(self.server.url, PATH, f"{SETTING}.url")
        asked = Endpoint(address, "completion", _read, lambda status: _advice(status, address))
        async with Client(self.server, asked, asyncio.Event()) as client:
            every = [asyncio.create_task(_work(client, left, names, bodies, said)) for _ in range(self.server.jobs)]
            workers = set(every)
            try:
                while workers:
                    ended, workers = await asyncio.wait(workers, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                    for worker in ended:
                        worker.result()  # raises what the worker raised
                    if progress is not None:
                        progress(sum(each is not None for each in said))
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*every, return_exceptions=True)
        return cast("list[_Said]", said)

    def _tokens(self, said: "_Said") -> list[int]:
        """The response as tokens; one that was not cut ends with an end token."""
        tokens = said.tokens
        if tokens is None:
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


async def _work(
    client: Client[_Said], left: Iterator[int], names: list[str], bodies: list[dict[str, Any]], said: list[_Said | None]
) -> None:
    for i in left:
        try:
            said[i] = await client.answer(bodies[i], names[i])
        except NoAnswer as error:
            raise ServerError(
                f"{names[i]}: the server gave no answer in {client.server.attempts} attempts; the last time: {error}\n"
                "What was written before is kept: the same command with resume=auto goes on from there"
            ) from error


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
    if status in (401, 403):
        return f"Is the key right, and may it use this model? It is read from the variable of {SETTING}.key_env."
    if status == 404:
        return f"It was asked at {url}. Does {SETTING}.url end as it must, often in /v1, and is {SETTING}.model right?"
    if 300 <= status < 400:
        return f"It was asked at {url}, and answers that it is elsewhere; give its real address by {SETTING}.url."
    return (
        f"The request itself is not accepted. A server that takes no tokens is asked by text: {SETTING}.prompt=text. "
        f"Fields can be added, or left out by null: {SETTING}.body={{return_token_ids: null}}"
    )
