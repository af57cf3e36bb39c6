"""What a server's chat completions say, and what they cost."""

from dataclasses import dataclass
from typing import Any

from ..client import Endpoint, endpoint, whole
from .cache import Reply


@dataclass
class Usage:
    """What judging came to: requests that were answered, replies from the cache, requests that were made again.

    Tokens are those of ``calls``, and of ``cached``; ``unknown`` counts the replies for which the server gave none.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    unknown: int = 0

    def count(self, reply: Reply, *, cached: bool) -> None:
        """Add one reply."""
        self.unknown += reply.prompt_tokens is None or reply.completion_tokens is None
        prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
        if cached:
            self.cached += 1
            self.cached_prompt_tokens += prompt
            self.cached_completion_tokens += completion
        else:
            self.calls += 1
            self.prompt_tokens += prompt
            self.completion_tokens += completion


def chat_completions(url: str) -> Endpoint[Reply]:
    """The chat completions under ``url``. Raises ConfigError where it is no address."""
    address = endpoint(url, "/chat/completions", "--server")
    return Endpoint(address, "chat completion", _read, lambda status: _advice(status, address))


def _read(found: Any) -> Reply:
    choice = found["choices"][0]
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError
    usage = found.get("usage") or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) else None for n in counts)
    return Reply(whole(text), choice.get("finish_reason") == "length", prompt, completion)


def _advice(status: int, url: str) -> str:
    if status in (401, 403):
        return "Is the key right, and may it use this model? It is read from the environment variable of --key-env."
    if status == 404:
        return f"It was asked at {url}. Does --server end as the server wants it, often in /v1, and is --model right?"
    if 300 <= status < 400:
        return f"It was asked at {url}, and answers that it is elsewhere; give its real address by --server."
    return (
        "The request itself is not accepted. Fields can be added, or left out by null: --body '{\"max_tokens\": null}'"
    )
