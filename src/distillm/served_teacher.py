"""A teacher on a server that scores given tokens: vLLM's ``prompt_logprobs``, or completions with ``echo`` and
``logprobs``.

Rows travel as token ids. A server says the likeliest tokens of each position, so a divergence has them and one bucket.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .client import Endpoint, Server, ask_all, endpoint, refused
from .errors import ConfigError, ServerError
from .types import Example, Head, Layout, as_teacher_reads

T = TypeVar("T")
SETTING = "teacher.server"
PATH = "/completions"

Listed = list[dict[int, float] | None]
"""For each token of a row the log-probabilities, by token, of what may stand there; None where nothing is said."""


@dataclass(frozen=True)
class Way:
    """A way to ask for the probabilities of given tokens: its name, the fields of a request for k, and how a choice of
    the reply is read, which raises one of the errors of a malformed value where it does not have them."""

    name: str
    fields: Callable[[int], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], Listed]


def _prompt_logprobs(choice: Mapping[str, Any]) -> Listed:
    said: list[dict[str, Any] | None] = choice["prompt_logprobs"]
    return [None if not each else {int(token): float(of["logprob"]) for token, of in each.items()} for each in said]


def _echo(choice: Mapping[str, Any]) -> Listed:
    said = choice["logprobs"]
    found: Listed = []
    for likeliest, token, own in zip(said["top_logprobs"], said["tokens"], said["token_logprobs"], strict=True):
        place = likeliest and {_id_in(each): float(value) for each, value in likeliest.items()}
        if place:  # which may leave out the token that is there
            place.setdefault(_id_in(token), float(own))
        found.append(place)
    return found


def _id_in(token: str) -> int:
    """The number in "token_id:17", which is how a server names a token that is to be told from others."""
    name, _, number = token.partition("token_id:")
    if name or not number.isascii() or not number.isdigit():
        raise ValueError(f"the token {token!r} is named by its text, which more than one may have")
    return int(number)


WAYS = (
    Way("prompt_logprobs", lambda k: {"prompt_logprobs": k}, _prompt_logprobs),
    Way("echo", lambda k: {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}, _echo),
)


@dataclass
class ServedTeacher:
    """The model ``model`` of ``server``, of whose distributions the ``top_k`` likeliest tokens are known.

    It shares the tokenizer, whose tokens are the first ``num_tokens``. ``probe`` finds how the server is to be asked.
    ``extra`` are further fields of a request; a value of None leaves the field of that name out.
    """

    server: Server
    model: str
    top_k: int
    tokenizer: PreTrainedTokenizerBase
    num_tokens: int
    layout: Layout
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keeps: bool = True
    packed: bool = True
    joint: bool = False
    way: Way | None = None

    def probe(self) -> str:
        """Ask about a few tokens in every way there is, and go on with the first that works; returns its name.

        Raises:
            ConfigError: the server scores no given tokens, knows fewer than ``top_k`` of each place, or has another
                tokenizer.
            ServerError: the server gives no answer.
        """
        ids = self.tokenizer.encode("The capital of France is Paris.", add_special_tokens=False)[:8]
        row = Example("a first question", ids, [False] + [True] * (len(ids) - 1))
        refused: list[str] = []
        for way in WAYS:
            try:
                choice = self._ask([row], way, lambda choice: choice)[0]
                self._listed(row, _read(way, choice))
                self._check_texts(row, choice)
            except _Unable as error:
                refused.append(f"- {way.name}: {error}")
            except ConfigError as error:
                refused.append(f"- {way.name}: {' '.join(str(error).split())}")
            else:
                self.way = way
                return way.name
        said = "\n".join(refused)
        raise ConfigError(
            f"the server at {self.server.url} does not score given tokens as {SETTING} needs it to:\n{said}\n"
            "vLLM can (with --max-logprobs for a top_k above 20). A server that only writes can write the responses: "
            "data.responses_server"
        )

    def states(self, rows: Sequence[Example]) -> Sequence[Tensor]:
        """``[n, 2 k]`` for each row: the log-probabilities of the likeliest tokens at its n targets, and the tokens.

        Raises:
            ConfigError: the server refuses, or what it says is not about these tokens.
            ServerError: the server gives no answer.
        """
        if self.way is None:
            self.probe()
        assert self.way is not None
        read = [as_teacher_reads(row) for row in rows]
        return [
            self._listed(row, said) for row, said in zip(read, self._ask(read, self.way, self.way.read), strict=True)
        ]

    def _ask(self, rows: Sequence[Example], way: Way, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
        """What ``read`` gives of each reply; a reply that it cannot read is asked for again."""
        fields = {"model": self.model, "max_tokens": 1, "temperature": 0.0, **way.fields(self.top_k), **self.extra}
        fields = {name: value for name, value in fields.items() if value is not None}
        address = endpoint(self.server.url, PATH, f"{SETTING}.url")
        asked = Endpoint(
            address, "scored prompt", lambda reply: read(reply["choices"][0]), lambda status: _advice(status, address)
        )
        found: dict[int, T] = {}
        bodies = [fields | {"prompt": row.tokens} for row in rows]
        ask_all(self.server, asked, bodies, [row.id for row in rows], found.__setitem__)
        return [found[i] for i in range(len(rows))]

    def _check_texts(self, row: Example, choice: Mapping[str, Any]) -> None:
        """Compare the texts of tokens, where the server says them, with this tokenizer's."""
        places = choice.get("prompt_logprobs") or []
        pairs: list[tuple[str, str]] = []
        for token, place in zip(row.tokens[1:], places[1:], strict=False):
            said = place[str(token)].get("decoded_token")
            if isinstance(said, str):
                pairs.append((cast(str, self.tokenizer.decode([token])).strip(), said.strip()))
        if pairs and all(own != said for own, said in pairs):
            own, said = pairs[0]
            raise ConfigError(
                f"token {row.tokens[1]} is {own!r} here and {said!r} for the server's model: they do not share a "
                "tokenizer"
            )

    def head(self, states: Tensor) -> Head:
        """As in ``Teacher``."""
        return Head(states, None, listed=self.num_tokens)

    def lend(self) -> None:
        """As in ``Teacher``: never asked for."""

    def _listed(self, row: Example, said: Listed) -> Tensor:
        if len(said) < len(row.tokens):
            raise ConfigError(f"{row.id}: {len(row.tokens)} tokens were asked about, and {len(said)} answered")
        places = [i for i, target in enumerate(row.targets) if target]
        rows: list[list[float]] = []
        for i in places:
            place = said[i] or {}
            if row.tokens[i] not in place:
                raise ConfigError(
                    f"{row.id}: what the server says of token {i} does not speak of the token that is there: its model "
                    "reads other tokens than were sent"
                )
            # The token that is there is listed besides, where it is none of the likeliest.
            likeliest = sorted(place.items(), key=lambda each: (-each[1], each[0]))[: self.top_k]
            if len(likeliest) < self.top_k:
                raise ConfigError(
                    f"{row.id}: the server lists {len(likeliest)} tokens of a place, fewer than {SETTING}.top_k="
                    f"{self.top_k}"
                )
            ids = [token for token, _ in likeliest]
            if not all(0 <= token < self.num_tokens for token in ids):
                raise ConfigError(
                    f"{row.id}: the server lists token {max(ids)}, and the student's tokenizer has {self.num_tokens}: "
                    "they do not share a tokenizer"
                )
            values = [value for _, value in likeliest]
            if not all(value <= 1e-3 for value in values):  # NaN is none, either
                raise ServerError(f"{row.id}: the server says log-probabilities that are none: {values}")
            rows.append([*(min(value, 0.0) for value in values), *map(float, ids)])
        return torch.tensor(rows, dtype=torch.float32).reshape(len(places), 2 * self.top_k)


class _Unable(Exception):
    """The server's reply has not what a way of asking needs."""


def _read(way: Way, choice: Mapping[str, Any]) -> Listed:
    try:
        return way.read(choice)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "the reply says nothing of the prompt's tokens"
        raise _Unable(reason) from error


def _advice(status: int, url: str) -> str:
    return refused(status, url, SETTING) or (
        f"Does it list as many tokens as {SETTING}.top_k, and read rows of data.max_length and one token more?"
    )
